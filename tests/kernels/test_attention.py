"""The attention kernel against the torch reference: in Triton's interpreter anywhere, compiled where there is a GPU."""

import itertools

import pytest
import torch
from kernel_attention_cases import (  # noqa: F401
    DEVICE,
    FULL,
    HALF,
    INTERPRETED,
    LENGTHS,
    LOCAL,
    SINGLE,
    assert_within_twice,
    ends,
    poisoned,
    randn,
    reference,
    reference_is_torch,
    same,
    spans,
)

from modernbert_lite.kernels import attention as kernel

triton = pytest.importorskip("triton")

# Numpy, on which the interpreter runs, warns of what becomes of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")


def assert_as_good_as_torch(got: torch.Tensor, qkv: torch.Tensor, lengths: list[int], window=FULL) -> None:
    assert_within_twice(got, reference(qkv, lengths, window), reference(qkv.double(), lengths, window))


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


@pytest.mark.skipif(not INTERPRETED, reason="which form is compiled is the card's")
@pytest.mark.parametrize("window", [FULL, LOCAL, (0, 0), (70, 5), (-1, 0), (130, -1), (200, 200)])
def test_a_mask_on_every_block_is_the_same_as_on_those_that_need_one(monkeypatch, window):
    """Hopper's loop branches around the mask, other cards' doesn't."""
    lengths = [1, 64, 65, 128, 200, 257]
    qkv = randn(sum(lengths), 3, 1, 32, dtype=HALF)
    with_branch = kernel.attention(qkv, ends(lengths), window)
    assert_as_good_as_torch(with_branch, qkv, lengths, window)
    monkeypatch.setattr(kernel, "_is_hopper", lambda device: False)
    assert same(with_branch, kernel.attention(qkv, ends(lengths), window))


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
def test_permuting_sequences_permutes_the_outputs(window, dtype):
    lengths = [65, 0, 129, 2, 64, 33]
    texts = [randn(n, 3, 1, 32, dtype=dtype, seed=i) for i, n in enumerate(lengths)]
    first = kernel.attention(torch.cat(texts), ends(lengths), window).split(lengths)
    for order in ([5, 4, 3, 2, 1, 0], [3, 0, 1, 4, 2, 5]):
        cut = [lengths[i] for i in order]
        got = kernel.attention(torch.cat([texts[i] for i in order]), ends(cut), window).split(cut)
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
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize("T", [1, 63, 130])
def test_nothing_is_read_beside_qkv(T, window, dtype):
    """qkv lies between rows and columns of NaN."""
    wide = torch.full((T + 160, 5, 3, 32), torch.nan, dtype=dtype, device=DEVICE)
    wide[80 : T + 80, 1:4, 1:2] = randn(T, 3, 1, 32, dtype=dtype)
    qkv = wide[80 : T + 80, 1:4, 1:2]
    assert kernel.attention(qkv, ends([T]), window).isfinite().all()


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
