"""Texts to vectors, as the repository's sentence-transformers files say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from .batch import PackedBatch
from .checkpoint.dense import finish, on_vectors
from .checkpoint.hub import BUNDLED
from .checkpoint.open import Checkpoint
from .checkpoint.sentence import SIMILARITIES, USUAL_PROMPTS, Pooling, similarity_name
from .checkpoint.sparse import Static
from .models.registry import encoder_class, head_class
from .ops import pooling
from .pipeline import sparse
from .pipeline.inputs import Given, keeping, length, listed
from .pipeline.keywords import keyworded
from .pipeline.tokenizer import Text
from .pipeline.tokens import TextOutput, TokenVectors, as_they_are, check_ids
from .pipeline.vectors import check_ranges, floats, no_range, quantize_embeddings
from .reading import PRECISIONS, CheckpointError, OptionError, one_of, shown, warn, whole_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = TypeVar("P", bound="Embedder")
_OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class Options(TypedDict, total=False):
    """Options of `encode`."""

    prompt_name: str | None
    prompt: str | None
    normalize_embeddings: bool
    truncate_dim: int | None
    precision: str
    ranges: np.ndarray | None
    show_progress_bar: bool | None


class Embedder(TokenVectors):
    """An embedding model. `prompts`, `default_prompt_name`, `similarity_fn_name` and `max_seq_length` are the
    repository's own, and may be set. `dimension` is the width of its vectors before cutting; `truncate_dim` cuts them,
    and may be given to `from_pretrained` or set later. Without a path_or_id it is the bundled model.

    `sparse`: whether the model has `encode_sparse`. A sparse encoder (SPLADE) has no other way to encode: `splade` is
    what its files say, `max_active_dims` how many weights a text keeps (None: all), `dimension` the vocabulary's size.
    """

    opens, default_model = "embedding model", BUNDLED
    usual_prompts = USUAL_PROMPTS

    @classmethod
    @keyworded
    def from_pretrained(
        cls: type[P],
        path_or_id: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        max_seq_length: int | None = None,
        batch_tokens: int | None = None,
        threads: int | None = None,
        on_long: str = "truncate",
        cuda_graphs: bool = True,
        truncate_dim: int | None = None,
    ) -> P:
        """As in every class. truncate_dim: how many numbers of each vector are given, instead of what files say."""
        return cls._open(locals())

    def __init__(self, checkpoint: Checkpoint, *, truncate_dim: int | None = None, **options: Any):
        self.check(checkpoint)
        sentence = checkpoint.sentence
        if checkpoint.use not in ("Embedder", "FillMask"):
            raise checkpoint.refuse(self.opens)
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
        self.forward = self.graphed(self.network, partial(_forward, self.encoder, self.pooling.modes))
        self.on_tokens = on_vectors(checkpoint.files, sentence.on_tokens, self.config.hidden_size, self.device)
        width = self.on_tokens[-1].out_features if self.on_tokens else self.config.hidden_size
        width *= len(self.pooling.modes)
        self.dense = on_vectors(checkpoint.files, sentence.dense, width, self.device)
        width = self.dense[-1].out_features if self.dense else width
        self.dimension = self.config.vocab_size if self.splade else width
        self.max_active_dims = self.splade.max_active_dims if self.splade else None
        self.static: dict[str, sparse.StaticWeights] = {}  # of a sparse encoder's queries that need no network
        if self.splade:
            places = {road.folder for road in self.splade.roads if isinstance(road, Static)}
            self.static = {place: sparse.StaticWeights(checkpoint.files, checkpoint.root / place) for place in places}
        stored = None if self.splade else sentence.truncate_dim and min(sentence.truncate_dim, self.dimension)
        self.truncate_dim = stored if truncate_dim is None else truncate_dim

    @property
    def truncate_dim(self) -> int | None:
        """How many numbers of each vector are given, if a call doesn't say. None: all. Raises OptionError if set to
        anything but None or a whole number from 1 to `dimension`."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        if value is not None and self.splade is not None:
            raise OptionError(f"truncate_dim is {shown(value)}; a sparse encoder has max_active_dims instead")
        self._truncate_dim = self._check_dim(value)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: "cosine", "dot", "euclidean" or "manhattan". May also be set to the name of
        sentence-transformers' function ("cos_sim") or to a member of its enumeration. OptionError for others."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: Any) -> None:
        self._similarity_fn_name = similarity_name(value, SIMILARITIES)

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        output_value: Literal["sentence_embedding"] = ...,
        **options: Unpack[Options],
    ) -> np.ndarray: ...
    @overload
    def encode(  # type: ignore[overload-overlap]
        self, sentences: str, *, output_value: Literal["token_embeddings"], **options: Unpack[Options]
    ) -> np.ndarray: ...
    @overload
    def encode(
        self, sentences: Iterable[str], *, output_value: Literal["token_embeddings"], **options: Unpack[Options]
    ) -> list[np.ndarray]: ...
    @overload
    def encode(  # type: ignore[overload-overlap]
        self, sentences: str, *, output_value: None, **options: Unpack[Options]
    ) -> TextOutput: ...
    @overload
    def encode(
        self, sentences: Iterable[str], *, output_value: None, **options: Unpack[Options]
    ) -> list[TextOutput]: ...
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
    ) -> np.ndarray | list[np.ndarray] | TextOutput | list[TextOutput]:
        """Vectors of texts: (N, dimension) in the order of the texts, or (dimension,) for one string.

        sentences: a string, or any iterable of strings, which is read lazily in bounded memory. prompt: a text that is
        put before every text. prompt_name: one of `prompts`. If neither is given, the repository's default prompt is
        used. normalize_embeddings: vectors of unit length (some repositories always give those). truncate_dim: keeps
        the first numbers of each vector, before normalising. precision, ranges: see `quantize_embeddings`.
        show_progress_bar: None shows a bar if stderr is a terminal.

        Raises TypeError for an item that is no string, ValueError for a text that is no valid Unicode or whose vector
        is not finite. Lists, arrays and the like are checked before any work. A later error has the finished rows,
        float32, as its attribute `finished`.

        output_value: "token_embeddings" gives an array (tokens, hidden size), fp32, for every text: the encoder's
        vector of each token, before pooling, with prompt and special tokens. `token_offsets` says where each token
        stands. None gives a dict for every text: "input_ids" and "attention_mask" (tokens,), "token_embeddings" and
        "sentence_embedding". Both come as a list in the order of the texts; for one string, as its one item. As in
        sentence-transformers, normalize_embeddings and truncate_dim don't change the vectors of tokens. All results are
        held in memory.
        """
        self._check_dense()
        one_of("output_value", output_value, _OUTPUTS)
        one_of("precision", precision, PRECISIONS)
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

    def encode_query(self, sentences: str | Iterable[str], **options: Unpack[Options]) -> np.ndarray:
        """`encode` with the prompt named "query". Without such a prompt, none is used (not the default one either)."""
        return self._encode_as(("query",), sentences, options)

    def encode_document(self, sentences: str | Iterable[str], **options: Unpack[Options]) -> np.ndarray:
        """`encode` with the prompt named "document", "passage" or "corpus". Without such a prompt, none is used."""
        return self._encode_as(("document", "passage", "corpus"), sentences, options)

    @keyworded
    def encode_ids(
        self,
        sequences: Iterable[Sequence[int]],
        *,
        prompt_tokens: int = 0,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Vectors of texts that are token ids already: (N, dimension) in their order. It is for a server or a trainer,
        which has the ids. `encode(texts)` gives the same as `encode_ids(token_ids(texts))`.

        sequences: lists, arrays or tensors of ids, with the special tokens that the model was trained with.
        prompt_tokens: how many of the first ids of each sequence belong to a prompt, for models whose pooling leaves
        prompts out. The other options are as in `encode`. Raises TypeError for what is no sequence of whole numbers.
        Raises ValueError for an empty sequence, for one over max_seq_length, and for ids outside the vocabulary.
        """
        self._check_dense()
        size, most = self.config.vocab_size, self.max_seq_length
        given, _ = listed(
            sequences, "sequences", lambda ids, i: check_ids(ids, i, size, most), "an iterable of lists of token ids", 2
        )
        skip = 0 if self.pooling.include_prompt else whole_number("prompt_tokens", prompt_tokens, 0)
        unit, dim = normalize_embeddings or self.normalizes, self._check_dim(truncate_dim) or self.truncate_dim
        blocks = self.run(given, self._pooled(skip, unit, dim), show_progress_bar, length(given), encode=as_they_are)
        return _gather((torch.stack(rows).numpy() for rows in blocks), given, dim or self.dimension)

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
        """As `encode`, but yields blocks of vectors (n, dimension), fp32, in order, as soon as they are ready."""
        self._check_dense()
        prompt = self._resolve_prompt(prompt_name, prompt)
        given, _ = listed(sentences, "sentences")
        skip = self.tokenizer.prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0
        unit = normalize_embeddings or self.normalizes
        dim = self._check_dim(truncate_dim) or self.truncate_dim

        compute = self._pooled(skip, unit, dim)
        for rows in self.run((prompt + text for text in given), compute, show_progress_bar, length(given)):
            yield torch.stack(rows).numpy()

    def _pooled(self, skip: int, unit: bool, dim: int | None) -> Callable[[PackedBatch], Tensor]:
        """The function that makes vectors of a batch. skip: how many tokens of each sequence are not pooled."""
        alone = skip == 0 and self.pooling.modes in (("cls",), ("lasttoken",))  # then the network computes no other

        def compute(batch: PackedBatch) -> Tensor:
            x = self.forward(batch, alone)
            if self.on_tokens:
                x = finish(x.float(), self.on_tokens, False, None)
            pooled = x.float() if alone else pooling.pool(x, batch, self.pooling.modes, skip)
            return finish(pooled, self.dense, unit, dim)

        return compute

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> np.ndarray:
        """(N, D) and (M, D) -> (N, M), by `similarity_fn_name`. Distances (euclidean, manhattan) are negated. One
        vector (D,) counts as (1, D), an empty list as (0, D)."""
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

    def _encode_as(self, names: tuple[str, ...], sentences: str | Iterable[str], kwargs: Any) -> np.ndarray:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None:
            kwargs["prompt"] = next((self.prompts[name] for name in names if name in self.prompts), "")
        return self.encode(sentences, **kwargs)

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
    """The blocks in one array, without a copy of the whole. If the number of rows is known, the array is made whole;
    else it grows in place. The result has as many rows as the blocks have, whatever number was told before."""
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
    """(N, D), float32; (1, D) of one vector, (0, 0) of nothing. Raises ValueError for more than two dimensions."""
    array = floats(embeddings, "embeddings")
    if array.ndim not in (1, 2):
        raise ValueError(f"embeddings have shape {array.shape}; it must be (N, dimension), or (dimension,) of one")
    rows = array.reshape((0, 0) if array.shape == (0,) else (-1, array.shape[-1]) if array.ndim == 1 else array.shape)
    return torch.from_numpy(np.require(rows, requirements=["W"]))  # torch warns of memory that it can't write to


def _forward(model: Any, modes: Sequence[str], batch: PackedBatch, alone: bool) -> Tensor:
    """Vectors of all tokens, (T, C). alone: if the pooling takes one token per sequence, only of those, (B, C)."""
    hidden: Tensor = model(batch, pooling.rows(batch, modes) if alone else None)
    return hidden
