"""Rotary position embedding (arXiv 2104.09864): its frequencies, and tables of cosines and sines that are made once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import PackedBatch
from .choose import backend_for
from .tracing import cached
from .windows import owners

# What the operation `rope` needs for a batch. Either cos and sin (T, D / 2) fp32, one row per token, and None; or cos
# and sin with one row per position, and the position of each token (T,).
Turn = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer. `inverse_frequencies` has the formulas.

    `linear` divides positions by `factor`. `yarn`: arXiv 2309.00071. `llama3` scales by wavelength, as Llama 3.1 does.
    `proportional` turns only the share `rotated` of the pairs. `dynamic` enlarges theta for texts longer than
    `original_max_position_embeddings`, by the text's length. `longrope` (arXiv 2402.13753) has `long_factor` for such
    texts, and `short_factor` for the others. `ntk`, GTE's own, multiplies theta by `factor`, and divides all
    frequencies by factor^(2 / head_dim).
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True  # yarn: whole numbers for the pairs between which it blends
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated: float = 1.0

    @property
    def by_length(self) -> bool:
        """Whether a token's frequencies depend on the length of its text."""
        return self.type in ("dynamic", "longrope")


@cached(64)
def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device, long: bool = False) -> Tensor:
    """(D / 2,) fp32: theta^(-2j/D), stretched as `rope.type` says (see `Rope`). Where they depend on the text's length,
    these are the frequencies of a text of at most the original length; with long=True, longrope's of a longer text.

    The operations and their order are those of transformers' `modeling_rope_utils`: far positions show a last bit.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    base = rope.theta**exponents
    original, factor = rope.original_max_position_embeddings, rope.factor
    if rope.type == "default":
        inverse = 1.0 / base
    elif rope.type == "linear":
        inverse = 1.0 / base / factor
    elif rope.type == "proportional":
        inverse = 1.0 / base
        inverse[int(rope.rotated * head_dim // 2) :] = 0.0
        inverse = inverse / factor
    elif rope.type == "dynamic":
        growth = factor * original / original - (factor - 1)  # 1, but for rounding
        inverse = 1.0 / (rope.theta * growth ** (head_dim / (head_dim - 2))) ** exponents
    elif rope.type == "longrope":
        stretch = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32, device="cpu")
        inverse = 1.0 / (stretch * base)
    elif rope.type == "llama3":
        inverse = _by_wavelength(1.0 / base, rope)
    elif rope.type == "ntk":
        inverse = 1.0 / (rope.theta * factor) ** exponents / factor ** (2 / head_dim)
    elif rope.type == "yarn":

        def dimension(rotations: float) -> float:  # the pair that turns this often over the original length
            return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if high == low else 0
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        inverse = 1.0 / (factor * base) * (1 - kept) + 1.0 / base * kept
    return inverse.to(device)


def _by_wavelength(inverse: Tensor, rope: Rope) -> Tensor:
    """llama3: short waves stay, long ones are stretched by the factor, and those between the two by less."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > original / low, inverse / rope.factor, inverse)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    return torch.where((wavelength < original / high) | (wavelength > original / low), stretched, between)


def _frequencies_by_length(rope: Rope, head_dim: int, lengths: Tensor) -> Tensor:
    """(T, D / 2) fp32, for tokens of texts that have these lengths (T,). They are transformers' frequencies for each
    text alone. (In a batch, transformers takes all texts to be as long as the longest.)"""
    short = inverse_frequencies(rope, head_dim, lengths.device)
    original, factor = rope.original_max_position_embeddings, rope.factor
    if rope.type == "longrope":
        long = inverse_frequencies(rope, head_dim, lengths.device, long=True)
    else:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths.device) / head_dim
        growth = factor * lengths.clamp(min=original).float() / original - (factor - 1)
        long = 1.0 / (rope.theta * growth ** (head_dim / (head_dim - 2)))[:, None] ** exponents
    return torch.where((lengths > original)[:, None], long, short)


def rope_table(rope: Rope, head_dim: int, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, (T, D / 2) each, always fp32: bf16 can't tell neighbouring positions apart.
    lengths (T,): of each token's text; needed if `rope.by_length`."""
    if rope.by_length:
        if lengths is None:
            raise ValueError(f"the frequencies of {rope.type!r} depend on the lengths of texts, which are not given")
        inverse = _frequencies_by_length(rope, head_dim, lengths)
    else:
        inverse = inverse_frequencies(rope, head_dim, position_ids.device)
    angles = position_ids[:, None].float() * inverse
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


@cached(None)  # never let go: a captured graph may read it
def position_table(rope: Rope, head_dim: int, device: torch.device, positions: int) -> Tensor:
    """(2, positions, D / 2): cos and sin of the positions from 0 on."""
    table = torch.stack(rope_table(rope, head_dim, torch.arange(positions, device=device)))
    if device.type == "cuda":  # kept for all streams, of which the others wouldn't wait for this one
        torch.cuda.current_stream(device).synchronize()
    return table


def rotation(rope: Rope, head_dim: int, batch: PackedBatch) -> Turn:
    """The turn of each token of the batch, by its place in its sequence."""
    ids = batch.position_ids
    if rope.by_length:
        return *rope_table(rope, head_dim, ids, batch.cu_seqlens.diff()[owners(batch)]), None
    if backend_for("rope", ids.device, torch.float32) != "triton" or torch.compiler.is_compiling():
        return *rope_table(rope, head_dim, ids), None
    cos, sin = position_table(rope, head_dim, ids.device, max(512, 1 << (batch.max_seqlen - 1).bit_length()))
    return cos, sin, ids


def turn_at(turn: Turn, rows: Tensor) -> Turn:
    """The turn of the tokens `rows` only."""
    cos, sin, position_ids = turn
    return (cos[rows], sin[rows], None) if position_ids is None else (cos, sin, position_ids[rows])


def angles_of(turn: Turn) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, (T, D / 2)."""
    cos, sin, position_ids = turn
    return (cos, sin) if position_ids is None else (cos[position_ids], sin[position_ids])
