"""Shared by tests/kernels: test_geglu, test_geglu_gradient, test_geglu_operator."""

import os
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from modernbert_lite.kernels import geglu as kernel
from modernbert_lite.ops import reference as ops

# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cpu" if INTERPRETED else "cuda"


def halves(T: int, N: int, dtype: torch.dtype, order: str) -> tuple[Tensor, Tensor]:
    """(activated, gate): views of one (T, 2N), ModernBERT's order (first half activated) or GTE's (second)."""
    wide = (torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(T + N)) * 2).to(DEVICE, dtype)
    first, second = wide.chunk(2, -1)
    return (first, second) if order == "first" else (second, first)


def exact(activated: Tensor, gate: Tensor, act: str) -> Tensor:
    return ops.ACTIVATIONS[act](activated.double()) * gate.double()


def assert_within_twice(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    if got.numel():
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


def assert_as_good_as_torch(got: Tensor, activated: Tensor, gate: Tensor, act: str) -> None:
    assert_within_twice(got, ops.ACTIVATIONS[act](activated) * gate, exact(activated, gate, act))


def gradients(grad: Tensor, activated: Tensor, gate: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """By autograd of the reference, in the arguments' dtype."""
    leaves = activated.detach().clone().requires_grad_(), gate.detach().clone().requires_grad_()
    return torch.autograd.grad(ops.ACTIVATIONS[act](leaves[0]) * leaves[1], leaves, grad)


def assert_gradients_as_good_as_torch(
    got: Tensor, grad: Tensor, activated: Tensor, gate: Tensor, act: str, *, swapped: bool
) -> None:
    """Each half by itself: their sizes differ."""
    plain = gradients(grad, activated, gate, act)
    truth = gradients(grad.double(), activated.double(), gate.double(), act)
    assert got.shape == (len(grad), 2 * grad.shape[1])
    for half, p, t in zip(got.chunk(2, -1)[:: -1 if swapped else 1], plain, truth, strict=True):
        assert_within_twice(half, p, t)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Also where both are NaN, and -0.0 is not 0.0."""
    as_integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.view(as_integers), y.view(as_integers))


@pytest.fixture
def launches(monkeypatch) -> MagicMock:
    """In place of both kernels."""
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_geglu_kernel", launch)
    monkeypatch.setattr(kernel, "_geglu_backward_kernel", launch)
    return launch


def whole(T: int, N: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (T, 2N)."""
    return (torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(T + N)) * 2).to(DEVICE, dtype)
