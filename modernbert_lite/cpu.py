"""Fast CPU implementations behind `ops`: oneDNN products with packed weights, banded attention as batched products.

The oneDNN operators are the ones that torch's own compiler emits; their names are internal, so they are probed once,
checked against F.linear, and left alone where they are missing or wrong.
"""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Packed copies of weights, by the weight itself: they go when it goes, and are made anew when it is written to
# (but not in place through `.data`, which torch hides).
_packed: Any = WeakIdKeyDictionary()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether to multiply fp32 matrices by oneDNN here: the operators are there and agree, and the CPU isn't Intel's.

    torch's own fp32 product is MKL, which is written for Intel; on AMD (Zen 4) oneDNN measured 1.1x at (2048, 768) by
    (2304, 768), and more for shorter batches: bench/LOG.md.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if "GenuineIntel" in _cpu_vendor():
        return False
    return onednn_works()


@functools.cache
def onednn_works() -> bool:
    """Probes the internal operators once on a small product; warns and says no where they fail or differ."""
    x, weight, other = torch.linspace(-1, 1, 21).view(3, 7), torch.linspace(-1, 2, 35).view(5, 7), torch.ones(3, 5)
    product, bias = F.linear(x, weight, other[0]), other[0]
    try:
        packed = _pack(weight)
        results = [
            (_multiply(x, packed, bias), product),
            (_multiply(x, packed, bias, "gelu"), F.gelu(product)),
            (_multiply_and(x, other, packed, bias, "add"), product + 1),
            (_multiply_and(x, other * 2, packed, bias, "mul"), product * 2),
        ]
        same = all(torch.allclose(got, expected, atol=1e-5) for got, expected in results)
    except (AttributeError, RuntimeError, TypeError) as error:
        warnings.warn(f"this torch has no usable oneDNN linear ({error}); using F.linear", stacklevel=2)
        return False
    if not same:
        warnings.warn("this torch's oneDNN linear gives other numbers than F.linear; using F.linear", stacklevel=2)
    return same


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Inference in fp32 on the CPU with a weight whose changes can be seen."""
    plain = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return plain and not tracked and not weight.is_inference() and x.dim() == 2 and len(x) > 0 and onednn_works()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias + residual (T, M) -> (T, M), fp32, the weight packed once."""
    packed = _packed_parts(weight, 1)[0]
    return _multiply(x, packed, bias) if residual is None else _multiply_and(x, residual, packed, bias, "add")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x @ first half of weight (2N, K)) * (x @ second half) -> (T, N), nothing between the products."""
    first, second = _packed_parts(weight, 2)
    bias1, bias2 = (None, None) if bias is None else bias.chunk(2)
    return _multiply_and(x, _multiply(x, first, bias1, "gelu"), second, bias2, "mul")


def _packed_parts(weight: Tensor, parts: int) -> list[Tensor]:
    """The weight's rows in `parts` equal parts, packed."""
    state = (weight._version, weight.data_ptr(), parts)
    if weight not in _packed or _packed[weight][0] != state:
        _packed[weight] = (state, [_pack(part) for part in weight.detach().chunk(parts)])
    return _packed[weight][1]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, post: str = "none") -> Tensor:
    algorithm = "none" if post == "gelu" else ""  # of gelu: "none" is the exact one, by erf
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, post, [], algorithm)


def _multiply_and(x: Tensor, other: Tensor, packed: Tensor, bias: Tensor | None, op: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, op)


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A block of queries against the keys it can see: q (n, H, i, D), k and v (n, H, j, D), mask (i, j) of 0 and -inf.

    Batched products, one sequence at a time so that nothing is copied: twice as fast as the fused attention, which
    splits a short block into products too small to be fast (Zen 4, fp32, 64 queries x 192 keys: 10 ms to 18 ms at
    T = 2048).
    """
    scale = q.shape[-1] ** -0.5
    out = [
        torch.bmm(torch.softmax(torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale), -1), vi)
        for qi, ki, vi in zip(q, k, v, strict=True)
    ]
    return out[0][None] if len(out) == 1 else torch.stack(out)


@functools.cache
def _cpu_vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()
