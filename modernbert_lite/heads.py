"""What stands on the encoder: masked language modelling, sequence and token classification."""

from __future__ import annotations

from torch import Tensor, nn

from . import ops, pooling
from .batch import PackedBatch
from .config import CheckpointError, ModernBertConfig
from .linear import Linear
from .model import LayerNorm, ModernBert


class PredictionHead(nn.Module):
    """dense -> activation -> norm, (.., C) -> (.., C)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # classifier_bias is this layer's bias; the classifier after it always has its own.
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = config.classifier_activation
        self.norm = LayerNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ops.activation(self.act)(self.dense(x)))


class MaskedLM(nn.Module):
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
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))


class SequenceClassifier(Classifier):
    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels): pooled first (by the config's `classifier_pooling`), then head and classifier."""
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


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ModernBertModel": ModernBert,
    "ModernBertForMaskedLM": MaskedLM,
    "ModernBertForSequenceClassification": SequenceClassifier,
    "ModernBertForTokenClassification": TokenClassifier,
}


def network_class(architecture: str) -> type[nn.Module]:
    """The network that `architectures` of a config.json names. Raises CheckpointError for an unknown one."""
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]
