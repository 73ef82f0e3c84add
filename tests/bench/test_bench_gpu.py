"""`bench.gpu`: its plan, its promises, what it leaves when a section fails or it is killed; `bench.right`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bench_cases import sample_encode, sample_kernel, saying

ROOT = Path(__file__).parents[2]
FILES = {"encode_gpu.csv", "gte_gpu.csv", "kernels_gpu.csv", "tune_gpu.csv", "strings_gpu.csv"}
FILES |= {"report.md", "roofline.svg", "sections.log"}


@pytest.fixture(autouse=True)
def bench_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_ceilings_are_measured_once_and_passed_on(tmp_path, monkeypatch):
    """A section sees what an earlier one said."""
    from bench import gpu, timing

    found = {"copy": 3e12, "bfloat16": 7e14, "float16": 7e14, "float32": 5e13}
    look = "import os; say(failure=os.environ.get('BENCH_CEILINGS', 'none'))"
    row = sample_kernel("rope", "base", 32768, "triton")
    sections = [gpu.Section(n, 1, saying(c, row)) for n, c in (("a", f"say(ceilings={found})"), ("b", look))]
    (said,) = gpu.run(sections, tmp_path, 30, smoke=True).failures
    monkeypatch.setenv("BENCH_CEILINGS", said)
    timing.ceilings.cache_clear()
    assert timing.ceilings()._asdict() == found
    timing.ceilings.cache_clear()


def promised_on(card: str) -> dict[str, tuple[str, str, str]]:
    from bench.bench_encode_gpu import promises

    rows = [sample_encode(case, 4_096, p) for case in ("512", "8192", "query") for p in ("ours", "graphs")]
    return {what: rest for what, *rest in promises([row | {"card": card} for row in rows])}


def test_promises_are_those_of_the_card():
    kept = promised_on("NVIDIA H200")
    assert kept["base, 512 tokens each"] == [">= 2.0 Mtok/s", "2.10 Mtok/s", "yes"]
    assert kept["base, 2048 tokens each"] == [">= 1.6 Mtok/s", "", ""]
    assert kept["one query of 20 tokens, with graphs"] == ["< 1.0 ms", "1.95 ms", "no"]
    assert kept["peak memory over weights + 1.2 layers' activations"] == ["<= 1.0", "0.80", "yes"]
    for card in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090"):
        promise, measured, met = promised_on(card)["base, 8192 tokens each"]
        assert promise.endswith("Mtok/s (derived, not measured)")
        assert (measured, met) == ("2.10 Mtok/s", "yes")


@pytest.mark.parametrize(
    "card", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA L40S", "NVIDIA A100 80GB PCIe"]
)
def test_on_other_cards_numbers_are_told_and_nothing_is_promised(card):
    from bench import cards

    kept = promised_on(card)
    assert kept["base, 512 tokens each"] == [f"none for this card ({card})", "2.10 Mtok/s", ""]
    assert cards.missed([(what, *rest) for what, rest in kept.items()]) == []
    assert cards.peak_flops(card, torch.bfloat16) is None


def test_what_is_derived_gives_the_h100_s_measured_times():
    """18.1 and 18.8 ms for 32,768 tokens in texts of 128 and 512 (bench/results/h100)."""
    from bench import cards

    h100 = cards.CARDS["NVIDIA H100 80GB HBM3"]
    for case, ms in (("128", 18.14), ("512", 18.83)):
        assert cards.derived(h100, case) / cards.SUSTAINED == pytest.approx(32_768 / ms / 1e3, rel=0.04)
    speeds = [cards.derived(card, "512") for card in cards.CARDS.values()]
    assert speeds == [*sorted(speeds[:3], reverse=True), min(speeds), speeds[4]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line(tmp_path, capsys):
    from bench import bench_encode, gpu

    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr() == ("", "bench.gpu: no CUDA device here (--smoke runs anywhere, with tiny shapes)\n")
    assert not (tmp_path / "new").exists()
    assert bench_encode.main(["--device", "cuda", "--shapes", "large"]) == 2
    assert capsys.readouterr() == ("", "bench_encode: no CUDA device here\n")


def read(path: Path) -> list[dict[str, str]]:
    from bench.records import read_csv

    return read_csv(path)


@pytest.mark.slow
def test_the_smoke_run_writes_everything(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--smoke", "--skip-tests", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "sections.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == FILES
    report = (tmp_path / "report.md").read_text()
    assert "Smoke run" in report
    assert "Traceback" not in report
    for name, column, kinds in [
        ("encode", "provider", 2),
        ("kernels", "op", 5),
        ("tune", "op", 1),
        ("strings", "provider", 3),
    ]:
        rows = read(tmp_path / f"{name}_gpu.csv")
        assert {row["smoke"] for row in rows} == {"smoke"}
        assert len({row[column] for row in rows}) == kinds
    ElementTree.parse(tmp_path / "roofline.svg")
    assert done.stdout.splitlines()[-1].startswith("smoke: ")


def test_the_plan_runs_whole_files_of_tests_first():
    from bench import gpu

    right, first, *rest = gpu.plan(smoke=False, skip_tests=False)
    assert (right.name, first.name) == (gpu.RIGHT, "tests")
    assert "tests/kernels/test_rope.py" in first.command
    assert first.longest == 180
    assert [right, *rest] == gpu.plan(smoke=False, skip_tests=True)
    assert rest[1].name == "encode base"


@pytest.mark.parametrize("anyway", [False, True])
def test_nothing_is_timed_if_numbers_are_wrong(tmp_path, anyway):
    from bench import gpu

    row = sample_kernel("rope", "base", 1024, "triton")
    wrong = saying("say(failure='wrong: geglu'); sys.exit(1)", row)
    sections = [gpu.Section(gpu.RIGHT, 1, wrong), gpu.Section("timed", 1, saying("", row))]
    findings = gpu.run(sections, tmp_path, 30, smoke=True, anyway=anyway)
    assert ("timed" in findings.status) is anyway
    report = (tmp_path / "report.md").read_text()
    assert "Is it right? exit 1" in report
    assert "- wrong: geglu" in report
    assert ("nothing was timed" in report) is not anyway
    assert gpu.summary(findings, tmp_path, smoke=True) == 1


def test_no_answer_in_time_fails_the_run_and_costs_no_number(tmp_path):
    from bench import gpu

    row = sample_kernel("rope", "base", 1024, "triton")
    slow = gpu.Section(gpu.RIGHT, 1, saying("time.sleep(60)", row), longest=1)
    findings = gpu.run([slow, gpu.Section("timed", 1, saying("", row))], tmp_path, 30, smoke=True)
    assert findings.status["timed"].startswith("ok")
    assert "whether the numbers are right is not known" in (tmp_path / "report.md").read_text()
    assert gpu.summary(findings, tmp_path, smoke=True) == 1


def test_a_card_before_ampere_can_be_right(monkeypatch, capsys):
    """It has no kernel for attention, and captures no graph."""
    pytest.importorskip("triton")
    from bench import right
    from modernbert_lite.ops import gpu

    monkeypatch.setattr(gpu, "has_matrix_units", lambda device: False)
    gpu.attention_works.cache_clear()
    try:
        assert right.main(["--smoke"]) == 0
    finally:
        gpu.attention_works.cache_clear()
    assert capsys.readouterr().out == "right\n"


@pytest.mark.parametrize("off", [0.0, 2**-23, -(2**-23), 0.05])
def test_numbers_in_float8_are_right_if_a_scale_is_off_in_its_last_place(monkeypatch, off):
    """A card's reciprocal may be. Numbers that lie between two of e4m3 then go the other way."""
    pytest.importorskip("triton")
    from bench import right
    from modernbert_lite.ops import gpu
    from modernbert_lite.ops import reference as ops

    def kernel(x):
        _, scale = ops.to_float8.reference(x)
        y = x.float() * (scale.reciprocal() * (1 + off))
        return y.clamp(-448, 448).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr(right, "has_float8", lambda device: True)
    monkeypatch.setitem(gpu.TWINS, "to_float8", kernel)
    said = list(right.wrong_operations(torch.device("cpu"), torch.float16, True))
    assert [line for line in said if line.startswith("to_float8")] == [line for line in said if line]
    assert any(said) is (off == 0.05)


