"""From token vectors to sequence vectors: the mean.

Two passes, so that one long sequence is not left to one program, and no sum depends on the order of its programs: sums
of up to CHUNK tokens, then a program a sequence over its chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_cu_seqlens, check_devices, check_rows, launch

CHUNK = 64
_MAX_WIDTH = 8192


@triton.jit(do_not_specialize=["T", "B"])
def _sum_kernel(
    x,
    cu_seqlens,
    partial,  # (T // CHUNK + B, C) fp32; sequence b's chunks start at row cu_seqlens[b] // CHUNK + b
    T,
    B,
    C,
    stride,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # The sequence whose chunks hold this program's row: the last b with cu_seqlens[b] // CHUNK + b <= row.
    slot = tl.program_id(0)
    low, high = slot * 0, B - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // CHUNK + middle <= slot:
            low = middle
        else:
            high = middle - 1
    # Clamped, so that no cu_seqlens leads outside of x.
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + low), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + low + 1), start), T)
    first = start + tl.maximum(slot - start // CHUNK - low, 0) * CHUNK
    last = tl.minimum(first + CHUNK, end)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in tl.range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < C)[None, :]
        numbers = x + row.to(tl.int64)[:, None] * stride + column[None, :]
        total += tl.load(numbers, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial + slot.to(tl.int64) * C + column, tl.sum(total, 0), mask=column < C)


@triton.jit(do_not_specialize=["T"])
def _finish_kernel(cu_seqlens, partial, out, T, C, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    b = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), start), T)
    column = tl.arange(0, BLOCK)
    known = column < C
    first = start // CHUNK + b
    last = first + tl.cdiv(end - start, CHUNK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for slot in tl.range(first, last, ROWS):
        slots = (slot + tl.arange(0, ROWS))[:, None]
        inside = (slots < last) & known[None, :]
        total += tl.load(partial + slots.to(tl.int64) * C + column[None, :], mask=inside, other=0.0)
    y = tl.sum(total, 0) / tl.maximum(end - start, 1)
    tl.store(out + b.to(tl.int64) * C + column, y, mask=known)


def pool(x: Tensor, cu_seqlens: Tensor, *, check: bool = True) -> Tensor:
    """x (T, C), cu_seqlens (B + 1,) int32 -> (B, C) fp32: the mean of each sequence's tokens; zeros if it has none.

    check: bring cu_seqlens to the host, which waits for the device, and refuse one that doesn't start at 0, decreases
    or doesn't end at T; without it no row outside x is read either. Raises ValueError, naming the argument, for what
    it can't do.
    """
    if x.dim() != 2 or not 0 < x.shape[1] <= _MAX_WIDTH:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (T, C), C at most {_MAX_WIDTH}")
    check_rows("ops.mean_pool", x=x)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.stride(0) != 1:
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (B + 1,) int32, contiguous"
        )
    check_devices(x=x, cu_seqlens=cu_seqlens)
    (T, C), B = x.shape, len(cu_seqlens) - 1
    if check and B:
        check_cu_seqlens(cu_seqlens, T)
    out = torch.empty((B, C), dtype=torch.float32, device=x.device)
    if B == 0:
        return out
    block, slots = triton.next_power_of_2(C), T // CHUNK + B
    shape = {"BLOCK": block, "CHUNK": CHUNK, "ROWS": max(1, min(4, 4096 // block))}
    partial = torch.empty((slots, C), dtype=torch.float32, device=x.device)
    launch(_sum_kernel, (slots, 1, 1), (x, cu_seqlens, partial), (T, B, C, x.stride(0)), **shape)
    launch(_finish_kernel, (B, 1, 1), (cu_seqlens, partial, out), (T, C), **shape)
    return out


@torch.library.custom_op("modernbert_lite::pool", mutates_args=())
def pool_op(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`pool`, for torch.compile and torch.export; no gradient (ops takes plain torch for one)."""
    return pool(x, cu_seqlens, check=False)


@pool_op.register_fake
def _(x, cu_seqlens):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32)
