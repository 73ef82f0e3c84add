"""The attention kernel against the torch reference: in Triton's interpreter anywhere, compiled where there is a GPU."""

import inspect
import itertools
import os
import random
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import modernbert_lite as ml
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.rope import Rope, rope_table

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from modernbert_lite.kernels import attention as kernel  # noqa: E402
from modernbert_lite.kernels import rope  # noqa: E402

# Numpy, on which the interpreter runs, warns of what becomes of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)

LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 130, 191, 192, 193, 257]  # around the edges of one, two, three blocks
FULL = (-1, -1)
LOCAL = (64, 64)
HALF, SINGLE = torch.float16, torch.float32


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@pytest.fixture(autouse=True)
def reference_is_torch(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def randn(*shape: int, dtype: torch.dtype = SINGLE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def spans(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(ends(lengths).tolist())]


def reference(qkv: torch.Tensor, lengths: list[int], window: tuple[int, int] = FULL) -> torch.Tensor:
    return ops.attention(qkv.flatten(1, 2), qkv.shape[2], ml.pack([[0] * n for n in lengths]), window)


def assert_within_twice(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == truth.shape
    assert got.dtype == plain.dtype
    if got.numel():
        error = (got.double() - truth).abs().max()
        assert error <= 2 * (plain.double() - truth).abs().max() + 1e-6


def assert_as_good_as_torch(got: torch.Tensor, qkv: torch.Tensor, lengths: list[int], window=FULL) -> None:
    assert_within_twice(got, reference(qkv, lengths, window), reference(qkv.double(), lengths, window))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


# ---- against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "D", "window"),
    [
        *((HALF, D, window) for D in (32, 64, 128) for window in (FULL, LOCAL)),
        (HALF, 64, (63, 63)),
        (HALF, 32, (65, 65)),
        (HALF, 32, (1000, 1000)),
        (SINGLE, 64, FULL),
        (SINGLE, 32, LOCAL),
        (SINGLE, 128, (63, 63)),
        (SINGLE, 64, (65, 65)),
    ],
)
def test_attention_equals_the_reference(D, window, dtype):
    qkv = randn(sum(LENGTHS), 3, 1, D, dtype=dtype)
    assert_as_good_as_torch(kernel.attention(qkv, ends(LENGTHS), window), qkv, LENGTHS, window)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("D", "window"),
    [(64, (0, 0)), (32, (3, 0)), (64, (0, 5)), (32, (-1, 4)), (128, (4, -1)), (64, (500, 500)), (32, (129, 0))],
)
def test_windows_of_other_distances(D, window, dtype):
    lengths = [2, 63, 65, 130]
    qkv = randn(sum(lengths), 3, 1, D, dtype=dtype)
    assert_as_good_as_torch(kernel.attention(qkv, ends(lengths), window), qkv, lengths, window)


@pytest.mark.parametrize("window", [FULL, (5, 9)])
@pytest.mark.parametrize(("H", "D", "dtype"), [(2, 64, HALF), (3, 32, SINGLE), (5, 128, HALF)])
def test_heads_are_not_mixed_up(H, D, window, dtype):
    lengths = [7, 70]
    qkv = randn(77, 3, H, D, dtype=dtype)
    got = kernel.attention(qkv, ends(lengths), window)
    assert_as_good_as_torch(got, qkv, lengths, window)
    for head in range(H):
        assert same(got[:, head], kernel.attention(qkv[:, :, head : head + 1], ends(lengths), window)[:, 0])


@pytest.mark.parametrize(("dtype", "window"), [(HALF, FULL), (SINGLE, LOCAL)])
@pytest.mark.parametrize("lengths", [[0, 5, 70], [5, 70, 0], [5, 0, 0, 70], [0, 0, 5, 0, 70, 0, 0]])
def test_empty_sequences_change_nothing(lengths, window, dtype):
    qkv = randn(75, 3, 1, 32, dtype=dtype)
    got = kernel.attention(qkv, ends(lengths), window)
    assert_as_good_as_torch(got, qkv, lengths, window)
    assert same(got, kernel.attention(qkv, ends([5, 70]), window))


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_a_batch_without_tokens(lengths):
    got = kernel.attention(randn(0, 3, 2, 64, dtype=HALF), ends(lengths), LOCAL)
    assert got.shape == (0, 2, 64)
    assert got.dtype == HALF


@pytest.mark.parametrize(
    ("dtype", "place", "window"),
    [(HALF, 0, FULL), (HALF, 9, FULL), (HALF, 4, FULL), (HALF, 4, LOCAL), (SINGLE, 4, LOCAL)],
)
def test_one_long_sequence_among_many_short_ones(place, window, dtype):
    lengths = [3, 1, 2, 5, 1, 1, 4, 2, 3]
    lengths.insert(place, 400)
    qkv = randn(sum(lengths), 3, 1, 64, dtype=dtype)
    assert_as_good_as_torch(kernel.attention(qkv, ends(lengths), window), qkv, lengths, window)


@pytest.mark.parametrize(("dtype", "window"), [(HALF, FULL), (HALF, LOCAL), (HALF, (3, 70)), (SINGLE, LOCAL)])
def test_every_block_gives_the_same(window, dtype):
    lengths = [1, 31, 33, 130]
    qkv = randn(sum(lengths), 3, 1, 64, dtype=dtype)
    results = [kernel.attention(qkv, ends(lengths), window, block=block) for block in (32, 64, 128)]
    for got in results:
        assert_as_good_as_torch(got, qkv, lengths, window)
    # Of one row's arithmetic only the order of the keys may differ.
    unit = torch.finfo(dtype).eps * results[0].abs().max().item()
    assert max((a.double() - b.double()).abs().max() for a, b in itertools.combinations(results, 2)) <= 4 * unit


@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize("keys", [16, 32, 128])
def test_other_configurations_give_the_same(keys, window):
    lengths = [1, 63, 130]
    qkv = randn(sum(lengths), 3, 1, 64, dtype=HALF)
    config = {"BLOCK_N": keys, "num_warps": 4, "num_stages": 2}
    assert_as_good_as_torch(kernel.attention(qkv, ends(lengths), window, config=config), qkv, lengths, window)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_any_negative_distance_is_unlimited(dtype):
    qkv = randn(80, 3, 1, 32, dtype=dtype)
    for given, meant in [((-5, -2), FULL), ((-7, 3), (-1, 3)), ((2, -9), (2, -1))]:
        assert same(kernel.attention(qkv, ends([80]), given), kernel.attention(qkv, ends([80]), meant))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("far", [2**31 - 100, 2**31 - 1, 2**31, 2**63 - 1])
def test_a_distance_near_the_end_of_the_integers_is_no_window(far, dtype):
    """Row + distance must not wrap around."""
    qkv = randn(71, 3, 1, 32, dtype=dtype)
    for window in [(far, far), (-1, far), (far, -1)]:
        assert_as_good_as_torch(kernel.attention(qkv, ends([70, 1]), window), qkv, [70, 1])


@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_attention_in_bfloat16(window):
    """To one unit in the last place of the largest: Triton's interpreter cuts bf16 off where a GPU rounds it."""
    lengths = [1, 65, 130]
    qkv = randn(sum(lengths), 3, 2, 64, dtype=torch.bfloat16)
    got, truth = kernel.attention(qkv, ends(lengths), window), reference(qkv.double(), lengths, window)
    assert got.dtype == torch.bfloat16
    assert (got.double() - truth).abs().max() <= 2**-7 * truth.abs().max()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, (2, 2)])
