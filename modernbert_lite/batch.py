"""Packed batches: sequences end to end, without padding. Padded tensors exist only at this file's edge."""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# The most tokens in a batch, by default: a GPU needs many to be busy, a CPU keeps few in its caches.
GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 32_768, 4_096
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class PackedBatch:
    """B sequences end to end. `pack` builds it. Every layer takes the whole object, so no layer can forget a part.

    seqlens [5, 7, 2] -> cu_seqlens [0, 5, 12, 14], max_seqlen 7, position_ids [0..4, 0..6, 0, 1], T = 14
    """

    input_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int32, where each sequence starts and the last one ends
    max_seqlen: int
    position_ids: Tensor  # (T,) int64, from 0 in each sequence: 0, 1, .. to its length - 1
    seqlens: tuple[int, ...]  # the lengths on the host: asking the device for them would wait for it
    max_id: int  # the largest id, on the host for the same reason (-1 if T is 0)
    token_type_ids: Tensor | None = None  # (T,) int64, of tokenizers that tell a pair's texts apart; None: all 0
    max_type: int = 0
    # How many leading tokens of each sequence can be seen. The tokens after them (padding of ColBERT queries) see, but
    # are not seen. None: all tokens can be seen.
    key_seqlens: tuple[int, ...] | None = None
    # What operations derive from the batch, once for all layers. `to` and `replace` make a batch with an empty cache.
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _host: PackedBatch | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def on_host(self) -> PackedBatch:
        """The same batch on the host. If it came from there, nothing is read back from the device."""
        if self.input_ids.device.type == "cpu":
            return self
        return self.to("cpu") if self._host is None else self._host

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved = replace(
            self,
            input_ids=to_device(self.input_ids, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
            position_ids=to_device(self.position_ids, device),
            token_type_ids=None if self.token_type_ids is None else to_device(self.token_type_ids, device),
        )
        object.__setattr__(moved, "_host", self if self.input_ids.device.type == "cpu" else self._host)
        return moved


class Limits(Protocol):
    """What a network's config says about the batches that it takes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def type_vocab_size(self) -> int:
        """Rows of the table of token types. With 0 or 1, the types of a batch are ignored."""

    @property
    def max_positions(self) -> int | None:
        """Rows of the table of positions; None: there is no such table."""


def check_batch(batch: PackedBatch, limits: Limits, rows: Tensor | None = None) -> None:
    """Raises TypeError for what is no batch; ValueError for ids outside the tables, and unless `rows` are one per
    text."""
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"the network takes a PackedBatch, not {type(batch).__name__}: see pack and from_padded")
    if batch.max_id >= limits.vocab_size:
        raise ValueError(
            f"token id {batch.max_id} is outside the vocabulary (ids 0 to {limits.vocab_size - 1}); "
            "was the text tokenized for another model?"
        )
    types, positions = limits.type_vocab_size, limits.max_positions
    if types > 1 and batch.max_type >= types:
        raise ValueError(f"token type {batch.max_type} is outside the model's table (types 0 to {types - 1})")
    if positions is not None and any(n > positions for n in batch.seqlens):
        longest = max(batch.seqlens)
        raise ValueError(f"a sequence has {longest} tokens; this model's table of positions has {positions}")
    if rows is not None and rows.shape != (batch.cu_seqlens.shape[0] - 1,):
        raise ValueError(f"rows is {tuple(rows.shape)}; it must be ({batch.cu_seqlens.shape[0] - 1},): one a sequence")


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copies to a GPU without waiting, from pinned memory: copies of other memory wait for the device's work first."""
    to_gpu = torch.device(device).type == "cuda"
    if to_gpu and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=to_gpu)  # towards the host it must wait: the caller reads at once


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host. What it returns waits for that copy alone, and gives the tensor: the device may go on
    with other work meanwhile."""
    if x.device.type != "cuda":
        return x.cpu
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


def pack(
    sequences: Iterable[Sequence[int] | np.ndarray | Tensor],
    device: torch.device | str | None = None,
    token_type_ids: Iterable[Sequence[int] | np.ndarray | Tensor] | None = None,
) -> PackedBatch:
    """Sequences of token ids -> one PackedBatch. A sequence is a list, or a 1-D integer tensor or array; it may be
    empty. token_type_ids: of the same lengths, for models that tell the two texts of a pair apart.

    Raises ValueError, naming the sequence, for ids that are negative or no whole numbers, and for other lengths.
    """
    ids, seqlens, high = _join(sequences, "sequence", "id")
    types, high_type = None, 0
    if token_type_ids is not None:
        types, lengths_of_types, high_type = _join(token_type_ids, "token_type_ids of sequence", "type")
        if lengths_of_types != seqlens:
            told = f"token_type_ids have the lengths {reprlib.repr(lengths_of_types)}, the sequences "
            raise ValueError(told + reprlib.repr(seqlens))
    starts = np.array([0, *accumulate(seqlens)], np.int64)
    places = np.arange(len(ids)) - np.repeat(starts[:-1], seqlens)
    cu_seqlens, position_ids = (torch.from_numpy(x).to(ids.device) for x in (starts.astype(np.int32), places))
    batch = PackedBatch(ids, cu_seqlens, max(seqlens, default=0), position_ids, seqlens, high, types, max(high_type, 0))
    return batch if device is None else batch.to(device)


def _join_lists(sequences: list[Any]) -> tuple[Tensor, tuple[int, ...], int] | None:
    """`_join` of lists, a tokenizer's result, through one array. None for anything else, and for what is no id."""
    joined = array("q")
    try:
        for sequence in sequences:
            if type(sequence) is not list or (sequence and type(sequence[0]) is bool):
                return None
            joined.fromlist(sequence)
    except (TypeError, OverflowError):
        return None
    ids = np.frombuffer(joined, np.int64) if joined else np.empty(0, np.int64)
    if len(ids) and ids.min() < 0:
        return None
    return torch.from_numpy(ids), tuple(map(len, sequences)), int(ids.max(initial=-1))


