"""ModernBERT (arXiv 2412.13663): the forward pass, top-down.

Letters: T tokens in the batch, C hidden_size, H heads, D head_dim, N intermediate_size, V vocab_size, L layers.
Attributes are the checkpoint's own names, so that loading renames nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..ops import pooling
from ..ops import reference as ops
from ..ops.linear import Linear
from ..ops.rope import Rope, Turn, rotation
from ..reading import CheckpointError, Reader, shown, warn
from . import fields
from .fields import Config, Family, Names
from .layers import LayerNorm, MaskedLanguageModel, Network, attend, classifier, table
from .rope import ROPE_TYPES, describe_rope, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"


class ModernBert(Network):
    """The encoder: packed token ids in, one vector per token out."""

    config: ModernBertConfig

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = _norm(config)

    def forward(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """Returns (T, C), in the weights' dtype. With `rows` (B,), the index of one token per sequence, returns only
        those, (B, C), and the last layer skips the others. Raises ValueError for ids outside the vocabulary."""
        check_batch(batch, self.config, rows)
        config = self.config
        full = rotation(config.full_rope, config.head_dim, batch)
        sliding = rotation(config.sliding_rope, config.head_dim, batch)

        x = self.embeddings(batch.input_ids)  # (T, C)
        *lower, last = zip(self.layers, config.layer_types, strict=True)
        for layer, kind in lower:
            x = layer(x, batch, full if kind == FULL else sliding)
        layer, kind = last
        if kind == FULL:
            x = layer(x, batch, full, rows)
        else:
            x = layer(x, batch, sliding)
            x = x if rows is None else x[rows]
        return self.final_norm(x)


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.tok_embeddings = table(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        # The table's dtype may be narrower than the layers': the table stays as the checkpoint's file stores it.
        return self.norm(self.tok_embeddings(input_ids).to(self.norm.weight.dtype))


class Layer(nn.Module):
    """Pre-norm: attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        # Layer 0 has no attn_norm, and the checkpoint has no weight for one: the embeddings are normalised already.
        self.attn_norm = nn.Identity() if index == 0 else _norm(config)
        self.attn = Attention(config, index)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, batch: PackedBatch, turn: Turn, rows: Tensor | None = None) -> Tensor:
        # x + attn(..), x + mlp(..): the residual is added inside Wo, because fast backends fuse the addition.
        normed = self.attn_norm(x)
        x = self.attn(normed, batch, turn, x if rows is None else x[rows], rows)
        return self.mlp(self.mlp_norm(x), residual=x)


