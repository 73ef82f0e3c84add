"""Fast CPU implementations behind `ops`: oneDNN products with packed weights, in fp32, bf16 and int8; local attention
as batched products, long global attention as products in chunks.

The oneDNN operators are the ones that torch's own compiler emits; their names are internal, so they are probed once,
checked against F.linear, and left alone where they are missing or wrong.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..reading import warn

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ROWS = 256  # of activations that are multiplied at a time: what lies between stays in the caches
# The numbers of rows that are multiplied (see _blocks): 4 in each doubling, from 64 on 8. Fewer than 4 rows take
# as long as 4.
_SIZES = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, *range(64, 128, 8), *range(128, _ROWS + 1, 16))
_QUERIES, _KEYS = 512, 128  # of `chunked_attention`: a chunk, and what the number of keys is a multiple of
_TINY = 1e-30  # the scale of a row of zeros
_READ_ONLY = (
    "this weight is packed for inference: it can't be written to or trained; load the network with packed=False"
)


def _not_compiled(function: _Function) -> _Function:
    """torch.compile leaves it as it is (torch's own marker of that imports the compiler)."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


class PackedWeight(Tensor):
    """A linear layer's weight (M, K) for inference, held only in oneDNN's own layout; its rows in equal `parts`, where
    an activation stands between them. `linear` and `gated_linear` below multiply by it as it is. Any other operation
    sees `dense()`, made for it and dropped after it; to write to it, or ask for its gradient, is a TypeError. (A slice
    is a copy. A deepcopy is packed too; what was pickled comes back dense.)"""

    parts: list[Tensor]
    _is_param = True  # a module takes it as it is: nn.Parameter(it) would import torch.distributed and sympy, 40 MB

    @staticmethod
    def __new__(cls, parts: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    def __init__(self, parts: list[Tensor], shape: torch.Size, dtype: torch.dtype):
        self.parts = parts

    def dense(self) -> Tensor:
        """(M, K), in the layout of any tensor."""
        return torch.cat([part.to_dense() for part in self.parts])

    def _alias(self) -> PackedWeight:
        return PackedWeight(self.parts, self.shape, self.dtype)

    def __setitem__(self, *_: Any) -> None:
        raise TypeError(_READ_ONLY)  # torch would write to a copy

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise TypeError(_READ_ONLY)
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    @property
    def data(self) -> Tensor:
        return self._alias()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise TypeError(_READ_ONLY)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self._alias()  # nothing can write to the one that they share

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.dense(), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a method of an object in torch's stubs
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            with torch.inference_mode(args[0].is_inference()):  # a view is made in the mode of what it is of
                return args[0]._alias()
        if func._schema.is_mutable and any(isinstance(x, PackedWeight) for x in tree_leaves((args, kwargs))):
            raise TypeError(_READ_ONLY)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not func.is_view):
            args, kwargs = tree_map_only(PackedWeight, lambda weight: weight.dense(), (args, kwargs or {}))
            return func(*args, **kwargs)


class Int8Weight(PackedWeight):
    """The same in 8 bits: each row of the weight is a row of whole numbers of -127 to 127 times its `scale` (M,)."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8Weight:
        shape = (len(scale), numbers.numel() // len(scale))
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, numbers: Tensor, scale: Tensor):
        self.parts, self.scale = [numbers], scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int64, device="cpu")

    def dense(self) -> Tensor:
        (numbers,) = self.parts
        rows = numbers.to_dense().t().contiguous() if numbers.is_mkldnn else numbers
        return rows.float().mul_(self.scale[:, None])

    def _alias(self) -> Int8Weight:
        return Int8Weight(self.parts[0], self.scale)


def pack(weight: Tensor, parts: int = 1) -> PackedWeight:
    """(M, K) fp32, bf16 or fp16 -> the same numbers, packed."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(part, None) for part in weight.detach().chunk(parts)]
    return PackedWeight(packed, weight.shape, weight.dtype)


def quantize(weight: Tensor) -> Int8Weight:
    """(M, K) -> 8 bits, each row scaled by its own largest number; packed where oneDNN's int8 product works."""
    # Few rows at a time (too few to wait for other threads), and into memory that isn't aligned: freed aligned blocks
    # don't fit the next ones of their size (glibc), and a network's worth of them stayed.
    numbers = torch.frombuffer(bytearray(weight.numel()), dtype=torch.int8).view(weight.shape)
    scale = torch.empty(len(weight), dtype=torch.float32, device="cpu")
    step = max(1, 32_768 // weight.shape[1])
    for i in range(0, len(weight), step):
        rows, part = weight.detach()[i : i + step].float(), slice(i, i + step)
        scale[part] = rows.abs().amax(1).div_(127).clamp_(min=_TINY)
        numbers[part] = (rows / scale[part, None]).round_()
    return Int8Weight(torch.ops.onednn.qlinear_prepack(numbers, None) if int8_works() else numbers, scale)


@_not_compiled
def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias + residual (T, M) -> (T, M); with a residual in fp32, whatever x is in: small
    sums added to a large one would be lost in 16 bits."""
    if isinstance(weight, Int8Weight):
        out = x.new_empty(len(x), len(weight))
        for rows, numbers, scale in _quantized_rows(x):
            product = _int8_product(numbers, weight)
            if residual is None:
                torch.mul(product, scale, out=out[rows])
            else:
                torch.addcmul(residual[rows], product, scale, out=out[rows])
        return out if bias is None else out.add_(bias)
    products = _products(x, weight, bias)
    if len(x) <= _ROWS:  # nothing to put together
        ((_, y),) = products
        return y if residual is None else residual.float() + y
    out = torch.empty(len(x), len(weight), dtype=x.dtype if residual is None else torch.float32, device="cpu")
    for rows, y in products:
        if residual is None:
            out[rows] = y
        else:
            torch.add(residual[rows].float(), y, out=out[rows])
    return out


@_not_compiled
def gated_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, act: str, function: Any, swapped: bool = False
) -> Tensor:
    """act(x @ first half of weight (2N, K)) * (x @ second half) -> (T, N), `function` being act; swapped: the other
    way round."""
    order = -1 if swapped else 1
    if isinstance(weight, Int8Weight):
        out = x.new_empty(len(x), len(weight) // 2)
        for rows, numbers, scale in _quantized_rows(x):
            product = _int8_product(numbers, weight).mul_(scale)
            activated, gate = (product if bias is None else product.add_(bias)).chunk(2, -1)[::order]
            torch.mul(function(activated), gate, out=out[rows])
        return out
    first, second = weight.parts[::order]
    bias1, bias2 = (None, None) if bias is None else bias.chunk(2)[::order]
    out = x.new_empty(len(x), len(weight) // 2)
    for rows, block in _blocks(x):
        activated = (
            _multiply(block, first, bias1, "gelu") if act == "gelu" else function(_multiply(block, first, bias1))
        )
        n = rows.stop - rows.start
        torch.mul(activated[:n], _multiply(block, second, bias2)[:n], out=out[rows])
    return out


def _products(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """x (T, K) @ weight (M, K)^T + bias, some rows at a time: which, and their (n, M)."""
    biases = [None] * len(weight.parts) if bias is None else bias.chunk(len(weight.parts))
    for rows, block in _blocks(x):
        parts = [_multiply(block, part, b) for part, b in zip(weight.parts, biases, strict=True)]
        yield rows, (parts[0] if len(parts) == 1 else torch.cat(parts, -1))[: rows.stop - rows.start]


def _blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x (T, K) in blocks of _ROWS rows: the slice, and its rows. Zeros fill the last block up to one of _SIZES.

    For every number of rows that oneDNN meets with a weight's shape it builds kernels, 0.5 to 1 ms and half a megabyte
    that it keeps. Ragged texts bring a new number of tokens with nearly every batch."""
    for start in range(0, len(x), _ROWS):
        rows = slice(start, min(start + _ROWS, len(x)))
        yield rows, _with_spare_rows(x[rows])


def _with_spare_rows(x: Tensor) -> Tensor:
    """(n, K), n up to _ROWS -> (the next of _SIZES, K), contiguous. (A strided x goes through loops without vectors, a
    thousand times slower.)"""
    spare = _SIZES[bisect_left(_SIZES, len(x))] - len(x)
    return F.pad(x, (0, 0, 0, spare)) if spare else x.contiguous()


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, post: str = "none") -> Tensor:
    algorithm = "none" if post == "gelu" else ""  # of gelu: "none" is the exact one, by erf
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, post, [], algorithm)


