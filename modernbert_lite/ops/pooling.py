"""From token vectors to sequence vectors: pooling over a packed batch, and normalising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch, to_device
from .reference import mean_pool as mean

_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda cu_seqlens: cu_seqlens[:-1],
    "lasttoken": lambda cu_seqlens: cu_seqlens[1:] - 1,
}


def cls(x: Tensor, batch: PackedBatch) -> Tensor:
    """The first token of each sequence: (T, C) -> (B, C)."""
    _no_empty(batch, "cls")
    return x[_ROWS["cls"](batch.cu_seqlens.long())]


def lasttoken(x: Tensor, batch: PackedBatch) -> Tensor:
    """The last token of each sequence: (T, C) -> (B, C)."""
    _no_empty(batch, "lasttoken")
    return x[_ROWS["lasttoken"](batch.cu_seqlens.long())]


def mean_sqrt_len_tokens(x: Tensor, batch: PackedBatch) -> Tensor:
    """Sum over the root of the length: (T, C) -> (B, C) fp32."""
    return _sum(x, batch) / batch.cu_seqlens.diff().float()[:, None].clamp(min=1).sqrt()


def weightedmean(x: Tensor, batch: PackedBatch) -> Tensor:
    """Mean weighted by position, 1, 2, ..: (T, C) -> (B, C) fp32."""
    weights = (batch.position_ids + 1).float()[:, None]
    return _sum(x.float() * weights, batch) / _sum(weights, batch).clamp(min=1)


def max(x: Tensor, batch: PackedBatch) -> Tensor:
    """Elementwise maximum: (T, C) -> (B, C) fp32."""
    _no_empty(batch, "max")
    return torch.segment_reduce(x.float(), "max", offsets=batch.cu_seqlens.long())


# In the order in which sentence-transformers concatenates several active modes.
POOLING: dict[str, Callable[[Tensor, PackedBatch], Tensor]] = {
    "cls": cls,
    "max": max,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt_len_tokens,
    "weightedmean": weightedmean,
    "lasttoken": lasttoken,
}


def rows(batch: PackedBatch, modes: Sequence[str]) -> Tensor | None:
    """(B,): the index of the one token per sequence that the pooling takes. None if the pooling takes several."""
    if len(modes) != 1 or modes[0] not in _ROWS:
        return None
    _no_empty(batch, modes[0])
    return _ROWS[modes[0]](batch.cu_seqlens.long())


def pool(x: Tensor, batch: PackedBatch, modes: Sequence[str], skip: int = 0) -> Tensor:
    """The modes side by side: (T, C) -> (B, len(modes) * C) fp32. The first `skip` tokens of each sequence (a prompt)
    don't count. A sequence without other tokens gets what sentence-transformers gives: its first token by `cls`, minus
    infinity by `max`, zeros by the other modes."""
    if not skip:
        return torch.cat([POOLING[mode](x, batch).float() for mode in modes], dim=-1)
    kept, rest = _without_prompt(x, batch, skip)
    longer = batch.cu_seqlens.diff() > skip
    special: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: x[(batch.cu_seqlens[:-1] + longer * skip).long()],
        "lasttoken": lambda: x[(batch.cu_seqlens[1:] - 1).long()] * longer[:, None],
        "max": lambda: torch.segment_reduce(kept.float(), "max", offsets=rest.cu_seqlens.long()),
    }
    parts = [special[mode]() if mode in special else POOLING[mode](kept, rest) for mode in modes]
    return torch.cat([part.float() for part in parts], dim=-1)


def _without_prompt(x: Tensor, batch: PackedBatch, skip: int) -> tuple[Tensor, PackedBatch]:
    # Positions stay as they were: `weightedmean` weighs each remaining token by its place in the whole sequence.
    left = tuple([n - min(skip, n) for n in batch.seqlens])
    # On the host, because finding them on the device would wait for it.
    keep = to_device((batch.on_host.position_ids >= skip).nonzero().flatten(), x.device)
    ends = torch.tensor([0, *accumulate(left)], dtype=torch.int32, device="cpu")
    return x[keep], replace(
        batch,
        cu_seqlens=to_device(ends, x.device),
        seqlens=left,
        position_ids=batch.position_ids[keep],
        input_ids=batch.input_ids[keep],
    )


def _sum(x: Tensor, batch: PackedBatch) -> Tensor:
    return torch.segment_reduce(x.float(), "sum", offsets=batch.cu_seqlens.long(), initial=0)


def _no_empty(batch: PackedBatch, mode: str) -> None:
    if 0 in batch.seqlens:
        raise ValueError(f"sequence {batch.seqlens.index(0)} has no tokens: {mode!r} pooling needs at least one")


def normalize(x: Tensor) -> Tensor:
    """Rows of unit length: (B, C) -> (B, C); a zero row stays zero."""
    return F.normalize(x, p=2.0, dim=-1, eps=1e-12)
