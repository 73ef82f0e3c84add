"""The GPU's twins of the operations: Triton's kernels on CUDA and HIP devices, and in tests Triton's interpreter.

In inference the kernels are called directly. While torch.compile or torch.export traces, or if a gradient is wanted,
they are called through torch.library's operators. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import PackedBatch, to_device
from ..reading import warn
from . import padded, reference
from .choose import Twins
from .rope import Turn, turn_at
from .tracing import constant, wants_gradient

NARROW = 64  # up to this length of the longest sequence all tiles are narrow


def _tried_once(possible: Callable[..., bool]) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Keeps a trial's answers. Nothing is tried where it isn't possible: the answer is no. Nothing can be tried while
    something traces or captures: the answer is yes."""

    def decorate(trial: Callable[..., bool]) -> Callable[..., bool]:
        known: dict[Any, bool] = {}

        @constant
        @functools.wraps(trial)
        def works(device: torch.device, *what: Any) -> bool:
            key = (device, *what)
            if key not in known:
                if not possible(device, *what):
                    return False
                on_card = device.type == "cuda" and torch.cuda.is_initialized()
                if torch.compiler.is_compiling() or (on_card and torch.cuda.is_current_stream_capturing()):
                    return True
                known[key] = trial(device, *what)
            return known[key]

        works.cache_clear = known.clear  # type: ignore[attr-defined]
        return works

    return decorate


@_tried_once(lambda device: True)
def works(device: torch.device) -> bool:
    """Whether Triton runs on this device. Triton may be missing, or the C compiler that it needs."""

    def run() -> Tensor:
        from ..kernels import geglu

        one = torch.ones(1, 1, dtype=torch.float32, device=device)
        return torch.isfinite(geglu.geglu(one, one, "gelu"))

    return _succeeds(run, "triton can't be used here")


def _succeeds(run: Callable[[], Tensor], trouble: str) -> bool:
    """Whether `run` ends, and gives only True. If it fails, a warning tells the trouble."""
    try:
        return bool(run().all())
    except Exception as error:  # noqa: BLE001  triton raises errors of many kinds; none of them need stop the work
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warn(f"{trouble} ({why}); using torch, which is slower")
        return False


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton's products use matrix units. Before NVIDIA's Ampere (V100, T4) they don't, and torch's own
    attention is faster. True for AMD's cards and for the interpreter."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _attention_pays(device: torch.device, _: torch.dtype, head_dim: int) -> bool:
    from ..kernels.attention import HEAD_DIMS

    return head_dim in HEAD_DIMS and has_matrix_units(device)


@_tried_once(_attention_pays)
def attention_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the attention kernel pays, and runs: a card may have too little shared memory for heads of this size."""
    from ..kernels import attention as kernel

    def run() -> Tensor:
        qkv = torch.ones((1, 3, 1, head_dim), dtype=dtype, device=device)
        ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
        return kernel.attention(qkv, ends, block=kernel.block_m(1 << 20, dtype, False)) == 1

    return _succeeds(run, "the attention kernel can't be used here")


def traced(*tensors: Tensor | None) -> bool:
    """Whether to call torch.library's operator, not the bare kernel: while torch.compile traces, or for a gradient."""
    return torch.compiler.is_compiling() or wants_gradient(*tensors)


# ---- the twins: None for what they don't do ----


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor | None:
    """The residual is added inside the matrix product, and the sum is rounded once. In 16 bits this saves 4 bytes of
    traffic per number: an addition after the product would write the product and read it again."""
    if residual is None or bias is not None or not x.is_cuda or not x.dtype == weight.dtype == residual.dtype:
        return None
    if torch.is_autocast_enabled() or wants_gradient(x, weight, residual):
        return None
    return residual.addmm_(x, weight.t())


def to_float8(x: Tensor) -> tuple[Tensor, Tensor] | None:
    if not _fits_a_program(x) or not works(x.device):
        return None
    from ..kernels import float8 as kernel

    return kernel.quantize(x, check=_vast(x))


def geglu(x: Tensor, act: str, swapped: bool = False) -> Tensor | None:
    from ..kernels import geglu as kernel

    if act not in ("gelu", "silu") or not works(x.device):
        return None
    if traced(x):
        return kernel.geglu_op(x, act, swapped)
    activated, gate = x.chunk(2, dim=-1)[:: -1 if swapped else 1]
    return kernel.geglu(activated, gate, act, check=_vast(x))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | None:
    """With a gradient, torch's own norm is used."""
    if not _fits_a_program(x) or not works(x.device):
        return None
    if wants_gradient(x, weight, bias, residual) or torch.is_autocast_enabled():
        return None
    from ..kernels import layer_norm as kernel

    if not torch.compiler.is_compiling():
        return kernel.layer_norm(x, weight, bias, eps, residual, check=_vast(x) or x.dtype != weight.dtype)
    if residual is not None:
        return kernel.add_layer_norm_op(x, residual, weight, bias, eps)[0]
    return kernel.layer_norm_op(x, weight, bias, eps)


def _vast(x: Tensor) -> bool:
    """Whether the kernels must look at their arguments: they refuse 2^31 numbers. A model's own shapes are right."""
    return x.numel() >= 1 << 30


def _fits_a_program(x: Tensor) -> bool:
    """(T, C) with contiguous rows, no wider than one Triton program can hold."""
    return x.dim() == 2 and x.stride(1) == 1 and x.shape[1] <= 8192


def rope(x: Tensor, heads: int, turn: Turn) -> Tensor | None:
    if not works(x.device):
        return None
    from ..kernels import rope as kernel

    if traced(x):
        return kernel.rope_op(x, *turn, False, heads)
    return kernel.rope_(x, *turn, heads=heads, check=_vast(x))


