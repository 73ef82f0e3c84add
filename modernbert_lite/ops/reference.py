"""The operations of the forward pass: the plain torch reference of each, and the one place that chooses a backend.

Each reference is the specification, the portable fallback and the tests' oracle in one. Letters: T tokens in the
batch, H heads, D head_dim, N intermediate_size, C hidden_size, S length of a sequence.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, ParamSpec, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch, constant
from ..reading import OptionError, warn
from .rope import Rope, cached, position_table, rope_table

if TYPE_CHECKING:
    from .cpu import PackedWeight

P = ParamSpec("P")
OPS = ("linear", "layer_norm", "rope", "attention", "geglu", "pooling")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "torch", "triton", "onednn")
# The fast implementations beside the reference, by op: onednn in cpu.py, triton in gpu.py.
_FAST = {
    "attention": ("onednn", "triton"),
    "geglu": ("triton",),
    "layer_norm": ("triton",),
    "linear": ("onednn",),
    "pooling": ("triton",),
    "rope": ("triton",),
}

# As `config.ACTIVATIONS`.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, by erf
    "silu": F.silu,
    "relu": F.relu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    # Written out as their checkpoints were trained with them: they differ from F.gelu by up to 1e-6.
    "gelu_fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "gelu_new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
    "gelu_python": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2))),
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),  # arXiv 2209.10655
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "tanh": torch.tanh,
}


def backend(op: str, x: Tensor) -> str:
    """The backend that runs `op` on `x`: by its device, dtype and what the machine can do, or as
    MODERNBERT_LITE_BACKEND says, where the op has that backend for such a tensor ("onednn" stands for everything in
    cpu.py). Raises ValueError for an unknown name there."""
    return _choose(op, x.device, x.dtype)


@constant
def _wanted() -> str:
    wanted = os.environ.get("MODERNBERT_LITE_BACKEND") or "auto"
    if wanted not in BACKENDS:
        raise OptionError(f"MODERNBERT_LITE_BACKEND is {wanted!r}; it must be one of {', '.join(BACKENDS)}")
    return wanted


@constant
def _choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    wanted = _wanted()
    fast = _FAST.get(op, ())
    onednn = wanted in ("auto", "onednn") and not torch.compiler.is_compiling()  # which has its own use of it
    if "onednn" in fast and onednn and device.type == "cpu" and dtype in _FLOATS:
        from . import cpu

        if op != "linear" or (cpu.works(dtype) if wanted == "onednn" else cpu.pays(dtype)):
            return "onednn"
    interpreted = wanted == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "triton" and device.type != "cuda" and not interpreted:
        _warn_of_no_gpu(device.type)
    if "triton" in fast and wanted in ("auto", "triton") and (device.type == "cuda" or interpreted):
        from . import gpu

        if dtype in gpu.DTYPES and gpu.works(device):
            return "triton"
    return "torch"


@functools.cache
def _warn_of_no_gpu(device: str) -> None:
    warn(
        f"MODERNBERT_LITE_BACKEND is 'triton', but its kernels need a GPU, and this tensor is on {device!r}; using "
        "torch. (To have them interpreted, slowly, set TRITON_INTERPRET=1 before Python starts)",
    )


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function that a config names."""
    return _ACTIVATIONS[name]


def pack_weight(weight: Tensor, parts: int = 1, dtype: str | None = None) -> Tensor:
    """A linear weight (M, K) as inference here wants it: packed, where that pays; "int8": in 8 bits, on any CPU; or as
    it is. parts: 2 where an activation stands between the products of its two halves (gated_linear)."""
    if dtype == "int8" or (not is_packed(weight) and backend("linear", weight) == "onednn"):
        from . import cpu

        return cpu.quantize(weight) if dtype == "int8" else cpu.pack(weight, parts)
    return weight


def is_packed(weight: Tensor) -> TypeGuard[PackedWeight]:
    """Whether `pack_weight` packed it (without importing what packs)."""
    return hasattr(weight, "parts")


