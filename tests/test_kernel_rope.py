"""The RoPE kernel against the torch reference: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import os
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import modernbert_lite as ml
from modernbert_lite.ops import reference as ops

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)

from modernbert_lite.kernels import rope as kernel  # noqa: E402


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """`ops.rope` is the reference here, on a GPU too."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def projection(T: int, H: int, D: int, dtype: torch.dtype = torch.float32, *, parts: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + T + H + D)
    return torch.randn(T, parts, H, D, generator=generator).to(DEVICE, dtype)


def tables(P: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the first P positions, (P, D / 2) fp32."""
    angles = torch.arange(P)[:, None].double() * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def places(T: int, P: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """T positions below P, in no order, some of them twice."""
    return torch.randint(P, (T,), generator=torch.Generator().manual_seed(T), dtype=dtype).to(DEVICE)


def exact(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in fp64, out of place; cos and sin (T, D / 2). The last of several parts is v, and stays."""
    cos, sin = cos.double()[:, None, None], sin.double()[:, None, None]
    turned = max(1, qkv.shape[1] - 1)
    first, second = qkv[:, :turned].double().chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((rotated, qkv[:, turned:].double()), 1)


def assert_as_good_as_torch(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    if got.numel():
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


def turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` of a copy; the last of several parts is v, and stays."""
    _, parts, H, _ = qkv.shape
    return ops.rope(qkv.clone().flatten(1, 2), max(1, parts - 1) * H, (cos, sin, None)).unflatten(1, (parts, H))


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Also where both are NaN, and -0.0 is not 0.0."""
    as_integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.view(as_integers), y.view(as_integers))


def assert_rotates_as_the_reference(qkv: Tensor, positions: torch.dtype | None) -> None:
    T, parts, _, D = qkv.shape
    cos, sin = tables(T + 3, D)
    position_ids = None if positions is None else places(T, T + 3, positions)
    rows = torch.arange(T, device=DEVICE) if position_ids is None else position_ids.long()
    plain = turned(qkv, cos[rows], sin[rows])
    truth, kept = exact(qkv, cos[rows], sin[rows]), qkv.clone()
    assert kernel.rope_(qkv, cos, sin, position_ids) is qkv
    assert_as_good_as_torch(qkv, plain, truth)
    if parts > 1:
        assert same_bits(qkv[:, -1], kept[:, -1])


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
    kernel.rope_(qkv, cos, sin, position_ids)
    assert same_bits(kernel.rope_(q, cos, sin, position_ids), qkv[:, :1].contiguous())
    assert same_bits(kernel.rope_(kv, cos, sin, position_ids), qkv[:, 1:].contiguous())


def test_pieces_of_the_projection_in_place():
    """Views: q, then k and v; the rest keeps its bits."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    whole = kernel.rope_(qkv.clone(), cos, sin)
    kept = qkv.clone()
    kernel.rope_(qkv[:, :1], cos, sin)
    assert same_bits(qkv[:, 1:].contiguous(), kept[:, 1:].contiguous())
    kernel.rope_(qkv[:, 1:], cos, sin)
    assert same_bits(qkv, whole)


def test_rope_in_bfloat16():
    """To one unit in the last place: Triton's interpreter cuts bf16 off where a GPU rounds it (see the gpu test)."""
    qkv = projection(9, 3, 64, torch.bfloat16)
    (cos, sin), v = tables(9, 64), qkv[:, 2].clone()
    truth = exact(qkv, cos, sin)
    kernel.rope_(qkv, cos, sin)
    assert qkv.dtype == torch.bfloat16
    assert ((qkv.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()
    assert same_bits(qkv[:, 2], v)


def test_which_pairs_are_turned_and_which_way():
    """Split halves: column 0 pairs with 2, column 1 with 3; a quarter turn takes (1, 0) to (0, 1)."""
    qkv = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE).expand(1, 3, 1, 4).clone()
    quarter = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[1.0, 0.0]], device=DEVICE)
    kernel.rope_(qkv, *quarter)
    assert qkv[0, :, 0].tolist() == [[-3.0, 2.0, 1.0, 4.0], [-3.0, 2.0, 1.0, 4.0], [1.0, 2.0, 3.0, 4.0]]


def test_fp16_is_rotated_in_fp32():
    """The two products are 60,000 each: their sum overflows fp16, their difference is lost in it."""
    qkv = torch.full((1, 3, 1, 2), 60_000.0, device=DEVICE, dtype=torch.float16)
    one = torch.ones(1, 1, device=DEVICE)
    kernel.rope_(qkv, one * 0.5, one * 0.5)
    assert qkv[0, 0, 0].tolist() == [0.0, 60_000.0]
    qkv = torch.tensor([2048.0, 2048.0], device=DEVICE, dtype=torch.float16).expand(1, 3, 1, 2).clone()
    kernel.rope_(qkv, one * 1.0001, one)  # 1.0001 is 1 in fp16
    assert qkv[0, 0, 0, 0].item() == pytest.approx(0.2048, rel=1e-3)


@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("D", [6, 64])
def test_the_inverse_undoes_it(D, positions):
    qkv = projection(9, 3, D)
    kept, (cos, sin) = qkv.clone(), tables(20, D)
    position_ids = None if positions is None else places(9, 20, positions)
    kernel.rope_(qkv, cos, sin, position_ids)
    assert (qkv - kept).abs().max() > 0.1
    truth = exact(qkv, *((t if positions is None else t[position_ids.long()])[:9] for t in (cos, -sin)))
    assert kernel.rope_(qkv, cos, sin, position_ids, inverse=True) is qkv
    assert (qkv - truth).abs().max() <= 1e-6
    assert (qkv - kept).abs().max() <= 2e-6
    assert same_bits(qkv[:, 2], kept[:, 2])


@pytest.mark.parametrize("position", [0, 1, 8191])
def test_every_token_takes_the_row_of_its_position(position):
    cos, sin = tables(8192, 32)
    qkv = projection(9, 1, 32)
    expected = kernel.rope_(qkv.clone(), cos[position].repeat(9, 1), sin[position].repeat(9, 1))
    got = kernel.rope_(qkv.clone(), cos, sin, torch.full((9,), position, device=DEVICE))
    assert same_bits(got, expected)


def test_packed_sequences_equal_one_by_one():
    """Bitwise, with the positions of a packed batch."""
    seqlens = [5, 0, 1, 13, 8]
    batch = ml.pack([[100] * n for n in seqlens], DEVICE)
    qkv, (cos, sin) = projection(27, 3, 32), tables(16, 32)
    alone = [kernel.rope_(part, cos, sin) for part in qkv.clone().split(seqlens)]
    assert same_bits(kernel.rope_(qkv, cos, sin, batch.position_ids), torch.cat(alone))


def test_permuting_tokens_permutes_the_output():
    qkv, (cos, sin), position_ids = projection(19, 3, 32), tables(40, 32), places(19, 40)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = kernel.rope_(qkv[order], cos, sin, position_ids[order])
    assert same_bits(got, kernel.rope_(qkv, cos, sin, position_ids)[order])


def test_a_nan_stays_in_its_pair():
    """So it stays in its token and head too."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    qkv[4, 1, 2, 1] = torch.nan
    kernel.rope_(qkv, cos, sin)
    assert qkv.isnan().nonzero().tolist() == [[4, 1, 2, 1], [4, 1, 2, 4]]


def test_v_is_left_as_it_is():
    """Bitwise, whatever lies there."""
    qkv, (cos, sin) = projection(9, 3, 6), tables(9, 6)
    qkv[:, 2] = torch.tensor([torch.nan, -torch.inf, -0.0, 1e-45, 3e38, 1.0], device=DEVICE)
    v = qkv[:, 2].clone()
    kernel.rope_(qkv, cos, sin)
    assert same_bits(qkv[:, 2], v)
    assert qkv[:, :2].isfinite().all()


def inside_a_buffer(layout: str, T: int, H: int, D: int) -> tuple[Tensor, Tensor]:
    """A poisoned buffer, and a view (T, 3, H, D) of some of it."""
    shape = {
        "rows in the middle": (T + 12, 3, H, D),
        "rows wider than the projection": (T, 3 * H * D + 10),
        "every second row": (2 * T, 3, H, D),
        "gaps between q, k and v": (T, 6, H, D),
        "gaps between heads": (T, 3, 2 * H, D),
        "wide heads": (T, 3, H, D + 5),
        "q, k and v apart": (3, T + 2, H, D),
        "heads first": (H, 3, T + 2, D),
    }[layout]
    buffer = torch.full(shape, -12345.0, device=DEVICE)
    view = {
        "rows in the middle": lambda x: x[6:-6],
        "rows wider than the projection": lambda x: x[:, 5:-5].unflatten(1, (3, H, D)),
        "every second row": lambda x: x[1::2],
        "gaps between q, k and v": lambda x: x[:, ::2],
        "gaps between heads": lambda x: x[:, :, 1::2],
        "wide heads": lambda x: x[..., 3 : D + 3],
        "q, k and v apart": lambda x: x[:, 1:-1].transpose(0, 1),
        "heads first": lambda x: x[:, :, 1:-1].permute(2, 1, 0, 3),
    }[layout](buffer)
    assert view.shape == (T, 3, H, D)
    return buffer, view


@pytest.mark.parametrize("D", [6, 64])
@pytest.mark.parametrize(
    "layout",
    [
        "rows in the middle",
        "rows wider than the projection",
        "every second row",
        "gaps between q, k and v",
        "gaps between heads",
        "wide heads",
        "q, k and v apart",
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
    rotated = kernel.rope_(qkv, cos, sin, position_ids)
    assert kernel.rope_(view, cos, sin, position_ids) is view
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
        expected = kernel.rope_(qkv.clone(), cos[nearest], sin[nearest])
        assert same_bits(kernel.rope_(qkv, inside[0], inside[1], position_ids.to(dtype)), expected)
    qkv = projection(P, 3, D)
    assert same_bits(kernel.rope_(qkv.clone(), inside[0], inside[1]), kernel.rope_(qkv, cos, sin))


def test_positions_beyond_32_bits_take_the_first_or_last_row():
    cos, sin = tables(6, 4)
    position_ids = torch.tensor([2**31, 2**32, 2**32 + 3, 2**63 - 1, -(2**31) - 1, -(2**32), -(2**63)], device=DEVICE)
    qkv, nearest = projection(7, 1, 4), position_ids.clamp(0, 5)
    expected = kernel.rope_(qkv.clone(), cos[nearest], sin[nearest])
    assert same_bits(kernel.rope_(qkv, cos, sin, position_ids), expected)


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
def test_nothing_that_is_only_read_is_written(positions):
    cos, sin, position_ids = *tables(20, 32), places(9, 20, positions)
    kept = cos.clone(), sin.clone(), position_ids.clone()
    kernel.rope_(projection(9, 3, 32), cos, sin, position_ids)
    assert same_bits(cos, kept[0])
    assert same_bits(sin, kept[1])
    assert torch.equal(position_ids, kept[2])


def test_a_second_call_gives_the_same_bits():
    qkv, (cos, sin) = projection(65, 3, 32), tables(65, 32)
    assert same_bits(kernel.rope_(qkv.clone(), cos, sin), kernel.rope_(qkv, cos, sin))


@pytest.mark.parametrize(("T", "H"), [(0, 3), (4, 0)])
def test_an_empty_projection(T, H):
    qkv = torch.zeros(T, 3, H, 8, device=DEVICE)
    for position_ids in (None, torch.zeros(T, dtype=torch.int32, device=DEVICE)):
        assert kernel.rope_(qkv, *tables(T, 8), position_ids).shape == (T, 3, H, 8)


def of_shape(*shape: int, strides: tuple[int, ...] | None = None, dtype: type = np.float32) -> Tensor:
    """A tensor that lies about its memory, of which it has one element: only for what is refused before a launch."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    memory = np.zeros(1, dtype)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(memory, shape, [n * memory.itemsize for n in strides]))


QKV, TABLE = torch.zeros(5, 3, 2, 8), torch.ones(7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv is \(3, 2, 8\); it must be \(T, 3, H, D\)"),
        ({"qkv": QKV.flatten(1)}, r"qkv is \(5, 48\)"),
        ({"qkv": QKV[None]}, r"qkv is \(1, 5, 3, 2, 8\)"),
        ({"qkv": QKV[:, :0]}, r"qkv is \(5, 0, 2, 8\)"),
        ({"qkv": torch.zeros(5, 4, 2, 8)}, r"qkv is \(5, 4, 2, 8\)"),
        ({"qkv": QKV.double()}, "qkv has dtype torch.float64; it must be float16, bfloat16 or float32"),
        ({"qkv": QKV.int()}, "qkv has dtype torch.int32"),
        ({"qkv": QKV[..., :7]}, "qkv has head_dim 7; it must be even"),
        ({"qkv": QKV[..., :0]}, "qkv has head_dim 0"),
        ({"qkv": torch.zeros(5, 3, 2, 16)[..., ::2]}, "qkv must have a contiguous last dimension"),
        ({"qkv": torch.zeros(5, 3, 8, 2).transpose(2, 3)}, "qkv must have a contiguous last dimension"),
        ({"cos": torch.ones(7)}, r"cos is \(7,\).*it must be \(P, 4\) float32, contiguous"),
        ({"cos": torch.ones(7, 8)}, r"cos is \(7, 8\).*\(P, 4\)"),
        ({"cos": TABLE.half()}, "cos is .*torch.float16; .*float32"),
        ({"cos": TABLE.double()}, "cos is .*torch.float64; .*float32"),
        ({"cos": torch.ones(7, 8)[:, :4]}, "cos is .*contiguous"),
        ({"cos": torch.ones(1, 4).expand(7, 4)}, "cos is .*contiguous"),
        ({"sin": torch.ones(7, 1, 4)}, r"sin is \(7, 1, 4\).*it must be \(P, 4\) float32, contiguous"),
        ({"sin": torch.ones(7, 3)}, r"sin is \(7, 3\).*\(P, 4\)"),
        ({"sin": TABLE.bfloat16()}, "sin is .*torch.bfloat16; .*float32"),
        ({"sin": torch.ones(4, 7).T}, "sin is .*contiguous"),
        ({"sin": torch.ones(8, 4)}, "cos has 7 rows and sin 8"),
        ({"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, "cos has 4 rows and sin 4; T is 5"),
        (
            {"cos": torch.ones(0, 4), "sin": torch.ones(0, 4), "position_ids": torch.zeros(5, dtype=torch.int32)},
            "cos has 0 rows",
        ),
        (
            {"position_ids": torch.zeros(4, dtype=torch.int32)},
            r"position_ids is \(4,\) torch.int32; it must be \(5,\) int32 or int64, contiguous",
        ),
        ({"position_ids": torch.zeros(1, 5, dtype=torch.int32)}, r"position_ids is \(1, 5\)"),
        ({"position_ids": torch.zeros(5)}, r"position_ids is \(5,\) torch.float32; .*int32 or int64"),
        ({"position_ids": torch.zeros(5, dtype=torch.int16)}, r"position_ids is \(5,\) torch.int16"),
        ({"position_ids": torch.zeros(5, dtype=torch.bool)}, r"position_ids is \(5,\) torch.bool"),
        ({"position_ids": torch.zeros(10, dtype=torch.int32)[::2]}, "position_ids .*contiguous"),
        ({"position_ids": torch.zeros(1, dtype=torch.int64).expand(5)}, "position_ids .*contiguous"),
    ],
)
def test_rope_refuses_what_it_can_not_do(monkeypatch, arguments, message):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    given = {"qkv": QKV, "cos": TABLE, "sin": TABLE, "position_ids": None, **arguments}
    with pytest.raises(ValueError, match=message):
        kernel.rope_(**{name: x if x is None else there(x) for name, x in given.items()})
    assert not launch.mock_calls


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((932_068, 3, 12, 64), None),  # base's first length beyond
        ((2**20 + 1, 3, 1, 4), (2**11, 8, 4, 1)),
        ((2**10 + 1, 3, 2, 4), (2**21, 8, 4, 1)),
        # Rows are near to each other, the last head is not.
        ((3, 3, 3, 4), (4, 12, 2**30, 1)),
        ((2, 3, 1025, 4), (4, 8, 2**21, 1)),
        # q ends before 2^31 and k begins there, the last of its heads lies beyond.
        ((2**10, 3, 8, 64), (512, 2**31 - 64, 64, 1)),
    ],
)
def test_a_projection_that_spans_too_much_is_refused(monkeypatch, shape, strides):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    qkv = of_shape(*shape, strides=strides, dtype=np.float16)
    table = of_shape(shape[0], shape[3] // 2)
    with pytest.raises(ValueError, match=r"qkv .*2\^31"):
        kernel.rope_(qkv, table, table)
    assert not launch.mock_calls


def test_the_longest_projection_is_not_refused(monkeypatch):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    table = of_shape(932_067, 32)
    kernel.rope_(of_shape(932_067, 3, 12, 64, dtype=np.float16), table, table)
    assert launch.__getitem__.call_args.args == ((-(-932_067 // kernel.BLOCK_T) * -(-24 // kernel.BLOCK_H),),)


def test_tables_that_span_too_much_are_refused(monkeypatch):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    table = of_shape(2**29, 4)
    with pytest.raises(ValueError, match=r"cos .*2\^31"):
        kernel.rope_(torch.zeros(5, 3, 2, 8), table, table)
    assert not launch.mock_calls


# The operators


def gradient(of, qkv: Tensor, weight: Tensor) -> Tensor:
    """Of sum(weight * of(qkv)) for qkv."""
    leaf = qkv.clone().requires_grad_()
    (of(leaf) * weight).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("parts", "positions"), [(3, None), (3, torch.int32), (3, torch.int64), (2, torch.int32), (1, None)]
)
def test_the_gradient_equals_autograd_of_the_reference(parts, positions, inverse, dtype):
    T, H, D = 9, 3, 32
    qkv, weight, (cos, sin) = projection(T, H, D, dtype), projection(T, H, D, dtype, seed=1), tables(20, D)
    qkv, weight = qkv[:, :parts], weight[:, :parts]
    position_ids = None if positions is None else places(T, 20, positions)
    rows = torch.arange(T, device=DEVICE) if position_ids is None else position_ids.long()
    c, s = cos[rows], sin[rows] * (-1 if inverse else 1)
    kept = qkv.clone()
    out = kernel.rope_op(qkv, cos, sin, position_ids, inverse)
    assert torch.equal(qkv, kept)
    assert_as_good_as_torch(out, turned(qkv, c, s), exact(qkv, c, s))
    got = gradient(lambda x: kernel.rope_op(x, cos, sin, position_ids, inverse), qkv, weight)
    truth = gradient(lambda x: exact(x, c, s), qkv.double(), weight.double())
    assert_as_good_as_torch(got, gradient(lambda x: turned(x, c, s), qkv, weight), truth)
    if parts > 1:
        assert same_bits(got[:, -1], weight[:, -1])


def test_a_second_backward_gives_the_same_gradient():
    qkv, weight, (cos, sin) = projection(9, 3, 6).requires_grad_(), projection(9, 3, 6, seed=1), tables(20, 6)
    position_ids = places(9, 20)
    kept = weight.clone()
    out = kernel.rope_op(qkv, cos, sin, position_ids, False)
    (first,) = torch.autograd.grad(out, qkv, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out, qkv, weight)
    assert same_bits(first, second)
    assert same_bits(weight, kept)


def test_the_gradient_of_the_gradient():
    """A rotation is linear: the gradient of <gradient for weight, direction> for weight is the direction, rotated."""
    qkv, weight, direction = (projection(9, 3, 6, seed=i) for i in range(3))
    qkv.requires_grad_(), weight.requires_grad_()
    cos, sin = tables(9, 6)
    (first,) = torch.autograd.grad(
        kernel.rope_op(qkv, cos, sin, None, False), qkv, grad_outputs=weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first, weight, direction)
    assert same_bits(second, kernel.rope_op(direction, cos, sin, None, False))


def test_a_gradient_of_stride_0():
    """As sum() hands it back."""
    qkv, (cos, sin) = projection(9, 3, 6).requires_grad_(), tables(9, 6)
    kernel.rope_op(qkv, cos, sin, None, False).sum().backward()
    truth = exact(torch.ones_like(qkv), cos, -sin)
    assert (qkv.grad.double() - truth).abs().max() <= 1e-6


def test_the_tables_get_no_gradient():
    qkv, (cos, sin) = projection(9, 3, 6).requires_grad_(), tables(9, 6)
    kernel.rope_op(qkv, cos.requires_grad_(), sin, None, False).sum().backward()
    assert cos.grad is None


@pytest.mark.parametrize("layout", ["rows wider than the projection", "q, k and v apart", "wide heads"])
def test_the_operators_take_views(layout):
    buffer, view = inside_a_buffer(layout, 9, 3, 6)
    qkv, (cos, sin), position_ids = projection(9, 3, 6), tables(20, 6), places(9, 20)
    view.copy_(qkv)
    kept = buffer.clone()
    expected = kernel.rope_(qkv, cos, sin, position_ids)
    got = kernel.rope_op(view, cos, sin, position_ids, False)
    assert got.is_contiguous()
    assert same_bits(got, expected)
    assert same_bits(buffer, kept)


def operands(layout: str, positions: torch.dtype | None, dtype: torch.dtype = torch.float32) -> tuple:
    qkv = projection(9, 3, 6, dtype)
    if layout != "contiguous":
        view = inside_a_buffer(layout, 9, 3, 6)[1].to(dtype)
        qkv = view.copy_(qkv)
    return qkv, *tables(20, 6), None if positions is None else places(9, 20, positions)


@pytest.mark.parametrize("layout", ["contiguous", "rows wider than the projection", "wide heads"])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
def test_opcheck(positions, layout):
    qkv, *rest = operands(layout, positions)
    for inverse in (False, True):
        opcheck(kernel.rope_op, (qkv, *rest, inverse))
        opcheck(kernel.rope_op, (qkv.detach().requires_grad_(), *rest, inverse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_in_half_precision(dtype):
    qkv, *rest = operands("contiguous", torch.int32, dtype)
    opcheck(kernel.rope_op, (qkv, *rest, False))


def test_opcheck_of_no_tokens():
    qkv, (cos, sin) = projection(0, 3, 6), tables(4, 6)
    opcheck(kernel.rope_op, (qkv.requires_grad_(), cos, sin, None, False))


@pytest.fixture
def compiled():
    """Compiles a function once, for any number of tokens: the second call is with another one and must not compile."""

    def run(f, calls):
        torch.compiler.reset()
        fast = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
        for i, arguments in enumerate(calls):
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                yield fast(*arguments), f(*arguments)

    yield run
    torch.compiler.reset()


@pytest.mark.parametrize("positions", [None, torch.int32])
def test_compiled_out_of_place_with_its_gradient(compiled, positions):
    cos, sin = tables(40, 6)

    def f(qkv, position_ids, inverse):
        return kernel.rope_op(qkv * 2, cos, sin, position_ids, inverse).square()

    for inverse in (False, True):
        calls = [
            (projection(T, 3, 6).requires_grad_(), None if positions is None else places(T, 40, positions), inverse)
            for T in (9, 17, 3)
        ]
        for (qkv, *_), (got, expected) in zip(calls, compiled(f, calls), strict=True):
            assert same_bits(got, expected)
            weight = torch.randn_like(got)
            (got_grad,) = torch.autograd.grad(got, qkv, weight)
            (expected_grad,) = torch.autograd.grad(expected, qkv, weight)
            assert same_bits(got_grad, expected_grad)


def test_exported():
    class Rotate(torch.nn.Module):
        def forward(self, qkv, cos, sin, position_ids):
            return kernel.rope_op(qkv, cos, sin, position_ids, False), kernel.rope_op(qkv, cos, sin, position_ids, True)

    T = torch.export.Dim("T", min=2, max=4096)
    (cos, sin), example = tables(40, 6), (projection(9, 3, 6), places(9, 40))
    exported = torch.export.export(
        Rotate(), (example[0], cos, sin, example[1]), dynamic_shapes=({0: T}, None, None, {0: T})
    )
    for T in (9, 17):
        arguments = projection(T, 3, 6), cos, sin, places(T, 40)
        for got, expected in zip(exported.module()(*arguments), Rotate()(*arguments), strict=True):
            assert same_bits(got, expected)


# Real shapes, on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("T", "H", "D"),
    [
        (16_384, 12, 64),
        (16_384, 16, 64),
        (4_097, 12, 64),
        (1, 12, 64),
        (8_191, 8, 128),
        (8_193, 12, 32),
        (1_001, 3, 80),
    ],
)
def test_rope_at_real_shapes(T, H, D, positions, dtype):
    """ModernBERT base (12 heads of 64) and large (16) at the default budget of tokens, and odd ones."""
    assert_rotates_as_the_reference(projection(T, H, D, dtype), positions)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H", [12, 16])
def test_the_gradient_at_real_shapes(H, dtype):
    T, D = 16_384, 64
    qkv, weight, (cos, sin) = projection(T, H, D, dtype), projection(T, H, D, dtype, seed=1), tables(8192, D)
    position_ids = places(T, 8192)
    c, s = cos[position_ids.long()], sin[position_ids.long()]
    got = gradient(lambda x: kernel.rope_op(x, cos, sin, position_ids, False), qkv, weight)
    truth = gradient(lambda x: exact(x, c, s), qkv.double(), weight.double())
    assert_as_good_as_torch(got, gradient(lambda x: turned(x, c, s), qkv, weight), truth)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_inverse_and_the_order_of_tokens_at_real_shapes(dtype):
    T, H, D = 16_384, 12, 64
    qkv, (cos, sin), position_ids = projection(T, H, D, dtype), tables(8192, D), places(T, 8192)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    c, s = cos[position_ids.long()], sin[position_ids.long()]
    permuted = kernel.rope_(qkv[order], cos, sin, position_ids[order])
    kernel.rope_(qkv, cos, sin, position_ids)
    assert same_bits(permuted, qkv[order])
    plain, truth = turned(qkv, c, -s), exact(qkv, c, -s)
    assert_as_good_as_torch(kernel.rope_(qkv, cos, sin, position_ids, inverse=True), plain, truth)


@pytest.mark.gpu
@needs_gpu
def test_the_longest_projection():
    """One row below 2^31 elements, 4.3 GB: the addresses of its last rows don't wrap around."""
    T, H, D = 932_067, 12, 64
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    qkv = torch.zeros(T, 3, H, D, device=DEVICE, dtype=torch.float16)
    (cos, sin), position_ids = tables(8192, D), places(T, 8192)
    ends = torch.cat((torch.arange(9), torch.arange(T // 2, T // 2 + 9), torch.arange(T - 9, T))).to(DEVICE)
    part = projection(len(ends), H, D, torch.float16)
    qkv[ends] = part
    kernel.rope_(qkv, cos, sin, position_ids)
    assert same_bits(qkv[ends], kernel.rope_(part, cos, sin, position_ids[ends]))
    qkv[ends] = 0
    assert not qkv.any()


@pytest.mark.gpu
@needs_gpu
def test_any_number_of_tokens_shares_one_compilation():
    """T and the tables' length are arguments that the kernel is not specialised for."""
    cos, sin = tables(300, 64)
    for T in (1, 2, 15, 16, 33, 160, 257):
        qkv = projection(T, 12, 64, torch.float16)
        kernel.rope_(qkv, cos[:T].contiguous(), sin[:T].contiguous())
        if T == 2:
            compiled = [len(caches[0]) for caches in kernel._rope_kernel.device_caches.values()]
    assert [len(caches[0]) for caches in kernel._rope_kernel.device_caches.values()] == compiled
