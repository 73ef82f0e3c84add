"""GTE v1.5 (arXiv 2407.19669; Alibaba's "NewModel"): the forward pass, top-down, in the letters of modernbert.py.

Attributes are the names in Alibaba's checkpoints; checkpoint/names.py knows the other names. It differs from ModernBERT
in four points. Each norm comes after the residual is added. There are biases. All layers are global. The MLP activates
the second half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..ops import pooling
from ..ops import reference as ops
from ..ops.linear import Linear
from ..ops.rope import Rope, Turn, rotation
from ..reading import CheckpointError, Reader, shown
from . import fields
from .fields import Config, Family, Names
from .layers import LayerNorm, MaskedLanguageModel, Network, attend, classifier, table
from .rope import ROPE_TYPES, describe_rope, read_rope


class Gte(Network):
    """The encoder: packed token ids in, one vector per token out."""

    config: GteConfig

    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """Returns (T, C), in the weights' dtype. With `rows` (B,), the index of one token per sequence, returns only
        those, (B, C), and the last layer skips the others. Raises ValueError for ids outside the tables."""
        check_batch(batch, self.config, rows)
        config = self.config
        rotary = config.position_embedding_type == "rope"
        turn = rotation(config.rope, config.head_dim, batch) if rotary else None

        x = self.embeddings(batch)  # (T, C)
        *lower, last = self.encoder.layer
        for layer in lower:
            x = layer(x, batch, turn)
        return last(x, batch, turn, rows)


class Embeddings(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = table(config.vocab_size, C)
        self.token_type_embeddings = table(config.type_vocab_size, C) if config.type_vocab_size else None
        absolute = config.position_embedding_type == "absolute"
        self.position_embeddings = table(config.max_position_embeddings, C) if absolute else None
        self.LayerNorm = LayerNorm(C, config.layer_norm_eps, bias=True)

    def forward(self, batch: PackedBatch) -> Tensor:
        # The table's dtype may be narrower than the layers': the table stays as the checkpoint's file stores it.
        x = self.word_embeddings(batch.input_ids).to(self.LayerNorm.weight.dtype)
        types = self.token_type_embeddings
        if types is not None:
            # One row stands for every token, whatever the tokenizer says of pairs.
            ids = batch.token_type_ids if types.num_embeddings > 1 else None
            x = x + (types.weight[0] if ids is None else types(ids))
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(batch.position_ids)
        return self.LayerNorm(x)


class Encoder(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Post-norm: attention, then a gated MLP. Each is added to its input, and the sum is normalised."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attn_ln = PostNorm(config)
        self.mlp = MLP(config)
        self.mlp_ln = PostNorm(config)

    def forward(self, x: Tensor, batch: PackedBatch, turn: Turn | None, rows: Tensor | None = None) -> Tensor:
        attention, mlp = self.attention, self.mlp
        out = attend(x, attention.qkv_proj, attention.heads, batch, turn, rows=rows)
        x = self.attn_ln(attention.o_proj, out, x if rows is None else x[rows])
        return self.mlp_ln(mlp.down_proj, mlp(x), x)


class Attention(nn.Module):
    """The two projections. `layers.attend` is what lies between them."""

    def __init__(self, config: GteConfig):
        super().__init__()
        C, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.heads = config.num_attention_heads
        self.qkv_proj = Linear(C, 3 * width, bias=True)
        self.o_proj = Linear(width, C, bias=True)


class MLP(nn.Module):
    """GeGLU with its halves exchanged: the second half of up_gate_proj is activated, and multiplied by the first
    half."""

    def __init__(self, config: GteConfig):
        super().__init__()
        C, N = config.hidden_size, config.intermediate_size
        self.act = config.hidden_act
        self.up_gate_proj = Linear(C, 2 * N, bias=False, parts=2)
        self.down_proj = Linear(N, C, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_gate_proj.gated(x, self.act, swapped=True)  # (T, N)


class PostNorm(nn.Module):
    """norm(projection(x) + residual), by a LayerNorm or an RMSNorm."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        rms = config.layer_norm_type == "rms_norm"
        self.bias = None if rms else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, projection: Linear, x: Tensor, residual: Tensor) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(projection(x, residual), self.weight, self.eps)
        return projection.normed(x, residual, self.weight, self.bias, self.eps)


# ---- heads ----


class GteMaskedLM(MaskedLanguageModel):
    TIED = "lm_head.decoder.weight", "model.embeddings.word_embeddings.weight"

    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.model = Gte(config)
        self.lm_head = GtePredictionHead(config)

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class GtePredictionHead(nn.Module):
    """dense -> activation -> norm -> decoder, (.., C) -> (.., V)."""

    def __init__(self, config: GteConfig):
        super().__init__()
        C = config.hidden_size
        self.dense = Linear(C, C, bias=True)
        self.act = config.head_act
        self.norm = LayerNorm(C, config.layer_norm_eps, bias=True)
        self.decoder = nn.Linear(C, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(ops.ACTIVATIONS[self.act](self.dense(x))))


