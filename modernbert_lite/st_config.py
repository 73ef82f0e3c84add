"""The files that sentence-transformers writes beside a checkpoint, in their old (3-5) and new (6) forms.

Module classes are matched by the last part of their dotted names and never imported.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .pooling import POOLING, normalize
from .reading import MAX_TOKENIZER_JSON_BYTES, CheckpointError, Reader, inside, read_json, shown
from .sparse_config import SparseConfig, read_sparse
from .weights import load_dense, network_folder, read_modules

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
LATE_SIMILARITIES = ("maxsim", "meanmaxsim")
_OLD_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": nn.Identity(),
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
class Late:
    """What late interaction needs beside the rest. Queries of fewer tokens than `padded_length` are padded to it."""

    query_length: int | None = None  # the most tokens of a query; None: as any text
    document_length: int | None = None
    padded_length: int = 0
    padding_token: str | None = None  # None: the mask token
    attends: bool = False  # whether the padding is seen by the query's tokens, which it sees itself in any case
    skiplist_words: tuple[str, ...] = ()  # tokens without a vector
    skiplist_tasks: tuple[str, ...] = ("document",)
    prefixes: tuple[str, ...] = ()  # tokens at a text's start that no normalizer may take apart


@dataclass(frozen=True)
class SentenceConfig:
    """What a repository says about making sentence vectors. Without files: mean pooling, as sentence-transformers."""

    pooling: Pooling | None = None  # None: no file says so
    dense: tuple[tuple[str, str], ...] = ()  # Dense and LayerNorm modules: kind and path
    scores: bool = False  # the last of them gives a cross-encoder's scores
    normalize: bool = False
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    max_seq_length: int | None = None
    lower_case: bool = False
    activation_fn: str | None = None  # of a cross-encoder's scores
    sparse: SparseConfig | None = None  # of a sparse encoder (SPLADE) only
    late: Late | None = None  # of a late-interaction model only; its prompts are named "query" and "document"


def read_sentence_config(folder: Path) -> SentenceConfig:
    """Raises CheckpointError for a module, pooling mode or similarity that isn't known, naming it."""
    found: dict[str, Any] = {}
    path = folder / "config_sentence_transformers.json"
    texts = read_json(path) if path.is_file() else {}
    # PyLate's files have neither a module for the mask nor one for the norm; its older ones have no model_type.
    pylate = texts.get("model_type") == "ColBERT" or "query_prefix" in texts
    late = pylate or texts.get("model_type") == "MultiVectorEncoder"
    mask: dict[str, Any] = {}
    if pylate:
        words = texts.get("skiplist_words")
        mask["skiplist_words"] = list(string.punctuation) if words is None else words
    modules = read_modules(folder)
    found["sparse"] = None if late else read_sparse(folder, modules, texts, _own_settings(network_folder(folder))[1])
    for module in [] if found["sparse"] else modules:
        kind, place = str(module.get("type")).rpartition(".")[2], module.get("path", "")
        where = inside(folder, place, "modules.json")
        if found.get("normalize") and kind in ("Pooling", "Dense", "LayerNorm"):
            raise CheckpointError(f"modules.json: {kind} after Normalize is not supported")
        if kind == "Transformer":
            continue
        if kind == "Pooling" and not late:
            found["pooling"] = _pooling(where)
        elif kind == "Dense" or (kind == "LayerNorm" and not late):
            found["dense"] = (*found.get("dense", ()), (kind, place))
            found["scores"] = read_json(where / "config.json").get("module_output_name") == "scores"
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind == "MultiVectorMask" and late:
            mask = read_json(where / "config.json")
        else:
            raise CheckpointError(
                f"modules.json: module {module.get('type')!r} is not supported; known: Transformer, Dense, Normalize, "
                + ("MultiVectorMask" if late else "LayerNorm, Pooling")
            )
    own_path, own = _own_settings(network_folder(folder))
    found |= {**_texts(path, texts, late), **_lengths(own_path, own)}
    if found["sparse"] and texts.get("similarity_fn_name") is None:
        found["similarity_fn_name"] = "dot"  # SparseEncoder's default
    if late:
        found["normalize"] = pylate or found.get("normalize", False)
        try:
            found["late"] = _late(texts if pylate else {}, own, mask)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    return SentenceConfig(**found)


