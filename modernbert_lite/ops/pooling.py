"""From token vectors to sequence vectors: pooling over a packed batch, normalising, quantising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PackedBatch
from ..reading import OptionError, shown
from .reference import mean_pool

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


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


def mean(x: Tensor, batch: PackedBatch) -> Tensor:
    """(T, C) -> (B, C) fp32; zeros for an empty sequence."""
    return mean_pool(x, batch)


def mean_sqrt_len_tokens(x: Tensor, batch: PackedBatch) -> Tensor:
    """Sum over the root of the length: (T, C) -> (B, C) fp32."""
    return _sum(x, batch) / _lengths(batch).clamp(min=1).sqrt()


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
    """The tokens (B,) that the pooling takes, where it takes one of each sequence: the network need give no other."""
    if len(modes) != 1 or modes[0] not in _ROWS:
        return None
    _no_empty(batch, modes[0])
    return _ROWS[modes[0]](batch.cu_seqlens.long())


def pool(x: Tensor, batch: PackedBatch, modes: Sequence[str], skip: int = 0) -> Tensor:
    """The modes side by side: (T, C) -> (B, len(modes) * C) fp32. The first `skip` tokens of each sequence (a prompt)
    don't count. A sequence of no other tokens gets what sentence-transformers gives it: its first token by `cls`, minus
    infinity by `max`, zeros by the others."""
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
    # Positions are kept as they were: `weightedmean` weighs what remains by its place in the whole sequence.
    left = tuple([n - min(skip, n) for n in batch.seqlens])
    keep = batch.position_ids >= skip
    cu_seqlens = F.pad(torch.tensor(left, dtype=torch.int32, device=x.device).cumsum(0, dtype=torch.int32), (1, 0))
    return x[keep], replace(
        batch,
        cu_seqlens=cu_seqlens,
        seqlens=left,
        position_ids=batch.position_ids[keep],
        input_ids=batch.input_ids[keep],
    )


def _sum(x: Tensor, batch: PackedBatch) -> Tensor:
    return torch.segment_reduce(x.float(), "sum", offsets=batch.cu_seqlens.long(), initial=0)


def _lengths(batch: PackedBatch) -> Tensor:
    return batch.cu_seqlens.diff().float()[:, None]


def _no_empty(batch: PackedBatch, mode: str) -> None:
    if 0 in batch.seqlens:
        raise ValueError(f"sequence {batch.seqlens.index(0)} has no tokens: {mode!r} pooling needs at least one")


def normalize(x: Tensor) -> Tensor:
    """Rows of unit length: (B, C) -> (B, C); a zero row stays zero."""
    return F.normalize(x, p=2.0, dim=-1, eps=1e-12)


def floats(values: Any, name: str) -> np.ndarray:
    """An array, a tensor on any device, or a list of numbers or of those, as float32. Raises TypeError, or ValueError
    for rows of different lengths."""
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        values = [floats(value, name) for value in values]
    if isinstance(values, Tensor):
        return values.detach().float().cpu().numpy()
    try:
        return np.asarray(values, np.float32)
    except TypeError as error:
        raise TypeError(f"{name} can't be read as numbers: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} can't be read as numbers, in rows of one length: {error}") from None


def check_ranges(ranges: Any, width: int) -> np.ndarray:
    """`ranges` of quantize_embeddings as (2, width), float32. Raises OptionError for another shape and for numbers that
    are not finite, TypeError or ValueError for what is no array of numbers."""
    ranges = floats(ranges, "ranges")
    if ranges.shape != (2, width):
        raise OptionError(f"ranges has shape {ranges.shape}; it must be (2, {width}): minima and maxima")
    if not np.isfinite(ranges).all():
        raise OptionError("ranges has a number that is not finite in float32; it must hold minima and maxima")
    return ranges


def no_range(precision: str) -> OptionError:
    """What is wrong with int8 or uint8 of one embedding without `ranges`."""
    return OptionError(f"one embedding has no range to cut into {precision}: pass `ranges`, or two texts or more")


def quantize_embeddings(
    embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None, *, first: int = 0
) -> np.ndarray:
    """(N, C) float -> the precision, as sentence-transformers defines it.

    int8, uint8: each dimension's range is cut in 255 steps; `ranges` is (2, C), the minima and maxima of a calibration
    set (without it: of these embeddings, of which there must be two or more). binary, ubinary: the signs, eight to a
    byte, (N, ceil(C / 8)) int8 or uint8. Raises ValueError for an unknown precision, ranges of another shape, and
    embeddings that are not finite in the precision, naming the first of them.
    first: the number of the first embedding, for that message, where these embeddings are a block of more.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {shown(precision)}; it must be one of {', '.join(PRECISIONS)}")
    embeddings = floats(embeddings, "embeddings")
    if precision == "float32":
        return embeddings
    if precision == "float16":
        with np.errstate(over="ignore"):
            embeddings = embeddings.astype(np.float16)
    for i in range(0, len(embeddings), 4096):
        finite = np.isfinite(embeddings[i : i + 4096]).reshape(len(embeddings[i : i + 4096]), -1).all(1)
        if not finite.all():
            raise ValueError(f"embedding {first + i + int(finite.argmin())} is not finite in {precision}")
    if precision == "float16":
        return embeddings
    if precision.endswith("binary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if embeddings.ndim != 2 or (ranges is None and len(embeddings) == 1):
        raise no_range(precision)
    if len(embeddings) == 0:
        return embeddings.astype(precision)
    if ranges is None:
        ranges = np.stack([embeddings.min(0), embeddings.max(0)])
    else:
        ranges = check_ranges(ranges, embeddings.shape[1])
    steps = (ranges[1] - ranges[0]) / 255
    steps[steps == 0] = 1
    out = np.empty(embeddings.shape, precision)
    for i in range(0, len(out), 4096):  # in blocks: the arithmetic is in floats, four times as large as its result
        levels = np.clip(np.floor((embeddings[i : i + 4096] - ranges[0]) / steps), 0, 255)
        out[i : i + 4096] = levels - (128 if precision == "int8" else 0)
    return out
