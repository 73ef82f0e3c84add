"""RoPE in place on the packed projection: GB/s beside a large copy's.

python -m bench.bench_rope [--out DIR] [--tokens 1024 8192 ...] [--check] [--tune] [--smoke]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.runner import (
    Case,
    Launch,
    Options,
    Promise,
    compiled,
    dtype_name,
    kernel_main,
    packed,
    patched,
    run_cases,
    split,
)

PROMISES = [Promise("base", 32768, "fraction", 0.85)]
LENGTH = 512  # of the sequences


def traffic(T: int, H: int, D: int, itemsize: int) -> int:
    """q and k, read and written; the tables are few and stay in the cache."""
    return T * 2 * H * D * 2 * itemsize


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Out of place, in the inputs' precision but not below fp32."""
    cos, sin = (x[position_ids][:, None, None] for x in (cos, sin))
    x1, x2 = qkv[:, :2].to(cos.dtype).chunk(2, -1)
    turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(qkv.dtype)
    return torch.cat([turned, qkv[:, 2:]], 1)


def in_place(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """For torch.compile, which makes one kernel of it."""
    qkv[:, :2] = reference(qkv, cos, sin, position_ids)[:, :2]
    return qkv


def flash_attn(rotary: Any, cos: Tensor, sin: Tensor, qkv: Tensor, *_: Tensor) -> Tensor:
    """q and k as 2H heads of padded rows (every sequence is of LENGTH), in place."""
    rotary(qkv[:, :2].view(-1, LENGTH, 2 * qkv.shape[2], qkv.shape[3]), cos, sin, inplace=True)
    return qkv


def liger(rotary: Any, cos: Tensor, sin: Tensor, qkv: Tensor, *_: Tensor) -> list[Tensor]:
    q, k = (x.unflatten(0, (-1, LENGTH)).transpose(1, 2) for x in qkv[:, :2].unbind(1))  # (B, H, S, D)
    return [x.transpose(1, 2).flatten(0, 1) for x in rotary(q, k, cos, sin)]


def look(output: Any) -> list[Tensor]:
    """q, k, and v where there is one."""
    return list(output.unbind(1)) if isinstance(output, Tensor) else output


def truth(*inputs: Tensor) -> list[Tensor]:
    return look(reference(*inputs))


def truth_backward(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> list[Tensor]:
    return truth(qkv, cos, -sin, position_ids)


def cases(options: Options) -> Iterator[Case]:
    from modernbert_lite.kernels import rope as kernel
    from modernbert_lite.ops import reference as ops  # not before TRITON_INTERPRET is decided
    from modernbert_lite.ops.rope import Rope, rope_table

    def plain(x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> Tensor:
        return ops.rope(x.flatten(1, 2), 2 * x.shape[2], (cos, sin, ids)).view_as(x)

    def ours(x: Tensor, *tables: Tensor, inverse: bool = False) -> Tensor:
        return kernel.rope_(x.view(len(x), -1, x.shape[3]), *tables, heads=2 * x.shape[2], inverse=inverse).view_as(x)

    back = functools.partial(ours, inverse=True)
    for dtype in options.torch_dtypes():
        for name, shape in options.shapes("base", "large", "small").items():
            for T in options.sizes(1024, 8192, 32768, 131072, smoke=13):
                batch = packed(split(T, 5 if options.smoke else LENGTH), options.device)
                rope = Rope(10_000.0)
                positions = torch.arange(max(LENGTH, batch.max_seqlen), device=options.device)
                cos, sin = rope_table(rope, shape.D, positions)

                def make(shape=shape, dtype=dtype, T=T, cos=cos, sin=sin, ids=batch.position_ids):
                    return torch.randn(T, 3, shape.H, shape.D, device=cos.device).to(dtype), cos, sin, ids

                providers = {"torch": plain, "triton": ours}
                notes = {}
                if options.compiles(name):
                    providers["torch.compile"] = compiled(in_place)
                if name == "base" and not options.tune:
                    rows = [x[batch.position_ids].contiguous() for x in (cos, sin)]
                    providers["triton, tables by token"] = lambda x, *_, rows=rows: ours(x, *rows)
                if T % LENGTH == 0:
                    if rotary := options.peer("flash_attn.layers.rotary", "apply_rotary_emb"):
                        providers["flash-attn"] = functools.partial(flash_attn, rotary, cos.to(dtype), sin.to(dtype))
                        notes["flash-attn"] = f"padded rows, tables in {dtype_name(dtype)}"
                    if rotary := options.peer("liger_kernel.ops.rope", "LigerRopeFunction"):
                        providers["liger"] = functools.partial(
                            liger, rotary.apply, *(torch.cat([x, x], -1)[None] for x in (cos, sin))
                        )
                        notes["liger"] = "padded, copies q and k out of the projection"
                if options.tune:
                    providers |= configurations(kernel, ours)
                size = traffic(T, shape.H, shape.D, dtype.itemsize)
                yield Case(name, T, dtype, make, truth, providers, size, notes=notes, look=look)
                if name == "base" and not options.tune:  # the backward pass: the same kernel, the sine negated
                    providers = {"torch": lambda x, c, s, *p: plain(x, c, -s, *p), "triton": back}
                    yield Case(name + " backward", T, dtype, make, truth_backward, providers, size, look=look)


def configurations(kernel: Any, ours: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        f"BLOCK_T={t} BLOCK_H={h} warps={warps}": patched(
            ours, kernel, BLOCK_T=t, BLOCK_H=h, _rope_kernel=Launch(kernel._rope_kernel, num_warps=warps)
        )
        for t in (1, 2, 4, 8, 16, 32)
        for h in (4, 8, 16, 32)
        for warps in (2, 4, 8)
        if 32 <= t * h <= 256
    }


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("rope", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("rope", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
