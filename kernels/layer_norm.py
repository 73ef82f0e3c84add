"""LayerNorm (arXiv 1607.06450), with the residual's addition before it where asked: one pass over memory."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows, launch, row_shape

_MAX_WIDTH = 8192  # a row is held in registers


@triton.jit
def _statistics(x, known, C: tl.constexpr, eps):
    """Mean and reciprocal deviation of rows: of centred squares, because E[x^2] - E[x]^2 cancels."""
    mean = tl.sum(x, 1) * (1.0 / C)
    centred = tl.where(known, x - mean[:, None], 0.0)
    return centred, tl.math.rsqrt(tl.sum(centred * centred, 1) * (1.0 / C) + eps)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    T,
    eps,
    stride_x,
    stride_residual,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOTAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    known = column < C
    inside = (row < T) & known
    v = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    if TOTAL:
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * C + column, rounded, mask=inside)
        v = rounded.to(tl.float32)  # of what is stored: the backward pass has nothing else
    centred, scale = _statistics(v, known, C, eps)
    w = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    out = centred * scale[:, None] * w
    if BIAS:
        out += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    tl.store(y + row * C + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    grad_x,
    partial_weight,  # (programs, C) fp32
    partial_bias,
    T,
    eps,
    stride_grad,
    stride_grad_total,
    stride_x,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    known = column < C
    w = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    # Each program takes every n-th group of rows, so that the weights' gradients need only as many partial sums as
    # there are programs.
    for first in tl.range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < T) & known
        v = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + row * stride_grad + column, mask=inside, other=0.0).to(tl.float32)
        centred, scale = _statistics(v, known, C, eps)
        normed = centred * scale[:, None]
        dw = d * w
        mean1 = tl.sum(dw, 1) * (1.0 / C)
        mean2 = tl.sum(dw * normed, 1) * (1.0 / C)
        dx = (dw - mean1[:, None] - normed * mean2[:, None]) * scale[:, None]
        if RESIDUAL:
            dx += tl.load(grad_total + row * stride_grad_total + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * C + column, dx.to(grad_x.dtype.element_ty), mask=inside)
        sum_weight += d * normed
        if BIAS:
            sum_bias += d
    to = tl.program_id(0) * C + tl.arange(0, BLOCK)
    tl.store(partial_weight + to, tl.sum(sum_weight, 0), mask=tl.arange(0, BLOCK) < C)
    if BIAS:
        tl.store(partial_bias + to, tl.sum(sum_bias, 0), mask=tl.arange(0, BLOCK) < C)


def _check(weight: Tensor, bias: Tensor | None, **tensors: Tensor | None) -> None:
    first, like = next(iter(tensors.items()))
    assert like is not None
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dim() != 2 or x.shape != like.shape or x.dtype != like.dtype or x.shape[1] == 0:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}, {first} {tuple(like.shape)} {like.dtype}; both must be (T, C) "
                "of one dtype"
            )
        if x.shape[1] > _MAX_WIDTH:
            raise ValueError(f"{name} is {x.shape[1]} wide; the kernel takes {_MAX_WIDTH} at most")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != like.shape[1:] or not parameter.is_contiguous()):
            raise ValueError(f"{name} is {tuple(parameter.shape)}; it must be ({like.shape[1]},), contiguous")
    check_rows("its _op", **tensors, weight=weight, bias=bias)


@functools.cache
def _backward_shape(C: int) -> dict[str, int]:
    """The backward pass holds six arrays of rows, and takes more warps for them: 4 rows, fewer if they are wide."""
    BLOCK = triton.next_power_of_2(C)
    return {"ROWS": max(1, min(4, 2048 // BLOCK)), "BLOCK": BLOCK, "num_warps": 4 if BLOCK <= 4096 else 8}


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    check: bool = True,
) -> Tensor:
    """(T, C) -> (T, C), statistics over C in fp32; weight and bias (C,), bias may be None. C up to 8192. With a
    residual (T, C), of x + residual, which is rounded nowhere.

    Rows of x may be strided. Raises ValueError, naming the argument, for what it can't do; with check=False, for a
    caller whose tensors are right by construction, nothing is looked at.
    """
    if check:
        _check(weight, bias, x=x, **({} if residual is None else {"residual": residual}))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, residual, weight, bias, eps, y, None)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x and residual (T, C) -> layer_norm(x + residual), and x + residual, each (T, C): see `layer_norm`."""
    _check(weight, bias, x=x, residual=residual)
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _forward(x, residual, weight, bias, eps, y, total)
    return y, total


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    total: Tensor | None,
) -> None:
    T, C = x.shape
    shape = row_shape(C)
    if T:
        other = x if residual is None else residual
        launch(
            _layer_norm_kernel,
            (-(-T // shape["ROWS"]), 1, 1),
            (x, other, weight, weight if bias is None else bias, y, y if total is None else total),
            (T, eps, x.stride(0), other.stride(0)),
            C=C,
            RESIDUAL=residual is not None,
            TOTAL=total is not None,
            BIAS=bias is not None,
            **shape,
        )


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    grad_total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x (T, C), weight (C,) and bias (C,) (None without one), of `layer_norm`.

    grad (T, C): of its result. After `add_layer_norm`, x is the sum it gave, grad_total (T, C) the sum's own gradient,
    and the first result is that of both its inputs. Statistics are computed anew from x.
    """
    _check(weight, bias, x=x, grad=grad, grad_total=grad_total)
    T, C = x.shape
    shape = _backward_shape(C)
    groups = triton.cdiv(T, shape["ROWS"])
    # Programs stay while rows pass: four a multiprocessor fill it, and fewer partial sums are less to add up.
    programs = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = max(1, min(groups, programs))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_weight = torch.zeros((programs, C), dtype=torch.float32, device=x.device)
    partial_bias = None if bias is None else torch.zeros_like(partial_weight)
    if T:
        other = grad if grad_total is None else grad_total
        sums = (partial_weight, partial_weight if partial_bias is None else partial_bias)
        launch(
            _layer_norm_backward_kernel,
            (programs, 1, 1),
            (grad, other, x, weight, grad_x, *sums),
            (T, eps, grad.stride(0), other.stride(0), x.stride(0)),
            C=C,
            RESIDUAL=grad_total is not None,
            BIAS=bias is not None,
            **shape,
        )
    grad_bias = None if partial_bias is None else partial_bias.sum(0).to(weight.dtype)
    return grad_x, partial_weight.sum(0).to(weight.dtype), grad_bias


@torch.library.custom_op("modernbert_lite::layer_norm", mutates_args=())
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` for torch.compile, torch.export and autograd."""
    return layer_norm(x, weight, bias, eps)


@torch.library.custom_op("modernbert_lite::add_layer_norm", mutates_args=())
def add_layer_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` for torch.compile, torch.export and autograd."""
    return add_layer_norm(x, residual, weight, bias, eps)


@torch.library.custom_op("modernbert_lite::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, grad_total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (empty without one)."""
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    grad_x, grad_weight, grad_bias = layer_norm_backward(grad.contiguous(), x, weight, bias, eps, grad_total)
    return grad_x, grad_weight, weight.new_empty(0) if grad_bias is None else grad_bias


@layer_norm_op.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@add_layer_norm_op.register_fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@layer_norm_backward_op.register_fake
def _(grad, x, weight, bias, eps, grad_total):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else weight.shape)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = layer_norm_backward_op(grad, x, weight, bias, ctx.eps, None)
    return grad_x, grad_weight, None if bias is None else grad_bias, None


def _save_total(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _backward_total(ctx, grad, grad_total):
    total, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = layer_norm_backward_op(grad, total, weight, bias, ctx.eps, grad_total)
    return grad_x, grad_x, grad_weight, None if bias is None else grad_bias, None


layer_norm_op.register_autograd(_backward, setup_context=_save)
add_layer_norm_op.register_autograd(_backward_total, setup_context=_save_total)
