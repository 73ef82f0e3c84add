"""Texts -> vectors, as the repository's sentence-transformers files say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import PackedBatch
from .checkpoint.sentence import SIMILARITIES, USUAL_PROMPTS, Pooling, finish, on_vectors, similarity_name
from .checkpoint.sparse import TASKS, Static
from .checkpoint.weights import BUNDLED
from .models.registry import encoder_class, head_class
from .ops import pooling
from .pipeline import sparse
from .pipeline.base import Checkpoint, Pipeline, keyworded, on_host, windows
from .pipeline.inputs import Given, check_text, keeping, length, listed
from .pipeline.prompts import Prompted
from .pipeline.tokenizer import Text
from .pipeline.vectors import PRECISIONS, check_ranges, floats, no_range, quantize_embeddings
from .reading import CheckpointError, OptionError, shown, warn, whole_number

_OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class Embedder(Prompted, Pipeline):
    """An embedding model. `prompts`, `default_prompt_name`, `similarity_fn_name` and `max_seq_length` are the
    repository's own, and may be set; `dimension` is the width of its vectors before `truncate_dim`, which may be given
    to `from_pretrained`, or set, for all of them. Without a path_or_id that takes the bundled model, and says so on
    stderr.

    `sparse`: whether it has `encode_sparse`. A sparse encoder (SPLADE) has nothing else: `splade` is what its files
    say, `max_active_dims` how many weights a text keeps (None: all), and `dimension` its vocabulary's size."""

    default_model = BUNDLED
    own_options = ("truncate_dim",)
    usual_prompts = USUAL_PROMPTS

    def __init__(self, checkpoint: Checkpoint, *, truncate_dim: int | None = None, **options: Any):
        self.check(checkpoint)
        sentence = checkpoint.sentence
        if checkpoint.use not in ("Embedder", "FillMask"):
            raise checkpoint.refuse("embedding model")
        self.splade = sentence.sparse
        if sentence.pooling is None and self.splade is None:
            warn(
                f"{checkpoint.root} has no pooling files: it is not an embedding model, or lacks modules.json and "
                "1_Pooling/config.json. Its tokens are averaged, and unrelated texts will look alike"
            )
        self.sparse = checkpoint.sparse or self.splade is not None
        head = "ForMaskedLM" if self.splade else "ForTokenClassification" if checkpoint.sparse else None
        network = head_class(checkpoint.config, head) if head else encoder_class(checkpoint.config)
        super().__init__(checkpoint, network, **options)
        self.prompts = sentence.prompts or {}
        self.default_prompt_name = sentence.default_prompt_name
        self.similarity_fn_name = sentence.similarity_fn_name
        self.pooling = sentence.pooling or Pooling()
        self.normalizes = sentence.normalize
        encoder = self.model.model if self.sparse else self.model
        self.network = self.graphed(self.model, partial(_forward, encoder, self.pooling.modes))
        self.on_tokens = on_vectors(checkpoint.root, sentence.on_tokens, self.config.hidden_size, self.device)
        width = self.on_tokens[-1].out_features if self.on_tokens else self.config.hidden_size
        width *= len(self.pooling.modes)
        self.dense = on_vectors(checkpoint.root, sentence.dense, width, self.device)
        self.dimension = self.dense[-1].out_features if self.dense else width
        self.max_active_dims = self.splade.max_active_dims if self.splade else None
        self.static: dict[str, sparse.StaticWeights] = {}  # of a sparse encoder's queries that need no network
        if self.splade:
            self.dimension = self.config.vocab_size
            places = {road.folder for road in self.splade.roads if isinstance(road, Static)}
            self.static = {place: sparse.StaticWeights(checkpoint.root, checkpoint.root / place) for place in places}
        stored = None if self.splade else sentence.truncate_dim and min(sentence.truncate_dim, self.dimension)
        self.truncate_dim = stored if truncate_dim is None else truncate_dim

    @property
    def truncate_dim(self) -> int | None:
        """How many numbers of each vector are given where a call doesn't say; None: all. Setting it raises OptionError
        for anything else than None and whole numbers from 1 to `dimension`."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        if value is not None and self.splade is not None:
            raise OptionError(f"truncate_dim is {shown(value)}; a sparse encoder has max_active_dims instead")
        self._truncate_dim = self._check_dim(value)

    @property
    def max_active_dims(self) -> int | None:
        """How many weights `encode_sparse` keeps of a text where a call doesn't say, the largest; None: all. Setting it
        raises OptionError for anything else than None and whole numbers from 1."""
        return self._max_active_dims

    @max_active_dims.setter
    def max_active_dims(self, value: int | None) -> None:
        self._max_active_dims = sparse.most_active(value, None)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: "cosine", "dot", "euclidean" or "manhattan". May be set to one of them, to the
        name of sentence-transformers' function ("cos_sim"), or to a member of its enumeration; raises OptionError for
        others."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: Any) -> None:
        self._similarity_fn_name = similarity_name(value, SIMILARITIES)

    @keyworded
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        output_value: str | None = "sentence_embedding",
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | Any:
        """Vectors of texts, (N, dimension) in their order; of one string, (dimension,).

        sentences: a string, or any iterable of strings, which is read lazily in bounded memory.
        prompt: put before every text; or prompt_name, one of `prompts`; neither: the repository's default.
        normalize_embeddings: unit length (some repositories always do). truncate_dim: the first so many numbers, cut
        before normalising. precision, ranges: see `quantize_embeddings`. show_progress_bar: None shows one on a
        terminal. Raises TypeError for an item that is no string, ValueError for text that is no valid Unicode or whose
        vector is not finite; lists, arrays and the like are looked through before any work. An error that comes later
        has the finished rows, float32, as its attribute `finished`.

        output_value: "token_embeddings" gives for every text an array (tokens, hidden size), fp32: what the encoder
        gives each of its tokens, before pooling, prompt and special tokens included; see `token_offsets` for where they
        are. None gives a dict of "input_ids" and "attention_mask", (tokens,), "token_embeddings" and
        "sentence_embedding". Both are lists in the order of the texts, of one string the one, as in
        sentence-transformers, where neither normalize_embeddings nor truncate_dim changes tokens' vectors. All of them
        are held in memory.
        """
        self._check_dense()
        if output_value not in _OUTPUTS:
            raise OptionError(
                f"output_value is {shown(output_value)}; it must be one of {', '.join(map(repr, _OUTPUTS))}"
            )
        if precision not in PRECISIONS:
            raise OptionError(f"precision is {shown(precision)}; it must be one of {', '.join(PRECISIONS)}")
        if output_value != "sentence_embedding":
            if precision != "float32":
                raise OptionError(
                    f"precision is {precision!r}; with output_value={output_value!r} it must be 'float32'"
                )
            prompt = self._resolve_prompt(prompt_name, prompt)
            unit, dim = normalize_embeddings or self.normalizes, self._check_dim(truncate_dim) or self.truncate_dim
            return self._encode_tokens(sentences, prompt, output_value is None, unit, dim, show_progress_bar)
        width = self._check_dim(truncate_dim) or self.truncate_dim or self.dimension
        cut_by_range = precision in ("int8", "uint8")
        if cut_by_range and ranges is not None:
            ranges = check_ranges(ranges, width)
        texts, single = listed(sentences, "sentences")
        if cut_by_range and ranges is None and texts.checked and length(texts) == 1:
            raise no_range(precision)
        stream = self.stream(
            texts,
            prompt_name=prompt_name,
            prompt=prompt,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            show_progress_bar=show_progress_bar,
        )
        floats = _gather(stream, texts, width)
        with keeping(lambda: floats, texts):
            vectors = quantize_embeddings(floats, precision, ranges)
        return vectors[0] if single else vectors

    def encode_query(self, sentences: str | Iterable[str], **kwargs: Any) -> np.ndarray:
        """`encode` with the prompt named "query"; with none if the repository has none (the default isn't taken)."""
        return self._encode_as(("query",), sentences, kwargs)

    def encode_document(self, sentences: str | Iterable[str], **kwargs: Any) -> np.ndarray:
        """`encode` with the prompt named "document", "passage" or "corpus"; with none if the repository has none."""
        return self._encode_as(("document", "passage", "corpus"), sentences, kwargs)

    @keyworded
    def token_offsets(
        self, sentences: str | Iterable[str], *, prompt_name: str | None = None, prompt: str | None = None
    ) -> list[np.ndarray] | Any:
        """Where in each text the rows of encode(.., output_value="token_embeddings") stand: for every text an array
        (tokens, 2), int64, of characters [start, end) of the text as given, without its prompt; of one string, that
        array. Special tokens and the prompt's have (0, 0). A token over the border of both has its part of the text.

        For late chunking, embed a long text once, and average the rows whose characters lie in each chunk. Prompts and
        errors are as in `encode`; a text over max_seq_length has the offsets of what is left, whatever on_long says.
        """
        prompt = self._resolve_prompt(prompt_name, prompt)
        texts, single = listed(sentences, "sentences")
        results: list[np.ndarray] = []
        for window in windows(prompt + text for text in texts):  # the tokenizer's own results are a lot larger
            for tokens in self.tokenizer.offsets(window, len(results)):
                spans = np.array([span or (0, 0) for _, span in tokens], np.int64).reshape(-1, 2)
                results.append(np.maximum(spans - len(prompt), 0))
        return results[0] if single else results

    @keyworded
    def stream(
        self,
        sentences: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[np.ndarray]:
        """As `encode`, but yields blocks of vectors (n, dimension), fp32, in order, as they are ready."""
        self._check_dense()
        prompt = self._resolve_prompt(prompt_name, prompt)
        given, _ = listed(sentences, "sentences")
        skip = self.tokenizer.prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0
        unit = normalize_embeddings or self.normalizes
        dim = self._check_dim(truncate_dim) or self.truncate_dim

        alone = skip == 0 and self.pooling.modes in (("cls",), ("lasttoken",))  # then the network computes no other

        def forward(batch: PackedBatch) -> Tensor:
            x = self.network(batch, alone)
            if self.on_tokens:
                x = finish(x.float(), self.on_tokens, False, None)
            pooled = x.float() if alone else pooling.pool(x, batch, self.pooling.modes, skip)
            return finish(pooled, self.dense, unit, dim)

        for rows in self.run((prompt + text for text in given), forward, show_progress_bar, length(given)):
            yield torch.stack(rows).numpy()

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
    ) -> Any:
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
        if keys not in sparse.KEYS:
            raise OptionError(f"keys is {shown(keys)}; it must be one of {', '.join(sparse.KEYS)}")
        most = sparse.most_active(max_active_dims, self.max_active_dims)
        side, forward = self._side(task)
        prompt = self._resolve_prompt(prompt_name, prompt)
        given, single = listed(sentences, "sentences", lambda text, i: prompt + check_text(text, i))
        decode = None if keys == "ids" else self.tokenizer.decode

        def made(rows: list[sparse.Row]) -> list[dict[Any, float]]:
            return [sparse.to_dict(row, most, decode) for row in rows]

        results = side.rows(given, forward, show_progress_bar, made)
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
        """encode() where it gives tokens' vectors: those alone, or everything about a text. unit, dim: of its own."""
        given, single = listed(sentences, "sentences", lambda text, i: prompt + check_text(text, i))
        skip = self.tokenizer.prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0

        def forward(batch: PackedBatch) -> list[Any]:
            x = finish(self.network(batch, False).float(), self.on_tokens, False, None)
            tokens = x.cpu().split(batch.seqlens)
            checked = [row if row.isfinite().all() else None for row in tokens]
            if not everything:
                return checked
            vectors = on_host(finish(pooling.pool(x, batch, self.pooling.modes, skip), self.dense, unit, dim))
            ids = batch.input_ids.cpu().long().split(batch.seqlens)
            rows = zip(ids, checked, vectors, strict=True)
            return [row if all(part is not None for part in row) else None for row in rows]

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

        results = self.rows(given, forward, show_progress_bar, lambda rows: [result(row) for row in rows])
        return results[0] if single else results

    def encode_sparse_query(self, sentences: str | Iterable[str], **kwargs: Any) -> Any:
        """`encode_sparse` with the task "query" and the prompt of that name; with none if the repository has none."""
        return self._encode_sparse_as("query", sentences, kwargs)

    def encode_sparse_document(self, sentences: str | Iterable[str], **kwargs: Any) -> Any:
        """`encode_sparse` with the task "document" and the prompt of that name; with none if the repository has none.
        (Not with one named "passage" or "corpus": SparseEncoder doesn't take them either.)"""
        return self._encode_sparse_as("document", sentences, kwargs)

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> np.ndarray:
        """(N, D) and (M, D) -> (N, M) by `similarity_fn_name`; distances (euclidean, manhattan) are negated. One vector
        (D,) counts as (1, D), an empty list as (0, D)."""
        a, b = _matrix(embeddings1), _matrix(embeddings2)
        if a.shape[1] != b.shape[1]:
            if len(a) and len(b):
                raise ValueError(f"embeddings have {a.shape[1]} and {b.shape[1]} dimensions; they must have the same")
            return np.zeros((len(a), len(b)), np.float32)
        with torch.autocast("cpu", enabled=False):  # around this call there may be one
            if self.similarity_fn_name == "cosine":
                return (pooling.normalize(a) @ pooling.normalize(b).T).numpy()
            if self.similarity_fn_name == "dot":
                return (a @ b.T).numpy()
            return -torch.cdist(a, b, p=2.0 if self.similarity_fn_name == "euclidean" else 1.0).numpy()

    def _encode_as(self, names: tuple[str, ...], sentences: str | Iterable[str], kwargs: dict[str, Any]) -> np.ndarray:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None:
            kwargs["prompt"] = next((self.prompts[name] for name in names if name in self.prompts), "")
        return self.encode(sentences, **kwargs)

    def _encode_sparse_as(self, task: str, sentences: str | Iterable[str], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None:
            kwargs["prompt"] = self.prompts.get(task, "")
        return self.encode_sparse(sentences, task=task, **kwargs)

    def _side(self, task: str | None) -> tuple[Pipeline, Callable[[PackedBatch], list[Any]]]:
        """What feeds texts of this task, and what makes rows of their batches."""
        if task not in (*TASKS, None):
            raise OptionError(f"task is {shown(task)}; it must be one of {', '.join(TASKS)}, or None")
        if self.splade is None:
            return self, partial(sparse.token_weights, self.model, self.tokenizer.unweighted)
        road = self.splade.road(task)
        if road is None:
            has = [name for name in TASKS if self.splade.road(name)]
            raise OptionError(f"task is {task!r}, for which this model has no route; it has {has}")
        if not isinstance(road, Static):
            return self, partial(sparse.splade_weights, self.model, self.network, road)
        asking = copy.copy(self)
        asking.model = static = self.static[road.folder]
        asking.tokenizer, asking.max_seq_length, asking.typed = static.tokenizer, static.max_length, False
        return asking, static

    def _not_finite(self, text: Text, i: int) -> ValueError:
        error = super()._not_finite(text, i)
        if self.pooling.include_prompt or "max" not in self.pooling.modes:
            return error
        return ValueError(
            f"{error}; or the text has no token beside its prompt, which this model's 'max' pooling leaves out: there "
            "is no maximum of nothing"
        )

    def _check_dense(self) -> None:
        if self.splade is not None:
            raise CheckpointError(
                "this is a sparse encoder (SPLADE), without dense vectors: use Embedder.encode_sparse, "
                "encode_sparse_query or encode_sparse_document"
            )

    def _check_dim(self, dim: int | None) -> int | None:
        return None if dim is None else whole_number("truncate_dim", dim, 1, self.dimension)


def _gather(stream: Iterator[np.ndarray], given: Given, width: int) -> np.ndarray:
    """The blocks in one array that is never copied: made whole where the number of rows is sure, else grown in place.
    It has the rows that the blocks have, whatever was thought before."""
    out = np.empty((given.room, width), np.float32)
    filled = 0
    with keeping(lambda: out[:filled], given, streams=True):
        for block in stream:
            if filled + len(block) > len(out):
                out.resize((filled + len(block), width), refcheck=False)
            out[filled : filled + len(block)] = block
            filled += len(block)
    if filled < len(out):
        out.resize((filled, width), refcheck=False)
    return out


def _matrix(embeddings: Any) -> Tensor:
    """(N, D), float32; of one vector (1, D); of nothing (0, 0). Raises ValueError for more than two dimensions."""
    array = floats(embeddings, "embeddings")
    if array.ndim not in (1, 2):
        raise ValueError(f"embeddings have shape {array.shape}; it must be (N, dimension), or (dimension,) of one")
    rows = array.reshape((0, 0) if array.shape == (0,) else (-1, array.shape[-1]) if array.ndim == 1 else array.shape)
    return torch.from_numpy(np.require(rows, requirements=["W"]))  # torch warns of memory that it can't write to


def _forward(model: Any, modes: Sequence[str], batch: PackedBatch, alone: bool) -> Tensor:
    """Of every token, (T, C), or of those alone that the pooling takes, (B, C)."""
    hidden: Tensor = model(batch, pooling.rows(batch, modes) if alone else None)
    return hidden