class GteSequenceClassifier(Network):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.model = Gte(config)
        self.pooler = GtePooler(config)
        self.classifier = classifier(config)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels), from the first token."""
        check_batch(batch, self.config)
        return self.classifier(self.pooler(self.model(batch, pooling.rows(batch, ["cls"]))))


class GtePooler(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class GteTokenClassifier(Network):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.model = Gte(config)
        self.classifier = classifier(config)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.classifier(self.model(batch))


# ---- config.json ----

# Keys that only Alibaba's NewConfig has: a file with one of these is in the older dialect.
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
class GteConfig(Config):
    """A GTE v1.5 encoder, Alibaba's "NewModel", in any of its dialects. Fields keep NewConfig's names and defaults."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("new", "gte")

    architecture: str = "NewModel"
    vocab_size: int = 30528
    num_hidden_layers: int = 12
    intermediate_size: int = 3072  # width of one half of the GLU: up_gate_proj has twice as many rows
    hidden_act: str = "gelu"
    head_act: str = "gelu"  # of the masked-token head: Alibaba's is hidden_act, transformers' always gelu
    max_position_embeddings: int = 2048
    type_vocab_size: int = 1  # rows of the table of token types; 0: there is none
    layer_norm_type: str = "layer_norm"  # of the layers' norms; the embeddings' is always a LayerNorm
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "rope"
    rope: Rope = Rope(10_000.0)  # noqa: RUF009  frozen
    own_head_dim: int | None = None  # where it isn't hidden_size / num_attention_heads: transformers' GteConfig only
    sparse: bool = False  # beside the encoder the file has a weight for each token (gte-multilingual-base)

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int | None:
        """Rows of the table of positions. None: there is no such table, because positions are rotations (RoPE), which
        have no limit."""
        return self.max_position_embeddings if self.position_embedding_type == "absolute" else None

    def facts(self) -> dict[str, Any]:
        rotary = self.position_embedding_type == "rope"
        return {
            "positions": self.position_embedding_type,
            "rope theta": f"{self.rope.theta:g}" if rotary else "none",
            "rope type": describe_rope(self.rope) if rotary else "none",
            "activation": self.hidden_act,
            "token types": self.type_vocab_size,
            "layers' norms": self.layer_norm_type,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GteConfig:
        """Reads a parsed config.json of model_type "new" or "gte". It is Alibaba's NewConfig (also as transformers 5
        saves it again), or transformers' own GteConfig, which has other defaults.

        Ignored are unknown keys, and keys that change no number: dropouts, initializer_range, ids of special tokens,
        dtype, is_decoder, chunk_size_feed_forward, attn_implementation, pack_qkv, unpad_inputs,
        use_memory_efficient_attention. Raises CheckpointError, naming the key, the value and what is accepted.
        """
        fields.check_type(raw, cls)
        get = Reader(raw)
        fields.refuse_keys(get)
        native = _is_native(get)
        hidden, heads, head_dim = fields.sizes(get, own_head_dim=native)
        if get.flag("logn_attention_scale", False, strings=True):  # no published checkpoint has it
            raise CheckpointError(
                f"logn_attention_scale is {shown(get.raw['logn_attention_scale'])}, which is not supported; it must be "
                "false, or left out"
            )
        get.flag("logn_attention_clip1", False, strings=True)
        longest = get.whole("max_position_embeddings", 8192 if native else 2048)
        norm_type = get.choice("layer_norm_type", "layer_norm", ("layer_norm", "rms_norm"))
        if native and norm_type != "layer_norm":
            raise CheckpointError(
                f"layer_norm_type is {norm_type!r}, which Alibaba's NewConfig has, and rope_parameters make this "
                "transformers' GteConfig, which doesn't have it: leave one of them out"
            )
        architectures = fields.architectures(get, foreign=("ModernBert",))
        labels = fields.labels(get)
        act = fields.activation(get, "hidden_act")
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
            # transformers' own class ignores this key, which files that were converted from BERT's still have.
            position_embedding_type="rope"
            if native
            else get.choice("position_embedding_type", "rope", ("rope", "absolute")),
            rope=_gte_rope(get, native, longest, head_dim),
            own_head_dim=None if head_dim * heads == hidden else head_dim,
            tie_word_embeddings=get.flag("tie_word_embeddings", True, strings=True),
            pad_token_id=get.token_id("pad_token_id"),
            labels=labels,
            problem_type=fields.problem_type(get),
            entailment_id=fields.entailment_id(get, labels),
            activation_fn=fields.activation_fn(raw),
            sparse=len(labels) == 1 and any("ForTokenClassification" in name for name in architectures),
        )


def _is_native(get: Reader) -> bool:
    """Whether a config is transformers' GteConfig. If not, it is Alibaba's NewConfig, whose defaults differ. Both use
    the model_type "gte". Only NewConfig uses "new"."""
    if get.raw["model_type"] == "new":
        return False
    given = get.mapping("rope_parameters") or get.mapping("rope_scaling")
    types = {shown(given[key]) for key in ("rope_type", "type") if given.get(key) is not None}
    # NewConfig's code knows no other type than ntk. (Compared by repr, because a stranger's value may not be hashable.)
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
    fields.check_typed(read.raw, where, known)
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


# transformers' GteModel has names of its own, though it saves Alibaba's ("new.gte.": a head that it loaded from there).
NAMES = Names(
    table="embeddings.word_embeddings.weight",
    decoder="lm_head.decoder.weight",
    prefixes=("new.gte.", "new.", "gte.", "model.", ""),
    parts=("embeddings", "encoder", "layers"),
    renames={
        r"^layers\.": "encoder.layer.",
        r"\.self_attn\.": ".attention.",
        r"\.post_attention_layernorm\.": ".attn_ln.",
        r"\.post_mlp_layernorm\.": ".mlp_ln.",
        r"^lm_head\.layer_norm\.": "lm_head.norm.",
    },
    splits={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("up_proj", "gate_proj")},
)

FAMILY = Family(
    config=GteConfig,
    architectures=("New", "Gte"),
    encoder=Gte,
    heads={
        "ForMaskedLM": GteMaskedLM,
        "ForSequenceClassification": GteSequenceClassifier,
        "ForTokenClassification": GteTokenClassifier,
    },
    names=NAMES,
)
