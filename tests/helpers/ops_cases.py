"""Shared by tests/ops: test_choose, test_attention, test_rope, test_products, test_gradients."""

import math

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.ops import onednn
from modernbert_lite.ops import reference as ops

FAST = ["torch", "onednn"]


@pytest.fixture
def on(monkeypatch):
    """on("onednn"): sets the backend; skips where the machine doesn't have it."""

    def choose(name: str) -> None:
        if name == "triton":
            pytest.importorskip("triton")
        if name == "onednn" and not onednn.works(torch.float32):
            pytest.skip("this torch has no oneDNN linear")
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", name)

    return choose


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(seqlens: list[int]) -> ml.PackedBatch:
    return ml.pack([[0] * n for n in seqlens])


# ---- the choice of a backend ---------------------------------------------------------------------------------------


def attend(qkv: torch.Tensor, batch: ml.PackedBatch, window: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """qkv (T, 3, H, D): as many heads of k and v as of q."""
    return ops.attention(qkv.flatten(1, 2), qkv.shape[2], batch, window)


def naive_attention(qkv: torch.Tensor, seqlens: list[int], window: tuple[int, int]) -> torch.Tensor:
    """One whole softmax a sequence, in fp64."""
    outs = []
    for part in qkv.double().split(seqlens):
        q, k, v = part.unbind(1)  # (S, H, D)
        i = torch.arange(len(part))
        distance = i[None, :] - i[:, None]  # key - query
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            seen &= distance >= -window[0]
        if window[1] >= 0:
            seen &= distance <= window[1]
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
        probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", probabilities, v))
    return torch.cat(outs)


def turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rope` of q and k in qkv (T, 3, H, D)."""
    return ops.rope(qkv.flatten(1, 2), 2 * qkv.shape[2], (cos, sin, None)).unflatten(1, qkv.shape[1:3])
