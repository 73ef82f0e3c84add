"""The CPU's fast paths: packed weights, 8-bit weights, long attention, and what happens where they don't work."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import (  # noqa: F401
    BF16,
    FP32,
    SIZES,
    SMALL_VOCAB,
    TOKENS,
    forced,
    int8,
    layer,
    layer_of,
    needs_onednn,
    randn,
    token_ids,
    unprobed,
    within_twice,
)
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.linear import Linear, PackedLinear

DTYPES = [FP32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BF16, reason="no bf16 in oneDNN here"))]


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SIZES)
@torch.inference_mode()
def test_packed_products_equal_plain_ones(forced, shape, bias, dtype):
    weight = (randn(*shape, seed=1) * shape[1] ** -0.5).to(dtype)
    b = randn(shape[0], seed=2).to(dtype) if bias else None
    layer = layer_of(weight, b)
    assert type(layer) is PackedLinear
    for tokens in TOKENS:
        x, residual = randn(tokens, shape[1], seed=tokens).to(dtype), randn(tokens, shape[0], seed=3).to(dtype)
        plain = F.linear(x, weight, b)
        truth = x.double() @ weight.double().t() + (0 if b is None else b.double())
        assert within_twice(layer(x), plain, truth)
        got = layer(x, residual.clone())
        assert within_twice(got, residual + plain, truth + residual.double())
        assert got.dtype == FP32 or dtype == FP32  # the residual stream is kept in fp32
        part = slice(shape[0] // 3, None)
        assert within_twice(layer.part(x, part), plain[:, part], truth[:, part])


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_gated_products_equal_plain_ones(forced, act, bias, dtype):
    weight = (randn(2 * 37, 24, seed=1) * 24**-0.5).to(dtype)
    b = randn(2 * 37, seed=2).to(dtype) if bias else None
    for parts in (1, 2):
        layer = layer_of(weight, b, parts)
        for tokens in TOKENS:
            x = randn(tokens, 24, seed=tokens).to(dtype)
            y = F.linear(x, weight, b)
            z = x.double() @ weight.double().t() + (0 if b is None else b.double())
            for swapped in (False, True):
                halves = (v.chunk(2, -1)[:: -1 if swapped else 1] for v in (y, z))
                plain, truth = (ops.ACTIVATIONS[act](activated) * gate for activated, gate in halves)
                assert within_twice(layer.gated(x, act, swapped), plain, truth)
            assert within_twice(layer(x), y, z)  # the two halves as one


@needs_onednn
@torch.inference_mode()
def test_strided_and_empty_input_is_multiplied_right(forced):
    weight = randn(6, 16, seed=1)
    layer = layer_of(weight)
    x = randn(9, 40)[:, 3:19]
    assert torch.allclose(layer(x), F.linear(x, weight), atol=2e-5)
    assert layer(x[:0]).shape == (0, 6)
    assert torch.allclose(layer(x[None]), F.linear(x[None], weight), atol=2e-5)


@needs_onednn
def test_gradients_flow_through_packed_weights(forced):
    weight, x = randn(12, 16), randn(5, 16, seed=1).requires_grad_()
    layer = layer_of(weight)
    (layer(x).square().sum() + layer.gated(x, "gelu").sum()).backward()
    y = x.detach().clone().requires_grad_()
    first, second = F.linear(y, weight).chunk(2, -1)
    (F.linear(y, weight).square().sum() + (F.gelu(first) * second).sum()).backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)


# ---- a packed layer is a layer to everybody else -------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_gives_its_numbers_back_bit_for_bit(forced, parts, dtype):
    weight = randn(38, 23).to(dtype)
    layer = layer_of(weight, parts=parts)
    assert torch.equal(layer.weight, weight)
    assert (layer.weight.dtype, layer.weight.device) == (dtype, weight.device)
    assert "PackedLinear(in_features=23, out_features=38, bias=False, " + str(dtype).removeprefix("torch.") in repr(
        layer
    )


@needs_onednn
@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: torch.nn.init.ones_(layer.weight),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_to_what_weight_gives_changes_no_layer(forced, write, mode):
    for in_8_bits in (False, True):
        layer = layer_of(randn(4, 6), int8=in_8_bits)
        kept = layer.weight
        with mode():
            write(layer)
        assert torch.equal(layer.weight, kept)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = torch.nn.Parameter(torch.zeros(4, 6))
        with pytest.raises(TypeError, match=r"packed for inference: they can't be trained; load it with packed=False"):
            layer.requires_grad_(True)


@needs_onednn
@pytest.mark.parametrize("int8", [False, True])
def test_a_state_is_read_in_inference_mode_too(forced, int8, tmp_path):
    layer = layer_of(randn(12, 16), randn(12), int8=int8)
    with torch.inference_mode():
        state = layer.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], layer.weight)


def test_a_layer_s_state_is_plain_and_loads_anywhere(layer, tmp_path):
    linear, dense = layer
    state = linear.state_dict()
    assert type(state["weight"]) is torch.Tensor
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], dense)
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], dense)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert type(read) is Linear
    assert torch.equal(read.weight, dense)
    assert torch.equal(read.bias, linear.bias)
    linear.load_state_dict({"weight": dense * 2, "bias": state["bias"]})
    with torch.inference_mode():
        assert torch.allclose(linear(torch.ones(3, 16)), F.linear(torch.ones(3, 16), dense * 2, linear.bias), atol=1e-5)


def test_a_copy_stays_packed_and_is_a_copy(layer):
    linear, dense = layer
    other = copy.deepcopy(linear)
    assert type(other) is PackedLinear
    other.load_state_dict({"weight": dense * 2, "bias": linear.bias * 3})
    assert torch.equal(other.weight, dense * 2)
    assert torch.equal(linear.weight, dense)
    assert type(linear) is PackedLinear


def test_a_state_without_the_weight_leaves_it_packed(layer):
    linear, _ = layer
    linear.load_state_dict({"bias": torch.zeros(12)}, strict=False)
    assert type(linear) is PackedLinear
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        linear.load_state_dict({"bias": torch.zeros(12)})


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.half()])
def test_moved_to_another_device_or_dtype_a_layer_is_plain(layer, move):
    linear, dense = layer
    moved = move(linear)
    assert type(moved) is Linear
    assert list(dict(moved.named_parameters())) == ["bias", "weight"] or not moved.training
    assert moved.weight.is_meta or torch.equal(moved.weight, dense.to(moved.weight.dtype))
    assert not moved.weight.requires_grad


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.eval(), lambda m: m.cpu()])
def test_moved_nowhere_it_stays_packed(layer, move):
    linear, dense = layer
    assert type(move(linear)) is PackedLinear
    assert torch.equal(linear.weight, dense)


def test_a_network_to_train_is_one_that_is_not_packed(make_checkpoint, forced):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(TypeError, match=r"can't be trained; load it with packed=False"):
        ml.load_model(folder, device="cpu").requires_grad_(True)
    network = ml.load_model(folder, device="cpu", packed=False).requires_grad_(True)
    optimizer, batch = torch.optim.SGD(network.parameters(), lr=0.1), ml.pack(token_ids(70))
    before = network.layers[0].attn.Wqkv.weight.clone()
    network.train()
    network(batch)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(network.layers[0].attn.Wqkv.weight, before)


# ---- a network, packed ---------------------------------------------------------------------------------------------
