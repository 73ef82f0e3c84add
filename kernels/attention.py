"""Bidirectional attention inside packed sequences, with a window: flash attention (arXiv 2205.14135, 2307.08691).

One program takes a tile (BLOCK_M neighbouring queries of one sequence) of one head, and meets only the key blocks that
its queries can see. The list of tiles is made on the host, which knows the lengths anyway: no program is launched for
nothing, and nothing waits for the device.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_cu_seqlens, check_devices, check_rows, launch

HEAD_DIMS = (32, 64, 128)
_LOG2E = 1.4426950408889634


@triton.jit
def _rows(x, row, end, stride, D: tl.constexpr, FLOAT: tl.constexpr, MASK: tl.constexpr):
    address = row.to(tl.int64)[:, None] * stride + tl.arange(0, D)
    if MASK:
        y = tl.load(x + address, mask=(row < end)[:, None], other=0.0)
    else:
        y = tl.load(x + address)
    if FLOAT:
        y = y.to(tl.float32)
    return y


@triton.jit
def _masked(score, row, key, end, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scores (queries, keys) with -inf where a query doesn't see a key."""
    # Relative to the block's first key: otherwise the loop would keep a tile of distances in registers.
    low = row * 0
    high = low + (end - key)
    if LEFT >= 0:
        low = row - (key + LEFT)
    if RIGHT >= 0:
        high = tl.minimum(row + (RIGHT + 1) - key, end - key)
    # As unsigned numbers, so that one comparison tells both ends of [low, high).
    place = (tl.arange(0, BLOCK_N)[None, :] - low[:, None]).to(tl.uint32, bitcast=True)
    seen = tl.maximum(high - low, 0).to(tl.uint32, bitcast=True)
    return tl.where(place < seen[:, None], score, float("-inf"))


@triton.jit
def _meet(
    acc,
    total,
    top,  # the running maximum of the scores, times log2(e)
    q,
    k,
    v,
    row,
    first,  # the tile's first row
    key,  # the first key of the block
    end,
    stride,
    scale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT: tl.constexpr,
    MASK: tl.constexpr,
    SKIP: tl.constexpr,
):
    """One step of the online softmax: the tile's queries meet a block of keys and values."""
    key_row = key + tl.arange(0, BLOCK_N)
    score = tl.dot(q, tl.trans(_rows(k, key_row, end, stride, D, FLOAT, MASK)), input_precision="ieee")
    if MASK:
        if SKIP:  # no mask on blocks that every query of the tile sees whole: the tile's ends tell
            hides = key + BLOCK_N > end
            if LEFT >= 0:
                hides = hides | (key < first + BLOCK_M - 1 - LEFT)
            if RIGHT >= 0:
                hides = hides | (key + BLOCK_N > first + RIGHT + 1)
            if hides:
                score = _masked(score, row, key, end, LEFT, RIGHT, BLOCK_N)
        else:
            score = _masked(score, row, key, end, LEFT, RIGHT, BLOCK_N)
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    if LEFT >= 0 or RIGHT >= 0:  # a query that has seen no key yet has no maximum, and -inf - -inf would be NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    weight = tl.exp2(score * scale - shift[:, None])
    shrink = tl.exp2(top - shift)
    value = _rows(v, key_row, end, stride, D, FLOAT, MASK)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(weight, 1), new_top


