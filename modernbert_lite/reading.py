"""What is read from a checkpoint's folder: JSON of bounded size, paths that stay inside, values of the right type.

It needs no torch, so `modernbert-lite info` and error messages come quickly.
"""

from __future__ import annotations

import json
import operator
import os
import stat
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from types import FrameType
from typing import Any, TypeGuard

MAX_JSON_BYTES = 1 << 20
MAX_TOKENIZER_JSON_BYTES = 1 << 24  # tokenizer_config.json repeats every added token: over 1 MB for Gemma's

MAX_TOKENIZER_BYTES = 1 << 28  # tokenizer.json: 34 MB for Gemma's vocabulary
MAX_MESSAGE = 2_000  # characters of an error or a warning

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# What options may be, told once: the classes check it, and the shell shows it before anything heavy is imported.
DTYPES = ("float32", "float16", "bfloat16", "int8", "float8")
ON_LONG = ("truncate", "error")
PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
INPUT_FORMATS, OUTPUT_FORMATS = ("txt", "jsonl", "csv", "tsv", "json"), ("jsonl", "npy", "npz")

# Far above any published checkpoint. A config that claims more is broken or hostile: building its modules would never
# end.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "vocab_size": 1 << 24,
    "num_labels": 1 << 16,
    "type_vocab_size": 1 << 16,
    "head_dim": 1 << 16,
}
# Products of a few numbers within these limits, and of a position, are finite in fp32.
_SMALLEST, _LARGEST = 1e-15, 1e15


class OptionError(ValueError):
    """An option that this model or this machine doesn't have. In the shell it is bad usage."""

    def __init__(self, message: str):
        super().__init__(printable(message, MAX_MESSAGE))


class CheckpointError(ValueError):
    """A checkpoint that lacks something, is damaged, or needs what this package doesn't have."""

    def __init__(self, message: str):
        super().__init__(printable(message, MAX_MESSAGE))  # names, paths and values in it are a stranger's


def is_there(path: Path) -> bool:
    """Whether an optional file of a checkpoint is there. Every optional file is looked for by this function.

    False only if nothing has the name. Raises CheckpointError if the name belongs to a folder, a pipe, a device, or a
    link to nothing. Ignoring such a name would drop what the file should say, and opening some of them would hang.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        what = f"what has the name is a link to {os.readlink(path)}, which is not there"
        raise CheckpointError(f"no {path.name} in {path.parent}: {what}{cache_advice(path)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not stat.S_ISREG(mode):
        what = f"what has the name is {_KINDS.get(stat.S_IFMT(mode), 'something else')}; it must be a file"
        raise CheckpointError(f"no {path.name} in {path.parent}: {what}")
    return True


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content. Raises CheckpointError if it is missing, no regular file, or over `limit` bytes."""
    if not is_there(path):
        raise CheckpointError(f"{path} is missing: the checkpoint was not downloaded whole")
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            content = file.read(limit + 1)  # what the file's size says may be wrong: it grows, or lies in /proc
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if len(content or b"") > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes; no more are read")
    return content or b""


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def cache_advice(path: Path) -> str:
    """What to do about a damaged file of the hub's cache, to end a message with; "" for any other file.

    .. models--ORG--NAME/snapshots/COMMIT/config.json -> ../../blobs/HASH: the hub's client takes every blob that is
    there for a whole one, so the damaged blob must be deleted.
    """
    if cached_repo(path) is None:
        return ""
    blob = Path(os.path.normpath(path.parent.resolve() / os.readlink(path))) if path.is_symlink() else path
    delete = f"Delete {blob}, and" if blob.exists() else "It is of the hub's cache:"
    return f". {delete} open the model again where the hub can be reached: the file is downloaded anew"


