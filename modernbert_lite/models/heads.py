"""What stands on the encoder: masked language modelling, sequence and token classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..ops import pooling
from ..ops import reference as ops
from ..ops.linear import Linear
from ..reading import CheckpointError, shown
from .fields import Config, GteConfig, ModernBertConfig
from .gte import Gte
from .modernbert import LayerNorm, ModernBert


class PredictionHead(nn.Module):
    """dense -> activation -> norm, (.., C) -> (.., C)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # classifier_bias is this layer's bias; the classifier after it always has its own.
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = config.classifier_activation
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ops.activation(self.act)(self.dense(x)))


class MaskedLM(nn.Module):
    TIED = "decoder.weight", "model.embeddings.tok_embeddings.weight"  # the same, where the config ties them
    config: Config
    model: ModernBert | Gte

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.model = ModernBert(config)
        self.head = PredictionHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)

    def forward(self, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        """Logits (T, V); or only those of the tokens at `positions` (M,), (M, V): V is large, [MASK]s are few."""
        x = self.model(batch)
        return self.logits(x if positions is None else x[positions])

    def logits(self, x: Tensor) -> Tensor:
        """(M, C) of the encoder -> (M, V)."""
        return self.decoder(self.head(x))


class Classifier(nn.Module):
    """What the two classifiers share: their modules, which have the same names in a checkpoint."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.model = ModernBert(config)
        self.head = PredictionHead(config)
        self.classifier = _classifier(config)


def _classifier(config: Config) -> nn.Linear:
    if not config.labels:
        raise CheckpointError(f"num_labels is 0; a {config.architecture} must have at least 1")
    return nn.Linear(config.hidden_size, len(config.labels))


class SequenceClassifier(Classifier):
    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels): pooled first (by the config's `classifier_pooling`), then head and classifier."""
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


# ---- on the GTE encoder: other modules, the same calls ----


class GteMaskedLM(MaskedLM):
    TIED = "lm_head.decoder.weight", "model.embeddings.word_embeddings.weight"

    def __init__(self, config: GteConfig):
        nn.Module.__init__(self)
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
        return self.decoder(self.norm(ops.activation(self.act)(self.dense(x))))


class GteSequenceClassifier(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.model = Gte(config)
        self.pooler = GtePooler(config)
        self.classifier = _classifier(config)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels), of the first token."""
        check_batch(batch, self.config)
        return self.classifier(self.pooler(self.model(batch, pooling.rows(batch, ["cls"]))))


class GtePooler(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class GteTokenClassifier(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.model = Gte(config)
        self.classifier = _classifier(config)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.classifier(self.model(batch))


_GTE: dict[str, type[nn.Module]] = {
    "Model": Gte,
    "ForMaskedLM": GteMaskedLM,
    "ForSequenceClassification": GteSequenceClassifier,
    "ForTokenClassification": GteTokenClassifier,
}
ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ModernBertModel": ModernBert,
    "ModernBertForMaskedLM": MaskedLM,
    "ModernBertForSequenceClassification": SequenceClassifier,
    "ModernBertForTokenClassification": TokenClassifier,
    **{f"{name}{end}": network for name in ("New", "Gte") for end, network in _GTE.items()},
}
# What runs an architecture for its user, by the end of its name.
_USES = {
    "Model": "Embedder",
    "ForMaskedLM": "FillMask",
    "ForSequenceClassification": "Classifier",
    "ForTokenClassification": "TokenClassifier",
}


def network_class(architecture: str) -> type[nn.Module]:
    """The network that `architectures` of a config.json names. Raises CheckpointError for an unknown one."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"architecture {shown(architecture)} is not supported; known: {known}. (Embedder opens its encoder)"
        )
    return ARCHITECTURES[architecture]


def encoder_class(config: Config) -> type[nn.Module]:
    """The encoder alone, whatever stands on it in the checkpoint."""
    return Gte if isinstance(config, GteConfig) else ModernBert


def masked_lm_class(config: Config) -> type[MaskedLM]:
    """The masked language model on that encoder, whatever `architectures` says."""
    return GteMaskedLM if isinstance(config, GteConfig) else MaskedLM


def use(architecture: str) -> str:
    """The class that runs it for its user (a sequence classifier has two: Classifier and Reranker); "load_model" where
    there is none. Of an unknown architecture the encoder can be run."""
    if architecture not in ARCHITECTURES:
        return "Embedder"
    return next((name for end, name in _USES.items() if architecture.endswith(end)), "load_model")
