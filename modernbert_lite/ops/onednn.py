"""oneDNN's products with packed weights, in fp32, bf16 and int8; and whether they work and pay on this machine.

The operators are those that torch's own compiler emits. Their names are internal. So they are probed once and compared
with F.linear. Where they are missing or wrong, they are not used.
"""

from __future__ import annotations

import functools
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reading import warn
from .tracing import not_compiled

Activation = Callable[[Tensor], Tensor]
_BLOCKS = (1024, 512, 256)  # rows of activations per product; the last product has the remaining rows
# The numbers of rows that are multiplied (see _blocks): steps of 4, then of 8, then of 16. Fewer than 4 rows take as
# long as 4.
_SIZES = (*range(4, 32, 4), *range(32, 128, 8), *range(128, 257, 16), 512, 1024)
_TINY = 1e-30  # the scale of a row of zeros


class Int8(NamedTuple):
    """A weight (M, K) in 8 bits. Each row holds whole numbers from -127 to 127, and has a scale."""

    numbers: Tensor  # (M, K) int8, or the same in oneDNN's layout
    scale: Tensor  # (M,) fp32
    zero_points: Tensor  # (M,) int64: zeros, which the operator asks for

    def dense(self) -> Tensor:
        """(M, K) fp32."""
        rows = self.numbers.to_dense().t().contiguous() if self.numbers.is_mkldnn else self.numbers
        return rows.float().mul_(self.scale[:, None])

    @property
    def fast(self) -> bool:
        return self.numbers.is_mkldnn

    @not_compiled
    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x (T, K) fp32 @ weight^T + bias + residual (T, M) -> (T, M)."""
        out = x.new_empty(len(x), len(self.scale))
        for rows, numbers, scale in _quantized_rows(x):
            product = _int8_product(numbers, self)
            if residual is None:
                torch.mul(product, scale, out=out[rows])
            else:
                torch.addcmul(residual[rows], product, scale, out=out[rows])
        return out if bias is None else out.add_(bias)

    @not_compiled
    def gated(self, x: Tensor, bias: Tensor | None, function: Activation, swapped: bool) -> Tensor:
        """`reference.geglu` of `linear`: (T, N)."""
        out = x.new_empty(len(x), len(self.scale) // 2)
        for rows, numbers, scale in _quantized_rows(x):
            product = _int8_product(numbers, self).mul_(scale)
            activated, gate = (product if bias is None else product.add_(bias)).chunk(2, -1)[:: -1 if swapped else 1]
            torch.mul(function(activated.contiguous()), gate, out=out[rows])
        return out


def pack(weight: Tensor, parts: int = 1) -> list[Tensor]:
    """(M, K) fp32, bf16 or fp16 -> the same numbers in oneDNN's layout, in `parts` pieces of M / parts rows."""
    return [torch.ops.mkldnn._reorder_linear_weight(part, None) for part in weight.detach().chunk(parts)]


