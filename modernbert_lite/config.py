"""config.json of every generation -> one frozen dataclass. What can't be honoured is refused by name.

Needs no torch, so that `modernbert-lite info` and error messages stay quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reading import CheckpointError, Reader, read_json, shown

# The ones that ModernBERT checkpoints have been seen to name are "gelu" (exact erf) and "silu".
ACTIVATIONS = ("gelu", "silu", "relu", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "linear", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# What Alibaba's NewConfig has and transformers' GteConfig doesn't: a file with one of them speaks the older dialect.
_NEW_CONFIG_KEYS = (
    "rope_theta",
    "rope_scaling",
    "pack_qkv",
    "layer_norm_type",
    "unpad_inputs",
    "use_memory_efficient_attention",
    "logn_attention_scale",
    "logn_attention_clip1",
)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer. `yarn` as in arXiv 2309.00071; `linear` divides positions by `factor`;
    `ntk`, GTE's own: theta times `factor`, all frequencies over factor^(2 / head_dim), or mixed, where it has an
    exponent for that: frequency m (from 1) over exp(a m^mixed_b), the last one over `factor`."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    mixed_b: float | None = None


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
    problem_type: str | None = None  # which function makes scores of a sequence classifier's logits
    entailment_id: int | None = None  # the label that means entailment, in a model of natural language inference
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
        _check_type(raw, cls)
        get = Reader(raw)
        layers = get.whole("num_hidden_layers", 22)
        hidden, heads = _sizes(get)
        pooling = get.choice("classifier_pooling", "cls", ("cls", "mean"))
        labels = _labels(get)
        return cls(
            architecture=_architectures(raw, "ModernBertModel")[0],
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
            labels=labels,
            problem_type=_problem_type(get),
            entailment_id=_entailment_id(get, labels),
            activation_fn=_activation_fn(raw),
        )


@dataclass(frozen=True)
class GteConfig:
    """A GTE v1.5 encoder, Alibaba's "NewModel", in any of its dialects; fields keep NewConfig's names and defaults."""

    architecture: str = "NewModel"
    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # width of one half of the GLU: up_gate_proj has twice as many rows
    hidden_act: str = "gelu"
    head_act: str = "gelu"  # of the masked-token head: Alibaba's is hidden_act, transformers' always gelu
    max_position_embeddings: int = 2048
    type_vocab_size: int = 1  # rows of the table of token types; 0: there is none
    layer_norm_type: str = "layer_norm"  # of the layers' norms; the embeddings' is always a LayerNorm
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "rope"
    rope: Rope = Rope(10_000.0)
    logn_attention_scale: bool = False  # queries times ln(length) / ln(max_position_embeddings)
    logn_attention_clip1: bool = False  # but not below 1
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None  # which function makes scores of a sequence classifier's logits
    entailment_id: int | None = None  # the label that means entailment, in a model of natural language inference
    activation_fn: str | None = None
    sparse: bool = False  # beside the encoder the file has a weight for each token (gte-multilingual-base)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GteConfig:
        """Reads a parsed config.json of model_type "new" or "gte": NewConfig's (also as transformers 5 saves it again)
        or transformers' own GteConfig, which has other defaults.

        Unknown keys are ignored. Raises CheckpointError naming the key, the value and what is accepted.
        """
        _check_type(raw, cls)
        get = Reader(raw)
        hidden, heads = _sizes(get)
        native = _is_native(get)
        logn = get.flag("logn_attention_scale", False, strings=True)  # by a logarithm, which 1 has none of
        longest = get.whole("max_position_embeddings", 8192 if native else 2048, least=2 if logn else 1)
        architectures = _architectures(raw, "GteModel" if native else "NewModel")
        labels = _labels(get)
        act = get.choice("hidden_act", "gelu", ACTIVATIONS)
        return cls(
            architecture=architectures[0],
            vocab_size=get.whole("vocab_size", 250048 if native else 30528),
            hidden_size=hidden,
            num_hidden_layers=get.whole("num_hidden_layers", 12),
            num_attention_heads=heads,
            intermediate_size=get.whole("intermediate_size", 3072),
            hidden_act=act,
            head_act="gelu" if native else act,
            max_position_embeddings=longest,
            type_vocab_size=get.whole("type_vocab_size", 1, least=0),
            layer_norm_type=get.choice("layer_norm_type", "layer_norm", ("layer_norm", "rms_norm")),
            layer_norm_eps=get.number("layer_norm_eps", 1e-12),
            # transformers' own class ignores the key, which files converted from BERT's still have.
            position_embedding_type="rope"
            if native
            else get.choice("position_embedding_type", "rope", ("rope", "absolute")),
            rope=_gte_rope(get, native, longest),
            logn_attention_scale=logn,
            logn_attention_clip1=get.flag("logn_attention_clip1", False, strings=True),
            tie_word_embeddings=get.flag("tie_word_embeddings", True, strings=True),
            pad_token_id=get.token_id("pad_token_id"),
            labels=labels,
            problem_type=_problem_type(get),
            entailment_id=_entailment_id(get, labels),
            activation_fn=_activation_fn(raw),
            sparse=len(labels) == 1 and any("ForTokenClassification" in name for name in architectures),
        )


Config = ModernBertConfig | GteConfig
_CONFIGS: dict[str, type[ModernBertConfig] | type[GteConfig]] = {
    "modernbert": ModernBertConfig,
    "new": GteConfig,
    "gte": GteConfig,
}


def read_config(folder: str | Path) -> Config:
    """`folder`/config.json. Raises CheckpointError for a missing, malformed or unsupported one."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}: not a checkpoint folder")
    try:
        raw = read_json(path)
        return _CONFIGS.get(str(raw.get("model_type")), ModernBertConfig).from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_type(raw: Mapping[str, Any], wanted: type[Config]) -> None:
    model_type = raw.get("model_type")
    if _CONFIGS.get(model_type if isinstance(model_type, str) else "") is wanted:
        return
    if isinstance(model_type, str) and model_type in _CONFIGS:
        other = _CONFIGS[model_type].__name__
        raise CheckpointError(f"model_type {model_type!r} is {other}'s, not {wanted.__name__}'s: see read_config")
    decoder = ": a causal decoder, and these are encoders" if model_type == "modernbert-decoder" else ""
    known = ", ".join(map(repr, _CONFIGS))
    raise CheckpointError(f"model_type {shown(model_type)} is not supported{decoder}; known: {known}")


