"""Attention by oneDNN, and what happens where oneDNN is missing, wrong or slow."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import (  # noqa: F401
    BF16,
    FP32,
    SMALL_VOCAB,
    forced,
    int8,
    is_packed,
    layer_of,
    needs_onednn,
    randn,
    token_ids,
    unprobed,
    within_twice,
)

import modernbert_lite as ml
from modernbert_lite.ops import cpu, onednn
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.linear import Linear


def attended(qkv, batch, window_size=(-1, -1)):
    with torch.inference_mode():
        return ops.attention(qkv.flatten(1, 2), qkv.shape[2], batch, window_size)


@needs_onednn
@pytest.mark.parametrize("lengths", [[1], [2, 2, 511], [513], [1100, 3, 1100]])
def test_attention_in_chunks_equals_the_formula(forced, monkeypatch, lengths):
    monkeypatch.setattr(cpu, "attends_in_chunks", lambda length, dtype: True)
    monkeypatch.setattr(cpu, "_QUERIES", 256)
    batch, qkv = ml.pack([[0] * n for n in lengths]), randn(sum(lengths), 3, 3, 24)
    qkv[:, 1] += 5  # what all keys have in common
    for got, one in zip(attended(qkv, batch).split(lengths), qkv.double().split(lengths), strict=True):
        q, k, v = one.permute(1, 2, 0, 3)
        truth = torch.softmax(q @ k.transpose(1, 2) / 24**0.5, -1) @ v
        assert (got - truth.transpose(0, 1)).abs().max() <= 1e-5


@pytest.mark.skipif(not BF16, reason="no bf16 in oneDNN here")
def test_long_bf16_attention_is_as_exact_as_products_in_bf16(forced):
    qkv = randn(1500, 3, 2, 64)
    q, k, v = qkv.bfloat16().permute(1, 2, 0, 3)
    exact = F.scaled_dot_product_attention(*(x.double()[None] for x in (q, k, v)))[0].transpose(0, 1)
    plain = (torch.softmax(q @ k.transpose(1, 2) / 8, -1) @ v).transpose(0, 1)
    assert cpu.attends_in_chunks(1500, torch.bfloat16)
    got = attended(qkv.bfloat16(), ml.pack([[0] * 1500]))
    assert got.dtype == torch.bfloat16
    assert within_twice(got, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_local_attention_in_16_bits_is_more_exact_than_torch_s(forced, dtype):
    qkv, batch = randn(300, 3, 2, 32), ml.pack([[0] * 270, [0] * 30])
    truth = attended(qkv.to(dtype).double(), batch, (64, 64))
    got = attended(qkv.to(dtype), batch, (64, 64))
    assert got.dtype == dtype
    assert (got - truth).abs().max() <= (truth.to(dtype) - truth).abs().max() * 1.01


def test_when_attention_goes_in_chunks(monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda dtype: True)
    monkeypatch.setattr(onednn, "gain", lambda: 2.3)
    assert cpu.attends_in_chunks(8192, FP32)
    assert not cpu.attends_in_chunks(2048, FP32)
    assert cpu.attends_in_chunks(2048, torch.bfloat16)
    assert not cpu.attends_in_chunks(512, torch.bfloat16)
    assert not cpu.attends_in_chunks(8192, torch.float64)
    monkeypatch.setattr(onednn, "gain", lambda: 1.2)
    assert not cpu.attends_in_chunks(8192, FP32)


# ---- where oneDNN is missing, wrong, or slow -----------------------------------------------------------------------


def missing(*_: object) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")


def failing(*_: object) -> torch.Tensor:
    raise RuntimeError("mkldnn: could not create a primitive")


@pytest.mark.parametrize("broken", [missing, failing])
@pytest.mark.parametrize("name", ["pack", "multiply"])
def test_a_torch_without_the_operators_falls_back_with_one_warning(
    make_checkpoint, forced, monkeypatch, unprobed, broken, name
):
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    monkeypatch.setattr(onednn, name, broken)
    with pytest.warns(UserWarning, match="no usable oneDNN linear") as caught:
        network, _ = ml.load_model(folder, device="cpu"), ml.load_model(folder, device="cpu")
    assert len(caught) == 1
    ids = token_ids(70)[0]
    got = network(ml.pack([ids]))
    with torch.inference_mode():
        assert (got - reference(ids[None]).last_hidden_state[0]).abs().max() <= 2e-5


@needs_onednn
def test_operators_that_give_other_numbers_are_left_alone(forced, monkeypatch, unprobed):
    right = onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *args: right(*args) * 1.01)
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert type(layer_of(randn(12, 16))) is Linear


@pytest.mark.parametrize("broken", [missing, failing, lambda *_: torch.zeros(3, 5)])
def test_an_int8_product_that_is_missing_or_wrong_is_made_dense_with_one_warning(monkeypatch, unprobed, broken):
    monkeypatch.setattr(onednn, "_int8_product", broken)
    weight, x = randn(12, 16), randn(5, 16, seed=1)
    with pytest.warns(UserWarning, match="int8 is slow here") as caught:
        quantized = [layer_of(weight, int8=True) for _ in range(2)]
    assert len(caught) == 1
    with torch.inference_mode():
        got = quantized[0](x)
    assert (got - F.linear(x, weight)).abs().max() < 0.2


@pytest.mark.parametrize(
    ("vendor", "ratio", "pays"),
    [("AuthenticAMD", 0.5, True), ("GenuineIntel", 1.0, False), ("GenuineIntel", 1.2, False), ("", 2.0, True)],
)
def test_fp32_is_packed_on_amd_and_elsewhere_where_it_measures_faster(monkeypatch, unprobed, vendor, ratio, pays):
    monkeypatch.setattr(onednn, "_cpu_vendor", lambda: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(onednn, "gain", lambda: ratio)
    monkeypatch.setattr(onednn, "works", lambda dtype: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn.pays(FP32) is pays


@needs_onednn
@pytest.mark.parametrize("around", ["float64 by default", "meta by default", "autocast", "inference mode"])
def test_what_is_around_a_probe_does_not_sway_it(monkeypatch, unprobed, around):
    answers = {
        "float64 by default": lambda: torch.set_default_dtype(torch.float64),
        "meta by default": lambda: torch.set_default_device("meta"),
    }
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"),
        torch.inference_mode(around == "inference mode"),
    ):
        try:
            answers.get(around, lambda: None)()
            assert onednn.works(FP32)
            assert onednn.works(torch.bfloat16) is BF16
            assert onednn.gain() > 0
            onednn.int8_works()
        finally:
            torch.set_default_dtype(FP32)
            torch.set_default_device(None)


def test_int8_without_the_mkldnn_operators(make_checkpoint, monkeypatch, unprobed):
    class Nothing:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    monkeypatch.setattr(torch.ops, "onednn", Nothing())
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    with pytest.warns(UserWarning, match="no usable oneDNN"):
        network = ml.load_model(folder, device="cpu", dtype="int8")
    ids = token_ids(70)[0]
    with torch.inference_mode():
        got, exact = network(ml.pack([ids])), reference(ids[None]).last_hidden_state[0]
    assert torch.cosine_similarity(got, exact).min() > 0.99


@needs_onednn
def test_the_gain_is_measured_in_a_few_milliseconds(unprobed):
    assert 0.1 < onednn.gain() < 10


def test_without_avx512_everything_still_works():
    """A CPU of 2013, as far as oneDNN and torch play it: right, in fp32, bf16 and int8."""
    code = """
import warnings, torch, modernbert_lite as ml
warnings.simplefilter("ignore")
exact = ml.load_model("tiny", device="cpu", packed=False)
batch = ml.pack([list(range(5, 90)), [7, 8]])
with torch.inference_mode():
    for dtype, least in (("float32", 0.99999), ("bfloat16", 0.99), ("int8", 0.98)):
        got = ml.load_model("tiny", device="cpu", dtype=dtype)(batch).float()
        cosine = torch.cosine_similarity(got, exact(batch)).mean()
        assert cosine >= least, (dtype, cosine)
print("right")
"""
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "right", done.stderr
