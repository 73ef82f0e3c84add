"""A folder or hub id -> checked safetensors -> a network. Pickle files are never read, code is never run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..models.fields import Config
from ..models.registry import network_class, read_config
from ..ops.linear import Linear, pack, packs
from ..ops.threads import set_threads, survive_forks
from ..reading import (
    CheckpointError,
    OptionError,
    cache_advice,
    inside,
    is_there,
    printable,
    read_json,
    shown,
    warn,
)
from .foreign import ADAPTER, adapter_files, no_adapter, no_weights
from .names import Source, advice, match
from .sparse import ROUTERS, expand, module_kind

BUNDLED = "tiny"
INDEX = "model.safetensors.index.json"
# Without some of these a model still opens, and may give other numbers: a cache that doesn't know whether the
# repository has them is not complete. The first two lie at the top, the others beside the network's config.json.
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
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TABLES = ("tok_embeddings.weight", "word_embeddings.weight")
_MAX_HEADER_BYTES = 16 << 20


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    packed: bool = True,
) -> nn.Module:
    """The bare network named by `architectures` (the encoder, if none is named), in eval mode, its weights frozen.

    path_or_id: a folder with config.json and safetensors, a hub id such as "answerdotai/ModernBERT-base" (opened from
    the cache without asking the network if it is there), or "tiny", the bundled model.
    device: default CUDA if there is one, else the CPU. dtype: default float32 on the CPU, bfloat16 on CUDA (float16
    where the card has no bfloat16); "int8", on the CPU: the layers' weights in 8 bits, a scale a row, the rest in
    float32. packed: on the CPU, hold linear weights only as the CPU's matrix products want them
    (ops.linear.PackedLinear), and the embedding table as the file stores it. False leaves plain tensors of one dtype,
    for torch.compile, torch.export or an optimizer (after `requires_grad_(True)`); not for int8. Raises
    CheckpointError for a checkpoint that is missing, damaged or unsupported.
    """
    set_threads(None)
    folder = find_checkpoint(path_or_id, revision=revision, token=token, local_files_only=local_files_only)
    folder = network_folder(folder)
    config = read_config(folder)
    network = network_class(config.architecture)
    return load_weights(network, config, folder, device=device, dtype=dtype, packed=packed)


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or CUDA if there is one, else the CPU. Raises ValueError for a device that isn't there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise OptionError(f"device {str(device)!r} can't be used: {why}") from None
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`, or what suits the device; int8 on the CPU only. Raises ValueError for one that isn't known."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    known = {**_DTYPES, "int8": torch.int8}
    picked = known.get(dtype) if isinstance(dtype, str) else dtype
    if picked is None or picked not in known.values():
        raise OptionError(f"dtype is {dtype!r}; it must be one of {', '.join(known)}")
    if picked == torch.int8 and device.type != "cpu":
        raise OptionError(f"dtype 'int8' is for the CPU, and the device is {str(device)!r}: use bfloat16 or float16")
    return picked


def find_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: itself, the bundled one, or a snapshot in the hub's cache, downloaded if need be."""
    name = os.fspath(path_or_id)
    if not name:
        raise CheckpointError(f"the model's name is empty; give a checkpoint's folder, a hub id, or {BUNDLED!r}")
    if name == BUNDLED:
        return Path(__file__).parents[1] / BUNDLED
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        here = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    except (OSError, RuntimeError) as error:  # no such user, a name too long, a folder that may not be entered
        raise CheckpointError(f"{shown(name)} can't be opened: {error}") from None
    if here:
        raise CheckpointError(f"{name!r} is not a folder; give a checkpoint's folder, a hub id, or {BUNDLED!r}")
    return _from_hub(name, revision, token, local_files_only)


def _from_hub(repo: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> Path:
    """Cache first: no request at all when the snapshot is complete."""
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
    if cached is not None and _is_complete(cached, repo):
        return cached
    if local_files_only or constants.HF_HUB_OFFLINE:
        if cached is not None:
            return cached
        raise CheckpointError(
            f"{repo} {state}, and the network is not allowed (offline mode: local_files_only, or HF_HUB_OFFLINE is "
            f"set). A model can be fetched elsewhere, and its folder given instead{damage}"
        )
    try:
        # Fails at once where the hub can't be reached; snapshot_download alone would quietly settle for the cache.
        there = hub.HfApi(token=token).model_info(repo, revision=revision, timeout=10).siblings or []
        folder = Path(hub.snapshot_download(**wanted, token=token))
        for name in _names(folder):  # leaves a note in the cache of each file that the repository doesn't have
            if not is_there(folder / name):
                try:
                    hub.hf_hub_download(repo, name, revision=folder.name, token=token)
                except LocalEntryNotFoundError:  # the hub is gone again
                    raise
                except EntryNotFoundError:
                    pass
        network = _network(folder)
        beside = [Path(file.rfilename) for file in there]
        if not any((network / name).exists() for name in ("model.safetensors", INDEX, *ADAPTER)):
            raise no_weights(repo, [f for f in beside if (folder / f).is_relative_to(network)])
        return folder
    except CheckpointError:  # of its files, which are here
        raise
    except Exception as error:  # noqa: BLE001  the hub's clients raise errors of several libraries
        if cached is not None and _has_weights(cached):
            warn(f"the hub could not be reached; using what the cache has of {repo}")
            return cached
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{repo} could not be downloaded, and is no folder here: {why}. A model can be fetched elsewhere, and its "
            f"folder given instead{damage}"
        ) from None


