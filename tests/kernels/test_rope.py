"""The RoPE kernel against the torch reference: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import pytest
import torch
from kernel_rope_cases import (  # noqa: F401
    DEVICE,
    assert_rotates_as_the_reference,
    exact,
    inside_a_buffer,
    places,
    projection,
    rope_,
    same_bits,
    tables,
    torch_backend,
)

import modernbert_lite as ml

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("T", [0, 1, 7, 8, 9, 63, 64, 65])
def test_rope_equals_the_reference_at_any_length(T, positions, dtype):
    assert_rotates_as_the_reference(projection(T, 3, 32, dtype), positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [2, 6, 32, 64, 128])
@pytest.mark.parametrize("H", [1, 3, 12, 16])
def test_rope_equals_the_reference_at_any_width(H, D, dtype):
    assert_rotates_as_the_reference(projection(9, H, D, dtype), torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("T", "H", "D"), [(0, 3, 32), (1, 12, 64), (9, 1, 2), (9, 3, 6), (65, 5, 32)])
def test_q_alone_and_k_with_v(T, H, D, parts, dtype):
    """(T, 1, H, D) is turned whole; of (T, 2, H, D) the first part is, and v stays."""
    assert_rotates_as_the_reference(projection(T, H, D, dtype, parts=parts), torch.int32)


@pytest.mark.parametrize("H", [1, 3, 12])
def test_q_k_and_v_in_pieces_equal_the_projection(H):
    qkv, (cos, sin), position_ids = projection(19, H, 32), tables(40, 32), places(19, 40)
    q, kv = qkv[:, :1].clone(), qkv[:, 1:].clone()
    rope_(qkv, cos, sin, position_ids)
    assert same_bits(rope_(q, cos, sin, position_ids), qkv[:, :1].contiguous())
    assert same_bits(rope_(kv, cos, sin, position_ids), qkv[:, 1:].contiguous())


def test_pieces_of_the_projection_in_place():
    """Views: q, then k and v; the rest keeps its bits."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    whole = rope_(qkv.clone(), cos, sin)
    kept = qkv.clone()
    rope_(qkv[:, :1], cos, sin)
    assert same_bits(qkv[:, 1:].contiguous(), kept[:, 1:].contiguous())
    rope_(qkv[:, 1:], cos, sin)
    assert same_bits(qkv, whole)


def test_rope_in_bfloat16():
    """To one unit in the last place: Triton's interpreter cuts bf16 off where a GPU rounds it (see the gpu test)."""
    qkv = projection(9, 3, 64, torch.bfloat16)
    (cos, sin), v = tables(9, 64), qkv[:, 2].clone()
    truth = exact(qkv, cos, sin)
    rope_(qkv, cos, sin)
    assert qkv.dtype == torch.bfloat16
    assert ((qkv.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()
    assert same_bits(qkv[:, 2], v)


def test_which_pairs_are_turned_and_which_way():
    """Split halves: column 0 pairs with 2, column 1 with 3; a quarter turn takes (1, 0) to (0, 1)."""
    qkv = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE).expand(1, 3, 1, 4).clone()
    quarter = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[1.0, 0.0]], device=DEVICE)
    rope_(qkv, *quarter)
    assert qkv[0, :, 0].tolist() == [[-3.0, 2.0, 1.0, 4.0], [-3.0, 2.0, 1.0, 4.0], [1.0, 2.0, 3.0, 4.0]]


def test_fp16_is_rotated_in_fp32():
    """The two products are 60,000 each: their sum overflows fp16, their difference is lost in it."""
    qkv = torch.full((1, 3, 1, 2), 60_000.0, device=DEVICE, dtype=torch.float16)
    one = torch.ones(1, 1, device=DEVICE)
    rope_(qkv, one * 0.5, one * 0.5)
    assert qkv[0, 0, 0].tolist() == [0.0, 60_000.0]
    qkv = torch.tensor([2048.0, 2048.0], device=DEVICE, dtype=torch.float16).expand(1, 3, 1, 2).clone()
    rope_(qkv, one * 1.0001, one)  # 1.0001 is 1 in fp16
    assert qkv[0, 0, 0, 0].item() == pytest.approx(0.2048, rel=1e-3)


@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("D", [6, 64])
def test_the_inverse_undoes_it(D, positions):
    qkv = projection(9, 3, D)
    kept, (cos, sin) = qkv.clone(), tables(20, D)
    position_ids = None if positions is None else places(9, 20, positions)
    rope_(qkv, cos, sin, position_ids)
    assert (qkv - kept).abs().max() > 0.1
    truth = exact(qkv, *((t if positions is None else t[position_ids.long()])[:9] for t in (cos, -sin)))
    rope_(qkv, cos, sin, position_ids, inverse=True)
    assert (qkv - truth).abs().max() <= 1e-6
    assert (qkv - kept).abs().max() <= 2e-6
    assert same_bits(qkv[:, 2], kept[:, 2])


@pytest.mark.parametrize("position", [0, 1, 8191])
def test_every_token_takes_the_row_of_its_position(position):
    cos, sin = tables(8192, 32)
    qkv = projection(9, 1, 32)
    expected = rope_(qkv.clone(), cos[position].repeat(9, 1), sin[position].repeat(9, 1))
    got = rope_(qkv.clone(), cos, sin, torch.full((9,), position, device=DEVICE))
    assert same_bits(got, expected)


