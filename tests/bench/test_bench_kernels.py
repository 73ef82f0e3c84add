"""The kernels' benches where there is no GPU: parity on tiny shapes, what is counted and written, how time is kept."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OPS = ("rope", "geglu", "layer_norm", "attention", "pooling")
GPU = torch.cuda.is_available()


@pytest.fixture
def bench(monkeypatch):
    """bench("rope") -> the module bench.bench_rope; bench() -> bench.runner."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda op=None: importlib.import_module(f"bench.bench_{op}" if op else "bench.runner")


def timing():
    return importlib.import_module("bench.timing")


@pytest.fixture
def stopped_clock(monkeypatch, bench):
    """As on a GPU, but on this machine, tiny, and every call takes 10 microseconds."""
    runner = bench()
    monkeypatch.setattr(runner, "SHAPES", dict.fromkeys(runner.SHAPES, runner.TINY))
    monkeypatch.setattr(runner, "gpu_environment", lambda: {"card": "none", "torch": torch.__version__})
    monkeypatch.setattr(runner, "ceilings", lambda: timing().Ceilings(4e12, 7e14, 7e14, 5e13))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=10_000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    if not GPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(runner.Options, "device", "cpu")

    def times(providers, repeats, seconds):
        for run in providers.values():
            run()
            run()
        return dict.fromkeys(providers, 1e-5)

    monkeypatch.setattr(runner, "gpu_times", times)
    return runner


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_smoke(bench, op, capsys, tmp_path):
    """Every provider that runs here keeps parity; nothing is timed, nothing written."""
    assert bench(op).main(["--smoke", "--out", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["op", "case", "tokens", "dtype", "provider"]
    for dtype in ("float32", "float16"):
        assert {line.split(dtype)[1].split()[0] for line in lines if dtype in line} >= {"torch", "triton"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", ["rope", "geglu", "layer_norm", "attention"])
@pytest.mark.slow
def test_smoke_of_the_launch_parameters(bench, op, capsys):
    assert bench(op).main(["--smoke", "--tune", "--dtype", "float32", "--cases", "base"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 6


def test_from_a_shell():
    """Importing loads no triton, so that --smoke can still choose its interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"import sys; from bench import {', '.join(f'bench_{op}' for op in OPS)}; "
    code += "assert 'triton' not in sys.modules; sys.exit(bench_rope.main(['--smoke', '--dtype', 'float32']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_it_says_so(bench, op, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(op).main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"bench_{op}: there is no GPU here; --smoke runs anywhere, without times\n"


@pytest.mark.parametrize("op", OPS)
def test_rows_and_csv(bench, stopped_clock, op, tmp_path, capsys):
    from bench.records import read_csv

    where = ["--out", str(tmp_path), "--tokens", "40", "--dtype", "float32", "--no-compile"]
    where += ["--cases", {"attention": "small 20"}.get(op, "small")]
    assert bench(op).main(where) == 0
    rows = read_csv(tmp_path / f"{op}.csv")
    assert list(rows[0]) == [*stopped_clock.COLUMNS, "card", "torch"]
    assert {row["provider"] for row in rows} >= {"torch", "triton"}
    for row in rows:
        assert float(row["microseconds"]) == 10.0
        assert float(row["gb_per_s"]) == pytest.approx(int(row["bytes"]) / 1e-5 / 1e9, abs=0.1)
        floor = max(int(row["bytes"]) / 4e12, int(row["flops"]) / 5e13)
        assert float(row["fraction"]) == pytest.approx(floor / 1e-5, abs=1e-3)
        assert float(row["speedup"]) == 1.0
    assert os.environ.get("MODERNBERT_LITE_BACKEND") is None
    assert bench(op).main([*where, "--check"]) == 1
    assert "not measured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_launch_parameters_are_printed(bench, stopped_clock, tmp_path, capsys):
    where = ["--tune", "--out", str(tmp_path), "--tokens", "9", "--dtype", "float32", "--cases", "small backward"]
    assert bench("geglu").main(where) == 0
    assert (tmp_path / "tune_geglu.csv").exists()
    _, last = capsys.readouterr().out.split("best, and what is built in:\n")
    assert len(last.splitlines()) == 1
    rows = [
        {"case": "a", "tokens": 1, "dtype": "x", "provider": p, "microseconds": m}
        for p, m in (("x", 3), ("y", 1), ("z", 2))
    ]
    rows.append(rows[0] | {"provider": "triton"})
    assert [row["provider"] for row in stopped_clock.best(rows)] == ["y", "triton"]


def test_no_number_without_parity(bench, stopped_clock, monkeypatch, capsys):
    from modernbert_lite.kernels import geglu

    monkeypatch.setattr(geglu, "geglu", lambda a, g, act: a * g)
    options = stopped_clock.Options(tokens=[9], dtypes=["float32"], cases=["large"], compile=False)
    rows = bench("geglu").rows(options)
    assert [row["provider"] for row in rows if row["case"] == "large"] == ["torch"]
    assert len(options.failures) == 1
    assert "triton errs by" in capsys.readouterr().err


def test_no_case_starts_after_the_deadline(bench, stopped_clock, capsys):
    assert bench("rope").rows(stopped_clock.Options(tokens=[9], compile=False, deadline=0.0)) == []
    assert "out of time" in capsys.readouterr().err


def test_promises(bench):
    runner = bench()
    for op in OPS:
        assert bench(op).PROMISES
    promise = runner.Promise("base", 32768, "fraction", 0.85)
    row = {"case": "base", "dtype": "bfloat16", "provider": "triton", "tokens": 32768, "fraction": 0.86}
    assert runner.missed([row, row | {"tokens": 1024, "fraction": 0.2}], [promise]) == []
    assert len(runner.missed([row, row | {"tokens": 131072, "fraction": 0.84}], [promise])) == 1
    assert len(runner.missed([row | {"dtype": "float32"}], [promise])) == 1


# ---- what is counted ----


def test_visible_keys_are_those_of_a_loop(bench):
    visible = bench("attention").visible
    for length in (0, 1, 2, 5, 64, 65, 66, 130):
        for left, right in ((-1, -1), (64, 64), (0, 0), (3, 1), (-1, 2), (200, 0)):
            seen = sum(
                (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
                for i in range(length)
                for j in range(length)
            )
            assert visible(length, (left, right)) == seen
    # Keys a query: useful ones of a window of 64 on both sides, by hand.
    assert [round(visible(n, (64, 64)) / n, 1) for n in (128, 512, 2048)] == [96.5, 120.9, 127.0]


def test_flops_and_bytes_by_hand(bench):
    attention = bench("attention")
    # 9 + 4 pairs, 12 heads, two products of 64 multiplications and additions each.
    assert attention.flops([3, 2], (-1, -1), 12, 64) == 13 * 12 * 2 * 2 * 64
    assert attention.row_traffic(10, 2, 12, 64, 2) == (10 + 10 + 2 + 2) * 768 * 2
    # Bytes a token in bf16: base, large.
    norm, geglu = bench("layer_norm").traffic, bench("geglu").traffic
    assert [bench("rope").traffic(1, H, 64, 2) for H in (12, 16)] == [6144, 8192]
    assert [attention.traffic(1, H, 64, 2) for H in (12, 16)] == [6144, 8192]
    assert [geglu(1, N, 2) for N in (1152, 2624)] == [6912, 15744]
    assert [geglu(1, N, 2, back=True) for N in (1152, 2624)] == [11520, 26240]
    assert [norm(1, C, 2) for C in (768, 1024)] == [3072, 4096]
    assert [norm(1, C, 2, add=True) for C in (768, 1024)] == [6144, 8192]
    assert norm(1, 768, 2, back=True) == 3 * 768 * 2
    assert norm(1, 768, 2, add=True, back=True) == 4 * 768 * 2
    assert bench("pooling").traffic(10, 2, 768, 2) == 10 * 1536 + 2 * 3072


def test_lengths(bench):
    assert bench().split(13, 5) == [5, 5, 3]
    lengths = bench("attention").ragged(5000)
    assert 5000 <= sum(lengths) < 5000 + 2048
    assert min(lengths) >= 8


# ---- parity and time ----


def test_error_ratio(bench):
    error_ratio = bench().error_ratio
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = (truth + 0.01).float()
    assert error_ratio((truth + 0.015).float(), plain, truth)[1] < 1
    assert error_ratio((truth + 0.03).float(), plain, truth)[1] > 1
    assert error_ratio([plain, plain + 1], [plain, plain], [truth, truth])[1] > 1
    for bad in (math.nan, math.inf):
        assert not error_ratio(torch.tensor([1.0, bad]), plain, truth)[1] <= 1
    with pytest.raises(ValueError, match="shape"):
        error_ratio(torch.ones(3), plain, truth)
    with pytest.raises(ValueError, match="no output"):
        error_ratio(None, plain, truth)


def test_copies_overflow_the_cache(bench, stopped_clock):
    assert len(stopped_clock.rotate(lambda: 0, 1000)) == 31
    assert len(stopped_clock.rotate(lambda: 0, 1 << 20)) == 2
    assert len(stopped_clock.rotate(lambda: 0, 1000, bound=5000)) == 5
    assert len(stopped_clock.rotate(lambda: 0, 1 << 40)) == 1


@pytest.fixture
def card(monkeypatch, bench):
    """A card that works as the host calls: 30 microseconds for "short", 3 ms for "long"; `card.calls` are in order."""
    state = SimpleNamespace(now=0.0, calls=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    def provider(name, seconds):
        def run():
            state.now += seconds
            state.calls.append(name)

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr("bench.timing.time", SimpleNamespace(perf_counter=lambda: state.now))
    state.providers = {"short": provider("short", 3e-5), "long": provider("long", 3e-3)}
    return state


def test_gpu_times(card, bench):
    times = timing().gpu_times(card.providers, repeats=3, seconds=0.0)
    assert times["short"] == pytest.approx(3e-5)
    assert times["long"] == pytest.approx(3e-3)
    # Regions of 1 ms at least, in turns, every second turn backwards.
    turns = "".join(name[0] for name in card.calls)[-(3 * 35) :]
    assert turns == "s" * 34 + "l" + "l" + "s" * 34 + "s" * 34 + "l"


def test_host_and_gpu_time(card, bench):
    assert timing().host_and_gpu_time(card.providers["long"], repeats=3) == (pytest.approx(3e-3), pytest.approx(3e-3))


def test_gpu_environment(bench):
    found = bench().gpu_environment()
    assert found["torch"] == torch.__version__
    assert {"date", "commit", "card", "capability", "driver", "cuda", "python", "triton", "flash-attn"} <= set(found)
