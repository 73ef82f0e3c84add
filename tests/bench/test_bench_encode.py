"""The benches of the whole model: their arithmetic, their gate, their tables."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bench_cases import sample_rows

import modernbert_lite as ml

ROOT = Path(__file__).parents[2]


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


def bench_lengths(case: str, tokens: int) -> list[int]:
    from bench.texts import batch_of, pool_lengths

    lengths = pool_lengths(case)
    return [lengths[i] for i in batch_of(lengths, tokens)]


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
