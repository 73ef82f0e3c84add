"""The benches of the whole model: their arithmetic, their gate, and that `bench.gpu` leaves what it found."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import modernbert_lite as ml

ROOT = Path(__file__).parents[2]
FILES = {"encode_gpu.csv", "gte_gpu.csv", "kernels_gpu.csv", "tune_gpu.csv", "strings_gpu.csv"}
FILES |= {"report.md", "roofline.svg", "sections.log"}


@pytest.fixture(autouse=True)
def bench_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def shape(name: str) -> ml.ModernBertConfig:
    from bench.bench_encode_gpu import SHAPES

    return ml.ModernBertConfig.from_dict(
        {"model_type": "modernbert", "architectures": ["ModernBertModel"], **SHAPES[name]}
    )


@pytest.mark.parametrize(
    ("length", "base", "large"),
    [(128, 227.9, 698.7), (512, 238.4, 716.2), (2048, 276.4, 779.5), (8192, 427.4, 1031.3)],  # MFLOP a token
)
def test_flops_are_those_derived_elsewhere(length, base, large):
    from bench.flops import model_flops

    for name, mflop in {"base": base, "large": large}.items():
        assert model_flops(shape(name), [length] * 3) / (3 * length) == pytest.approx(mflop * 1e6, rel=1e-3)


def test_flops_of_a_mix_are_those_of_its_texts():
    from bench.flops import model_flops

    config = shape("base")
    assert model_flops(config, [7, 300, 7]) == 2 * model_flops(config, [7]) + model_flops(config, [300])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 129, 200])
@pytest.mark.parametrize("window", [(64, 64), (-1, -1), (0, 3), (2, 0), (-1, 1)])
def test_visible_keys_counts_them(length, window):
    from bench.flops import visible_keys

    left, right = (length if side < 0 else side for side in window)
    pairs = itertools.product(range(length), repeat=2)
    assert visible_keys(length, window) == sum(-left <= j - i <= right for i, j in pairs)


def test_memory_limit():
    from bench.flops import memory_limit

    # 9 C + 3 N = 10,368 numbers a token
    assert memory_limit(shape("base"), 1000, 2, 300) == 300 + int(1.2 * 1000 * 10_368 * 2)


def test_peak_is_known_for_sxm_parts_only():
    from bench.cards import peak_flops

    assert peak_flops("NVIDIA H200", torch.bfloat16) == peak_flops("NVIDIA H100 80GB HBM3", torch.float16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) is None
    assert peak_flops("NVIDIA H200", torch.float32) is None


def test_batches_repeat_the_texts_longest_first():
    from bench.texts import batch_of, pool_lengths

    assert batch_of([5, 9, 3], 27) == [1, 0, 0, 2]
    assert batch_of([9], 8) == []
    assert pool_lengths("8192") == [8192] * 2
    ragged = pool_lengths("ragged")
    assert len(set(ragged)) > 20
    assert 12_000 < sum(ragged) < 20_000
    lengths = [ragged[i] for i in batch_of(ragged, 131_072)]
    assert 131_072 - 512 < sum(lengths) <= 131_072
    assert lengths == sorted(lengths, reverse=True)


def test_padded_batches_keep_the_real_tokens(monkeypatch):
    from bench import bench_encode_gpu as bench

    monkeypatch.setattr(bench, "PADDED_TOKENS", 10)
    texts = [torch.arange(n) + 1 for n in (5, 5, 4, 2, 1)]
    batches = bench.padded(texts, 0, torch.device("cpu"))
    assert [tuple(ids.shape) for ids, _, _ in batches] == [(2, 5), (2, 4), (1, 1)]
    assert [mask is None for _, mask, _ in batches] == [True, False, True]
    kept = [ids.flatten() if places is None else ids.flatten()[places] for ids, _, places in batches]
    assert torch.equal(torch.cat(kept), torch.cat(texts))


def options(*more: str):
    from bench import bench_encode_gpu as bench

    words = "--device cpu --dtype float32 --shapes smoke --batch-tokens 300 --repeats 1 --case-seconds 0 --cases"
    return bench.parse([*words.split(), *more])


def test_wrong_numbers_get_no_speed(monkeypatch):
    from bench import bench_encode_gpu as bench

    honest = bench.providers

    def lying(*args):
        runs = honest(*args)
        ours = runs[bench.OURS]
        return runs | {bench.OURS: lambda: ours() + 1e-3, "nan": lambda: ours() * float("nan")}

    monkeypatch.setattr(bench, "providers", lying)
    rows = []
    assert not bench.run(options("128"), rows.append)
    found = {row["provider"]: row for row in rows}
    for name in (bench.OURS, "nan"):
        assert found[name]["seconds"] == found[name]["tokens_per_s"] == ""
        assert found[name]["note"].startswith("Unequal: cosine")
    assert found[bench.THEIRS]["note"] == ""
    assert int(found[bench.THEIRS]["tokens_per_s"]) > 0


def test_a_provider_that_fails_costs_its_own_row(monkeypatch):
    from bench import bench_encode_gpu as bench

    honest = bench.providers

    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setattr(bench, "providers", lambda *args: honest(*args) | {"big": full, "peer": broken})
    rows = []
    assert bench.run(options("query", "ragged"), rows.append)
    assert [(row["case"], row["note"]) for row in rows if row["provider"] == "big"] == [
        ("query", "out of memory"),
        ("ragged", "out of memory"),
    ]
    assert {row["note"] for row in rows if row["provider"] == "peer"} == {"RuntimeError: no kernel"}
    good = [row for row in rows if row["provider"] in (bench.OURS, bench.THEIRS)]
    assert len(good) == 4
    assert all(float(row["cosine"]) > 0.9999 and float(row["max_difference"]) < 2e-5 for row in good)
    assert {row["tokens"] for row in good} == {20, sum(bench_lengths("ragged", 300))}


def test_a_mean_vector_may_be_twice_as_far_off_as_the_reference():
    from bench.bench_encode_gpu import Pool

    assert Pool([], [], 0.1, 0.002).least_cosine == pytest.approx(0.996)
    assert Pool([], [], 0.1, 1e-6).least_cosine == pytest.approx(0.999)
    assert Pool([], [], 0.1).most == pytest.approx(0.2, rel=1e-4)


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


def bench_lengths(case: str, tokens: int) -> list[int]:
    from bench.texts import batch_of, pool_lengths

    lengths = pool_lengths(case)
    return [lengths[i] for i in batch_of(lengths, tokens)]


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


WHERE = {"card": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
WHERE |= {"commit": "abc", "date": "2026-01-01"}


def sample_encode(case: str, batch_tokens: int, provider: str) -> dict[str, str]:
    from bench import bench_encode_gpu as bench

    names = {"ours": bench.OURS, "graphs": bench.GRAPHS, "theirs": bench.THEIRS}
    speed = {"ours": 2_000_000, "graphs": 2_100_000, "theirs": 500_000}[provider] + batch_tokens // 4096 - 1
    row = dict.fromkeys(bench.COLUMNS, "") | {"case": case, "shape": "base", "tokens": str(batch_tokens)}
    row |= {"batch_tokens": str(batch_tokens), "dtype": "bfloat16", "provider": names[provider]}
    row |= {"tokens_per_s": str(speed), "seconds": f"{batch_tokens / speed:.6f}", "mfu": "0.500", "ratio": "4.00"}
    row |= {"mfu_measured": "0.625", "peak_allocated_mb": "800", "memory_limit_mb": "1000", "host_ms": "1.0"}
    return row | {"gpu_ms": "1.5", "max_difference": "1e-2"} | WHERE


def sample_kernel(op: str, case: str, tokens: int, provider: str) -> dict[str, str]:
    row = {"op": op, "case": case, "tokens": str(tokens), "dtype": "bfloat16", "provider": provider, "note": ""}
    row |= {"microseconds": "20.5", "gb_per_s": "4000.0", "tflop_per_s": "", "fraction": "0.9", "ceiling": "copy"}
    return row | {"speedup": "2.0"} | WHERE


def sample_rows():
    encode = [sample_encode(c, n, p) for c in ("query", "512") for n in (4096, 32768) for p in ("ours", "theirs")]
    encode.append(encode[0] | {"provider": "big", "tokens_per_s": "", "seconds": "", "note": "out of memory"})
    kernels = [sample_kernel("rope", "base", n, p) for n in (1024, 32768) for p in ("triton", "torch")]
    kernels.append(sample_kernel("attention", "base 512 local", 32768, "triton"))
    return encode, kernels


def test_tables_and_plot():
    from bench import bench_encode_gpu, plot, tables

    encode, kernels = sample_rows()
    table = bench_encode_gpu.table(encode)
    assert "| base | 512 | 32,768 | 2,000,007 | 500,007 | 4.00 | 0.500 | 1.0 | 1.5 | 800 | 1e-2 |" in table
    assert "4,096" not in table
    assert "4,096" in bench_encode_gpu.table(encode, every=True)
    assert "big" not in table
    assert "NVIDIA H200, driver 580" in table
    table = tables.kernels_gpu(kernels)
    assert "| rope | base | 32,768 | bfloat16 | 20.5 | 4000.0 |  | 0.9 (copy) | 2.0 | torch 20.5 |" in table
    assert "1,024" not in table
    for text in (plot.roofline(encode, kernels, "a < b"), plot.roofline([], [])):
        root = ElementTree.fromstring(text)
        words = " ".join(element.text or "" for element in root.iter())
        assert ("rope" in words) == ("nothing measured" not in words)


def test_readme_is_filled_from_what_there_is(tmp_path):
    from bench import records, tables

    text = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in ("encode_gpu", "kernels_gpu"))
    assert tables.fill(text, tmp_path).count(tables.NOT_MEASURED) == 2
    assert tables.fill("no markers", tmp_path) == "no markers"
    encode, kernels = sample_rows()
    records.write_csv(tmp_path / "encode_gpu.csv", encode)
    records.write_csv(tmp_path / "kernels_gpu.csv", [row | {"smoke": "smoke"} for row in kernels])
    filled = tables.fill(text, tmp_path)
    assert "2,000,007" in filled
    assert filled.count(tables.NOT_MEASURED) == 1
    assert tables.fill(filled, tmp_path) == filled


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


SAY = """
import json, os, sys, time
f = open(os.environ["BENCH_GPU_LINES"], "a")
def say(**what): print(json.dumps(what), file=f, flush=True)
say(table="kernels", row=json.loads(sys.argv[1]))
"""


def saying(code: str, row: dict[str, str]) -> list[str]:
    """A section's command: says a row, then does as told."""
    return [sys.executable, "-c", SAY + code, json.dumps(row)]


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
