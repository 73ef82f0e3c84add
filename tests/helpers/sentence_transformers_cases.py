"""Shared by tests/classes: test_sentence_transformers, test_cross_encoder, test_fill_mask_parity."""

from __future__ import annotations

import numpy as np

QUERY = "How does a sourdough starter rise without baker's yeast?"


DOCUMENTS = [
    "Wild yeast and bacteria live on the flour; fed daily, they make the gas that lifts the dough.",
    "The ferry to the island leaves at nine, except on Sundays and in storms.",
    "Yeast.",
    "",
    "A starter is kept alive with flour and water. " * 7,
]


LONG = "The tide came in over the flats while the boats lay on their sides and nobody looked up. " * 90


def assert_same(got, expected, bound=2e-5):
    # Vectors are means and maxima of hidden states of order 1-10; sums over the root of the length grow beyond, and
    # rounding with them: only beyond 10 is the bound relative to the largest.
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    largest = np.abs(expected).max()
    assert largest > 1e-3
    assert np.abs(got - expected).max() <= (bound if largest <= 10 else bound * largest)
