"""The bench of the host's side: how often a pass launches, what its rows say, and what it fails for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import bench_host

    return bench_host


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "bench.bench_host", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_all_of_it_in_real_time(bench, tmp_path):
    """Three layers: an embedding's norm; rope, attention, two norms and GeGLU each, but for the first norm; a norm."""
    pytest.importorskip("triton")
    done = run("--smoke", "--repeats", "5", "--out", str(tmp_path / "host.csv"))
    assert done.returncode == 0, done.stderr
    rows = bench.records.read_csv(tmp_path / "host.csv")
    assert [(row["what"], row["tokens"], row["launches"]) for row in rows] == [
        ("forward", "16384", "16"),
        ("forward, replayed", "16384", "0"),
        ("query", "20", "16"),
        ("query, replayed", "20", "0"),
        ("pack", "16384", "0"),
    ]
    for row in rows:
        assert row["shape"] == "smoke"
        assert 0 < float(row["ms"]) <= float(row["median_ms"])
    assert len(done.stdout.splitlines()) == len(rows)


def test_interpreted_kernels_are_refused():
    pytest.importorskip("triton")
    done = run("--smoke", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench_host: TRITON_INTERPRET is 1; unset it: interpreted kernels aren't launched\n"


def test_check_knows_what_is_promised(bench):
    rows = [{"what": "forward", "ms": "2.500"}, {"what": "query", "ms": "2.501"}, {"what": "pack", "ms": "0.500"}]
    assert bench.missed(rows) == ["query: 2.501 ms, promised 2.5"]
