"""Lengths of the texts that are fed."""

from __future__ import annotations

import torch

QUERY_TOKENS = 20
POOL_TOKENS = 16_384  # texts repeat after this many, so that one reference in fp32 serves every batch


def ragged_lengths(count: int = 32) -> list[int]:
    """Lognormal, median 100, sigma 0.8, cut to 8..512, longest first: the spread of short documents."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 0.8).exp() * 100
    return sorted(lengths.round().long().clamp(8, 512).tolist(), reverse=True)


def batch_of(lengths: list[int], tokens: int) -> list[int]:
    """Texts of the pool, repeated until `tokens` are reached, longest first. Empty if the first is longer than that."""
    indices: list[int] = []
    used = 0
    while used + lengths[len(indices) % len(lengths)] <= tokens:
        used += lengths[len(indices) % len(lengths)]
        indices.append(len(indices) % len(lengths))
    return sorted(indices, key=lambda i: -lengths[i])


def pool_lengths(case: str) -> list[int]:
    """128 -> [128] * 128; "ragged": lognormal, in no order."""
    if case == "query":
        return [QUERY_TOKENS]
    if case != "ragged":
        return [int(case)] * max(POOL_TOKENS // int(case), 1)
    lengths = ragged_lengths(POOL_TOKENS // 128)
    return [lengths[i] for i in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()]
