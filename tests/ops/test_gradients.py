"""Gradients through every operation, whatever the backend."""

import pytest
import torch
import torch.nn.functional as F
from ops_cases import FAST, attend, naive_attention, on, packed, randn, turn  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.ops import gpu
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.choose import OPS, backend
from modernbert_lite.ops.rope import Rope, rope_table


@pytest.mark.parametrize("name", FAST)
def test_gradients_flow_through_products_whatever_the_backend(on, name):
    on(name)
    x = randn(5, 16).requires_grad_()
    weight, bias = (randn(*shape, seed=1).requires_grad_() for shape in ((12, 16), (12,)))
    residual = randn(5, 6, seed=2).requires_grad_()
    out = ops.geglu(ops.linear(x, weight, bias), "gelu")
    ops.linear(out, torch.eye(6), None, residual).square().sum().backward()
    got = [t.grad.clone() for t in (x, weight, bias, residual)]

    for t in (x, weight, bias, residual):
        t.grad = None
    first, second = F.linear(x, weight, bias).chunk(2, -1)
    (F.gelu(first) * second + residual).square().sum().backward()
    for a, t in zip(got, (x, weight, bias, residual), strict=True):
        assert torch.allclose(a, t.grad, atol=1e-4)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", [(64, 64), (-1, -1)])
def test_gradients_flow_through_attention(on, name, window):
    on(name)
    seqlens = [130, 3]
    qkv = randn(133, 3, 2, 8).requires_grad_()
    weight = randn(133, 2, 8, seed=1)
    (attend(qkv, packed(seqlens), window) * weight).sum().backward()
    got, qkv.grad = qkv.grad.clone(), None
    (naive_attention(qkv, seqlens, window) * weight).sum().backward()
    assert (got - qkv.grad).abs().max() <= 1e-4


@pytest.mark.parametrize("name", FAST)
def test_gradients_flow_after_inference_of_the_same_shape(on, name):
    """What is kept between calls (window masks, frequencies) was made under inference_mode, by the first call."""
    on(name)
    rope, seqlens = Rope(12_345.0), [131, 7]  # numbers of this test alone: nothing is kept of them yet
    batch, weight = packed(seqlens), randn(138, 2, 10, seed=1)

    def forward(qkv):
        turned = turn(qkv * 1.0, *rope_table(rope, 10, batch.position_ids))
        return (attend(turned, batch, (33, 31)) * weight).sum()

    qkv = randn(138, 3, 2, 10)
    with torch.inference_mode():
        expected = forward(qkv)
    qkv.requires_grad_()
    loss = forward(qkv)
    loss.backward()
    assert torch.allclose(loss, expected)
    assert (qkv.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_gradients_flow_through_a_whole_network(make_checkpoint, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    folder, reference = make_checkpoint(num_hidden_layers=2)
    model = ml.load_model(folder, packed=False).requires_grad_(True)
    ids = torch.randint(5, 50000, (1, 70), generator=torch.Generator().manual_seed(0))
    model(ml.pack([ids[0]])).square().mean().backward()
    reference(ids).last_hidden_state.square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_triton_asked_for_keeps_gradients(monkeypatch):
    """Its kernel has no backward: where gradients are wanted, torch computes."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    x, weight = randn(5, 16), randn(12, 16, seed=1).requires_grad_()
    ops.geglu(ops.linear(x, weight), "gelu").sum().backward()
    assert weight.grad is not None


def test_triton_that_can_not_run_is_one_warning(monkeypatch):
    import modernbert_lite.kernels.geglu as kernel

    def missing(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    monkeypatch.setattr(kernel, "geglu", missing)
    gpu.works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Failed to find C compiler") as warned:
            assert {backend(op, randn(2, 3)) for op in OPS} == {"torch"}
        assert len(warned) == 1
    finally:
        gpu.works.cache_clear()