def _multiplies_packed(weight: Tensor, x: Tensor, *others: Tensor | None) -> TypeGuard[PackedWeight]:
    """Whether cpu.py takes the product: of a packed weight, in inference, unless another backend is asked for."""
    if not is_packed(weight) or _wanted() not in ("auto", "onednn"):
        return False
    if torch.compiler.is_compiling():  # without fullgraph this runs as it is instead
        raise RuntimeError("packed weights can't be compiled: load the network with packed=False")
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    tracked = tracked or torch.autograd.forward_ad._current_level >= 0
    # (8-bit weights on a CPU that can't multiply them are not oneDNN's.)
    usable = weight.parts[0].is_mkldnn and x.dtype == weight.dtype and x.dim() == 2 and len(x) > 0
    return usable and not tracked


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias (M,) + residual (T, M) -> (T, M). In inference the result may be written over
    residual, which the caller must not use again."""
    if _multiplies_packed(weight, x, bias, residual):
        from . import cpu

        return cpu.linear(x, weight, bias, residual)
    if residual is not None and bias is None and _can_accumulate(x, weight, residual):
        # The matrix product adds it on its way out, and rounds once: in 16 bits 4 bytes a number less than an addition
        # after it, which would write the product, and read it again.
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def linear_part(x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """Some columns of `linear`'s result: x (T, K) @ weight[part]^T + bias[part]."""
    if _multiplies_packed(weight, x, bias):  # as a whole: it can't be cut
        return linear(x, weight, bias)[:, part]
    return F.linear(x, weight[part], None if bias is None else bias[part])


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, swapped: bool = False) -> Tensor:
    """`linear` to (T, 2N), then act(first half) * second half -> (T, N): ModernBERT's GeGLU (arXiv 2002.05202).
    swapped: first half * act(second half), GTE's."""
    if _multiplies_packed(weight, x, bias):
        from . import cpu

        return cpu.gated_linear(x, weight, bias, act, activation(act), swapped)
    y = linear(x, weight, bias)
    if act in ("gelu", "silu") and backend("geglu", y) == "triton":
        from . import gpu

        return gpu.geglu(y, act, swapped)
    activated, gate = y.chunk(2, dim=-1)[:: -1 if swapped else 1]
    return geglu(activated, gate, act)