@triton.jit(do_not_specialize=["Q", "T"])
def _attention_kernel(
    q,
    k,
    v,
    out,
    tiles,  # (n, 4) int32: the first query's row, the end of the query rows, start and end of the keys' rows
    Q,
    T,
    scale,
    stride_q,
    stride_kv,
    stride_out,
    head_q,
    head_kv,
    head_out,
    SHARED: tl.constexpr,  # heads of q that share a head of k and v
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT: tl.constexpr,  # bf16 in Triton's interpreter, whose own bf16 arithmetic is wrong
    ONE_LOOP: tl.constexpr,  # without a second loop for the blocks that need no mask
    SKIP: tl.constexpr,  # whether the loop branches around the mask
):
    tile = tiles + 4 * tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    # Clamped, so that no list of tiles leads outside the tensors.
    first = tl.maximum(tl.load(tile), 0)
    last = tl.minimum(tl.load(tile + 1), Q)
    start = tl.minimum(tl.maximum(tl.load(tile + 2), 0), T)
    end = tl.maximum(tl.minimum(tl.load(tile + 3), T), start)
    if first >= last:
        return
    q += head * head_q
    k += head // SHARED * head_kv
    v += head // SHARED * head_kv
    row = first + tl.arange(0, BLOCK_M)
    queries = _rows(q, row, last, stride_q, D, FLOAT, True)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    if ONE_LOOP or LEFT >= 0 or RIGHT >= 0:  # where there is a window, queries' rows are keys' rows
        low, high = start, end
        if LEFT >= 0:
            low = tl.maximum(start, first - LEFT)
        if RIGHT >= 0:
            high = tl.minimum(end, first + BLOCK_M + RIGHT)
        for key in tl.range(low, high, BLOCK_N):
            acc, total, top = _meet(
                acc, total, top, queries, k, v, row, first, key, high, stride_kv, scale,
                LEFT, RIGHT, D, BLOCK_M, BLOCK_N, FLOAT, True, SKIP,
            )  # fmt: skip
    else:
        whole = start + (end - start) // BLOCK_N * BLOCK_N
        for key in tl.range(start, whole, BLOCK_N):
            acc, total, top = _meet(
                acc, total, top, queries, k, v, row, first, key, end, stride_kv, scale,
                LEFT, RIGHT, D, BLOCK_M, BLOCK_N, FLOAT, False, SKIP,
            )  # fmt: skip
        if whole < end:
            acc, total, top = _meet(
                acc, total, top, queries, k, v, row, first, whole, end, stride_kv, scale,
                LEFT, RIGHT, D, BLOCK_M, BLOCK_N, FLOAT, True, SKIP,
            )  # fmt: skip

    acc = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]  # without keys: zeros
    address = row.to(tl.int64)[:, None] * stride_out + head * head_out + tl.arange(0, D)
    tl.store(out + address, acc.to(out.dtype.element_ty), mask=(row < last)[:, None])


def block_m(max_seqlen: int, dtype: torch.dtype, local: bool) -> int:
    """Queries a tile, for `tiles`: few in layers with a window (`local`), where a wide tile meets keys that most of its
    queries don't see."""
    if dtype == torch.float32:
        return 32
    return 64 if local or max_seqlen <= 64 else 128