def test_packed_sequences_equal_one_by_one():
    """Bitwise, with the positions of a packed batch."""
    seqlens = [5, 0, 1, 13, 8]
    batch = ml.pack([[100] * n for n in seqlens], DEVICE)
    qkv, (cos, sin) = projection(27, 3, 32), tables(16, 32)
    alone = [rope_(part, cos, sin) for part in qkv.clone().split(seqlens)]
    assert same_bits(rope_(qkv, cos, sin, batch.position_ids), torch.cat(alone))


def test_permuting_tokens_permutes_the_output():
    qkv, (cos, sin), position_ids = projection(19, 3, 32), tables(40, 32), places(19, 40)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = rope_(qkv[order], cos, sin, position_ids[order])
    assert same_bits(got, rope_(qkv, cos, sin, position_ids)[order])


def test_a_nan_stays_in_its_pair():
    """So it stays in its token and head too."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    qkv[4, 1, 2, 1] = torch.nan
    rope_(qkv, cos, sin)
    assert qkv.isnan().nonzero().tolist() == [[4, 1, 2, 1], [4, 1, 2, 4]]


def test_v_is_left_as_it_is():
    """Bitwise, whatever lies there."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    qkv[:, 2] = torch.tensor([torch.nan, -torch.inf, -0.0, 1e-45, 3e38, 1.0], device=DEVICE)
    v = qkv[:, 2].clone()
    rope_(qkv, cos, sin)
    assert same_bits(qkv[:, 2], v)
    assert qkv[:, :2].isfinite().all()


@pytest.mark.parametrize("D", [6, 64])
@pytest.mark.parametrize(
    "layout",
    [
        "rows in the middle",
        "rows wider than the projection",
        "every second row",
        "gaps between heads",
        "wide heads",
        "heads first",
    ],
)
def test_views_of_a_wider_buffer(layout, D):
    """The same bits as for a contiguous projection, and the buffer around the view keeps its own."""
    T, H = 9, 5
    buffer, view = inside_a_buffer(layout, T, H, D)
    qkv, (cos, sin), position_ids = projection(T, H, D), tables(20, D), places(T, 20)
    view.copy_(qkv)
    poison = buffer.clone()
    rotated = rope_(qkv, cos, sin, position_ids)
    rope_(view, cos, sin, position_ids)
    assert same_bits(view.contiguous(), rotated)
    kept = buffer.clone()
    kept_view = torch.as_strided(kept, view.shape, view.stride(), view.storage_offset())
    kept_view.copy_(torch.as_strided(poison, view.shape, view.stride(), view.storage_offset()))
    assert same_bits(kept, poison)


def test_nothing_is_read_beside_the_tables():
    """The tables lie between rows of NaN: positions beyond them take their first or last row."""
    P, D = 6, 10
    cos, sin = tables(P, D)
    around = torch.full((2, 64, D // 2), torch.nan, device=DEVICE)
    around[0, 20 : 20 + P], around[1, 20 : 20 + P] = cos, sin
    inside = around[:, 20 : 20 + P]
    position_ids = torch.tensor([0, 5, -1, 6, -20, 43, 2**31 - 1, -(2**31), 3, 1_000_000, 2], device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        qkv = projection(11, 3, D)
        nearest = position_ids.clamp(0, P - 1)
        expected = rope_(qkv.clone(), cos[nearest], sin[nearest])
        assert same_bits(rope_(qkv, inside[0], inside[1], position_ids.to(dtype)), expected)
    qkv = projection(P, 3, D)
    assert same_bits(rope_(qkv.clone(), inside[0], inside[1]), rope_(qkv, cos, sin))


def test_positions_beyond_32_bits_take_the_first_or_last_row():
    cos, sin = tables(6, 4)
    position_ids = torch.tensor([2**31, 2**32, 2**32 + 3, 2**63 - 1, -(2**31) - 1, -(2**32), -(2**63)], device=DEVICE)
    qkv, nearest = projection(7, 1, 4), position_ids.clamp(0, 5)
    expected = rope_(qkv.clone(), cos[nearest], sin[nearest])
    assert same_bits(rope_(qkv, cos, sin, position_ids), expected)


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
def test_nothing_that_is_only_read_is_written(positions):
    cos, sin, position_ids = *tables(20, 32), places(9, 20, positions)
    kept = cos.clone(), sin.clone(), position_ids.clone()
    rope_(projection(9, 3, 32), cos, sin, position_ids)
    assert same_bits(cos, kept[0])
    assert same_bits(sin, kept[1])
    assert torch.equal(position_ids, kept[2])


def test_a_second_call_gives_the_same_bits():
    qkv, (cos, sin) = projection(65, 3, 32), tables(65, 32)
    assert same_bits(rope_(qkv.clone(), cos, sin), rope_(qkv, cos, sin))


@pytest.mark.parametrize(("T", "H"), [(0, 3), (4, 0)])
def test_an_empty_projection(T, H):
    qkv = torch.zeros(T, 3, H, 8, device=DEVICE)
    for position_ids in (None, torch.zeros(T, dtype=torch.int32, device=DEVICE)):
        assert rope_(qkv, *tables(T, 8), position_ids).shape == (T, 3, H, 8)
