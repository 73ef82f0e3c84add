"""Rotary embedding (arXiv 2104.09864) of q and k in place, in the packed projection: read once, written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_devices, check_rows, launch

BLOCK_T, BLOCK_H = 8, 8


@triton.jit(do_not_specialize=["T", "P"])
def _rope_kernel(
    x,
    cos,
    sin,
    position_ids,
    T,
    P,
    H,
    stride_t,
    stride_h,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,  # HALF's next power of two
    POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    groups = tl.cdiv(H, BLOCK_H)
    token = tl.program_id(0) // groups * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, PADDED)
    if POSITIONS:
        place = tl.load(position_ids + token, mask=token < T, other=0)
    else:
        place = token
    place = tl.minimum(tl.maximum(place, 0), P - 1).to(tl.int32)  # no position leads outside the tables
    angle = place[:, None] * HALF + column
    known = (token < T)[:, None] & (column < HALF)
    c = tl.load(cos + angle, mask=known, other=0.0)[:, None, :]
    s = tl.load(sin + angle, mask=known, other=0.0)[:, None, :]
    if INVERSE:
        s = -s
    address = token.to(tl.int64)[:, None, None] * stride_t + (head * stride_h)[None, :, None] + column[None, None, :]
    inside = (token < T)[:, None, None] & (head < H)[None, :, None] & (column < HALF)[None, None, :]
    first, second = x + address, x + HALF + address
    # fp32 from the load on, also because the interpreter's own bf16 arithmetic is wrong.
    x1 = tl.load(first, mask=inside).to(tl.float32)
    x2 = tl.load(second, mask=inside).to(tl.float32)
    tl.store(first, (x1 * c - x2 * s).to(x.dtype.element_ty), mask=inside)
    tl.store(second, (x2 * c + x1 * s).to(x.dtype.element_ty), mask=inside)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, heads: int) -> None:
    if qkv.dim() != 3 or not 0 <= heads <= qkv.shape[1]:
        raise ValueError(f"qkv is {tuple(qkv.shape)} and heads {heads}; it must be (T, N, D), with at most N heads")
    T, _, D = qkv.shape
    if D % 2 or D == 0:
        raise ValueError(f"qkv has head_dim {D}; it must be even")
    check_rows("rope_op", qkv=qkv)
    if heads * qkv.stride(1) >= 2**31:
        raise ValueError(f"qkv spans {heads} heads of {qkv.stride(1)} elements, 2^31 or more")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != D // 2 or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(table.shape)} {table.dtype}; it must be (P, {D // 2}) float32, contiguous"
            )
    if cos.numel() >= 2**31:
        raise ValueError(f"cos has {cos.numel()} elements, 2^31 or more")
    if len(cos) != len(sin) or (T and len(cos) == 0) or (position_ids is None and len(cos) < T):
        raise ValueError(f"cos has {len(cos)} rows and sin {len(sin)}; T is {T}: there must be one a token or position")
    check_devices(qkv=qkv, cos=cos, sin=sin, position_ids=position_ids)
    if position_ids is not None and (
        position_ids.shape != (T,)
        or position_ids.dtype not in (torch.int32, torch.int64)
        or not position_ids.is_contiguous()
    ):
        raise ValueError(
            f"position_ids is {tuple(position_ids.shape)} {position_ids.dtype}; "
            f"it must be ({T},) int32 or int64, contiguous"
        )


def rope_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    heads: int,
    inverse: bool = False,
    check: bool = True,
) -> Tensor:
    """Rotates the first `heads` heads of qkv (T, N, D) in place and returns it; the others stay. fp32 arithmetic.

    cos, sin (P, D / 2) fp32, contiguous: row t is token t's, or with position_ids (T,) int32 or int64 row
    position_ids[t] (values beyond the tables take their first or last row). D even. Split halves (NeoX): pair j is
    (x[j], x[j + D/2]). inverse: rotates back, which is also the backward pass (the sine negated).
    Raises ValueError, naming the argument, for what it can't do, a qkv that requires a gradient among it. check: as in
    `layer_norm`.
    """
    if check:
        _check(qkv, cos, sin, position_ids, heads)
    T, _, D = qkv.shape
    if qkv.numel() and heads:
        half = D // 2
        launch(
            _rope_kernel,
            (-(-T // BLOCK_T) * -(-heads // BLOCK_H), 1, 1),
            (qkv, cos, sin, cos if position_ids is None else position_ids),
            (T, cos.shape[0], heads, qkv.stride(0), qkv.stride(1)),
            HALF=half,
            PADDED=1 << (half - 1).bit_length(),
            POSITIONS=position_ids is not None,
            INVERSE=inverse,
            BLOCK_T=BLOCK_T,
            BLOCK_H=BLOCK_H,
        )
    return qkv


@torch.library.custom_op("modernbert_lite::rope", mutates_args=())
def rope_op(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, inverse: bool, heads: int) -> Tensor:
    """`rope_` on a copy, for torch.compile, torch.export and autograd: its backward is itself with the sine negated.
    (An operator in place can't carry a gradient, and would lose it silently.)"""
    copy = qkv.clone(memory_format=torch.contiguous_format)
    return rope_(copy, cos, sin, position_ids, heads=heads, inverse=inverse)


@rope_op.register_fake
def _(qkv, cos, sin, position_ids, inverse, heads):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    _, cos, sin, position_ids, ctx.inverse, ctx.heads = inputs
    ctx.save_for_backward(cos, sin, position_ids)


def _backward(ctx, grad):
    cos, sin, position_ids = ctx.saved_tensors
    return rope_op(grad, cos, sin, position_ids, not ctx.inverse, ctx.heads), None, None, None, None, None


rope_op.register_autograd(_backward, setup_context=_save)
