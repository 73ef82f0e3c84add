"""Rows in 8-bit floats: e4m3, which has 4 bits of exponent, 3 of mantissa, and 448 as its largest number.

Each row has a scale of its own, so that a text's numbers don't depend on the texts beside it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows, launch, row_shape

_MAX_WIDTH = 8192


@triton.jit(do_not_specialize=["T"])
def _quantize_kernel(x, numbers, scale, T, C, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < T)[:, None] & (column < C)
    v = tl.load(x + row.to(tl.int64)[:, None] * stride + column, mask=inside, other=0.0).to(tl.float32)
    # The largest by its bits, as whole numbers: there NaN is the largest of all, and a maximum of floats would drop it.
    bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    s = tl.maximum(bits, 0x0DA24260).to(tl.float32, bitcast=True) / 448.0  # at least 1e-30: zeros stay zeros
    tl.store(scale + row, s, mask=row < T)
    y = tl.minimum(tl.maximum(v * (1.0 / s)[:, None], -448.0), 448.0)
    tl.store(numbers + row.to(tl.int64)[:, None] * C + column, y.to(numbers.dtype.element_ty), mask=inside)


def quantize(x: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """x (T, C) with contiguous rows -> numbers (T, C) float8_e4m3fn and scale (T, 1) fp32: x is about numbers * scale.

    C is at most 8192. On NVIDIA's cards from Ada on. Raises ValueError for what it can't do, unless check is False.
    """
    if check and (x.dim() != 2 or not 0 < x.shape[1] <= _MAX_WIDTH):
        raise ValueError(f"x is {tuple(x.shape)}; it must be (T, C), C at most {_MAX_WIDTH}")
    if check:
        check_rows("", x=x)
    T, C = x.shape
    numbers = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    if T:
        shape = row_shape(C)
        launch(_quantize_kernel, (-(-T // shape["ROWS"]), 1, 1), (x, numbers, scale), (T, C, x.stride(0)), **shape)
    return numbers, scale
