"""A checkpoint's folder: which files it has. Each file is read once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..reading import (
    MAX_JSON_BYTES,
    CheckpointError,
    cache_advice,
    inside,
    is_there,
    read_json,
    shown,
)
from .foreign import ADAPTER, adapter_files, no_adapter, no_weights

Module = dict[str, Any]  # {"type", "path", ..}, as in modules.json of sentence-transformers
ROUTERS = ("Router", "Asym")  # Asym is its older name
SPARSE = ("MLMTransformer", "SpladePooling", "SparseStaticEmbedding", "SparseAutoEncoder")
INDEX = "model.safetensors.index.json"
_LIBRARIES = ("sentence_transformers.", "pylate.")
_MAX_HEADER_BYTES = 16 << 20

Shape = tuple[int, ...]


class Folder:
    """The folder of a checkpoint. `root` is where modules.json lies, if there is one. A file that was read is kept, so
    each loading of a checkpoint needs a Folder of its own."""

    def __init__(self, root: Path):
        self.root = root
        self._read: dict[Path, Any] = {}
        self._shapes: dict[Path, dict[Path, dict[str, Shape]]] = {}

    def json(self, path: Path, limit: int = MAX_JSON_BYTES) -> Any:
        """The JSON object in a file below `root`. The caller must not change it. CheckpointError as from
        `read_json`."""
        if path not in self._read:
            self._read[path] = read_json(path, limit)
        return self._read[path]

    def optional_json(self, path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
        """The JSON object in an optional file; empty if there is no such file."""
        value: dict[str, Any] = self.json(path, limit) if path in self._read or is_there(path) else {}
        return value

    @cached_property
    def modules(self) -> list[Module]:
        """modules.json of sentence-transformers: a list of {"idx", "name", "path", "type"}. Empty if there is none."""
        path = self.root / "modules.json"
        if not is_there(path):
            return []
        modules: list[Module] = self.json(path)
        if not modules or not all(isinstance(module, dict) for module in modules):
            raise CheckpointError(f"{path} must hold a list of objects, one at least")
        return modules

    @cached_property
    def parts(self) -> list[Module]:
        """The modules. A sparse encoder's Router is replaced by the modules in it."""
        found: list[Module] = []
        for module in self.modules:
            place = module.get("path", "")
            routes = module_kind(module) in ROUTERS and is_there(self.router_path(place))
            inner = self.router(place)["types"] if routes else {}
            found += [part_of(place, name, inner[name]) for name in inner] if inner else [module]
        return found if any(module_kind(module) in SPARSE for module in found) else self.modules

    def router(self, place: object) -> dict[str, Any]:
        """The config of the Router in a folder that modules.json names: {"types": {place: class},
        "structure": {route: [place, ..]}, "parameters": {..}}."""
        path = self.router_path(place)
        raw: dict[str, Any] = self.json(path)
        for key in ("types", "structure"):
            if not isinstance(raw.get(key), dict) or not raw[key]:
                raise CheckpointError(
                    f"{path}: {key} is {shown(raw.get(key))}; it must be an object of the router's parts"
                )
        return raw

    def router_path(self, place: object) -> Path:
        return inside(self.root, place, "modules.json") / "router_config.json"

    @cached_property
    def network(self) -> Path:
        """Where config.json lies. This is `root`, or the folder of the module that is a network (0_Transformer in the
        oldest layout of sentence-transformers), or the folder of the Router's part that is a network."""
        paths = [m.get("path", "") for m in self.parts if module_kind(m) in ("Transformer", "MLMTransformer")]
        return inside(self.root, paths[0], "modules.json") if paths else self.root

    def refuse_adapter(self) -> None:
        """Raises CheckpointError if an adapter lies beside the network: without it, the network gives other vectors."""
        for path in adapter_files(self.root, self.network):
            whole = is_there(self.network / "config.json") and self.has_weights
            raise no_adapter(path, self.network, whole=whole)

    @property
    def adapted(self) -> bool:
        return bool(adapter_files(self.root, self.network))

    @property
    def has_weights(self) -> bool:
        try:
            return all(is_there(path) for path in self.weight_files(self.network))
        except CheckpointError:
            return False

    def weight_files(self, folder: Path) -> list[Path]:
        """model.safetensors in a folder, or the shards that its index names. CheckpointError if there is neither."""
        single = folder / "model.safetensors"
        if is_there(single):
            return [single]
        if is_there(folder / INDEX):
            shards = self.json(folder / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{folder / INDEX} has no weight_map")
            return [inside(folder, shard, INDEX) for shard in sorted(set(map(str, shards.values())))]
        below = (path for path in folder.glob("*/*") if not re.match(r"\d+_", path.parent.name))  # but not 2_Dense/
        raise no_weights(str(folder), [path.relative_to(folder) for path in (*folder.glob("*"), *below)])

    def shapes(self, folder: Path) -> dict[Path, dict[str, Shape]]:
        """For each file of weights in a folder: the shapes of its tensors, read from the file's header."""
        if folder not in self._shapes:
            found = {}
            for path in self.weight_files(folder):
                file = open_safetensors(path)
                found[path] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            self._shapes[folder] = found
        return self._shapes[folder]

    def stores(self, name: str) -> bool:
        """Whether the network's weights hold a tensor whose name is `name`, or ends with it."""
        return any(f".{key}".endswith(f".{name}") for keys in self.shapes(self.network).values() for key in keys)

    @property
    def opens(self) -> bool:
        """Whether the folder holds weights of a network, or an adapter (for which there is a separate error)."""
        return any((self.network / name).exists() for name in ("model.safetensors", INDEX, *ADAPTER))


def module_kind(module: Mapping[str, Any]) -> str:
    """The class of a module, which is never imported: "Pooling" for "sentence_transformers.models.Pooling", in any
    version. "" for a class of neither sentence-transformers nor PyLate: it is the repository's own code, whatever its
    name."""
    name = module.get("type")
    return name.rpartition(".")[2] if isinstance(name, str) and name.startswith(_LIBRARIES) else ""


def part_of(place: str, name: str, full_name: object) -> Module:
    """A part of a router, in the form that modules.json would have. The place "" is the router's own folder."""
    return {"type": full_name, "path": "/".join(filter(None, (place, name)))}


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file. Raises CheckpointError for a file that is missing, cut short or malformed."""
    if not is_there(path):
        raise CheckpointError(f"{path} is missing: the checkpoint was not downloaded whole{cache_advice(path)}")
    try:
        with path.open("rb") as file:
            first = file.read(8)
        header = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path} is a pointer of git-lfs, not the weights: run `git lfs pull` in its folder")
        if header > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: its header claims {header} bytes, more than {_MAX_HEADER_BYTES}: damaged{cache_advice(path)}"
            )
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors ({shown(error)}): damaged or cut short?{cache_advice(path)}"
        ) from None
