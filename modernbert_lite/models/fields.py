"""What the families share: the fields of every config.json, how they are read, and the row that describes a family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..ops.reference import ACTIVATIONS
from ..reading import CheckpointError, Reader, shown

# Activations under other names. With those of ops.reference they are transformers' ACT2FN, except prelu and xielu,
# which have weights.
_SAME_ACTIVATIONS = {"swish": "silu", "gelu_accurate": "gelu_new", "gelu_python_tanh": "gelu_new"}
# Keys that change transformers' numbers, or its choice of files, in ways that aren't supported here.
_REFUSED = {
    "quantization_config": "quantized weights are not read; save the model without it, in float32, float16 or bfloat16",
    "per_layer_config": "all layers must have the same settings",
    "is_causal": "these are encoders, whose tokens see both sides",
    "configuration_files": "only config.json is read; put the right one in its place",
    "transformers_weights": "weights are read from model.safetensors and its index only",
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Config:
    """What the package asks of every family's config.json. Fields keep Hugging Face's names."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()  # values of config.json's model_type

    architecture: str = ""
    vocab_size: int = 0
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 0  # width of one half of the GLU
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None  # which function makes scores of a sequence classifier's logits
    entailment_id: int | None = None  # the label that means entailment, in a model of natural language inference
    activation_fn: str | None = None  # the activation that a cross-encoder names for its scores
    names_architecture: bool = field(default=True, compare=False)  # False: config.json names none

    @property
    def num_hidden_layers(self) -> int:
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def type_vocab_size(self) -> int:
        """Rows of the table of token types. 0: there is no such table."""
        return 0

    @property
    def max_positions(self) -> int | None:
        """Rows of the table of positions. None: there is no such table, because positions are rotations (RoPE), which
        have no limit."""
        return None

    @property
    def sparse(self) -> bool:
        """Whether the file may have a sparse weight per token, beside the encoder."""
        return False

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) of a layer's attention, inclusive; (-1, -1) is unlimited."""
        return -1, -1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Reads a parsed config.json. Raises CheckpointError naming the key, the value and what is accepted."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What `modernbert-lite info` shows for this family only."""
        return {}


@dataclass(frozen=True)
class Names:
    """The names that an architecture's tensors may have. After its prefix, a name of the encoder begins with one of
    `parts`, and a name of what stands on the encoder with one of `heads`."""

    table: str  # of the words: every file of an encoder has it, once
    prefixes: tuple[str, ...]
    parts: tuple[str, ...]
    # What the encoder leaves out, as transformers does: a file may hold more than is opened.
    heads: tuple[str, ...] = ("head", "decoder", "classifier", "pooler", "lm_head", "qa_outputs", "score", "cls")
    decoder: str = ""  # of a masked LM: the tensor that may be tied to the table
    renames: Mapping[str, str] = field(default_factory=dict)  # patterns of other names
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a matrix, and those that it may be stored as


@dataclass(frozen=True)
class Family:
    """One row of the registry. The name of an architecture is a prefix and an end: "ModernBert" + "ForMaskedLM". Its
    network is made from the config, and called with a PackedBatch. In a network with a head, the encoder is `model`."""

    config: type[Config]
    architectures: tuple[str, ...]  # the prefixes
    encoder: type[nn.Module]
    heads: Mapping[str, type[nn.Module]]
    names: Names


def check_type(raw: Mapping[str, Any], wanted: type[Config]) -> None:
    """Raises CheckpointError for a model_type of another family, or of none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in wanted.MODEL_TYPES:
        raise CheckpointError(
            f"model_type {shown(model_type)} is not supported; known: {', '.join(map(repr, wanted.MODEL_TYPES))} "
            f"({wanted.__name__}'s; read_config opens every family)"
        )


def refuse_keys(get: Reader) -> None:
    for key, why in _REFUSED.items():
        if get.raw.get(key):
            raise CheckpointError(f"{key} is {shown(get.raw[key])}: {why}")


def sizes(get: Reader, own_head_dim: bool = False) -> tuple[int, int, int]:
    """hidden_size, the number of heads, and the size of one head. own_head_dim: whether a `head_dim` key may differ
    from their quotient, as in transformers' GteModel. Other networks don't use the key. transformers 4 ignores it, and
    5 fails where it differs. (Of odd sizes, some change transformers' RoPE: they are refused.)"""
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


def activation(get: Reader, key: str) -> str:
    named = get.choice(key, "gelu", (*ACTIVATIONS, *_SAME_ACTIVATIONS))
    return _SAME_ACTIVATIONS.get(named, named)


def check_typed(values: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
    """Refuses values of a RoPE without its type, such as a factor: they would be passed over."""
    typeless = ("rope_theta", "partial_rotary_factor")
    said = sorted(key for key, value in values.items() if value is not None and key not in typeless)
    if said and values.get("rope_type") is None and values.get("type") is None:
        raise CheckpointError(f"{where} has {shown(said)} and no type; rope_type must be one of {', '.join(known)}")


def architectures(get: Reader, foreign: tuple[str, ...]) -> list[str]:
    """The class names in `architectures`. The list may be null or empty, or hold nulls. foreign: how the class names of
    other families begin."""
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


def labels(get: Reader) -> tuple[str, ...]:
    """One label per row of the classifier: as many as id2label has ids. An id that id2label leaves out has the label
    LABEL_ and its number. Without id2label: LABEL_0 and so on, as many as num_labels says (transformers' default: 2).
    If the two disagree, id2label wins in transformers 4 and here, num_labels in 5. The weights' shape shows at loading
    which was right."""
    named = get.raw.get("id2label")
    if not named:
        get.mapping("id2label")
        return tuple(f"LABEL_{i}" for i in range(get.whole("num_labels", 2, least=0)))
    id2label = {str(key): str(label) for key, label in get.mapping("id2label").items()}
    if not all(re.fullmatch(r"-?[0-9]{1,9}", key) for key in id2label):
        raise CheckpointError(f"id2label has the ids {shown(sorted(id2label))}; they must be whole numbers")
    by_id = {int(key): label for key, label in id2label.items()}
    return tuple(by_id.get(i, f"LABEL_{i}") for i in range(len(by_id)))


def problem_type(get: Reader) -> str | None:
    return None if get.raw.get("problem_type") is None else get.choice("problem_type", "", PROBLEM_TYPES)


def entailment_id(get: Reader, labels: tuple[str, ...]) -> int | None:
    """The id of the first label in label2id whose name starts with "entail", in upper or lower case; so does
    transformers' zero-shot pipeline find it. Without label2id: the label's place in id2label. None: no label has such a
    name. The id isn't checked against the labels here. A file may keep the label2id of the model that it was trained
    from, and only zero-shot needs the id."""
    ids = get.mapping("label2id") or {label: i for i, label in enumerate(labels)}
    for name, i in ids.items():
        if name.lower().startswith("entail"):
            return int(i) if type(i) is int or (isinstance(i, str) and i.isdecimal()) else None
    return None


def activation_fn(raw: Mapping[str, Any]) -> str | None:
    """The activation that a cross-encoder's config.json names. sentence-transformers 4 and 5 keep it under another key
    than earlier versions."""
    nested = raw.get("sentence_transformers")
    if isinstance(nested, Mapping) and "activation_fn" in nested:  # null, too, is what it says
        name = nested["activation_fn"]
    else:
        name = raw.get("sbert_ce_default_activation_function")
    return name if isinstance(name, str) else None
