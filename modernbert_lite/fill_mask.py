"""Texts with [MASK] to the likeliest tokens in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypedDict, overload

import torch
from torch import Tensor

from .batch import PackedBatch, to_device, to_host
from .checkpoint.open import Checkpoint
from .pipeline.base import Pipeline
from .pipeline.inputs import check_text, listed
from .pipeline.keywords import keyworded
from .reading import CheckpointError, OptionError, shown, warn, whole_number

_ROWS = 256  # [MASK]s whose logits are held at a time


class Prediction(TypedDict):
    """A token in a mask's place, and its probability."""

    token: str
    token_id: int
    score: float


class FillMask(Pipeline):
    """A masked language model. `mask_token` is the text that stands for the missing token."""

    opens, head = "masked language model", "ForMaskedLM"

    def __init__(self, checkpoint: Checkpoint, **options: Any):
        super().__init__(checkpoint, self.head_of(checkpoint), **options)
        self.forward = self.graphed(self.encoder)
        if self.tokenizer.mask_token is None:
            raise CheckpointError(f"the tokenizer in {checkpoint.folder} has no mask token")
        self.mask_token = self.tokenizer.mask_token

    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        top_k: int = ...,
        targets: str | Iterable[str] | None = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[list[Prediction]]: ...
    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        top_k: int = ...,
        targets: str | Iterable[str] | None = ...,
        show_progress_bar: bool | None = ...,
    ) -> list[list[list[Prediction]]]: ...
    @keyworded
    def predict(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int = 5,
        targets: str | Iterable[str] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[list[Prediction]] | list[list[list[Prediction]]]:
        """For every text a list with one item per [MASK]: a list of {"token", "token_id", "score"}, likeliest first.
        For one string, its list alone. "token" is decoded, with its leading space; "score" is its probability.

        targets: only these tokens are scored, with the same probabilities, and the best `top_k` of them are given. As
        in transformers' pipeline, a target is a token as the vocabulary spells it ("Paris", "ĠParis"); else the first
        token of its text (" Paris"), with a warning if there are more. A target that comes twice is given once.

        Raises ValueError, naming it, for a text without [MASK] (also if it was cut off); OptionError for a target
        without tokens.
        """
        top_k = whole_number("top_k", top_k, 1, self.config.vocab_size)
        wanted = None if targets is None else self._target_ids(targets)
        best = top_k if wanted is None else min(top_k, len(wanted))
        items, single = listed(texts, "texts", self._check_mask)

        some = None if wanted is None else torch.tensor(wanted, device="cpu").to(self.device)

        def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
            """(M, V) -> probabilities and tokens, (M, best) each; NaN where a logit is not finite."""
            probabilities = logits.float().softmax(-1)
            if some is None:
                scores, ids = probabilities.topk(best)
            else:
                scores, places = probabilities[:, some].topk(best)
                ids = some[places]
            hidden = logits.amin(-1, keepdim=True).isinf()  # the softmax makes 0 of -inf, and NaN of inf and NaN
            return scores.masked_fill(hidden, math.nan), ids

        def compute(batch: PackedBatch) -> Iterator[list[list[Prediction]] | None]:
            network: Any = self.network
            masks = batch.on_host.input_ids.eq(self.tokenizer.mask_token_id or 0)
            hidden = self.forward(batch)[to_device(masks.nonzero().flatten(), batch.input_ids.device)]
            # The encoder runs once; logits are wide, and come in pieces.
            found = [tuple(map(to_host, likeliest(network.logits(rows)))) for rows in hidden.split(_ROWS)]
            return self._predictions(found, [int(part.sum()) for part in masks.split(batch.seqlens)])

        def reached(block: list[list[list[Prediction]]], first: int) -> list[list[list[Prediction]]]:
            if [] in block:
                i = first + block.index([])
                raise ValueError(
                    f"the {self.mask_token} of text {i} lies beyond its first {self.max_seq_length} tokens"
                )
            return block

        filled: list[list[list[Prediction]]] = self.rows(items, compute, show_progress_bar, block=reached)
        return filled[0] if single else filled

    __call__ = predict

    def _predictions(
        self, found: list[tuple[Callable[[], Tensor], ...]], counts: list[int]
    ) -> Iterator[list[list[Prediction]] | None]:
        """found: probabilities and tokens of all [MASK]s, in pieces. counts: how many [MASK]s each text has."""
        masks = (zip(*(part().tolist() for part in piece), strict=True) for piece in found)
        scored = chain.from_iterable(masks)
        for count in counts:
            text: list[list[Prediction]] = [
                [
                    {"token": self.tokenizer.decode(i), "token_id": i, "score": p}
                    for p, i in zip(scores, ids, strict=True)
                ]
                for scores, ids in islice(scored, count)
            ]
            yield text if all(math.isfinite(best[0]["score"]) for best in text) else None

    def _target_ids(self, targets: str | Iterable[str]) -> list[int]:
        """The targets' token ids, each once."""
        found: list[int] = []
        several: list[str] = []
        for target in listed(targets, "targets")[0]:
            known = self.tokenizer.id_of(target)
            ids = self.tokenizer.bare(target) if known is None else [known]
            found += ids[:1]
            if len(ids) != 1:
                several.append(target)
        if not found:
            raise OptionError("targets has no token; at least one is needed")
        if max(found) >= self.config.vocab_size:
            raise OptionError(f"token {max(found)} of the targets is beyond this model's {self.config.vocab_size}")
        if several:
            warn(
                f"the targets {shown(several)} are no single tokens: only the first token of each counts, if it has one"
            )
        return list(dict.fromkeys(found))

    def _check_mask(self, text: object, i: int) -> str:
        if self.mask_token not in check_text(text, i):
            raise ValueError(f"text {i} has no {self.mask_token}; put one where a token is missing")
        return str(text)