def _join(
    sequences: Iterable[Sequence[int] | np.ndarray | Tensor], name: str, kind: str
) -> tuple[Tensor, tuple[int, ...], int]:
    """The sequences end to end, (T,) int64; their lengths; the largest number (-1 if T is 0)."""
    sequences = list(sequences)
    lists = _join_lists(sequences)
    if lists is not None:
        return lists
    parts = []
    for i, sequence in enumerate(sequences):
        if isinstance(sequence, np.ndarray) and sequence.dtype.kind in "iu":  # of any size, byte order, read-only too
            sequence = sequence.astype(np.int64)
        try:
            part = torch.as_tensor(sequence, device=None if isinstance(sequence, Tensor) else "cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{name} {i} is no list of token {kind}s (whole numbers): {error}") from None
        if part.dim() != 1 or (part.numel() and part.dtype not in _ID_DTYPES):
            raise ValueError(
                f"{name} {i} has shape {tuple(part.shape)} and dtype {part.dtype}; "
                f"each sequence must be one-dimensional token {kind}s (whole numbers)"
            )
        parts.append(part.to(torch.int64))
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")
    low, high = (int(v) for v in ids.aminmax()) if len(ids) else (0, -1)
    if low < 0:
        bad = next(i for i, part in enumerate(parts) if len(part) and int(part.min()) < 0)
        raise ValueError(f"{name} {bad} holds the token {kind} {int(parts[bad].min())}; {kind}s start at 0")
    return ids, tuple(len(part) for part in parts), high


def unpack(tensor: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """(T, ...) -> B views of (seqlen, ...), one per sequence."""
    return list(tensor.split(cu_seqlens.diff().tolist()))


def from_padded(
    input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> PackedBatch:
    """(B, S) ids and a (B, S) mask of 0 and 1 (None: all 1) -> PackedBatch. Padding may be on either side.
    token_type_ids (B, S): for models that tell the two texts of a pair apart.

    Position 0 of a row is its first real token, also where the padding is on the left.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    types = input_ids if token_type_ids is None else token_type_ids
    if input_ids.dim() != 2 or not mask.shape == types.shape == input_ids.shape:
        others = f"attention_mask {tuple(mask.shape)}"
        others += "" if token_type_ids is None else f", token_type_ids {tuple(types.shape)}"
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)} and {others}; all must be (B, S)")
    mask = mask.bool()
    # A hole would shift the positions of the tokens after it, and so RoPE and the local window.
    edges = mask.int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1, dtype=torch.int32))
    holes = ((edges == 1).sum(1) > 1).nonzero()
    if len(holes):
        raise ValueError(f"row {int(holes[0])} of attention_mask has a hole; real tokens must be next to each other")
    kept = [[row[keep] for row, keep in zip(x, mask, strict=True)] for x in (input_ids, types)]
    return pack(kept[0], input_ids.device, None if token_type_ids is None else kept[1])


def to_padded(tensor: Tensor, attention_mask: Tensor, value: float = 0.0) -> Tensor:
    """(T, ...) in the order of `from_padded` -> (B, S, ...), with `value` where attention_mask is 0."""
    mask = attention_mask.bool()
    if int(mask.sum()) != len(tensor):
        raise ValueError(f"attention_mask has {int(mask.sum())} real tokens, the packed tensor {len(tensor)}")
    out = tensor.new_full((*mask.shape, *tensor.shape[1:]), value)
    out[mask] = tensor
    return out


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups indices of sequences, longest first, at most `max_tokens` per group. A longer sequence is alone in one.

    lengths [3, 9, 4, 2], max_tokens 8 -> [[1], [2, 0], [3]]
    """
    if max_tokens < 1:
        raise ValueError(f"batch_tokens is {max_tokens}; it must be at least 1")
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not groups or lengths[i] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= lengths[i]
    return groups
