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
CORE = sorted(PACKAGE.glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def python(program: str, *options: str, **keywords) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=120, **keywords
    )
    assert done.returncode == 0, done.stderr[-1_000:]
    return done.stdout


def imports(path: Path):
    """(module, level) of every import in a file, lazy ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and not node.module:  # from . import cpu, ops
                yield from ((alias.name, node.level) for alias in node.names)
            else:
                yield node.module, node.level


def third_party(path: Path) -> set[str]:
    names = {module.partition(".")[0] for module, level in imports(path) if not level}
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
    modules = ", ".join(f"modernbert_lite.{path.stem}" for path in CORE if path.stem not in ("__init__", "__main__"))
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

# Each may import what stands before it. What is made for a device stands aside: it has its own importers.
LAYERS = [
    {"reading", "batch"},
    {"console", "rope_config"},
    {"config", "foreign", "outputs", "prompts", "record_files", "sparse_config", "st_settings"},
    {"rotary"},
    {"ops", "threads"},
    {"linear", "pooling"},
    {"model"},
    {"gte", "graphs"},
    {"heads", "names"},
    {"weights"},
    {"tokenizer_files"},
    {"tokenizer", "st_config"},
    {"inputs"},
    {"pipeline", "sparse", "writers"},
    {"classifier", "embedder", "fill_mask", "late_interaction", "reranker", "token_classifier"},
    {"describe"},
    {"cli"},
]


def test_arrows_point_one_way():
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    aside = {"cpu": {"ops"}, "gpu": {"ops", "graphs"}, "kernels": {"gpu"}}
    modules = {path.stem for path in CORE} - {"__init__", "__main__", *aside}
    assert modules == set(rank), "a new module needs its place in LAYERS"
    for path in CORE:
        if path.stem in ("__init__", "__main__"):
            continue
        for module, level in imports(path):
            if not level or module.startswith("__"):
                continue
            target = module.partition(".")[0]
            if target in aside:
                assert path.stem in aside[target], f"{path.name} imports {target}; only {aside[target]} may"
            elif path.stem in aside:
                assert target in ("batch", "reading"), f"{path.name} imports {target}"
            elif target in rank:
                assert rank[target] < rank[path.stem], f"{path.name} imports {target}"


def test_the_core_needs_its_few_dependencies_only():
    allowed = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tqdm"}
    assert set().union(*map(third_party, CORE)) <= allowed


def test_kernels_import_torch_and_triton_only():
    assert KERNELS
    for path in KERNELS:
        assert third_party(path) <= {"torch", "triton"}, path.name
        assert not [module for module, level in imports(path) if level], path.name


def test_what_is_imported_is_declared():
    """tqdm comes with huggingface-hub."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {d.partition(">")[0].replace("-", "_") for d in project["dependencies"]}
    assert set().union(*map(third_party, CORE)) - {"tqdm"} == declared
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
        assert f"modernbert_lite/{path.name}" in names
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
    code = [i for i in infos if not i.filename.startswith("modernbert_lite/tiny/")]
    # The archive keeps about 100 bytes and two names an entry beside the content.
    assert sum(i.compress_size + 2 * len(i.filename) + 100 for i in code) < 200_000


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
    """An alarm that asks for a thought, not a limit to game. A sum only says "too much", so each room has its own; the
    rooms are those that a later rebuild makes folders of. The thought so far: what reads a stranger's files is half of
    the whole, because every key of transformers' and sentence-transformers' files is honoured or refused by name."""
    rooms = {
        "layers": "ops cpu gpu graphs linear rotary threads batch pooling",
        "networks": "model gte heads config rope_config names",
        "files": "reading weights foreign st_config st_settings sparse_config tokenizer_files describe",
        "feeding": "pipeline inputs prompts tokenizer",
        "classes": "embedder reranker late_interaction fill_mask classifier token_classifier sparse",
        "shell": "cli console record_files outputs writers",
    }
    alarms = {"layers": 2_000, "networks": 1_400, "files": 2_300, "feeding": 1_150, "classes": 1_520, "shell": 1_150}
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in CORE}
    assert set(lines) == set(" ".join(rooms.values()).split()) | {"__init__", "__main__"}, "a new module needs a room"
    for room, names in rooms.items():
        total = sum(lines[name] for name in names.split())
        assert total <= alarms[room], f"{room}: {total} lines"
    assert max(lines.values()) < 560, lines