def cached_repo(path: Path) -> str | None:
    """The hub id of the repository whose snapshot the path lies in, or is. None outside the hub's cache."""
    path = path.absolute()
    for folder in (path, *path.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent.name.removeprefix("models--").replace("--", "/")
    return None


def warn(message: str, only_as_error: bool = False) -> None:
    """Gives a UserWarning that points at the code that called this package. only_as_error: only if that raises.

    If the warning can't be written to stderr, the work goes on.
    """
    message = printable(message, MAX_MESSAGE)
    frame, depth, caller, level = sys._getframe(), 1, sys._getframe(), 1
    while frame.f_back is not None:
        depth += 1
        if (frame.f_globals.get("__package__") or "").partition(".")[0] == __package__:
            caller, level = frame.f_back, depth
        frame = frame.f_back
    if only_as_error and not _raises(message, caller):
        return
    try:
        warnings.warn(message, stacklevel=level)
    except UserWarning:
        raise
    except Exception:  # noqa: BLE001  whatever a stream that is closed, or none, raises
        return


def _raises(message: str, frame: FrameType) -> bool:
    """Whether the warning filters make an error of this UserWarning there. The first filter that fits decides."""
    module = frame.f_globals.get("__name__") or "<unknown>"
    for action, text, category, place, line in warnings.filters:
        if (
            issubclass(UserWarning, category)
            and (text is None or text.match(message))
            and (place is None or place.match(module))
            and line in (0, frame.f_lineno)
        ):
            return action == "error"
    return False


def as_whole(value: Any) -> int | None:
    """The value as an int, if it is an integer of Python or numpy and no bool. Else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """An option's value. Raises OptionError for a value that is not allowed."""
    if not isinstance(value, str | None) or value not in allowed:
        raise OptionError(f"{name} is {shown(value)}; it must be one of {', '.join(map(str, allowed))}")
    return value


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An option's value as an int: Python's or numpy's integers, no bool. Raises OptionError for any other value."""
    number = as_whole(value)
    if number is None or number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name} is {shown(value)}; it must be {allowed}" + (", a whole number" * (number is None)))
    return number


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON object in a file (in modules.json: the list). Raises CheckpointError if the file is missing, is no
    regular file, is longer than `limit` bytes, is malformed, or holds something else."""
    wanted = list if path.name == "modules.json" else dict
    content = read_bytes(path, limit)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}{cache_advice(path)}") from None
    if not isinstance(value, wanted):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; a {wanted.__name__} is needed")
    return value


def optional_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in an optional file; empty if there is no such file. Raises as `read_json` does."""
    value: dict[str, Any] = read_json(path, limit) if is_there(path) else {}
    return value


def inside(folder: Path, relative: object, source: str) -> Path:
    """`folder / relative`, for a path that a checkpoint's file names. Raises CheckpointError if it could leave the
    folder.

    The file itself may be a link to anywhere, as model.safetensors may be: to a hub cache's blobs, or to weights that
    the user keeps elsewhere. Its folder, and each folder on the way, must lie in the model's folder after links are
    followed. (In a hub cache, models--ORG--NAME/snapshots/COMMIT, it must lie in that model's folder.) source: the file
    that holds the path, for the message.
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
        own = path if path.is_dir() else path.parent
        leaves = not own.resolve().is_relative_to(root.parent.parent if in_cache else root)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: path {shown(relative)} can't be followed: {shown(error)}") from None
    if leaves:
        raise CheckpointError(
            f"{source}: path {shown(relative)} is a link that leaves the model's folder: copy what it leads to, or "
            "link the files in it instead"
        )
    return path


def shown(value: object, limit: int = 200) -> str:
    """A value for a message: its repr (for a path or an error, its text), shortened, on one line, printable."""
    try:
        text = str(value) if isinstance(value, (BaseException, PurePath)) else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return printable(text, limit)


def printable(text: str, limit: int) -> str:
    """At most `limit` characters: the middle is left out if need be. Unprintable characters are escaped."""
    if len(text) > limit:
        text = text[: limit - limit // 5] + "…" + text[-(limit // 5) + 1 :]
    shorter = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shorter if len(shorter) <= limit else printable(shorter, limit)


def check_unicode(text: str, name: str) -> None:
    """Raises ValueError for a text with half of a surrogate pair: it can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: {text[error.start]!r} at character {error.start} is half of a "
            "surrogate pair; repair it, for example with text.encode('utf-8', 'replace').decode()"
        ) from None


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a number. A bool is no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Reader:
    """Typed access to a raw config. A key that is absent or null has the default."""

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
        """A number below 0, which some files have, means that there is none."""
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._fail(key, value, "a whole number, or null")
        return None if value is None or value < 0 else value

    def number(self, key: str, default: float) -> float:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not is_number(value) or not _SMALLEST <= value <= _LARGEST:
            raise self._fail(key, value, f"a positive number ({_SMALLEST:g} to {_LARGEST:g})")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers. It has no default."""
        values = self.raw.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise self._fail(key, values, f"a list of {count} positive numbers")
        if not all(is_number(value) and _SMALLEST <= value <= _LARGEST for value in values):
            raise self._fail(key, values, f"a list of positive numbers ({_SMALLEST:g} to {_LARGEST:g})")
        return tuple(float(value) for value in values)

    def real(self, key: str, default: float) -> float:
        """A finite number, also negative or 0."""
        value = default if self.raw.get(key) is None else self.raw[key]
        if not is_number(value) or not -_LARGEST <= value <= _LARGEST:
            raise self._fail(key, value, f"a number ({-_LARGEST:g} to {_LARGEST:g})")
        return float(value)

    def flag(self, key: str, default: bool, strings: bool = False) -> bool:
        """strings: also "true" and "false", which snowflake-arctic-embed-m-v2.0 has."""
        value = default if self.raw.get(key) is None else self.raw[key]
        if strings and value in ("true", "false"):
            value = value == "true"
        if not isinstance(value, bool):
            raise self._fail(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, str | None) or value not in allowed:
            raise self._fail(key, value, "one of " + ", ".join(allowed))
        return str(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = {} if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, Mapping):
            raise self._fail(key, value, "an object or null")
        return value