@functools.cache
def _config(block: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """By registers and shared memory, read off the compiled kernels: nothing spills, and two programs or more fit a
    multiprocessor of sm_90. bench/bench_attention.py --tune measures the neighbours."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "num_warps": 8 if head_dim > 64 else 4, "num_stages": 2}
    wide = block * head_dim > 128 * 64
    # Few keys meet a tile of 64 queries: a third stage would only take shared memory from a fourth program.
    return {"BLOCK_N": 64, "num_warps": 8 if wide else 4, "num_stages": 2 if head_dim > 64 or block <= 64 else 3}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Where a branch around the mask costs nothing: elsewhere the compiler moves the scores through shared memory for
    it. True for the interpreter."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9)


def tiles(seqlens: Sequence[int], block: int, key_seqlens: Sequence[int] | None = None) -> Tensor:
    """(n, 4) int32 on the host: `block` queries a tile, long sequences first, so that the shortest work comes last.
    key_seqlens: of each sequence the first so many tokens are keys; None: all.

    seqlens [5, 130], block 64 -> (5, 135, 5, 135), (69, 135, 5, 135), (133, 135, 5, 135), (0, 5, 0, 5)
    """
    if len(seqlens) == 1 and key_seqlens is None:  # a query: a fifth of the time
        table = np.zeros((-(-seqlens[0] // block), 4), dtype=np.int32)
        table[:, 0], table[:, 1::2] = range(0, seqlens[0], block), seqlens[0]
        return torch.from_numpy(table)
    lengths = np.asarray(seqlens, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start, n = (lengths.cumsum() - lengths)[order], lengths[order]
    keys = n if key_seqlens is None else np.asarray(key_seqlens, dtype=np.int64)[order]
    count = -(-n // block)
    first = (start - (count.cumsum() - count) * block).repeat(count)  # the row that tile 0 would have
    table = np.empty((len(first), 4), dtype=np.int32)
    table[:, 0] = first + np.arange(0, len(first) * block, block)
    for column, of_sequence in enumerate((start + n, start, start + keys), 1):
        table[:, column] = of_sequence.repeat(count)
    return torch.from_numpy(table)


def device_tiles(cu_seqlens: Tensor, count: int, block: int) -> Tensor:
    """`tiles` of sequences that only the device knows (while torch.compile traces): (count, 4) int32 beside cu_seqlens.

    count: their number or more (T // block + B is never too small); the rest are empty, (0, 0, 0, 0).
    """
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    ends = ((lengths + (block - 1)) // block).cumsum(0)
    tile = torch.arange(count, device=cu_seqlens.device)
    place = torch.searchsorted(ends, tile, right=True).clamp(max=lengths.shape[0] - 1)
    start = cu_seqlens[:-1][order][place]
    end = start + lengths[place]
    row = start + (tile - ends[place] + (lengths[place] + (block - 1)) // block) * block
    table = torch.stack([row, end, start, end], 1)
    return torch.where((tile < ends[-1:])[:, None], table, 0).to(torch.int32)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    window_size: tuple[int, int] = (-1, -1),
    *,
    heads: int | None = None,
    tile_table: Tensor | None = None,
    block: int | None = None,
    config: dict[str, int] | None = None,
    check: bool = True,
) -> Tensor:
    """Attention inside each sequence: qkv (T, H + 2 Hkv, D) -> (T, H, D), scaled by D^-0.5, `heads` being H: the heads
    of q, then of k, then of v, of which H / Hkv neighbours in q share one. Also (T, 3, H, D), without `heads`. Forward
    only.

    qkv: fp16, bf16 or fp32 (products in full fp32), D one of 32, 64, 128, the last dimension contiguous.
    cu_seqlens (B + 1,) int32. Token i sees i - left to i + right of its own sequence, inclusive; -1 is unlimited.
    tile_table and block: what `tiles` gave for these sequences and this block (neither is checked: another table gives
    other numbers), and cu_seqlens is not looked at; without them it is brought to the host, which waits for the device.
    config: BLOCK_N, num_warps, num_stages, to measure others.
    Raises ValueError, naming the argument, for what it can't do. check: as in `layer_norm`.
    """
    q, k, v = _split(qkv, heads)
    if check and (not isinstance(window_size, (tuple, list)) or [type(side) for side in window_size] != [int, int]):
        raise ValueError(
            f"window_size is {window_size!r}; it must be two whole numbers, (left, right), -1 for no limit"
        )
    left, right = window_size
    left, right = -1 if left < 0 else min(int(left), 2**30), -1 if right < 0 else min(int(right), 2**30)
    if tile_table is None or block is None:
        values = check_cu_seqlens(cu_seqlens, len(qkv))
        lengths = [b - a for a, b in pairwise(values)]
        block = block or block_m(max(lengths), qkv.dtype, left >= 0 or right >= 0)
        tile_table = tiles(lengths, max(block, 1)).to(qkv.device)
    if check:
        check_rows("ops.attention", qkv=qkv)
        _check(q, tile_table, block)
    return _launch(q, k, v, tile_table, block, left, right, config)


def _split(qkv: Tensor, heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, D), (T, Hkv, D), (T, Hkv, D)."""
    if heads is None:
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(f"qkv is {tuple(qkv.shape)}; it must be (T, 3, H, D), or (T, H + 2 Hkv, D) with heads")
        q, k, v = qkv.unbind(1)
        return q, k, v
    shared = (qkv.shape[1] - heads) // 2 if qkv.dim() == 3 else 0
    if shared < 1 or heads < 1 or heads + 2 * shared != qkv.shape[1] or heads % shared:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} and heads {heads}; it must be (T, H + 2 Hkv, D), H a multiple of Hkv"
        )
    q, k, v = qkv.split_with_sizes((heads, shared, shared), 1)
    return q, k, v