def attention(
    qkv: Tensor,
    heads: int,
    batch: PackedBatch,
    window_size: tuple[int, int] = (-1, -1),
    turn: Turn | None = None,
    coarse: bool = False,
) -> Tensor | None:
    """By the kernel; with a gradient, or where the kernel doesn't run, by torch's varlen_attn if that takes qkv, else
    padded, if texts are short."""
    whole = batch.key_seqlens is None
    if can_attend(qkv) and not wants_gradient(qkv) and (whole or not torch.compiler.is_compiling()):
        attend: Callable[..., Tensor | None] = _kernel_attention
    elif whole and batch.max_seqlen > 0 and has_varlen_attn(qkv):
        attend = _varlen_attention
    elif torch.compiler.is_compiling():
        return None
    else:
        attend = padded.attention
    if turn is not None:
        qkv = reference.rope(qkv, (heads + qkv.shape[1]) // 2, turn)
    return attend(qkv, heads, batch, window_size)


def can_attend(qkv: Tensor) -> bool:
    """Whether the kernel takes heads of this size on this device."""
    return works(qkv.device) and attention_works(qkv.device, qkv.dtype, qkv.shape[-1])


def _kernel_attention(qkv: Tensor, heads: int, batch: PackedBatch, window_size: tuple[int, int]) -> Tensor:
    from ..kernels import attention as kernel

    left, right = window_size
    block = kernel.block_m(batch.max_seqlen, qkv.dtype, left >= 0 or right >= 0)
    if traced(qkv):
        # shape[0], because len() would make a traced size a constant.
        most = qkv.shape[0] // block + batch.cu_seqlens.shape[0] - 1
        table = kernel.device_tiles(batch.cu_seqlens, most, block)
        return kernel.attention_op(qkv, batch.cu_seqlens, table, block, left, right, heads)
    table = tile_table(batch, block)
    return kernel.attention(
        qkv, batch.cu_seqlens, window_size, heads=heads, tile_table=table, block=block, check=_vast(qkv)
    )


def row_attention(q: Tensor, kv: Tensor, rows: Tensor, batch: PackedBatch, turn: Turn | None = None) -> Tensor | None:
    if batch.key_seqlens is not None or not can_attend(q) or wants_gradient(q, kv):
        return None
    from ..kernels import attention as kernel

    reference.refuse_empty(batch)
    if turn is not None:
        q = reference.rope(q, q.shape[1], turn_at(turn, rows))
        kv = reference.rope(kv, kv.shape[1] // 2, turn)
    if torch.compiler.is_compiling():
        return kernel.row_attention_op(q, kv, batch.cu_seqlens)
    return kernel.row_attention(q, kv, batch.cu_seqlens, check=False)


def mean_pool(x: Tensor, batch: PackedBatch) -> Tensor | None:
    if not _fits_a_program(x) or not works(x.device) or wants_gradient(x):
        return None
    from ..kernels import pooling as kernel

    if torch.compiler.is_compiling():
        return kernel.pool_op(x, batch.cu_seqlens)
    return kernel.pool(x, batch.cu_seqlens, check=False)


TWINS: Twins = {
    "linear": linear,
    "to_float8": to_float8,
    "geglu": geglu,
    "layer_norm": layer_norm,
    "rope": rope,
    "attention": attention,
    "row_attention": row_attention,
    "mean_pool": mean_pool,
}
TRITON = tuple(name for name in TWINS if name != "linear")  # what `choose.backend` calls by its name


# ---- tiles, and what works here ----


def blocks(max_seqlen: int, dtype: torch.dtype) -> set[int]:
    """Queries per tile, for each table of tiles that a forward pass asks for."""
    from ..kernels import attention as kernel

    return {kernel.block_m(max_seqlen, dtype, local) for local in (True, False)}


def tile_table(batch: PackedBatch, block: int) -> Tensor:
    """The batch's tiles of `block` queries, on its device. They are made once, from the lengths on the host."""
    from ..kernels import attention as kernel

    key = ("tiles", block)
    if key not in batch.cache:
        batch.cache[key] = to_device(kernel.tiles(batch.seqlens, block, batch.key_seqlens), batch.cu_seqlens.device)
    return batch.cache[key]


def fill_tiles(table: np.ndarray, seqlens: Sequence[int], block: int, tokens: int) -> None:
    """Writes to a table (n, 4) on the host: the tiles of the sequences, then those of the tokens up to `tokens` that
    belong to no sequence, which see no key and become zeros, then empty ones."""
    from ..kernels import attention as kernel

    own = kernel.tiles(seqlens, block).numpy()
    table[: len(own)] = own
    rest, starts = table[len(own) :], range(sum(seqlens), tokens, block)
    rest[:] = 0
    rest[: len(starts), 0] = starts
    rest[: len(starts), 1] = tokens


def has_varlen_attn(qkv: Tensor) -> bool:
    """Whether torch's own attention over packed sequences, which has a gradient, takes this: from torch 2.11 on (where
    windows came), in 16 bits, on NVIDIA's cards from Ampere on."""
    return (
        qkv.is_cuda
        and qkv.dtype in (torch.bfloat16, torch.float16)
        and qkv.shape[-1] % 8 == 0
        and qkv.shape[-1] <= 256
        and torch.version.hip is None
        and has_matrix_units(qkv.device)
        and torch_has_varlen_attn()
    )


@constant
def torch_has_varlen_attn() -> bool:
    return _find_varlen_attn()


@functools.cache
def _find_varlen_attn() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def _varlen_attention(qkv: Tensor, heads: int, batch: PackedBatch, window_size: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.split([heads, shared, shared], 1)
    if heads != shared:
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    cu, longest = batch.cu_seqlens, batch.max_seqlen
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window_size)  # type: ignore[return-value]