def _sizes(get: Reader) -> tuple[int, int]:
    hidden, heads = get.whole("hidden_size", 768), get.whole("num_attention_heads", 12)
    if hidden % heads or (hidden // heads) % 2:
        raise CheckpointError(
            f"hidden_size {hidden} over num_attention_heads {heads} must give a whole, even head size (for RoPE)"
        )
    return hidden, heads


def _layer_types(get: Reader, layers: int) -> tuple[str, ...]:
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


def _rope(get: Reader, kind: str) -> Rope:
    """RoPE of one kind of layer: rope_parameters[kind], then rope_scaling (both kinds), then the theta keys."""
    per_kind = get.mapping("rope_parameters")
    if per_kind and not set(per_kind) & {FULL, SLIDING}:
        raise CheckpointError(f"rope_parameters has {shown(sorted(per_kind))}; it must hold {FULL!r} and {SLIDING!r}")
    values = {**Reader(per_kind).mapping(kind), **get.mapping("rope_scaling")}
    read = Reader(values)

    # `local_rope_theta: null` means the global theta in transformers 4.48-4.57; an absent key means 10,000.
    theta = get.number("global_rope_theta", 160_000.0)
    if kind == SLIDING and not ("local_rope_theta" in get.raw and get.raw["local_rope_theta"] is None):
        theta = get.number("local_rope_theta", 10_000.0)
    theta = read.number("rope_theta", theta)

    return _rope_of(read, theta, ROPE_TYPES, f"rope type {{}} of {kind}", get.whole("max_position_embeddings", 8192))


def _is_native(get: Reader) -> bool:
    """Whether a config is transformers' GteConfig, rather than Alibaba's NewConfig, whose defaults differ. Both call
    themselves "gte"; "new" is the latter's alone."""
    if get.raw["model_type"] == "new":
        return False
    parameters = get.mapping("rope_parameters")
    if parameters:
        return "ntk" not in (parameters.get("rope_type"), parameters.get("type"))
    if any(key in get.raw for key in _NEW_CONFIG_KEYS):
        return False
    raise CheckpointError(
        "model_type is 'gte', which is transformers' GteConfig if there are rope_parameters, and Alibaba's NewConfig "
        f"if there is one of {', '.join(_NEW_CONFIG_KEYS)}; this file has none of them, and their defaults differ"
    )


def _gte_rope(get: Reader, native: bool, longest: int) -> Rope:
    known = ROPE_TYPES if native else ("default", "ntk")
    given = {key: get.mapping(key) for key in ("rope_parameters", "rope_scaling") if get.mapping(key)}
    read = Reader({})
    where = " and ".join(given)
    for key, value in (item for values in given.values() for item in values.items() if item[1] is not None):
        key = "rope_type" if key == "type" else key  # its older name; transformers 5 writes both
        other = read.raw.setdefault(key, value)
        if other is not value and other != value:
            raise CheckpointError(f"{where} differ in {key!r}: {shown(other)} and {shown(value)}; one is enough")
    if "rope_type" not in read.raw and read.raw.keys() - {"rope_theta"}:
        raise CheckpointError(
            f"{where} has {shown(sorted(read.raw))} and no type; it must be one of {', '.join(known)}"
        )
    theta = read.number("rope_theta", get.number("rope_theta", 160_000.0 if native else 10_000.0))
    return _rope_of(read, theta, known, f"{where} type {{}}", longest)


def _rope_of(read: Reader, theta: float, known: tuple[str, ...], name: str, longest: int) -> Rope:
    """name: for messages, with {} where the type goes."""
    rope_type = read.raw.get("rope_type") or read.raw.get("type") or "default"
    if rope_type not in known:
        raise CheckpointError(f"{name.format(shown(rope_type))} is not supported; known: {', '.join(known)}")
    if read.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor {read.raw['partial_rotary_factor']!r} is not supported; only 1.0")
    if rope_type == "default":
        return Rope(theta)
    if rope_type == "ntk":
        if read.raw.get("factor") is None:
            raise CheckpointError(f"{name.format(repr('ntk'))} has no factor; it must be a positive number")
        mixed_b = None if read.raw.get("mixed_b") is None else read.number("mixed_b", 1.0)
        return Rope(theta, "ntk", read.number("factor", 1.0), mixed_b=mixed_b)
    original = read.whole("original_max_position_embeddings", longest)
    factor = read.number("factor", longest / original)
    if rope_type == "linear":
        return Rope(theta, "linear", factor)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=read.number("attention_factor", _yarn_attention_factor(read, factor)),
    )


