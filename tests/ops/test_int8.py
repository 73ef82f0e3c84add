"""Weights of 8 bits on the CPU."""

import pytest
import torch
from cpu_cases import FP32, SIZES, TOKENS, forced, int8, layer, layer_of, randn, unprobed  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.ops import onednn
from modernbert_lite.ops import reference as ops


@pytest.mark.parametrize("shape", SIZES)
def test_8_bit_weights_are_off_by_half_a_step_at_most(int8, shape):
    weight = randn(*shape) * 10 ** randn(shape[0], 1, seed=1)
    weight[0] = 0
    layer = layer_of(weight, int8=True)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= 0.5001 * step + 1e-30).all()
    assert (layer.weight.shape, layer.weight.dtype) == (weight.shape, FP32)
    assert "Int8Linear" in repr(layer)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [*TOKENS, 1025])
def test_8_bit_products_are_as_exact_as_8_bits_allow(int8, tokens, bias):
    """Against fp64: activations and weights are each off by half a step at most, at random."""
    x, weight, residual = randn(tokens, 96), randn(74, 96, seed=1), randn(tokens, 74, seed=2)
    x[0] *= 1e4  # one row's size is its own matter
    b = randn(74, seed=3) if bias else None
    layer = layer_of(weight, b, 2, int8=True)
    truth = x.double() @ weight.double().t() + (0 if b is None else b)
    noise = 96**0.5 * (x.abs().amax(1, keepdim=True) / 127 + x.square().mean(1, keepdim=True).sqrt() / 127 * 4)
    assert ((layer(x) - truth).abs() <= 1.5 * noise).all()
    got = layer(x, residual.clone())
    assert ((got - truth - residual).abs() <= 1.5 * noise).all()
    y = layer(x)
    for act in ("gelu", "silu"):
        first, second = y.chunk(2, -1)
        expected = ops.ACTIVATIONS[act](first) * second
        assert torch.allclose(layer.gated(x, act), expected, rtol=1e-4, atol=1e-3 * noise.max())


@torch.inference_mode()
def test_8_bit_products_of_a_row_do_not_depend_on_the_rows_beside_it(int8):
    x, layer = randn(700, 96), layer_of(randn(74, 96, seed=1), int8=True)
    x[1] *= 1e6
    together, gated = layer(x), layer.gated(x, "gelu")
    for rows in (slice(0, 1), slice(5, 40), slice(511, 514)):
        difference = (layer(x[rows]) - together[rows]).abs().max()
        assert difference <= (0 if int8 == "packed" else 2e-5)
        difference = (layer.gated(x[rows], "gelu") - gated[rows]).abs().max()
        assert difference <= (0 if int8 == "packed" else 2e-5 * gated.abs().max())


@torch.inference_mode()
def test_8_bit_products_of_zeros_nan_and_infinities(int8):
    x, layer = randn(5, 16), layer_of(randn(6, 16, seed=1), int8=True)
    expected = layer(x)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    got = layer(x)
    assert (got[1] == 0).all()
    assert not got[2:4].isfinite().any()
    assert torch.equal(got[[0, 4]], expected[[0, 4]])


def test_int8_embeddings_of_the_bundled_model_are_near_fp32(int8):
    texts = [
        "The capital of France is Paris.", "a", "", "Berlin is where the German parliament meets.", "🙂 emoji",
        "def add(a, b):\n    return a + b", "How do I unpack a tar archive?", "tar -xf archive.tar",
        "long " * 300, "The mitochondrion is the powerhouse of the cell, as every pupil has heard.",
    ]  # fmt: skip
    exact = ml.Embedder.from_pretrained("tiny", device="cpu").encode(texts)
    embedder = ml.Embedder.from_pretrained("tiny", device="cpu", dtype="int8")
    cosines = (exact * embedder.encode(texts)).sum(1)
    assert cosines.mean() >= 0.995
    assert cosines.min() >= 0.98
    one_by_one = [embedder.encode(text) for text in texts]
    assert abs(embedder.encode(texts) - one_by_one).max() <= 1e-5


@pytest.mark.skipif(not onednn.int8_works(), reason="this torch has no int8 linear")
def test_8_bit_weights_take_a_quarter(make_checkpoint):
    weight = randn(768, 768)
    numbers = onednn.quantize(weight).numbers
    assert numbers.numel() * numbers.element_size() == weight.numel()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_int8_is_refused_on_other_devices(device):
    from modernbert_lite.checkpoint.open import pick_dtype

    with pytest.raises(ValueError, match=f"'int8' is for the CPU, and the device is '{device}'"):
        pick_dtype("int8", torch.device(device))


# ---- attention -----------------------------------------------------------------------------------------------------
