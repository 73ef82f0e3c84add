"""What is read from a checkpoint's folder: JSON of a sane size, paths that stay inside, values of the right type.

Needs no torch, so that `modernbert-lite info` and error messages stay quick.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MAX_JSON_BYTES = 1 << 20
MAX_TOKENIZER_JSON_BYTES = 1 << 24  # tokenizer_config.json repeats every added token: over 1 MB for Gemma's

# Far above any published checkpoint: a config that claims more is broken or hostile, and would build modules for ever.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "vocab_size": 1 << 24,
    "num_labels": 1 << 16,
    "type_vocab_size": 1 << 16,
}


class OptionError(ValueError):
    """An option that this model or machine doesn't have: the shell calls it bad usage."""


class CheckpointError(ValueError):
    """A checkpoint that is missing something, is damaged, or asks for what this package can't do."""


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An option's value as an int: Python's or numpy's integers, no bool. Raises OptionError for any other value."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name} is {shown(value)}; it must be {allowed}" + (", a whole number" * (number is None)))
    return number


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON object (in modules.json: the list) in a file. Raises CheckpointError if it is missing, is longer than
    `limit` bytes, is malformed or holds something else."""
    wanted = list if path.name == "modules.json" else dict
    try:
        content = path.read_bytes() if path.stat().st_size <= limit else None
        value = None if content is None else json.loads(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was not downloaded whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if content is None:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read")
    if not isinstance(value, wanted):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; a {wanted.__name__} is needed")
    return value


def inside(folder: Path, relative: object, source: str) -> Path:
    """`folder / relative` for a path that a checkpoint's file names; refused if it could leave the folder.

    Links are followed only within the folder or, in a hub cache (models--ORG--NAME/snapshots/COMMIT/file ->
    ../../blobs/HASH), within that model's cache. `source` names the file that holds the path, for the error message.
    """
    text = relative if isinstance(relative, str) else "\0"
    pure = PurePosixPath(text)
    if "\0" in text or "\\" in text or pure.is_absolute() or ".." in pure.parts or Path(text).drive:
        raise CheckpointError(
            f"{source}: path {shown(relative)} leaves the model's folder; only paths inside it are read"
        )
    root, path = folder.resolve(), folder / pure
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    try:
        path.exists()  # raises for a name that no file can have
        leaves = not path.resolve().is_relative_to(root.parent.parent if in_cache else root)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: path {shown(relative)} can't be followed: {shown(error)}") from None
    if leaves:
        raise CheckpointError(f"{source}: path {shown(relative)} is a link that leaves the model's folder")
    return path


def shown(value: object) -> str:
    """A value for an error message: its repr, shortened, and printable anywhere."""
    try:
        text = (str(value) if isinstance(value, BaseException) else repr(value)).encode(errors="replace").decode()
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else text[:160] + "…" + text[-30:]


class Reader:
    """Typed access to a raw config; a key that is absent or null takes the default."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = dict(raw)

    def _fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{key} is {shown(value)}; it must be {allowed}")

    def whole(self, key: str, default: int, least: int = 1) -> int:
        value = default if self.raw.get(key) is None else self.raw[key]
        limit = _LIMITS.get(key, 1 << 31)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            raise self._fail(key, value, f"a whole number from {least} to {limit}")
        return value

    def token_id(self, key: str) -> int | None:
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self._fail(key, value, "a whole number from 0, or null")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self._fail(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool, strings: bool = False) -> bool:
        """strings: "true" and "false", too (snowflake-arctic-embed-m-v2.0 has them)."""
        value = default if self.raw.get(key) is None else self.raw[key]
        if strings and value in ("true", "false"):
            value = value == "true"
        if not isinstance(value, bool):
            raise self._fail(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = default if self.raw.get(key) is None else self.raw[key]
        if value not in allowed:
            raise self._fail(key, value, "one of " + ", ".join(allowed))
        return str(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = {} if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, Mapping):
            raise self._fail(key, value, "an object or null")
        return value