def row_attention(q: Tensor, kv: Tensor, cu_seqlens: Tensor, *, check: bool = True) -> Tensor:
    """One query a sequence, over all of its keys: q (B, H, D), kv (T, 2 Hkv, D), the heads of k, then of v, cu_seqlens
    (B + 1,) int32 -> (B, H, D). Also kv (T, 2, H, D).

    As `attention` without a window. A sequence without keys gives zeros. check: bring cu_seqlens to the host, which
    waits for the device, and raise ValueError unless it starts at 0, never decreases and ends at T; without it no key
    outside kv is read either.
    """
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)}; it must be (B + 1,)")
    if kv.dim() == 4 and kv.shape[1] == 2:
        kv = kv.flatten(1, 2)
    shared = kv.shape[1] // 2 if kv.dim() == 3 and kv.shape[1] % 2 == 0 else 0
    if q.dim() != 3 or not shared or len(q) != len(cu_seqlens) - 1 or q.shape[2] != kv.shape[2] or q.shape[1] % shared:
        raise ValueError(
            f"q is {tuple(q.shape)}, kv {tuple(kv.shape)}; they must be (B, H, D) and (T, 2, H, D), or (T, 2 Hkv, D), "
            "H a multiple of Hkv"
        )
    if cu_seqlens.dtype != torch.int32 or q.dtype != kv.dtype:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype}, q {q.dtype}, kv {kv.dtype}; int32 and one dtype are needed"
        )
    if check and len(q):
        check_cu_seqlens(cu_seqlens, len(kv))
    row = torch.arange(len(q), dtype=torch.int32, device=q.device)
    table = torch.stack([row, row + 1, cu_seqlens[:-1], cu_seqlens[1:]], 1)
    k, v = kv.chunk(2, 1)
    block = 32 if q.dtype == torch.float32 else 64  # one row of it is used; the matrix units take no fewer
    check_rows("ops.row_attention", q=q, kv=kv)
    _check(q, table, block)
    return _launch(q, k, v, table, block, -1, -1, None)


def _check(q: Tensor, table: Tensor, block: int) -> None:
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"qkv has head_dim {q.shape[2]}; it must be one of {', '.join(map(str, HEAD_DIMS))}")
    check_devices(queries=q, tile_table=table)
    if table.dim() != 2 or table.shape[1] != 4 or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(f"tile_table is {tuple(table.shape)} {table.dtype}; it must be what `tiles` gives")
    if block not in (16, 32, 64, 128, 256):
        raise ValueError(f"block is {block}; it must be 16, 32, 64, 128 or 256")


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    block: int,
    left: int,
    right: int,
    config: dict[str, int] | None,
) -> Tensor:
    Q, H, D = q.shape
    out = torch.empty((Q, H, D), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or table.shape[0] == 0:
        return out
    (q_row, q_head, _), (k_row, k_head, _), (out_row, out_head, _) = q.stride(), k.stride(), out.stride()
    launch(
        _attention_kernel,
        (table.shape[0], H, 1),
        (q, k, v, out, table),
        (Q, k.shape[0], D**-0.5 * _LOG2E, q_row, k_row, out_row, q_head, k_head, out_head),
        SHARED=H // k.shape[1],
        LEFT=left,
        RIGHT=right,
        D=D,
        BLOCK_M=block,
        FLOAT=q.dtype == torch.bfloat16 and not isinstance(_attention_kernel, triton.JITFunction),
        # Twice the loop would spill registers where products are unrolled (fp32); short sequences have one block of
        # keys anyway.
        ONE_LOOP=q.dtype == torch.float32 or block <= 64,
        SKIP=_is_hopper(q.device),
        **(config or _config(block, D, q.dtype)),
    )
    return out


@torch.library.custom_op("modernbert_lite::attention", mutates_args=())
def attention_op(
    qkv: Tensor, cu_seqlens: Tensor, tile_table: Tensor, block: int, left: int, right: int, heads: int | None = None
) -> Tensor:
    """`attention` for torch.compile and torch.export; no gradient (ops takes torch's own attention for one)."""
    return attention(qkv, cu_seqlens, (left, right), heads=heads, tile_table=tile_table, block=block)


@attention_op.register_fake
def _(qkv, cu_seqlens, tile_table, block, left, right, heads=None):
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] if heads is None else heads, qkv.shape[-1])


@torch.library.custom_op("modernbert_lite::row_attention", mutates_args=())
def row_attention_op(q: Tensor, kv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`row_attention` for torch.compile and torch.export; no gradient either."""
    return row_attention(q, kv, cu_seqlens, check=False)


@row_attention_op.register_fake
def _(q, kv, cu_seqlens):
    return q.new_empty(q.shape)
