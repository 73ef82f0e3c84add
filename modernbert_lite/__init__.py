"""ModernBERT from Hugging Face safetensors: embeddings, reranking, masked language modelling."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import PackedBatch, from_padded, pack, to_padded, unpack
    from .checkpoint.weights import load_model
    from .classifier import Classifier
    from .embedder import Embedder
    from .fill_mask import FillMask
    from .late_interaction import LateInteraction
    from .models.gte import GteConfig
    from .models.modernbert import ModernBertConfig
    from .models.registry import read_config
    from .ops.graphs import Graphed
    from .pipeline.vectors import quantize_embeddings
    from .reading import CheckpointError, OptionError
    from .reranker import Reranker
    from .token_classifier import TokenClassifier

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "reading",
    "Classifier": "classifier",
    "Embedder": "embedder",
    "FillMask": "fill_mask",
    "GteConfig": "models.gte",
    "Graphed": "ops.graphs",
    "LateInteraction": "late_interaction",
    "ModernBertConfig": "models.modernbert",
    "OptionError": "reading",
    "PackedBatch": "batch",
    "Reranker": "reranker",
    "TokenClassifier": "token_classifier",
    "from_padded": "batch",
    "load_model": "checkpoint.weights",
    "pack": "batch",
    "quantize_embeddings": "pipeline.vectors",
    "read_config": "models.registry",
    "to_padded": "batch",
    "unpack": "batch",
}

__all__ = [
    "CheckpointError",
    "Classifier",
    "Embedder",
    "FillMask",
    "Graphed",
    "GteConfig",
    "LateInteraction",
    "ModernBertConfig",
    "OptionError",
    "PackedBatch",
    "Reranker",
    "TokenClassifier",
    "__version__",
    "from_padded",
    "load_model",
    "pack",
    "quantize_embeddings",
    "read_config",
    "to_padded",
    "unpack",
]


def __getattr__(name: str) -> Any:
    # Lazy: `import modernbert_lite` costs milliseconds; torch (about a second) comes with the first real name.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
