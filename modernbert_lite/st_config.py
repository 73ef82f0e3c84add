"""The files that sentence-transformers writes beside a checkpoint, in their old (3-5) and new (6) forms.

Module classes are matched by the last part of their dotted names and never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import MAX_TOKENIZER_JSON_BYTES, CheckpointError, inside, read_json, shown
from .pooling import POOLING, normalize
from .weights import load_dense, network_folder, read_modules

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_OLD_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": nn.functional.gelu,
    "SiLU": nn.functional.silu,
}


@dataclass(frozen=True)
class Pooling:
    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True  # false: the prompt's tokens are not pooled


@dataclass(frozen=True)
class SentenceConfig:
    """What a repository says about making sentence vectors. Without files: mean pooling, as sentence-transformers."""

    pooling: Pooling | None = None  # None: no file says so
    dense_paths: tuple[str, ...] = ()
    normalize: bool = False
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    max_seq_length: int | None = None
    lower_case: bool = False
    activation_fn: str | None = None  # of a cross-encoder's scores


def read_sentence_config(folder: Path) -> SentenceConfig:
    """Raises CheckpointError for a module, pooling mode or similarity that isn't known, naming it."""
    found: dict[str, Any] = {}
    for module in read_modules(folder):
        kind, path = str(module.get("type")).rpartition(".")[2], module.get("path", "")
        where = inside(folder, path, "modules.json")
        if found.get("normalize") and kind in ("Pooling", "Dense"):
            raise CheckpointError(f"modules.json: {kind} after Normalize is not supported")
        if kind == "Transformer":
            continue
        if kind == "Pooling":
            found["pooling"] = _pooling(where)
        elif kind == "Dense":
            found["dense_paths"] = (*found.get("dense_paths", ()), path)
        elif kind == "Normalize":
            found["normalize"] = True
        else:
            raise CheckpointError(
                f"modules.json: module {module.get('type')!r} is not supported; known: Transformer, Pooling, Dense, "
                "Normalize"
            )
    return SentenceConfig(**found, **_texts(folder), **_lengths(network_folder(folder)))


def _pooling(folder: Path) -> Pooling:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in list(POOLING) for mode in modes):
        raise CheckpointError(f"{folder}: pooling_mode {shown(modes)} is not supported; known: {', '.join(POOLING)}")
    return Pooling(tuple(modes), config.get("include_prompt") is not False)


def _texts(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{path}: prompts is {shown(prompts)}; it must map names to strings")
    default = config.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise CheckpointError(
            f"{path}: default_prompt_name {shown(default)} is not among the prompts {shown(sorted(prompts))}"
        )
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(f"{path}: similarity_fn_name {shown(similarity)}; known: {', '.join(SIMILARITIES)}")
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity_fn_name": similarity,
        "activation_fn": config.get("activation_fn"),
    }


def _lengths(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, or its older names (sentence_roberta_config.json ..)."""
    for path in sorted(folder.glob("sentence_*_config.json")):
        config = read_json(path)
        length = config.get("max_seq_length")
        if length is not None and (type(length) is not int or not 0 < length < 1 << 31):
            raise CheckpointError(f"{path}: max_seq_length is {shown(length)}; it must be null or from 1 to 2^31 - 1")
        return {"max_seq_length": length, "lower_case": bool(config.get("do_lower_case"))}
    return {}


def length_limit(sentence: SentenceConfig, folder: Path, max_position_embeddings: int) -> int:
    """The repository's own limit, else the smaller of the tokenizer's (1e30 in some) and the model's."""
    if sentence.max_seq_length is not None:
        return sentence.max_seq_length
    path = folder / "tokenizer_config.json"
    limit = read_json(path, MAX_TOKENIZER_JSON_BYTES).get("model_max_length") if path.is_file() else None
    if isinstance(limit, (int, float)) and 0 < limit < max_position_embeddings:
        return int(limit)
    return max_position_embeddings


def score_activation(name: object) -> Callable[[Tensor], Tensor]:
    """An activation by its dotted torch name ("torch.nn.modules.activation.Sigmoid") or its last part."""
    text = "Identity" if name is None else name if isinstance(name, str) else ""
    last = text.rpartition(".")[2].lower()
    known = {key.lower(): function for key, function in _ACTIVATIONS.items()}
    if last not in known or ("." in text and not text.startswith("torch.")):
        raise CheckpointError(f"activation function {shown(name)} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return known[last]


class Dense:
    """A linear layer on sentence vectors: (B, in) -> (B, out), fp32."""

    def __init__(self, folder: Path, device: torch.device):
        config = read_json(folder / "config.json")
        if config.get("module_input_name") not in (None, "sentence_embedding"):
            raise CheckpointError(
                f"{folder}: this Dense works on {shown(config['module_input_name'])}, not on 'sentence_embedding'"
            )
        # sentence-transformers' default, where the key is absent, is Tanh.
        self.activation = score_activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        sizes = config.get("in_features"), config.get("out_features")
        self.residual = bool(config.get("use_residual"))
        expected: dict[str, tuple[Any, ...]] = {"linear.weight": (sizes[1], sizes[0])}
        if config.get("bias", True):
            expected["linear.bias"] = (sizes[1],)
        if self.residual and sizes[0] != sizes[1]:
            expected["residual.weight"] = (sizes[1], sizes[0])
        self.tensors = load_dense(folder, expected, device)

        self.in_features, self.out_features = int(sizes[0]), int(sizes[1])

    def __call__(self, x: Tensor) -> Tensor:
        y = self.activation(nn.functional.linear(x, self.tensors["linear.weight"], self.tensors.get("linear.bias")))
        if not self.residual:
            return y
        through = self.tensors.get("residual.weight")
        return y + (x if through is None else nn.functional.linear(x, through))


def finish(x: Tensor, dense: list[Dense], unit: bool, truncate_dim: int | None) -> Tensor:
    """Pooled (B, C) -> what the user gets: Dense layers, then cut to truncate_dim, then normalise."""
    for layer in dense:
        x = layer(x)
    x = x[:, :truncate_dim]
    return normalize(x) if unit else x
