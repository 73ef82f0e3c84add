"""CUDA graphs for small batches. A forward pass is some 200 kernel launches. Below about 20,000 tokens, launching takes
the host longer than computing takes the card (bench/results/encode_gpu.csv). A graph launches all kernels at once.

A graph has fixed shapes, so a batch is copied into a slightly larger one: its bucket (tokens, sequences, whether any
sequence needs wide tiles). What is added changes no result: tokens that belong to no sequence, sequences without
tokens, tiles without queries.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..reading import warn
from . import gpu
from .choose import backend, wanted
from .tracing import wants_gradient

MAX_TOKENS = 32_768
MAX_GRAPHS = 96
_SWITCH = "MODERNBERT_LITE_CUDA_GRAPHS"

_capturing = threading.Lock()
Forward = Callable[..., Tensor]
Bucket = tuple[int, int, bool]  # tokens, sequences, whether any sequence needs wide tiles


def bucket_of(tokens: int, sequences: int) -> tuple[int, int]:
    """The bucket's (tokens, sequences), each at least the batch's: tokens in steps of a quarter or less, and of at
    most 512; sequences by fours.

    tokens > sequences always, so a result's length tells whether it is per token or per sequence. Where sequences are
    added, so is a token: an added sequence starts at a token that exists.

    (20, 1) -> (32, 1), (130, 3) -> (160, 4), (64, 4) -> (64, 4), (64, 3) -> (80, 4), (64, 64) -> (80, 64)
    """
    several = 1 << ((sequences - 1).bit_length() + 1) // 2 * 2
    room = max(tokens + (several > sequences), several + 1, 32)
    step = min(max(8, 1 << (room - 1).bit_length() - 3), 512)
    return -(-room // step) * step, several


_registered = [0]  # how often any module of this process got a parameter


def _count(*_: object) -> None:
    _registered[0] += 1


@functools.cache
def _watch() -> None:
    nn.modules.module.register_module_parameter_registration_hook(_count)


class Graphed:
    """Calls `forward` of a network, by replaying a CUDA graph where that is faster, elsewhere as it is.

    network: its `config` has vocab_size. Its weights may be written to or replaced (`layer.weight = ..`, `to`), its
    modules may not. Hooks don't run in a replay. forward: called with a PackedBatch and hashable arguments; it returns
    a tensor with one row per token or one row per sequence. Default: the network itself.

    A batch of up to max_tokens is captured when its bucket is seen for the second time. At most max_graphs are kept;
    they share one stream and one memory pool. When there would be more, all are dropped, and from then on a bucket must
    be seen twice as often before it is captured. Results are copies. Threads may call it; they take turns.
    MODERNBERT_LITE_CUDA_GRAPHS=0 turns it off.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Forward | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        max_graphs: int = MAX_GRAPHS,
    ):
        self.network: Any = network
        self.forward: Forward = network if forward is None else forward
        self.max_tokens, self.max_graphs = max_tokens, max_graphs
        # Walking the modules takes longer than a small forward pass, so it is done once.
        self._packed = [vars(module) for module in network.modules() if "_packed" in vars(module)]
        self._weights: list[tuple[Any, str]] = [
            (module._parameters, name)
            for module in network.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        _watch()
        self._lock = threading.Lock()
        self._failed = False
        self._sightings = 2  # how often a bucket is seen before it is captured: most never come again
        self._seen: Counter[tuple[Hashable, ...]] = Counter()
        self._graphs: dict[tuple[Hashable, ...], _Graph] = {}
        self._device: _Device | None = None
        self._mark: tuple[Hashable, ...] = ()
        self._addresses: tuple[Hashable, ...] = ()

    def _moved(self) -> bool:
        """Whether weights lie elsewhere than before. A walk over all of them takes as long as a replay, so it is done
        only if a module of this process has got a parameter (_count), or the first or last weight has moved: `to` and
        `half` move all of them, and don't tell."""
        ends = (parameters[name] for parameters, name in (self._weights[0], self._weights[-1]))
        mark = (_registered[0], *((weight.data_ptr(), weight.dtype) for weight in ends))
        if mark == self._mark:
            return False
        self._mark, before = mark, self._addresses
        still_packed = ("_packed" in layer for layer in self._packed)  # to be unpacked gives a layer a parameter
        self._addresses = (*((weight.data_ptr(), weight.dtype) for weight in self._tensors()), *still_packed)
        return self._addresses != before

    def _start_anew(self) -> None:
        """Drops all graphs at once: dropping one may free the matrix library's workspace that the others use."""
        if self._device is not None:
            self._device.synchronize()
        self._device, self._graphs = None, {}
        self._seen.clear()

    def __reduce__(self) -> Any:
        """Copies and pickles start without graphs."""
        new = functools.partial(type(self), max_tokens=self.max_tokens, max_graphs=self.max_graphs)
        return new, (self.network, None if self.forward is self.network else self.forward)

    def __call__(self, batch: PackedBatch, *arguments: Hashable) -> Tensor:
        """forward(batch, *arguments), and its errors."""
        if not self._applies(batch):
            return self.forward(batch, *arguments)
        check_batch(batch, self.network.config)  # a replay runs no Python
        with self._lock:
            if self._moved():  # other weights: a graph would read the old ones
                self._start_anew()
            graph = self._find(batch, arguments)
            if graph is not None:
                return graph(batch)
        return self.forward(batch, *arguments)

    def _tensors(self) -> Iterator[Tensor]:
        return (parameters[name] for parameters, name in self._weights)

    def _last(self) -> Tensor:
        """A weight in the dtype that layers compute in: the last one. The first one, a table, may be narrower."""
        parameters, name = self._weights[-1]
        return parameters[name]

    def _applies(self, batch: PackedBatch) -> bool:
        if self._failed or not isinstance(batch, PackedBatch) or os.environ.get(_SWITCH, "1") == "0":
            return False
        weight = self._last()
        if batch.input_ids.device != weight.device or not _can_capture(weight.device):
            return False
        if not 0 < len(batch.input_ids) <= self.max_tokens or 0 in batch.seqlens or batch.key_seqlens:
            return False
        if torch.is_autocast_enabled() or (torch.is_grad_enabled() and wants_gradient(*self._tensors())):
            return False
        # Other backends ask the host for lengths, and a replay has no host.
        takes_kernels = backend("attention", weight) == "triton"
        return takes_kernels and gpu.attention_works(weight.device, weight.dtype, self.network.config.head_dim)

    def _find(self, batch: PackedBatch, arguments: tuple[Hashable, ...]) -> _Graph | None:
        bucket = *bucket_of(len(batch.input_ids), len(batch.seqlens)), batch.max_seqlen > gpu.NARROW
        key = (*bucket, batch.token_type_ids is not None, arguments, wanted())
        if key in self._graphs:
            return self._graphs[key]
        self._seen[key] += 1
        if self._seen[key] < self._sightings:
            return None
        if len(self._graphs) >= self.max_graphs:
            self._start_anew()
            self._sightings *= 2  # more buckets than graphs: capture only what comes often
            return None
        try:
            self._device = self._device or _Device(batch.input_ids.device)
            self._graphs[key] = _Graph(
                batch, bucket, self._last(), self._device, lambda static: self.forward(static, *arguments)
            )
        except RuntimeError as error:  # also when memory runs out
            self._failed = True
            self._device, self._graphs = None, {}
            warn(f"no CUDA graphs here ({str(error).splitlines()[0]}); going on without")
        return self._graphs.get(key)


class _Device:
    """What the graphs of one Graphed share. Stream and memory pool stay together: the allocator reuses memory only on
    the stream that it was freed on."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool, self.done = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.Event()
        self.room = torch.empty(0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Waits for the graph that ran last, on whichever stream: graphs share memory."""
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def leave(self) -> None:
        self.done.record(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        self.done.synchronize()

    def room_for(self, result: Tensor) -> Tensor:
        """A block of memory for a graph's result. All graphs share it, because a replay copies its result at once: a
        block per graph would be 50 MB each. For a larger result a larger block is made. Earlier graphs keep theirs."""
        if self.room.numel() < result.nbytes:
            self.room = torch.empty(1 << (result.nbytes - 1).bit_length(), dtype=torch.uint8, device=self.device)
        return self.room[: result.nbytes].view(result.dtype).view(result.shape)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns a function that replays `run`, and the tensor that each replay fills."""
        graph = torch.cuda.CUDAGraph()
        # Not in inference mode: torch keeps tensors of its own in a graph, and writes to them in later replays.
        # _capturing: torch captures one graph at a time per process. The stream is entered here, too, because
        # torch.cuda.graph doesn't leave it if ending a capture fails.
        with _capturing, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                # This compiles kernels, and makes tables and workspaces: none of that may be in a capture.
                output = self.room_for(run())
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    output.copy_(run())
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, output


class _Graph:
    """One captured pass over a static batch of a bucket's shapes. The batch's tensors are parts of one buffer, so one
    copy fills all of them. Its lengths are not on the host: what asks for them can't be captured."""

    def __init__(self, like: PackedBatch, bucket: Bucket, weight: Tensor, device: _Device, forward: Forward):
        tokens, sequences, wide = bucket
        longest = tokens if wide else gpu.NARROW
        self.device, self.blocks = device, gpu.blocks(longest, weight.dtype)
        self.names = ["input_ids", "position_ids"] + ["token_type_ids"] * (like.token_type_ids is not None)
        # In this order each begins at a multiple of 16 bytes: Triton compiles for aligned addresses.
        shapes: dict[Any, tuple[Any, ...]] = dict.fromkeys(self.names, ("int64", tokens))
        for block in self.blocks:
            shapes["tiles", block] = "int32", tokens // block + sequences + 1, 4
        shapes["cu_seqlens"] = "int32", sequences + 1
        self.places, size = [], 0  # of each part: its name, its bytes in the buffer, its dtype and shape
        for name, (dtype, *shape) in shapes.items():
            start, size = size, size + math.prod(shape) * np.dtype(dtype).itemsize
            self.places.append((name, slice(start, size), dtype, shape))
        with torch.inference_mode(False):  # written to later, in or out of inference mode
            self.buffer = torch.zeros(size, dtype=torch.uint8, device=like.input_ids.device)
        parts = self._parts(self.buffer, torch)
        tables = {("tiles", block): parts.pop(("tiles", block)) for block in self.blocks}
        self.batch = PackedBatch(**parts, max_seqlen=longest, seqlens=(), max_id=0)
        self.batch.cache.update(tables)
        device.wait()
        self._fill(like)  # the capture runs it: on real tokens, not on what memory holds
        self.replay, self.output = device.capture(lambda: forward(self.batch))
        device.leave()

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.device.wait()
        self._fill(batch)
        self.replay()
        per_token = len(self.output) == len(self.batch.input_ids)
        result = self.output[: len(batch.input_ids) if per_token else len(batch.seqlens)].clone()
        self.device.leave()
        return result

    def _parts(self, buffer: Any, library: Any) -> dict[Any, Any]:
        """Views of the buffer, a tensor of torch or an array of numpy."""
        return {name: buffer[at].view(getattr(library, kind)).reshape(shape) for name, at, kind, shape in self.places}

    def _fill(self, batch: PackedBatch) -> None:
        """A new pinned buffer each time: the copy before may not have read its own yet. The tail of ids and positions
        is 0, which is valid, and its tokens belong to no sequence. By numpy, whose views cost less than torch's."""
        host, T, B = batch.on_host, len(batch.input_ids), len(batch.seqlens)
        staged = torch.empty(len(self.buffer), dtype=torch.uint8, device="cpu", pin_memory=self.buffer.is_cuda)
        parts = self._parts(staged.numpy(), np)
        for name in self.names:
            parts[name][:T] = getattr(host, name).numpy()
            parts[name][T:] = 0
        parts["cu_seqlens"][: B + 1] = host.cu_seqlens.numpy()
        parts["cu_seqlens"][B + 1 :] = T
        for block in self.blocks:
            gpu.fill_tiles(parts["tiles", block], batch.seqlens, block, len(parts["input_ids"]))
        self.buffer.copy_(staged, non_blocking=True)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()
