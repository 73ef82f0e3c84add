"""Texts -> ids -> packed batches -> rows, in the caller's order and in bounded memory."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, pack, plan_batches, to_host
from ..reading import warn
from .inputs import brief, keeping, length
from .tokenizer import FirstCut, Text, Tokenizer

# Texts are read, sorted and embedded a window at a time. This bounds memory, however long the input is.
_WINDOW_TEXTS, _WINDOW_CHARACTERS = 4_096, 1 << 20
# A window is tokenized in pieces of this size. While the network computes one piece, the next is tokenized.
_PIECE_CHARACTERS = 1 << 16
_GPU_PIECES_AHEAD = 6  # its batch takes two or three pieces, and would wait for the last one

T = TypeVar("T")
Item = TypeVar("Item")
Ids = list[list[int]]
# encode(items, the first one's number, the most tokens of an item) -> ids, token types, how many items were cut.
Encode = Callable[[Sequence[Any], int, int], tuple[Ids, Ids, int]]


class _Feed(NamedTuple):
    """The settings of one run."""

    encode: Encode
    max_length: int
    batch_tokens: int
    each: int
    device: torch.device


class Feeder:
    """Feeds a network. `typed`: whether the network takes token types."""

    network: nn.Module
    tokenizer: Tokenizer
    typed: bool
    on_long: str
    max_seq_length: int
    batch_tokens: int

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    def run(
        self,
        texts: Iterable[Text],
        compute: Callable[[PackedBatch], Any],
        show_progress_bar: bool | None,
        total: int | None,
        *,
        encode: Encode | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        each: int = 1,
        device: torch.device | None = None,
    ) -> Iterator[list[Any]]:
        """Yields lists of results, one list per window of texts, in the order of the texts.

        compute(batch) returns one result per sequence: a tensor of B rows on any device, or B results of any kind, with
        None for a result that is not finite. encode, max_length, batch_tokens, device: replace those of the tokenizer
        and the model. each: how many neighbouring items are made of one of the user's texts. Messages have the number
        of the user's text.

        With on_long "truncate", longer texts are cut, and one warning at the end says how many. (Where warnings are
        errors, it comes before the first cut text is computed.) With on_long "error" they are a ValueError. Raises
        ValueError for a result that is not finite, naming the text.
        """
        feed = _Feed(
            encode or self.tokenizer.encode_typed,
            max_length or self.max_seq_length,
            batch_tokens or self.batch_tokens,
            each,
            device or self.device,
        )
        seen = truncated = 0
        reading = _windows(texts)
        # A GPU takes the next window's first batch before the results of this one are read: it never runs dry. On a CPU
        # there is nothing to gain, and a slow source's results come at once.
        stretches = [reading] if looks_ahead(feed.device) else ([window] for window in reading)
        with closing(_progress(total, show_progress_bar)) as bar:
            for stretch in stretches:
                with closing(self._batches(stretch, compute, feed)) as batches:
                    for window, group, rows, cut in _one_behind(batches):
                        for i, row in zip(group, rows, strict=True):
                            if row is None:
                                raise self._not_finite(window.texts[i], (window.first + i) // each)
                            window.results[i] = row
                        bar.update(len(group))
                        window.left -= len(group)
                        truncated += cut
                        if not window.left:
                            seen += len(window.texts)
                            yield window.results
        if truncated:
            warn(_were_cut(truncated, seen, feed))

    def rows(
        self,
        texts: Iterable[Any],
        compute: Callable[[PackedBatch], Any],
        show_progress_bar: bool | None,
        made: Callable[[list[Any]], Any] = list,
        *,
        block: Callable[[list[Any], int], list[Any]] | None = None,
        feeding: Iterable[Any] | None = None,
        **limits: Any,
    ) -> Any:
        """`made(results)` of all texts. If one fails, the error carries `made` of the results that were finished.

        block(results, first): changes the results of a window; `first` is the number of the first result. feeding: what
        is run in place of the texts, `each` items per text. limits: as in `run`.
        """
        rows: list[Any] = []
        total = length(texts)
        total = total and total * limits.get("each", 1)
        with keeping(lambda: made(rows), texts):
            for results in self.run(texts if feeding is None else feeding, compute, show_progress_bar, total, **limits):
                rows += results if block is None else block(results, len(rows))
        return made(rows)

    def _batches(
        self, stretch: Iterable[_Window], compute: Callable[[PackedBatch], Any], feed: _Feed
    ) -> Generator[tuple[_Window, list[int], Any, int]]:
        """Yields (a window, places of texts in it, their results, how many more were cut), long texts first."""

        def encode(job: tuple[_Window, list[int]]) -> tuple[list[tuple[list[int], list[int]]], int]:
            window, piece = job
            try:
                ids, types, cut = feed.encode([window.texts[i] for i in piece], 0, feed.max_length)
            except ValueError:
                self._refuse(window.texts, window.first, feed)
                raise
            if cut and self.on_long == "error":
                self._refuse(window.texts, window.first, feed)
            return list(zip(ids, types, strict=True)), cut

        jobs = ((window, piece) for window in stretch for piece in window.pieces)
        waiting: dict[int, tuple[list[int], list[int]]] = {}
        cut = 0
        ahead = _GPU_PIECES_AHEAD if looks_ahead(feed.device) else 1
        with closing(_ahead(encode, jobs, ahead)) as encoded:
            for (window, piece), (found, more) in encoded:
                waiting.update(zip(piece, found, strict=True))
                cut += more
                if more:  # where the warning is an error, it must come before the work: at the end it would lose it
                    warn(_were_cut(cut, window.first + len(window.texts), feed), only_as_error=True)
                places = list(waiting)
                groups = [
                    [places[i] for i in group]
                    for group in plan_batches([len(ids) for ids, _ in waiting.values()], feed.batch_tokens)
                ]
                if piece is not window.pieces[-1]:
                    groups.pop()  # texts of the next piece may fit into this batch
                for group in groups:
                    ids, types = zip(*(waiting.pop(i) for i in group), strict=True)
                    # The caller may have turned autocast on. The numbers are the model's own in any case.
                    with torch.inference_mode(), torch.autocast(feed.device.type, enabled=False):
                        rows = compute(pack(ids, feed.device, types if self.typed else None))
                        if isinstance(rows, Tensor):
                            rows = finite_rows(rows)
                    yield window, group, rows, cut
                    cut = 0

    def refuse_long(self, window: Sequence[Any], first: int) -> None:
        """Raises ValueError for the first text of a window that is too long. first: that window's first number."""
        self._refuse(window, first, _Feed(self.tokenizer.encode_typed, self.max_seq_length, 1, 1, self.device))

    def _refuse(self, window: Sequence[Any], first: int, feed: _Feed) -> None:
        """Raises the error of the first text in a window that has one."""
        for place, text in enumerate(window, first):
            i = place // feed.each
            if feed.encode([text], i, feed.max_length)[2] and self.on_long == "error":
                raise ValueError(
                    f"text {i} is longer than {feed.max_length} tokens, and on_long is 'error'; "
                    "shorten it, or let it be cut with on_long='truncate'"
                )

    def _not_finite(self, text: Text, i: int) -> ValueError:
        *_, last = self.network.parameters()  # the first one may be a table that is kept as it is stored
        dtype = str(last.dtype).removeprefix("torch.")
        advice = "the checkpoint's weights are damaged, or too large to compute with"
        if dtype == "float16":
            advice = f"its largest number is 65504: load the model with dtype='float32' or 'bfloat16'; or {advice}"
        elif dtype == "bfloat16":
            advice = f"load the model with dtype='float32'; or {advice}"
        text = text[0] if isinstance(text, FirstCut) else text
        return ValueError(f"the result of text {i}, {brief(text)}, is not finite in {dtype}; {advice}")


