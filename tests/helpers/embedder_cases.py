"""Shared by tests/classes: test_embedder, test_embedder_options."""

import numpy as np
import pytest

from modernbert_lite import Embedder

WORDS = ["river", "stone", "quick", "green", "house", "never", "apple", "walk", "under", "seven", "music", "cold"]


def text(i: int, words: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(words))


@pytest.fixture(scope="module")
def tiny():
    return Embedder.from_pretrained("tiny")


def assert_same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a - b).max(initial=0) <= tolerance


# ---- order, batches, laziness --------------------------------------------------------------------------------------
