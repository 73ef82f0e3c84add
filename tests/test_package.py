"""The package: cheap to import, what it exports, what its wheel holds, and who may import whom."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import modernbert_lite

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modernbert_lite"
CORE = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))


def python(program: str, *options: str, **keywords) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=120, **keywords
    )
    assert done.returncode == 0, done.stderr[-1_000:]
    return done.stdout


def name_of(path: Path) -> str:
    """ops/cpu.py -> "ops.cpu"; a folder's __init__.py -> the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path):
    """(module, whether it is this package's) of every import in a file, lazy ones too; this package's from its folder
    on: "ops.cpu"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, False
        elif isinstance(node, ast.ImportFrom):
            at = [*path.relative_to(PACKAGE).parts[: -node.level], *(node.module or "").split(".")]
            module = ".".join(filter(None, at))
            for alias in node.names:
                below = (PACKAGE / module.replace(".", "/") / alias.name).with_suffix(".py")
                yield (f"{module}.{alias.name}".lstrip(".") if below.exists() else module), True


def third_party(path: Path) -> set[str]:
    names = {module.partition(".")[0] for module, own in imports(path) if not own}
    return names - sys.stdlib_module_names


# ---- importing -----------------------------------------------------------------------------------------------------


def test_import_brings_nothing_heavy_and_prints_nothing():
    heavy = ["torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "tqdm"]
    out = python(
        "import sys; import modernbert_lite; from modernbert_lite import cli; modernbert_lite.__version__;"
        f"dir(modernbert_lite); print([m for m in {heavy} if m in sys.modules])"
    )
    assert out == "[]\n"


def test_import_does_no_work():
    """Every module: no output, no thread, no file written, no CUDA, no hub call, no triton."""
    modules = ", ".join(f"modernbert_lite.{name_of(path)}" for path in CORE if not path.stem.startswith("__"))
    program = f"""
import socket, sys, threading
socket.socket.connect = lambda *_: sys.exit("network")
sys.modules["triton"] = sys.modules["transformers"] = sys.modules["tqdm"] = None
import {modules}
import torch
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
"""
    assert python(program, "-W", "error") == ""


def test_all_is_sorted_complete_and_what_dir_shows():
    assert sorted(modernbert_lite.__all__) == modernbert_lite.__all__
    assert dir(modernbert_lite) == sorted(modernbert_lite.__all__)
    assert set(modernbert_lite.__all__) == {*modernbert_lite._HOME, "__version__"}


@pytest.mark.parametrize("name", modernbert_lite.__all__)
def test_every_public_name_resolves_to_its_home(name):
    value = getattr(modernbert_lite, name)
    if name != "__version__":
        assert value.__module__ == f"modernbert_lite.{modernbert_lite._HOME[name]}"
        assert value.__doc__


def test_the_lazy_names_and_those_for_type_checkers_are_the_same():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == modernbert_lite._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'modernbert_lite' has no attribute 'Embeder'"):
        modernbert_lite.Embeder  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Embeder'"):
        from modernbert_lite import Embeder  # noqa: F401


def test_star_import():
    names = {}
    exec("from modernbert_lite import *", names)
    assert set(modernbert_lite.__all__) <= set(names)


# ---- who imports whom ----------------------------------------------------------------------------------------------

# Each row may import the rows before it.
FOLDERS = [
    {"batch", "reading"},
    {"ops"},
    {"models"},
    {"checkpoint"},
    {"pipeline"},
    {"classifier", "embedder", "fill_mask", "late_interaction", "reranker", "token_classifier"},
    {"cli"},
]
# Inside a folder the same. cpu and gpu, the twins, stand aside: they see the operations whose twins they are, and only
# what chooses may import them, lazily.
INSIDE = {
    "ops": [
        {"tracing"},
        {"choose", "onednn", "threads", "windows"},
        {"half", "rope"},
        {"reference"},
        {"linear", "pooling"},
        {"graphs"},
    ],
    "models": [{"fields", "rope"}, {"layers"}, {"gte", "modernbert"}, {"registry"}],
    "checkpoint": [
        {"foreign", "modules", "names"},
        {"folder"},
        {"hub", "settings", "sparse", "weights"},
        {"dense", "sentence"},
        {"open"},
    ],
    "pipeline": [
        {"keywords", "prompts", "tokenizer_files", "vectors"},
        {"tokenizer"},
        {"inputs"},
        {"feed"},
        {"base"},
        {"sparse"},
        {"tokens"},
    ],
    "cli": [{"console"}, {"inputs", "outputs"}, {"about", "writers"}, {"commands"}],
}
ASIDE = {"ops.cpu": {"ops.choose"}, "ops.gpu": {"ops.choose", "ops.graphs"}, "ops.padded": {"ops.gpu"}}
ASIDE |= {"kernels": {"ops.gpu"}}


def ranks(rows: list[set[str]]) -> dict[str, int]:
    return {name: i for i, names in enumerate(rows) for name in names}


def test_arrows_point_one_way():
    folders = ranks(FOLDERS)
    for path in CORE:
        here = name_of(path)
        folder, _, module = here.partition(".")
        if path.stem.startswith("__"):
            continue
        assert folder in folders, f"{path}: a new folder needs its place in FOLDERS"
        inside = ranks(INSIDE.get(folder, []))
        assert not module or module in inside or here in ASIDE, f"{path}: a new module needs its place in INSIDE"
        for target, own in imports(path):
            if not own or not target:
                continue
            aside = next((name for name in ASIDE if f"{target}.".startswith(f"{name}.")), None)
            to, _, name = target.partition(".")
            if aside:
                assert here in ASIDE[aside], f"{here} imports {target}; only {ASIDE[aside]} may"
            elif to != folder:
                assert folders[to] < folders[folder], f"{here} imports {target}"
            elif here not in ASIDE and name:
                assert inside[name] < inside[module], f"{here} imports {target}"


def test_the_core_needs_its_few_dependencies_only():
    allowed = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tqdm", "typing_extensions"}
    assert set().union(*map(third_party, CORE)) <= allowed


def test_kernels_import_numpy_torch_triton_and_their_launcher_only():
    assert KERNELS
    for path in KERNELS:
        assert third_party(path) <= {"numpy", "torch", "triton"}, path.name
        assert {module for module, own in imports(path) if own} <= {"kernels.launch"}, path.name


def test_what_is_imported_is_declared():
    """tqdm comes with huggingface-hub; typing_extensions, for type checkers only, with torch."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {d.partition(">")[0].replace("-", "_") for d in project["dependencies"]}
    assert set().union(*map(third_party, CORE)) - {"tqdm", "typing_extensions"} == declared
    assert not any("==" in d for d in project["dependencies"])


