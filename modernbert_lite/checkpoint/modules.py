"""Modules of sentence-transformers, as modules.json lists them. They are known by namespace and class name, and never
imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Module = dict[str, Any]  # {"type", "path", ..}, as in modules.json
ROUTERS = ("Router", "Asym")  # Asym is its older name
SPARSE = ("MLMTransformer", "SpladePooling", "SparseStaticEmbedding", "SparseAutoEncoder")
_LIBRARIES = ("sentence_transformers.", "pylate.")


def module_kind(module: Mapping[str, Any]) -> str:
    """The class of a module: "Pooling" of "sentence_transformers.models.Pooling", whatever the version. "" for a class
    of anybody else than sentence-transformers and PyLate: whatever its name, it is a repository's own code, which is
    never run."""
    name = module.get("type")
    return name.rpartition(".")[2] if isinstance(name, str) and name.startswith(_LIBRARIES) else ""


def expand(modules: Sequence[Module], router: Callable[[object], Mapping[str, Any] | None]) -> list[Module]:
    """The modules, with those of a sparse encoder's Router in its place, their paths below the checkpoint's folder.
    router: what gives the checked config of the router in a place."""
    found: list[Module] = []
    for module in modules:
        place = module.get("path", "")
        raw = router(place) if module_kind(module) in ROUTERS else None
        inner = raw["types"] if raw else {}
        found += [part_of(place, name, inner[name]) for name in inner] if inner else [module]
    return found if any(module_kind(module) in SPARSE for module in found) else list(modules)


def part_of(place: str, name: str, full_name: object) -> Module:
    """A router's part, as modules.json would have it; "" lies where the router does."""
    return {"type": full_name, "path": "/".join(filter(None, (place, name)))}
