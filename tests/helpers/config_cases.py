"""Tiny random checkpoints of transformers, their config.json edited, and how far this package is from transformers: the
fixture `cases`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import modernbert_lite as ml

VOCAB = 61
LENGTHS = (1, 8, 9, 16, 17, 40, 32, 33)  # on both sides of an original length of 8 or 16, and of 32 positions
_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MODERNBERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "local_attention": 8,
    "initializer_range": 0.2,
    "initializer_cutoff_factor": 3.0,
    "cls_token_id": None,
    "sep_token_id": None,
    **_IDS,
}
GTE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    **_IDS,
}


def save(folder: Path, architecture: str, seed: int = 0, **config: Any) -> Any:
    """A model of transformers with random weights, saved as it saves itself. Raises what its config or model raises."""
    torch.manual_seed(seed)
    modernbert = architecture.startswith("ModernBert")
    kind = transformers.ModernBertConfig if modernbert else transformers.GteConfig
    model = getattr(transformers, architecture)(kind(**{**(MODERNBERT if modernbert else GTE), **config}))
    for name, parameter in model.named_parameters():  # norms away from 1 and biases away from 0
        if "norm" in name.lower() or name.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **keys: Any) -> None:
    """Sets keys of config.json; `...` removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


TEXTS = sequences()


def expected(folder: Path, architecture: str, texts: list[torch.Tensor] = TEXTS) -> list[torch.Tensor]:
    """transformers' hidden states or logits of each text alone, by a network that has seen no other."""
    return outputs(getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval(), texts)


def outputs(fresh: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same of a network of transformers."""
    results = []
    for ids in texts:
        model = copy.deepcopy(fresh) if "dynamic" in str(fresh.config.rope_parameters) else fresh
        with torch.inference_mode():
            out = model(ids[None])
        results.append((out.logits if "logits" in out else out.last_hidden_state)[0])
    return results


def actual(folder: Path, texts: list[torch.Tensor] = TEXTS) -> list[torch.Tensor]:
    """The same of this package, of all texts in one batch."""
    model = ml.load_model(folder)
    batch = ml.pack(texts)
    with torch.inference_mode():
        out = model(batch)
    return list(out) if len(out) == len(texts) < len(batch.input_ids) else ml.unpack(out, batch.cu_seqlens)


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest, relative to the numbers' size where that is over 1; infinite for other shapes or NaN on one side."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        worst = max(worst, float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=1.0)))
    return worst


def check(folder: Path, architecture: str) -> None:
    theirs = expected(folder, architecture)
    assert max(float(x.abs().max()) for x in theirs) > 0.5
    assert difference(actual(folder), theirs) <= 2e-5
