"""Vectors as numpy arrays: reading what users give, and quantising."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..reading import PRECISIONS, OptionError, one_of


def floats(values: Any, name: str) -> np.ndarray:
    """An array, a tensor on any device, or a (nested) list of numbers, as float32. Raises TypeError; ValueError for
    rows of different lengths."""
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        values = [floats(value, name) for value in values]
    if isinstance(values, Tensor):
        return values.detach().float().cpu().numpy()
    try:
        array = np.asarray(values)
        if array.dtype.kind == "c":
            raise TypeError("they are complex")
        with np.errstate(over="raise"):
            return array.astype(np.float32, copy=False)
    except FloatingPointError:
        raise ValueError(f"{name} can't be read as numbers: some are too large for float32") from None
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
    """Why one embedding in int8 or uint8 needs `ranges`."""
    return OptionError(f"one embedding has no range to cut into {precision}: pass `ranges`, or two texts or more")


def quantize_embeddings(
    embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None, *, first: int = 0
) -> np.ndarray:
    """(N, C) float -> the precision, as sentence-transformers defines it.

    int8, uint8: each dimension's range is cut into 255 steps. `ranges` (2, C) holds the minima and maxima of a
    calibration set. Without it they are taken from these embeddings, and there must be two or more. binary, ubinary:
    the signs, eight per byte: (N, ceil(C / 8)) int8 or uint8. first: the number of the first embedding, for messages.

    Raises OptionError for an unknown precision and for ranges of another shape; ValueError, naming the embedding, for
    one that is not finite in the precision.
    """
    one_of("precision", precision, PRECISIONS)
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
