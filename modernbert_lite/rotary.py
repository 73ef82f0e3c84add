"""Rotary position embedding (arXiv 2104.09864): frequencies, and tables of cosines and sines, made once and kept."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .config import Rope

P = ParamSpec("P")

_making = threading.RLock()


def cached(size: int | None) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Keeps the tensors that a function made, out of inference mode: a cached tensor may meet autograd later. While
    torch.compile traces it is called as it is."""

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        kept: Any = functools.lru_cache(maxsize=size)(torch.inference_mode(False)(function))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with _making:  # two threads would make two, and drop the one that a graph may have captured
                return kept(*args, **kwargs)

        return call

    return decorate


@cached(64)
def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """(D / 2,) fp32: theta^(-2j/D), stretched as `rope.type` says (yarn: arXiv 2309.00071, section 3.2; ntk:
    `config.Rope`)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = rope.theta**exponents
    if rope.type == "default":
        inverse = 1.0 / base
    elif rope.type == "linear":
        inverse = 1.0 / base / rope.factor
    elif rope.type == "ntk" and rope.mixed_b is not None:
        m = torch.arange(1, head_dim // 2 + 1, dtype=torch.float32)
        inverse = 1.0 / base / (math.log(rope.factor) * (m / (head_dim / 2)) ** rope.mixed_b).exp()
    elif rope.type == "ntk":
        inverse = 1.0 / (rope.theta * rope.factor) ** exponents / rope.factor ** (2 / head_dim)
    else:

        def dimension(rotations: float) -> float:  # the pair that turns this often over the original length
            turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        span = high - low if high != low else 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        inverse = ramp / (rope.factor * base) + (1 - ramp) / base
    return inverse.to(device)


def rope_table(rope: Rope, head_dim: int, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, (T, D / 2) each, always fp32 (bf16 tables lose whole positions)."""
    angles = position_ids[:, None].float() * inverse_frequencies(rope, head_dim, position_ids.device)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


@cached(None)  # never let go: a captured graph may read it
def position_table(rope: Rope, head_dim: int, device: torch.device, positions: int) -> Tensor:
    """(2, positions, D / 2): cos and sin of the positions from 0 on."""
    table = torch.stack(rope_table(rope, head_dim, torch.arange(positions, device=device)))
    if device.type == "cuda":  # kept for all streams, of which the others wouldn't wait for this one
        torch.cuda.current_stream(device).synchronize()
    return table
