"""Who sees whom: which sequences of a batch share a call, which keys a block of queries sees, and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import PackedBatch
from .tracing import cached

LOCAL_BLOCK = 64  # queries a call in a local layer: they see LOCAL_BLOCK + 2 * 64 keys


class Run(NamedTuple):
    """Neighbouring sequences of one length, in which the same number of leading tokens are keys."""

    start: int  # the row of the first one's first token
    sequences: int
    length: int
    keys: int


class Block(NamedTuple):
    """Queries [first, last) of a sequence see its keys [low, high), less those that the mask hides."""

    first: int
    last: int
    low: int
    high: int
    masked: bool


def runs(batch: PackedBatch, T: int) -> Iterator[Run]:
    """seqlens [5, 5, 2] -> Run(0, 2, 5, 5), Run(10, 1, 2, 2). Raises ValueError unless the lengths add up to T."""
    seqlens = batch.seqlens
    if sum(seqlens) != T:
        raise ValueError(f"the batch's seqlens add up to {sum(seqlens)}; the tensor has {T} tokens")
    # Two groupbys of numbers, because torch.compile can't trace a groupby of pairs.
    start = first = 0
    for length, group in groupby(seqlens):
        count = sum(1 for _ in group)
        seen = (length,) * count if batch.key_seqlens is None else batch.key_seqlens[first : first + count]
        first += count
        for keys, same in groupby(seen):
            alike = sum(1 for _ in same)
            if length:
                yield Run(start, alike, length, keys)
            start += alike * length


def sees_all(window_size: tuple[int, int], length: int) -> bool:
    """Whether each token of a sequence of this length sees the whole sequence."""
    return all(distance < 0 or distance >= length - 1 for distance in window_size)


def blocks(window_size: tuple[int, int], length: int, keys: int) -> Iterator[Block]:
    """Without a window, one block of all queries. With a window, blocks of LOCAL_BLOCK queries, so that the cost is
    O(length * window). A query that sees no key is in no block."""
    left, right = window_size
    if sees_all(window_size, length):
        if keys:
            yield Block(0, length, 0, keys, False)
        return
    seeing = length if left < 0 else min(length, keys + left)
    for i in range(0, seeing if keys else 0, LOCAL_BLOCK):
        j = min(i + LOCAL_BLOCK, seeing)
        yield Block(i, j, 0 if left < 0 else max(0, i - left), keys if right < 0 else min(keys, j + right), True)


def mask(block: Block, window_size: tuple[int, int], like: Tensor) -> Tensor | None:
    """(queries, keys) of the block: 0 where a query sees a key, -inf where it doesn't. None: all see all."""
    if not block.masked:
        return None
    shape = block.last - block.first, block.high - block.low
    return _mask(*shape, block.first - block.low, *window_size, like.dtype, like.device)


@cached(256)
def _mask(
    queries: int, keys: int, offset: int, left: int, right: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Query i stands at key i + offset."""
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - offset
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def owners(batch: PackedBatch) -> Tensor:
    """(T,): the sequence of each token. In a batch of CUDA graphs, tokens of no sequence get the last one."""
    tokens = torch.arange(len(batch.input_ids), dtype=torch.int32, device=batch.cu_seqlens.device)
    return torch.bucketize(tokens, batch.cu_seqlens[1:-1], right=True)
