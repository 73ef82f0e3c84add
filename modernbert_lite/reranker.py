"""Pairs of texts -> scores: a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import pooling
from .batch import PackedBatch
from .heads import encoder_class, network_class, use
from .pipeline import Checkpoint, Pipeline, check_text, length
from .prompts import Prompted
from .reading import OptionError
from .st_config import Pooling, SentenceConfig, finish, on_vectors, score_activation

Pair = tuple[str, str]


class Reranker(Prompted, Pipeline):
    """A sequence classifier that reads two texts at once. `labels` are the names of its outputs, mostly one. `prompts`
    and `default_prompt_name`, of texts that are put before the first one of a pair, are the repository's own."""

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        self.check(checkpoint)
        architecture, sentence = checkpoint.architecture("ForSequenceClassification"), checkpoint.sentence
        if not sentence.scores and use(architecture) != "Reranker":
            raise checkpoint.refuse("reranker")
        network = encoder_class(checkpoint.config) if sentence.scores else network_class(architecture)
        super().__init__(checkpoint, network, **options)
        # What an encoder's files say of prompts and activation isn't about scores: CrossEncoder passes over it, too.
        told = sentence if sentence.model_type in (None, "CrossEncoder") else SentenceConfig()
        self.prompts = told.prompts or {}
        default = told.default_prompt_name
        self.default_prompt_name = default if default in self.prompts else None  # an encoder's "query" is empty
        self.network: Callable[[PackedBatch], Tensor] = self.graphed(self.model)
        self.pooling: Pooling | None = None  # of an encoder whose head lies in sentence-transformers' modules
        self.labels = self.config.labels
        if sentence.scores:
            self.pooling = sentence.pooling or Pooling()
            self.on_tokens = on_vectors(checkpoint.root, sentence.on_tokens, self.config.hidden_size, self.device)
            width = self.on_tokens[-1].out_features if self.on_tokens else self.config.hidden_size
            self.head = on_vectors(checkpoint.root, sentence.dense, width * len(self.pooling.modes), self.device)
            self.normalizes = sentence.normalize
            self.labels = tuple(f"LABEL_{i}" for i in range(self.head[-1].out_features))
        named = told.activation_fn or self.config.activation_fn
        self.activation_fn = score_activation(named or ("torch.nn.Sigmoid" if len(self.labels) == 1 else None))

    def predict(
        self,
        pairs: Pair | Sequence[str] | Iterable[Pair],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | str | None = None,
        apply_softmax: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Scores of pairs, (N,) for one label, else (N, labels); fp32. One pair of strings gives one row.

        prompt: put before the first text of every pair (a query, mostly); or prompt_name, one of `prompts`; neither:
        the repository's default.
        activation_fn: on the logits; a function or a name ("identity", "sigmoid"); None: what the checkpoint names,
        else the sigmoid for one label and nothing for more. apply_softmax: over the labels, if there are several.
        Raises TypeError or ValueError for an item that is not two strings, OptionError for an unknown prompt_name.
        """
        prompt = self._resolve_prompt(prompt_name, prompt)
        unpooled = prompt and self.pooling is not None and not self.pooling.include_prompt
        skip = self.tokenizer.prompt_length(prompt) if unpooled else 0
        single = isinstance(pairs, (list, tuple)) and len(pairs) == 2 and all(isinstance(p, str) for p in pairs)
        items: Any = [pairs] if single else pairs
        activate = score_activation(activation_fn, OptionError) if isinstance(activation_fn, str) else activation_fn
        activate = activate or self.activation_fn

        def forward(batch: PackedBatch) -> Tensor:
            scores = activate(self._scores(self.network(batch).float(), batch, skip))
            if len(self.labels) == 1:
                return scores.squeeze(-1)
            return torch.softmax(scores, -1) if apply_softmax else scores

        rows = [
            row for block in self.run(_pairs(items, prompt), forward, show_progress_bar, length(items)) for row in block
        ]
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
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """[{"corpus_id", "score", "text"}], best first; "text" with return_documents. Equal scores keep their order.
        prompt_name, prompt: as in `predict`, before the query.

        Raises ValueError for a model of several labels, which has no one score to rank by.
        """
        if len(self.labels) != 1:
            raise OptionError(
                f"this model has {len(self.labels)} labels; rank needs one of a single label. Use predict"
            )
        if isinstance(documents, str):
            raise TypeError("documents is a str; it must be a list or another iterable of them")
        documents = list(documents)
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, prompt_name=prompt_name, prompt=prompt, show_progress_bar=show_progress_bar)
        return ranked(scores, documents, top_k, return_documents)

    def _scores(self, x: Tensor, batch: PackedBatch, skip: int) -> Tensor:
        """What the network gives -> (B, labels) before the activation. `skip`: tokens that are not pooled."""
        if self.pooling is None:
            return x
        x = finish(x, self.on_tokens, False, None)
        return finish(pooling.pool(x, batch, self.pooling.modes, skip), self.head, self.normalizes, None)


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


def _pairs(items: Iterable[Any], prompt: str) -> Iterator[Pair]:
    for i, item in enumerate(items):
        if isinstance(item, str) or not isinstance(item, (list, tuple)) or len(item) != 2:
            raise TypeError(f"pair {i} is {type(item).__name__} ({item!r:.60}); each must be two strings")
        yield prompt + check_text(item[0], i), check_text(item[1], i)
