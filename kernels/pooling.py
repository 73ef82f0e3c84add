"""From token vectors to sequence vectors: mean or first token, after a norm and before scaling to unit length if asked.

Two passes, so that one long sequence is not left to one program, and no sum depends on the order of its programs: sums
of up to CHUNK tokens, then a program a sequence over its chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_cu_seqlens, check_devices, check_rows, launch

MODES = ("mean", "cls")
CHUNK = 64
_MAX_WIDTH = 8192


@triton.jit
def _tokens(x, row, end, weight, bias, C, eps, stride, NORM: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x in fp32, (rows, BLOCK), normalised where asked; zeros from `end` on."""
    column = tl.arange(0, BLOCK)[None, :]
    known = column < C
    inside = (row < end)[:, None] & known
    v = tl.load(x + row.to(tl.int64)[:, None] * stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        centred = tl.where(inside, v - (tl.sum(v, 1) / C)[:, None], 0.0)
        v = centred / tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps)[:, None]
        v = v * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
        # Rounded as the norm's own output would be.
        v = tl.where(inside, v, 0.0).to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["T", "B"])
def _sum_kernel(
    x,
    cu_seqlens,
    weight,
    bias,
    partial,  # (T // CHUNK + B, C) fp32; sequence b's chunks start at row cu_seqlens[b] // CHUNK + b
    T,
    B,
    C,
    eps,
    stride,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
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
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in tl.range(first, last, ROWS):
        total += _tokens(x, row + tl.arange(0, ROWS), last, weight, bias, C, eps, stride, NORM, BIAS, BLOCK)
    column = tl.arange(0, BLOCK)
    tl.store(partial + slot.to(tl.int64) * C + column, tl.sum(total, 0), mask=column < C)


@triton.jit(do_not_specialize=["T"])
def _finish_kernel(
    x,
    cu_seqlens,
    weight,
    bias,
    partial,
    out,
    T,
    C,
    eps,
    stride,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), start), T)
    column = tl.arange(0, BLOCK)
    known = column < C
    if MEAN:
        first = start // CHUNK + b
        last = first + tl.cdiv(end - start, CHUNK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for slot in tl.range(first, last, ROWS):
            slots = (slot + tl.arange(0, ROWS))[:, None]
            inside = (slots < last) & known[None, :]
            total += tl.load(partial + slots.to(tl.int64) * C + column[None, :], mask=inside, other=0.0)
        y = tl.sum(total, 0) / tl.maximum(end - start, 1)
    else:
        row = start + tl.arange(0, 1)
        y = tl.sum(_tokens(x, row, end, weight, bias, C, eps, stride, NORM, BIAS, BLOCK), 0)
    if UNIT:
        y = y / tl.maximum(tl.sqrt_rn(tl.sum(y * y, 0)), 1e-12)
    tl.store(out + b.to(tl.int64) * C + column, y, mask=known)


def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = False,
    check: bool = True,
) -> Tensor:
    """x (T, C), cu_seqlens (B + 1,) int32 -> (B, C) fp32: "mean" of each sequence's tokens, or "cls", its first one.

    weight, bias (C,): a LayerNorm with `eps` before it. normalize: unit length after it. An empty sequence gives zeros.
    check: bring cu_seqlens to the host, which waits for the device, and refuse one that doesn't start at 0, decreases
    or doesn't end at T; without it no row outside x is read either. Raises ValueError, naming the argument, for what
    it can't do.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if x.dim() != 2 or not 0 < x.shape[1] <= _MAX_WIDTH:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (T, C), C at most {_MAX_WIDTH}")
    check_rows("pool_op", x=x)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.stride(0) != 1:
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (B + 1,) int32, contiguous"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != x.shape[1:] or not parameter.is_contiguous()):
            raise ValueError(f"{name} is {tuple(parameter.shape)}; it must be ({x.shape[1]},), contiguous")
    if bias is not None and weight is None:
        raise ValueError("bias was given without weight")
    check_devices(x=x, cu_seqlens=cu_seqlens)
    (T, C), B = x.shape, len(cu_seqlens) - 1
    if check and B:
        check_cu_seqlens(cu_seqlens, T)
    out = torch.empty((B, C), dtype=torch.float32, device=x.device)
    if B == 0:
        return out
    norm = {"NORM": weight is not None, "BIAS": bias is not None}
    weight, bias = x if weight is None else weight, x if bias is None else bias
    block = triton.next_power_of_2(C)
    shape = {"BLOCK": block, "CHUNK": CHUNK, "ROWS": max(1, min(4, 4096 // block))}
    partial = out
    if mode == "mean":
        slots = T // CHUNK + B
        partial = torch.empty((slots, C), dtype=torch.float32, device=x.device)
        read = (x, cu_seqlens, weight, bias)
        launch(_sum_kernel, (slots, 1, 1), (*read, partial), (T, B, C, eps, x.stride(0)), **norm, **shape)
    flags = {"MEAN": mode == "mean", "UNIT": normalize}
    tensors = (x, cu_seqlens, weight, bias, partial, out)
    launch(_finish_kernel, (B, 1, 1), tensors, (T, C, eps, x.stride(0)), **flags, **norm, **shape)
    return out


@torch.library.custom_op("modernbert_lite::pool", mutates_args=())
def pool_op(x: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """`pool` without norms, for torch.compile, torch.export and autograd."""
    return pool(x, cu_seqlens, mode, check=False)


@torch.library.custom_op("modernbert_lite::pool_backward", mutates_args=())
def pool_backward_op(grad: Tensor, x: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """The gradient of x (T, C) for that of the pooled (B, C): plain torch, one pass."""
    lengths = cu_seqlens.diff().long()
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if mode == "cls":
        kept = lengths > 0
        out[cu_seqlens[:-1].long()[kept]] = grad[kept].to(x.dtype)
        return out
    row = torch.arange(len(x), device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)  # B for rows that no sequence has
    shares = torch.cat([grad / lengths.clamp(min=1)[:, None], grad.new_zeros(1, x.shape[1])])
    return out.copy_(shares[sequence])


@pool_op.register_fake
def _(x, cu_seqlens, mode):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32)


@pool_backward_op.register_fake
def _(grad, x, cu_seqlens, mode):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, cu_seqlens, ctx.mode = inputs
    ctx.save_for_backward(x, cu_seqlens)


def _backward(ctx, grad):
    return pool_backward_op(grad, *ctx.saved_tensors, ctx.mode), None, None


pool_op.register_autograd(_backward, setup_context=_save)