def test_the_default_tile_list_is_that_of_tiles(window, dtype):
    lengths = [5, 130, 64]
    qkv, cu_seqlens = randn(199, 3, 1, 32, dtype=dtype), ends(lengths)
    expected = kernel.attention(qkv, cu_seqlens, window)
    block = kernel.block_m(130, dtype, window != FULL)
    for table in (kernel.tiles(lengths, block), kernel.device_tiles(cu_seqlens, 199 // block + 3, block)):
        got = kernel.attention(qkv, cu_seqlens, window, tile_table=table.to(DEVICE), block=block)
        assert same(got, expected)


# ---- rotary embedding on load --------------------------------------------------------------------------------------


def rope_tables(rows: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_table(Rope(theta=160.0), D, torch.arange(rows, device=DEVICE))


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula in fp64; cos and sin are (T, D / 2)."""
    q, v = qkv[:, :2].double(), qkv[:, 2:].double()
    x1, x2 = q.chunk(2, -1)
    c, s = cos.double()[:, None, None], sin.double()[:, None, None]
    return torch.cat([torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1), v], 1)


def turned(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`ops.rope` of a copy's q and k."""
    copy = qkv.clone().flatten(1, 2)
    return ops.rope(copy, 2 * qkv.shape[2], (cos, sin, None)).unflatten(1, qkv.shape[1:3])


def assert_rope_is_right(got, qkv, lengths, window, cos, sin) -> None:
    places = torch.cat([torch.arange(n) for n in lengths]).clamp(max=len(cos) - 1).to(DEVICE)
    truth = reference(rotated(qkv, cos[places], sin[places]), lengths, window)
    plain = reference(turned(qkv, cos[places], sin[places]), lengths, window)
    assert_within_twice(got, plain, truth)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("D", "window"), [(32, FULL), (64, LOCAL), (128, (3, 0)), (128, FULL)])
def test_rope_on_load_equals_rope_before(window, D, dtype):
    lengths = [3, 0, 65, 1, 130]
    qkv, (cos, sin) = randn(sum(lengths), 3, 1, D, dtype=dtype), rope_tables(140, D)
    kept = qkv.clone()
    got = kernel.attention(qkv, ends(lengths), window, cos=cos, sin=sin)
    assert same(qkv, kept)
    assert_rope_is_right(got, qkv, lengths, window, cos, sin)
    assert (got - kernel.attention(qkv, ends(lengths), window)).abs().max() > 0.01  # it does turn


def test_what_is_turned_on_load_is_rounded_as_in_memory():
    """Sharp scores show it: without the rounding the results differ by more than 1e-2. In memory by the kernel, because
    a compiler that contracts other products than torch's rounds some numbers otherwise."""
    qkv, (cos, sin) = randn(130, 3, 1, 64), rope_tables(130, 64)
    qkv[:, :2] *= 7
    qkv = qkv.half()
    got = kernel.attention(qkv, ends([130]), cos=cos, sin=sin)
    before = kernel.attention(rope.rope_(qkv.clone(), cos, sin), ends([130]))
    assert (got.double() - before.double()).abs().max() <= 4e-3


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("rows", "window"), [(1, FULL), (10, (40, 40)), (64, FULL), (64, LOCAL)])
def test_places_beyond_the_tables_take_their_last_row(rows, window, dtype):
    """And nothing behind it: the tables lie in front of NaN."""
    lengths = [70, 2, 130]
    cos, sin = rope_tables(rows, 64)
    cos, sin = (torch.cat([x, torch.full((140, 32), torch.nan, device=DEVICE)])[:rows] for x in (cos, sin))
    qkv = randn(sum(lengths), 3, 1, 64, dtype=dtype)
    got = kernel.attention(qkv, ends(lengths), window, cos=cos, sin=sin)
    assert_rope_is_right(got, qkv, lengths, window, cos, sin)


@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_rope_in_bfloat16(window):
    """q and k are rounded once more than without RoPE; the interpreter cuts them off."""
    qkv, (cos, sin) = randn(131, 3, 1, 64, dtype=torch.bfloat16), rope_tables(130, 64)
    lengths = [1, 130]
    got = kernel.attention(qkv, ends(lengths), window, cos=cos, sin=sin)
    places = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    truth = reference(rotated(qkv, cos[places], sin[places]), lengths, window)
    assert got.dtype == torch.bfloat16
    assert (got.double() - truth).abs().max() <= 2 * 2**-7 * truth.abs().max()


def test_two_sequences_of_the_same_text_are_turned_alike():
    """Places count from each sequence's own start."""
    one, (cos, sin) = randn(70, 3, 1, 32, dtype=HALF), rope_tables(80, 32)
    got = kernel.attention(torch.cat([one[:5], one, one]), ends([5, 70, 70]), LOCAL, cos=cos, sin=sin)
    assert same(got[5:75], got[75:])


# ---- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "window"), [(HALF, FULL), (SINGLE, (3, 20))])
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: torch.stack([x, x + 1], 1)[:, 0], id="every-second-row"),
        pytest.param(lambda x: torch.cat([x + 1, x, x - 1], 2)[:, :, 2:4], id="some-of-the-heads"),
        pytest.param(lambda x: torch.cat([x + 1, x, x - 1], 1)[:, 3:6], id="some-of-the-projection"),
        pytest.param(lambda x: torch.cat([x[..., :1], x, x[..., :7]], 3)[..., 1:-7], id="odd-strides"),
        pytest.param(lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), id="tokens-inside-heads"),
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads-outside"),
        pytest.param(lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3), id="heads-outermost"),
    ],
)
def test_views_give_what_copies_give(view, window, dtype):
    lengths = [66, 1]
    qkv = randn(67, 3, 2, 32, dtype=dtype)
    seen = view(qkv)
    assert same(seen, qkv)
    assert seen.stride() != qkv.stride()
    assert same(kernel.attention(seen, ends(lengths), window), kernel.attention(qkv, ends(lengths), window))