def _is_complete(folder: Path, repo: str) -> bool:
    """Whether a snapshot has its weights, and has or is known not to have every other file."""
    import huggingface_hub as hub

    try:
        network = _network(folder)
        if adapter_files(folder, network):
            return True  # what it lacks is not missed: it can't be opened
        if not _has_weights(network) or not is_there(network / "config.json"):
            return False
        if any(
            not is_there(folder / name) and hub.try_to_load_from_cache(repo, name, revision=folder.name) is None
            for name in _names(folder)
        ):
            return False
        with_config = ("Pooling", "Dense", "LayerNorm", "MultiVectorMask", "SpladePooling", "SparseStaticEmbedding")
        files = {**dict.fromkeys(with_config, "config.json"), **dict.fromkeys(ROUTERS, "router_config.json")}
        parts = [(m.get("path"), module_kind(m)) for m in expand(folder, read_modules(folder))]
        return all(is_there(inside(folder, path, "modules.json") / files[k]) for path, k in parts if k in files)
    except CheckpointError:  # a file is damaged: a link to a blob that is gone is mended by the client
        return False


def _names(folder: Path) -> list[str]:
    beside = _network(folder).relative_to(folder)
    return [*_TOP, *((beside / name).as_posix() for name in _BESIDE)]


def network_folder(folder: Path) -> Path:
    """Where config.json lies: the folder itself, or 0_Transformer/ in the oldest sentence-transformers layout. Raises
    CheckpointError if an adapter lies there: the network without it gives other vectors."""
    network = _network(folder)
    for path in adapter_files(folder, network):
        raise no_adapter(path, network, whole=is_there(network / "config.json") and _has_weights(network))
    return network


def _network(folder: Path) -> Path:
    """The folder of the module that is a network; of a sparse encoder's Router, the part of it that is one."""
    modules = expand(folder, read_modules(folder))
    paths = [m.get("path", "") for m in modules if module_kind(m) in ("Transformer", "MLMTransformer")]
    return inside(folder, paths[0], "modules.json") if paths else folder


def _has_weights(folder: Path) -> bool:
    try:
        return all(is_there(path) for path in weight_files(folder))
    except CheckpointError:
        return False


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """modules.json of sentence-transformers, a list of {"idx", "name", "path", "type"}; empty without the file."""
    path = folder / "modules.json"
    if not is_there(path):
        return []
    modules: list[dict[str, Any]] = read_json(path)
    if not modules or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of objects, one at least")
    return modules


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. Raises CheckpointError if there is neither."""
    single = folder / "model.safetensors"
    if is_there(single):
        return [single]
    if is_there(folder / INDEX):
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        return [inside(folder, shard, INDEX) for shard in sorted(set(map(str, shards.values())))]
    below = (path for path in folder.glob("*/*") if not re.match(r"\d+_", path.parent.name))  # but not 2_Dense/
    raise no_weights(str(folder), [path.relative_to(folder) for path in (*folder.glob("*"), *below)])


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file. Raises CheckpointError for one that is missing, cut short or malformed."""
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


