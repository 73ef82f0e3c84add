"""Texts -> ids -> packed batches -> rows, in the caller's order and in bounded memory."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, pack, plan_batches
from ..reading import warn
from .inputs import brief, keeping, length
from .tokenizer import FirstCut, Text, Tokenizer

# Texts are read, sorted and embedded a window at a time. This bounds memory, however long the input is.
_WINDOW_TEXTS, _WINDOW_CHARACTERS = 4_096, 1 << 20
# A window is tokenized in pieces of this size. While the network computes one piece, the next is tokenized.
_PIECE_CHARACTERS = 1 << 16

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
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
        with closing(_progress(total, show_progress_bar)) as bar:
            for window in windows(texts):
                results: list[Any] = [None] * len(window)
                with closing(self._batches(window, seen, compute, feed)) as batches:
                    for group, rows, cut in _one_behind(batches):
                        for i, row in zip(group, on_host(rows) if isinstance(rows, Tensor) else rows, strict=True):
                            if row is None:
                                raise self._not_finite(window[i], (seen + i) // each)
                            results[i] = row
                        bar.update(len(group))
                        truncated += cut
                seen += len(window)
                yield results
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
        self,
        window: list[Text],
        first: int,
        compute: Callable[[PackedBatch], Any],
        feed: _Feed,
    ) -> Generator[tuple[list[int], Any, int]]:
        """Yields (the texts' places in the window, their results, how many more were cut), long texts first. first: the
        number of the window's first text."""

        def encode(piece: list[int]) -> tuple[list[tuple[list[int], list[int]]], int]:
            try:
                ids, types, cut = feed.encode([window[i] for i in piece], 0, feed.max_length)
            except ValueError:
                self._refuse(window, first, feed)
                raise
            if cut and self.on_long == "error":
                self._refuse(window, first, feed)
            return list(zip(ids, types, strict=True)), cut

        pieces = _pieces(window)
        waiting: dict[int, tuple[list[int], list[int]]] = {}
        cut = 0
        with closing(_one_ahead(encode, pieces)) as encoded:
            for piece, (sequences, more) in zip(pieces, encoded, strict=True):
                waiting.update(zip(piece, sequences, strict=True))
                cut += more
                if more:  # where the warning is an error, it must come before the work: at the end it would lose it
                    warn(_were_cut(cut, first + len(window), feed), only_as_error=True)
                places = list(waiting)
                groups = [
                    [places[i] for i in group]
                    for group in plan_batches([len(ids) for ids, _ in waiting.values()], feed.batch_tokens)
                ]
                if piece is not pieces[-1]:
                    groups.pop()  # it may have room for some of the next piece
                for group in groups:
                    ids, types = zip(*(waiting.pop(i) for i in group), strict=True)
                    # The caller may have turned autocast on. The numbers are the model's own in any case.
                    with torch.inference_mode(), torch.autocast(feed.device.type, enabled=False):
                        rows = compute(pack(ids, feed.device, types if self.typed else None))
                    yield group, rows, cut
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


def on_host(rows: Tensor, values: Tensor | None = None) -> Iterator[Tensor | None]:
    """Rows (B, ..) as tensors on the host. A row is None if it, or its row of `values` (B, ..), is not finite. The
    first row waits for the device."""
    host = rows.cpu()
    checked = host if values is None else values.cpu()
    if math.isfinite(checked.sum()):  # one pass; a sum may overflow where no number does
        yield from host
        return
    finite = checked.isfinite().reshape(len(checked), -1).all(1).tolist()
    yield from (row if fine else None for row, fine in zip(host, finite, strict=True))


def _one_ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result]:
    """Yields function(item) of each item. While the caller works on one, a thread makes the next. Closing ends the
    thread.

    It is a plain thread: a pool of threads takes no more work once the main thread has ended.
    """
    wanted, stopped = threading.Semaphore(), threading.Event()
    made: SimpleQueue[Result | BaseException] = SimpleQueue()

    def work() -> None:
        for item in items:
            wanted.acquire()
            if stopped.is_set():
                return
            try:
                made.put(function(item))
            except BaseException as error:  # noqa: BLE001  it is raised where the result is taken
                made.put(error)

    thread = threading.Thread(target=work, name="modernbert-lite: tokenizing")
    try:
        if len(items) > 1:
            thread.start()
    except RuntimeError:  # no thread can be started: the interpreter ends, or the system has a limit
        pass
    if thread.ident is None:
        yield from map(function, items)
        return
    try:
        for _ in items:
            result = made.get()
            wanted.release()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        wanted.release()
        thread.join()


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Yields each item when the next one is made: a device works on a batch while the host prepares the next."""
    kept: list[Item] = []
    for item in items:
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
