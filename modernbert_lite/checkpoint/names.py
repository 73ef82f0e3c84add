"""Which tensor of a checkpoint's files belongs to which name of the network: prefixes, other names, split matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..models.fields import Names
from ..models.registry import family_of
from ..reading import printable, shown

Shape = tuple[int, ...]
Source = tuple[Path, str]  # a file and the key in it


# Tensors that are no weights. transformers makes them from the config, whatever a file says (older versions and code of
# repositories saved them). A loss isn't needed either.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.\w*(inv_freq|cos_cached|sin_cached)|position_ids|embeddings\.token_type_ids|loss_fct\.\w+)$"
)
# Names of an adapter that was saved with its base model, and not merged into it.
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
# Names of matrices that another library has quantized.
_QUANTIZED = re.compile(r"\.(weight_scale(_inv)?|weight_packed|SCB|absmax|quant_map|qweight|qzeros|g_idx)\b")
# A part of a prefix -> the program that puts it there.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_forward_module": "Lightning Fabric",
    "auto_model": "sentence-transformers",
    "0": "sentence-transformers",
    "base_model": "PEFT",
}


def match(
    files: Mapping[Path, Mapping[str, Shape]], expected: Mapping[str, Shape], network: nn.Module
) -> tuple[dict[str, list[Source]], list[str]]:
    """For each name of the network: where its tensor is stored. Most tensors are stored in one piece, some in several
    that belong one above the other. Also returns a list of what is wrong. files: the shapes in each file. expected: the
    network's shapes.

    An encoder also opens the file of a network with a head, and leaves the head out. A head leaves out a pooler that it
    doesn't use. Tensors that are derived from the config are left out. If a class around the network has put one prefix
    before all its names, the prefix is removed.
    """
    encoder = getattr(network, "model", network)
    names = family_of(network).names
    wrapper = _wrapper([key for keys in files.values() for key in keys], names)
    found: dict[str, dict[tuple[int, int], Source]] = {}
    first_with: dict[str, str] = {}  # a prefix of the encoder's keys -> the first one that has it
    problems = []
    config: Any = network.config
    table, tied = names.table if encoder is network else f"model.{names.table}", []
    for path, key, shape in ((path, key, shape) for path, keys in files.items() for key, shape in keys.items()):
        if _DERIVED.search(key):
            continue
        prefix, name, piece, pieces = _place(key.removeprefix(wrapper), names)
        part = name.partition(".")[0]
        if name == names.decoder:
            tied = [(path, key)] if shape == expected[table] else []
        if part in names.parts:
            first_with.setdefault(prefix, key)
            name = name if encoder is network else f"model.{name}"
        elif part in names.heads and (encoder is network or (part == "pooler" and name not in expected)):
            continue
        if name not in expected:
            problems.append(f"unexpected {_short(key)}")
            continue
        stored = found.setdefault(name, {})
        wanted = expected[name][0] // pieces, *expected[name][1:]
        same = [at for at in stored if at == (piece, pieces) or at[1] != pieces]
        if same:
            problems.append(f"{_short(stored[same[0]][1])} and {_short(key)} are the same tensor")
        elif shape != wanted:
            problems.append(f"{_short(key)} has the shape {shown(shape, 60)}, the config asks for {wanted}")
        stored.setdefault((piece, pieces), (path, key))
    if table not in found and tied and config.tie_word_embeddings:  # one tensor, stored under one of its two names
        found[table] = {(0, 1): tied[0]}
    if not found:
        keys = [key for keys in files.values() for key in keys]
        allowed = ", ".join(repr(prefix) for prefix in names.prefixes)
        what = f"names such as {shown(keys[0], 100)}" if keys else "no tensor at all"
        return {}, [
            f"it has {what}; a {type(encoder).__name__}'s begin with {names.parts[0]!r}, after one of {allowed}"
        ]
    if len(first_with) > 1:
        allowed = ", ".join(repr(prefix) for prefix in names.prefixes)
        problems.append(
            f"{' and '.join(map(_short, first_with.values()))} have different prefixes; all must have one of {allowed}"
        )
    for name, stored in found.items():
        if len(stored) < next(iter(stored))[1]:
            problems.append(
                f"{name} lacks a part: there is only {', '.join(_short(key) for _, key in stored.values())}"
            )
    return {name: [stored[at] for at in sorted(stored)] for name, stored in found.items()}, problems


def advice(files: Mapping[Path, Mapping[str, Shape]], network: nn.Module) -> str:
    """What to do about names that `match` can't place, if the names tell which program wrote them. Else ""."""
    names, keys = family_of(network).names, [key for keys in files.values() for key in keys]
    adapter = [key for key in keys if _ADAPTER.search(key)]
    if adapter:
        return (
            f" (it holds a PEFT adapter that is not merged into its base, such as {shown(adapter[0], 100)}: in Python, "
            "model.merge_and_unload().save_pretrained(FOLDER) saves what can be opened)"
        )
    quantized = [key for key in keys if _QUANTIZED.search(key)]
    if quantized:
        return (
            f" (its matrices are quantized, which {shown(quantized[0], 100)} tells: only float32, float16 and bfloat16 "
            "are read; take the model that it was made from)"
        )
    strange = [prefix for prefix in _before(keys, names.table) if prefix not in names.prefixes]
    if not strange:
        return ""
    prefix = strange[0]
    who = next((who for part, who in _WRAPPERS.items() if part in prefix.split(".")), "a class around the network")
    several = len(strange) > 1
    told = f" (its names begin with {' or '.join(shown(p, 60) for p in strange[:3])}, which {who} left there"
    if not re.fullmatch(r"[\w.]+", prefix):  # it stands in a command that the user will run
        return told + ")"
    aim = f"to keep what is under {prefix!r}" if several else "to take that off"
    only = f" if k.startswith('{prefix}')" if several else ""
    return (
        f'{told}: {aim}, run in its folder: python -c "import glob, safetensors.torch as s; '
        f"[s.save_file({{k.removeprefix('{prefix}'): v.clone() for k, v in s.load_file(f).items(){only}}}, f, "
        "{'format': 'pt'}) for f in glob.glob('model*.safetensors')]\")"
    )


