"""The package runs no code and reads no pickle from data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modernbert_lite as ml

PACKAGE = Path(ml.__file__).parent


def sources():
    """Every module of the package and every kernel: its name -> its syntax tree."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if "kernels" not in p.relative_to(PACKAGE).parts]
    trees = {p.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(p.read_text()) for p in paths}
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        trees[f"kernels/{path.stem}"] = ast.parse(path.read_text())
    return trees


SOURCES = sources()


RUNS_CODE = {"eval", "exec", "compile", "__import__"}


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("module", SOURCES)
def test_no_code_or_pickle_is_ever_run_from_data(module):
    for node in ast.walk(SOURCES[module]):
        where = f"{module}, line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & UNPICKLERS, where
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNPICKLERS, where
            for name in node.names:
                assert (node.module, name.name) != ("torch", "load"), where
                if (node.module, name.name) == ("importlib", "import_module"):
                    assert module == "__init__", where
        if isinstance(node, ast.Name):
            assert node.id not in RUNS_CODE, where
            if node.id == "import_module":
                assert module == "__init__", where
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            banned = (
                "torch.load",
                "importlib.import_module",
                "builtins.eval",
                "builtins.exec",
                "numpy.load",
                "np.load",
            )
            assert name not in banned, where
            assert not name.endswith((".import_module", ".exec_module", ".load_module", ".__import__")), where
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant), where
            assert node.value.value is False, where


def test_the_lazy_init_imports_only_names_of_its_own_table():
    calls = [
        node
        for node in ast.walk(SOURCES["__init__"])
        if isinstance(node, ast.Call) and dotted(node.func) == "import_module"
    ]
    assert len(calls) == 1
    assert ast.unparse(calls[0]) == "import_module(f'.{_HOME[name]}', __name__)"
    assert all(part.isidentifier() for home in ml._HOME.values() for part in home.split("."))
