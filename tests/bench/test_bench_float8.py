"""The bench of 8-bit floats runs anywhere, and its rows say what was compared."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import bench_float8

    return bench_float8


def test_a_smoke_run_compares_passes_and_the_two_wide_products(bench, tmp_path, capsys):
    assert bench.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = bench.records.read_csv(tmp_path / "float8_gpu.csv")
    assert [(r["what"], r["case"], r["dtype"]) for r in rows] == [
        (what, case, dtype)
        for what, case in (("pass", "20"), ("product", "Wqkv"), ("product", "Wi"))
        for dtype in ("bfloat16", "float8")
    ]
    near = {r["dtype"]: float(r["cosine"]) for r in rows if r["what"] == "pass"}
    assert 0.97 < near["float8"] < near["bfloat16"] < 1
    assert bench.table(rows).count("| smoke, ") == 3
    assert "| smoke, texts of 20 | 60 |" in capsys.readouterr().out


def test_only_the_products_that_widen_are_in_8_bits(bench):
    model = bench.in_float8(bench.network("smoke", "cpu"))
    kinds = {
        name.rpartition(".")[2]: type(m).__name__ for name, m in model.named_modules() if "Linear" in repr(type(m))
    }
    assert kinds == {"Wqkv": "Float8Linear", "Wo": "Linear", "Wi": "Float8Linear"}


def test_without_a_card_it_says_so(bench, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "bench_float8: no card with 8-bit floats here (--smoke runs anywhere)\n"
