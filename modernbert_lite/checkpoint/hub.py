"""From a model's name to a folder on this machine: that folder, the bundled model, or a snapshot in the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..reading import CheckpointError, inside, is_there, shown, warn
from .folder import INDEX, ROUTERS, Folder, module_kind
from .foreign import no_weights

BUNDLED = "tiny"
# A model opens without some of these files, but may then give other numbers. So a cache is not complete until it is
# known whether the repository has them. The first two lie at the top, the others beside the network's config.json.
_TOP = ("modules.json", "config_sentence_transformers.json")
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentence_bert_config.json",
    "adapter_config.json",
)
_NEEDED_PATTERNS = [
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    INDEX,
    *_TOP,
    *_BESIDE,
    "added_tokens.json",
    "sentence_*_config.json",
    "[0-9]*_*/*.json",
    "[0-9]*_*/model.safetensors",
    # The parts of a sparse encoder's Router, such as query_0_SparseStaticEmbedding.
    "router_config.json",
    "*_[0-9]*_*/*.json",
    "*_[0-9]*_*/*.safetensors",
]


def find_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Folder:
    """The folder of a checkpoint: the named folder, the bundled model's, or a snapshot in the hub's cache. The snapshot
    is downloaded if need be."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"the model is {shown(path_or_id, 60)}; it must be a folder, a hub id, or {BUNDLED!r}")
    name = os.fspath(path_or_id)
    if not name:
        raise CheckpointError(f"the model's name is empty; give a checkpoint's folder, a hub id, or {BUNDLED!r}")
    if name == BUNDLED:
        return Folder(Path(__file__).parents[1] / BUNDLED)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return Folder(path)
        here = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    except (OSError, RuntimeError) as error:  # no such user, a name too long, a folder that may not be entered
        raise CheckpointError(f"{shown(name)} can't be opened: {error}") from None
    if here:
        raise CheckpointError(f"{name!r} is not a folder; give a checkpoint's folder, a hub id, or {BUNDLED!r}")
    return _from_hub(name, revision, token, local_files_only)


def _from_hub(repo: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> Folder:
    """Looks in the cache first. If the snapshot is complete, no request is made."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {"repo_id": repo, "revision": revision, "allow_patterns": _NEEDED_PATTERNS}
    cached: Path | None = None
    state = "is not in the hub cache"
    ref = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "refs", revision or "main")
    delete_ref = f": delete {ref}, and open the model once where the hub can be reached"
    damage = ""
    try:
        cached = Path(os.path.normpath(hub.snapshot_download(**wanted, local_files_only=True)))
    except HFValidationError as error:
        raise CheckpointError(f"{shown(repo)} is neither a folder nor a hub id: {error}") from None
    except LocalEntryNotFoundError as error:
        if hasattr(error, "snapshot_path"):
            state = f"is not whole in the hub cache ({shown(error, 400)})"
        elif os.path.lexists(ref):
            state += f", where {ref} names a snapshot that is not there{delete_ref}"
    except (OSError, ValueError) as error:
        damage = f". The cache is damaged ({shown(error)}){delete_ref}"
    if cached is not None and cached.parent.name != "snapshots":
        cached, damage = None, f". The cache is damaged ({ref} names no snapshot){delete_ref}"
    kept = None if cached is None else Folder(cached)
    if kept is not None and _is_complete(kept, repo):
        return kept
    if local_files_only or constants.HF_HUB_OFFLINE:
        if kept is not None:
            return kept
        raise CheckpointError(
            f"{repo} {state}, and the network is not allowed (offline mode: local_files_only, or HF_HUB_OFFLINE is "
            f"set). A model can be fetched elsewhere, and its folder given instead{damage}"
        )
    try:
        # This fails at once if the hub can't be reached. snapshot_download alone would use the cache, and say nothing.
        there = hub.HfApi(token=token).model_info(repo, revision=revision, timeout=10).siblings or []
        folder = Folder(Path(hub.snapshot_download(**wanted, token=token)))
        for name in _names(folder):  # leaves a note in the cache of each file that the repository doesn't have
            if not is_there(folder.root / name):
                try:
                    hub.hf_hub_download(repo, name, revision=folder.root.name, token=token)
                except LocalEntryNotFoundError:  # the hub is gone again
                    raise
                except EntryNotFoundError:
                    pass
        beside = [Path(file.rfilename) for file in there]
        if not folder.opens:
            raise no_weights(repo, [f for f in beside if (folder.root / f).is_relative_to(folder.network)])
        return folder
    except CheckpointError:  # of its files, which are here
        raise
    except Exception as error:  # noqa: BLE001  the hub's clients raise errors of several libraries
        if kept is not None and kept.has_weights:
            warn(f"the hub could not be reached; using what the cache has of {repo}")
            return kept
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{repo} could not be downloaded, and is no folder here: {why}. A model can be fetched elsewhere, and its "
            f"folder given instead{damage}"
        ) from None


def _is_complete(folder: Folder, repo: str) -> bool:
    """Whether a snapshot has its weights, and each other file is there or known to be missing from the repository."""
    import huggingface_hub as hub

    try:
        if folder.adapted:
            return True  # what it lacks is not missed: it can't be opened
        if not folder.has_weights or not is_there(folder.network / "config.json"):
            return False
        commit = folder.root.name
        if any(
            not is_there(folder.root / name) and hub.try_to_load_from_cache(repo, name, revision=commit) is None
            for name in _names(folder)
        ):
            return False
        with_config = ("Pooling", "Dense", "LayerNorm", "MultiVectorMask", "SpladePooling", "SparseStaticEmbedding")
        files = {**dict.fromkeys(with_config, "config.json"), **dict.fromkeys(ROUTERS, "router_config.json")}
        parts = [(m.get("path"), module_kind(m)) for m in folder.parts]
        return all(is_there(inside(folder.root, path, "modules.json") / files[k]) for path, k in parts if k in files)
    except CheckpointError:  # a file is damaged: a link to a blob that is gone is mended by the client
        return False


def _names(folder: Folder) -> list[str]:
    beside = folder.network.relative_to(folder.root)
    return [*_TOP, *((beside / name).as_posix() for name in _BESIDE)]