def test_the_last_line_of_the_tests_is_told(tmp_path):
    from bench import gpu

    assert gpu.tests_summary(tmp_path) == "not run"
    tests = saying("print('==== 7 passed in 1.00s ====')", {})
    other = saying("print('something else')", {})
    gpu.run([gpu.Section("tests", 1, tests), gpu.Section("other", 1, other)], tmp_path, 30, smoke=True)
    assert gpu.tests_summary(tmp_path) == "==== 7 passed in 1.00s ===="
    assert len(list(tmp_path.iterdir())) <= 8


def test_kernels_have_no_promise_on_other_cards_either():
    from bench import gpu

    findings, row = gpu.Findings(), sample_kernel("geglu", "base", 32768, "triton")
    for card, met in (("NVIDIA H200", {"yes", "no"}), ("NVIDIA L40S", {""})):
        findings.rows["kernels"] = [row | {"card": card, "fraction": "0.5", "dtype": "bfloat16"}]
        kept = [line for line in gpu.promised(findings) if line[0].startswith("geglu, base, ")]
        assert {line[3] for line in kept} <= met
        assert all(line[1].startswith("none for" if met == {""} else ">=") for line in kept)


def test_what_is_right_is_told_from_what_is_wrong(monkeypatch, capsys):
    pytest.importorskip("triton")
    from bench import right
    from modernbert_lite.ops import gpu

    assert right.main(["--smoke"]) == 0
    row_attention = gpu.TWINS["row_attention"]
    with monkeypatch.context() as one:
        one.setitem(gpu.TWINS, "row_attention", lambda *args: row_attention(*args) * 1.02)
        one.setitem(gpu.TWINS, "mean_pool", lambda *args: None)
        assert right.main(["--smoke"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[1:3]] == [
        "row_attention in torch.float32",
        "mean_pool in torch.float32",
    ]
    assert said[2].endswith("its kernel did not run")
    assert right.main(["--smoke"]) == 0
    geglu = gpu.TWINS["geglu"]
    monkeypatch.setitem(gpu.TWINS, "geglu", lambda *args: geglu(*args) * 1.01)
    assert right.main(["--smoke"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "right"
    assert len(said) == 5  # the operation and the network, in two dtypes
    assert said[1].startswith("geglu in torch.float32: off by ")
    assert said[2].startswith("the network in torch.float32: off by ")


def test_a_section_that_fails_or_hangs_costs_only_itself(tmp_path, capsys):
    from bench import gpu

    rows = {name: sample_kernel(name, "base", 32768, "triton") for name in ("crashes", "hangs", "works")}
    half = 'f.write(\'{"table": "ker\'); f.flush(); time.sleep(60)'
    sections = [
        gpu.Section(
            "crashes",
            1,
            saying("say(failure='it broke'); print('last words', flush=True); os.abort()", rows["crashes"]),
        ),
        gpu.Section("hangs", 1, saying(half, rows["hangs"]), longest=2),
        gpu.Section("works", 1, saying("", rows["works"])),
    ]
    begun = time.monotonic()
    findings = gpu.run(sections, tmp_path, 60, smoke=False)
    assert time.monotonic() - begun < 20
    assert findings.status["crashes"].startswith("exit -6")
    assert findings.status["hangs"].startswith("stopped at its limit of 2 s")
    assert findings.status["works"].startswith("ok")
    assert [row["op"] for row in read(tmp_path / "kernels_gpu.csv")] == list(rows)
    report = (tmp_path / "report.md").read_text()
    assert "- it broke" in report
    assert "stopped at its limit" in report
    assert "last words" in (tmp_path / "sections.log").read_text()
    capsys.readouterr()
    assert gpu.summary(findings, tmp_path, smoke=False) == 1
    assert "it broke" in capsys.readouterr().out


def test_no_time_left_is_said(tmp_path):
    from bench import gpu

    findings = gpu.run([gpu.Section("late", 1, ["false"])], tmp_path, 1, smoke=False)
    assert findings.status == {"late": "no time left"}
    assert "| late | no time left |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_found_survives_a_kill(tmp_path, how):
    command = saying("print(os.getpid(), flush=True); time.sleep(8)", sample_kernel("rope", "base", 1024, "triton"))
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom bench import gpu\n"
        f"gpu.plan = lambda *_: [gpu.Section('slow', 1, {command!r})]\n"
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        f"sys.exit(gpu.main(['--out', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        for _ in range(400):
            if (tmp_path / "kernels_gpu.csv").exists() and "rope" in (tmp_path / "report.md").read_text():
                break
            time.sleep(0.1)
    finally:
        process.send_signal(how)
        process.wait()
    assert len(read(tmp_path / "kernels_gpu.csv")) == 1
    assert "| slow | running |" in (tmp_path / "report.md").read_text()
    if how == signal.SIGTERM:  # then it also ends what it started
        section = int((tmp_path / "sections.log").read_text().split()[-1])
        with pytest.raises(ProcessLookupError):
            os.kill(section, 0)
