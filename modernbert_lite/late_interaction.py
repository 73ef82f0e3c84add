"""Texts to a vector per token; the score of two texts is the best match of each token of the query, added up: late
interaction (ColBERT, arXiv 2004.12832), as PyLate's and sentence-transformers' files say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from .batch import PackedBatch, pack, to_host
from .checkpoint.dense import finish, on_vectors
from .checkpoint.open import Checkpoint
from .checkpoint.sentence import LATE_SIMILARITIES, USUAL_PROMPTS, similarity_name
from .models.registry import encoder_class
from .pipeline.base import Pipeline
from .pipeline.inputs import check_text, listed
from .pipeline.keywords import keyworded
from .pipeline.prompts import Prompted
from .pipeline.vectors import floats
from .reading import CheckpointError, OptionError, whole_number

P = TypeVar("P", bound="LateInteraction")

# How many tokens of documents, and how many dot products, maxsim holds at a time (more if a single pair needs more).
_DOCUMENT_TOKENS, _PRODUCTS = 1 << 13, 1 << 23


def maxsim(queries: Sequence[Any] | np.ndarray, documents: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Scores (Q, D), float32. For every token of a query, the largest dot product with a token of the document; these
    are added up. queries, documents: lists of (tokens, dimension) as from encode_queries and encode_documents, or one.

    Memory is bounded, whatever their number. Raises ValueError, naming it, for one without tokens or of another width.
    """
    asked, answering = _checked(queries, "query"), _checked(documents, "document")
    widths, others = ({array.shape[1] for array in arrays} for arrays in (asked, answering))
    if len(widths | others) > 1:
        raise ValueError(
            f"queries have {sorted(widths)} dimensions, documents {sorted(others)}; all must have the same, one model's"
        )
    scores = np.empty((len(asked), len(answering)), np.float32)
    for columns, tokens, starts in _joined(answering, _DOCUMENT_TOKENS):
        for rows, asking, offsets in _joined(asked, _PRODUCTS // len(tokens)):
            best = np.maximum.reduceat(tokens @ asking.T, starts)  # (documents, tokens of queries)
            scores[rows, columns] = np.add.reduceat(best, offsets, axis=1).T
    return scores


def _checked(vectors: Any, name: str) -> list[np.ndarray]:
    arrays = [floats(x, name) for x in ([vectors] if getattr(vectors, "ndim", 0) == 2 else vectors)]
    for i, array in enumerate(arrays):
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                f"{name} {i} has shape {array.shape}; it must be (tokens, dimension), at least one of each"
            )
    return arrays


def _joined(arrays: list[np.ndarray], most: int) -> Iterator[tuple[slice, np.ndarray, list[int]]]:
    """Yields neighbours that together have up to `most` rows (or a single one that has more): which they are, their
    rows, and where each one starts."""
    first, starts, rows = 0, [0], 0
    for i, array in enumerate(arrays):
        if rows and rows + len(array) > most:
            yield slice(first, i), np.concatenate(arrays[first:i]), starts[:-1]
            first, starts, rows = i, [0], 0
        rows += len(array)
        starts.append(rows)
    if arrays:
        yield slice(first, len(arrays)), np.concatenate(arrays[first:]), starts[:-1]


