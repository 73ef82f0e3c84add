"""The Triton kernels behind `ops`, on CUDA and HIP devices (or, for tests, in Triton's interpreter).

Called directly in inference; through torch.library's operators while torch.compile or torch.export traces, or where a
gradient is asked for. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import PackedBatch, constant, to_device
from ..reading import warn

NARROW = 64  # up to this length of the longest sequence all tiles are narrow
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def works(device: torch.device) -> bool:
    """Whether Triton runs on this device: it may be missing, or the C compiler that it needs. Tried once, with one
    warning if it fails; taken for granted while something traces or captures, when nothing can be tried."""
    return _can_not_try(device) or _works(device)


def _can_not_try(device: torch.device) -> bool:
    capturing = device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


@functools.cache
def _works(device: torch.device) -> bool:
    try:
        from ..kernels import geglu

        one = torch.ones(1, 1, dtype=torch.float32, device=device)
        return bool(torch.isfinite(geglu.geglu(one, one, "gelu")).all())
    except Exception as error:  # noqa: BLE001  triton raises errors of many kinds; none of them need stop the work
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warn(f"triton can't be used here ({why}); using torch, which is slower")
        return False


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton's products use them: before NVIDIA's Ampere (V100, T4) they would be done one number at a time,
    and torch's own attention is the faster one. True for AMD's cards and the interpreter."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@constant
def attention_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the attention kernel takes such heads here. Tried once, as `works` is: a card may have too little shared
    memory for it."""
    from ..kernels import attention as kernel

    if head_dim not in kernel.HEAD_DIMS or not has_matrix_units(device):
        return False
    return _can_not_try(device) or _attention_works(device, dtype, head_dim)


@functools.cache
def _attention_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    from ..kernels import attention as kernel

    qkv = torch.ones((1, 3, 1, head_dim), dtype=dtype, device=device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        return bool((kernel.attention(qkv, ends, block=kernel.block_m(1 << 20, dtype, False)) == 1).all())
    except Exception as error:  # noqa: BLE001  as in `works`
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warn(f"the attention kernel can't be used here ({why}); using torch, which is slower")
        return False


def traced(*tensors: Tensor | None) -> bool:
    """Whether an operator must stand for the kernel: for a tracer, or for a gradient."""
    return torch.compiler.is_compiling() or wants_gradient(*tensors)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> Tensor:
    from ..kernels import rope as kernel

    if traced(x):
        return kernel.rope_op(x, cos, sin, position_ids, False)
    return kernel.rope_(x, cos, sin, position_ids)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    from ..kernels import layer_norm as kernel

    if not torch.compiler.is_compiling():
        return kernel.layer_norm(x, weight, bias, eps, residual)
    if residual is not None:
        return kernel.add_layer_norm_op(x, residual, weight, bias, eps)[0]
    return kernel.layer_norm_op(x, weight, bias, eps)


def geglu(x: Tensor, act: str, swapped: bool) -> Tensor:
    """(T, 2N) -> act(first half) * second half; swapped: the other way round."""
    from ..kernels import geglu as kernel

    if traced(x):
        return kernel.geglu_op(x, act, swapped)
    activated, gate = x.chunk(2, dim=-1)[:: -1 if swapped else 1]
    return kernel.geglu(activated, gate, act)


def can_attend(qkv: Tensor) -> bool:
    """Whether the kernel takes these heads on this device."""
    return attention_works(qkv.device, qkv.dtype, qkv.shape[-1])


def attention(qkv: Tensor, batch: PackedBatch, window_size: tuple[int, int]) -> Tensor:
    from ..kernels import attention as kernel

    left, right = window_size
    block = kernel.block_m(batch.max_seqlen, qkv.dtype, left >= 0 or right >= 0)
    if traced(qkv):
        # By shape, because len() would fix a traced size.
        most = qkv.shape[0] // block + batch.cu_seqlens.shape[0] - 1
        table = kernel.device_tiles(batch.cu_seqlens, most, block)
        return kernel.attention_op(qkv, batch.cu_seqlens, table, block, left, right)
    return kernel.attention(qkv, batch.cu_seqlens, window_size, tile_table=tile_table(batch, block), block=block)


def blocks(max_seqlen: int, dtype: torch.dtype) -> set[int]:
    """Queries a tile, of all the tables that a forward pass asks for."""
    from ..kernels import attention as kernel

    return {kernel.block_m(max_seqlen, dtype, local) for local in (True, False)}


def tile_table(batch: PackedBatch, block: int) -> Tensor:
    """The batch's tiles of `block` queries, on its device: made once, from the lengths on the host."""
    from ..kernels import attention as kernel

    key = ("tiles", block)
    if key not in batch.cache:
        batch.cache[key] = to_device(kernel.tiles(batch.seqlens, block, batch.key_seqlens), batch.cu_seqlens.device)
    return batch.cache[key]


def padded_tile_table(seqlens: Sequence[int], block: int, tokens: int, count: int) -> Tensor:
    """(count, 4) on the host: the tiles of the sequences, then of the tokens up to `tokens` that no sequence has, which
    meet no key and become zeros, then empty ones."""
    from ..kernels import attention as kernel

    known = kernel.tiles(seqlens, block)
    rest = [(row, tokens, 0, 0) for row in range(sum(seqlens), tokens, block)]
    rest += [(0, 0, 0, 0)] * (count - len(known) - len(rest))
    return torch.cat([known, torch.tensor(rest, dtype=torch.int32).view(-1, 4)])


def row_attention(q: Tensor, kv: Tensor, batch: PackedBatch) -> Tensor:
    from ..kernels import attention as kernel

    if torch.compiler.is_compiling():
        return kernel.row_attention_op(q, kv, batch.cu_seqlens)
    return kernel.row_attention(q, kv, batch.cu_seqlens, check=False)


def has_varlen_attn(qkv: Tensor) -> bool:
    """Whether torch's own attention over packed sequences, which has a gradient, takes this: from torch 2.11 on (with
    windows), in 16 bits, on NVIDIA's cards from Ampere on."""
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


def varlen_attention(qkv: Tensor, batch: PackedBatch, window_size: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cu, longest = batch.cu_seqlens, batch.max_seqlen
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window_size)
    return out


def mean_pool(x: Tensor, batch: PackedBatch) -> Tensor:
    from ..kernels import pooling as kernel

    if traced(x):
        return kernel.pool_op(x, batch.cu_seqlens, "mean")
    return kernel.pool(x, batch.cu_seqlens, "mean", check=False)
