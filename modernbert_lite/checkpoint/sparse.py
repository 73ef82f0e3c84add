"""The files of a sparse encoder (SPLADE) of sentence-transformers: which modules give the weights of which texts.

modules.json                        MLMTransformer -> SpladePooling: one road for all texts
modules.json + router_config.json   Router: a road for documents (as above), and one for queries, which may be
                                    SparseStaticEmbedding: a stored weight for each token, without a network
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..reading import CheckpointError, Reader, inside, shown
from .folder import ROUTERS, SPARSE, Folder, Module, module_kind, part_of

TASKS = ("query", "document")
_NETWORKS = ("MLMTransformer", "Transformer")
_KNOWN = (*ROUTERS, *_NETWORKS, "SpladePooling", "SparseStaticEmbedding")


@dataclass(frozen=True)
class Splade:
    """Logits of a masked language model -> a weight per token of the vocabulary: log(1 + relu(logit)), pooled over the
    text."""

    strategy: str = "max"  # or "sum"
    activation: str = "relu"  # or "log1p_relu": the logarithm is taken twice


@dataclass(frozen=True)
class Static:
    """The weight of each token in a text is the one that `folder` stores for it."""

    folder: str  # below the repository's


@dataclass(frozen=True)
class SparseConfig:
    """What a sparse encoder's files say. A road is None if the files have none for such texts."""

    query: Splade | Static | None
    document: Splade | Static | None
    other: Splade | Static | None  # of texts that are neither
    max_active_dims: int | None = None  # how many weights a text keeps, the largest; None: all

    def road(self, task: str | None) -> Splade | Static | None:
        return self.other if task is None else self.query if task == "query" else self.document

    @property
    def roads(self) -> tuple[Splade | Static | None, ...]:
        return self.query, self.document, self.other


def read_sparse(folder: Folder, texts: Mapping[str, Any], own: Mapping[str, Any]) -> SparseConfig | None:
    """None for a model that is no sparse encoder. texts: config_sentence_transformers.json. own: the network's
    sentence_bert_config.json. Raises CheckpointError for what isn't known, naming it."""
    modules = folder.modules
    if modules and module_kind(modules[0]) == "Router":  # elsewhere none is supported, whatever its file says
        folder.router(modules[0].get("path", ""))
    flat = folder.parts
    kinds = [module_kind(module) for module in flat]
    if not any(name in SPARSE for name in kinds):
        return None
    if "SparseAutoEncoder" in kinds:
        raise CheckpointError(
            f"{folder.root}: SparseAutoEncoder is not supported: its numbers are no weights of tokens"
        )
    for module, name in zip(flat, kinds, strict=True):
        if name not in _KNOWN:
            raise CheckpointError(
                f"modules.json: module {shown(module.get('type'))} is not supported in a sparse encoder; known: "
                + ", ".join(_KNOWN)
            )
    networks = [module for module in flat if module_kind(module) in _NETWORKS]
    if len(networks) != 1:
        raise CheckpointError(
            f"{folder}: this sparse encoder has {len(networks)} networks; only one, a masked language model, is "
            "supported (queries may share it, or have stored weights)"
        )
    # sentence-transformers' defaults: MLMTransformer is one for masked tokens, Transformer a bare encoder.
    usual = "fill-mask" if module_kind(networks[0]) == "MLMTransformer" else "feature-extraction"
    task = own.get("transformer_task", usual)
    if task != "fill-mask":
        raise CheckpointError(
            f"{folder.root}: transformer_task of the sparse encoder's network is {shown(task)}; it must be 'fill-mask'"
        )
    if module_kind(modules[0]) in ROUTERS:
        if len(modules) > 1:
            after = ", ".join(str(module.get("type")) for module in modules[1:])
            raise CheckpointError(f"modules.json: {shown(after)} after a sparse encoder's Router is not supported")
        query, document, other = _roads(folder, modules[0].get("path", ""))
    else:
        query = document = other = _road(folder, modules, "modules.json")
    if texts.get("max_active_dims") is not None:
        Reader(texts).whole("max_active_dims", 1)
    return SparseConfig(query, document, other, texts.get("max_active_dims"))


def _road(folder: Folder, modules: Sequence[Module], source: str) -> Splade | Static:
    kinds = [module_kind(module) for module in modules]
    if kinds == ["SparseStaticEmbedding"]:
        place = modules[0].get("path", "")
        inside(folder.root, place, source)
        return Static(place)
    if len(kinds) != 2 or kinds[0] not in _NETWORKS or kinds[1] != "SpladePooling":
        names = ", ".join(str(module.get("type")) for module in modules)
        raise CheckpointError(
            f"{source}: a sparse encoder of {shown(names)} is not supported; it must be a masked language model "
            f"({' or '.join(_NETWORKS)}) and SpladePooling, or SparseStaticEmbedding alone"
        )
    where = inside(folder.root, modules[1].get("path", ""), source) / "config.json"
    get = Reader(folder.json(where))
    try:
        return Splade(
            get.choice("pooling_strategy", "max", ("max", "sum")),
            get.choice("activation_function", "relu", ("relu", "log1p_relu")),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _roads(folder: Folder, place: str) -> tuple[Splade | Static | None, ...]:
    """The roads of queries, documents and other texts, in the order in which sentence-transformers' Router looks for
    them: by `route_mappings`, by the task's name, then the default."""
    raw, source = folder.router(place), str(folder.router_path(place))
    roads = {}
    for name, ids in raw["structure"].items():
        if not isinstance(ids, list) or not ids or any(item not in list(raw["types"]) for item in ids):
            raise CheckpointError(f"{source}: route {shown(name)} is {shown(ids)}; it must list keys of its types")
        roads[name] = _road(folder, [part_of(place, item, raw["types"][item]) for item in ids], source)
    get = Reader(Reader(raw).mapping("parameters"))
    default = get.raw.get("default_route")
    if default is None and get.flag("allow_empty_key", True):
        default = next(iter(roads), None)
    # Keys are written as Python shows a pair of a task and a modality, of which there is only text here.
    mapped = get.mapping("route_mappings")
    known = [str((task, modality)) for task in (*TASKS, None) for modality in ("text", None)]
    for key, name in [(None, default), *mapped.items()]:
        if (key is not None and key not in known) or (name is not None and name not in list(roads)):
            raise CheckpointError(
                f"{source}: route {shown(name)} for {shown(key)} is not supported; routes: {shown(list(roads))}, for "
                f"one of {', '.join(known)}"
            )

    def pick(task: str | None) -> Splade | Static | None:
        keys = (str((t, modality)) for t in (task, None) for modality in ("text", None))
        name = next((mapped[key] for key in keys if key in mapped), None)
        if name is None:
            name = next((name for name in (task, "text") if name in roads), default if task is None else None)
        return None if name is None else roads[name]

    return pick("query"), pick("document"), pick(None)