def test_a_row_shared_by_all_tokens():
    """Stride 0: every value is the same, and so is every result."""
    qkv = randn(1, 3, 1, 32, dtype=HALF).expand(70, 3, 1, 32)
    assert (kernel.attention(qkv, ends([70]), LOCAL).double() - qkv[:, 2].double()).abs().max() <= 2e-3


# ---- sequences are apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize("rope", [False, True])
def test_permuting_sequences_permutes_the_outputs(rope, window, dtype):
    lengths = [65, 0, 129, 2, 64, 33]
    texts = [randn(n, 3, 1, 32, dtype=dtype, seed=i) for i, n in enumerate(lengths)]
    tables = dict(zip(("cos", "sin"), rope_tables(129, 32), strict=True)) if rope else {}
    first = kernel.attention(torch.cat(texts), ends(lengths), window, **tables).split(lengths)
    for order in ([5, 4, 3, 2, 1, 0], [3, 0, 1, 4, 2, 5]):
        cut = [lengths[i] for i in order]
        got = kernel.attention(torch.cat([texts[i] for i in order]), ends(cut), window, **tables).split(cut)
        assert all(same(part, first[i]) for part, i in zip(got, order, strict=True))


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(HALF, FULL), (HALF, LOCAL), (HALF, (-1, 70)), (HALF, (70, -1)), (SINGLE, FULL), (SINGLE, LOCAL)],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 6e4])
def test_a_neighbours_tokens_change_nothing(value, window, dtype):
    """Short of, at and beyond the edge of a block, on both sides of it."""
    lengths = [5, 63, 30, 65, 1]
    qkv = randn(sum(lengths), 3, 1, 32, dtype=dtype)
    expected = kernel.attention(qkv, ends(lengths), window)
    cut = spans(lengths)
    for changed in ([0, 2, 4], [1, 3]):
        other = qkv.clone()
        for i in changed:
            other[cut[i]] = value
        got = kernel.attention(other, ends(lengths), window)
        for i in set(range(5)) - set(changed):
            assert same(got[cut[i]], expected[cut[i]])


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_a_nan_stays_in_its_sequence_and_shows_there(window, dtype):
    lengths = [10, 40, 10]
    qkv = randn(60, 3, 1, 32, dtype=dtype)
    qkv[20, 1, 0, 3] = torch.nan  # a key of the second
    bad = kernel.attention(qkv, ends(lengths), window).isnan().flatten(1)
    assert bad[10:50].all()
    assert not bad[:10].any()
    assert not bad[50:].any()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize("T", [1, 63, 130])
def test_nothing_is_read_beside_qkv(T, window, rope, dtype):
    """qkv lies between rows and columns of NaN, the tables between rows of NaN."""
    wide = torch.full((T + 160, 5, 3, 32), torch.nan, dtype=dtype, device=DEVICE)
    wide[80 : T + 80, 1:4, 1:2] = randn(T, 3, 1, 32, dtype=dtype)
    tables = {}
    if rope:
        for name, table in zip(("cos", "sin"), rope_tables(T, 32), strict=True):
            tall = torch.full((T + 160, 16), torch.nan, device=DEVICE)
            tall[80 : T + 80] = table
            tables[name] = tall[80 : T + 80]
    qkv = wide[80 : T + 80, 1:4, 1:2]
    assert kernel.attention(qkv, ends([T]), window, **tables).isfinite().all()


def poisoned(monkeypatch, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, out): the kernel's next output lies in the middle of a buffer full of -12345."""
    size, margin = torch.Size(shape).numel(), 128 * 128
    buffer = torch.full((2 * margin + size,), -12345.0, dtype=dtype, device=DEVICE)
    out = buffer[margin : margin + size].view(shape)

    def inside(wanted, **_):
        assert tuple(wanted) == shape
        return out

    monkeypatch.setattr(kernel.torch, "empty", inside)
    return buffer, out


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize("lengths", [[1], [63], [65, 3], [0, 130, 0]])
def test_nothing_is_written_beside_the_output(monkeypatch, lengths, window, dtype):
    qkv = randn(sum(lengths), 3, 2, 32, dtype=dtype)
    kept = qkv.clone()
    cu_seqlens = ends(lengths)
    with monkeypatch.context() as patch:
        buffer, out = poisoned(patch, (len(qkv), 2, 32), dtype)
        before = buffer[0].clone()
        got = kernel.attention(qkv, cu_seqlens, window)
    assert got.data_ptr() == out.data_ptr()
    assert_as_good_as_torch(got, qkv, lengths, window)
    out.fill_(before)
    assert (buffer == before).all()
    assert same(qkv, kept)