def finite_rows(rows: Tensor, values: Tensor | None = None) -> Iterator[Tensor | None]:
    """Starts a copy of the rows (B, ..) to the host, and yields them there. A row that isn't finite is None. With
    `values` (B, ..), those are looked at in place of the rows. The first row waits for the copy, not for later work."""
    return _finite(to_host(rows), None if values is None else to_host(values))


def sequences(x: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Starts a copy of x (T, ..) to the host, and yields the rows of each sequence there, as `finite_rows` does."""
    return _split(to_host(x), lengths)


def _split(x: Callable[[], Tensor], lengths: Sequence[int]) -> Iterator[Tensor]:
    yield from x().split(list(lengths))


def _finite(rows: Callable[[], Tensor], values: Callable[[], Tensor] | None) -> Iterator[Tensor | None]:
    host = rows()
    checked = host if values is None else values()
    if math.isfinite(checked.sum()):  # one pass; a sum may overflow where no number does
        yield from host
        return
    finite = checked.isfinite().reshape(len(checked), -1).all(1).tolist()
    yield from (row if fine else None for row, fine in zip(host, finite, strict=True))


def looks_ahead(device: torch.device) -> bool:
    return device.type == "cuda"


def _ahead(function: Callable[[Item], T], items: Iterable[Item], most: int) -> Generator[tuple[Item, T]]:
    """Yields each item and function(item). While the caller works on one, a thread makes the next, up to `most` of
    them. Closing ends the thread. Items are read here, `most` ahead. If that fails, what was read before comes first.

    It is a plain thread: a pool of threads takes no more work once the main thread has ended."""
    asked: SimpleQueue[Item | None] = SimpleQueue()
    made: SimpleQueue[tuple[Item, T] | BaseException] = SimpleQueue()
    stopped = threading.Event()

    def make(item: Item) -> None:
        try:
            made.put((item, function(item)))
        except BaseException as error:  # noqa: BLE001  it is raised where the result is taken
            made.put(error)

    def work() -> None:
        while (item := asked.get()) is not None and not stopped.is_set():
            make(item)

    def take() -> tuple[Item, T]:
        result = made.get()
        if isinstance(result, BaseException):
            raise result
        return result

    thread, waiting = threading.Thread(target=work, name="modernbert-lite: tokenizing"), 0
    failed: BaseException | None = None
    try:
        for item in _kept_errors(items):
            if isinstance(item, _Failed):
                failed = item.error
                break
            if waiting and thread.ident is None:  # a single item needs no thread
                with suppress(RuntimeError):  # none can be started: the interpreter ends, or the system has a limit
                    thread.start()
            (make if thread.ident is None else asked.put)(item)
            waiting += 1
            if waiting > most:
                yield take()
                waiting -= 1
        for _ in range(waiting):
            yield take()
        if failed:
            raise failed
    finally:
        stopped.set()
        if thread.ident is not None:
            asked.put(None)
            thread.join()


class _Failed(NamedTuple):
    error: BaseException


def _kept_errors(items: Iterable[Item]) -> Iterator[Item | _Failed]:
    """The items, and at their end the error that reading them raised. (GeneratorExit is none: it is the end.)"""
    try:
        yield from items
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  it is raised in its turn
        yield _Failed(error)


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Yields each item when the next one is made: a device works on a batch while the host prepares the next. If the
    next one fails, the item before it comes first."""
    kept: list[Item] = []
    for item in _kept_errors(items):
        if isinstance(item, _Failed):
            yield from kept
            raise item.error
        kept.append(item)
        if len(kept) > 1:
            yield kept.pop(0)
    yield from kept


def _were_cut(count: int, of: int, feed: _Feed) -> str:
    what = "texts" if feed.each == 1 else "pairs of a text and a label"
    return f"{count} of {of} {what} were longer than {feed.max_length} tokens and were cut"


def _characters(text: Any) -> int:
    """The characters of a text or a pair; the length of a sequence of ids."""
    return sum(map(len, text)) if isinstance(text, tuple) else len(text)


def _pieces(window: Sequence[Any]) -> list[list[int]]:
    """Places of texts, those with the most characters first, in lists of at least _PIECE_CHARACTERS (but the last)."""
    pieces: list[list[int]] = []
    room = 0
    for i in sorted(range(len(window)), key=lambda i: _characters(window[i]), reverse=True):
        if room <= 0:
            pieces.append([])
            room = _PIECE_CHARACTERS
        pieces[-1].append(i)
        room -= _characters(window[i])
    return pieces


def windows(texts: Iterable[T]) -> Iterator[list[T]]:
    """The texts in lists. The number of texts in a list is bounded, and so are the characters before its last text."""
    window: list[T] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += _characters(text)
        if len(window) == _WINDOW_TEXTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


@dataclass
class _Window:
    texts: list[Any]
    first: int  # its first text's number
    pieces: list[list[int]]  # places of texts that are tokenized together
    results: list[Any]
    left: int  # how many results are not there yet


def _windows(texts: Iterable[Any]) -> Iterator[_Window]:
    first = 0
    for window in windows(texts):
        yield _Window(window, first, _pieces(window), [None] * len(window), len(window))
        first += len(window)


class Lenient:
    """A stream for notes. A note that can't be written is lost, and the work goes on."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(Exception):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(Exception):
            self.stream.flush()


def _progress(total: int | None, show: bool | None) -> Any:
    """A bar on stderr, after a second of work. show None: only if stderr is a terminal."""
    try:
        shown = sys.stderr is not None and (sys.stderr.isatty() if show is None else show)
    except Exception:  # noqa: BLE001  closed, or no more than something to write to
        shown = False
    if not shown:  # without tqdm, whose bars have a lock and a thread, drawn or not
        return SimpleNamespace(update=lambda _: None, close=lambda: None)
    from tqdm import tqdm  # comes with huggingface-hub

    return tqdm(total=total, desc="texts", delay=1.0 if show is None else 0.0, file=Lenient(sys.stderr))