class Attention(nn.Module):
    """Attention over the whole sequence, or over `local_attention // 2` tokens on each side: `layer_types` says
    which."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.window_size = config.window_size(index)
        self.Wqkv = Linear(C, 3 * C, bias=config.attention_bias)
        self.Wo = Linear(C, C, bias=config.attention_bias)

    def forward(self, x: Tensor, batch: PackedBatch, turn: Turn, residual: Tensor, rows: Tensor | None) -> Tensor:
        return self.Wo(attend(x, self.Wqkv, self.heads, batch, turn, self.window_size, rows), residual)


class MLP(nn.Module):
    """GeGLU (arXiv 2002.05202): the first half of Wi is activated, and the second half is the gate."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        C, N = config.hidden_size, config.intermediate_size
        self.act = config.hidden_activation
        self.Wi = Linear(C, 2 * N, bias=config.mlp_bias, parts=2)
        self.Wo = Linear(N, C, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.Wo(self.Wi.gated(x, self.act), residual)  # (T, N) between them


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


# ---- heads ----


class PredictionHead(nn.Module):
    """dense -> activation -> norm, (.., C) -> (.., C)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # classifier_bias is this layer's bias; the classifier after it always has its own.
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = config.classifier_activation
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ops.ACTIVATIONS[self.act](self.dense(x)))


class MaskedLM(MaskedLanguageModel):
    TIED = "decoder.weight", "model.embeddings.tok_embeddings.weight"  # the same, where the config ties them

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.model = ModernBert(config)
        self.head = PredictionHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)

    def logits(self, x: Tensor) -> Tensor:
        return self.decoder(self.head(x))


class Classifier(Network):
    """The modules that both classifiers have, under the same names in a checkpoint."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.model = ModernBert(config)
        self.head = PredictionHead(config)
        self.classifier = classifier(config)


class SequenceClassifier(Classifier):
    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels). Token vectors are pooled (by the config's `classifier_pooling`), then go through head and
        classifier."""
        check_batch(batch, self.config)
        mode = self.config.classifier_pooling
        if mode == "cls":
            pooled = self.model(batch, pooling.rows(batch, ["cls"]))  # (B, C)
        else:
            x = self.model(batch)  # (T, C)
            pooled = pooling.POOLING[mode](x, batch).to(x.dtype)
        return self.classifier(self.head(pooled))


class TokenClassifier(Classifier):
    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (T, labels)."""
        return self.classifier(self.head(self.model(batch)))


# ---- config.json ----

_ROPE_160_000, _ROPE_10_000 = Rope(160_000.0), Rope(10_000.0)


@dataclass(frozen=True)
class ModernBertConfig(Config):
    """Everything in which ModernBERT checkpoints differ. Fields keep Hugging Face's names; defaults are
    ModernBERT-base's."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("modernbert",)

    architecture: str = "ModernBertModel"
    vocab_size: int = 50368
    intermediate_size: int = 1152  # width of one half of the GLU: Wi has twice as many rows
    hidden_activation: str = "gelu"
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

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) of a layer, inclusive; (-1, -1) is unlimited. local_attention 128 gives (64, 64)."""
        if self.layer_types[layer] == FULL:
            return -1, -1
        return self.local_attention // 2, self.local_attention // 2

    def facts(self) -> dict[str, Any]:
        full, sliding = describe_rope(self.full_rope), describe_rope(self.sliding_rope)
        return {
            "local window": f"{self.local_attention} ({self.local_attention // 2} on each side)",
            "rope theta": f"{self.full_rope.theta:g} global, {self.sliding_rope.theta:g} local",
            "rope type": full if full == sliding else f"{full} global, {sliding} local",
            "activation": self.hidden_activation,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModernBertConfig:
        """Reads a parsed config.json of transformers 4.48 (theta keys), 5 (`layer_types`, `rope_parameters`) or both.

        Ignored are unknown keys, and keys that change no number in transformers 5's network. Those are dropouts,
        initializer_*, ids of special tokens, sparse_*, deterministic_flash_attn, dtype, is_decoder,
        chunk_size_feed_forward and attn_implementation; YaRN's `truncate`, and `original_max_position_embeddings`
        beside the kinds of layers, which transformers reads for other models; and other models' layer_norm_eps,
        position_embedding_type and rope_theta. Raises CheckpointError, naming the key, the value and what is accepted.
        """
        fields.check_type(raw, cls)
        get = Reader(raw)
        fields.refuse_keys(get)
        layers = get.whole("num_hidden_layers", 22)
        hidden, heads, head_dim = fields.sizes(get)
        pooling = get.choice("classifier_pooling", "cls", ("cls", "mean"))
        architectures = fields.architectures(get, foreign=("Gte", "New"))
        labels = fields.labels(get)
        return cls(
            architecture=(architectures or ["ModernBertModel"])[0],
            names_architecture=bool(architectures),
            vocab_size=get.whole("vocab_size", 50368),
            hidden_size=hidden,
            intermediate_size=get.whole("intermediate_size", 1152),
            num_attention_heads=heads,
            hidden_activation=fields.activation(get, "hidden_activation"),
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
            classifier_activation=fields.activation(get, "classifier_activation"),
            decoder_bias=get.flag("decoder_bias", True),
            tie_word_embeddings=get.flag("tie_word_embeddings", True),
            pad_token_id=get.token_id("pad_token_id"),
            labels=labels,
            problem_type=fields.problem_type(get),
            entailment_id=fields.entailment_id(get, labels),
            activation_fn=fields.activation_fn(raw),
        )


def _local_attention(get: Reader) -> int:
    """The whole window. In transformers 5 `sliding_window`, half of it, wins over `local_attention`."""
    whole = get.whole("local_attention", 128, least=0)
    return whole if get.raw.get("sliding_window") is None else 2 * get.whole("sliding_window", 64, least=0)


def _layer_types(get: Reader, layers: int) -> tuple[str, ...]:
    """`layer_types` if present; else every n-th layer, counted from layer 0, is global."""
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
    """RoPE of one kind of layer. rope_parameters[kind] comes first, then rope_scaling (for both kinds), then the theta
    keys."""
    per_kind, scaling = get.mapping("rope_parameters"), get.mapping("rope_scaling")
    if set(per_kind) - {FULL, SLIDING}:
        raise CheckpointError(
            f"rope_parameters has {shown(sorted(per_kind))}; it may hold {FULL!r} and {SLIDING!r} only"
        )
    values = {**Reader(per_kind).mapping(kind), **scaling}
    fields.check_typed(values, f"RoPE of {kind}", ROPE_TYPES)
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


FAMILY = Family(
    config=ModernBertConfig,
    architectures=("ModernBert",),
    encoder=ModernBert,
    heads={
        "ForMaskedLM": MaskedLM,
        "ForSequenceClassification": SequenceClassifier,
        "ForTokenClassification": TokenClassifier,
    },
    names=Names(
        table="embeddings.tok_embeddings.weight",
        decoder="decoder.weight",
        prefixes=("model.", ""),
        parts=("embeddings", "layers", "final_norm"),
    ),
)
