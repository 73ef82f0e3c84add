"""The lists of tiles that attention's kernel works through, and its form of one query a sequence."""

import itertools
import random

import pytest
import torch
from kernel_attention_cases import (  # noqa: F401
    DEVICE,
    FULL,
    HALF,
    LENGTHS,
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
@pytest.mark.parametrize("window", [FULL, (5, 5), (-1, 3)])
def test_a_tile_list_leads_nowhere_outside(monkeypatch, window, dtype):
    """Rows of the list that are no tiles of this batch: what is beside qkv and the output stays out.

    What is beside them is so large that one value of it would show in every result.
    """
    T, low, high = 70, -(2**31), 2**31 - 1
    wide = torch.full((T + 400, 3, 1, 32), 1e4, dtype=dtype, device=DEVICE)
    wide[200 : T + 200] = randn(T, 3, 1, 32).clamp(-1, 1).to(dtype)
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
            kernel.attention(qkv, cu_seqlens, window, tile_table=row[None], block=64)
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
