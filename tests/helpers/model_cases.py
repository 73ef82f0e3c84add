"""Shared by tests/models: test_modernbert, test_modernbert_windows."""

from __future__ import annotations

import pytest
import torch

VOCAB = 997  # small, so that a checkpoint is written and read in milliseconds


RAGGED = [65, 1, 130, 66, 66, 2, 257, 64, 64, 64, 31]


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


@pytest.fixture
def make(make_checkpoint):
    """make_checkpoint with a small vocabulary, whose padding is token 0."""

    def small(architecture="ModernBertModel", **config):
        ids = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
        return make_checkpoint(architecture, **{"vocab_size": VOCAB, **ids, **config})

    return small


def token_ids(length, seed=0):
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


def sequences(lengths=RAGGED):
    return [token_ids(length, i) for i, length in enumerate(lengths)]


def difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


# --- equal to transformers
