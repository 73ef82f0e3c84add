"""The bench of ever-new batch sizes: no size comes twice, what its rows say, and what it fails for."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import bench_sizes

    return bench_sizes


def row(dtype: str = "float32", cpu: str = "1.050", grown: str = "99", wall: str = "1.010") -> dict[str, str]:
    ratios = {"cpu_ratio": cpu, "wall_ratio": wall}
    return {"dtype": dtype, "sizes": "2000", "grown_mb": grown, "peak_mb": "120", "tokens_per_s": "4000"} | ratios


def test_no_size_was_seen_before(bench):
    sizes = bench.sizes_of(2000, bench.MOST)
    assert len(set(sizes)) == len(sizes) == 2000
    assert bench.MOST not in sizes  # the warm-up's
    assert sizes[:400] == bench.sizes_of(400, bench.MOST)
    assert (min(bench.sizes_of(10**6, bench.MOST)), max(bench.sizes_of(10**6, bench.MOST))) == (16, 4095)


@pytest.mark.parametrize("tokens", [16, 17, 701, 4096])
def test_texts_of_a_batch_are_ragged_and_have_its_number_of_tokens(bench, tokens):
    batch = bench.batch_of(tokens, 60)
    assert len(batch.input_ids) == sum(batch.seqlens) == tokens
    assert batch.seqlens == tuple(sorted(batch.seqlens, reverse=True)) == tuple(bench.batch_of(tokens, 60).seqlens)
    assert max(batch.seqlens) <= 512
    assert 5 <= batch.input_ids.min() <= batch.input_ids.max() < 60
    if tokens == 4096:
        assert len(set(batch.seqlens)) > 10


def test_memory_that_is_held_shows(bench):
    before = bench.resident_mb()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 40_000_000, flags=private) as held:  # the heap may have had the room before
        held.write(b"1" * 40_000_000)
        assert 38 <= bench.resident_mb() - before <= 90


def test_all_of_it_in_real_time(bench, tmp_path, capsys):
    out = tmp_path / "sizes_cpu.csv"
    assert bench.main(["--smoke", "--check", "--dtype", "float32", "int8", "--threads", "1", "--out", str(out)]) == 0
    rows = bench.records.read_csv(out)
    assert [r["dtype"] for r in rows] == ["float32", "int8"]
    columns = "model shape dtype sizes tokens grown_mb peak_mb new_cpu_s known_cpu_s cpu_ratio new_wall_s known_wall_s "
    columns += "wall_ratio tokens_per_s date commit machine threads modernbert-lite torch capability smoke"
    for r in rows:
        assert list(r) == columns.split()
        assert (r["model"], r["shape"], r["threads"], r["smoke"]) == ("tiny", "4x384", "1", "smoke")
        assert (r["sizes"], r["tokens"]) == ("8", str(sum(bench.sizes_of(8, 256))))
        assert float(r["grown_mb"]) <= float(r["peak_mb"])
        for name in ("cpu", "wall"):
            new, known = float(r[f"new_{name}_s"]), float(r[f"known_{name}_s"])
            assert new > 0 < known
            assert float(r[f"{name}_ratio"]) == pytest.approx(new / known, rel=0.05)
    head, *lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [len(head)] * 2


def test_check_knows_what_is_promised(bench):
    met = [row(), row("bfloat16", "0.990", "-3"), row("int8", wall="1.900")]
    assert bench.missed(met) == []
    assert bench.missed([*met, row("int8", cpu="1.051")]) == [
        "int8: a new size takes 1.051 x a known one, promised 1.05"
    ]
    assert bench.missed([row(grown="100")]) == ["float32: memory grows by 100 MB, promised less than 100"]
    assert len(bench.missed([row("bfloat16", "nan", "nan")])) == 2


@pytest.mark.parametrize(("more", "code"), [((), 0), (("--check",), 1)])
def test_only_check_fails_and_rows_are_kept(bench, monkeypatch, tmp_path, capsys, more, code):
    def measured(dtype, count, most, threads):
        assert (count, most, threads) == (300, 4096, 2)
        return row(dtype, "1.2" if dtype == "int8" else "1.0")

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    out = tmp_path / "sizes.csv"
    assert bench.main(["--sizes", "300", "--threads", "2", "--out", str(out), *more]) == code
    assert [r["cpu_ratio"] for r in bench.records.read_csv(out)] == ["1.0", "1.0", "1.2"]
    said = "not as promised: int8: a new size takes 1.2 x a known one, promised 1.05\n"
    assert capsys.readouterr().err == (said if code else "")


@pytest.mark.parametrize("words", [["--sizes", "0"], ["--sizes", "4081"], ["--threads", "0"]])
def test_numbers_that_cannot_be_are_refused(bench, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse(words)
    assert stopped.value.code == 2
    assert "--sizes must be from 1 to 4080, --threads at least 1" in capsys.readouterr().err
