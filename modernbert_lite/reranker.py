"""Pairs of texts to scores: a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from .batch import PackedBatch
from .checkpoint.dense import finish, on_vectors, score_activation
from .checkpoint.open import Checkpoint
from .checkpoint.sentence import Pooling, SentenceConfig
from .models.registry import encoder_class
from .ops import pooling
from .pipeline.base import Pipeline
from .pipeline.feed import finite_rows
from .pipeline.inputs import Pair, brief, check_pair, check_text_or_pair, listed
from .pipeline.keywords import keyworded
from .pipeline.prompts import Prompted
from .pipeline.tokenizer import Text
from .reading import OptionError, shown, whole_number


class _Ranked(TypedDict):
    corpus_id: int
    score: float


class Ranked(_Ranked, total=False):
    """A document's place in the list that was ranked, and its score."""

    text: str


class Reranker(Prompted, Pipeline):
    """A sequence classifier that reads two texts at once. `labels` are the names of its outputs; mostly there is one.
    `prompts` and `default_prompt_name` are the repository's own: a prompt is put before the first text of a pair."""

    opens, head = "reranker", "ForSequenceClassification"

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        self.check(checkpoint)
        sentence = checkpoint.sentence
        network = encoder_class(checkpoint.config) if sentence.scores else self.head_of(checkpoint)
        super().__init__(checkpoint, network, **options)
        # Prompts and activation in an encoder's files are not meant for scores. CrossEncoder ignores them, too.
        told = sentence if sentence.model_type in (None, "CrossEncoder") else SentenceConfig()
        self.prompts = told.prompts or {}
        default = told.default_prompt_name
        self.default_prompt_name = default if default in self.prompts else None  # an encoder's "query" is empty
        self.forward = self.graphed(self.network)
        self.pooling: Pooling | None = None  # of an encoder whose head lies in sentence-transformers' modules
        self.labels = self.config.labels
        if sentence.scores:
            self.pooling = sentence.pooling or Pooling()
            self.on_tokens = on_vectors(checkpoint.files, sentence.on_tokens, self.config.hidden_size, self.device)
            width = self.on_tokens[-1].out_features if self.on_tokens else self.config.hidden_size
            self.dense = on_vectors(checkpoint.files, sentence.dense, width * len(self.pooling.modes), self.device)
            self.normalizes = sentence.normalize
            self.labels = tuple(f"LABEL_{i}" for i in range(self.dense[-1].out_features))
        named = told.activation_fn or self.config.activation_fn
        self.activation_fn = score_activation(named or ("torch.nn.Sigmoid" if len(self.labels) == 1 else None))

    @keyworded
    def predict(
        self,
        pairs: Pair | str | Sequence[str] | Iterable[Text],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | str | None = None,
        apply_softmax: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Scores of pairs, fp32: (N,) for one label, else (N, labels). One pair of strings gives one row.

        A model with several labels also scores single texts, as CrossEncoder does. A string gives one row, and a string
        among the items is a text. But ["a", "b"], two strings, is one pair: for two texts use Classifier.

        prompt: a text that is put before the first text of every pair (mostly a query). prompt_name: one of `prompts`.
        If neither is given, the repository's default prompt is used. activation_fn: applied to the logits; a function,
        or a name ("identity", "sigmoid"). By default what the checkpoint names; else the sigmoid for one label, and
        nothing for several. apply_softmax: over the labels, if there are several.

        Raises TypeError or ValueError for an item that is not two strings, ValueError for logits that are not finite,
        OptionError for an unknown prompt_name.
        """
        prompt = self._resolve_prompt(prompt_name, prompt)
        unpooled = prompt and self.pooling is not None and not self.pooling.include_prompt
        skip = self.tokenizer.prompt_length(prompt) if unpooled else 0
        single = isinstance(pairs, str) or _is_pair(pairs)
        items: Any = [pairs] if single else pairs
        check_item = check_text_or_pair if len(self.labels) > 1 else _check_pair

        def check(item: object, i: int) -> Text:
            text = check_item(item, i)
            return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])

        given, _ = listed(items, "pairs", check, "two strings, or an iterable of such pairs", dimensions=2)
        named = self.activation_fn if activation_fn is None else activation_fn
        activate = score_activation(named, OptionError) if isinstance(named, str) else named
        if not callable(activate):
            raise OptionError(f"activation_fn is {shown(activate)}; it must be a function, or the name of one")

        def compute(batch: PackedBatch) -> Iterator[Tensor | None]:
            logits = self._scores(self.forward(batch).float(), batch, skip)
            scores = activate(logits)
            if len(self.labels) == 1:
                scores = scores.squeeze(-1)
            elif apply_softmax:
                scores = torch.softmax(scores, -1)
            return finite_rows(scores, logits)  # a sigmoid hides an infinite one

        def made(rows: list[Tensor]) -> np.ndarray:
            shape = () if len(self.labels) == 1 else (len(self.labels),)
            return torch.stack(rows).numpy() if rows else np.empty((0, *shape), np.float32)

        scores: np.ndarray = self.rows(given, compute, show_progress_bar, made)
        return scores[0] if single else scores

    @keyworded
    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Ranked]:
        """[{"corpus_id", "score", "text"}], best first; "text" only with return_documents. Equal scores keep their
        order. prompt_name, prompt: as in `predict`, for the query.

        Raises ValueError for a model with several labels: it has no single score to rank by.
        """
        if len(self.labels) != 1:
            raise OptionError(
                f"this model has {len(self.labels)} labels; rank needs one of a single label. Use predict"
            )
        if not isinstance(query, str):
            raise TypeError(f"query is {brief(query)}; it must be a str")
        if isinstance(documents, str):
            raise TypeError("documents is a str; it must be a list or another iterable of them")
        if top_k is not None:
            top_k = whole_number("top_k", top_k)
        documents = list(listed(documents, "documents", what="a list or another iterable of str")[0])
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, prompt_name=prompt_name, prompt=prompt, show_progress_bar=show_progress_bar)
        return ranked(scores, documents, top_k, return_documents)

    def _scores(self, x: Tensor, batch: PackedBatch, skip: int) -> Tensor:
        """The network's output -> (B, labels), before the activation. skip: how many tokens are not pooled."""
        if self.pooling is None:
            return x
        x = finish(x, self.on_tokens, False, None)
        return finish(pooling.pool(x, batch, self.pooling.modes, skip), self.dense, self.normalizes, None)


def ranked(scores: np.ndarray, documents: list[str], top_k: int | None, return_documents: bool) -> list[Ranked]:
    """Scores (N,) and their documents -> the `top_k` best, best first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    results: list[Ranked] = [{"corpus_id": int(i), "score": float(scores[i])} for i in order]
    if return_documents:
        for result in results:
            result["text"] = documents[result["corpus_id"]]
    return results


def _check_pair(pair: object, i: int) -> Pair:
    """As check_pair, but the error for a single text names the class that takes it."""
    if isinstance(pair, str):
        raise TypeError(f"pair {i} is {brief(pair)}; each must be two strings. Classifier takes single texts")
    return check_pair(pair, i)


def _is_pair(pairs: Any) -> bool:
    listed = isinstance(pairs, (list, tuple)) or (isinstance(pairs, np.ndarray) and pairs.ndim == 1)
    return listed and len(pairs) == 2 and all(isinstance(text, str) for text in pairs)
