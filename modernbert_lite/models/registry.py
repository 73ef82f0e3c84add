"""The families, and what is found by a name of theirs: a new family is a file, and its row in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..reading import CheckpointError, is_there, read_json, shown
from . import gte, modernbert
from .fields import Config, Family

FAMILIES: list[Family] = [modernbert.FAMILY, gte.FAMILY]

# What runs an architecture for its user, by the end of its name.
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
    """`folder`/config.json, with the keys of `overrides` instead of its own. read: what parses the file. Raises
    CheckpointError for a missing, malformed or unsupported one."""
    path = Path(folder) / "config.json"
    if not is_there(path):
        raise CheckpointError(f"no config.json in {folder}: not a checkpoint folder")
    try:
        return config_of({**read(path), **(overrides or {})})
    except CheckpointError as error:
        also = f", with {', '.join(overrides)} of sentence_bert_config.json" if overrides else ""
        raise CheckpointError(f"{path}{also}: {error}") from None


def config_of(raw: Mapping[str, Any]) -> Config:
    """A parsed config.json, read by the family of its model_type."""
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
    """The encoder alone, whatever stands on it in the checkpoint."""
    return family(config).encoder


def encoder_of(network: nn.Module) -> nn.Module:
    """A network without its head."""
    encoder: nn.Module = getattr(network, "model", network)
    return encoder


def head_class(config: Config, end: str) -> type[nn.Module]:
    """The network of that end ("ForMaskedLM") on the config's encoder, whatever `architectures` says."""
    return family(config).heads[end]


def architectures() -> dict[str, type[nn.Module]]:
    """Every name that `architectures` of a config.json may hold, and its network."""
    return {
        f"{prefix}{end}": network
        for each in FAMILIES
        for prefix in each.architectures
        for end, network in {"Model": each.encoder, **each.heads}.items()
    }


def network_class(architecture: str) -> type[nn.Module]:
    """The network that `architectures` of a config.json names. Raises CheckpointError for an unknown one."""
    known = architectures()
    if architecture not in known:
        raise CheckpointError(
            f"architecture {shown(architecture)} is not supported; known: {', '.join(known)}. (Embedder opens its "
            "encoder)"
        )
    return known[architecture]


def use(architecture: str) -> str:
    """The class that runs it for its user (a sequence classifier has two: Classifier and Reranker); "load_model" where
    there is none. Of an unknown architecture the encoder can be run."""
    if architecture not in architectures():
        return "Embedder"
    return next((name for end, name in _USES.items() if architecture.endswith(end)), "load_model")