@pytest.mark.parametrize("path", CORE + KERNELS, ids=lambda p: p.stem)
def test_nothing_is_printed_or_run_at_import(path):
    """The top level holds definitions, constants and imports only; a kernel's also gives its operator a gradient."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and path in KERNELS and ".register_autograd(" in ast.unparse(node):
            continue
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno}"  # a docstring
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{path.name}:{node.lineno}"
        else:
            kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
            assert isinstance(node, kinds), f"{path.name}:{node.lineno}"


def test_the_kernels_folder_is_a_link_and_no_package():
    """A top-level `kernels` with an __init__.py is taken for Hugging Face's package of that name."""
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    for folder in ("kernels", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


# ---- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a clean copy of what git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in filter(None, listed.decode().split("\0")):
        path, to = ROOT / name, source / name
        if name.startswith(("tests/", "bench/")) or not path.exists():
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            to.symlink_to(path.readlink())
        else:
            to.write_bytes(path.read_bytes())
    command = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(built)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2_000:]
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"modernbert_lite-{modernbert_lite.__version__}-py3-none-any.whl"
    for path in CORE:
        assert f"modernbert_lite/{path.relative_to(PACKAGE).as_posix()}" in names
    for path in KERNELS:
        assert f"modernbert_lite/kernels/{path.name}" in names
    for path in (PACKAGE / "tiny").rglob("*"):
        if path.is_file():
            assert path.relative_to(ROOT).as_posix() in names
    assert "modernbert_lite/py.typed" in names
    assert {name.partition("/")[0].rpartition("-")[0] or name.partition("/")[0] for name in names} == {
        "modernbert_lite",
        f"modernbert_lite-{modernbert_lite.__version__}.dist-info".rpartition("-")[0],
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "test" in name]


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 40_000_000
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
    # Neither the bundled model, nor what pip keeps of a package: the README, and a hash for every file.
    code = [i for i in infos if not i.filename.startswith("modernbert_lite/tiny/") and ".dist-info/" not in i.filename]
    # The archive keeps about 100 bytes and two names an entry beside the content.
    sizes = {i.filename: i.compress_size + 2 * len(i.filename) + 100 for i in code}
    kernels = sum(size for name, size in sizes.items() if "/kernels/" in name)
    assert kernels < 20_000
    assert sum(sizes.values()) - kernels < 185_000


def test_the_unpacked_wheel_works(wheel, tmp_path):
    """Away from the checkout: a kernel by its name in the package, and the bundled model."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import modernbert_lite
from modernbert_lite.kernels.geglu import geglu
assert modernbert_lite.__file__.startswith(sys.path[0]), modernbert_lite.__file__
assert sys.modules["modernbert_lite.kernels.geglu"].__file__.startswith(sys.path[0])
assert "kernels" not in sys.modules
print(modernbert_lite.Embedder.from_pretrained("tiny").encode("hello").shape)
"""
    pytest.importorskip("triton")
    assert python(program, cwd=tmp_path) == "(384,)\n"


def test_the_command_is_installed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        points = archive.read(f"modernbert_lite-{modernbert_lite.__version__}.dist-info/entry_points.txt").decode()
    assert "modernbert-lite = modernbert_lite.cli:main" in points


def test_import_takes_milliseconds():
    program = "import time; t = time.perf_counter(); import modernbert_lite; print(time.perf_counter() - t)"
    assert min(float(python(program)) for _ in range(3)) < 0.1


def test_the_core_stays_lite():
    """An alarm that asks for a thought, not a limit to game. A sum only says "too much", so each room has its own, and
    the twins of the operations have one apart from them. The thought so far: what reads a stranger's files is half of
    the whole, because every key of transformers' and sentence-transformers' files is honoured or refused by name."""
    alarms = {"ops": 1_370, "models": 1_280, "checkpoint": 1_700, "pipeline": 2_230, "cli": 1_340, "": 2_120}
    twins = {"ops.cpu", "ops.gpu", "ops.half", "ops.onednn", "ops.padded"}
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CORE}
    rooms = {name: "twins" if name in twins else name.partition(".")[0] if "." in name else "" for name in lines}
    for room, alarm in {**alarms, "twins": 900}.items():
        total = sum(count for name, count in lines.items() if rooms[name] == room)
        assert total <= alarm, f"{room or 'the top'}: {total} lines"
    assert max(lines.values()) <= 400, lines


def test_tests_have_the_folders_of_what_they_test_and_no_long_file():
    """Beside them: classes/, for what people call, and helpers/, for what several files share."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*rooms, "kernels", "bench", "classes", "helpers", "data"}
    long = {str(path): n for path in (ROOT / "tests").rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long
