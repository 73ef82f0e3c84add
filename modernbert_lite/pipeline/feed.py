"""Texts -> ids -> packed batches -> rows, in the caller's order and in bounded memory."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, pack, plan_batches
from ..reading import warn
from .inputs import brief, keeping, length
from .tokenizer import FirstCut, Text, Tokenizer

# A window of texts is read, sorted and embedded at a time: this bounds memory, whatever the input's length.
_WINDOW_TEXTS, _WINDOW_CHARACTERS = 4_096, 1 << 20
# A window is tokenized in pieces of this size: one piece while the network computes the piece before it.
_PIECE_CHARACTERS = 1 << 16

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
Ids = list[list[int]]
# Items, the number of the first one, the most tokens of one -> ids, token types, how many items were cut.
Encode = Callable[[Sequence[Any], int, int], tuple[Ids, Ids, int]]


class _Feed(NamedTuple):
    """What one run does otherwise than another."""

    encode: Encode
    max_length: int
    batch_tokens: int
    each: int
    device: torch.device


class Feeder:
    """Feeds a network. `typed`: whether it takes token types."""

    network: nn.Module
    tokenizer: Tokenizer
    typed: bool
    on_long: str
    max_seq_length: int
    batch_tokens: int

    @property
    def device(self) -> torch.device:
        """Where the network is."""
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
        """Lists of results in the order of the texts, one list a window; `compute` gives one result
        a sequence: a tensor of B rows on any device, or B of anything, None for one that is not finite. encode,
        max_length, batch_tokens, device: instead of the tokenizer's and the model's own. each: how many neighbours come
        of one of the user's texts. Messages number the user's text.

        Texts longer than max_length are cut and counted in one warning at the end, or before the first one is
        computed where warnings are errors (on_long "truncate"), or are a ValueError ("error"). Raises ValueError for a
        result that is not finite, naming the text.
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
        """`made(results)` of all texts. If one fails, the error carries `made` of the finished ones.

        block(results, first): what becomes of the results of a window, whose first one has that number. feeding: what
        is run in place of the texts, `each` of it for one of them. limits: as in `run`."""
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
        """(texts' places in the window, their results, how many more were cut), long texts first. `first`: the number
        of the window's first text."""

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
                if more:  # at the end of the work a warning that is an error would take it all along
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
                    # Around this call there may be an autocast: the numbers are the model's own, whatever it says.
                    with torch.inference_mode(), torch.autocast(feed.device.type, enabled=False):
                        rows = compute(pack(ids, feed.device, types if self.typed else None))
                    yield group, rows, cut
                    cut = 0

    def refuse_long(self, window: Sequence[Any], first: int) -> None:
        """Raises ValueError for the first text of a window that is too long; the window starts with text `first`."""
        self._refuse(window, first, _Feed(self.tokenizer.encode_typed, self.max_seq_length, 1, 1, self.device))

    def _refuse(self, window: Sequence[Any], first: int, feed: _Feed) -> None:
        """Raises the error of the first text of a window that has one."""
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
    """Rows (B, ..) as tensors on the host. A row is None if the row, or its `values`, is not finite. values: (B, ..).
    Waits for the device when it is read."""
    host = rows.cpu()
    checked = host if values is None else values.cpu()
    if math.isfinite(checked.sum()):  # one pass; a sum may overflow where no number does
        yield from host
        return
    finite = checked.isfinite().reshape(len(checked), -1).all(1).tolist()
    yield from (row if fine else None for row, fine in zip(host, finite, strict=True))


def _one_ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result]:
    """function(item) of each; while the caller works on one, a thread makes the next. Closed, it leaves no thread.

    A plain thread: a pool takes no more work once the main thread has ended, though other threads go on."""
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
    except RuntimeError:  # none can be started: at the interpreter's end, or at a limit of the system
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
    """Each item when the next one is made: a device works on a batch while the host prepares the one after it."""
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
    """Of a text or pair; of a sequence of ids, how many there are."""
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
    """The texts in lists, each of a bounded number of texts and, but for its last text, of characters."""
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
    """A stream for notes: what it can't write is lost, and nothing else is."""

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


class _NoBar:
    def update(self, _: int) -> None: ...

    def close(self) -> None: ...


def _progress(total: int | None, show: bool | None) -> Any:
    """A bar on stderr, after a second of work; None: only where stderr is a terminal."""
    try:
        shown = sys.stderr is not None and (sys.stderr.isatty() if show is None else show)
    except Exception:  # noqa: BLE001  closed, or no more than something to write to
        shown = False
    if not shown:  # without tqdm, whose bars have a lock and a thread, drawn or not
        return _NoBar()
    from tqdm import tqdm  # comes with huggingface-hub

    return tqdm(total=total, desc="texts", delay=1.0 if show is None else 0.0, file=Lenient(sys.stderr))
