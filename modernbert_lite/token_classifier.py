"""Texts to labelled words and spans: named entities, parts of speech, and other labels of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypedDict, overload

import numpy as np
from torch import Tensor

from .batch import PackedBatch
from .checkpoint.open import Checkpoint
from .pipeline.base import Pipeline
from .pipeline.feed import sequences
from .pipeline.inputs import listed
from .pipeline.keywords import keyworded
from .pipeline.tokenizer import Span
from .reading import one_of

STRATEGIES = ("none", "simple", "first", "average", "max")


class Entity(TypedDict, total=False):
    """What was found: a token ("entity", "index"), or neighbours with one label ("entity_group")."""

    entity: str
    entity_group: str
    score: float
    index: int
    word: str
    start: int
    end: int


class _Piece(NamedTuple):
    """A token, or all tokens of a word: the label, and where it is."""

    place: int
    word: str
    start: int
    end: int
    entity: str
    score: np.float32


class TokenClassifier(Pipeline):
    """A classifier of every token of a text. `labels` are the names of its classes, in the order of their ids."""

    opens, head = "token classifier", "ForTokenClassification"

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        super().__init__(checkpoint, self.head_of(checkpoint), **options)
        self.forward = self.graphed(self.network)
        self.labels = self.config.labels

    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        aggregation_strategy: str = ...,
        ignore_labels: Iterable[str] = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[Entity]: ...
    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        aggregation_strategy: str = ...,
        ignore_labels: Iterable[str] = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[list[Entity]]: ...
    @keyworded
    def predict(
        self,
        texts: str | Iterable[str],
        *,
        aggregation_strategy: str = "simple",
        ignore_labels: Iterable[str] = ("O",),
        show_progress_bar: bool | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """For every text a list of what was found, in the text's order; for one string, that list alone.

        aggregation_strategy "none" gives a {"entity", "score", "index", "word", "start", "end"} for each token: its
        label, the label's probability, the token's place among the text's tokens (special tokens count, but are left
        out), the token as the vocabulary spells it, and its characters [start, end) in the text.

        The other strategies give an {"entity_group", "score", "word", "start", "end"} for neighbours with one label.
        The score is their mean. "B-" starts a new group; "B-" and "I-" are left out of the label's name. "simple" takes
        tokens as they are. "first", "average" and "max" first give all tokens of a word one label: that of its first
        token, of the mean of their probabilities, of its surest token. ignore_labels: entities or entity_groups to
        leave out, by name.

        The numbers, words and places are those of transformers' pipeline("token-classification"), whose own default is
        "none". As there, a token continues a word if its spelling differs from the text ("##ing"); in vocabularies
        without such a mark, if no space is before it or at its start. Texts over max_seq_length are cut (see on_long):
        what lies beyond has no entities. Raises OptionError for another strategy, TypeError for an item that is no
        string.
        """
        one_of("aggregation_strategy", aggregation_strategy, STRATEGIES)
        ignored = {ignore_labels} if isinstance(ignore_labels, str) else set(ignore_labels)
        items, single = listed(texts, "texts")
        waiting: list[str] = []

        def read() -> Iterator[str]:
            for text in items:
                waiting.append(text)
                yield text

        def compute(batch: PackedBatch) -> Iterator[Tensor | None]:
            logits = sequences(self.forward(batch).float(), batch.seqlens)
            return (row.softmax(-1) if row.isfinite().all() else None for row in logits)

        def entities(block: list[Tensor], _: int) -> list[list[Entity]]:
            window, waiting[:] = waiting[: len(block)], waiting[len(block) :]
            results = []
            for text, tokens, scores in zip(window, self.tokenizer.offsets(window), block, strict=True):
                found = self._entities(text, tokens, scores.numpy(), aggregation_strategy)
                results.append([e for e in found if e.get("entity", e.get("entity_group")) not in ignored])
            return results

        results: list[list[Entity]] = self.rows(items, compute, show_progress_bar, block=entities, feeding=read())
        return results[0] if single else results

    __call__ = predict

    def _entities(
        self, text: str, tokens: list[tuple[int, Span | None]], scores: np.ndarray, strategy: str
    ) -> list[Entity]:
        """tokens: the text's tokens, with None for special ones. scores: (tokens, labels), fp32."""
        words: list[list[tuple[int, str, int, int]]] = []
        by_word = strategy not in ("none", "simple")
        for index, (token_id, span) in enumerate(tokens):
            if span is None:
                continue
            word, goes_on = self._word(text, token_id, *span)
            if not (by_word and goes_on and words):
                words.append([])
            words[-1].append((index, word, *span))
        pieces = [self._piece(word, scores[word[0][0] : word[-1][0] + 1], strategy) for word in words]
        if strategy == "none":
            return [{"entity": p.entity, "score": float(p.score), **_place(p, p, p.word, p.place)} for p in pieces]
        return [
            {
                "entity_group": group[0].entity.split("-", 1)[-1],
                "score": float(np.mean([p.score for p in group])),
                **_place(group[0], group[-1], self.tokenizer.joined([p.word for p in group])),
            }
            for group in _groups(pieces)
        ]

    def _word(self, text: str, token_id: int, start: int, end: int) -> tuple[str, bool]:
        """The token's text as in transformers' pipeline, and whether it continues the word before it."""
        word = self.tokenizer.token(token_id)
        if token_id == self.tokenizer.unk_token_id:
            return text[start:end], False
        if self.tokenizer.knows_subwords:
            return word, len(word) != end - start
        return word, start > 0 and " " not in text[start - 1 : start + 1]

    def _piece(self, tokens: list[tuple[int, str, int, int]], scores: np.ndarray, strategy: str) -> _Piece:
        """scores: (tokens of the word, labels)."""
        sure = scores.max(1).argmax() if strategy == "max" else 0
        row = scores.mean(0) if strategy == "average" else scores[sure]
        words = [word for _, word, _, _ in tokens]
        best = row.argmax()
        return _Piece(
            place=tokens[0][0],
            word=words[0] if strategy in ("none", "simple") else self.tokenizer.joined(words),
            start=tokens[0][2],
            end=tokens[-1][3],
            entity=self.labels[best],
            score=row[best],
        )


def _place(first: _Piece, last: _Piece, word: str, index: int | None = None) -> Entity:
    return {**({} if index is None else {"index": index}), "word": word, "start": first.start, "end": last.end}


def _groups(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Groups neighbours with one label; "B-" starts a new group."""
    groups: list[list[_Piece]] = []
    for piece in pieces:
        goes_on = not piece.entity.startswith("B-") and groups and _tag(groups[-1][-1]) == _tag(piece)
        if not goes_on:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _tag(piece: _Piece) -> str:
    return piece.entity[2:] if piece.entity.startswith(("B-", "I-")) else piece.entity
