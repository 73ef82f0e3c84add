"""Pairs of texts -> scores: a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import pooling
from .batch import PackedBatch
from .heads import encoder_class, network_class
from .pipeline import Checkpoint, Pipeline, check_text, length
from .reading import OptionError
from .st_config import Dense, Norm, Pooling, finish, on_vectors, score_activation
from .tokenizer import Text

Pair = tuple[str, str]


class Reranker(Pipeline):
    """A sequence classifier that reads two texts at once. `labels` are the names of its outputs, mostly one."""

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        self.check(checkpoint)
        architecture, sentence = checkpoint.config.architecture, checkpoint.sentence
        if not sentence.scores and not architecture.endswith("ForSequenceClassification"):
            raise checkpoint.refuse("reranker")
        network = encoder_class(checkpoint.config) if sentence.scores else network_class(architecture)
        super().__init__(checkpoint, network, **options)
        self.network: Callable[[PackedBatch], Tensor] = self.graphed(self.model)
        self.labels = self.config.labels
        if sentence.scores:  # an encoder, whose head lies in sentence-transformers' modules
            modes = (sentence.pooling or Pooling()).modes
            width = self.config.hidden_size * len(modes)
            head = on_vectors(checkpoint.root, sentence.dense, width, self.device)
            self.network = partial(_pool_and_score, self.network, modes, head)
            self.labels = tuple(f"LABEL_{i}" for i in range(head[-1].out_features))
        named = checkpoint.sentence.activation_fn or self.config.activation_fn
        self.activation_fn = score_activation(named or ("Sigmoid" if len(self.labels) == 1 else "Identity"))

    def predict(
        self,
        pairs: Pair | str | Sequence[str] | Iterable[Text],
        *,
        activation_fn: Callable[[Tensor], Tensor] | str | None = None,
        apply_softmax: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Scores of pairs, (N,) for one label, else (N, labels); fp32. One pair of strings gives one row.

        A model of several labels also scores single texts, as CrossEncoder does: a string gives one row, and a string
        among the items is a text. But ["a", "b"], two strings, is one pair: of two texts use Classifier.
        activation_fn: on the logits; a function or a name ("identity", "sigmoid"); None: what the checkpoint names,
        else the sigmoid for one label and nothing for more. apply_softmax: over the labels, if there are several.
        Raises TypeError or ValueError for an item that is not two strings.
        """
        single = isinstance(pairs, str) or (
            isinstance(pairs, (list, tuple)) and len(pairs) == 2 and all(isinstance(p, str) for p in pairs)
        )
        items: Any = [pairs] if single else pairs
        activate = score_activation(activation_fn, OptionError) if isinstance(activation_fn, str) else activation_fn
        activate = activate or self.activation_fn

        def forward(batch: PackedBatch) -> Tensor:
            scores = activate(self.network(batch).float())
            if len(self.labels) == 1:
                return scores.squeeze(-1)
            return torch.softmax(scores, -1) if apply_softmax else scores

        texts = _pairs(items, len(self.labels) > 1)
        rows = [row for block in self.run(texts, forward, show_progress_bar, length(items)) for row in block]
        shape = () if len(self.labels) == 1 else (len(self.labels),)
        scores = torch.stack(rows).numpy() if rows else np.empty((0, *shape), np.float32)
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """[{"corpus_id", "score", "text"}], best first; "text" with return_documents. Equal scores keep their order.

        Raises ValueError for a model of several labels, which has no one score to rank by.
        """
        if len(self.labels) != 1:
            raise OptionError(
                f"this model has {len(self.labels)} labels; rank needs one of a single label. Use predict"
            )
        if isinstance(documents, str):
            raise TypeError("documents is a str; it must be a list or another iterable of them")
        documents = list(documents)
        scores = self.predict([(query, document) for document in documents], show_progress_bar=show_progress_bar)
        return ranked(scores, documents, top_k, return_documents)


def _pool_and_score(encoder: Any, modes: Sequence[str], head: list[Dense | Norm], batch: PackedBatch) -> Tensor:
    return finish(pooling.pool(encoder(batch), batch, modes), head, False, None)


def ranked(scores: np.ndarray, documents: list[str], top_k: int | None, return_documents: bool) -> list[dict[str, Any]]:
    """Scores (N,) and their documents -> the best `top_k`, best first."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    order = np.argsort(-scores, kind="stable")[:top_k]
    results: list[dict[str, Any]] = [{"corpus_id": int(i), "score": float(scores[i])} for i in order]
    if return_documents:
        for result in results:
            result["text"] = documents[result["corpus_id"]]
    return results


def _pairs(items: Iterable[Any], texts: bool) -> Iterator[Text]:
    """texts: single ones are taken, too."""
    for i, item in enumerate(items):
        if isinstance(item, str) and texts:
            yield item
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            yield check_text(item[0], i), check_text(item[1], i)
        else:
            hint = "; for single texts open the model with Classifier" if isinstance(item, str) else ""
            raise TypeError(f"pair {i} is {type(item).__name__} ({item!r:.60}); each must be two strings{hint}")