# ---- the softmax ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_large_scores_do_not_overflow(window, dtype):
    """Scores near 1e5, of which exp is inf: each query sees one key, or few."""
    lengths = [1, 65, 130]
    qkv = randn(sum(lengths), 3, 1, 64)
    qkv[:, :2] *= 100
    qkv = qkv.to(dtype)
    got = kernel.attention(qkv, ends(lengths), window)
    assert got.isfinite().all()
    assert_as_good_as_torch(got, qkv, lengths, window)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("window", [FULL, (2, 70)])
def test_scores_that_rise_or_fall_along_the_keys(window, sign, dtype):
    """Each block brings a new maximum, or none does; all scores are far below 0, or far above."""
    T = 200
    qkv = randn(T, 3, 1, 32)
    qkv[:, 0], qkv[:, 1] = 40 * sign, torch.linspace(0.1, 40, T, device=DEVICE)[:, None, None]
    qkv = qkv.to(dtype)
    assert_as_good_as_torch(kernel.attention(qkv, ends([T]), window), qkv, [T], window)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("q", "k"), [(0.0, 1.0), (3.0, 3.0), (-50.0, 50.0)])
def test_equal_scores_give_the_mean(q, k, dtype):
    lengths = [1, 64, 131]
    qkv = randn(sum(lengths), 3, 1, 32, dtype=dtype)
    qkv[:, 0], qkv[:, 1] = q, k
    got = kernel.attention(qkv, ends(lengths))
    for cut in spans(lengths):
        error = (got[cut].double() - qkv[cut, 2].double().mean(0)).abs().max()
        assert error <= (1e-3 if dtype == HALF else 1e-6)


# ---- tiles ---------------------------------------------------------------------------------------------------------

BATCHES = [
    [1],
    [64],
    [65],
    [5, 130],
    [0, 5, 0, 0, 130, 0],
    [7, 7, 7, 7],
    [300, 1, 64, 64, 257, 63],
    LENGTHS,
    LENGTHS[::-1],
]


def test_the_example_of_tiles():
    table = kernel.tiles([5, 130], 64)
    assert table.dtype == torch.int32
    assert table.tolist() == [[5, 135, 5, 135], [69, 135, 5, 135], [133, 135, 5, 135], [0, 5, 0, 5]]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("lengths", BATCHES)
