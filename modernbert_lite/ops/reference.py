"""Every operation of the forward pass, in plain torch: the specification, the fallback, and the tests' oracle.

Letters: T tokens in the batch, B sequences, S length of a sequence, C hidden_size, H heads of the queries, Hkv heads of
the keys and of the values (H is a multiple of Hkv), D head_dim, N intermediate_size. `@op`: see choose.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch
from . import windows
from .choose import op
from .rope import Turn, angles_of, turn_at

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, by erf
    "silu": F.silu,
    "relu": F.relu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    # Written out, because checkpoints were trained with these formulas: they differ from F.gelu by up to 1e-6.
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


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x (T, K) @ weight (M, K)^T + bias (M,) + residual (T, M) -> (T, M). In inference a twin may write the result over
    the residual, so the caller must not use the residual again."""
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


@op
def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, K) -> numbers (T, K) e4m3 and scale (T, 1) fp32, whose product is about x. A row's largest number becomes
    448, the largest of e4m3."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@op
def geglu(x: Tensor, act: str, swapped: bool = False) -> Tensor:
    """x (T, 2N) -> act(first half) * second half (T, N): arXiv 2002.05202, as ModernBERT has it. swapped: GTE's form,
    first half * act(second half)."""
    activated, gate = x.chunk(2, dim=-1)[:: -1 if swapped else 1]
    return ACTIVATIONS[act](activated) * gate


@op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """(T, C) -> (T, C), with mean and variance over C; weight and bias are (C,). residual (T, C): added to x first."""
    return F.layer_norm(x if residual is None else residual + x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(T, C) -> (T, C): x over the root of its mean square (arXiv 1910.07467), in fp32, times weight (C,)."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(weight.dtype)


@op
def rope(x: Tensor, heads: int, turn: Turn) -> Tensor:
    """Rotates the first `heads` heads of x (T, N, D) in place, and returns x (arXiv 2104.09864).

    Split halves (NeoX): pair j is (x[j], x[j + D/2]) -> (x1 cos - x2 sin, x2 cos + x1 sin), computed in fp32.
    """
    cos, sin = angles_of(turn)  # (T, D / 2) fp32
    half = x.shape[-1] // 2
    first, second = x[:, :heads, :half], x[:, :heads, half:]  # (T, heads, D / 2)
    cos, sin = cos[:, None], sin[:, None]
    x1, x2 = first.float(), second.float()  # if x is fp32 the same memory, else copies
    x1_sin = x1 * sin
    x1.mul_(cos).addcmul_(x2, sin, value=-1.0)
    x2.mul_(cos).add_(x1_sin)
    if x.dtype != torch.float32:
        first.copy_(x1)
        second.copy_(x2)
    return x


@op
def attention(
    qkv: Tensor,
    heads: int,
    batch: PackedBatch,
    window_size: tuple[int, int] = (-1, -1),
    turn: Turn | None = None,
    coarse: bool = False,
) -> Tensor:
    """Attention inside each sequence: qkv (T, H + 2 Hkv, D) -> (T, H, D), scaled by D^-0.5. `heads` is H. qkv holds the
    heads of q, then of k, then of v. H / Hkv neighbouring heads of q share one head of k and v.

    Token i sees the tokens i - left to i + right of its own sequence, inclusive. -1 is unlimited, and (-1, 0) is
    causal. turn: q and k are rotated first, and qkv may be written over. With batch.key_seqlens only the leading tokens
    of each sequence can be seen; a token that sees none gets zeros. coarse (8-bit weights): twins may multiply in
    bfloat16.
    """
    if turn is not None:
        qkv = rope(qkv, (heads + qkv.shape[1]) // 2, turn)
    shared = (qkv.shape[1] - heads) // 2
    out = torch.zeros_like(qkv[:, :heads]) if batch.key_seqlens else torch.empty_like(qkv[:, :heads])
    for start, count, length, keys in windows.runs(batch, len(qkv)):
        span = slice(start, start + count * length)
        q, k, v = qkv[span].unflatten(0, (count, length)).transpose(1, 2).split([heads, shared, shared], 1)
        to = out[span].unflatten(0, (count, length)).transpose(1, 2)  # (count, H, S, D)
        for block in windows.blocks(window_size, length, keys):
            i, j, low, high, _ = block
            seen = windows.mask(block, window_size, qkv)
            to[:, :, i:j] = sdpa(q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], seen)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (n, H, i, D), k and v (n, Hkv, j, D), mask (i, j) of 0 and -inf -> (n, H, i, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@op
def row_attention(q: Tensor, kv: Tensor, rows: Tensor, batch: PackedBatch, turn: Turn | None = None) -> Tensor:
    """Attention of one query per sequence over all tokens of its sequence: q (B, H, D), kv (T, 2 Hkv, D) -> (B, H, D),
    scaled by D^-0.5. kv holds the heads of k, then of v. Query b is the token rows[b] of the batch. turn: q and k are
    rotated first, and both may be written over.

    Raises ValueError for an empty sequence: its query has nothing to see.
    """
    refuse_empty(batch)
    if turn is not None:
        q, kv = rope(q, q.shape[1], turn_at(turn, rows)), rope(kv, kv.shape[1] // 2, turn)
    out, b = torch.empty_like(q), 0
    for start, count, length, keys in windows.runs(batch, len(kv)):
        k, v = kv[start : start + count * length].unflatten(0, (count, length))[:, :keys].transpose(1, 2).chunk(2, 1)
        out[b : b + count] = sdpa(q[b : b + count, :, None], k, v)[:, :, 0]
        b += count
    return out


def refuse_empty(batch: PackedBatch) -> None:
    if not torch.compiler.is_compiling() and 0 in batch.seqlens:  # a tracer would make the lengths constants
        raise ValueError(f"sequence {batch.seqlens.index(0)} has no tokens: its query has nothing to see")


@op
def mean_pool(x: Tensor, batch: PackedBatch) -> Tensor:
    """The mean of each sequence's tokens: (T, C) -> (B, C) fp32; zeros for an empty sequence."""
    total = torch.segment_reduce(x.float(), "sum", offsets=batch.cu_seqlens.long(), initial=0)
    return total / batch.cu_seqlens.diff().float().clamp(min=1)[:, None]
