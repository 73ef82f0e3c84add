"""ops.linear, geglu, layer_norm and rms_norm, beside their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from ops_cases import FAST, on, randn  # noqa: F401

from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.linear import Linear, pack


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("T", [0, 1, 7, 66])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_equals_fp64(on, name, T, bias, residual):
    on(name)
    x, weight = randn(T, 45), randn(33, 45, seed=1)
    b = randn(33, seed=2) if bias else None
    r = randn(T, 33, seed=3) if residual else None
    kept = None if r is None else r.clone()
    with torch.inference_mode():
        got = ops.linear(x, weight, b, r)
    expected = x.double() @ weight.double().T + (0 if b is None else b.double()) + (0 if r is None else r.double())
    assert got.shape == (T, 33)
    assert torch.allclose(got.double(), expected, rtol=0, atol=2e-5)
    assert r is None or torch.equal(r, kept)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("N", [1, 63, 144])
def test_gated_linear_activates_the_first_half_or_swapped_the_second(on, name, act, bias, swapped, N):
    on(name)
    x, weight = randn(13, 24), randn(2 * N, 24, seed=1)
    b = randn(2 * N, seed=2) if bias else None
    with torch.inference_mode():
        got = ops.geglu(ops.linear(x, weight, b), act, swapped)
    first, second = F.linear(x.double(), weight.double(), None if b is None else b.double()).chunk(2, -1)
    first, second = (second, first) if swapped else (first, second)
    function = {
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "relu": lambda z: z.clamp(min=0),
        "gelu_pytorch_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    }[act]
    expected = function(first) * second
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max() + 2e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_equals_its_formula(on, name, bias):
    on(name)
    x, weight = randn(7, 45) * 3 + 1, randn(45, seed=1)
    b = randn(45, seed=2) if bias else None
    z = x.double()
    expected = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt() * weight
    got = ops.layer_norm(x, weight, b, 1e-3)
    assert (got - expected - (0 if b is None else b)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_layer_norm_of_a_sum_is_that_of_the_sum(on, name, bias, T):
    on(name)
    x, residual, weight = randn(T, 48), randn(T, 48, seed=1) * 3, randn(48, seed=2)
    b = randn(48, seed=3) if bias else None
    kept = x.clone(), residual.clone()
    got = ops.layer_norm(x, weight, b, 1e-3, residual)
    exact = (x.double() + residual).clone()
    expected = F.layer_norm(exact, (48,), weight.double(), None if b is None else b.double(), 1e-3)
    assert got.shape == (T, 48)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_layer_norm_of_a_wide_sum_with_narrow_weights_adds_the_residual(on):
    """The CPU's residual stream is in fp32 where packed weights are in 16 bits."""
    on("onednn")
    x, residual, weight = randn(5, 48), randn(5, 48, seed=1) * 3, (1 + randn(48, seed=2) / 4).bfloat16()
    got = ops.layer_norm(x, weight, None, 1e-5, residual)
    expected = F.layer_norm(x + residual, (48,), weight.float(), None, 1e-5)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 66])
def test_linear_layer_norm_is_a_product_a_sum_and_a_norm(on, name, packs, dtype, T):
    on(name)
    if name == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter cuts bf16 off where a GPU rounds it
    x, residual, weight, b = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(T, 45), (T, 33), (33, 45), (33,)]))
    norm = 1 + randn(33, seed=5).to(dtype) / 4, randn(33, seed=6).to(dtype), 1e-5
    total = F.linear(x.double(), weight.double(), b.double()) + residual
    truth = F.layer_norm(total, (33,), norm[0].double(), norm[1].double(), 1e-5)
    plain = F.layer_norm(residual + F.linear(x, weight, b), (33,), *norm)
    layer = Linear(45, 33, bias=True).requires_grad_(False)
    layer.weight.data, layer.bias.data = weight, b
    if packs:
        pack(layer)
    with torch.inference_mode():
        got = layer.normed(x, residual.clone(), *norm)
    assert (got.shape, got.dtype) == ((T, 33), dtype)
    if T:
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.3, 300])
def test_rms_norm_equals_its_formula(dtype, size):
    x, weight = (randn(7, 45) * size).to(dtype), randn(45, seed=1).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    got = ops.rms_norm(x, weight, 0.5)
    assert got.dtype == dtype
    plain = weight * exact.to(dtype)
    assert torch.allclose(got.double(), plain.double(), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    assert ops.rms_norm(x.float(), weight, 0.5).dtype == dtype  # a sum that is kept wide


# ---- gradients -----------------------------------------------------------------------------------------------------
