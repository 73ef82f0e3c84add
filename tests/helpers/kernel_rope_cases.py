"""Shared by tests/kernels: test_rope, test_rope_refusals, test_rope_operator."""

import os

import pytest
import torch
from torch import Tensor

from modernbert_lite.kernels import rope as kernel
from modernbert_lite.ops import reference as ops

# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """`ops.rope` is the reference here, on a GPU too."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def projection(T: int, H: int, D: int, dtype: torch.dtype = torch.float32, *, parts: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + T + H + D)
    return torch.randn(T, parts, H, D, generator=generator).to(DEVICE, dtype)


def rope_(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, *, inverse: bool = False
) -> Tensor:
    """`kernel.rope_` of (T, parts, H, D), in place. The last of several parts is v, and stays."""
    T, parts, H, D = qkv.shape
    heads = qkv.view(T, parts * H, D)  # of the same memory
    assert kernel.rope_(heads, cos, sin, position_ids, heads=max(1, parts - 1) * H, inverse=inverse) is heads
    return qkv


def rope_op(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, inverse: bool) -> Tensor:
    """`kernel.rope_op` of (T, parts, H, D). The last of several parts is v, and stays."""
    _, parts, H, _ = qkv.shape
    out = kernel.rope_op(qkv.flatten(1, 2), cos, sin, position_ids, inverse, max(1, parts - 1) * H)
    return out.unflatten(1, (parts, H))


def tables(P: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the first P positions, (P, D / 2) fp32."""
    angles = torch.arange(P)[:, None].double() * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def places(T: int, P: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """T positions below P, in no order, some of them twice."""
    return torch.randint(P, (T,), generator=torch.Generator().manual_seed(T), dtype=dtype).to(DEVICE)


def exact(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in fp64, out of place; cos and sin (T, D / 2). The last of several parts is v, and stays."""
    cos, sin = cos.double()[:, None, None], sin.double()[:, None, None]
    turned = max(1, qkv.shape[1] - 1)
    first, second = qkv[:, :turned].double().chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((rotated, qkv[:, turned:].double()), 1)


def assert_as_good_as_torch(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    if got.numel():
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


def turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` of a copy; the last of several parts is v, and stays."""
    _, parts, H, _ = qkv.shape
    return ops.rope(qkv.clone().flatten(1, 2), max(1, parts - 1) * H, (cos, sin, None)).unflatten(1, (parts, H))


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Also where both are NaN, and -0.0 is not 0.0."""
    as_integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.view(as_integers), y.view(as_integers))


def assert_rotates_as_the_reference(qkv: Tensor, positions: torch.dtype | None) -> None:
    T, parts, _, D = qkv.shape
    cos, sin = tables(T + 3, D)
    position_ids = None if positions is None else places(T, T + 3, positions)
    rows = torch.arange(T, device=DEVICE) if position_ids is None else position_ids.long()
    plain = turned(qkv, cos[rows], sin[rows])
    truth, kept = exact(qkv, cos[rows], sin[rows]), qkv.clone()
    rope_(qkv, cos, sin, position_ids)
    assert_as_good_as_torch(qkv, plain, truth)
    if parts > 1:
        assert same_bits(qkv[:, -1], kept[:, -1])


def inside_a_buffer(layout: str, T: int, H: int, D: int) -> tuple[Tensor, Tensor]:
    """A poisoned buffer, and a view (T, 3, H, D) of some of it."""
    shape = {
        "rows in the middle": (T + 12, 3, H, D),
        "rows wider than the projection": (T, 3 * H * D + 10),
        "every second row": (2 * T, 3, H, D),
        "gaps between heads": (T, 3, 2 * H, D),
        "wide heads": (T, 3, H, D + 5),
        "heads first": (3, H, T + 2, D),
    }[layout]
    buffer = torch.full(shape, -12345.0, device=DEVICE)
    view = {
        "rows in the middle": lambda x: x[6:-6],
        "rows wider than the projection": lambda x: x[:, 5:-5].unflatten(1, (3, H, D)),
        "every second row": lambda x: x[1::2],
        "gaps between heads": lambda x: x[:, :, 1::2],
        "wide heads": lambda x: x[..., 3 : D + 3],
        "heads first": lambda x: x[:, :, 1:-1].permute(2, 0, 1, 3),
    }[layout](buffer)
    assert view.shape == (T, 3, H, D)
    return buffer, view
