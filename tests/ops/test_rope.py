"""ops.rope, and the angles that it turns by."""

import pytest
import torch
from ops_cases import attend, on, packed, randn, turn  # noqa: F401

from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.rope import Rope, rope_table


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
@pytest.mark.parametrize("head_dim", [2, 30, 64])
def test_rope_equals_its_formula(theta, head_dim):
    """As a product of complex numbers, in fp64: pair j, (x[j], x[j + D/2]), turns by position * theta^(-2j/D)."""
    batch = packed([7, 1, 130])
    qkv = randn(138, 3, 2, head_dim)
    cos, sin = rope_table(Rope(theta), head_dim, batch.position_ids)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (138, head_dim // 2)
    got = turn(qkv.clone(), cos, sin)

    first, second = qkv.double().chunk(2, dim=-1)
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = batch.position_ids.double()[:, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    expected[:, 2] = qkv[:, 2].double()
    assert (got - expected).abs().max() <= 2e-5


def test_rope_turns_by_distance_only():
    """The score of a query and a key depends on how far apart they are, not on where."""
    qkv = randn(1, 3, 1, 32).expand(300, 3, 1, 32).contiguous()
    table = rope_table(Rope(10_000.0), 32, torch.arange(300))
    q, k, _ = turn(qkv, *table).unbind(1)
    scores = (q[:, 0] @ k[:, 0].T).double()
    for shift in (0, 1, 17):
        assert scores.diagonal(shift).std() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_works_in_place_and_leaves_v_alone(on, dtype):
    on("torch")
    qkv = randn(9, 3, 2, 8).to(dtype)
    kept = qkv.clone()
    table = rope_table(Rope(10_000.0), 8, torch.arange(9))
    flat = qkv.flatten(1, 2)
    assert ops.rope(flat, 4, (*table, None)) is flat
    assert torch.equal(qkv[:, 2], kept[:, 2])
    assert torch.equal(qkv[0], kept[0])  # position 0 doesn't turn
    assert not torch.equal(qkv[1:, :2], kept[1:, :2])
    # One rounding at the end: the fp32 result, rounded.
    exact = turn(kept.float(), *table)
    assert torch.equal(qkv, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rope_of_16_bits_on_the_cpu_is_not_rounded(on, dtype):
    on("onednn")
    qkv, batch = randn(9, 3, 2, 8).to(dtype), packed([9])
    table = rope_table(Rope(10_000.0), 8, batch.position_ids)
    got = ops.attention(qkv.flatten(1, 2), 2, batch, (-1, -1), (*table, None))
    expected = attend(turn(qkv.float(), *table), batch)
    assert torch.equal(got, expected.to(dtype))
    q, kv, rows = qkv[:1, 0], qkv[:, 1:].flatten(1, 2), torch.tensor([0])
    assert torch.equal(ops.row_attention(q, kv, rows, batch, (*table, None)), expected[:1].to(dtype))


def test_rope_in_place_on_a_view_leaves_its_neighbours_alone():
    wide = randn(5, 6, 12)
    kept = wide.clone()
    ops.rope(wide[..., 2:10], 4, (*rope_table(Rope(10_000.0), 8, torch.arange(5)), None))
    assert torch.equal(wide[..., :2], kept[..., :2])
    assert torch.equal(wide[..., 10:], kept[..., 10:])
    assert torch.equal(wide[:, 4:], kept[:, 4:])
    assert (wide[1:, :4, 2:10] != kept[1:, :4, 2:10]).any((1, 2)).all()


def test_linear_rope_stretches_positions():
    plain = rope_table(Rope(10_000.0), 16, torch.arange(10))
    stretched = rope_table(Rope(10_000.0, "linear", 4.0), 16, torch.arange(10) * 4)
    for a, b in zip(plain, stretched, strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    rope = Rope(160_000.0, "yarn", 4.0, 8192, attention_factor=1.25)
    cos, sin = rope_table(rope, 64, torch.tensor([0, 1]))
    assert cos[0].unique().tolist() == [1.25]
    angle = torch.atan2(sin[1], cos[1]).double()
    plain = 160_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (angle[:3] / plain[:3] - 1).abs().max() <= 1e-5
    assert (angle[-3:] / plain[-3:] - 1 / 4).abs().max() <= 1e-5
    assert (angle.diff() < 0).all()


def test_rope_angles_of_far_positions_are_not_rounded_away():
    """bf16 tables would give positions 8000 and 8001 the same angle."""
    table = rope_table(Rope(10_000.0), 64, torch.tensor([8000, 8001]))
    exact = torch.tensor([8000.0, 8001.0], dtype=torch.float64)
    assert (table[0][:, 0] - exact.cos()).abs().max() <= 1e-6


# ---- products, norm, gate ------------------------------------------------------------------------------------------