def test_tiles_cover_each_token_once(lengths, block):
    table = kernel.tiles(lengths, block)
    assert table.shape == (sum(-(-n // block) for n in lengths), 4)
    assert table.dtype == torch.int32
    assert table.device.type == "cpu"
    met = [0] * sum(lengths)
    sequences = {(cut.start, cut.stop) for cut in spans(lengths)}
    for first, last, start, end in table.tolist():
        assert (start, end) in sequences
        assert last == end
        assert start <= first < last
        assert (first - start) % block == 0
        for row in range(first, min(first + block, last)):
            met[row] += 1
    assert met == [1] * len(met)
    sizes = [end - start for _, _, start, end in table.tolist()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("lengths", [*BATCHES, [0], [0, 0, 0]])
def test_tiles_made_on_the_device_are_the_same(lengths, block):
    """Their number isn't known there: T // block + B is enough, and the rest is empty."""
    expected, cu_seqlens = kernel.tiles(lengths, block), ends(lengths)
    most = sum(lengths) // block + len(lengths)
    assert len(expected) <= most
    for count in (len(expected), most, most + 3):
        table = kernel.device_tiles(cu_seqlens, count, block)
        assert table.shape == (count, 4)
        assert table.dtype == torch.int32
        assert table.device == cu_seqlens.device
        assert table.is_contiguous()
        assert table[: len(expected)].tolist() == expected.tolist()
        assert table[len(expected) :].eq(0).all()


def test_tiles_of_random_batches():
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.choice((0, 1, rng.randrange(200))) for _ in range(rng.randrange(1, 9))]
        block = rng.choice((16, 32, 64, 128))
        count = sum(lengths) // block + len(lengths)
        table = kernel.tiles(lengths, block)
        assert len(table) <= count
        rows = [r for first, last, _, _ in table.tolist() for r in range(first, min(first + block, last))]
        assert sorted(rows) == list(range(sum(lengths)))
        padding = [[0, 0, 0, 0]] * (count - len(table))
        assert kernel.device_tiles(ends(lengths), count, block).tolist() == table.tolist() + padding


def test_a_batch_without_tokens_has_no_tiles():
    assert kernel.tiles([], 64).shape == kernel.tiles([0, 0], 64).shape == (0, 4)


def test_block_m_gives_blocks_that_the_kernel_takes():
    for S, dtype in itertools.product((1, 64, 65, 8192), (HALF, torch.bfloat16, SINGLE)):
        local, full = (kernel.block_m(S, dtype, is_local) for is_local in (True, False))
        assert {local, full} <= {16, 32, 64, 128, 256}
        assert local <= full  # a wide tile meets keys that most of its queries don't see


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", [FULL, (5, 5), (-1, 3)])
def test_a_tile_list_leads_nowhere_outside(monkeypatch, window, rope, dtype):
    """Rows of the list that are no tiles of this batch: what is beside qkv, the tables and the output stays out.

    What is beside them is so large that one value of it would show in every result.
    """
    T, low, high = 70, -(2**31), 2**31 - 1
    wide = torch.full((T + 400, 3, 1, 32), 1e4, dtype=dtype, device=DEVICE)
    wide[200 : T + 200] = randn(T, 3, 1, 32).clamp(-1, 1).to(dtype)
    tables = {}
    if rope:
        tall = torch.full((T + 400, 16), torch.nan, device=DEVICE)
        tall[200 : T + 200] = 0.5
        tables = {"cos": tall[200 : T + 200], "sin": tall[200 : T + 200]}
    table = [
        [60, 150, 0, 70],
        [-40, 20, -40, 20],
        [0, 70, 30, 170],
        [100, 170, 100, 170],
        [0, 70, 65, 70],  # queries in front of their sequence
        [0, 70, 200, 300],
        [0, 70, -100, -50],
        [0, high, 0, high],
        [low, high, low, high],
        [0, 70, high, low],
        [0, 70, high - 10, high],
        [high, low, 0, 70],
    ]
    tile_table = torch.tensor(table, dtype=torch.int32, device=DEVICE)
    qkv, cu_seqlens = wide[200 : T + 200], ends([T])
    with monkeypatch.context() as patch:
        buffer, out = poisoned(patch, (T, 1, 32), dtype)
        poison = buffer[0].item()
        for row in tile_table:  # alone: several of them write the same rows
            out.fill_(poison)
            kernel.attention(qkv, cu_seqlens, window, tile_table=row[None], block=64, **tables)
            assert ((out == poison) | (out.abs() <= 1.001)).all(), row.tolist()
    out.fill_(poison)
    assert (buffer == poison).all()


# ---- one query a sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("H", "D"), [(1, 64), (3, 32), (2, 128)])
def test_row_attention_is_the_first_row_of_attention(H, D, dtype):
    lengths = LENGTHS if H == 1 and dtype == HALF else [1, 65, 130]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    first = ends(lengths)[:-1].long()
    got = kernel.row_attention(qkv[first, 0], qkv[:, 1:], ends(lengths))
    truth, plain = (reference(x, lengths)[first] for x in (qkv.double(), qkv))
    assert_within_twice(got, plain, truth)
    full = kernel.attention(qkv, ends(lengths))[first]
    assert (got.double() - full.double()).abs().max() <= 4 * torch.finfo(dtype).eps * full.abs().max()


def test_row_attention_takes_any_query_and_any_strides():
    lengths = [3, 70, 1]
    q, kv = randn(3, 2, 32, dtype=HALF), randn(74, 2, 2, 32, dtype=HALF, seed=1)
    expected = kernel.row_attention(q, kv, ends(lengths))
    wide = torch.stack([q, q + 1, q - 1], 1)
    assert same(kernel.row_attention(wide[:, 0], kv, ends(lengths)), expected)
    inside = kv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert same(kernel.row_attention(q, inside, ends(lengths)), expected)
    k, v = kv.double().unbind(1)
    for i, cut in enumerate(spans(lengths)):
        weight = (torch.einsum("hd,shd->hs", q[i].double(), k[cut]) * 32**-0.5).softmax(-1)
        truth = torch.einsum("hs,shd->hd", weight, v[cut])
        assert (expected[i].double() - truth).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_row_attention_with_a_tail_of_empty_sequences(dtype):
    """As a graph of fixed size has it: cu_seqlens filled up with T."""
    lengths = [5, 65, 1]
    q, kv = randn(6, 1, 32, dtype=dtype), randn(71, 2, 1, 32, dtype=dtype, seed=1)
    got = kernel.row_attention(q, kv, ends([*lengths, 0, 0, 0]))
    assert same(got[:3], kernel.row_attention(q[:3], kv, ends(lengths)))
    assert (got[3:] == 0).all()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    "bad", [[60, 10], [0, 0], [-100, -50], [80, 200], [2**31 - 1, -(2**31)], [2**31 - 11, 100 - 2**31]]
)
def test_row_attention_without_keys_gives_zeros(bad, dtype):
    """Whatever cu_seqlens says. One row stands for all of kv (stride 0), so that a read would give its values."""
    kv = randn(1, 2, 1, 32, dtype=dtype).expand(70, 2, 1, 32)
    cu_seqlens = torch.tensor(bad, dtype=torch.int32, device=DEVICE)
    q = randn(1, 1, 32, dtype=dtype)
    assert kernel.row_attention(q, kv, cu_seqlens, check=False).eq(0).all()
    with pytest.raises(ValueError, match=r"cu_seqlens is .*it must start at 0, never decrease, end at T = 70"):
        kernel.row_attention(q, kv, cu_seqlens)


def test_row_attention_reads_no_keys_outside_kv():
    kv = torch.full((270, 2, 1, 32), torch.nan, dtype=HALF, device=DEVICE)
    kv[100:170] = randn(70, 2, 1, 32, dtype=HALF)
    q = randn(2, 1, 32, dtype=HALF)
    cu_seqlens = torch.tensor([-90, 30, 160], dtype=torch.int32, device=DEVICE)
    got = kernel.row_attention(q, kv[100:170], cu_seqlens, check=False)
    assert same(got, kernel.row_attention(q, kv[100:170], ends([30, 40])))


def test_row_attention_of_no_sequences():
    got = kernel.row_attention(randn(0, 2, 32, dtype=HALF), randn(0, 2, 2, 32, dtype=HALF), ends([]))
    assert got.shape == (0, 2, 32)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launch(monkeypatch):
    """What is refused is refused before the kernel could meet it."""
    stub = mock.MagicMock()
    stub.__getitem__.side_effect = AssertionError("the kernel was launched")
    monkeypatch.setattr(kernel, "_attention_kernel", stub)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (ints(1, 10), r"cu_seqlens is \[1, 10\].*must start at 0, never decrease, end at T = 10"),
        (ints(-1, 10), "cu_seqlens .* must start at 0"),
        (ints(0, 7, 5, 10), r"cu_seqlens is \[0, 7, 5, 10\].*never decrease"),
        (ints(0, 11, 10), "cu_seqlens .*never decrease"),
        (ints(0, 5, 9), "cu_seqlens .* end at T = 10"),
        (ints(0, 5, 11), "cu_seqlens .* end at T = 10"),
        (ints(0, 10, dtype=torch.int64), r"cu_seqlens is \(2,\) torch.int64; it must be \(B \+ 1,\) int32"),
        (ints(0, 10).float(), "cu_seqlens is .*float32; it must be"),
        (ints(0, 10)[None], r"cu_seqlens is \(1, 2\) torch.int32; it must be"),
        (ints(10)[0], r"cu_seqlens is \(\) torch.int32"),
        (ints(0), r"cu_seqlens is \(1,\) torch.int32; .* B at least 1"),
        (ints(), r"cu_seqlens is \(0,\) torch.int32"),
    ],
)
def test_bad_cu_seqlens_are_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        kernel.attention(randn(10, 3, 1, 32), cu_seqlens)
    with pytest.raises(ValueError, match=message):
        kernel.check_cu_seqlens(cu_seqlens, 10)


def test_good_cu_seqlens_are_brought_to_the_host():
    assert kernel.check_cu_seqlens(ints(0, 3, 3, 10), 10) == [0, 3, 3, 10]
    assert kernel.check_cu_seqlens(ints(0, 0), 0) == [0, 0]