def _pooling(folder: Path) -> Pooling:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in list(POOLING) for mode in modes):
        raise CheckpointError(f"{folder}: pooling_mode {shown(modes)} is not supported; known: {', '.join(POOLING)}")
    return Pooling(tuple(modes), config.get("include_prompt") is not False)


def _texts(path: Path, config: dict[str, Any], late: bool) -> dict[str, Any]:
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{path}: prompts is {shown(prompts)}; it must map names to strings")
    prefixes = {task: config.get(f"{task}_prefix") or "" for task in ("query", "document") if late}
    if not all(isinstance(p, str) for p in prefixes.values()):
        raise CheckpointError(f"{path}: the prefixes of queries and documents are {shown(prefixes)}, no strings")
    for text in (*prompts.values(), *prefixes.values()):
        if text != text.encode(errors="replace").decode():
            raise CheckpointError(f"{path}: {shown(text)} is not valid Unicode")
    default = config.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise CheckpointError(
            f"{path}: default_prompt_name {shown(default)} is not among the prompts {shown(sorted(prompts))}"
        )
    # PyLate's "MaxSim" and what an encoder had before it was trained for late interaction are the default there.
    known = LATE_SIMILARITIES if late else SIMILARITIES
    similarity = config.get("similarity_fn_name") or known[0]
    if late and similarity not in known:
        similarity = known[0]
    if similarity not in known:
        raise CheckpointError(f"{path}: similarity_fn_name {shown(similarity)}; known: {', '.join(known)}")
    return {
        "prompts": prompts | {task: p + prompts.get(task, "").removeprefix(p) for task, p in prefixes.items()},
        "default_prompt_name": default,
        "similarity_fn_name": similarity,
        "activation_fn": config.get("activation_fn"),
    }


