"""The bench of GTE beside ModernBERT: what it counts, that wrong numbers get no speed, and what is made of its rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.ops.choose import backend
from modernbert_lite.ops.linear import Linear, PackedLinear
from modernbert_lite.ops.rope import Rope

ROOT = Path(__file__).parents[2]
SMOKE = ["--smoke", "--cases", "8x128"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import bench_gte

    return bench_gte


@pytest.fixture
def seconds(monkeypatch, bench):
    """What a call of each provider is said to take; all run once, as for a real measurement."""
    said = {bench.GTE: 0.25, bench.MODERNBERT: 0.5, bench.THEIRS: 1.0}

    def measure(runs, repeats):
        assert all(len(run()) == 1024 for run in runs.values())
        return {name: said[name] for name in runs}

    monkeypatch.setattr(bench.timing, "measure", measure)
    return said


def rows_of(bench, *more):
    rows = []
    bench.run(bench.parse([*SMOKE, *more]), rows.append)
    return {row["provider"]: row for row in rows}


def flops(layers, C, N, keys):
    """Of a token that sees so many keys in each layer: query, key, value, output; both halves and the way back."""
    return layers * (2 * (4 * C * C + 3 * C * N) + 4 * C * keys)


@pytest.mark.parametrize("length", [1, 128, 512, 8192])
def test_flops_of_gte(bench, length):
    from bench.flops import model_flops

    for shape, (layers, C, N) in {"large": (24, 1024, 4096), "base": (12, 768, 3072)}.items():
        config = ml.GteConfig.from_dict({"model_type": "new", **bench.SHAPES[shape]})
        assert model_flops(config, [length, 7]) == length * flops(layers, C, N, length) + 7 * flops(layers, C, N, 7)


def test_shapes_are_those_of_the_checkpoints(bench):
    built = [config for shape in ("large", "base") for config in bench.configs(shape).values()]
    sizes = [
        (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size, c.vocab_size) for c in built
    ]
    assert sizes == [
        (1024, 24, 16, 4096, 30528),
        (1024, 28, 16, 2624, 50368),
        (768, 12, 12, 3072, 30528),
        (768, 22, 12, 1152, 50368),
    ]
    assert [(c.type_vocab_size, c.rope) for c in built[::2]] == [
        (2, Rope(160_000.0, "ntk", 2.0)),
        (0, Rope(500_000.0, "ntk", 2.0)),
    ]


def test_lengths(bench):
    from bench.texts import ragged_lengths

    assert bench.lengths_of("8x128", "cpu") == [128] * 8
    assert bench.lengths_of("8192", "cuda") == [8192] * 4
    assert bench.lengths_of("ragged", "cpu") == ragged_lengths()
    ragged = bench.lengths_of("ragged", "cuda")
    assert 32_768 - 512 < sum(ragged) <= 32_768
    assert ragged == sorted(ragged, reverse=True)


def test_a_row_a_provider(bench, seconds):
    rows = rows_of(bench)
    assert list(rows) == [bench.GTE, bench.MODERNBERT, bench.THEIRS]
    assert {row["tokens"] for row in rows.values()} == {1024}
    assert [row["tokens_per_s"] for row in rows.values()] == ["4096", "2048", "1024"]
    assert [row["ratio"] for row in rows.values()] == ["4.00", "", "1.00"]
    gte = flops(3, 64, 192, 128) * 1024 / 1e12
    assert float(rows[bench.GTE]["tflop_per_s"]) == pytest.approx(gte / 0.25, rel=1e-3)
    assert float(rows[bench.THEIRS]["tflop_per_s"]) == pytest.approx(gte / 1.0, rel=1e-3)
    # Two of four layers are local: 96.5 of 128 keys.
    other = (flops(2, 64, 96, 128) + flops(2, 64, 96, 96.5)) * 1024 / 1e12
    assert float(rows[bench.MODERNBERT]["tflop_per_s"]) == pytest.approx(other / 0.5, rel=1e-3)
    assert float(rows[bench.GTE]["per_flop"]) == pytest.approx(gte / 0.25 / (other / 0.5), rel=1e-3)
    assert rows[bench.MODERNBERT]["per_flop"] == "1.000"
    assert {"machine", "threads", "torch", "transformers", "commit", "date"} <= set(rows[bench.GTE])
    for row in rows.values():
        assert float(row["max_difference"]) <= 2e-5
    assert float(rows[bench.GTE]["max_difference"]) > 0  # its own numbers, not the other's again


def test_all_of_it_in_real_time(bench, tmp_path, capsys):
    out = tmp_path / "gte_cpu.csv"
    assert bench.main(["--smoke", "--repeats", "1", "--out", str(out)]) == 0
    rows = bench.records.read_csv(out)
    assert [row["case"] for row in rows[::3]] == ["8x128", "2x512", "ragged"]
    assert {row["smoke"] for row in rows} == {"smoke"}
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_without_a_place_smoke_writes_nothing(bench, seconds, monkeypatch):
    monkeypatch.setattr(bench.records, "write_csv", lambda *_: pytest.fail("written"))
    assert bench.main(SMOKE) == 0
    assert bench.parse([]).out == bench.records.RESULTS / "gte_cpu.csv"
    assert bench.parse(["--device", "cuda"]).out == bench.records.RESULTS / "gte_gpu.csv"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_transformers_class_the_reference_is_ours(bench, seconds, monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    rows = rows_of(bench, "--dtype", dtype)
    assert list(rows) == [bench.GTE, bench.MODERNBERT]
    assert {row["ratio"] for row in rows.values()} == {""}


def test_16_bits_may_err_as_the_reference_does(bench, seconds):
    rows = rows_of(bench, "--dtype", "bfloat16")
    allowed = 2 * float(rows[bench.THEIRS]["max_difference"])
    assert 2e-5 < float(rows[bench.GTE]["max_difference"]) <= allowed
    assert {row["dtype"] for row in rows.values()} == {"bfloat16"}


def test_the_options_are_enough_for_times_on_a_gpu(bench):
    options = bench.parse([*SMOKE, "--repeats", "3"])
    assert set(bench.bench_encode_gpu.wall_times({"it": lambda: None}, "512", options)) == {"it"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_held_as_load_model_holds_them(bench, dtype):
    models = bench.Models("smoke", torch.device("cpu"))
    models.convert(dtype)
    packs = backend("linear", torch.empty(0, dtype=dtype)) == "onednn"
    for model in models.ours.values():
        linears = [layer for layer in model.modules() if isinstance(layer, Linear)]
        assert len(linears) >= 12
        assert {isinstance(layer, PackedLinear) for layer in linears} == {packs}
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in models.theirs.parameters()} == {dtype}
    assert models.theirs.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
@pytest.mark.parametrize("name", ["GTE", "MODERNBERT"])
def test_wrong_numbers_get_no_speed(bench, seconds, monkeypatch, capsys, name, wrong):
    liar, honest = getattr(bench, name), bench.run_case

    def run_case(models, *args):
        providers = models.providers

        def lying(texts):
            runs = providers(texts)
            return runs | {liar: lambda: runs[liar]() + wrong}

        models.providers = lying
        return honest(models, *args)

    monkeypatch.setattr(bench, "run_case", run_case)
    assert bench.main(SMOKE) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"float32 8x128, {liar}: cosine ")


def test_another_rope_would_show(bench, seconds):
    models = bench.Models("smoke", torch.device("cpu"))
    texts = [torch.arange(5, 133)] * 8
    models.ours[bench.GTE].config = replace(models.configs[bench.GTE], rope=Rope(160_000.0))
    with torch.inference_mode(), pytest.raises(bench.Unequal, match="lite GTE: cosine"):
        bench.run_case(models, "8x128", texts, models.expected(texts), bench.parse(SMOKE))


def test_check_names_what_is_slower(bench, seconds, monkeypatch, capsys):
    per_flop = float(rows_of(bench)[bench.GTE]["per_flop"])
    seconds[bench.GTE] *= per_flop / 0.975
    assert bench.main([*SMOKE, "--check"]) == 0
    seconds[bench.GTE] *= 0.975 / 0.965
    assert bench.main(SMOKE) == 0
    capsys.readouterr()
    assert bench.main([*SMOKE, "--check"]) == 1
    assert "GTE's TFLOP/s over ModernBERT's: 0.965 (smoke 8x128), promised >= 0.97" in capsys.readouterr().err


def test_no_case_starts_after_the_time(bench, seconds, capsys):
    assert bench.main([*SMOKE, "--seconds", "1e-9"]) == 0
    assert capsys.readouterr() == ("", "no time left for smoke 8x128\n")
    assert bench.main([*SMOKE, "--seconds", "1e-9", "--check"]) == 1
    assert "not measured, promised >= 0.97" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line(bench, capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr() == ("", "bench_gte: no CUDA device here\n")


# ---- what is made of the rows


def sample(bench, case="8x128", per_flop="1.050", ratio="1.20", **where):
    where = where or {"machine": "AMD EPYC", "threads": "2", "torch": "2.13.0"}
    where |= {"transformers": "5.23.0", "commit": "abc", "date": "2026-01-01"}
    head = {"case": case, "shape": "large", "tokens": "1024", "dtype": "float32", "tokens_per_s": "1234"}
    head |= {"max_difference": "1.0e-06"}
    gte = {"provider": bench.GTE, "tflop_per_s": "0.21", "per_flop": per_flop, "ratio": ratio}
    other = {"provider": bench.MODERNBERT, "tflop_per_s": "0.2", "per_flop": "1.000", "ratio": ""}
    return [head | gte | where, head | other | where]


def test_table(bench):
    from bench.records import NOT_MEASURED

    rows = [*sample(bench), *sample(bench, "ragged", ratio="")]
    head, _, first, second, _, where = bench.table(rows).splitlines()
    assert first == "| large | 8x128 | 1,024 | float32 | 1,234 | 0.21 | 0.2 | 1.050 | 1.20 | 1.0e-06 |"
    assert second == "| large | ragged | 1,024 | float32 | 1,234 | 0.21 | 0.2 | 1.050 | – | 1.0e-06 |"
    assert head.count("|") == first.count("|")
    assert where == "AMD EPYC, 2 threads, torch 2.13.0, transformers 5.23.0, float32, commit abc, 2026-01-01."
    card = sample(bench, "512", card="NVIDIA H200", driver="580", torch="2.11.0", triton="3.6.0")
    assert "NVIDIA H200, driver 580, torch 2.11.0, triton 3.6.0, transformers" in bench.table(card)
    assert "8x128" not in bench.table(rows[:1])  # half of a case, of a run that goes on
    assert bench.table([]) == NOT_MEASURED


def test_a_page_is_filled_from_what_there_is(bench, tmp_path):
    from bench import tables

    text = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in ("gte_cpu", "gte_gpu"))
    filled = tables.fill(text, tmp_path)
    assert filled.index(tables.NOT_MEASURED_GTE) < filled.index(tables.NOT_MEASURED)
    bench.records.write_csv(tmp_path / "gte_cpu.csv", sample(bench))
    bench.records.write_csv(tmp_path / "gte_gpu.csv", [row | {"smoke": "smoke"} for row in sample(bench)])
    filled = tables.fill(text, tmp_path)
    assert filled.count("| large | 8x128 |") == filled.count(tables.NOT_MEASURED) == 1
    assert tables.fill((ROOT / "docs" / "numbers.md").read_text()).count("table: gte_") == 2


def test_the_run_on_a_gpu_has_its_rows(bench, seconds, monkeypatch, tmp_path):
    from bench import gpu

    section = next(part for part in gpu.plan(smoke=False, skip_tests=True) if part.name == "gte")
    words = section.command[section.command.index("--section") + 1 :]
    assert words == ["gte", "--device", "cuda"]
    monkeypatch.setenv("BENCH_GPU_LINES", str(tmp_path / "lines"))
    monkeypatch.setenv("BENCH_GPU_DEADLINE", "1e12")
    assert gpu.section("gte", SMOKE, smoke=True) == 0
    findings = gpu.Findings()
    findings.take((tmp_path / "lines").read_text().splitlines())
    assert [row["provider"] for row in findings.rows["gte"]] == [bench.GTE, bench.MODERNBERT, bench.THEIRS]
    gpu.write(findings, tmp_path, smoke=False)
    assert len(bench.records.read_csv(tmp_path / "gte_gpu.csv")) == 3
    assert "| smoke | 8x128 | 1,024 | float32 |" in (tmp_path / "report.md").read_text()


def test_wrong_numbers_fail_the_run_on_a_gpu(bench, monkeypatch, tmp_path):
    from bench import gpu

    lines = tmp_path / "lines"
    monkeypatch.setenv("BENCH_GPU_LINES", str(lines))
    monkeypatch.setenv("BENCH_GPU_DEADLINE", "1e12")
    monkeypatch.setattr(bench.bench_encode_gpu, "compare", lambda *_: (1.0, 1.0))
    assert gpu.section("gte", SMOKE, smoke=True) == 1
    assert json.loads(lines.read_text())["failure"].startswith("gte: float32 8x128, modernbert-lite GTE: cosine 1.0")


def test_what_is_promised_of_a_gpu(bench):
    from bench import gpu

    what = "GTE's TFLOP/s over ModernBERT's"

    def kept(*rows):
        findings = gpu.Findings()
        findings.rows["gte"] = list(rows)
        return next(line for line in gpu.promised(findings) if line[0] == what)[2:]

    good, bad = sample(bench), sample(bench, "ragged", "0.969")
    assert kept() == ("", "")
    assert kept(*good, *sample(bench, "512", "0.970")) == ("0.970 (large 512)", "yes")
    assert kept(*good, *bad, *sample(bench, "128", "0.5")) == ("0.500 (large 128), 0.969 (large ragged)", "no")