def quantize(weight: Tensor) -> Int8:
    """(M, K) -> 8 bits. Each row is scaled by its own largest number. Packed where oneDNN's int8 product works."""
    # A few rows at a time: too few for torch to start other threads. The memory is not aligned, because glibc can't
    # reuse a freed aligned block for the next one of its size: a whole network of them stayed.
    numbers = torch.frombuffer(bytearray(weight.numel()), dtype=torch.int8).view(weight.shape)
    scale = torch.empty(len(weight), dtype=torch.float32, device="cpu")
    step = max(1, 32_768 // weight.shape[1])
    for i in range(0, len(weight), step):
        rows, part = weight.detach()[i : i + step].float(), slice(i, i + step)
        scale[part] = rows.abs().amax(1).div_(127).clamp_(min=_TINY)
        numbers[part] = (rows / scale[part, None]).round_()
    if int8_works():
        numbers = torch.ops.onednn.qlinear_prepack(numbers, None)
    return Int8(numbers, scale, torch.zeros(len(scale), dtype=torch.int64, device="cpu"))


@not_compiled
def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias + residual (T, M) -> (T, M). parts: the weight's rows, in one or several packed
    pieces. With a residual the result is fp32, whatever x's dtype: a large sum in 16 bits would lose small numbers."""
    products = _products(x, parts, bias)
    if len(x) <= 256 or len(x) in _BLOCKS:  # nothing to put together
        ((_, y),) = products
        return y if residual is None else residual.float() + y
    width = sum(len(part) for part in parts)
    out = torch.empty(len(x), width, dtype=x.dtype if residual is None else torch.float32, device="cpu")
    for rows, y in products:
        if residual is None:
            out[rows] = y
        else:
            torch.add(residual[rows].float(), y, out=out[rows])
    return out


@not_compiled
def gated(
    x: Tensor, activated: Tensor, gate: Tensor, biases: Sequence[Tensor | None], act: str, function: Activation
) -> Tensor:
    """act(x @ activated (N, K)^T) * (x @ gate (N, K)^T) -> (T, N). biases: of both products. function: computes act."""
    out = x.new_empty(len(x), len(gate))
    for rows, block in _blocks(x):
        first = (
            multiply(block, activated, biases[0], "gelu")
            if act == "gelu"
            else function(multiply(block, activated, biases[0]))
        )
        n = rows.stop - rows.start
        torch.mul(first[:n], multiply(block, gate, biases[1])[:n], out=out[rows])
    return out


def _products(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """x (T, K) @ weight^T + bias, one block of rows at a time. Yields the rows, and their product (n, M)."""
    biases = [None] * len(parts) if bias is None else bias.chunk(len(parts))
    for rows, block in _blocks(x):
        ys = [multiply(block, part, b) for part, b in zip(parts, biases, strict=True)]
        yield rows, (ys[0] if len(ys) == 1 else torch.cat(ys, -1))[: rows.stop - rows.start]


def _blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields blocks of x (T, K): the slice, and its rows. Zeros pad the last block to one of _SIZES.

    oneDNN builds kernels for each pair of a weight's shape and a number of rows. Each takes 0.5 to 1 ms to build, and
    keeps half a megabyte. Nearly every batch of ragged texts has a new number of tokens.
    """
    for rows in slices(len(x)):
        yield rows, _with_spare_rows(x[rows])


def slices(count: int, blocks: Sequence[int] = _BLOCKS) -> Iterator[slice]:
    """700 -> slice(0, 512), slice(512, 700)"""
    start = 0
    while start < count:
        size = next((block for block in blocks if block <= count - start), count - start)
        yield slice(start, start + size)
        start += size


def _with_spare_rows(x: Tensor) -> Tensor:
    """(n, K) -> (next of _SIZES, K), contiguous. n is at most 256, or one of _BLOCKS. (oneDNN multiplies a strided x
    without vector instructions, a thousand times slower.)"""
    spare = _SIZES[bisect_left(_SIZES, len(x))] - len(x)
    return F.pad(x, (0, 0, 0, spare)) if spare else x.contiguous()


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, post: str = "none") -> Tensor:
    algorithm = "none" if post == "gelu" else ""  # of gelu: "none" is the exact one, by erf
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, post, [], algorithm)


def _quantized_rows(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of x (T, K) fp32: the rows, their numbers (n, K) uint8 (128 stands for 0) and their scales (n, 1).

    The scale is per row, not per batch: a text's numbers don't depend on the texts beside it. The numbers are unsigned,
    because oneDNN's products of signed activations were seen to hang.
    """
    for rows in slices(len(x), _BLOCKS[1:]):  # what lies between the numbers and the result stays in the caches
        part = x[rows]
        scale = part.abs().amax(1, keepdim=True).div_(127).clamp_(min=_TINY)
        numbers = (part * scale.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        yield rows, numbers, scale


def _int8_product(numbers: Tensor, weight: Int8) -> Tensor:
    """(n, K) uint8 @ weight (M, K)^T -> (n, M) fp32."""
    return torch.ops.onednn.qlinear_pointwise(
        _with_spare_rows(numbers), 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], ""
    )[: len(numbers)]  # fmt: skip


# ---- what works and pays on this machine: asked once a process ----


@functools.cache
def pays(dtype: torch.dtype) -> bool:
    """Whether to pack weights of this dtype here: the operators are there, are right, and are faster than F.linear.

    In 16 bits torch's own product is oneDNN's too, but packs the weight anew for every call. In fp32 torch's product is
    MKL's, which is written for Intel. On AMD packing is 1.1 times (Zen 4) to 2.3 times (Zen 5) as fast, and more for
    short batches (bench/LOG.md). On other CPUs a few milliseconds of measuring decide. The gain that is asked for is
    large, so that noise can't make one: two processes on one machine must give the same numbers.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or not works(dtype):
        return False
    return dtype != torch.float32 or "AuthenticAMD" in _cpu_vendor() or gain() > 1.25


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def works(dtype: torch.dtype) -> bool:
    """Probes the internal operators once, on a small product. Warns if they fail or give other numbers."""
    fp32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    x, weight = torch.linspace(-1, 1, 21, **fp32).view(3, 7), torch.linspace(-1, 2, 35, **fp32).view(5, 7)
    bias = torch.ones(5, **fp32)
    product = F.linear(x, weight, bias)
    try:
        if not supported(dtype):
            return False
        x16, bias16 = x.to(dtype), bias.to(dtype)
        (packed,) = pack(weight.to(dtype))
        results = [
            (multiply(x16, packed, bias16), product),
            (multiply(x16, packed, bias16, "gelu"), F.gelu(product)),
            (packed.to_dense(), weight),
        ]
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        same = all(torch.allclose(got.float(), expected, atol=tolerance) for got, expected in results)
    except (AttributeError, RuntimeError, TypeError) as error:
        warn(f"this torch has no usable oneDNN linear ({error}); using F.linear")
        return False
    if not same:
        warn("this torch's oneDNN linear gives other numbers than F.linear; using F.linear")
    return same


def supported(dtype: torch.dtype) -> bool:
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return dtype not in checks or bool(getattr(torch.ops.mkldnn, checks[dtype])())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def int8_works() -> bool:
    """Probes the product of 8-bit numbers once, at the extremes too: a CPU without VNNI may add in 16 bits, and
    overflow. Where it doesn't work, int8 weights are made dense for every product: small, right, and slow."""
    weight = torch.full((5, 70), 127, dtype=torch.int8, device="cpu")
    weight[1:3], weight[3, ::2] = -127, 3
    numbers = torch.full((3, 70), 255, dtype=torch.uint8, device="cpu")
    numbers[1], numbers[2, 1::3] = 0, 77
    expected = (numbers.int() - 128) @ weight.int().t()
    try:
        ones = torch.ones(5, dtype=torch.float32, device="cpu")
        packed = Int8(
            torch.ops.onednn.qlinear_prepack(weight, None), ones, torch.zeros(5, dtype=torch.int64, device="cpu")
        )
        exact = torch.equal(_int8_product(numbers, packed), expected.float())
        exact = exact and torch.equal(packed.dense(), weight.float())
    except (AttributeError, RuntimeError, TypeError) as error:
        warn(f"this torch has no usable oneDNN int8 linear ({error}); int8 is slow here")
        return False
    if not exact:
        warn("this CPU's oneDNN int8 linear isn't exact; int8 is slow here")
    return exact


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def gain() -> float:
    """How many times as fast as F.linear the packed fp32 product is. Measured here, in a few milliseconds."""
    x, weight = (torch.ones(rows, 768, dtype=torch.float32, device="cpu") for rows in (128, 768))
    (packed,) = pack(weight)
    runs: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight), lambda: multiply(x, packed, None)]
    times: list[list[float]] = [[], []]
    for _ in range(6):  # in turns, and the best of each counts: other processes disturb
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


@functools.cache
def _cpu_vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()