def load_weights(
    network: type[nn.Module],
    config: Config,
    folder: Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    packed: bool = True,
) -> nn.Module:
    """Builds `network` on the meta device and gives it the folder's tensors, one by one, so that there are never two
    copies; a tensor that needs no conversion stays memory-mapped, as does the embedding table of the CPU, whose rows
    are converted as they are looked up. dtype, packed: as in `load_model`. Missing, unexpected or misshapen tensors,
    and values that aren't finite, are a CheckpointError that names them."""
    survive_forks()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    with torch.device("meta"):
        model = network(config).requires_grad_(False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = {path: _shapes(path) for path in weight_files(folder)}
    found, problems = match(files, expected, model)
    tied = getattr(model, "TIED", None) if config.tie_word_embeddings else None
    missing = [name for name in expected if name not in found and not (tied and name == tied[0])]
    problems = [f"missing {name}" for name in missing if found] + problems  # else the names themselves are strange
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        why = advice(files, model)
        raise CheckpointError(f"{folder} doesn't fit its config.json{why}: {'; '.join(problems[:12])}{more}")

    if dtype == torch.int8 and not packed:
        raise OptionError("dtype 'int8' is for inference: with packed=False use float32, bfloat16 or float16")
    int8, dtype = dtype == torch.int8, torch.float32 if dtype == torch.int8 else dtype
    linears = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    packing = packed and packs(device, dtype)
    # One buffer for what is packed next: the holes that a buffer each would leave are too small for what follows.
    buffer = torch.empty(
        max(math.prod(expected[name]) for name in linears) if packing or int8 else 0, dtype=dtype, device="cpu"
    )
    state = {}
    for name, sources in found.items():
        small = int8 and ".layer" in f".{name}"  # of the encoder's layers; a head's are few
        if name.endswith(_TABLES) and device.type == "cpu" and packed and not tied:
            state[name] = _read_table(*sources[0], dtype, int8)
        elif name in linears and (packing or small):
            pack(linears[name], _read(sources, device, dtype, buffer), int8=small)
        else:
            state[name] = _read(sources, device, dtype)
    if tied:
        decoder, table = tied
        if not torch.equal(state.setdefault(decoder, state[table]), state[table]):
            raise CheckpointError(
                f"{folder}: {decoder} differs from {table.removeprefix('model.')}, and tie_word_embeddings is true in "
                "config.json: make them equal, or the key false"
            )
        state[decoder] = state[table]
    left = model.load_state_dict(state, strict=False, assign=True)
    if left.unexpected_keys or not set(left.missing_keys) <= set(linears):
        raise AssertionError(left)
    if tied:
        model.get_submodule(tied[0].rpartition(".")[0]).weight = model.get_parameter(tied[1])
    return model.eval()


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    file = open_safetensors(path)
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  not a dict


def stores(folder: Path, name: str) -> bool:
    """Whether the folder's weights hold a tensor whose name is or ends with this one."""
    return any(f".{key}".endswith(f".{name}") for path in weight_files(folder) for key in _shapes(path))


def load_dense(folder: Path, expected: dict[str, tuple[Any, ...]], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a sentence-transformers Dense module, in fp32, if they have the shapes that its config gives."""
    shapes = {path: _shapes(path) for path in weight_files(folder)}
    found = {key: shape for keys in shapes.values() for key, shape in keys.items()}
    if found != expected:
        raise CheckpointError(f"{folder}: its config.json asks for {shown(expected)}, the file has {shown(found)}")
    return {key: _read([(path, key)], device, torch.float32) for path, keys in shapes.items() for key in keys}


def _read(sources: Sequence[Source], device: torch.device, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """A tensor, memory-mapped if it needs no conversion; otherwise in `buffer`, if that is given. Pieces are put one
    above the other. Whether its numbers are finite is seen in results: a mapped file isn't read for that."""
    if len(sources) > 1:
        return torch.cat([_read([source], device, dtype) for source in sources])
    path, key = sources[0]
    tensor = _open_tensor(path, key)
    if buffer is None or tensor.dtype == dtype:
        return tensor.to(device=device, dtype=dtype)
    return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _read_table(path: Path, key: str, dtype: torch.dtype, small: bool) -> Tensor:
    """A table of which few rows are looked up: memory-mapped as it is stored, and untouched; small: in 16 bits if its
    numbers allow that."""
    tensor = _open_tensor(path, key)
    if small and tensor.dtype == torch.float32:
        half = tensor.half()
        return half if torch.stack(half.aminmax()).isfinite().all() else tensor
    return tensor if tensor.dtype in _DTYPES.values() else tensor.to(dtype)


def _open_tensor(path: Path, key: str) -> Tensor:
    # Mapped anew for each tensor: the mapping of one that was converted goes with it, and its pages with the mapping.
    try:
        tensor: Tensor = open_safetensors(path).get_tensor(key)
    except (SafetensorError, AttributeError) as error:  # a type that this safetensors or this torch doesn't know
        raise CheckpointError(
            f"{printable(key, 100)} can't be read: {shown(error)}; only {', '.join(_DTYPES)} are"
        ) from None
    if tensor.dtype not in (*_DTYPES.values(), torch.float64):
        raise CheckpointError(
            f"{printable(key, 100)} is stored as {tensor.dtype}; only {', '.join(_DTYPES)} are read: if it is "
            "quantized, take the model that it was made from"
        )
    return tensor
