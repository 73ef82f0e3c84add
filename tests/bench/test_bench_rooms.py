"""The rooms of bench: no file too long to read, no circle of imports, nothing that the package leans on."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in (ROOT / "bench").glob("*.py")}


def imported(path: Path, package: str) -> set[str]:
    """The modules of a package that a file imports, lazily or not: {"runner"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found


def test_no_bench_imports_itself_by_way_of_others():
    arrows = {name: imported(path, "bench") & set(FILES) for name, path in FILES.items()}
    while arrows:
        free = [name for name, targets in arrows.items() if not targets & set(arrows)]
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


def test_a_bench_can_be_read():
    long = {name: lines for name, path in FILES.items() if (lines := len(path.read_text().splitlines())) > 500}
    assert not long


def test_the_package_knows_nothing_of_bench():
    for path in (ROOT / "modernbert_lite").rglob("*.py"):
        assert "bench" not in {module for node in ast.walk(ast.parse(path.read_text())) for module in named(node)}, path


def named(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return {alias.name.partition(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
