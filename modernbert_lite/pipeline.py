"""What Embedder, Reranker and FillMask share: loading, and texts -> packed batches -> results in the caller's order."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .batch import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, PackedBatch, pack, plan_batches
from .config import Config, GteConfig, read_config
from .graphs import MAX_TOKENS, Graphed
from .heads import use
from .reading import CheckpointError, OptionError
from .st_config import SentenceConfig, length_limit, read_sentence_config
from .threads import bound_tokenizer, set_threads
from .tokenizer import Text, Tokenizer
from .weights import find_checkpoint, load_weights, network_folder, stores

ON_LONG = ("truncate", "error")
# A window of texts is read, sorted and embedded at a time: this bounds memory, whatever the input's length.
_WINDOW_TEXTS, _WINDOW_CHARACTERS = 4_096, 1 << 20
# Of a window, so many are tokenized while the ones before them are embedded.
_PIECE_CHARACTERS = 1 << 16
# What users of other libraries try.
_HINTS = {
    "trust_remote_code": "leave it out, no code of a repository is ever run",
    "torch_dtype": "it is dtype here",
    "model_kwargs": "dtype and device are options of their own here",
    "cache_folder": "set HF_HUB_CACHE, or give a folder",
    "max_length": "it is max_seq_length here",
    "document_length": "it is max_seq_length here",
    "batch_size": "batches are of so many tokens here: batch_tokens",
}
_STRONGER_MODEL = "Alibaba-NLP/gte-modernbert-base"

P = TypeVar("P", bound="Pipeline")
Item = TypeVar("Item")
Result = TypeVar("Result")


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
        return cls(folder, root, read_config(folder), sentence)

    @property
    def use(self) -> str:
        """The class that opens it for its user: "Embedder", "LateInteraction", "Reranker", "FillMask", "load_model"."""
        if self.sentence.late is not None:
            return "LateInteraction"
        if self.sentence.scores:
            return "Reranker"
        if self.sentence.sparse is not None:
            return "Embedder"
        return "Embedder" if self.sentence.pooling else use(self.config.architecture)

    @property
    def sparse(self) -> bool:
        """Whether the encoder's tokens have sparse weights: by the config, and by the file, which may lack them."""
        told = isinstance(self.config, GteConfig) and self.config.sparse
        return told and stores(self.folder, "classifier.weight")

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
                hint = f": {_HINTS[name]}" if name in _HINTS else ""
                raise TypeError(f"{cls.__name__}.from_pretrained has no option {name!r}{hint}")
        set_threads(threads)
        if path_or_id is None:
            if cls.default_model is None:
                raise TypeError(f"{cls.__name__}.from_pretrained needs a model: a folder or a hub id")
            path_or_id = cls.default_model
            print(
                f"modernbert-lite: using the bundled model {path_or_id!r} (English, 384 dimensions). A stronger one: "
                f"{_STRONGER_MODEL} (--model in the shell, the first argument in Python).",
                file=sys.stderr,
            )
        return cls(
            Checkpoint.find(path_or_id, revision=revision, token=token, local_files_only=local_files_only),
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
        if on_long not in ON_LONG:
            raise OptionError(f"on_long is {on_long!r}; it must be one of {', '.join(ON_LONG)}")
        if batch_tokens is not None and batch_tokens < 1:
            raise OptionError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        config = checkpoint.config
        longest = length_limit(checkpoint.sentence, checkpoint.folder, config.max_position_embeddings)
        self.config = config
        self.max_seq_length = longest if max_seq_length is None else max_seq_length
        self.on_long = on_long
        self.tokenizer = Tokenizer(checkpoint.folder, self.max_seq_length, checkpoint.sentence.lower_case)
        self.typed = self.tokenizer.has_types and isinstance(config, GteConfig) and config.type_vocab_size > 1
        self.model = load_weights(network, config, checkpoint.folder, device=device, dtype=dtype)
        on_cpu = self.device.type == "cpu"
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self.max_graph_tokens = MAX_TOKENS if cuda_graphs else 0
        if on_cpu:
            bound_tokenizer()

    @classmethod
    def check(cls, checkpoint: object) -> None:
        """Raises TypeError for a model's name in the constructor's place."""
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"to open a model use {cls.__name__}.from_pretrained({checkpoint!r:.60})")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.architecture}, {self.max_seq_length} tokens, {self.device})"

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
    ) -> Iterator[list[Any]]:
        """Lists of results in the order of the texts, one list a window; `forward` gives one result
        a sequence (a list of B, or a tensor on any device).

        Texts longer than max_seq_length are cut and counted in one warning at the end (on_long "truncate"), or are a
        ValueError ("error")."""
        seen = truncated = 0
        with closing(_progress(total, show_progress_bar)) as bar:
            for window in _windows(texts):
                results: list[Any] = [None] * len(window)
                with closing(self._batches(window, seen, forward)) as batches:
                    for group, rows, cut in _one_behind(batches):
                        for i, row in zip(group, rows.cpu() if isinstance(rows, Tensor) else rows, strict=True):
                            results[i] = row
                        bar.update(len(group))
                        truncated += cut
                seen += len(window)
                yield results
        if truncated:
            warn(f"{truncated} of {seen} texts were longer than {self.max_seq_length} tokens and were cut")

    def _batches(
        self, window: list[Text], first: int, forward: Callable[[PackedBatch], Any]
    ) -> Generator[tuple[list[int], Any, int]]:
        """(texts' places in the window, their results, how many more were cut), long texts first. `first`: the number
        of the window's first text."""

        def encode(piece: list[int]) -> tuple[list[tuple[list[int], list[int]]], int]:
            try:
                ids, types, cut = self.tokenizer.encode_typed([window[i] for i in piece])
            except ValueError:
                self._refuse(window, first)
                raise
            if cut and self.on_long == "error":
                self._refuse(window, first)
            return list(zip(ids, types, strict=True)), cut

        pieces = _pieces(window)
        waiting: dict[int, tuple[list[int], list[int]]] = {}
        cut = 0
        with closing(_one_ahead(encode, pieces)) as encoded:
            for piece, (sequences, more) in zip(pieces, encoded, strict=True):
                waiting.update(zip(piece, sequences, strict=True))
                cut += more
                places = list(waiting)
                groups = [
                    [places[i] for i in group]
                    for group in plan_batches([len(ids) for ids, _ in waiting.values()], self.batch_tokens)
                ]
                if piece is not pieces[-1]:
                    groups.pop()  # it may have room for some of the next piece
                for group in groups:
                    ids, types = zip(*(waiting.pop(i) for i in group), strict=True)
                    with torch.inference_mode():
                        rows = forward(pack(ids, self.device, types if self.typed else None))
                    yield group, rows, cut
                    cut = 0

    def _refuse(self, window: list[Text], first: int) -> None:
        """Raises the error of the first text of a window that has one."""
        for i, text in enumerate(window, first):
            if self.tokenizer.encode([text], i)[1] and self.on_long == "error":
                raise ValueError(
                    f"text {i} is longer than {self.max_seq_length} tokens, and on_long is 'error'; "
                    "shorten it, or let it be cut with on_long='truncate'"
                )


