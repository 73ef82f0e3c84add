"""Texts to labels with scores: sequence classifiers, and zero-shot classification by natural language inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypedDict, overload

import numpy as np
import torch
from torch import Tensor

from .batch import PackedBatch
from .checkpoint.open import Checkpoint
from .pipeline.base import Pipeline
from .pipeline.feed import finite_rows
from .pipeline.inputs import check_text, check_text_or_pair, listed
from .pipeline.keywords import keyworded
from .pipeline.tokenizer import FirstCut, Text
from .reading import CheckpointError, OptionError, one_of, shown, warn, whole_number

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


class Score(TypedDict):
    label: str
    score: float


class ZeroShot(TypedDict):
    """Labels and their scores, best first."""

    sequence: str
    labels: list[str]
    scores: list[float]


class Classifier(Pipeline):
    """A sequence classifier of texts, or of pairs of texts. `labels` are the names of its classes, by their ids.

    `function_to_apply` makes scores of the logits. It is chosen as in transformers' text-classification pipeline:
    "none" for the problem_type "regression" in the config; else "sigmoid" for "multi_label_classification" and for a
    single label; else "softmax".
    """

    opens, head = "sequence classifier", "ForSequenceClassification"

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        super().__init__(checkpoint, self.head_of(checkpoint), **options)
        self.forward = self.graphed(self.network)
        self.labels = self.config.labels
        problem = self.config.problem_type
        several = problem == "multi_label_classification" or len(self.labels) == 1
        self.function_to_apply = "none" if problem == "regression" else "sigmoid" if several else "softmax"

    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        top_k: int | None = ...,
        function_to_apply: str | None = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[Score]: ...
    @overload
    def predict(
        self,
        texts: Iterable[Text],
        *,
        top_k: int | None = ...,
        function_to_apply: str | None = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[list[Score]]: ...
    @keyworded
    def predict(
        self,
        texts: str | Iterable[Text],
        *,
        top_k: int | None = None,
        function_to_apply: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Score] | list[list[Score]]:
        """For every text a list of {"label", "score"}, best first; for one string, that list alone.

        texts: a string, or an iterable of strings and of pairs of strings (tuples or lists). One pair is [(a, b)].
        top_k: how many labels; None: all. function_to_apply: "softmax", "sigmoid" or "none"; by default the model's
        own. Equal scores stay in the order of their ids.

        The numbers are those of transformers' pipeline("text-classification", top_k=top_k), with two differences: texts
        over max_seq_length are cut (see on_long), and a pair whose second text is empty stays a pair, where the
        pipeline makes it a single text. Raises OptionError for another function and for a top_k below 1, TypeError for
        an item that is neither a text nor a pair.
        """
        top_k = None if top_k is None else whole_number("top_k", top_k)

        def best(rows: list[Tensor]) -> list[list[Score]]:
            scores = self._stacked(rows)
            return [
                [{"label": self.labels[i], "score": float(row[i])} for i in order[:top_k]]
                for row, order in zip(scores, np.argsort(-scores, axis=-1, kind="stable").tolist(), strict=True)
            ]

        return self._predict(texts, function_to_apply, show_progress_bar, best)

    __call__ = predict

    @keyworded
    def predict_proba(
        self,
        texts: str | Iterable[Text],
        *,
        function_to_apply: str | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Scores of all labels in the order of their ids: (N, labels), fp32; for one string (labels,).

        texts, function_to_apply: as in `predict`; "none" gives the logits.
        """
        scores: np.ndarray = self._predict(texts, function_to_apply, show_progress_bar, self._stacked)
        return scores

    def _predict(
        self,
        texts: str | Iterable[Text],
        function_to_apply: str | None,
        show_progress_bar: bool | None,
        made: Callable[[list[Tensor]], Any],
    ) -> Any:
        """`made` of the texts' scores."""
        named = self.function_to_apply if function_to_apply is None else function_to_apply
        name = one_of("function_to_apply", named.lower() if isinstance(named, str) else named, tuple(_FUNCTIONS))
        given, single = listed(texts, "texts", check_text_or_pair, "a str or an iterable of str or pairs", dimensions=2)
        results = self.rows(given, self._compute(name), show_progress_bar, made)
        return results[0] if single else results

    @overload
    def zero_shot(  # type: ignore[overload-overlap]
        self,
        texts: str,
        labels: str | Iterable[str],
        *,
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        show_progress_bar: bool | None = ...,
    ) -> ZeroShot: ...
    @overload
    def zero_shot(
        self,
        texts: Iterable[str],
        labels: str | Iterable[str],
        *,
        hypothesis_template: str = ...,
        multi_label: bool = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[ZeroShot]: ...
    @keyworded
    def zero_shot(
        self,
        texts: str | Iterable[str],
        labels: str | Iterable[str],
        *,
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        show_progress_bar: bool | None = None,
    ) -> ZeroShot | list[ZeroShot]:
        """For every text {"sequence": the text, "labels": best first, "scores": of these}; for one string, one dict.

        A model of natural language inference reads each text as a premise, with one hypothesis per label: the template,
        in which the label replaces {}. labels: a list, or one string with commas between them. A score is the softmax,
        over the labels, of the logits of entailment. With multi_label, or a single label, it is the softmax of each
        label's entailment and contradiction. Only the text is cut to fit max_seq_length.

        The numbers are those of transformers' pipeline("zero-shot-classification"). Entailment is the label of the
        config's label2id whose name starts with "entail"; without such a label the last one, with a warning.
        Contradiction is the first label, or the last one if entailment is the first.

        Raises OptionError without labels, for a template without {}, and for a hypothesis that leaves a text no room.
        """
        if isinstance(labels, str):
            labels = [name for name in map(str.strip, labels.split(",")) if name]
        names = list(listed(labels, "labels", partial(check_text, name="label"))[0])
        hypotheses = self._hypotheses(names, hypothesis_template)
        entailment = self._entailment()
        items, single = listed(texts, "texts")
        kept: list[str] = []

        def pairs() -> Iterator[FirstCut]:
            for text in items:
                kept.append(text)
                yield from (FirstCut((text, hypothesis)) for hypothesis in hypotheses)

        def results(rows: list[Tensor]) -> list[ZeroShot]:
            """Results of the texts for which all pairs are scored."""
            count = len(rows) // len(names)
            by_label = self._stacked(rows[: count * len(names)]).reshape(count, len(names), len(self.labels))
            if multi_label or len(names) == 1:
                scores = _softmax(by_label[..., [-1 if entailment == 0 else 0, entailment]])[..., 1]
            else:
                scores = _softmax(by_label[..., entailment])
            orders = np.argsort(scores, axis=-1)[:, ::-1].tolist()
            return [
                {"sequence": text, "labels": [names[i] for i in order], "scores": [float(row[i]) for i in order]}
                for text, row, order in zip(kept[:count], scores, orders, strict=True)
            ]

        compute = self._compute("none")
        found: list[ZeroShot] = self.rows(items, compute, show_progress_bar, results, feeding=pairs(), each=len(names))
        return found[0] if single else found

    def _compute(self, function: str) -> Callable[[PackedBatch], Iterator[Tensor | None]]:
        def compute(batch: PackedBatch) -> Iterator[Tensor | None]:
            logits = self.forward(batch).float()
            return finite_rows(_FUNCTIONS[function](logits), logits)

        return compute

    def _stacked(self, rows: list[Tensor]) -> np.ndarray:
        return torch.stack(rows).numpy() if rows else np.empty((0, len(self.labels)), np.float32)

    def _hypotheses(self, labels: list[str], template: str) -> list[str]:
        if not labels:
            raise OptionError("zero_shot needs at least one label")
        try:
            made = [template.format(label) for label in labels]
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise OptionError(f"hypothesis_template {shown(template)} can't be filled: {shown(error)}") from None
        if made[0] == template:
            raise OptionError(f"hypothesis_template {shown(template)} has no {{}} for the label")
        for hypothesis in made:
            (ids,), cut = self.tokenizer.encode([("", hypothesis)])
            if cut or len(ids) == self.tokenizer.max_length:
                raise OptionError(
                    f"the hypothesis {shown(hypothesis)} leaves no room for a text: max_seq_length is "
                    f"{self.max_seq_length}; shorten the label or the template"
                )
        return made

    def _entailment(self) -> int:
        found = self.config.entailment_id
        if found is None:
            warn(
                f"no label of {shown(list(self.labels))} starts with 'entail': the last one is taken for entailment. "
                "Is this a model of natural language inference?"
            )
            return len(self.labels) - 1
        if found >= len(self.labels):
            raise CheckpointError(f"label2id has entailment at {found}; this model has {len(self.labels)} labels")
        return found


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return result
