"""The list of families, and what is looked up in it. A new family is a file, and its row in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..reading import CheckpointError, is_there, read_json, shown
from . import gte, modernbert
from .fields import Config, Family

FAMILIES: list[Family] = [modernbert.FAMILY, gte.FAMILY]

# The class of this package that runs an architecture, by the end of the architecture's name.
_USES = {
    "Model": "Embedder",
    "ForMaskedLM": "FillMask",
    "ForSequenceClassification": "Classifier",
    "ForTokenClassification": "TokenClassifier",
}


def read_config(
    folder: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    read: Callable[[Path], Mapping[str, Any]] = read_json,
) -> Config:
    """Reads `folder`/config.json. The keys of `overrides` win over those of the file. read: parses the file. Raises
    CheckpointError for a missing, malformed or unsupported config."""
    path = Path(folder) / "config.json"
    if not is_there(path):
        raise CheckpointError(f"no config.json in {folder}: not a checkpoint folder")
    raw = {**read(path), **(overrides or {})}
    try:
        return config_of(raw)
    except CheckpointError as error:
        also = f", with {', '.join(overrides)} of sentence_bert_config.json" if overrides else ""
        raise CheckpointError(f"{path}{also}: {error}") from None


def config_of(raw: Mapping[str, Any]) -> Config:
    """Reads a parsed config.json by the family of its model_type."""
    model_type = raw.get("model_type")
    for each in FAMILIES:
        if isinstance(model_type, str) and model_type in each.config.MODEL_TYPES:
            return each.config.from_dict(raw)
    decoder = ": a causal decoder, and these are encoders" if model_type == "modernbert-decoder" else ""
    known = ", ".join(repr(name) for each in FAMILIES for name in each.config.MODEL_TYPES)
    raise CheckpointError(f"model_type {shown(model_type)} is not supported{decoder}; known: {known}")


def family(config: Config) -> Family:
    """The family of a config."""
    return next(each for each in FAMILIES if type(config) is each.config)


def family_of(network: nn.Module) -> Family:
    """The family of a network, with a head or without."""
    return family(network.config)  # type: ignore[arg-type]


def encoder_class(config: Config) -> type[nn.Module]:
    """The class of the encoder alone, whatever head the checkpoint has."""
    return family(config).encoder


def encoder_of(network: nn.Module) -> nn.Module:
    """A network without its head."""
    encoder: nn.Module = getattr(network, "model", network)
    return encoder


def head_class(config: Config, end: str) -> type[nn.Module]:
    """The class of the network that ends in `end` ("ForMaskedLM") in the config's family, whatever `architectures`
    says."""
    return family(config).heads[end]


def architectures() -> dict[str, type[nn.Module]]:
    """Every name that `architectures` of a config.json may hold, and its class."""
    return {
        f"{prefix}{end}": network
        for each in FAMILIES
        for prefix in each.architectures
        for end, network in {"Model": each.encoder, **each.heads}.items()
    }


def network_class(architecture: str) -> type[nn.Module]:
    """The class that `architectures` of a config.json names. Raises CheckpointError for an unknown name."""
    known = architectures()
    if architecture not in known:
        raise CheckpointError(
            f"architecture {shown(architecture)} is not supported; known: {', '.join(known)}. (Embedder opens its "
            "encoder)"
        )
    return known[architecture]


def use(architecture: str) -> str:
    """The class of this package that runs the architecture. (A sequence classifier has two: Classifier and Reranker.)
    "load_model" if there is none. Of an unknown architecture, Embedder can run the encoder."""
    if architecture not in architectures():
        return "Embedder"
    return next((name for end, name in _USES.items() if architecture.endswith(end)), "load_model")