def huge(*shape: int, stride: int) -> torch.Tensor:
    """`stride` elements from row to row, and no memory behind it."""
    strides = [stride, *torch.empty(shape[1:], device="meta").stride()]
    return torch.empty_strided(shape, strides, dtype=HALF, device="meta")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(10, 3, 32), r"qkv is \(10, 3, 32\); it must be \(T, 3, H, D\)"),
        (torch.zeros(2, 5, 3, 1, 32), r"qkv is .*must be \(T, 3, H, D\)"),
        (torch.zeros(10, 2, 1, 32), r"qkv is \(10, 2, 1, 32\); it must be \(T, 3, H, D\)"),
        (torch.zeros(10, 3, 1, 48), "qkv has head_dim 48; it must be one of 32, 64, 128"),
        (torch.zeros(10, 3, 1, 256), "qkv has head_dim 256"),
        (torch.zeros(10, 3, 1, 0), "qkv has head_dim 0"),
        (torch.zeros(10, 3, 1, 32).double(), "qkv has dtype torch.float64; it must be float16, bfloat16 or float32"),
        (torch.zeros(10, 3, 1, 32).int(), "qkv has dtype torch.int32"),
        (torch.zeros(10, 3, 1, 32).to(torch.complex64), "qkv has dtype torch.complex64"),
        (torch.zeros(10, 3, 1, 64)[..., ::2], "qkv must have a contiguous last dimension"),
        (torch.zeros(10, 3, 32, 2).transpose(2, 3), "qkv must have a contiguous last dimension"),
        (huge(10, 3, 1, 32, stride=2**31 // 10 + 1), r"qkv spans 10 rows of 214748365 elements, 2\^31 or more"),
        (huge(10, 3, 1, 32, stride=2**40), r"qkv spans 10 rows"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_bad_qkv_is_refused(qkv, message, listed):
    table = {"tile_table": torch.zeros(1, 4, dtype=torch.int32, device=DEVICE), "block": 64} if listed else {}
    with pytest.raises(ValueError, match=message):
        kernel.attention(there(qkv), ends([10]), **table)


@pytest.mark.usefixtures("no_launch")
def test_too_many_tokens_are_refused():
    T = 2**31 // 96 + 1
    table = torch.zeros(1, 4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"qkv spans .*2\^31 or more; split the batch"):
        kernel.attention(huge(T, 3, 1, 32, stride=96), ends([T]), tile_table=table, block=64)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(3, 3, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, 1, 4, dtype=torch.int32),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(3, 4),
        torch.zeros(4, 3, dtype=torch.int32).T,
        torch.zeros(3, 8, dtype=torch.int32)[:, :4],
    ],
)
def test_a_bad_tile_table_is_refused(table):
    with pytest.raises(ValueError, match=r"tile_table is .*; it must be what `tiles` gives"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), tile_table=there(table), block=32)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("block", [48, -1, -64, 1, 2**20])
def test_a_bad_block_is_refused(block, listed):
    table = {"tile_table": kernel.tiles([10], 64).to(DEVICE)} if listed else {}
    with pytest.raises(ValueError, match=f"block is {block}"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), block=block, **table)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        ((9, 16), None, "cos and sin must be given together"),
        (None, (9, 16), "cos and sin must be given together"),
        ((9, 32), (9, 32), r"cos is \(9, 32\) torch.float32; it must be \(P, 16\) float32, contiguous"),
        ((9, 16), (9, 32), r"sin is \(9, 32\)"),
        ((16,), (16,), r"cos is \(16,\)"),
        ((9, 1, 16), (9, 1, 16), r"cos is \(9, 1, 16\)"),
    ],
)
def test_tables_of_a_bad_shape_are_refused(cos, sin, message):
    cos, sin = (None if shape is None else torch.ones(shape, device=DEVICE) for shape in (cos, sin))
    with pytest.raises(ValueError, match=message):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), cos=cos, sin=sin)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("name", ["cos", "sin"])
def test_tables_of_a_bad_dtype_are_refused(name, dtype):
    tables = {"cos": torch.ones(9, 16, device=DEVICE), "sin": torch.ones(9, 16, device=DEVICE)}
    tables[name] = tables[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} is .*{dtype}; it must be"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), **tables)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", ["cos", "sin"])
def test_tables_that_are_not_contiguous_are_refused(name):
    tables = {"cos": torch.ones(9, 16, device=DEVICE), "sin": torch.ones(9, 16, device=DEVICE)}
    tables[name] = torch.ones(9, 32, device=DEVICE)[:, ::2]
    with pytest.raises(ValueError, match=f"{name} is .*contiguous"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), **tables)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("cos", "sin"), [(10, 5), (5, 10), (0, 0), (3, 0)])
