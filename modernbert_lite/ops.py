"""The operations of the forward pass: the plain torch reference of each, and the one place that chooses a backend.

Each reference is the specification, the portable fallback and the tests' oracle in one. Letters: T tokens in the
batch, H heads, D head_dim, N intermediate_size, C hidden_size, S length of a sequence.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import PackedBatch
from .config import Rope

OPS = ("linear", "layer_norm", "rope", "attention", "geglu")
BACKENDS = ("auto", "torch", "triton", "onednn")
# The fast implementations beside the reference, by op. Triton is taken on request only, until it is chosen by
# measurements on real cards.
_FAST = {"attention": ("onednn",), "geglu": ("triton",), "linear": ("onednn",)}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, by erf
    "silu": F.silu,
    "relu": F.relu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def backend(op: str, x: Tensor) -> str:
    """The backend that runs `op` on `x`: by its device, dtype and what the machine can do, or as
    MODERNBERT_LITE_BACKEND says, where the op has that backend for such a tensor ("onednn" stands for everything in
    cpu.py, which is fp32 only). Raises ValueError for an unknown name there."""
    wanted = os.environ.get("MODERNBERT_LITE_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"MODERNBERT_LITE_BACKEND is {wanted!r}; it must be one of {', '.join(BACKENDS)}")
    fast = _FAST.get(op, ())
    if "onednn" in fast and wanted in ("auto", "onednn") and x.device.type == "cpu" and x.dtype == torch.float32:
        from . import cpu

        if op != "linear" or (cpu.onednn_works() if wanted == "onednn" else cpu.onednn_is_faster()):
            return "onednn"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if "triton" in fast and wanted == "triton" and (x.is_cuda or interpreted) and _triton_works(x.device):
        return "triton"
    return "torch"


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Runs a kernel once: triton may be missing, or the C compiler that it needs."""
    try:
        from .kernels import geglu as kernel

        one = torch.ones(1, 1, device=device)
        return bool(torch.isfinite(kernel.geglu(one, one, "gelu")).all())
    except Exception as error:  # noqa: BLE001  triton raises errors of many kinds; none of them need stop the work
        warnings.warn(f"triton can't be used here ({error}); using torch", stacklevel=2)
        return False


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function that a config names."""
    return _ACTIVATIONS[name]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias (M,) + residual (T, M) -> (T, M)."""
    if backend("linear", x) == "onednn":
        from . import cpu

        if cpu.can_multiply(x, weight):
            return cpu.linear(x, weight, bias, residual)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """`linear` to (T, 2N), then act(first half) * second half -> (T, N): ModernBERT's GeGLU (arXiv 2002.05202)."""
    if backend("linear", x) == "onednn" and act == "gelu":
        from . import cpu

        if cpu.can_multiply(x, weight):
            return cpu.gelu_linear(x, weight, bias)
    activated, gate = linear(x, weight, bias).chunk(2, dim=-1)
    return geglu(activated, gate, act)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(T, C) -> (T, C), statistics over C; weight and bias (C,)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def geglu(activated: Tensor, gate: Tensor, act: str) -> Tensor:
    """act(activated) * gate, both (T, N), usually the two halves of one (T, 2N): ModernBERT activates the first."""
    tracked = torch.is_grad_enabled() and (activated.requires_grad or gate.requires_grad)  # the kernel has no backward
    if backend("geglu", activated) == "triton" and act in ("gelu", "silu") and not tracked:
        from .kernels import geglu as kernel

        return kernel.geglu(activated, gate, act)
    return activation(act)(activated) * gate


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor may meet autograd later
def _inverse_frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """(D / 2,) fp32: theta^(-2j/D), stretched as `rope.type` says (yarn: arXiv 2309.00071, section 3.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = rope.theta**exponents
    if rope.type == "default":
        inverse = 1.0 / base
    elif rope.type == "linear":
        inverse = 1.0 / base / rope.factor
    else:

        def dimension(rotations: float) -> float:  # the pair that turns this often over the original length
            turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        span = high - low if high != low else 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        inverse = ramp / (rope.factor * base) + (1 - ramp) / base
    return inverse.to(device)


def rope_table(rope: Rope, head_dim: int, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, (T, D / 2) each, always fp32 (bf16 tables lose whole positions)."""
    angles = position_ids[:, None].float() * _inverse_frequencies(rope, head_dim, position_ids.device)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates q and k of qkv (T, 3, H, D) in place and returns it; cos and sin (T, D / 2) fp32; v stays.

    Split halves (NeoX): pair j is (x[j], x[j + D/2]) -> (x1 cos - x2 sin, x2 cos + x1 sin), computed in fp32.
    """
    half = qkv.shape[-1] // 2
    first, second = qkv[:, :2, :, :half], qkv[:, :2, :, half:]  # (T, 2, H, D / 2)
    cos, sin = cos[:, None, None], sin[:, None, None]
    x1, x2 = first.float(), second.float()  # the same memory in fp32, copies otherwise
    x1_sin = x1 * sin
    x1.mul_(cos).addcmul_(x2, sin, value=-1.0)
    x2.mul_(cos).add_(x1_sin)
    if qkv.dtype != torch.float32:
        first.copy_(x1)
        second.copy_(x2)
    return qkv


LOCAL_BLOCK = 64  # queries a call in a local layer: they see LOCAL_BLOCK + 2 * 64 keys


def attention(qkv: Tensor, batch: PackedBatch, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """Bidirectional attention inside each sequence: qkv (T, 3, H, D) -> (T, H, D), scaled by D^-0.5.

    Token i sees the tokens from i - left to i + right of its own sequence, inclusive; -1 is unlimited. A local
    window costs O(T * window): blocks of queries meet only the keys that they can see.
    """
    left, right = window_size
    out = torch.empty_like(qkv[:, 0])
    for start, count, length in _runs(batch.seqlens):
        span = slice(start, start + count * length)
        q, k, v = (x.transpose(1, 2) for x in qkv[span].unflatten(0, (count, length)).unbind(2))  # (n, H, S, D)
        to = out[span].unflatten(0, (count, length)).transpose(1, 2)
        if (left < 0 or left >= length - 1) and (right < 0 or right >= length - 1):
            to.copy_(F.scaled_dot_product_attention(q, k, v))
            continue
        block_attention = _block_attention(qkv)
        for i in range(0, length, LOCAL_BLOCK):
            j = min(i + LOCAL_BLOCK, length)
            low = 0 if left < 0 else max(0, i - left)
            high = length if right < 0 else min(length, j + right)
            mask = _window_mask(j - i, high - low, i - low, left, right, qkv.dtype, qkv.device)
            to[:, :, i:j] = block_attention(q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], mask)
    return out


def _block_attention(qkv: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if backend("attention", qkv) == "onednn":
        from . import cpu

        return cpu.block_attention
    return F.scaled_dot_product_attention


def _runs(seqlens: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of equal length, to share a call: [5, 5, 2] -> (start 0, count 2, length 5), (10, 1, 2)."""
    start = 0
    for length, group in groupby(seqlens):
        count = sum(1 for _ in group)
        if length:
            yield start, count, length
        start += count * length


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # a cached tensor may meet autograd later
def _window_mask(
    queries: int, keys: int, offset: int, left: int, right: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(queries, keys), 0 where query i (which is key i + offset) sees key j and -inf where it doesn't."""
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - offset
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
