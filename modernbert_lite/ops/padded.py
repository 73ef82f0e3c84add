"""Attention of short texts, padded: for cards on which no kernel attends to packed ones (V100, T4). Plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch, to_device
from . import reference

SHORT = 512  # tokens: of longer texts, padding would cost more than the calls that it saves
_MOST = 1 << 16  # padded tokens a call, so that masks stay below 32 MB


def attention(qkv: Tensor, heads: int, batch: PackedBatch, window_size: tuple[int, int]) -> Tensor:
    """`reference.attention` with one call for neighbouring short texts, where the reference makes one for each length
    and each 64 queries. Long texts are left to the reference."""
    if sum(batch.seqlens) != len(qkv):
        raise ValueError(f"the batch's seqlens add up to {sum(batch.seqlens)}; the tensor has {len(qkv)} tokens")
    parts, begin = [qkv[:0, :heads]], 0
    for first, last in groups(batch.seqlens):
        lengths, keys = batch.seqlens[first:last], batch.key_seqlens and batch.key_seqlens[first:last]
        part = qkv[begin : begin + sum(lengths)]
        if max(lengths) > SHORT:
            some = replace(batch, seqlens=lengths, key_seqlens=keys, max_seqlen=max(lengths))
            parts.append(reference.attention.reference(part, heads, some, window_size))  # type: ignore[attr-defined]
        else:
            parts.append(_attend(part, heads, _masks(batch, first, last, window_size)))
        begin += len(part)
    return torch.cat(parts)


def groups(seqlens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of neighbouring sequences. Padding to the longest at most doubles the tokens. A long one is alone.

    [64, 60, 9, 9, 9, 8] -> (0, 4), (4, 6)
    """
    first = longest = total = 0
    for i, n in enumerate(seqlens):
        longest, total = max(longest, n), total + n
        count, wide = i + 1 - first, -(-longest // 8) * 8
        full = count * longest > 2 * total or count * wide > _MOST or longest > SHORT
        if full and total > n:  # what is before it has tokens
            yield first, i
            first, longest, total = i, n, n
    if total:
        yield first, len(seqlens)


def _masks(batch: PackedBatch, first: int, last: int, window_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a group of n texts, padded to S tokens: the places (t,) of its tokens among the n * S padded ones; who sees
    whom, (n, 1, S, S); and who sees nobody, (n, 1, S, 1). Those are said to see all: a softmax of nothing is NaN."""
    key = ("padded", first, last, window_size)
    if key not in batch.cache:
        device, lengths = batch.cu_seqlens.device, torch.tensor(batch.seqlens[first:last], device="cpu")
        keys = lengths if batch.key_seqlens is None else torch.tensor(batch.key_seqlens[first:last], device="cpu")
        S = -(-int(lengths.max()) // 8) * 8  # masks of other widths are copied
        gaps = torch.arange(0, S * len(lengths), S, device="cpu") - (lengths.cumsum(0) - lengths)
        places = torch.arange(int(lengths.sum()), device="cpu") + gaps.repeat_interleave(lengths)
        token = torch.arange(S, device=device)
        distance, (left, right) = token - token[:, None], window_size
        seen = (token < to_device(keys, device)[:, None])[:, None, None, :].expand(-1, 1, S, S).clone()
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        blind = ~seen.any(-1, keepdim=True)
        batch.cache[key] = to_device(places, device), seen | blind, blind
    return batch.cache[key]


def _attend(qkv: Tensor, heads: int, masks: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(t, H + 2 Hkv, D) -> (t, H, D)."""
    places, seen, blind = masks
    n, _, S, _ = seen.shape
    shared = (qkv.shape[1] - heads) // 2
    wide = qkv.new_zeros(n * S, *qkv.shape[1:]).index_copy(0, places, qkv)
    q, k, v = wide.unflatten(0, (n, S)).transpose(1, 2).split([heads, shared, shared], 1)
    if heads != shared:
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).masked_fill(blind, 0)
    return y.transpose(1, 2).flatten(0, 1)[places]