def _quantized_rows(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """x (T, K) fp32, some rows at a time: which, their numbers (n, K) uint8, 128 standing for 0, and scales (n, 1).

    A scale a row, not a batch: a text's numbers don't depend on the texts beside it. Unsigned, because oneDNN's
    products of signed activations were seen to hang.
    """
    for start in range(0, len(x), _ROWS):
        rows = slice(start, min(start + _ROWS, len(x)))
        part = x[rows]
        scale = part.abs().amax(1, keepdim=True).div_(127).clamp_(min=_TINY)
        numbers = (part * scale.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        yield rows, numbers, scale


def _int8_product(numbers: Tensor, weight: Int8Weight) -> Tensor:
    """(n, K) uint8 @ weight (M, K)^T -> (n, M) fp32."""
    weights = (weight.parts[0], weight.scale, weight.zero_points)
    return torch.ops.onednn.qlinear_pointwise(
        _with_spare_rows(numbers), 1.0, 128, *weights, None, 1.0, 0, torch.float32, "none", [], ""
    )[: len(numbers)]  # fmt: skip


# ---- what works and pays on this machine: asked once a process ----


@functools.cache
def pays(dtype: torch.dtype) -> bool:
    """Whether to pack weights of the dtype here: the operators are there and agree, and are faster than F.linear.

    In 16 bits torch's own product is oneDNN's too, with the weight packed anew for every call. In fp32 it is MKL's,
    which is written for Intel: on AMD packing measured 1.1x (Zen 4) and 2.3x (Zen 5), more for short batches
    (bench/LOG.md). Elsewhere a few milliseconds of multiplying decide, and a gain must be large enough that noise
    doesn't make one: two processes of a machine are to give the same numbers.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or not works(dtype):
        return False
    return dtype != torch.float32 or "AuthenticAMD" in _cpu_vendor() or gain() > 1.25


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def works(dtype: torch.dtype) -> bool:
    """Probes the internal operators once on a small product; warns and says no where they fail or differ."""
    fp32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    x, weight = torch.linspace(-1, 1, 21, **fp32).view(3, 7), torch.linspace(-1, 2, 35, **fp32).view(5, 7)
    bias = torch.ones(5, **fp32)
    product = F.linear(x, weight, bias)
    try:
        if not _supported(dtype):
            name = str(dtype).removeprefix("torch.")
            warn(f"this CPU has no fast {name} products; float32 or int8 may be faster")
            return False
        x16, bias16 = x.to(dtype), bias.to(dtype)
        packed = pack(weight.to(dtype)).parts[0]
        results = [
            (_multiply(x16, packed, bias16), product),
            (_multiply(x16, packed, bias16, "gelu"), F.gelu(product)),
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


def _supported(dtype: torch.dtype) -> bool:
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return dtype not in checks or bool(getattr(torch.ops.mkldnn, checks[dtype])())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def int8_works() -> bool:
    """The same of the product of 8-bit numbers, at their extremes too: CPUs without VNNI instructions may add up in 16
    bits, and overflow. Where it doesn't work int8 weights are made dense for every product: small, right, and slow."""
    weight = torch.full((5, 70), 127, dtype=torch.int8, device="cpu")
    weight[1:3], weight[3, ::2] = -127, 3
    numbers = torch.full((3, 70), 255, dtype=torch.uint8, device="cpu")
    numbers[1], numbers[2, 1::3] = 0, 77
    expected = (numbers.int() - 128) @ weight.int().t()
    try:
        packed = Int8Weight(
            torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(5, dtype=torch.float32, device="cpu")
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
    """How much faster than F.linear the packed fp32 product is, measured here for a few milliseconds."""
    x, weight = (torch.ones(rows, 768, dtype=torch.float32, device="cpu") for rows in (128, 768))
    packed = pack(weight).parts[0]
    runs: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight), lambda: _multiply(x, packed, None)]
    times: list[list[float]] = [[], []]
    for _ in range(6):  # in turns, and the best of each: other processes disturb
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


# ---- attention ----


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor) -> None:
    """A block of queries against the keys it can see: q (n, H, i, D), k and v (n, H, j, D), mask (i, j) of 0 and -inf,
    into out (n, H, i, D).

    Batched products, one sequence at a time so that nothing is copied: twice as fast as the fused attention, which
    splits a short block into products too small to be fast (Zen 4, fp32, 64 queries x 192 keys: 10 ms to 18 ms at
    T = 2048).
    """
    scale = q.shape[-1] ** -0.5
    for qi, ki, vi, to in zip(q, k, v, out, strict=True):
        to.copy_(torch.bmm(torch.softmax(torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale), -1), vi))


