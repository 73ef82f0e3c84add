"""What all classes share: loading, and texts -> packed batches -> results in the caller's order."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..batch import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, PackedBatch, pack, plan_batches
from ..checkpoint.sentence import SentenceConfig, length_limit, read_sentence_config
from ..checkpoint.weights import find_checkpoint, load_weights, network_folder, stores
from ..models.fields import Config
from ..models.registry import read_config, use
from ..ops.graphs import MAX_TOKENS, Graphed
from ..ops.threads import bound_tokenizer, set_threads
from ..reading import CheckpointError, OptionError, as_whole, shown, warn, whole_number
from .inputs import brief, keeping, length
from .tokenizer import FirstCut, Text, Tokenizer

ON_LONG = ("truncate", "error")
# A window of texts is read, sorted and embedded at a time: this bounds memory, whatever the input's length.
_WINDOW_TEXTS, _WINDOW_CHARACTERS = 4_096, 1 << 20
# A window is tokenized in pieces of this size: one piece while the network computes the piece before it.
_PIECE_CHARACTERS = 1 << 16
# What users of other libraries try.
_HINTS = {
    "trust_remote_code": "leave it out, no code of a repository is ever run",
    "torch_dtype": "it is dtype here",
    "model_kwargs": "dtype and device are options of their own here",
    "cache_folder": "set HF_HUB_CACHE, or give a folder",
    "max_length": "it is max_seq_length here",
    "document_length": "it is max_seq_length here",
    "batch_size": "batch size is counted in tokens here: batch_tokens",
}
# The same for what is called after loading.
_CALL_HINTS = {
    "batch_size": "batch size is counted in tokens here: batch_tokens, of from_pretrained or of the model",
    "convert_to_tensor": "results are numpy arrays here: torch.from_numpy makes a tensor of one",
    "convert_to_numpy": "leave it out, results are numpy arrays here",
    "device": "it is an option of from_pretrained here",
    "max_length": "set max_seq_length, of from_pretrained or of the model",
    "max_seq_length": "set it on the model, or give it to from_pretrained",
    "truncation": "texts over max_seq_length are cut; on_long='error' of from_pretrained refuses them",
    "padding": "leave it out, nothing is padded here",
    "normalize": "it is normalize_embeddings here",
    "dimensions": "it is truncate_dim here",
    "activation_fct": "it is activation_fn here",
    "instruction": "it is prompt here",
    "is_query": "queries and documents have methods of their own here: encode_queries, encode_documents",
    **dict.fromkeys(
        ("pool", "chunk_size", "num_workers"), "one process computes here; open the model in each of several"
    ),
}
_STRONGER_MODEL = "Alibaba-NLP/gte-modernbert-base"

P = TypeVar("P", bound="Pipeline")
T = TypeVar("T", bound=Text)
Item = TypeVar("Item")
Result = TypeVar("Result")
Args = ParamSpec("Args")


def keyworded(method: Callable[Args, Result]) -> Callable[Args, Result]:
    """The method, which answers a keyword of another library with what it is here. Raises TypeError for it."""
    known = inspect.signature(method).parameters

    @functools.wraps(method)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        for name in kwargs:
            if name not in known:
                raise _unknown(method.__qualname__, name, _CALL_HINTS)
        return method(*args, **kwargs)

    return call


def _unknown(where: str, name: str, hints: dict[str, str]) -> TypeError:
    return TypeError(f"{where} has no option {shown(name)}" + (f": {hints[name]}" if name in hints else ""))


@dataclass(frozen=True)
class Checkpoint:
    """A folder, opened as far as config files go."""

    folder: Path  # of the network's files
    root: Path  # of modules.json: the same, except in old repositories that have 0_Transformer/
    config: Config
    sentence: SentenceConfig

    @classmethod
    def find(cls, name: Any, **hub: Any) -> Checkpoint:
        """hub: revision, token, local_files_only."""
        root = find_checkpoint(name, **hub)
        sentence = read_sentence_config(root)
        folder = network_folder(root)
        return cls(folder, root, read_config(folder, sentence.settings.config), sentence)

    @property
    def use(self) -> str:
        """The class that opens it for its user: "Embedder", "FillMask", "LateInteraction", "TokenClassifier",
        "Reranker", "load_model"; for a sequence classifier "Reranker or Classifier", the likelier one first: Reranker
        for one label, and where sentence-transformers' CrossEncoder wrote the files."""
        if self.sentence.late is not None:
            return "LateInteraction"
        if self.sentence.scores:
            return "Reranker"
        if self.sentence.sparse is not None:
            return "Embedder"
        if self.sentence.pooling:
            return "Embedder"
        name = use(self.config.architecture)
        if name == "TokenClassifier" and self.sparse:
            return "Embedder"
        if name != "Classifier":
            return name
        scores = len(self.config.labels) == 1 or self.sentence.activation_fn or self.config.activation_fn
        return "Reranker or Classifier" if scores else "Classifier or Reranker"

    def architecture(self, end: str) -> str:
        """The network's class. Where config.json names none, the one with this end, which what opens it needs, if the
        file has the tensors of such a head, else the encoder."""
        name = self.config.architecture
        if self.config.names_architecture:
            return name
        classifier = stores(self.folder, "classifier.weight")
        masked = not classifier and any(stores(self.folder, f"{head}.dense.weight") for head in ("head", "lm_head"))
        return name.removesuffix("Model") + end if (masked if end == "ForMaskedLM" else classifier) else name

    @property
    def sparse(self) -> bool:
        """Whether the encoder's tokens have sparse weights: by the config, and by the file, which may lack them."""
        return self.config.sparse and stores(self.folder, "classifier.weight")

    def refuse(self, wanted: str) -> CheckpointError:
        """The error that it is no `wanted`."""
        return CheckpointError(f"{self.root} holds a {self.config.architecture}, no {wanted}: use {self.use} for it")