def _yarn_attention_factor(read: Reader, factor: float) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22); mscale and mscale_all_dim as in transformers' rope utilities."""

    def mscale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if read.raw.get("mscale") and read.raw.get("mscale_all_dim"):
        return mscale(read.number("mscale", 1.0)) / mscale(read.number("mscale_all_dim", 1.0))
    return mscale(1.0)


def _architectures(raw: Mapping[str, Any], default: str) -> list[str]:
    names = raw.get("architectures") or [default]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"architectures is {shown(names)}; it must be a list of class names")
    return names


def _labels(get: Reader) -> tuple[str, ...]:
    """id2label in the order of its ids; without one, LABEL_0.. as many as num_labels (transformers' default: 2)."""
    id2label = {str(key): label for key, label in get.mapping("id2label").items()}
    if not id2label:
        return tuple(f"LABEL_{i}" for i in range(get.whole("num_labels", 2)))
    if sorted(id2label) != sorted(str(i) for i in range(len(id2label))):
        raise CheckpointError(f"id2label has the ids {shown(sorted(id2label))}; they must be 0 to {len(id2label) - 1}")
    return tuple(str(id2label[str(i)]) for i in range(len(id2label)))


def _problem_type(get: Reader) -> str | None:
    return None if get.raw.get("problem_type") is None else get.choice("problem_type", "", PROBLEM_TYPES)


def _entailment_id(get: Reader, labels: tuple[str, ...]) -> int | None:
    """The id of the first label in label2id whose name starts with "entail", in any case: as transformers' zero-shot
    pipeline finds it. Without label2id, its place in id2label. None: no label is named so. It isn't checked against
    the labels here: a file may keep the label2id of the model that it was trained from, and only zero-shot needs it."""
    ids = get.mapping("label2id") or {label: i for i, label in enumerate(labels)}
    for name, i in ids.items():
        if name.lower().startswith("entail"):
            return int(i) if type(i) is int or (isinstance(i, str) and i.isdecimal()) else None
    return None


def _activation_fn(raw: Mapping[str, Any]) -> str | None:
    """sentence-transformers 4 and 5 keep a cross-encoder's activation in config.json, before that under another key."""
    nested = raw.get("sentence_transformers")
    name = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    name = name or raw.get("sbert_ce_default_activation_function")
    return name if isinstance(name, str) else None
