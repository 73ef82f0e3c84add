"""What a user gives as texts. Anything else is refused by name. What can be read twice is checked before any work."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from ..reading import CheckpointError, OptionError, check_unicode, printable
from .tokenizer import Text

Pair = tuple[str, str]
_IN_MEMORY = (Sequence, KeysView, ValuesView, ItemsView)


class Given:
    """What a user gave as texts or pairs, as an iterable of checked items. `checked`: all items were checked before any
    work. If not, each item is checked when it is read."""

    def __init__(self, items: Iterable[Any], check: Callable[[Any, int], Any]):
        self.items, self.check = items, check
        # Only what gives the same items again is read twice. An object that only has a length may be a stream or a
        # loader.
        self.checked = isinstance(items, _IN_MEMORY) or hasattr(type(items), "__array__")
        self.count = sum(1 for _ in map(check, items, itertools.count())) if self.checked else None

    def __iter__(self) -> Iterator[Any]:
        """Raises ValueError if there are not as many items as were checked."""
        i = -1
        for i, item in enumerate(self.items):
            yield self.check(item, i)
        if self.count not in (None, i + 1):
            raise ValueError(
                f"{type(self.items).__name__} gave {self.count} items when it was checked, and {i + 1} after that; "
                "give a list"
            )

    @property
    def room(self) -> int:
        """The number of rows to make room for. 0 if it may be wrong."""
        return len(self.items) if isinstance(self.items, (list, tuple, np.ndarray)) else 0


def check_text(text: object, i: int, name: str = "text") -> str:
    """Returns `text`, if it is a string that UTF-8 can hold. Raises TypeError or ValueError that names the item. name:
    what the items are, for messages."""
    if not isinstance(text, str):
        raise TypeError(f"{name} {i} is {brief(text)}; each {name} must be a str")
    if not text.isascii():
        check_unicode(text, f"{name} {i}")
    return text


def check_pair(pair: object, i: int) -> Pair:
    """Returns `pair`, if it is two strings in an order. Raises as check_text does."""
    if isinstance(pair, np.ndarray) and pair.ndim == 1:
        pair = pair.tolist()
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise TypeError(f"pair {i} is {brief(pair)}; each must be two strings")
    return check_text(pair[0], i), check_text(pair[1], i)


def check_text_or_pair(item: object, i: int) -> Text:
    """Returns `item`, if it is a text or a pair of texts. Raises as check_text and check_pair do."""
    return check_pair(item, i) if isinstance(item, (list, tuple, np.ndarray)) else check_text(item, i)


def listed(
    texts: Any,
    name: str,
    check: Callable[[Any, int], Any] = check_text,
    what: str = "a str or an iterable of str",
    dimensions: int = 1,
) -> tuple[Given, bool]:
    """What a user gave as `what`, and whether it was one string. Raises TypeError, by name, for anything else. A table
    or a mapping is refused, because its columns or keys would be taken for texts. A set is refused, because it has no
    order. dimensions: the most that an array may have."""
    if isinstance(texts, Given):
        return texts, False
    if isinstance(texts, str):
        return Given([texts], check), True
    wrong = f"{name} is {type(texts).__name__}; it must be {what}"
    has = getattr(texts, "ndim", 1)
    if isinstance(texts, Mapping):
        raise TypeError(f"{wrong}, no mapping, of which only the keys would be read")
    if hasattr(type(texts), "columns") or hasattr(type(texts), "column_names"):
        raise TypeError(f"{wrong}, such as one column of this table")
    if isinstance(texts, (set, frozenset)):
        raise TypeError(f"{wrong} in an order, which a set doesn't have: make it a list, and keep that")
    if isinstance(texts, (bytes, bytearray, memoryview)) or not isinstance(texts, Iterable):
        raise TypeError(wrong)
    if not 1 <= has <= dimensions:
        raise TypeError(f"{wrong}, no array of {has} dimensions")
    as_strings = getattr(texts, "to_pylist", None)  # of pyarrow's arrays, which else give scalars of their own
    return Given(texts if as_strings is None else as_strings(), check), False


def length(items: object) -> int | None:
    """How many items there are, if they say so. Only for a progress bar: it may be wrong."""
    items = items.items if isinstance(items, Given) else items
    try:
        return len(items) if isinstance(items, Sized) else None
    except Exception:  # noqa: BLE001  any code may be in there
        return None


def brief(value: object) -> str:
    """The type and the beginning of something that is no text, on one line."""
    return f"{type(value).__name__} ({printable(' '.join(reprlib.repr(value).split()), 60)})"


@contextmanager
def keeping(finished: Callable[[], Any], given: object, streams: bool = False) -> Iterator[None]:
    """Adds to an error of this block the finished rows, as `error.finished`; the message says how many. Its last part,
    `error.advice`, says where to find them: the shell leaves it out. streams: whether there is a `stream`."""
    try:
        yield
    except BaseException as error:
        with suppress(Exception):  # the rows may not be had (no memory), or the error take no attribute: it goes first
            rows = finished()
            error.finished = rows  # type: ignore[attr-defined]
            lazy = not (isinstance(given, Given) and given.checked)
            ours = type(error) in (TypeError, ValueError, CheckpointError, OptionError) and len(error.args) == 1
            if ours and (lazy or len(rows)):
                offer = "; `stream` gives rows as they are ready" if streams else ""
                advice = f" ({len(rows)} rows were finished: this error has them as .finished{offer})"
                error.advice = advice  # type: ignore[attr-defined]
                error.args = (f"{error}{advice}",)
        raise