def attends_in_chunks(length: int, dtype: torch.dtype) -> bool:
    """Whether global attention over so many tokens is faster as `chunked_attention` than by torch's fused one, whose
    products are MKL's, in fp32: measured on Zen 4 and 5, bench/LOG.md."""
    if dtype == torch.bfloat16:
        return length >= 1024 and pays(dtype)
    return dtype == torch.float32 and length >= 4096 and pays(dtype) and gain() > 1.8


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Global attention by oneDNN's products in `dtype`, some queries of a head at a time over all its keys, into `out`:
    all (n, H, S, D)."""
    # Softmax doesn't see what all keys have in common; without it scores are smaller, and round less.
    k = k - k.mean(2, keepdim=True)
    q = q * q.shape[-1] ** -0.5
    more = -k.shape[2] % _KEYS  # padding, so that oneDNN meets few sizes: see _blocks
    for qh, kh, vh, oh in (x for b in zip(q, k, v, out, strict=True) for x in zip(*b, strict=True)):  # (S, D)
        queries, keys, values = (F.pad(x.to(dtype), (0, 0, 0, more)) for x in (qh, kh, vh))
        values = values.t().contiguous()
        for i in range(0, len(qh), _QUERIES):
            scores = _multiply(queries[i : i + _QUERIES].contiguous(), keys.contiguous(), None)
            scores[:, len(kh) :] = -math.inf
            to = oh[i : i + _QUERIES]
            to.copy_(_multiply(torch.softmax(scores, -1), values, None)[: len(to)])


def rounding(weight: Tensor) -> torch.dtype:
    """In which dtype to go on from a product that is rounded already: of 8-bit weights bfloat16, if the CPU has it."""
    int8 = isinstance(weight, Int8Weight) and _supported(torch.bfloat16)
    return torch.bfloat16 if int8 else weight.dtype
