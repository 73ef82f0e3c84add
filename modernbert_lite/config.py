"""config.json of every generation -> one frozen dataclass. What can't be honoured is refused by name.

Needs no torch, so that `modernbert-lite info` and error messages stay quick.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

# The ones that ModernBERT checkpoints have been seen to name are "gelu" (exact erf) and "silu".
ACTIVATIONS = ("gelu", "silu", "relu", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "linear", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"
MAX_JSON_BYTES = 1 << 20
MAX_TOKENIZER_JSON_BYTES = 1 << 24  # tokenizer_config.json repeats every added token: over 1 MB for Gemma's

# Far above any published checkpoint: a config that claims more is broken or hostile, and would build modules for ever.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "vocab_size": 1 << 24,
    "num_labels": 1 << 16,
}


class OptionError(ValueError):
    """An option that this model or machine doesn't have: the shell calls it bad usage."""


class CheckpointError(ValueError):
    """A checkpoint that is missing something, is damaged, or asks for what this package can't do."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer. `yarn` as in arXiv 2309.00071; `linear` divides positions by `factor`."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class ModernBertConfig:
    """Everything that a ModernBERT checkpoint may vary; fields keep Hugging Face's names, defaults are the base's."""

    architecture: str = "ModernBertModel"
    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152  # width of one half of the GLU: Wi has twice as many rows
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: tuple[str, ...] = tuple(SLIDING if i % 3 else FULL for i in range(22))
    local_attention: int = 128  # the whole window: a token sees local_attention // 2 on each side, inclusive
    full_rope: Rope = Rope(160_000.0)
    sliding_rope: Rope = Rope(10_000.0)
    classifier_pooling: str = "cls"
    classifier_bias: bool = False  # bias of head.dense; the classifier itself always has one
    classifier_activation: str = "gelu"
    decoder_bias: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    activation_fn: str | None = None  # the activation that a cross-encoder names for its scores

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        # hidden_size / heads, whatever a `head_dim` key says: the reference's attention ignores that key.
        return self.hidden_size // self.num_attention_heads

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) of a layer, inclusive; (-1, -1) is unlimited. local_attention 128 -> (64, 64)."""
        if self.layer_types[layer] == FULL:
            return -1, -1
        return self.local_attention // 2, self.local_attention // 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModernBertConfig:
        """Reads a parsed config.json of transformers 4.48 (theta keys), 5 (`layer_types`, `rope_parameters`) or both.

        Unknown keys are ignored. Raises CheckpointError naming the key, the value and what is accepted.
        """
        model_type = raw.get("model_type")
        if model_type != "modernbert":
            raise CheckpointError(f"model_type {shown(model_type)} is not supported; known: 'modernbert'")
        get = _Reader(raw)
        layers = get.whole("num_hidden_layers", 22)
        hidden, heads = get.whole("hidden_size", 768), get.whole("num_attention_heads", 12)
        if hidden % heads or (hidden // heads) % 2:
            raise CheckpointError(
                f"hidden_size {hidden} over num_attention_heads {heads} must give a whole, even head size (for RoPE)"
            )
        pooling = get.choice("classifier_pooling", "cls", ("cls", "mean"))
        return cls(
            architecture=_architecture(raw),
            vocab_size=get.whole("vocab_size", 50368),
            hidden_size=hidden,
            intermediate_size=get.whole("intermediate_size", 1152),
            num_attention_heads=heads,
            hidden_activation=get.choice("hidden_activation", "gelu", ACTIVATIONS),
            max_position_embeddings=get.whole("max_position_embeddings", 8192),
            norm_eps=get.number("norm_eps", 1e-5),
            norm_bias=get.flag("norm_bias", False),
            attention_bias=get.flag("attention_bias", False),
            mlp_bias=get.flag("mlp_bias", False),
            layer_types=_layer_types(get, layers),
            local_attention=get.whole("local_attention", 128),
            full_rope=_rope(get, FULL),
            sliding_rope=_rope(get, SLIDING),
            classifier_pooling=pooling,
            classifier_bias=get.flag("classifier_bias", False),
            classifier_activation=get.choice("classifier_activation", "gelu", ACTIVATIONS),
            decoder_bias=get.flag("decoder_bias", True),
            tie_word_embeddings=get.flag("tie_word_embeddings", True),
            pad_token_id=get.token_id("pad_token_id"),
            labels=_labels(get),
            activation_fn=_activation_fn(raw),
        )


def read_config(folder: str | Path) -> ModernBertConfig:
    """`folder`/config.json. Raises CheckpointError for a missing, malformed or unsupported one."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}: not a checkpoint folder")
    try:
        return ModernBertConfig.from_dict(read_json(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON object (in modules.json: the list) in a file. Raises CheckpointError if it is missing, is longer than
    `limit` bytes, is malformed or holds something else."""
    wanted = list if path.name == "modules.json" else dict
    try:
        content = path.read_bytes() if path.stat().st_size <= limit else None
        value = None if content is None else json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if content is None:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read")
    if not isinstance(value, wanted):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; a {wanted.__name__} is needed")
    return value


def inside(folder: Path, relative: object, source: str) -> Path:
    """`folder / relative` for a path that a checkpoint's file names; refused if it could leave the folder.

    Links are followed only within the folder or, in a hub cache (models--ORG--NAME/snapshots/COMMIT/file ->
    ../../blobs/HASH), within that model's cache. `source` names the file that holds the path, for the error message.
    """
    text = relative if isinstance(relative, str) else "\0"
    pure = PurePosixPath(text)
    if "\0" in text or "\\" in text or pure.is_absolute() or ".." in pure.parts or Path(text).drive:
        raise CheckpointError(
            f"{source}: path {shown(relative)} leaves the model's folder; only paths inside it are read"
        )
    root, path = folder.resolve(), folder / pure
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    try:
        path.exists()  # raises for a name that no file can have
        leaves = not path.resolve().is_relative_to(root.parent.parent if in_cache else root)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: path {shown(relative)} can't be followed: {shown(error)}") from None
    if leaves:
        raise CheckpointError(f"{source}: path {shown(relative)} is a link that leaves the model's folder")
    return path


def shown(value: object) -> str:
    """A value for an error message: its repr, shortened, and printable anywhere."""
    try:
        text = (str(value) if isinstance(value, BaseException) else repr(value)).encode(errors="replace").decode()
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else text[:160] + "…" + text[-30:]


class _Reader:
    """Typed access to a raw config; a key that is absent or null takes the default."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def _fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{key} is {shown(value)}; it must be {allowed}")

    def whole(self, key: str, default: int) -> int:
        value = default if self.raw.get(key) is None else self.raw[key]
        limit = _LIMITS.get(key, 1 << 31)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise self._fail(key, value, f"a whole number from 1 to {limit}")
        return value

    def token_id(self, key: str) -> int | None:
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self._fail(key, value, "a whole number from 0, or null")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self._fail(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, bool):
            raise self._fail(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = default if self.raw.get(key) is None else self.raw[key]
        if value not in allowed:
            raise self._fail(key, value, "one of " + ", ".join(allowed))
        return str(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = {} if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, Mapping):
            raise self._fail(key, value, "an object or null")
        return value


def _layer_types(get: _Reader, layers: int) -> tuple[str, ...]:
    """`layer_types` if present; else every n-th layer, from layer 0, is global."""
    types = get.raw.get("layer_types")
    if types is None:
        every = get.whole("global_attn_every_n_layers", 3)
        return tuple(SLIDING if i % every else FULL for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise CheckpointError(
            f"layer_types is {shown(types)}; it must name {layers} layers (num_hidden_layers), each {FULL!r} or "
            f"{SLIDING!r}"
        )
    return tuple(types)


def _rope(get: _Reader, kind: str) -> Rope:
    """RoPE of one kind of layer: rope_parameters[kind], then rope_scaling (both kinds), then the theta keys."""
    per_kind = get.mapping("rope_parameters")
    if per_kind and not set(per_kind) & {FULL, SLIDING}:
        raise CheckpointError(f"rope_parameters has {shown(sorted(per_kind))}; it must hold {FULL!r} and {SLIDING!r}")
    values = {**_Reader(per_kind).mapping(kind), **get.mapping("rope_scaling")}
    read = _Reader(values)

    # `local_rope_theta: null` means the global theta in transformers 4.48-4.57; an absent key means 10,000.
    theta = get.number("global_rope_theta", 160_000.0)
    if kind == SLIDING and not ("local_rope_theta" in get.raw and get.raw["local_rope_theta"] is None):
        theta = get.number("local_rope_theta", 10_000.0)
    theta = read.number("rope_theta", theta)

    rope_type = read.raw.get("rope_type") or read.raw.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"rope type {shown(rope_type)} of {kind} is not supported; known: {', '.join(ROPE_TYPES)}"
        )
    if read.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor {values['partial_rotary_factor']!r} is not supported; only 1.0")
    if rope_type == "default":
        return Rope(theta)
    longest = get.whole("max_position_embeddings", 8192)
    original = read.whole("original_max_position_embeddings", longest)
    factor = read.number("factor", longest / original)
    if rope_type == "linear":
        return Rope(theta, "linear", factor)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=read.number("attention_factor", _yarn_attention_factor(read, factor)),
    )


def _yarn_attention_factor(read: _Reader, factor: float) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22); mscale and mscale_all_dim as in transformers' rope utilities."""

    def mscale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if read.raw.get("mscale") and read.raw.get("mscale_all_dim"):
        return mscale(read.number("mscale", 1.0)) / mscale(read.number("mscale_all_dim", 1.0))
    return mscale(1.0)


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or ["ModernBertModel"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"architectures is {shown(names)}; it must be a list of class names")
    return str(names[0])


def _labels(get: _Reader) -> tuple[str, ...]:
    """id2label in the order of its ids; without one, LABEL_0.. as many as num_labels (transformers' default: 2)."""
    id2label = {str(key): label for key, label in get.mapping("id2label").items()}
    if not id2label:
        return tuple(f"LABEL_{i}" for i in range(get.whole("num_labels", 2)))
    if sorted(id2label) != sorted(str(i) for i in range(len(id2label))):
        raise CheckpointError(f"id2label has the ids {shown(sorted(id2label))}; they must be 0 to {len(id2label) - 1}")
    return tuple(str(id2label[str(i)]) for i in range(len(id2label)))


def _activation_fn(raw: Mapping[str, Any]) -> str | None:
    """sentence-transformers 4 and 5 keep a cross-encoder's activation in config.json, before that under another key."""
    nested = raw.get("sentence_transformers")
    name = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    name = name or raw.get("sbert_ce_default_activation_function")
    return name if isinstance(name, str) else None
