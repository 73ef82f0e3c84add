"""Shared by several files of tests/kernels:

test_attention, test_attention_tiles, test_attention_refusals, test_attention_operators.
"""

import itertools
import os

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.kernels import attention as kernel
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.rope import Rope, rope_table

# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cpu" if INTERPRETED else "cuda"


LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 130, 191, 192, 193, 257]  # around the edges of one, two, three blocks


FULL = (-1, -1)


LOCAL = (64, 64)


HALF, SINGLE = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def reference_is_torch(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def randn(*shape: int, dtype: torch.dtype = SINGLE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def spans(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(ends(lengths).tolist())]


def reference(qkv: torch.Tensor, lengths: list[int], window: tuple[int, int] = FULL) -> torch.Tensor:
    return ops.attention(qkv.flatten(1, 2), qkv.shape[2], ml.pack([[0] * n for n in lengths]), window)


def assert_within_twice(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == truth.shape
    assert got.dtype == plain.dtype
    if got.numel():
        error = (got.double() - truth).abs().max()
        assert error <= 2 * (plain.double() - truth).abs().max() + 1e-6


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


# ---- against the reference -----------------------------------------------------------------------------------------


def rope_tables(rows: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_table(Rope(theta=160.0), D, torch.arange(rows, device=DEVICE))


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula in fp64; cos and sin are (T, D / 2)."""
    q, v = qkv[:, :2].double(), qkv[:, 2:].double()
    x1, x2 = q.chunk(2, -1)
    c, s = cos.double()[:, None, None], sin.double()[:, None, None]
    return torch.cat([torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1), v], 1)


def turned(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`ops.rope` of a copy's q and k."""
    copy = qkv.clone().flatten(1, 2)
    return ops.rope(copy, 2 * qkv.shape[2], (cos, sin, None)).unflatten(1, qkv.shape[1:3])


def poisoned(monkeypatch, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, out): the kernel's next output lies in the middle of a buffer full of -12345."""
    size, margin = torch.Size(shape).numel(), 128 * 128
    buffer = torch.full((2 * margin + size,), -12345.0, dtype=dtype, device=DEVICE)
    out = buffer[margin : margin + size].view(shape)

    def inside(wanted, **_):
        assert tuple(wanted) == shape
        return out

    monkeypatch.setattr(kernel.torch, "empty", inside)
    return buffer, out
