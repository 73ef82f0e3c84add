"""The CPU's twins of the operations. Attention and norms are computed in fp32, local attention as batched products, and
long global attention as oneDNN's products in chunks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch
from . import onednn, windows
from .choose import Twins, wanted
from .reference import rope
from .reference import row_attention as row_attention_of
from .rope import Turn
from .tracing import wants_gradient

_QUERIES, _KEYS = 512, 128  # queries per chunk; the number of keys is padded to a multiple of this


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | None:
    """For a network in 16 bits whose residual stream is fp32 (packed products keep it so, see `onednn.linear`): the
    norm is computed in fp32, and the result has the weights' dtype."""
    if x.dtype != torch.float32 or weight.dtype == torch.float32:
        return None
    x = x if residual is None else residual + x
    y = F.layer_norm(x, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)
    return y.to(weight.dtype)


def attention(
    qkv: Tensor,
    heads: int,
    batch: PackedBatch,
    window_size: tuple[int, int] = (-1, -1),
    turn: Turn | None = None,
    coarse: bool = False,
) -> Tensor | None:
    """In 16 bits, the rotation and local attention are computed in fp32. Small blocks take no longer so, and scores are
    not rounded. Long global attention stays in the dtype of qkv."""
    if wants_gradient(qkv):
        return None
    dtype = qkv.dtype
    if dtype != torch.float32 and (turn is not None or not windows.sees_all(window_size, batch.max_seqlen)):
        qkv = qkv.float()
    if turn is not None:
        qkv = rope(qkv, (heads + qkv.shape[1]) // 2, turn)
    shared = (qkv.shape[1] - heads) // 2
    new = torch.zeros_like if batch.key_seqlens else torch.empty_like
    out = new(qkv[:, :heads], dtype=dtype)
    rounds = torch.bfloat16 if coarse and onednn.supported(torch.bfloat16) else dtype
    for start, count, length, keys in windows.runs(batch, len(qkv)):
        span = slice(start, start + count * length)
        q, k, v = qkv[span].unflatten(0, (count, length)).transpose(1, 2).split([heads, shared, shared], 1)
        if heads != shared:
            k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        to = out[span].unflatten(0, (count, length)).transpose(1, 2)  # (count, H, S, D)
        for block in windows.blocks(window_size, length, keys):
            i, j, low, high, _ = block
            parts = q[:, :, i:j], k[:, :, low:high], v[:, :, low:high]
            mask = windows.mask(block, window_size, qkv)
            if mask is not None:
                _masked_attention(*parts, mask, to[:, :, i:j])
            elif attends_in_chunks(length, rounds):
                _chunked_attention(*parts, to, rounds)
            else:
                to.copy_(F.scaled_dot_product_attention(*parts))
    return out


def row_attention(q: Tensor, kv: Tensor, rows: Tensor, batch: PackedBatch, turn: Turn | None = None) -> Tensor | None:
    """In 16 bits, computed in fp32, as in `attention`."""
    if q.dtype == torch.float32 or turn is None or wants_gradient(q, kv):
        return None
    return row_attention_of(q.float(), kv.float(), rows, batch, turn).to(q.dtype)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor) -> None:
    """Attention of a block of queries over the keys near it: q (n, H, i, D), k and v (n, H, j, D), mask (i, j) of 0 and
    -inf. The result goes into out (n, H, i, D).

    Batched products, one sequence at a time so that nothing is copied. They take half the time of torch's fused
    attention, which splits a short block into slow small products (Zen 4, fp32, 64 x 192, T = 2048: 10 and 18 ms).
    """
    scale = q.shape[-1] ** -0.5
    for qi, ki, vi, to in zip(q, k, v, out, strict=True):
        to.copy_(torch.bmm(torch.softmax(torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale), -1), vi))


def attends_in_chunks(length: int, dtype: torch.dtype) -> bool:
    """Whether global attention over this many tokens is faster as `_chunked_attention`. torch's fused attention
    multiplies by MKL, in fp32. Measured on Zen 4 and 5: bench/LOG.md."""
    if dtype == torch.bfloat16:
        return length >= 1024 and onednn.pays(dtype)
    return dtype == torch.float32 and length >= 4096 and onednn.pays(dtype) and onednn.gain() > 1.8


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Global attention by oneDNN's products in `dtype`: some queries of a head at a time, over all keys of that head.
    q, k, v and `out` are (n, H, S, D)."""
    # What all keys have in common doesn't change the softmax. Without it scores are smaller, and round less.
    k = k - k.mean(2, keepdim=True)
    q = q * q.shape[-1] ** -0.5
    more = -k.shape[2] % _KEYS  # padding, so that oneDNN meets few sizes: see onednn._blocks
    for qh, kh, vh, oh in (x for b in zip(q, k, v, out, strict=True) for x in zip(*b, strict=True)):  # (S, D)
        queries, keys, values = (F.pad(x.to(dtype), (0, 0, 0, more)) for x in (qh, kh, vh))
        values = values.t().contiguous()
        for i in range(0, len(qh), _QUERIES):
            scores = onednn.multiply(queries[i : i + _QUERIES].contiguous(), keys.contiguous(), None)
            scores[:, len(kh) :] = -math.inf
            to = oh[i : i + _QUERIES]
            to.copy_(onednn.multiply(torch.softmax(scores, -1), values, None)[: len(to)])


TWINS: Twins = {"layer_norm": layer_norm, "attention": attention, "row_attention": row_attention}
ONEDNN = ("linear", "attention")  # what `choose.backend` calls by its name


def packs(dtype: torch.dtype) -> bool:
    """Whether a weight of the dtype is packed: where that pays, or where it works, if oneDNN is asked for."""
    return onednn.works(dtype) if wanted() == "onednn" else onednn.pays(dtype)