class Pipeline:
    """A network, its tokenizer, and how they are fed."""

    default_model: ClassVar[str | None] = None
    own_options: ClassVar[tuple[str, ...]] = ()  # of from_pretrained, beside those that all classes have

    @classmethod
    def from_pretrained(
        cls: type[P],
        path_or_id: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        max_seq_length: int | None = None,
        batch_tokens: int | None = None,
        threads: int | None = None,
        on_long: str = "truncate",
        cuda_graphs: bool = True,
        **own: Any,
    ) -> P:
        """path_or_id: a folder, a hub id, or "tiny", the bundled embedding model. device, dtype, revision, token,
        local_files_only: as in `load_model`; dtype may also be "int8", on the CPU. max_seq_length: tokens, instead of
        the repository's limit. batch_tokens: the most tokens in a batch; None: by the device. threads: that compute on
        the CPU, for all of this process (torch has one such number); None: MODERNBERT_LITE_THREADS, else torch's own,
        but no more than the process or its container may use. on_long: "truncate" or "error" for texts over
        max_seq_length. cuda_graphs: on CUDA, replay small batches from captured graphs (also off by
        MODERNBERT_LITE_CUDA_GRAPHS=0).

        Raises CheckpointError for a checkpoint that is missing, damaged, unsupported, or another class's: it names it;
        OptionError for more threads than there are processors.
        """
        for name in own:
            if name not in cls.own_options:
                raise _unknown(f"{cls.__name__}.from_pretrained", name, _HINTS)
        set_threads(threads)
        if path_or_id is None:
            if cls.default_model is None:
                raise TypeError(f"{cls.__name__}.from_pretrained needs a model: a folder or a hub id")
            path_or_id = cls.default_model
            note = (
                f"modernbert-lite: using the bundled model {path_or_id!r} (English, 384 dimensions). A stronger one: "
                f"{_STRONGER_MODEL} (--model in the shell, the first argument in Python)."
            )
            if sys.stderr is not None:  # which print would take for standard output
                print(note, file=_Lenient(sys.stderr))
        checkpoint = Checkpoint.find(path_or_id, revision=revision, token=token, local_files_only=local_files_only)
        with torch.autocast("cpu", enabled=False):  # around this call there may be one
            return cls(
                checkpoint,
                device=device,
                dtype=dtype,
                max_seq_length=max_seq_length,
                batch_tokens=batch_tokens,
                on_long=on_long,
                cuda_graphs=cuda_graphs,
                **own,
            )

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: type[nn.Module],
        *,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        max_seq_length: int | None,
        batch_tokens: int | None,
        on_long: str,
        cuda_graphs: bool,
    ):
        self.on_long = on_long
        self.batch_tokens = CPU_BATCH_TOKENS if batch_tokens is None else batch_tokens
        config = checkpoint.config
        longest = length_limit(checkpoint.sentence, checkpoint.folder, config.max_position_embeddings)
        self.config = config
        longest = longest if max_seq_length is None else self._within_positions(max_seq_length)
        own = checkpoint.sentence.settings
        self.tokenizer = Tokenizer(checkpoint.folder, longest, own.lower_case, settings=own.tokenizer)
        self.typed = self.tokenizer.has_types and config.type_vocab_size > 1
        self.model = load_weights(network, config, checkpoint.folder, device=device, dtype=dtype)
        on_cpu = self.device.type == "cpu"
        if batch_tokens is None and not on_cpu:
            self.batch_tokens = GPU_BATCH_TOKENS
        self.max_graph_tokens = MAX_TOKENS if cuda_graphs else 0
        if on_cpu:
            bound_tokenizer()

    @classmethod
    def check(cls, checkpoint: object) -> None:
        """Raises TypeError for a model's name in the constructor's place."""
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"to open a model use {cls.__name__}.from_pretrained({shown(checkpoint, 60)})")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.architecture}, {self.max_seq_length} tokens, {self.device})"

    @property
    def max_seq_length(self) -> int:
        """The most tokens of a text, special ones included. It may be set; OptionError for what it can't be."""
        return self.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.max_length = self._within_positions(value)

    def _within_positions(self, value: int) -> int:
        """`value`, a max_seq_length. Raises OptionError for one over the length of a table of positions; what is no
        whole number is left for the tokenizer to refuse."""
        most, tokens = self.config.max_positions, as_whole(value)
        if most is not None and tokens is not None and tokens > most:
            raise OptionError(
                f"max_seq_length is {shown(tokens)}; it must be no more than {most}, what the model has positions for"
            )
        return value

    @property
    def batch_tokens(self) -> int:
        """The most tokens of a batch. It may be set, as max_seq_length."""
        return self._batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, value: int) -> None:
        self._batch_tokens = whole_number("batch_tokens", value)

    @property
    def on_long(self) -> str:
        """What becomes of texts over max_seq_length, "truncate" or "error". It may be set, as max_seq_length."""
        return self._on_long

    @on_long.setter
    def on_long(self, value: str) -> None:
        if value not in ON_LONG:
            raise OptionError(f"on_long is {shown(value)}; it must be one of {', '.join(ON_LONG)}")
        self._on_long = value

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def graphed(self, network: Any, forward: Callable[..., Tensor] | None = None) -> Graphed:
        """The network, or a function of it, to be called on batches: by CUDA graphs where they pay."""
        return Graphed(network, forward, max_tokens=self.max_graph_tokens)

    def run(
        self,
        texts: Iterable[Text],
        forward: Callable[[PackedBatch], Any],
        show_progress_bar: bool | None,
        total: int | None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        each: int = 1,
    ) -> Iterator[list[Any]]:
        """Lists of results in the order of the texts, one list a window; `forward` gives one result
        a sequence: a tensor of B rows on any device, or B of anything, None for one that is not finite. max_length,
        batch_tokens: instead of the model's max_seq_length and batch_tokens. each: how many neighbours come of one of
        the user's texts. Messages number the user's text.

        Texts longer than max_length are cut and counted in one warning at the end, or before the first one is
        computed where warnings are errors (on_long "truncate"), or are a ValueError ("error"). Raises ValueError for a
        result that is not finite, naming the text.
        """
        limits = (max_length or self.max_seq_length, batch_tokens or self.batch_tokens)
        seen = truncated = 0
        with closing(_progress(total, show_progress_bar)) as bar:
            for window in windows(texts):
                results: list[Any] = [None] * len(window)
                with closing(self._batches(window, seen, forward, *limits, each)) as batches:
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
            warn(_were_cut(truncated, seen, limits[0], each))

    def rows(
        self,
        texts: Iterable[Text],
        forward: Callable[[PackedBatch], Any],
        show_progress_bar: bool | None,
        made: Callable[[list[Any]], Any] = list,
        **limits: Any,
    ) -> Any:
        """`made(results)` of all texts. If one fails, the error carries `made` of the finished ones."""
        rows: list[Any] = []
        with keeping(lambda: made(rows), texts):
            for block in self.run(texts, forward, show_progress_bar, length(texts), **limits):
                rows += block
        return made(rows)

    def _batches(
        self,
        window: list[Text],
        first: int,
        forward: Callable[[PackedBatch], Any],
        max_length: int,
        batch_tokens: int,
        each: int,
    ) -> Generator[tuple[list[int], Any, int]]:
        """(texts' places in the window, their results, how many more were cut), long texts first. `first`: the number
        of the window's first text. each: as in `run`."""

        def encode(piece: list[int]) -> tuple[list[tuple[list[int], list[int]]], int]:
            try:
                ids, types, cut = self.tokenizer.encode_typed([window[i] for i in piece], 0, max_length)
            except ValueError:
                self._refuse(window, first, max_length, each)
                raise
            if cut and self.on_long == "error":
                self._refuse(window, first, max_length, each)
            return list(zip(ids, types, strict=True)), cut

        pieces = _pieces(window)
        waiting: dict[int, tuple[list[int], list[int]]] = {}
        cut = 0
        with closing(_one_ahead(encode, pieces)) as encoded:
            for piece, (sequences, more) in zip(pieces, encoded, strict=True):
                waiting.update(zip(piece, sequences, strict=True))
                cut += more
                if more:  # at the end of the work a warning that is an error would take it all along
                    warn(_were_cut(cut, first + len(window), max_length, each), only_as_error=True)
                places = list(waiting)
                groups = [
                    [places[i] for i in group]
                    for group in plan_batches([len(ids) for ids, _ in waiting.values()], batch_tokens)
                ]
                if piece is not pieces[-1]:
                    groups.pop()  # it may have room for some of the next piece
                for group in groups:
                    ids, types = zip(*(waiting.pop(i) for i in group), strict=True)
                    # Around this call there may be an autocast: the numbers are the model's own, whatever it says.
                    with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                        rows = forward(pack(ids, self.device, types if self.typed else None))
                    yield group, rows, cut
                    cut = 0

    def _refuse(self, window: list[Text], first: int, max_length: int, each: int) -> None:
        """Raises the error of the first text of a window that has one."""
        for place, text in enumerate(window, first):
            i = place // each
            if self.tokenizer.encode([text], i, max_length)[1] and self.on_long == "error":
                raise ValueError(
                    f"text {i} is longer than {max_length} tokens, and on_long is 'error'; "
                    "shorten it, or let it be cut with on_long='truncate'"
                )

    def _not_finite(self, text: Text, i: int) -> ValueError:
        *_, last = self.model.parameters()  # the first one may be a table that is kept as it is stored
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


def _were_cut(count: int, of: int, max_length: int, each: int) -> str:
    what = "texts" if each == 1 else "pairs of a text and a label"
    return f"{count} of {of} {what} were longer than {max_length} tokens and were cut"


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _pieces(window: list[Text]) -> list[list[int]]:
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


class _Lenient:
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

    return tqdm(total=total, desc="texts", delay=1.0 if show is None else 0.0, file=_Lenient(sys.stderr))
