"""Shared by tests/checkpoint: test_sentence_settings, test_sentence_modules."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

import modernbert_lite as ml

TEXTS = ["The ferry leaves at NINE.", "", "a [MASK] and a [SEP]", "tide and boats " * 12, "naïve 図書館 🙂"]


ST = "sentence_transformers.models."


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def set_modules(folder, *modules):
    """(class, config) after the network, in folders of their own. A Dense's and a LayerNorm's weights are random."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": ST + "Transformer"}]
    for i, (kind, config) in enumerate(modules, 1):
        path = f"{i}_{kind.rpartition('.')[2]}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": kind if "." in kind else ST + kind})
        if config is not None:
            write(folder / path / "config.json", config)
        generator = torch.Generator().manual_seed(i)
        if kind == "Dense":
            shape = config["out_features"], config["in_features"]
            save_file(
                {"linear.weight": torch.randn(shape, generator=generator), "linear.bias": torch.ones(shape[0])},
                folder / path / "model.safetensors",
            )
        if kind == "LayerNorm":
            weight = torch.randn(config["dimension"], generator=generator)
            save_file({"norm.weight": weight, "norm.bias": weight / 2}, folder / path / "model.safetensors")
    write(folder / "modules.json", listed)


MEAN = ("Pooling", {"pooling_mode": "mean", "word_embedding_dimension": 32})


@pytest.fixture
def folder(small_checkpoint):
    return prepared(small_checkpoint())


def prepared(folder):
    set_modules(folder, MEAN)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
    return folder


def ours(folder, **options):
    return ml.Embedder.from_pretrained(folder, **options)


def theirs(folder):
    return SentenceTransformer(str(folder), device="cpu")


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
