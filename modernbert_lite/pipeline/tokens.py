"""Tokens of texts: their ids, their vectors, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict, overload

import numpy as np
from torch import Tensor

from ..batch import PackedBatch
from ..checkpoint.dense import Dense, Norm, Unit, finish
from ..checkpoint.sentence import Pooling
from ..ops import pooling
from ..reading import as_whole, warn
from .feed import Ids, finite_rows, sequences, windows
from .inputs import brief, check_text, listed
from .keywords import keyworded
from .sparse import SparseEncoding


class TextOutput(TypedDict):
    """Everything about a text: what `output_value=None` gives."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_embeddings: np.ndarray
    sentence_embedding: np.ndarray


class TokenVectors(SparseEncoding):
    """What an Embedder tells about the tokens of texts."""

    pooling: Pooling
    on_tokens: list[Dense | Norm | Unit]
    dense: list[Dense | Norm | Unit]

    @overload
    def token_ids(  # type: ignore[overload-overlap]
        self, sentences: str, *, prompt_name: str | None = ..., prompt: str | None = ...
    ) -> list[int]: ...
    @overload
    def token_ids(
        self, sentences: Iterable[str], *, prompt_name: str | None = ..., prompt: str | None = ...
    ) -> list[list[int]]: ...
    @keyworded
    def token_ids(
        self, sentences: str | Iterable[str], *, prompt_name: str | None = None, prompt: str | None = None
    ) -> list[int] | list[list[int]]:
        """The ids of each text's tokens, special tokens included, as `encode` feeds them: what `encode_ids` takes. For
        one string, its ids. Prompts, and texts over max_seq_length, are treated as in `encode`."""
        prompt = self._resolve_prompt(prompt_name, prompt)
        texts, single = listed(sentences, "sentences")
        results: list[list[int]] = []
        cut = 0
        for window in windows(prompt + text for text in texts):
            ids, more = self.tokenizer.encode(window, len(results))
            if more and self.on_long == "error":
                self.refuse_long(window, len(results))
            results += ids
            cut += more
        if cut:
            warn(f"{cut} of {len(results)} texts were longer than {self.max_seq_length} tokens and were cut")
        return results[0] if single else results

    @overload
    def token_offsets(  # type: ignore[overload-overlap]
        self, sentences: str, *, prompt_name: str | None = ..., prompt: str | None = ...
    ) -> np.ndarray: ...
    @overload
    def token_offsets(
        self, sentences: Iterable[str], *, prompt_name: str | None = ..., prompt: str | None = ...
    ) -> list[np.ndarray]: ...
    @keyworded
    def token_offsets(
        self, sentences: str | Iterable[str], *, prompt_name: str | None = None, prompt: str | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Where the rows of encode(.., output_value="token_embeddings") stand in each text: for every text an array
        (tokens, 2), int64, of characters [start, end) in the text as it was given, without its prompt; for one string,
        that array. Special tokens and tokens of the prompt have (0, 0). A token over the prompt's end has its part of
        the text.

        For late chunking, embed a long text once, and average the rows whose characters lie in each chunk. Prompts and
        errors are as in `encode`. A text over max_seq_length has the offsets of what is left, whatever on_long says.
        """
        prompt = self._resolve_prompt(prompt_name, prompt)
        texts, single = listed(sentences, "sentences")
        results: list[np.ndarray] = []
        for window in windows(prompt + text for text in texts):  # the tokenizer's own results are a lot larger
            for tokens in self.tokenizer.offsets(window, len(results)):
                spans = np.array([span or (0, 0) for _, span in tokens], np.int64).reshape(-1, 2)
                results.append(np.maximum(spans - len(prompt), 0))
        return results[0] if single else results

    def _encode_tokens(
        self,
        sentences: str | Iterable[str],
        prompt: str,
        everything: bool,
        unit: bool,
        dim: int | None,
        show_progress_bar: bool | None,
    ) -> Any:
        """encode() for an output_value of tokens: their vectors, or everything about a text. unit, dim: of its own
        vector."""
        given, single = listed(sentences, "sentences", lambda text, i: prompt + check_text(text, i))
        skip = self.tokenizer.prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0

        def compute(batch: PackedBatch) -> Iterator[Any]:
            x = finish(self.forward(batch, False).float(), self.on_tokens, False, None)
            checked = (row if row.isfinite().all() else None for row in sequences(x, batch.seqlens))
            if not everything:
                return checked
            vectors = finite_rows(finish(pooling.pool(x, batch, self.pooling.modes, skip), self.dense, unit, dim))
            ids = batch.on_host.input_ids.split(batch.seqlens)
            rows = zip(ids, checked, vectors, strict=True)
            return (row if all(part is not None for part in row) else None for row in rows)

        def result(row: Any) -> Any:
            if not everything:
                return row.numpy()
            ids, tokens, vector = (part.numpy() for part in row)
            return {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_embeddings": tokens,
                "sentence_embedding": vector,
            }

        results = self.rows(given, compute, show_progress_bar, lambda rows: [result(row) for row in rows])
        return results[0] if single else results


def check_ids(item: object, i: int, vocab_size: int, most: int) -> list[int]:
    """The token ids of one text, checked. Raises, naming the sequence: TypeError for what is no sequence of whole
    numbers; ValueError for an empty one, for more than `most` ids, and for ids outside the vocabulary."""
    numbers: Any = item.tolist() if isinstance(item, (np.ndarray, Tensor)) else item
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, (list, tuple)):
        raise TypeError(f"sequence {i} is {brief(item)}; each must be a list of token ids (whole numbers)")
    found: list[int] = list(numbers)
    if not set(map(type, found)) <= {int}:  # a call for each number takes longer than a GPU takes for the text
        whole = [as_whole(number) for number in found]
        if None in whole:
            raise TypeError(f"sequence {i} holds {brief(found[whole.index(None)])}; token ids are whole numbers")
        found = [number for number in whole if number is not None]
    if not 0 < len(found) <= most:
        raise ValueError(f"sequence {i} has {len(found)} token ids; it must have 1 to {most} (max_seq_length)")
    if not 0 <= min(found) <= max(found) < vocab_size:
        bad = next(number for number in found if not 0 <= number < vocab_size)
        raise ValueError(f"sequence {i} holds the token id {bad}; ids are 0 to {vocab_size - 1}")
    return found


def as_they_are(sequences: Sequence[list[int]], first: int, max_length: int) -> tuple[Ids, Ids, int]:
    """Feeds checked ids, in place of a tokenizer."""
    return list(sequences), [[0] * len(ids) for ids in sequences], 0
