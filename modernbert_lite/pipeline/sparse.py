"""Sparse vectors of texts: a weight for each token of the vocabulary, nearly all 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from heapq import nlargest
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, to_host
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
from .feed import sequences
from .inputs import check_text, listed
from .keywords import keyworded
from .prompts import Prompted
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEYS = ("tokens", "ids")
_CPU = torch.device("cpu")
# Logits that are held at a time: 64 MiB in fp32. A batch has thousands of rows of logits, as wide as the vocabulary.
_MOST_LOGITS = 1 << 24

Weights = dict[str, float] | dict[int, float] | list[dict[str, float]] | list[dict[int, float]]
Row = tuple[Tensor, Tensor]  # of one text, on the host: ids of tokens (n,) int64, none twice, and weights (n,) fp32


def splade_weights(
    network: Any, encoder: Callable[..., Tensor], road: Splade, batch: PackedBatch
) -> Iterator[Row | None]:
    """The weights above 0 of each sequence, as in sentence-transformers' SpladePooling. All its tokens count, special
    tokens too. Computed in fp32 from the logits on.

    network: a masked language model. encoder(batch, False): the vectors (T, C) of its encoder.
    """
    hidden = encoder(batch, False)
    parts: list[Callable[[], list[Row | None]]] = []
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
        parts.append(_nonzero_later(_activate(pooled.float(), road) if road.strategy == "max" else pooled))
    return (row for part in parts for row in part())


def token_weights(network: nn.Module, unweighted: frozenset[int], batch: PackedBatch) -> Iterator[Row | None]:
    """The weights of each sequence, by a token classifier of one label. A token's weight is its logit, or 0 if that is
    larger. The largest counts if the token comes several times. The `unweighted` ids have weight 0."""
    weights = sequences(network(batch).squeeze(-1).float(), batch.seqlens)
    pairs = zip(batch.on_host.input_ids.split(batch.seqlens), weights, strict=True)
    return (_largest(i.tolist(), w.tolist(), unweighted) if w.isfinite().all() else None for i, w in pairs)


def _largest(ids: list[int], weights: list[float], unweighted: frozenset[int]) -> Row:
    largest: dict[int, float] = {}
    for token, weight in zip(ids, weights, strict=True):
        if weight > 0 and token not in unweighted:
            largest[token] = max(weight, largest.get(token, 0.0))
    return torch.tensor(list(largest), dtype=torch.int64), torch.tensor(list(largest.values()))


class StaticWeights(nn.Module):
    """A stored weight for each token that a text has, as in sentence-transformers' SparseStaticEmbedding. There is no
    network, so it stays on the CPU. `tokenizer` makes ids without special tokens. `max_length` is its own limit."""

    weight: nn.Parameter

    def __init__(self, files: Folder, folder: Path):
        """folder: a folder in the checkpoint, with a tokenizer of its own. The weights are in model.safetensors, or in
        the JSON file {token: weight} that the folder's config.json names. CheckpointError if they don't fit the
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
        """How many weights `encode_sparse` keeps per text (the largest ones), if a call doesn't say. None: all. Raises
        OptionError if set to anything but None or a whole number from 1."""
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
        """For each text {token: weight}: a list in the order of the texts, or one dict for one string. Two texts match
        by a sum over the tokens that both have: the product of the token's two weights.

        For a sparse encoder (SPLADE), the weights are those of sentence-transformers' SparseEncoder: any token of the
        vocabulary may have a weight, special tokens too. For gte-multilingual-base they are those of its model card: a
        token's weight is its logit, or 0 if that is larger; the largest counts if a token comes several times; special
        tokens are left out. Tokens with weight 0 are not in the dict.

        task: "query" or "document", if the sparse encoder's files tell the two apart. Queries may then need no network:
        they are cut to the length of their own tokenizer, whatever max_seq_length is. prompt, prompt_name: as in
        `encode`. max_active_dims: how many weights a text keeps, the largest ones; None: as the repository says.

        keys: "tokens" are decoded, without SentencePiece's mark for the start of a word. (The mark alone is "", and so
        is a token that the tokenizer doesn't know.) If several tokens are decoded to the same text, the largest weight
        counts. "ids" are the numbers of the tokens; none is lost.

        Raises CheckpointError for a model without such weights, OptionError for a task that the model doesn't have.
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
        """`encode_sparse` with the task "query", and with the prompt "query" if the repository has one."""
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
        """`encode_sparse` with the task "document", and with the prompt "document" if the repository has one. (Prompts
        named "passage" or "corpus" are not used: SparseEncoder doesn't use them either.)"""
        return self._encode_sparse_as("document", sentences, keys, options)

    def _encode_sparse_as(self, task: str, sentences: Any, keys: Any, kwargs: Any) -> Any:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None:
            kwargs["prompt"] = self.prompts.get(task, "")
        return self.encode_sparse(sentences, task=task, keys=keys, **kwargs)

    def _road(self, task: str | None) -> tuple[Callable[[PackedBatch], Iterable[Row | None]], dict[str, Any]]:
        """What computes the rows of such texts' batches, and the settings with which these texts are fed."""
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
    """How many weights a text keeps. Raises OptionError if `given` is neither None nor a whole number above 0."""
    return stored if given is None else whole_number("max_active_dims", given)


def to_dict(row: Row, most: int | None, decode: Callable[[int], str] | None) -> dict[Any, float]:
    """The `most` largest weights of a text as {id: weight}; with `decode`, as {token: weight}. Of ids that decode to
    the same token, the largest weight counts."""
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
    """Groups neighbouring sequences so that each group has up to `most` tokens. A longer sequence is alone in one.

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
    """(T, V) -> (B, V). For the largest weight the activation is applied later, because it rises with the logit. If a
    sequence has a logit that is not finite, its row has one here."""
    logits[:, 0] += 0 * logits.amin(1)  # NaN for -inf, which the relu or a larger logit would hide
    return _reduce(logits if road.strategy == "max" else _activate(logits.float(), road), lengths, road)


def _activate(x: Tensor, road: Splade) -> Tensor:
    x = x.relu_().log1p_()  # in place: the logits are this file's own
    return x.log1p_() if road.activation == "log1p_relu" else x


def _reduce(x: Tensor, lengths: Sequence[int], road: Splade) -> Tensor:
    """(T, V) -> (B, V), in one step per run of sequences of one length. Batches are sorted, so there are few runs."""
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


def _nonzero_later(pooled: Tensor) -> Callable[[], list[Row | None]]:
    """Starts a copy to the host: on a GPU, looking for numbers would wait for all of its work."""
    if pooled.device.type == "cpu":
        rows = _nonzero(pooled)  # at once: they take a thousandth of its memory
        return lambda: rows
    host = to_host(pooled)
    return lambda: _nonzero(host())


def _nonzero(pooled: Tensor) -> list[Row | None]:
    """(B, V), on the host -> B rows. A row that is not finite is None."""
    where = pooled.nonzero()  # NaN, too
    weights = pooled[where[:, 0], where[:, 1]]
    counts = torch.bincount(where[:, 0], minlength=len(pooled)).tolist()
    rows = zip(where[:, 1].split(counts), weights.split(counts), strict=True)
    return [row if row[1].isfinite().all() else None for row in rows]
