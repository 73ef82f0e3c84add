"""Shared by tests/checkpoint: test_weights, test_weights_refusals."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from modernbert_lite.models.modernbert import MaskedLM, ModernBert

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


SMALL_VOCAB = {"vocab_size": 331, "pad_token_id": 3}


def edit(folder, change, metadata=None):
    """Rewrites model.safetensors: change(its tensors) works in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return tensors


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def renamed(tensors, rename):
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


def stored_values(folder):
    values = {}
    for path in folder.glob("*.safetensors"):
        values.update(load_file(path))
    return values


def assert_holds(model, stored, dtype):
    """Every tensor of the file, whatever its prefix, is in the model, in that dtype, and nothing else is."""
    prefix = "" if isinstance(model, ModernBert) else "model."
    base = ("embeddings.", "layers.", "final_norm.")
    wanted = {}
    for key, tensor in stored.items():
        bare = key.removeprefix("model.")
        if bare.startswith(base):
            wanted[prefix + bare] = tensor
        elif not isinstance(model, ModernBert):
            wanted[key] = tensor
    if isinstance(model, MaskedLM) and model.config.tie_word_embeddings:
        wanted["decoder.weight"] = wanted["model.embeddings.tok_embeddings.weight"]
    state = model.state_dict()
    assert sorted(state) == sorted(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == dtype, name
        assert torch.equal(state[name], tensor.to(dtype)), name