def _late(pylate: dict[str, Any], own: dict[str, Any], mask: dict[str, Any]) -> Late:
    """pylate: config_sentence_transformers.json, if PyLate wrote it; own: the network's file, where
    sentence-transformers has the same; mask: of the module MultiVectorMask."""
    get = Reader({**pylate, **own})
    longest, padded, raw = _length(get, "query_length"), 0, get.mapping("query_expansion")
    if "query_expansion" not in get.raw and pylate and get.flag("do_query_expansion", True, strings=True):
        older = get.flag("attend_to_mask_tokens", False, strings=True)
        attends = get.flag("attend_to_expansion_tokens", older, strings=True)
        raw = {"strategy": "fixed", "attend": attends, "length": longest or 32}
    expansion = Reader(raw)
    if raw:
        padded = expansion.whole("length", 0)
        if longest is not None and longest < padded:
            raise CheckpointError(f"query_length is {longest}; it must be at least query_expansion's length, {padded}")
        longest = padded if expansion.choice("strategy", "", ("fixed", "min")) == "fixed" else longest
    if mask.get("keep_only_token_ids"):
        raise CheckpointError("keep_only_token_ids, for pictures, is not supported; it must be null")
    words, tasks = mask.get("skiplist_words") or [], mask.get("skiplist_tasks") or ["document"]
    for name, value in (("skiplist_words", words), ("skiplist_tasks", tasks)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{name} is {shown(value)}; it must be a list of strings")
    token = expansion.raw.get("token")
    if token is not None and not isinstance(token, str):
        raise CheckpointError(f"token of query_expansion is {shown(token)}; it must be a string or null")
    return Late(
        query_length=longest,
        document_length=_length(get, "document_length"),
        padded_length=padded,
        padding_token=token,
        attends=expansion.flag("attend", False),
        skiplist_words=tuple(words),
        skiplist_tasks=tuple(tasks),
        prefixes=tuple(filter(None, (pylate.get("query_prefix"), pylate.get("document_prefix")))),
    )


def _length(get: Reader, key: str) -> int | None:
    return None if get.raw.get(key) is None else get.whole(key, 1)


def _own_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """sentence_bert_config.json, or its older names (sentence_roberta_config.json ..)."""
    for path in sorted(folder.glob("sentence_*_config.json")):
        return path, read_json(path)
    return folder, {}


def _lengths(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    length = config.get("max_seq_length")
    if length is not None and (type(length) is not int or not 0 < length < 1 << 31):
        raise CheckpointError(f"{path}: max_seq_length is {shown(length)}; it must be null or from 1 to 2^31 - 1")
    return {"max_seq_length": length, "lower_case": bool(config.get("do_lower_case"))}


def length_limit(sentence: SentenceConfig, folder: Path, max_position_embeddings: int) -> int:
    """The repository's own limit, else the smaller of the tokenizer's (1e30 in some) and the model's."""
    if sentence.max_seq_length is not None:
        return sentence.max_seq_length
    path = folder / "tokenizer_config.json"
    limit = read_json(path, MAX_TOKENIZER_JSON_BYTES).get("model_max_length") if path.is_file() else None
    if isinstance(limit, (int, float)) and 0 < limit < max_position_embeddings:
        return int(limit)
    return max_position_embeddings


def score_activation(name: object, error: type[ValueError] = CheckpointError) -> Callable[[Tensor], Tensor]:
    """An activation by its dotted torch name ("torch.nn.modules.activation.Sigmoid") or its last part."""
    text = "Identity" if name is None else name if isinstance(name, str) else ""
    last = text.rpartition(".")[2].lower()
    known = {key.lower(): function for key, function in _ACTIVATIONS.items()}
    if last not in known or ("." in text and not text.startswith("torch.")):
        raise error(f"activation function {shown(name)} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return known[last]


class Dense:
    """A linear layer on sentence vectors, or, in late interaction, on tokens': (B, in) -> (B, out), fp32."""

    def __init__(self, folder: Path, device: torch.device, on: str = "sentence_embedding"):
        config = read_json(folder / "config.json")
        if config.get("module_input_name") not in (None, on):
            raise CheckpointError(f"{folder}: this Dense works on {shown(config['module_input_name'])}, not on {on!r}")
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


class Norm:
    """A LayerNorm of sentence vectors: (B, C) -> (B, C), fp32. A module of cross-encoders such as ettin-reranker."""

    def __init__(self, folder: Path, device: torch.device):
        self.in_features = self.out_features = width = Reader(read_json(folder / "config.json")).whole("dimension", 1)
        self.tensors = load_dense(folder, {"norm.weight": (width,), "norm.bias": (width,)}, device)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.tensors["norm.weight"], self.tensors["norm.bias"])


def on_vectors(
    root: Path, modules: Iterable[tuple[str, str]], width: int, device: torch.device, on: str = "sentence_embedding"
) -> list[Dense | Norm]:
    """The modules that change pooled vectors of `width`, or `on` tokens'. Raises CheckpointError for one that gets
    another width."""
    made: list[Dense | Norm] = []
    for kind, path in modules:
        made.append(Norm(root / path, device) if kind == "LayerNorm" else Dense(root / path, device, on))
        if made[-1].in_features != width:
            raise CheckpointError(f"{path}: in_features is {made[-1].in_features}; it gets {width}")
        width = made[-1].out_features
    return made


def finish(x: Tensor, dense: Sequence[Dense | Norm], unit: bool, truncate_dim: int | None) -> Tensor:
    """Pooled (B, C) -> what the user gets: Dense layers, then cut to truncate_dim, then normalise."""
    for layer in dense:
        x = layer(x)
    x = x[:, :truncate_dim]
    return normalize(x) if unit else x