def _can_accumulate(x: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """On a GPU, where nothing tracks the residual and no autocast stands between the dtypes."""
    if not x.is_cuda or not x.dtype == weight.dtype == residual.dtype or torch.is_autocast_enabled():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or residual.requires_grad))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """(T, C) -> (T, C), statistics over C; weight and bias (C,). With a residual (T, C), of x + residual. The result is
    in the weight's dtype where x, a sum that a fast `linear` keeps in fp32, is wider."""
    wide = x.device.type == "cpu" and x.dtype == torch.float32 != weight.dtype
    if not wide and _norms_by_a_kernel(x, weight, bias, residual):
        from . import gpu

        return gpu.layer_norm(x, weight, bias, eps, residual)
    x = x if residual is None else residual + x
    if wide:
        y = F.layer_norm(x, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)
        return y.to(weight.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norms_by_a_kernel(x: Tensor, *others: Tensor | None) -> bool:
    if not _fits_a_kernel(x) or backend("layer_norm", x) != "triton":
        return False
    from . import gpu

    # With a gradient torch's own, whose backward pass is hard to beat at these widths: bench/bench_layer_norm.py.
    return not gpu.wants_gradient(x, *others) and not torch.is_autocast_enabled()


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: tuple[Tensor, Tensor | None, float],
) -> Tensor:
    """layer_norm(linear(x) + residual), (T, K) -> (T, M): the end of a post-norm layer's halves. norm: the weight, bias
    and eps of layer_norm. As with `linear`, residual may be written over."""
    if _multiplies_packed(weight, x, bias, residual):
        return layer_norm(linear(x, weight, bias, residual), *norm)
    return layer_norm(linear(x, weight, bias), *norm, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(T, C) -> (T, C): x over the root of its mean square (arXiv 1910.07467), in fp32, times weight (C,)."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(weight.dtype)


def _fits_a_kernel(x: Tensor) -> bool:
    """(T, C), rows contiguous and no wider than a Triton program holds."""
    return x.dim() == 2 and x.stride(1) == 1 and x.shape[1] <= 8192


def geglu(activated: Tensor, gate: Tensor, act: str) -> Tensor:
    """act(activated) * gate, both (T, N), usually the two halves of one (T, 2N): ModernBERT activates the first."""
    return activation(act)(activated) * gate


Rotation = tuple[Tensor, Tensor, "Tensor | None"]


def rotation(rope: Rope, head_dim: int, batch: PackedBatch) -> Rotation:
    """What `rope_` needs for the batch: cos and sin of each token, or of each position and every token's position."""
    ids = batch.position_ids
    if rope.by_length:
        return *rope_table(rope, head_dim, ids, batch.cu_seqlens.diff()[_owners(batch)]), None
    if _choose("rope", ids.device, torch.float32) != "triton" or torch.compiler.is_compiling():
        return *rope_table(rope, head_dim, ids), None
    cos, sin = position_table(rope, head_dim, ids.device, max(512, 1 << (batch.max_seqlen - 1).bit_length()))
    return cos, sin, ids


def rotation_at(turn: Rotation, rows: Tensor) -> Rotation:
    """The rotation of the tokens `rows`."""
    cos, sin, position_ids = turn
    return (cos[rows], sin[rows], None) if position_ids is None else (cos, sin, position_ids[rows])


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Rotates q and k of qkv (T, 3, H, D) in place and returns it; v stays. Also k of kv (T, 2, H, D), q (T, 1, H, D).
    For the CPU's attention 16 bits become fp32, a copy: one conversion there is faster than many, and rounds less.

    cos, sin (T, D / 2) fp32; with position_ids (T,), (P, D / 2), a row a position. Split halves (NeoX): pair j is
    (x[j], x[j + D/2]) -> (x1 cos - x2 sin, x2 cos + x1 sin), computed in fp32.
    """
    if backend("rope", qkv) == "triton":
        from . import gpu

        return gpu.rope_(qkv, cos, sin, position_ids)
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    if qkv.dtype != torch.float32 and backend("attention", qkv) == "onednn":
        qkv = qkv.float()
    half, turned = qkv.shape[-1] // 2, max(1, qkv.shape[1] - 1)
    first, second = qkv[:, :turned, :, :half], qkv[:, :turned, :, half:]  # (T, 2, H, D / 2)
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


def attention(
    qkv: Tensor, batch: PackedBatch, window_size: tuple[int, int] = (-1, -1), weight: Tensor | None = None
) -> Tensor:
    """Bidirectional attention inside each sequence: qkv (T, 3, H, D) -> (T, H, D), scaled by D^-0.5. weight: what made
    qkv; the result is in its dtype, and long attention on the CPU rounds as it does.

    Token i sees the tokens from i - left to i + right of its own sequence, inclusive; -1 is unlimited. A local
    window costs O(T * window): blocks of queries meet only the keys that they can see. With batch.key_seqlens only the
    first so many tokens of a sequence are seen, by all of it; a token that sees none gets zeros.
    """
    whole = batch.key_seqlens is None
    triton = backend("attention", qkv) == "triton"
    if triton or (qkv.is_cuda and _wanted() != "torch"):
        from . import gpu

        usable = triton and gpu.can_attend(qkv) and not gpu.wants_gradient(qkv)
        if usable and (whole or not torch.compiler.is_compiling()):
            return gpu.attention(qkv, batch, window_size)
        if whole and batch.max_seqlen > 0 and gpu.has_varlen_attn(qkv):
            return gpu.varlen_attention(qkv, batch, window_size)
    left, right = window_size
    onednn = backend("attention", qkv) == "onednn"
    out = torch.empty_like(qkv[:, 0], dtype=qkv.dtype if weight is None else weight.dtype)
    if onednn and qkv.dtype != torch.float32 and not _sees_all(window_size, batch.max_seqlen):
        qkv = qkv.float()  # as fast as in 16 bits where blocks are small, and scores aren't rounded
    for start, count, length, keys in _runs(batch, len(qkv)):
        span = slice(start, start + count * length)
        q, k, v = (x.transpose(1, 2) for x in qkv[span].unflatten(0, (count, length)).unbind(2))  # (n, H, S, D)
        k, v = k[:, :, :keys], v[:, :, :keys]
        to = out[span].unflatten(0, (count, length)).transpose(1, 2)
        if _sees_all(window_size, length):
            _global_attention(q, k, v, to, onednn, weight)
            continue
        seeing = length if left < 0 else min(length, keys + left)  # those after them are too far from any key
        to[:, :, seeing:] = 0
        for i in range(0, seeing, LOCAL_BLOCK):
            j = min(i + LOCAL_BLOCK, seeing)
            low = 0 if left < 0 else max(0, i - left)
            high = keys if right < 0 else min(keys, j + right)
            mask = _window_mask(j - i, high - low, i - low, left, right, qkv.dtype, qkv.device)
            _block_attention(q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], mask, to[:, :, i:j], onednn)
    return out


def _sees_all(window_size: tuple[int, int], length: int) -> bool:
    """Whether the window leaves nothing out of a sequence so long."""
    return all(distance < 0 or distance >= length - 1 for distance in window_size)


def _global_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, onednn: bool, weight: Tensor | None) -> None:
    """All (n, H, S, D)."""
    if onednn and not (torch.is_grad_enabled() and q.requires_grad):
        from . import cpu

        dtype = q.dtype if weight is None else cpu.rounding(weight)
        if cpu.attends_in_chunks(q.shape[2], dtype):
            return cpu.chunked_attention(q, k, v, out, dtype)
    out.copy_(F.scaled_dot_product_attention(q, k, v))


def _block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, onednn: bool) -> None:
    """q, out (n, H, i, D), k, v (n, H, j, D), mask (i, j)."""
    if onednn and not (torch.is_grad_enabled() and q.requires_grad):
        from . import cpu

        return cpu.block_attention(q, k, v, mask, out)
    out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def row_attention(q: Tensor, kv: Tensor, batch: PackedBatch) -> Tensor:
    """One query a sequence, over all its tokens: q (B, H, D), kv (T, 2, H, D) -> (B, H, D), scaled by D^-0.5.

    Raises ValueError for an empty sequence, which has nothing to see.
    """
    if not torch.compiler.is_compiling() and 0 in batch.seqlens:  # a tracer would take the lengths for constants
        raise ValueError(f"sequence {batch.seqlens.index(0)} has no tokens: its query has nothing to see")
    if backend("attention", q) == "triton" and batch.key_seqlens is None:
        from . import gpu

        if gpu.can_attend(q) and not gpu.wants_gradient(q, kv):
            return gpu.row_attention(q, kv, batch)
    out, b = torch.empty_like(q), 0
    for start, count, length, keys in _runs(batch, len(kv)):
        k, v = kv[start : start + count * length].unflatten(0, (count, length))[:, :keys].transpose(1, 3).unbind(2)
        out[b : b + count] = F.scaled_dot_product_attention(q[b : b + count, :, None], k, v)[:, :, 0]
        b += count
    return out


def logn_scale(batch: PackedBatch, base: int, clip: bool) -> Tensor:
    """ln(length of a token's sequence) / ln(base), (T, 1, 1) fp32, with clip at least 1 (NewModel's
    logn_attention_scale and logn_attention_clip1): attention as sharp over many keys as over few."""
    cu_seqlens = batch.cu_seqlens
    lengths = cu_seqlens.diff() if batch.key_seqlens is None else cu_seqlens.new_tensor(batch.key_seqlens)
    scale = lengths.float().log()[_owners(batch)] / math.log(base)
    return (scale.clamp(min=1.0) if clip else scale)[:, None, None]


def _owners(batch: PackedBatch) -> Tensor:
    """(T,): the sequence of each token. A batch of CUDA graphs has tokens of no sequence, which get the last one."""
    tokens = torch.arange(len(batch.input_ids), dtype=torch.int32, device=batch.cu_seqlens.device)
    return torch.bucketize(tokens, batch.cu_seqlens[1:-1], right=True)


def mean_pool(x: Tensor, batch: PackedBatch) -> Tensor:
    """The mean of each sequence's tokens: (T, C) -> (B, C) fp32; zeros for an empty sequence."""
    if _fits_a_kernel(x) and backend("pooling", x) == "triton":
        from . import gpu

        return gpu.mean_pool(x, batch)
    total = torch.segment_reduce(x.float(), "sum", offsets=batch.cu_seqlens.long(), initial=0)
    return total / batch.cu_seqlens.diff().float().clamp(min=1)[:, None]


def _runs(batch: PackedBatch, T: int) -> Iterator[tuple[int, int, int, int]]:
    """Neighbours of equal length, and keys, to share a call: [5, 5, 2] -> (start 0, count 2, length 5, keys 5), .."""
    seqlens = batch.seqlens
    if sum(seqlens) != T:
        raise ValueError(f"the batch's seqlens add up to {sum(seqlens)}; the tensor has {T} tokens")
    # Two groupbys, of numbers: torch.compile can't trace one of pairs.
    start = first = 0
    for length, group in groupby(seqlens):
        count = sum(1 for _ in group)
        seen = (length,) * count if batch.key_seqlens is None else batch.key_seqlens[first : first + count]
        first += count
        for keys, same in groupby(seen):
            alike = sum(1 for _ in same)
            if length:
                yield start, alike, length, keys
            start += alike * length


@cached(256)
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
