"""Gated activation: act(activated) * gate, each read once, the product written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows, launch

ACTIVATIONS = ("gelu", "silu")
BLOCK_T, BLOCK_N = 16, 128  # 1152, 2304 and 3072 are multiples of 128, 2624 almost


@triton.jit
def _offsets(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    across = tl.cdiv(N, BLOCK_N)  # neighbouring programs take neighbouring columns of the same rows
    row = tl.program_id(0) // across * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    return row.to(tl.int64)[:, None], column[None, :], (row < T)[:, None] & (column < N)[None, :]


@triton.jit
def _normal(x):
    """The normal distribution's cumulative function at x, and exp(-x^2 / 2). The first is (1 + erf(x / sqrt 2)) / 2 by
    Abramowitz and Stegun 7.1.26: 7.5e-8 off at most, and without cancellation below 0. libdevice's erf takes twice as
    many instructions."""
    d = 1.0 + 0.23164188 * tl.abs(x)  # 0.3275911 / sqrt 2
    t = tl.math.rsqrt(d * d)  # 1 / d in one instruction
    p = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    bell = tl.exp2(-0.7213475204444817 * x * x)  # log2(e) / 2
    tail = p * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit(do_not_specialize=["T"])
def _geglu_kernel(
    activated,
    gate,
    out,
    T,
    N,
    stride_activated,
    stride_gate,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column, inside = _offsets(T, N, BLOCK_T, BLOCK_N)
    # fp32 from the load on: the activation needs it, and the interpreter's own bf16 arithmetic is wrong.
    x = tl.load(activated + row * stride_activated + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        below, _ = _normal(x)
        y = x * below
    else:
        y = x / (1.0 + tl.exp(-x))
    tl.store(out + row * N + column, (y * g).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _geglu_backward_kernel(
    grad,
    activated,
    gate,
    grad_activated,
    grad_gate,
    T,
    N,
    stride_grad,
    stride_activated,
    stride_gate,
    stride_out,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column, inside = _offsets(T, N, BLOCK_T, BLOCK_N)
    d = tl.load(grad + row * stride_grad + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(activated + row * stride_activated + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        below, bell = _normal(x)
        y = x * below
        slope = below + x * 0.3989422804014327 * bell  # 1 / sqrt(2 pi)
    else:
        below = 1.0 / (1.0 + tl.exp(-x))
        y = x * below
        slope = below * (1.0 + x * (1.0 - below))
    to = row * stride_out + column
    tl.store(grad_activated + to, (d * g * slope).to(grad_activated.dtype.element_ty), mask=inside)
    tl.store(grad_gate + to, (d * y).to(grad_gate.dtype.element_ty), mask=inside)


def _check(act: str, **tensors: Tensor) -> None:
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dim() != 2 or x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}, {first} {tuple(like.shape)} {like.dtype}; "
                f"{', '.join(tensors)} must be (T, N) of one dtype"
            )
    check_rows("geglu_op", **tensors)
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; it must be 'gelu' or 'silu'")


def geglu(activated: Tensor, gate: Tensor, act: str = "gelu", *, check: bool = True) -> Tensor:
    """act(activated) * gate: two (T, N) views with contiguous rows, often halves of one (T, 2N), -> (T, N).

    act: "gelu" (exact, by erf) or "silu". fp32 arithmetic, the inputs' dtype. Raises ValueError for other shapes,
    dtypes, strides or activations, and for 2^31 elements or more. check: as in `layer_norm`.
    """
    if check:
        _check(act, activated=activated, gate=gate)
    T, N = activated.shape
    out = torch.empty((T, N), dtype=activated.dtype, device=activated.device)
    if out.numel():
        launch(
            _geglu_kernel,
            (-(-T // BLOCK_T) * -(-N // BLOCK_N), 1, 1),
            (activated, gate, out),
            (T, N, activated.stride(0), gate.stride(0)),
            GELU=act == "gelu",
            BLOCK_T=BLOCK_T,
            BLOCK_N=BLOCK_N,
        )
    return out


def geglu_backward(
    grad: Tensor, activated: Tensor, gate: Tensor, act: str = "gelu", *, swapped: bool = False
) -> Tensor:
    """The gradients of the two halves for that of the product, all (T, N), -> (T, 2N): of `activated`, then of `gate`;
    swapped: the other way round. Computes the activation anew; nothing that it reads is written. Raises ValueError as
    `geglu` does."""
    _check(act, grad=grad, activated=activated, gate=gate)
    T, N = activated.shape
    out = torch.empty((T, 2 * N), dtype=activated.dtype, device=activated.device)
    if out.numel():
        grad_activated, grad_gate = out.chunk(2, -1)[:: -1 if swapped else 1]
        launch(
            _geglu_backward_kernel,
            (-(-T // BLOCK_T) * -(-N // BLOCK_N), 1, 1),
            (grad, activated, gate, grad_activated, grad_gate),
            (T, N, grad.stride(0), activated.stride(0), gate.stride(0), out.stride(0)),
            GELU=act == "gelu",
            BLOCK_T=BLOCK_T,
            BLOCK_N=BLOCK_N,
        )
    return out


# The operators take the projection whole, so that its gradient comes back in one piece. swapped: the second half is
# activated (GTE), not the first (ModernBERT).


@torch.library.custom_op("modernbert_lite::geglu", mutates_args=())
def geglu_op(x: Tensor, act: str, swapped: bool) -> Tensor:
    """(T, 2N) -> (T, N): `geglu` for torch.compile, torch.export and autograd."""
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (T, 2N)")
    activated, gate = x.chunk(2, -1)[:: -1 if swapped else 1]
    return geglu(activated, gate, act)


@torch.library.custom_op("modernbert_lite::geglu_backward", mutates_args=())
def geglu_backward_op(grad: Tensor, x: Tensor, act: str, swapped: bool) -> Tensor:
    """The gradient of x (T, 2N)."""
    activated, gate = x.chunk(2, -1)[:: -1 if swapped else 1]
    return geglu_backward(grad.contiguous(), activated, gate, act, swapped=swapped)


@geglu_op.register_fake
def _(x, act, swapped):
    torch._check(x.shape[1] % 2 == 0, lambda: f"x is {tuple(x.shape)}; it must be (T, 2N)")
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@geglu_backward_op.register_fake
def _(grad, x, act, swapped):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.act, ctx.swapped = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    return geglu_backward_op(grad, *ctx.saved_tensors, ctx.act, ctx.swapped), None, None


geglu_op.register_autograd(_backward, setup_context=_save)