def _before(keys: Iterable[str], table: str) -> list[str]:
    """The prefix of each table of words in a file."""
    return [key.removesuffix(table) for key in keys if f".{key}".endswith(f".{table}")]


def _wrapper(keys: list[str], names: Names) -> str:
    """The prefix that a class around the network has put before all its names: "module." of DataParallel. "" if there
    is none, or if several readings are possible. (transformers then gives the network random weights.)"""
    before = _before(keys, names.table)
    if len(before) != 1 or before[0] in names.prefixes:
        return ""
    # "module.model." of a head's network: its own names begin with "model.", or with the head's.
    usual = max((p for p in names.prefixes if f".{before[0]}".endswith(f".{p}")), key=len)
    wrapper = before[0].removesuffix(usual)
    others = (_place(key, names)[1] for key in keys if not key.startswith(wrapper))
    return "" if any(name.partition(".")[0] in names.parts for name in others) else wrapper


def _short(key: str) -> str:
    return printable(key, 100)


def _place(key: str, names: Names) -> tuple[str, str, int, int]:
    """A key -> its prefix, the tensor's name without the prefix, which piece of that tensor it is, and of how many
    pieces.

    "new.encoder.layer.3.attention.k_proj.bias" -> ("new.", "encoder.layer.3.attention.qkv_proj.bias", 1, 3)
    """
    for prefix in names.prefixes:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.partition(".")[0] in names.parts + names.heads:
            break
    else:
        return "", key, 0, 1
    for pattern, usual in names.renames.items():
        name = re.sub(pattern, usual, name)
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # of norms, in files of TensorFlow's time
    for whole, parts in names.splits.items():
        for i, part in enumerate(parts):
            if f".{part}." in name:
                return prefix, name.replace(f".{part}.", f".{whole}."), i, len(parts)
    return prefix, name, 0, 1