class LateInteraction(Prompted, Pipeline):
    """A late-interaction model. `query_length`, and `max_seq_length`, which is the length of documents here, are the
    repository's own or given to `from_pretrained`. `prompts` has the beginnings of "query" and "document" texts.
    `dimension` is the width of the vectors. Short queries are padded to `padded_length` tokens (0: never)."""

    usual_prompts = USUAL_PROMPTS

    @classmethod
    @keyworded
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
        query_length: int | None = None,
    ) -> P:
        """As in every class. query_length: the most tokens of a query, instead of the repository's."""
        return cls._open(locals())

    opens = "late-interaction model"

    def __init__(self, checkpoint: Checkpoint, *, query_length: int | None = None, **options: Any):
        self.check(checkpoint)
        sentence, config, late = checkpoint.sentence, checkpoint.config, checkpoint.sentence.late
        if late is None:
            raise checkpoint.refuse(self.opens)
        if options.get("max_seq_length") is None:
            options["max_seq_length"] = late.document_length
        super().__init__(checkpoint, encoder_class(config), **options)
        self.prompts = {"query": "", "document": "", **(sentence.prompts or {})}
        self.similarity_fn_name = sentence.similarity_fn_name
        self.normalizes = sentence.normalize
        self.forward = self.graphed(self.network)
        width = config.hidden_size
        self.dense = on_vectors(checkpoint.files, sentence.dense, width, self.device)
        self.dimension = self.dense[-1].out_features if self.dense else width
        for prefix in late.prefixes:
            self.tokenizer.keep_whole(prefix)
        found = [self.tokenizer.id_of(word) for word in late.skiplist_words]
        self.skip_ids = {task: [i for i in found if i is not None] for task in late.skiplist_tasks}

        usual = checkpoint.max_length
        self._late, self._longest, self.pads_left = late, max(usual, config.max_position_embeddings), False
        try:
            self.query_length = (late.query_length or usual) if query_length is None else query_length
        except OptionError as error:
            raise (CheckpointError if query_length is None else OptionError)(str(error)) from None
        self.attends = late.attends
        if self.padded_length:
            self.padding_id = self._find_padding(late.padding_token, checkpoint.folder)

    @property
    def query_length(self) -> int:
        """The most tokens of a query, special tokens included. May be set; OptionError for an impossible value."""
        return self._query_length

    @query_length.setter
    def query_length(self, value: int) -> None:
        value = whole_number("query_length", value)
        # Where queries are cut to the length that they are padded to, one number stands for both.
        padded = value if self._late.padded_length == self._late.query_length else self._late.padded_length
        bare = len(self.tokenizer.encode([""])[0][0])
        if value <= bare or max(value, padded) > self._longest:
            raise OptionError(
                f"query_length is {value}, the expansion's length {padded}; they must be over "
                f"{bare}, the special tokens, and no more than {self._longest}, what the model has positions for"
            )
        if self.pads_left:
            self._check_left(padded, "query_length")
        self._query_length, self.padded_length = value, padded

    @overload
    def encode_queries(self, texts: str, *, show_progress_bar: bool | None = ...) -> np.ndarray: ...  # type: ignore[overload-overlap]
    @overload
    def encode_queries(self, texts: Iterable[str], *, show_progress_bar: bool | None = ...) -> list[np.ndarray]: ...
    @keyworded
    def encode_queries(
        self, texts: str | Iterable[str], *, show_progress_bar: bool | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """A list of float32 arrays (tokens, dimension), one per text in their order; for one string, one array.

        Longer queries are cut to `query_length` tokens. The tokens that pad a shorter query have vectors, too, and
        count in `maxsim`. Raises TypeError for an item that is no string, ValueError for one that is no valid Unicode.
        """
        batch_tokens = self.batch_tokens
        if self.padded_length:  # batches are planned before it, and no query is shorter than the prompt alone
            shortest = len(self.tokenizer.encode([self._resolve_prompt("query", None)], 0, self.query_length)[0][0])
            batch_tokens = max(1, batch_tokens * shortest // max(shortest, self.padded_length))
        limits: dict[str, Any] = {"max_length": self.query_length, "batch_tokens": batch_tokens}
        return self._encode("query", texts, show_progress_bar, **limits)

    @overload
    def encode_documents(self, texts: str, *, show_progress_bar: bool | None = ...) -> np.ndarray: ...  # type: ignore[overload-overlap]
    @overload
    def encode_documents(self, texts: Iterable[str], *, show_progress_bar: bool | None = ...) -> list[np.ndarray]: ...
    @keyworded
    def encode_documents(
        self, texts: str | Iterable[str], *, show_progress_bar: bool | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """As encode_queries, but cut to `max_seq_length` tokens. Tokens of the repository's skip list (mostly
        punctuation) have no vector."""
        return self._encode("document", texts, show_progress_bar)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: "maxsim" or "meanmaxsim". It may also be set to a member of
        sentence-transformers' enumeration. Raises OptionError for other values."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: Any) -> None:
        self._similarity_fn_name = similarity_name(value, LATE_SIMILARITIES)

    encode_query, encode_document = encode_queries, encode_documents  # sentence-transformers' names
    maxsim = staticmethod(maxsim)

    def similarity(self, queries: Sequence[Any] | np.ndarray, documents: Sequence[Any] | np.ndarray) -> np.ndarray:
        """`maxsim`, (Q, D). With the similarity_fn_name "meanmaxsim", over the number of the query's tokens."""
        asked = _checked(queries, "query")
        scores = maxsim(asked, documents)
        if self.similarity_fn_name == "meanmaxsim":
            scores /= np.array([len(query) for query in asked], np.float32)[:, None]
        return scores

    def _encode(self, task: str, texts: str | Iterable[str], show_progress_bar: bool | None, **limits: Any) -> Any:
        prompt = self._resolve_prompt(task, None)
        given, single = listed(texts, "texts", lambda text, i: prompt + check_text(text, i))
        pads = task == "query" and self.padded_length > 0

        def compute(batch: PackedBatch) -> Iterator[np.ndarray | None]:
            batch = self._pad(batch.on_host).to(self.device) if pads else batch
            x = finish(self.forward(batch).float(), self.dense, self.normalizes, None)
            skip = self.skip_ids.get(task, [])
            return _split(to_host(x), batch.on_host, skip, in_order=not (pads and self.pads_left))

        results = self.rows(given, compute, show_progress_bar, **limits)
        return results[0] if single else results

    def _pad(self, batch: PackedBatch) -> PackedBatch:
        """Pads short queries to `padded_length`. Unless `attends`, no token sees the padding. Padding on the left has
        the first positions, but stands at the end of the sequence: hidden keys must be the last ones."""
        lengths = tuple(max(n, self.padded_length) for n in batch.seqlens)
        padded = pack([[self.padding_id] * n for n in lengths])
        starts = padded.cu_seqlens[:-1].repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.input_ids))
        position_ids = padded.position_ids
        if self.pads_left:
            length, real = (x.cu_seqlens.diff().repeat_interleave(padded.cu_seqlens.diff()) for x in (padded, batch))
            position_ids = (position_ids + length - real) % length
        return replace(
            padded,
            position_ids=position_ids,
            input_ids=padded.input_ids.index_copy(0, starts + batch.position_ids, batch.input_ids),
            max_id=max(batch.max_id, padded.max_id),
            key_seqlens=None if self.attends or lengths == batch.seqlens else batch.seqlens,
        )

    def _find_padding(self, token: str | None, folder: Path) -> int:
        # As sentence-transformers: the mask token that the files name, else the last token.
        names = self.tokenizer.names
        padding = token or names.get("mask_token") or names.get("eos_token") or self.tokenizer.mask_token
        found = None if padding is None else self.tokenizer.id_of(padding)
        if found is None:
            raise CheckpointError(f"{folder}: queries are padded with {token or 'the mask token'}, which is not known")
        path = folder / "tokenizer_config.json"
        self.pads_left = self.tokenizer.padding_side == "left"
        if self.pads_left:
            try:
                self._check_left(self.padded_length, str(path))
            except OptionError as error:
                raise CheckpointError(str(error)) from None
        return found

    def _check_left(self, padded: int, source: str) -> None:
        window = getattr(self.config, "local_attention", 2 * padded) // 2
        if padded > window + 1:
            raise OptionError(
                f"{source}: padding_side is 'left', and queries are padded to {padded} tokens; that is "
                f"supported up to {window + 1}, which all layers see from end to end"
            )


def _split(x: Callable[[], Tensor], batch: PackedBatch, skip: list[int], in_order: bool) -> Iterator[np.ndarray | None]:
    """(T, dimension) -> an array per sequence, by position, without the tokens `skip`. None for a sequence that is not
    finite. batch: on the host."""
    vectors, ids, positions = x().numpy(), batch.input_ids.numpy(), batch.position_ids.numpy()
    keep, finite = ~np.isin(ids, skip), np.isfinite(vectors).all()
    for start, end in pairwise(accumulate(batch.seqlens, initial=0)):
        rows, kept = vectors[start:end], keep[start:end]
        if not finite and not np.isfinite(rows).all():
            yield None
            continue
        if not in_order:
            order = positions[start:end].argsort()
            rows, kept = rows[order], kept[order]
        yield rows[kept]
