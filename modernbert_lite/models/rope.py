"""RoPE as a config.json describes it: the types that transformers knows, and GTE's own."""

from __future__ import annotations

import math

from ..ops.rope import Rope
from ..reading import CheckpointError, Reader, shown

# transformers' `ROPE_INIT_FUNCTIONS`, and plain RoPE.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# The values that a type needs. (YaRN can do without a factor: it is the ratio of the two lengths.)
_NEEDED = {
    "ntk": ("factor",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(
    read: Reader, theta: float, known: tuple[str, ...], name: str, *, longest: int, head_dim: int, truncate: bool = True
) -> Rope:
    """Reads a RoPE type and its values as transformers does. Keys that the type doesn't use are ignored.

    name: for messages, with {} where the type goes. longest: max_position_embeddings. Raises CheckpointError for a type
    that is not `known`, for a value that is missing or of a wrong type, and for values that give infinite numbers.
    """
    rope_type = read.raw.get("rope_type") or read.raw.get("type") or "default"
    if rope_type not in known:
        raise CheckpointError(f"{name.format(shown(rope_type))} is not supported; known: {', '.join(known)}")
    name = name.format(repr(rope_type))
    for key in _NEEDED.get(rope_type, ()):
        if read.raw.get(key) is None:
            raise CheckpointError(f"{name} has no {key}; it must be {_allowed(key)}")
    rotated = read.real("partial_rotary_factor", 1.0)
    if rope_type == "proportional":
        if not 0 <= rotated <= 1:
            raise CheckpointError(f"partial_rotary_factor is {rotated:g}; it must be from 0 to 1")
        return Rope(theta, "proportional", read.number("factor", 1.0), rotated=rotated)
    if rotated != 1.0:
        raise CheckpointError(
            f"partial_rotary_factor {rotated:g} is not supported with {name}, which turns whole heads: only 1.0 is, or "
            "the type 'proportional'"
        )
    if rope_type == "default":
        return Rope(theta)
    if rope_type == "ntk":
        if read.raw.get("mixed_b") is not None:  # no published checkpoint has it
            raise CheckpointError(f"mixed_b is {shown(read.raw['mixed_b'])}, which is not supported: leave it out")
        return Rope(theta, "ntk", read.number("factor", 1.0))
    if rope_type == "linear":
        return Rope(theta, "linear", read.number("factor", 1.0))
    if rope_type == "dynamic":
        if head_dim == 2:
            raise CheckpointError(f"{name} needs heads of at least 4 numbers, and these have 2")
        return Rope(theta, "dynamic", read.number("factor", 1.0), original_max_position_embeddings=longest)
    original = read.whole("original_max_position_embeddings", longest)
    factor = read.number("factor", longest / original)
    if rope_type == "llama3":
        low, high = read.number("low_freq_factor", 1.0), read.number("high_freq_factor", 4.0)
        if low == high:
            raise CheckpointError(f"{name}: low_freq_factor and high_freq_factor are both {low:g}; they must differ")
        return Rope(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    if rope_type == "longrope":
        return Rope(
            theta,
            "longrope",
            factor,
            original,
            attention_factor=read.real("attention_factor", _longrope_attention_factor(read, factor, original)),
            short_factor=read.numbers("short_factor", head_dim // 2),
            long_factor=read.numbers("long_factor", head_dim // 2),
        )
    assert rope_type == "yarn", rope_type
    if theta == 1:
        raise CheckpointError(f"{name} with a rope_theta of 1, whose logarithm it divides by: it must be another")
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=_beta(read, "beta_fast", 32.0),
        beta_slow=_beta(read, "beta_slow", 1.0),
        attention_factor=read.real("attention_factor", _yarn_attention_factor(read, factor)),
        truncate=truncate,
    )


def _allowed(key: str) -> str:
    return "a list of positive numbers" if key in ("short_factor", "long_factor") else "a positive number"


def _beta(read: Reader, key: str, default: float) -> float:
    """transformers takes 0 as "not given"."""
    return default if read.raw.get(key) == 0 and read.raw[key] is not False else read.number(key, default)


def _yarn_attention_factor(read: Reader, factor: float) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22); mscale and mscale_all_dim as in transformers' rope utilities."""
    if read.raw.get("attention_factor") is not None:
        return 1.0  # it is said

    def mscale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = read.real("mscale", 0.0), read.real("mscale_all_dim", 0.0)
    if not (above and below):
        return mscale(1.0)
    if mscale(below) == 0:
        raise CheckpointError(f"mscale_all_dim is {below:g}, by which the attention factor is divided by 0")
    return mscale(above) / mscale(below)


def _longrope_attention_factor(read: Reader, factor: float, original: int) -> float:
    """sqrt(1 + ln(factor) / ln(original length)): arXiv 2402.13753, in transformers' form."""
    if factor <= 1 or read.raw.get("attention_factor") is not None:
        return 1.0
    if original == 1:
        raise CheckpointError("original_max_position_embeddings is 1, whose logarithm longrope divides by")
    return math.sqrt(1 + math.log(factor) / math.log(original))


def describe_rope(rope: Rope) -> str:
    """The type in a few words, for `info`."""
    return rope.type if rope.type == "default" else f"{rope.type}, factor {rope.factor:g}"
