"""Products of fp32 rows with weights in 16 bits: for CPUs that have no fast products of 16 bits by 16.

FBGEMM, which comes with torch on x86, converts the weight while it multiplies: as fast as in fp32, with half of the
memory. Elsewhere the weight is converted for each product.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reading import warn
from .onednn import Activation, slices
from .tracing import not_compiled


class Half(NamedTuple):
    """A weight (M, K) in 16 bits."""

    numbers: Any  # FBGEMM's own object; or a tensor
    fast: bool  # which of the two

    def dense(self) -> Tensor:
        """(M, K) fp32."""
        return torch.ops.quantized.linear_unpack_fp16(self.numbers)[0] if self.fast else self.numbers.float()

    @not_compiled
    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x (T, K) fp32 @ weight^T + bias + residual (T, M) -> (T, M)."""
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.numbers)
        y = y if bias is None else y.add_(bias)
        return y if residual is None else y.add_(residual)

    @not_compiled
    def gated(self, x: Tensor, bias: Tensor | None, function: Activation, swapped: bool) -> Tensor:
        """`reference.geglu` of `linear`: (T, N), a block of rows at a time."""
        blocks = []
        for rows in slices(len(x)):
            activated, gate = self.linear(x[rows], bias).chunk(2, -1)[:: -1 if swapped else 1]
            # torch's GELU of rows that lie apart is slower, and differs in the last places
            blocks.append(torch.mul(function(activated.contiguous()), gate))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def pack(weight: Tensor) -> Half:
    """Holds a weight (M, K) in float16, which is 8 times finer than bfloat16. In bfloat16 if float16 doesn't fit: some
    number is too large, or all of a row are too small."""
    most = (weight := weight.detach()).abs().amax(1)
    # Below 2^-14, where float16 loses bits, it is off by 2^-25 at most. bfloat16 is off by 2^-23 at 2^-14.
    fits = bool(((most == 0) | ((most >= 2**-14) & (most <= 65504))).all())
    if fits and works():
        return Half(torch.ops.quantized.linear_prepack_fp16(weight.float(), None), True)
    return Half(weight.to(torch.float16 if fits else torch.bfloat16, copy=True), False)


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def works() -> bool:
    """Probes FBGEMM's product once. Where that is missing or wrong, a weight is converted for each product."""
    fp32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    x, weight = torch.linspace(-1, 1, 21, **fp32).view(3, 7), torch.linspace(-1, 2, 35, **fp32).view(5, 7)
    try:
        packed = Half(torch.ops.quantized.linear_prepack_fp16(weight, None), True)
        same = torch.equal(packed.dense(), weight.half().float())
        same = same and torch.allclose(packed.linear(x, None), F.linear(x, packed.dense()), atol=1e-5)
    except (AttributeError, RuntimeError):  # there is no such operator, or no engine for it
        same = False
    if not same:
        warn("this torch has no usable product with 16-bit weights: they save memory, and cost speed")
    return same
