"""ModernBERT's local attention sees its window and costs its window; RoPE's angles."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import VOCAB, YARN, difference, make, sequences, token_ids  # noqa: F401
from torch.overrides import TorchFunctionMode

import modernbert_lite as ml
from modernbert_lite.models.modernbert import FULL, SLIDING, ModernBertConfig
from modernbert_lite.ops import cpu
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.rope import rope_table


def one_sliding_layer(make, local_attention=128):
    folder, _ = make(num_hidden_layers=1, layer_types=[SLIDING], local_attention=local_attention)
    return ml.load_model(folder)


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize(("local_attention", "reach"), [(128, 64), (32, 16), (127, 63), (2, 1)])
def test_a_local_layer_sees_half_its_window_on_each_side_inclusive(make, monkeypatch, backend, local_attention, reach):
    """At 128: positions 0 and 64 see each other, 0 and 65 don't."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    model = one_sliding_layer(make, local_attention)
    ids = token_ids(200)
    before = model(ml.pack([token_ids(9), ids]))[9:]
    for changed in (0, reach, 70, 130, 199):
        other = ids.clone()
        other[changed] = ids[changed] % (VOCAB - 1) + 1
        moved = (model(ml.pack([token_ids(9), other]))[9:] - before).abs().amax(1)
        near = (torch.arange(200) - changed).abs() <= reach
        assert (moved[near] > 1e-4).all()
        assert (moved[~near] <= 1e-6).all()


class AttentionProducts(TorchFunctionMode):
    """Counts the multiplications of attention: what any of torch's batched products and its fused attention cost."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.total += math.prod(q.shape[:-1]) * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        elif func in (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.total += math.prod(args[0].shape) * args[1].shape[-1]
        elif func in (torch.baddbmm, torch.Tensor.baddbmm):
            self.total += math.prod(args[1].shape) * args[2].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_local_attention_costs_the_window_not_the_length(make, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    # Its products are no function that a mode sees, and whether it pays is the machine's.
    monkeypatch.setattr(cpu, "attends_in_chunks", lambda length, dtype: False)

    def cost(model, *lengths):
        with AttentionProducts() as products, torch.inference_mode():
            model(ml.pack(sequences(lengths)))
        return products.total

    few = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    local = ml.load_model(make(name="local", layer_types=[SLIDING] * 2, **few)[0])
    # Scores and weighted values: 2 layers x 64 wide x at most 3 windows of 64 x 2 products, for every token.
    assert 0 < cost(local, 2048) <= 2048 * 2 * 64 * (64 + 129) * 2
    assert cost(local, 4096) / cost(local, 2048) == pytest.approx(2, rel=0.05)
    assert cost(local, 2048, 2048, 100) <= cost(local, 2048) * 2.1

    # The counter sees what it should: global layers are quadratic.
    full = ml.load_model(make(name="full", layer_types=[FULL] * 2, **few)[0])
    assert cost(full, 2048) == 2048**2 * 2 * 64 * 2
    assert cost(full, 4096) == 4 * cost(full, 2048)


# --- RoPE


def frequencies(rope, head_dim):
    """From the public table: the angles of position 1, and the length of (cos, sin)."""
    cos, sin = rope_table(rope, head_dim, torch.tensor([1]))
    return torch.atan2(sin, cos)[0], torch.hypot(cos, sin)[0]


def test_yarn_frequencies_and_attention_factor_are_the_known_ones():
    raw = {"model_type": "modernbert", "global_rope_theta": 160000.0, "local_rope_theta": 160000.0}
    config = ModernBertConfig.from_dict({**raw, "max_position_embeddings": 32768, "rope_scaling": YARN})
    assert config.full_rope == config.sliding_rope
    assert config.full_rope.attention_factor == pytest.approx(1.138629436, abs=1e-9)
    angles, length = frequencies(config.full_rope, 64)
    assert angles[:3].tolist() == pytest.approx([1.0, 0.6877, 0.4729], abs=5e-5)
    assert angles[-3:].tolist() == pytest.approx([4.8051e-06, 3.3043e-06, 2.2722e-06], rel=2e-5)
    assert length.tolist() == pytest.approx([1.138629436] * 32, rel=1e-6)


def test_rope_tables_are_fp32_and_exact_at_far_positions(make):
    config = ModernBertConfig()
    positions = torch.tensor([0, 1, 4095, 8191])
    cos, sin = rope_table(config.sliding_rope, 64, positions)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions[:, None].double() * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    # fp32 angles: position x frequency is rounded at the 24th bit, up to 8191 x 2^-24 = 5e-4 (transformers' too).
    assert difference(cos, exact.cos()) <= 1e-3
    assert difference(sin, exact.sin()) <= 1e-3


def test_rope_turns_split_halves():
    """Dimension j is paired with j + D/2; v isn't turned; position 0 isn't either."""
    qkv = torch.zeros(2, 3, 1, 8)
    qkv[..., 1] = 1.0
    cos, sin = rope_table(ModernBertConfig().sliding_rope, 8, torch.tensor([0, 1]))
    out = ops.rope(qkv.clone().flatten(1, 2), 2, (cos, sin, None)).unflatten(1, (3, 1))
    angle = 10000.0 ** (-2 / 8)
    expected = torch.zeros(8)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    assert torch.equal(out[0], qkv[0])
    assert difference(out[1, 0, 0], expected) <= 1e-6
    assert difference(out[1, 1, 0], expected) <= 1e-6
    assert torch.equal(out[1, 2], qkv[1, 2])
