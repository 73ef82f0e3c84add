"""Which tensor of a checkpoint's files is which of the network: prefixes, older and newer names, split matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from .gte import Gte

Shape = tuple[int, ...]
Source = tuple[Path, str]  # a file and the key in it


@dataclass(frozen=True)
class Names:
    """What an architecture's tensors may be called. Without its prefix a name begins with one of `parts` in the
    encoder, with one of `heads` above it."""

    prefixes: tuple[str, ...]
    parts: tuple[str, ...]
    heads: tuple[str, ...]
    renames: Mapping[str, str] = field(default_factory=dict)  # patterns of other names
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a matrix, and those that it may be stored as


MODERNBERT = Names(
    prefixes=("model.", ""),
    parts=("embeddings", "layers", "final_norm"),
    heads=("head", "decoder", "classifier"),
)
# transformers' GteModel has names of its own, though it saves Alibaba's ("new.gte.": a head that it loaded from there).
GTE = Names(
    prefixes=("new.gte.", "new.", "gte.", "model.", ""),
    parts=("embeddings", "encoder", "layers"),
    heads=("pooler", "lm_head", "classifier", "qa_outputs"),
    renames={
        r"^layers\.": "encoder.layer.",
        r"\.self_attn\.": ".attention.",
        r"\.post_attention_layernorm\.": ".attn_ln.",
        r"\.post_mlp_layernorm\.": ".mlp_ln.",
        r"^lm_head\.layer_norm\.": "lm_head.norm.",
    },
    splits={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("up_proj", "gate_proj")},
)


def match(
    files: Mapping[Path, Mapping[str, Shape]], expected: Mapping[str, Shape], network: nn.Module
) -> tuple[dict[str, list[Source]], list[str]]:
    """Each name of the network -> where it is stored, mostly in one piece, else in those that belong one above the
    other; and what is wrong. files: the shapes in each. expected: the network's.

    An encoder opens a head's file, too, and leaves the head out.
    """
    encoder = getattr(network, "model", network)
    names = GTE if isinstance(encoder, Gte) else MODERNBERT
    found: dict[str, dict[tuple[int, int], Source]] = {}
    first_with: dict[str, str] = {}  # a prefix of the encoder's keys -> the first one that has it
    problems = []
    for path, key, shape in ((path, key, shape) for path, keys in files.items() for key, shape in keys.items()):
        prefix, name, piece, pieces = _place(key, names)
        part = name.partition(".")[0]
        if part in names.parts:
            first_with.setdefault(prefix, key)
            name = name if encoder is network else f"model.{name}"
        elif part in names.heads and (encoder is network or (part == "pooler" and name not in expected)):
            continue
        if name not in expected:
            problems.append(f"unexpected {key}")
            continue
        stored = found.setdefault(name, {})
        wanted = expected[name][0] // pieces, *expected[name][1:]
        same = [at for at in stored if at == (piece, pieces) or at[1] != pieces]
        if same:
            problems.append(f"{stored[same[0]][1]} and {key} are the same tensor")
        elif shape != wanted:
            problems.append(f"{key} has the shape {shape}, the config asks for {wanted}")
        stored.setdefault((piece, pieces), (path, key))
    if not found:
        keys = [key for keys in files.values() for key in keys]
        allowed = ", ".join(repr(prefix) for prefix in names.prefixes)
        what = f"names such as {keys[0]!r}" if keys else "no tensor at all"
        return {}, [
            f"it has {what}; a {type(encoder).__name__}'s begin with {names.parts[0]!r}, after one of {allowed}"
        ]
    if len(first_with) > 1:
        allowed = ", ".join(repr(prefix) for prefix in names.prefixes)
        problems.append(f"{' and '.join(first_with.values())} have different prefixes; all must have one of {allowed}")
    for name, stored in found.items():
        if len(stored) < next(iter(stored))[1]:
            problems.append(f"{name} lacks a part: there is only {', '.join(key for _, key in stored.values())}")
    return {name: [stored[at] for at in sorted(stored)] for name, stored in found.items()}, problems


def _place(key: str, names: Names) -> tuple[str, str, int, int]:
    """A key -> its prefix, the name without it, which piece of that tensor it is, of how many.

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
    for whole, parts in names.splits.items():
        for i, part in enumerate(parts):
            if f".{part}." in name:
                return prefix, name.replace(f".{part}.", f".{whole}."), i, len(parts)
    return prefix, name, 0, 1
