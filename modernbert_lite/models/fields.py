"""config.json of every generation -> one frozen dataclass. What can't be honoured is refused by name.

Needs no torch, so that `modernbert-lite info` and error messages stay quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ops.rope import Rope
from ..reading import CheckpointError, Reader, is_there, read_json, shown, warn
from .rope import ROPE_TYPES, read_rope

# The activations that transformers knows (its ACT2FN), but for prelu and xielu, which have weights. Checkpoints of
# these models have been seen to name "gelu" (exact, by erf) and "silu".
ACTIVATIONS = (
    "gelu",
    "silu",
    "relu",
    "gelu_pytorch_tanh",
    "gelu_10",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu2",
    "relu6",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
)
# The same functions by other names.
_SAME_ACTIVATIONS = {"swish": "silu", "gelu_accurate": "gelu_new", "gelu_python_tanh": "gelu_new"}
# Keys that change transformers' numbers, or its choice of files, in ways that aren't supported here.
_REFUSED = {
    "quantization_config": "quantized weights are not read; save the model without it, in float32, float16 or bfloat16",
    "per_layer_config": "all layers must have the same settings",
    "is_causal": "these are encoders, whose tokens see both sides",
    "configuration_files": "only config.json is read; put the right one in its place",
    "transformers_weights": "weights are read from model.safetensors and its index only",
}
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
_ROPE_160_000, _ROPE_10_000 = Rope(160_000.0), Rope(10_000.0)


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
    full_rope: Rope = _ROPE_160_000
    sliding_rope: Rope = _ROPE_10_000
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
    names_architecture: bool = field(default=True, compare=False)  # False: config.json names none

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def type_vocab_size(self) -> int:
        """Rows of a table of token types: there is none."""
        return 0

    @property
    def max_positions(self) -> int | None:
        """Rows of a table of positions: there is none."""
        return None

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) of a layer, inclusive; (-1, -1) is unlimited. local_attention 128 -> (64, 64)."""
        if self.layer_types[layer] == FULL:
            return -1, -1
        return self.local_attention // 2, self.local_attention // 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModernBertConfig:
        """Reads a parsed config.json of transformers 4.48 (theta keys), 5 (`layer_types`, `rope_parameters`) or both.

        Ignored are unknown keys, and those that change no number of transformers 5's network: dropouts,
        initializer_*, ids of special tokens, sparse_*, deterministic_flash_attn, dtype, is_decoder,
        chunk_size_feed_forward, attn_implementation; `truncate` of YaRN and `original_max_position_embeddings` beside
        the layers' kinds, which it reads for other models; layer_norm_eps, position_embedding_type and rope_theta,
        which are other models'. Raises CheckpointError naming the key, the value and what is accepted.
        """
        _check_type(raw, cls)
        get = Reader(raw)
        _refuse_keys(get)
        layers = get.whole("num_hidden_layers", 22)
        hidden, heads, head_dim = _sizes(get)
        pooling = get.choice("classifier_pooling", "cls", ("cls", "mean"))
        architectures = _architectures(get, foreign=("Gte", "New"))
        labels = _labels(get)
        return cls(
            architecture=(architectures or ["ModernBertModel"])[0],
            names_architecture=bool(architectures),
            vocab_size=get.whole("vocab_size", 50368),
            hidden_size=hidden,
            intermediate_size=get.whole("intermediate_size", 1152),
            num_attention_heads=heads,
            hidden_activation=_activation(get, "hidden_activation"),
            max_position_embeddings=get.whole("max_position_embeddings", 8192),
            norm_eps=get.number("norm_eps", 1e-5),
            norm_bias=get.flag("norm_bias", False),
            attention_bias=get.flag("attention_bias", False),
            mlp_bias=get.flag("mlp_bias", False),
            layer_types=_layer_types(get, layers),
            local_attention=_local_attention(get),
            full_rope=_rope(get, FULL, head_dim),
            sliding_rope=_rope(get, SLIDING, head_dim),
            classifier_pooling=pooling,
            classifier_bias=get.flag("classifier_bias", False),
            classifier_activation=_activation(get, "classifier_activation"),
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
    rope: Rope = _ROPE_10_000
    logn_attention_scale: bool = False  # queries times ln(length) / ln(max_position_embeddings)
    logn_attention_clip1: bool = False  # but not below 1
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None  # which function makes scores of a sequence classifier's logits
    entailment_id: int | None = None  # the label that means entailment, in a model of natural language inference
    activation_fn: str | None = None
    names_architecture: bool = field(default=True, compare=False)  # as in ModernBertConfig
    own_head_dim: int | None = None  # where it isn't hidden_size / num_attention_heads: transformers' GteConfig only
    sparse: bool = False  # beside the encoder the file has a weight for each token (gte-multilingual-base)

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int | None:
        """Rows of the table of positions; None: positions are rotations (RoPE), of which there is no end."""
        return self.max_position_embeddings if self.position_embedding_type == "absolute" else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GteConfig:
        """Reads a parsed config.json of model_type "new" or "gte": NewConfig's (also as transformers 5 saves it again)
        or transformers' own GteConfig, which has other defaults.

        Ignored are unknown keys, and those that change no number: dropouts, initializer_range, ids of special tokens,
        dtype, is_decoder, chunk_size_feed_forward, attn_implementation, pack_qkv, unpad_inputs,
        use_memory_efficient_attention. Raises CheckpointError naming the key, the value and what is accepted.
        """
        _check_type(raw, cls)
        get = Reader(raw)
        _refuse_keys(get)
        native = _is_native(get)
        hidden, heads, head_dim = _sizes(get, own_head_dim=native)
        logn = get.flag("logn_attention_scale", False, strings=True)  # by a logarithm, which 1 has none of
        longest = get.whole("max_position_embeddings", 8192 if native else 2048, least=2 if logn else 1)
        norm_type = get.choice("layer_norm_type", "layer_norm", ("layer_norm", "rms_norm"))
        if native and (logn or norm_type != "layer_norm"):
            key = "logn_attention_scale" if logn else "layer_norm_type"
            raise CheckpointError(
                f"{key} is {shown(get.raw[key])}, which Alibaba's NewConfig has, and rope_parameters make this "
                "transformers' GteConfig, which doesn't have it: leave one of them out"
            )
        architectures = _architectures(get, foreign=("ModernBert",))
        labels = _labels(get)
        act = _activation(get, "hidden_act")
        return cls(
            architecture=(architectures or ["GteModel" if native else "NewModel"])[0],
            names_architecture=bool(architectures),
            vocab_size=get.whole("vocab_size", 250048 if native else 30528),
            hidden_size=hidden,
            num_hidden_layers=get.whole("num_hidden_layers", 12),
            num_attention_heads=heads,
            intermediate_size=get.whole("intermediate_size", 3072),
            hidden_act=act,
            head_act="gelu" if native else act,
            max_position_embeddings=longest,
            type_vocab_size=get.whole("type_vocab_size", 1, least=0),
            layer_norm_type=norm_type,
            layer_norm_eps=get.number("layer_norm_eps", 1e-12),
            # transformers' own class ignores the key, which files converted from BERT's still have.
            position_embedding_type="rope"
            if native
            else get.choice("position_embedding_type", "rope", ("rope", "absolute")),
            rope=_gte_rope(get, native, longest, head_dim),
            own_head_dim=None if head_dim * heads == hidden else head_dim,
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


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """`folder`/config.json, with the keys of `overrides` instead of its own. Raises CheckpointError for a missing,
    malformed or unsupported one."""
    path = Path(folder) / "config.json"
    if not is_there(path):
        raise CheckpointError(f"no config.json in {folder}: not a checkpoint folder")
    try:
        raw = {**read_json(path), **(overrides or {})}
        return _CONFIGS.get(str(raw.get("model_type")), ModernBertConfig).from_dict(raw)
    except CheckpointError as error:
        also = f", with {', '.join(overrides)} of sentence_bert_config.json" if overrides else ""
        raise CheckpointError(f"{path}{also}: {error}") from None


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


def _refuse_keys(get: Reader) -> None:
    for key, why in _REFUSED.items():
        if get.raw.get(key):
            raise CheckpointError(f"{key} is {shown(get.raw[key])}: {why}")


def _sizes(get: Reader, own_head_dim: bool = False) -> tuple[int, int, int]:
    """hidden_size, heads, and the size of one. own_head_dim: a `head_dim` key may make it another than their quotient,
    as in transformers' GteModel. The other networks have no use for the key: transformers 4 ignores it, and 5 fails
    where it differs (but for odd ones, of which some change its RoPE: those are refused)."""
    hidden, heads = get.whole("hidden_size", 768), get.whole("num_attention_heads", 12)
    named = None if get.raw.get("head_dim") is None else get.whole("head_dim", 1)
    if named is not None and named % 2:
        raise CheckpointError(f"head_dim is {named}; it must be even (for RoPE)")
    if own_head_dim and named is not None:
        return hidden, heads, named
    if hidden % heads or (hidden // heads) % 2:
        raise CheckpointError(
            f"hidden_size {hidden} over num_attention_heads {heads} must give a whole, even head size (for RoPE)"
        )
    return hidden, heads, hidden // heads


def _activation(get: Reader, key: str) -> str:
    named = get.choice(key, "gelu", (*ACTIVATIONS, *_SAME_ACTIVATIONS))
    return _SAME_ACTIVATIONS.get(named, named)


def _local_attention(get: Reader) -> int:
    """The whole window. transformers 5 lets `sliding_window`, half of it, win over `local_attention`."""
    whole = get.whole("local_attention", 128, least=0)
    return whole if get.raw.get("sliding_window") is None else 2 * get.whole("sliding_window", 64, least=0)


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


def _rope(get: Reader, kind: str, head_dim: int) -> Rope:
    """RoPE of one kind of layer: rope_parameters[kind], then rope_scaling (both kinds), then the theta keys."""
    per_kind, scaling = get.mapping("rope_parameters"), get.mapping("rope_scaling")
    if set(per_kind) - {FULL, SLIDING}:
        raise CheckpointError(
            f"rope_parameters has {shown(sorted(per_kind))}; it may hold {FULL!r} and {SLIDING!r} only"
        )
    values = {**Reader(per_kind).mapping(kind), **scaling}
    _check_typed(values, f"RoPE of {kind}", ROPE_TYPES)
    if values.get("partial_rotary_factor") is None:
        values["partial_rotary_factor"] = get.raw.get("partial_rotary_factor")
    read = Reader(values)

    # `local_rope_theta: null` means the global theta in transformers 4.48-4.57; an absent key means 10,000.
    theta = get.number("global_rope_theta", 160_000.0)
    if kind == SLIDING and not ("local_rope_theta" in get.raw and get.raw["local_rope_theta"] is None):
        theta = get.number("local_rope_theta", 10_000.0)
    theta = read.number("rope_theta", theta)

    longest = get.whole("max_position_embeddings", 8192)
    rope = read_rope(read, theta, ROPE_TYPES, f"rope type {{}} of {kind}", longest=longest, head_dim=head_dim)
    if kind == FULL and "rope_type" not in values and get.raw.get("rope_parameters") is None and rope != Rope(theta):
        warn(
            f"rope_scaling names {rope.type!r} by its old key `type`, as transformers 4 wrote it: it applies here, and "
            "transformers 5 leaves it out for ModernBERT. Write `rope_type` to have the same in both"
        )
    return rope


def _check_typed(values: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
    """Refuses a factor, say, without a type: it would be passed over."""
    typeless = ("rope_theta", "partial_rotary_factor")
    said = sorted(key for key, value in values.items() if value is not None and key not in typeless)
    if said and values.get("rope_type") is None and values.get("type") is None:
        raise CheckpointError(f"{where} has {shown(said)} and no type; rope_type must be one of {', '.join(known)}")


def _is_native(get: Reader) -> bool:
    """Whether a config is transformers' GteConfig, rather than Alibaba's NewConfig, whose defaults differ. Both call
    themselves "gte"; "new" is the latter's alone."""
    if get.raw["model_type"] == "new":
        return False
    given = get.mapping("rope_parameters") or get.mapping("rope_scaling")
    types = {shown(given[key]) for key in ("rope_type", "type") if given.get(key) is not None}
    # (By their repr: a stranger's value may not be hashable.) NewConfig's code knows no other type than ntk.
    if get.mapping("rope_parameters") or types & {repr(known) for known in ROPE_TYPES if known != "default"}:
        return repr("ntk") not in types
    if any(get.raw.get(key) is not None for key in _NEW_CONFIG_KEYS):
        return False
    raise CheckpointError(
        "model_type is 'gte', which is transformers' GteConfig if there are rope_parameters, and Alibaba's NewConfig "
        f"if there is one of {', '.join(_NEW_CONFIG_KEYS)}; this file has none of them, and their defaults differ"
    )


def _gte_rope(get: Reader, native: bool, longest: int, head_dim: int) -> Rope:
    known = ROPE_TYPES if native else ("default", "ntk")
    given = {key: get.mapping(key) for key in ("rope_parameters", "rope_scaling") if get.mapping(key)}
    if native and "rope_scaling" in given:  # in transformers it takes the place of rope_parameters
        given = {"rope_scaling": given["rope_scaling"]}
    read = Reader({})
    where = " and ".join(given)
    for key, value in (item for values in given.values() for item in values.items() if item[1] is not None):
        key = "rope_type" if key == "type" else key  # its older name; transformers 5 writes both
        other = read.raw.setdefault(key, value)
        if other is not value and other != value:
            raise CheckpointError(f"{where} differ in {key!r}: {shown(other)} and {shown(value)}; one is enough")
    _check_typed(read.raw, where, known)
    read.raw.setdefault("partial_rotary_factor", get.raw.get("partial_rotary_factor"))
    if native and get.raw.get("original_max_position_embeddings") is not None:  # at the top it wins in transformers
        read.raw["original_max_position_embeddings"] = get.raw["original_max_position_embeddings"]
    # As in transformers, where a `truncate` of null is false.
    truncate = next((values["truncate"] for values in given.values() if "truncate" in values), True)
    if truncate is not None and not isinstance(truncate, bool):
        raise CheckpointError(f"truncate is {shown(truncate)}; it must be true or false")
    theta = read.number("rope_theta", get.number("rope_theta", 160_000.0 if native else 10_000.0))
    name = f"{where} type {{}}"
    return read_rope(read, theta, known, name, longest=longest, head_dim=head_dim, truncate=bool(truncate))


def _architectures(get: Reader, foreign: tuple[str, ...]) -> list[str]:
    """The class names, of which there may be none: null, an empty list, or nulls in it. foreign: how those of the other
    family begin."""
    names = get.raw.get("architectures") or []
    named: list[Any] = [name for name in names if name] if isinstance(names, list) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"\w{1,100}", name, re.ASCII) for name in named):
        raise CheckpointError(f"architectures is {shown(names)}; it must be a list of class names")
    if named and named[0].startswith(foreign):
        raise CheckpointError(
            f"architectures names {shown(named[0])}, which is no class of model_type {get.raw['model_type']!r}: one of "
            "the two is wrong"
        )
    return named


def _labels(get: Reader) -> tuple[str, ...]:
    """One a row of the classifier, as many as id2label has ids; without it LABEL_0.. as many as num_labels
    (transformers' default: 2). A row whose id was left out of id2label is LABEL_ and its number. (Where the two
    disagree id2label wins in transformers 4 and here, num_labels in 5: the weights' shape tells, at load.)"""
    named = get.raw.get("id2label")
    if not named:
        get.mapping("id2label")
        return tuple(f"LABEL_{i}" for i in range(get.whole("num_labels", 2, least=0)))
    id2label = {str(key): str(label) for key, label in get.mapping("id2label").items()}
    if not all(re.fullmatch(r"-?[0-9]{1,9}", key) for key in id2label):
        raise CheckpointError(f"id2label has the ids {shown(sorted(id2label))}; they must be whole numbers")
    by_id = {int(key): label for key, label in id2label.items()}
    return tuple(by_id.get(i, f"LABEL_{i}") for i in range(len(by_id)))


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
    if isinstance(nested, Mapping) and "activation_fn" in nested:  # null, too, is what it says
        name = nested["activation_fn"]
    else:
        name = raw.get("sbert_ce_default_activation_function")
    return name if isinstance(name, str) else None
