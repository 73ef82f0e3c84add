"""A folder's safetensors -> the tensors of a network. Pickle files are never read, code is never run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..models.fields import Config
from ..ops.choose import FLOATS
from ..ops.linear import FLOAT8, Linear, narrower, pack, packs
from ..ops.threads import survive_forks
from ..reading import CheckpointError, OptionError, printable, shown, warn
from .folder import Folder, open_safetensors
from .names import Source, advice, match

_READ = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
_TABLES = ("tok_embeddings.weight", "word_embeddings.weight")


def load_weights(
    network: type[nn.Module],
    config: Config,
    folder: Folder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = True,
) -> nn.Module:
    """Builds `network` on the meta device, and gives it the folder's tensors one by one, so that there are never two
    copies. A tensor that needs no conversion stays memory-mapped, as does the embedding table on the CPU: its rows are
    converted when they are looked up. dtype, packed: as in `load_model`. Raises CheckpointError that names all missing,
    unexpected and misshapen tensors."""
    survive_forks()
    with torch.device("meta"):
        model = network(config).requires_grad_(False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = folder.shapes(folder.network)
    found, problems = match(files, expected, model)
    tied = getattr(model, "TIED", None) if config.tie_word_embeddings else None
    missing = [name for name in expected if name not in found and not (tied and name == tied[0])]
    problems = [f"missing {name}" for name in missing if found] + problems  # else the names themselves are strange
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        if all(problem.startswith("unexpected") for problem in problems):
            more += "; if they are left over from training, save the file without them"
        why = advice(files, model)
        raise CheckpointError(f"{folder.network} doesn't fit its config.json{why}: {'; '.join(problems[:12])}{more}")

    narrow = narrower(device, dtype) if packed or dtype in (torch.int8, FLOAT8) else None
    eight = narrow in (torch.int8, FLOAT8)
    if eight and not packed:
        name = "int8" if narrow == torch.int8 else "float8"
        raise OptionError(f"dtype {name!r} is for inference: with packed=False use float32, bfloat16 or float16")
    if narrow:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    linears = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    packing = packed and packs(device, dtype)
    # One buffer for all tensors that are packed. A buffer per tensor would leave holes that are too small for the next.
    # (On a card each tensor goes there at once.)
    most = max(math.prod(expected[name]) for name in linears) if packing or narrow else 0
    buffer = torch.empty(most, dtype=dtype, device="cpu") if device.type == "cpu" else None
    state = {}
    for name, sources in found.items():
        # 8 bits are for the encoder's layers; a head's are few. In float8 only those that widen: the others end in an
        # addition, which a product in 16 bits does by itself (bench/LOG.md).
        rows, width = expected[name] if name in linears else (0, 0)
        widens = rows > width and rows % 16 == width % 16 == 0
        fits = not eight or (".layer" in f".{name}" and (narrow != FLOAT8 or widens))
        if name.endswith(_TABLES) and device.type == "cpu" and packed and not tied:
            state[name] = _read_table(*sources[0], dtype, narrow is not None)
        elif name in linears and (packing or (narrow and fits)):
            pack(linears[name], _read(sources, device, dtype, buffer), narrow if fits else None)
        else:
            state[name] = _read(sources, device, dtype)
    if tied and not torch.equal(state.setdefault(tied[0], state[tied[1]]), state[tied[1]]):
        warn(
            f"{folder.network}: {tied[0]} differs from {tied[1].removeprefix('model.')}, though tie_word_embeddings is "
            "true in config.json. Both are used, as in transformers 5 (transformers 4 ties them)"
        )
        tied = None
    left = model.load_state_dict(state, strict=False, assign=True)
    if left.unexpected_keys or not set(left.missing_keys) <= set(linears):
        raise AssertionError(left)
    if tied:
        model.get_submodule(tied[0].rpartition(".")[0]).weight = model.get_parameter(tied[1])
    return model.eval()


def load_dense(
    files: Folder, folder: Path, expected: dict[str, tuple[Any, ...]], device: torch.device
) -> dict[str, Tensor]:
    """The tensors of a sentence-transformers Dense module, in fp32. Raises CheckpointError unless they have the shapes
    that the module's config gives."""
    shapes = files.shapes(folder)
    found = {key: shape for keys in shapes.values() for key, shape in keys.items()}
    if found != expected:
        raise CheckpointError(f"{folder}: its config.json asks for {shown(expected)}, the file has {shown(found)}")
    return {key: _read([(path, key)], device, torch.float32) for path, keys in shapes.items() for key in keys}


def _read(sources: Sequence[Source], device: torch.device, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """A tensor: memory-mapped if it needs no conversion, else in `buffer`, if there is one. Pieces are put one above
    the other. The numbers are not read through for NaN: a result that isn't finite shows it."""
    if len(sources) > 1:
        return torch.cat([_read([source], device, dtype) for source in sources])
    path, key = sources[0]
    tensor = _open_tensor(path, key)
    if buffer is None or tensor.dtype == dtype:
        return tensor.to(device=device, dtype=dtype)
    return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _read_table(path: Path, key: str, dtype: torch.dtype, small: bool) -> Tensor:
    """A table of which few rows are looked up: memory-mapped as it is stored. small: in 16 bits, if its numbers fit."""
    tensor = _open_tensor(path, key)
    if small and tensor.dtype == torch.float32:
        half = tensor.half()
        return half if torch.stack(half.aminmax()).isfinite().all() else tensor
    return tensor if tensor.dtype in FLOATS else tensor.to(dtype)


def _open_tensor(path: Path, key: str) -> Tensor:
    # The file is mapped anew for each tensor. When a converted tensor is freed, its mapping goes, too, and with it the
    # pages that were read.
    try:
        tensor: Tensor = open_safetensors(path).get_tensor(key)
    except (SafetensorError, AttributeError) as error:  # a type that this safetensors or this torch doesn't know
        raise CheckpointError(f"{printable(key, 100)} can't be read: {shown(error)}; only {_READ} are") from None
    if tensor.dtype not in (*FLOATS, torch.float64):
        raise CheckpointError(
            f"{printable(key, 100)} is stored as {tensor.dtype}; only {_READ} are read: if it is "
            "quantized, take the model that it was made from"
        )
    return tensor