def _one_ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result]:
    """function(item) of each; while the caller works on one, a thread makes the next. Closed, it leaves no thread."""
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(function, items[0])
        for item in items[1:]:
            result, made = made.result(), thread.submit(function, item)
            yield result
        yield made.result()


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Each item when the next one is made: a device works on a batch while the host prepares the one after it."""
    kept: list[Item] = []
    for item in items:
        kept.append(item)
        if len(kept) > 1:
            yield kept.pop(0)
    yield from kept


def warn(message: str) -> None:
    """A UserWarning that points at the first caller outside this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def listed(texts: Any, name: str) -> tuple[Iterable[str], bool]:
    """What a user gave for texts, as an iterable, and whether it was one string. Raises TypeError for anything else,
    for a dict, whose keys would be taken, and for an item of a list that is no string: before any work, not after."""
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is {type(texts).__name__}; it must be a str or an iterable of str")
    if isinstance(texts, (list, tuple)):
        for i, text in enumerate(texts):
            check_text(text, i)
    return ([texts], True) if isinstance(texts, str) else (texts, False)


def check_text(text: object, i: int) -> str:
    """`text`, if it is a string. Raises TypeError saying which one is not, and what it is."""
    if not isinstance(text, str):
        raise TypeError(f"text {i} is {type(text).__name__} ({text!r:.60}); each text must be a str")
    return text


def length(items: object) -> int | None:
    """How many items there are, if that can be known without reading them."""
    return len(items) if isinstance(items, Sized) else None


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


def _windows(texts: Iterable[Text]) -> Iterator[list[Text]]:
    window: list[Text] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += _characters(text)
        if len(window) == _WINDOW_TEXTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _progress(total: int | None, show: bool | None) -> Any:
    """A bar on stderr, after a second of work; None: only where stderr is a terminal."""
    from tqdm import tqdm  # comes with huggingface-hub

    shown = sys.stderr.isatty() if show is None else show
    return tqdm(total=total, desc="texts", disable=not shown, delay=1.0 if show is None else 0.0, file=sys.stderr)