def test_tables_without_rows_or_of_two_lengths_are_refused(cos, sin):
    """The kernel would read beside them."""
    cos, sin = torch.ones(cos, 16, device=DEVICE), torch.ones(sin, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"(cos|sin) is"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), cos=cos, sin=sin)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("q", "kv", "cu_seqlens", "message"),
    [
        (
            torch.zeros(2, 1, 32),
            torch.zeros(9, 3, 1, 32),
            ints(0, 4, 9),
            r"q is .*kv .*must be \(B, H, D\) and \(T, 2,",
        ),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 32), ints(0, 4, 9), r"kv \(9, 2, 32\)"),
        (torch.zeros(3, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(3, 1, 32\)"),
        (torch.zeros(2, 2, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(2, 2, 32\)"),
        (torch.zeros(2, 1, 64), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(2, 1, 64\)"),
        (torch.zeros(2, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(2, 32\)"),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9).long(), "cu_seqlens is torch.int64"),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9).float(), "cu_seqlens is torch.float32"),
        (torch.zeros(1, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 9, 0, 9).view(2, 2), "cu_seqlens"),
        (torch.zeros(1, 1, 32), torch.zeros(9, 2, 1, 32), ints(9)[0], "cu_seqlens"),
        (torch.zeros(2, 1, 32).half(), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), "q torch.float16, kv torch.float32"),
        (torch.zeros(2, 1, 32).long(), torch.zeros(9, 2, 1, 32).long(), ints(0, 4, 9), "dtype torch.int64"),
        (torch.zeros(2, 1, 32).double(), torch.zeros(9, 2, 1, 32).double(), ints(0, 4, 9), "dtype torch.float64"),
        (torch.zeros(2, 1, 48), torch.zeros(9, 2, 1, 48), ints(0, 4, 9), "head_dim 48"),
        (torch.zeros(2, 1, 64)[..., ::2], torch.zeros(9, 2, 1, 32), ints(0, 4, 9), "contiguous last dimension"),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 1, 64)[..., ::2], ints(0, 4, 9), "contiguous last dimension"),
        (torch.zeros(2, 1, 32).half(), huge(9, 2, 1, 32, stride=2**28), ints(0, 4, 9), r"2\^31 or more"),
    ],
)
def test_row_attention_refuses_what_it_can_not_do(q, kv, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        kernel.row_attention(there(q), there(kv), cu_seqlens)


# ---- operators -----------------------------------------------------------------------------------------------------


def op_inputs(lengths: list[int], window, dtype=SINGLE, H=1, D=32, seed=0):
    qkv, cu_seqlens = randn(sum(lengths), 3, H, D, dtype=dtype, seed=seed), ends(lengths)
    return qkv, cu_seqlens, kernel.tiles(lengths, 32).to(DEVICE), 32, *window


@pytest.mark.parametrize(("tracked", "window"), [(False, (3, 40)), (True, FULL)])
def test_attention_passes_opcheck(tracked, window):
    qkv, *rest = op_inputs([3, 0, 40], window)
    torch.library.opcheck(kernel.attention_op, (qkv.requires_grad_(tracked), *rest))


def test_attention_of_a_view_passes_opcheck():
    """The operator's result is contiguous, whatever qkv is."""
    qkv, *rest = op_inputs([3, 40], LOCAL, dtype=HALF, H=2)
    view = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert kernel.attention_op(view, *rest).is_contiguous()
    torch.library.opcheck(kernel.attention_op, (view.requires_grad_(), *rest))


def test_attention_backward_passes_opcheck():
    qkv, cu_seqlens, *_ = op_inputs([3, 0, 40], FULL, H=2)
    grad = randn(43, 2, 32, seed=1)
    view = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    for x in (qkv, view):
        torch.library.opcheck(kernel.attention_backward_op, (grad, x, cu_seqlens, 5, -1))


def test_row_attention_passes_opcheck():
    qkv, cu_seqlens, *_ = op_inputs([3, 1, 40], FULL, H=2)
    first = cu_seqlens[:-1].long()
    torch.library.opcheck(kernel.row_attention_op, (qkv[first, 0], qkv[:, 1:], cu_seqlens))
    assert same(
        kernel.row_attention_op(qkv[first, 0], qkv[:, 1:], cu_seqlens),
        kernel.row_attention(qkv[first, 0], qkv[:, 1:], cu_seqlens),
    )


def test_the_operators_have_names():
    for name in ("attention", "attention_backward", "row_attention"):
        assert getattr(torch.ops.modernbert_lite, name).default is not None


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("window", [FULL, LOCAL, (0, 0), (3, 0), (0, 5), (-1, 4), (4, -1), (-3, 7), (500, 500)])
def test_the_gradient_is_that_of_the_reference(window, dtype):
    """Against autograd in fp64; plain torch's own gradient in the same dtype sets the bound."""
    lengths = [1, 0, 65, 30]
    qkv, cu_seqlens, *rest = op_inputs(lengths, window, dtype=dtype, H=2)
    grad = randn(96, 2, 32, dtype=dtype, seed=1)

    def gradient(f, x):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(f(x), x, grad.to(x.dtype))[0]

    got = gradient(lambda x: kernel.attention_op(x, cu_seqlens, *rest), qkv)
    truth, plain = (gradient(lambda x: reference(x, lengths, window), x) for x in (qkv.double(), qkv))
    assert_within_twice(got, plain, truth)


def test_the_gradient_of_a_view():
    """Of a projection's output, as the model has it, with a gradient that isn't contiguous."""
    lengths = [5, 33]
    x, cu_seqlens = randn(38, 3 * 2 * 32), ends(lengths)
    table = kernel.tiles(lengths, 32).to(DEVICE)

    def gradient(f, x):
        x = x.detach().clone().requires_grad_()
        y = f(x.view(38, 2, 3, 32).transpose(1, 2))  # heads outside
        return torch.autograd.grad((y.transpose(0, 2) ** 2).sum(), x)[0]

    got = gradient(lambda q: kernel.attention_op(q, cu_seqlens, table, 32, 4, 4), x)
    truth, plain = (gradient(lambda q: reference(q, lengths, (4, 4)), y) for y in (x.double(), x))
    assert_within_twice(got, plain, truth)


def packed_attention(qkv: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """As a compiled model has it: the tile list is made on the device, of a size that T and B give."""
    table = kernel.device_tiles(cu_seqlens, qkv.shape[0] // 32 + cu_seqlens.shape[0] - 1, 32)
    return kernel.attention_op(qkv * 1.0, cu_seqlens, table, 32, 20, 20) + 1.0


DYNAMIC = [[5, 70, 33], [64, 2], [3, 3, 3, 3, 3], [1, 0, 100, 31], [7, 40]]


def test_a_compiled_graph_serves_every_batch():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(DYNAMIC):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(compiled(qkv, cu_seqlens), packed_attention(qkv, cu_seqlens))
    assert counter.frame_count == 1


def test_a_compiled_graph_gives_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, lengths in enumerate(DYNAMIC[:3]):
        results = []
        for f in (compiled, packed_attention):
            qkv = randn(sum(lengths), 3, 1, 32, seed=i).requires_grad_()
            (f(qkv, ends(lengths)) ** 2).sum().backward()
            results.append(qkv.grad)
        assert torch.equal(*results)


def test_row_attention_compiles():
    def first_rows(qkv, cu_seqlens):
        return kernel.row_attention_op(qkv[cu_seqlens[:-1].long(), 0], qkv[:, 1:], cu_seqlens) + 1.0

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(first_rows, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(([5, 70, 33], [64, 2], [3] * 5)):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(compiled(qkv, cu_seqlens), first_rows(qkv, cu_seqlens))
    assert counter.frame_count == 1


class Attend(torch.nn.Module):
    def forward(self, qkv, cu_seqlens):
        return packed_attention(qkv, cu_seqlens)


def test_an_exported_program_serves_every_batch():
    T, ends_dim = torch.export.Dim("T", min=2), torch.export.Dim("ends", min=3)
    example = (randn(50, 3, 1, 32), ends([10, 33, 7]))
    shapes = {"qkv": {0: T}, "cu_seqlens": {0: ends_dim}}
    program = torch.export.export(Attend(), example, dynamic_shapes=shapes)
    assert any("modernbert_lite.attention" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for i, lengths in enumerate(DYNAMIC):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(module(qkv, cu_seqlens), packed_attention(qkv, cu_seqlens))


# ---- on a GPU ------------------------------------------------------------------------------------------------------

SHAPES = [(12, 64), (16, 64), (8, 32), (8, 128)]  # ModernBERT base and large, small models, wide heads
MIXES = {
    "mix": [1, 2000, 64, 0, 513, 65, 128, 3, 1024, 129, 31, 700, 1],
    "8192": [8192],
    "32x512": [512] * 32,
}


def card_has(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability() >= (8, 0)


def math_reference(qkv: torch.Tensor, lengths: list[int], window: tuple[int, int]) -> torch.Tensor:
    """In fp32 without a fused kernel, four heads at a time: the scores of 8192 tokens are 1 GB then."""
    with sdpa_kernel(SDPBackend.MATH):
        parts = [reference(part.float(), lengths, window) for part in qkv.split(4, 2)]
    return torch.cat(parts, 1).double()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_attention_at_real_shapes(H, D, window, mix, dtype):
    if not card_has(dtype):
        pytest.skip("this card has no bf16")
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    got = kernel.attention(qkv, ends(lengths), window)
    assert_within_twice(got, reference(qkv, lengths, window), math_reference(qkv, lengths, window))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_attention_is_as_good_as_torchs_varlen(H, D, window, mix, dtype):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's varlen_attn has no window")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("varlen_attn needs sm_80")
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    cu_seqlens, longest = ends(lengths), max(lengths)
    got = kernel.attention(qkv, cu_seqlens, window)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    plain = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
    assert_within_twice(got, plain, math_reference(qkv, lengths, window))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_rope_on_load_at_real_shapes(H, D, window, dtype):
    if not card_has(dtype):
        pytest.skip("this card has no bf16")
    lengths = MIXES["mix"]
    qkv, (cos, sin) = randn(sum(lengths), 3, H, D, dtype=dtype), rope_tables(2000, D)
    got = kernel.attention(qkv, ends(lengths), window, cos=cos, sin=sin)
    places = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    plain = reference(turned(qkv, cos[places], sin[places]), lengths, window)
    truth = math_reference(rotated(qkv, cos[places], sin[places]), lengths, window)
    assert_within_twice(got, plain, truth)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_row_attention_at_real_shapes(H, D, mix, dtype):
    if not card_has(dtype):
        pytest.skip("this card has no bf16")
    lengths = [n for n in MIXES[mix] if n]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    first = ends(lengths)[:-1].long()
    got = kernel.row_attention(qkv[first, 0], qkv[:, 1:], ends(lengths))
    plain, truth = reference(qkv, lengths)[first], math_reference(qkv, lengths, FULL)[first]
    assert_within_twice(got, plain, truth)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_results_repeat_to_the_bit(window):
    lengths = MIXES["mix"]
    qkv = randn(sum(lengths), 3, 12, 64, dtype=HALF)
    first = kernel.attention(qkv, ends(lengths), window)
    assert all(same(kernel.attention(qkv, ends(lengths), window), first) for _ in range(20))


@pytest.mark.gpu
@needs_gpu
def test_addresses_near_two_to_the_31():
    """The last rows of the largest batch that is taken give what they give alone."""
    H, D = 12, 64
    T = (2**31 - 1) // (3 * H * D)
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    lengths = [512] * (T // 512) + [T % 512]
    qkv = torch.empty(T, 3, H, D, dtype=HALF, device=DEVICE).normal_()
    got = kernel.attention(qkv, ends(lengths), LOCAL)
    for cut in (spans(lengths)[i] for i in (0, len(lengths) // 2, -2, -1)):
        assert same(got[cut], kernel.attention(qkv[cut], ends([cut.stop - cut.start]), LOCAL))


@pytest.mark.gpu
@needs_gpu
def test_ten_thousand_random_batches_are_finite(monkeypatch):
    """Every element is written, and none is NaN. The GPU is waited for once in a hundred batches."""
    rng = random.Random(0)
    dtypes = [dtype for dtype in (torch.bfloat16, HALF) if card_has(dtype)]
    pools = [randn(2400, 3, 2, D, dtype=dtype) * 3 for D in (64, 128, 32) for dtype in dtypes]
    tables = {D: rope_tables(300, D) for D in (32, 64, 128)}

    def full_of_nan(shape, *, dtype, device):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(kernel.torch, "empty", full_of_nan)
    bad = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for number in range(10_000):
        lengths = [
            rng.choice((0, 1, 64, rng.randrange(1, 20), rng.randrange(1, 300))) for _ in range(rng.randrange(1, 9))
        ]
        pool = rng.choice(pools)
        start, D = rng.randrange(2400 - sum(lengths) + 1), pool.shape[-1]
        cos, sin = tables[D] if rng.random() < 0.25 else (None, None)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)  # on the host: no wait for it
        qkv = pool[start : start + sum(lengths)]
        out = kernel.attention(qkv, cu_seqlens, rng.choice((FULL, LOCAL)), cos=cos, sin=sin)
        bad += out.isfinite().logical_not().sum()
        if number % 100 == 99:
            assert bad.item() == 0, f"batches {number - 99} to {number}"
