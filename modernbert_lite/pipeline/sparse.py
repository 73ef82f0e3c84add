"""Sparse vectors of texts: a weight for each token of the vocabulary, of which nearly all are 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from heapq import nlargest
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from ..batch import PackedBatch
from ..checkpoint.folder import Folder
from ..checkpoint.sentence import SentenceConfig, length_limit
from ..checkpoint.sparse import TASKS, SparseConfig, Splade, Static
from ..checkpoint.weights import load_dense
from ..reading import (
    MAX_TOKENIZER_JSON_BYTES,
    CheckpointError,
    OptionError,
    inside,
    is_number,
    one_of,
    read_json,
    shown,
    whole_number,
)
from .base import Pipeline
from .inputs import check_text, listed
from .keywords import keyworded
from .prompts import Prompted
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEYS = ("tokens", "ids")
_CPU = torch.device("cpu")
# Logits that are held at a time, 64 MiB in fp32: a batch has thousands of rows of them, each a vocabulary wide.
_MOST_LOGITS = 1 << 24

Weights = dict[str, float] | dict[int, float] | list[dict[str, float]] | list[dict[int, float]]
Row = tuple[Tensor, Tensor]  # of one text, on the host: ids of tokens (n,) int64, none twice, and weights (n,) fp32


def splade_weights(network: Any, encoder: Callable[..., Tensor], road: Splade, batch: PackedBatch) -> list[Row | None]:
    """Of each sequence the weights above 0, as sentence-transformers' SpladePooling has them: all its tokens count,
    special ones, too. Computed in fp32 from the logits on.

    network: a masked language model; encoder(batch, False): its encoder's (T, C)."""
    hidden = encoder(batch, False)
    rows: list[Row | None] = []
    most = max(1, _MOST_LOGITS // network.config.vocab_size)
    start = 0
    for lengths in _parts(batch.seqlens, most):
        x = hidden[start : start + sum(lengths)]
        start += len(x)
        if len(x) <= most:
            pooled = _pool(network.logits(x), lengths, road)
        else:  # one long sequence
            pieces = [_pool(network.logits(piece), (len(piece),), road) for piece in x.split(most)]
            pooled = _reduce(torch.cat(pieces), (len(pieces),), road)
        rows += _nonzero(_activate(pooled.float(), road) if road.strategy == "max" else pooled)
    return rows


def token_weights(network: nn.Module, unweighted: frozenset[int], batch: PackedBatch) -> list[Row | None]:
    """Of a token classifier of one label: a token's weight is the larger one of 0 and its logit, the largest where it
    comes several times; 0 for the `unweighted` ids."""
    weights = network(batch).squeeze(-1).float().cpu()
    ids = batch.input_ids.cpu()
    rows: list[Row | None] = []
    for i, w in zip(ids.split(batch.seqlens), weights.split(batch.seqlens), strict=True):
        if not w.isfinite().all():
            rows.append(None)
            continue
        largest: dict[int, float] = {}
        for token, weight in zip(i.tolist(), w.tolist(), strict=True):
            if weight > 0 and token not in unweighted:
                largest[token] = max(weight, largest.get(token, 0.0))
        rows.append((torch.tensor(list(largest), dtype=torch.int64), torch.tensor(list(largest.values()))))
    return rows


class StaticWeights(nn.Module):
    """A stored weight for each token that a text has, as sentence-transformers' SparseStaticEmbedding: no network, so
    it stays on the CPU. `tokenizer` gives texts without special tokens; `max_length` is its own limit."""

    weight: nn.Parameter

    def __init__(self, files: Folder, folder: Path):
        """folder: in the checkpoint's; it has a tokenizer of its own, and the weights in model.safetensors, or in the
        JSON file that its config.json names, {token: weight}. Raises CheckpointError for weights that don't fit the
        tokenizer."""
        super().__init__()
        self.max_length = length_limit(files, folder, SentenceConfig(), (1 << 31) - 1)
        self.tokenizer = Tokenizer(folder, self.max_length, files=files)
        self.tokenizer.leave_out_template()
        path = files.json(folder / "config.json").get("path")
        if isinstance(path, str) and path.endswith(".json"):
            weight = self._from_json(
                inside(files.root, (folder.relative_to(files.root) / path).as_posix(), "config.json")
            )
        else:
            expected: dict[str, tuple[Any, ...]] = {"weight": (self.tokenizer.vocabulary_size,)}
            weight = load_dense(files, folder, expected, torch.device("cpu"))["weight"]
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _from_json(self, path: Path) -> Tensor:
        weight = torch.zeros(self.tokenizer.vocabulary_size)
        for token, value in read_json(path, MAX_TOKENIZER_JSON_BYTES).items():
            i = self.tokenizer.id_of(token)
            if i is None or i >= len(weight) or not is_number(value) or not abs(value) < 3e38:
                raise CheckpointError(
                    f"{path}: {shown(token)} is {shown(value)}; each must be a token of the vocabulary and its weight"
                )
            weight[i] = value
        return weight

    def forward(self, batch: PackedBatch) -> list[Row | None]:
        rows: list[Row | None] = []
        for ids in batch.input_ids.split(batch.seqlens):
            found = ids.unique()
            if len(found) and int(found[-1]) >= len(self.weight):
                raise CheckpointError(f"token {int(found[-1])} has no weight; there are {len(self.weight)}")
            weights = self.weight[found]
            rows.append((found[weights != 0], weights[weights != 0]) if weights.isfinite().all() else None)
        return rows


class SparseOptions(TypedDict, total=False):
    """Options of `encode_sparse`."""

    task: str | None
    prompt_name: str | None
    prompt: str | None
    max_active_dims: int | None
    show_progress_bar: bool | None


class SparseEncoding(Prompted, Pipeline):
    """`encode_sparse` of an Embedder."""

    splade: SparseConfig | None
    sparse: bool
    static: dict[str, StaticWeights]  # of a sparse encoder's queries that need no network

    @property
    def max_active_dims(self) -> int | None:
        """How many weights `encode_sparse` keeps of a text where a call doesn't say, the largest; None: all. Setting it
        raises OptionError for anything else than None and whole numbers from 1."""
        return self._max_active_dims

    @max_active_dims.setter
    def max_active_dims(self, value: int | None) -> None:
        self._max_active_dims = most_active(value, None)

    @overload
    def encode_sparse(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> dict[str, float]: ...
    @overload
    def encode_sparse(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> dict[int, float]: ...
    @overload
    def encode_sparse(
        self, sentences: Iterable[str], *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> list[dict[str, float]]: ...
    @overload
    def encode_sparse(
        self, sentences: Iterable[str], *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> list[dict[int, float]]: ...
    @keyworded
    def encode_sparse(
        self,
        sentences: str | Iterable[str],
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        max_active_dims: int | None = None,
        keys: str = "tokens",
        show_progress_bar: bool | None = None,
    ) -> Weights:
        """For every text {token: weight}, a list in their order; of one string, one dict. Two texts match by the sum,
        over the tokens that they share, of the products of both weights.

        Of a sparse encoder (SPLADE), as sentence-transformers' SparseEncoder has it: any token of the vocabulary may
        have a weight, special ones, too. Of gte-multilingual-base, as its card has it: a token's weight is the larger
        one of 0 and the token classifier's logit, the largest where a token comes several times; special tokens are
        left out. Tokens without a weight are not in the dict.

        task: "query" or "document", where a sparse encoder's files tell them apart; queries may then need no network.
        (Those are cut to the length of their own tokenizer, whatever max_seq_length is.) prompt, prompt_name: as in
        `encode`. max_active_dims: the most weights a text keeps, the largest; None: as the repository says.
        keys: "tokens", as decoded, without SentencePiece's mark of a word's start (a lone one is "", and so is what
        the tokenizer doesn't know); of several that are decoded alike, the largest counts. "ids": numbers of tokens,
        none of which is lost.
        Raises CheckpointError for a model that doesn't have such weights, OptionError for a task that it doesn't have.
        """
        if not self.sparse:
            raise CheckpointError(
                f"this {self.config.architecture} has no sparse token weights: they need a sparse encoder's files "
                "(MLMTransformer and SpladePooling in modules.json), or a token classifier of one label beside the "
                "encoder, as in Alibaba-NLP/gte-multilingual-base"
            )
        one_of("keys", keys, KEYS)
        most = most_active(max_active_dims, self.max_active_dims)
        compute, feeding = self._road(task)
        prompt = self._resolve_prompt(prompt_name, prompt)
        given, single = listed(sentences, "sentences", lambda text, i: prompt + check_text(text, i))
        decode = None if keys == "ids" else self.tokenizer.decode

        def made(rows: list[Row]) -> list[dict[Any, float]]:
            return [to_dict(row, most, decode) for row in rows]

        results: list[dict[Any, float]] = self.rows(given, compute, show_progress_bar, made, **feeding)
        return results[0] if single else results

    @overload
    def encode_sparse_query(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> dict[str, float]: ...
    @overload
    def encode_sparse_query(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> dict[int, float]: ...
    @overload
    def encode_sparse_query(
        self, sentences: Iterable[str], *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> list[dict[str, float]]: ...
    @overload
    def encode_sparse_query(
        self, sentences: Iterable[str], *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> list[dict[int, float]]: ...
    def encode_sparse_query(
        self, sentences: str | Iterable[str], *, keys: str = "tokens", **options: Unpack[SparseOptions]
    ) -> Weights:
        """`encode_sparse` with the task "query" and the prompt of that name; with none if the repository has none."""
        return self._encode_sparse_as("query", sentences, keys, options)

    @overload
    def encode_sparse_document(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> dict[str, float]: ...
    @overload
    def encode_sparse_document(  # type: ignore[overload-overlap]
        self, sentences: str, *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> dict[int, float]: ...
    @overload
    def encode_sparse_document(
        self, sentences: Iterable[str], *, keys: Literal["tokens"] = ..., **options: Unpack[SparseOptions]
    ) -> list[dict[str, float]]: ...
    @overload
    def encode_sparse_document(
        self, sentences: Iterable[str], *, keys: Literal["ids"], **options: Unpack[SparseOptions]
    ) -> list[dict[int, float]]: ...
    def encode_sparse_document(
        self, sentences: str | Iterable[str], *, keys: str = "tokens", **options: Unpack[SparseOptions]
    ) -> Weights:
        """`encode_sparse` with the task "document" and the prompt of that name; with none if the repository has none.
        (Not with one named "passage" or "corpus": SparseEncoder doesn't take them either.)"""
        return self._encode_sparse_as("document", sentences, keys, options)

    def _encode_sparse_as(self, task: str, sentences: Any, keys: Any, kwargs: Any) -> Any:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None:
            kwargs["prompt"] = self.prompts.get(task, "")
        return self.encode_sparse(sentences, task=task, keys=keys, **kwargs)

    def _road(self, task: str | None) -> tuple[Callable[[PackedBatch], list[Row | None]], dict[str, Any]]:
        """What makes rows of the batches of such texts, and how those are fed otherwise than others."""
        one_of("task", task, (*TASKS, None))
        if self.splade is None:
            return partial(token_weights, self.network, self.tokenizer.unweighted), {}
        road = self.splade.road(task)
        if road is None:
            has = [name for name in TASKS if self.splade.road(name)]
            raise OptionError(f"task is {task!r}, for which this model has no route; it has {has}")
        if not isinstance(road, Static):
            return partial(splade_weights, self.network, self.forward, road), {}
        static = self.static[road.folder]
        return static, {"encode": static.tokenizer.encode_typed, "max_length": static.max_length, "device": _CPU}


def most_active(given: Any, stored: int | None) -> int | None:
    """How many weights a text keeps. Raises OptionError for `given` that is no whole number above 0, nor None."""
    return stored if given is None else whole_number("max_active_dims", given)


def to_dict(row: Row, most: int | None, decode: Callable[[int], str] | None) -> dict[Any, float]:
    """{id: weight} of a text, the `most` largest; or by `decode`, of ids that give the same token the largest."""
    weights = dict(zip(row[0].tolist(), row[1].tolist(), strict=True))
    if most is not None and most < len(weights):
        weights = dict(nlargest(most, weights.items(), key=lambda item: abs(item[1])))
    if decode is None:
        return weights
    named: dict[str, float] = {}
    for token, weight in ((decode(token), weight) for token, weight in weights.items()):
        named[token] = max(weight, named.get(token, weight))
    return named


def _parts(seqlens: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """Lengths of sequences that follow each other, as many as have `most` tokens; a longer sequence is alone.

    [3, 9, 4, 2], 8 -> (3,), (9,), (4, 2)
    """
    part: list[int] = []
    for length in seqlens:
        if part and sum(part) + length > most:
            yield tuple(part)
            part = []
        part.append(length)
    if part:
        yield tuple(part)


def _pool(logits: Tensor, lengths: Sequence[int], road: Splade) -> Tensor:
    """(T, V) -> (B, V). The activation rises with the logit, so that for the largest weight it is left for later. A
    sequence with a logit that is not finite has one here."""
    logits[:, 0] += 0 * logits.amin(1)  # NaN for -inf, which the relu or a larger logit would hide
    return _reduce(logits if road.strategy == "max" else _activate(logits.float(), road), lengths, road)


def _activate(x: Tensor, road: Splade) -> Tensor:
    x = x.relu_().log1p_()  # in place: the logits are this file's own
    return x.log1p_() if road.activation == "log1p_relu" else x


def _reduce(x: Tensor, lengths: Sequence[int], road: Splade) -> Tensor:
    """(T, V) -> (B, V), by runs of sequences of one length: batches are sorted, so that there are few."""
    pooled, start = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        rows = x[start : start + count * length].view(count, length, x.shape[1])
        start += count * length
        if length == 0:
            pooled.append(x.new_zeros(count, x.shape[1]))
        else:
            pooled.append(rows.amax(1) if road.strategy == "max" else rows.sum(1))
    return torch.cat(pooled)


def _nonzero(pooled: Tensor) -> list[Row | None]:
    """(B, V) -> B rows, on the host; None for one that is not finite."""
    where = pooled.nonzero()  # NaN, too
    weights = pooled[where[:, 0], where[:, 1]].cpu()
    counts = torch.bincount(where[:, 0], minlength=len(pooled)).tolist()
    rows = zip(where[:, 1].cpu().split(counts), weights.split(counts), strict=True)
    return [row if row[1].isfinite().all() else None for row in rows]
