"""GeGLU on the two halves of the projection, forward and backward: GB/s beside a large copy's.

python -m bench.bench_geglu [--out DIR] [--tokens 1024 8192 ...] [--check] [--tune] [--smoke]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.runner import Case, Launch, Options, Promise, backward, compiled, kernel_main, patched, run_cases

PROMISES = [Promise("base", 32768, "fraction", 0.85), Promise("base backward", 32768, "fraction", 0.85)]


def traffic(T: int, N: int, itemsize: int, *, back: bool = False) -> int:
    """Forward: both halves read, the product written. Backward: its gradient and both halves read, theirs written."""
    return T * (5 if back else 3) * N * itemsize


def halves(function: Callable[..., Tensor], act: str, swapped: bool, x: Tensor) -> Tensor:
    """ModernBERT activates the first half of x (T, 2N), GTE (swapped) the second."""
    activated, gate = x.chunk(2, -1)[:: -1 if swapped else 1]
    return function(activated, gate, act)


def liger(function: Any, activated: Tensor, gate: Tensor, act: str) -> Tensor:
    return function(activated, gate)  # its autograd function copies what isn't contiguous


def cases(options: Options) -> Iterator[Case]:
    from modernbert_lite.kernels import geglu as kernel
    from modernbert_lite.ops import reference as ops  # not before TRITON_INTERPRET is decided

    layouts = {
        name: (shape, "gelu", name == "gte") for name, shape in options.shapes("base", "large", "small", "gte").items()
    }
    layouts["base silu"] = (layouts["base"][0], "silu", False)
    for dtype in options.torch_dtypes():
        for name, (shape, act, swapped) in layouts.items():
            for T in options.sizes(1024, 8192, 32768, 131072, smoke=9):

                def plain(x: Tensor, act=act, swapped=swapped) -> Tensor:
                    return ops.geglu(x, act, swapped)

                ours = functools.partial(halves, kernel.geglu, act, swapped)

                def make(width=2 * shape.N, T=T, dtype=dtype):
                    return (torch.randn(T, width, device=options.device).to(dtype),)

                def make_backward(make=make, T=T, N=shape.N, dtype=dtype):
                    return *make(), torch.randn(T, N, device=options.device).to(dtype)

                def ours_backward(x: Tensor, grad: Tensor, act=act, swapped=swapped) -> Tensor:
                    activated, gate = x.chunk(2, -1)[:: -1 if swapped else 1]
                    return kernel.geglu_backward(grad, activated, gate, act, swapped=swapped)

                forwards, notes = {"torch": plain, "triton": ours}, {}
                if options.compiles(name):
                    forwards["torch.compile"] = compiled(plain)
                where = ("geglu", "LigerGELUMulFunction") if act == "gelu" else ("swiglu", "LigerSiLUMulFunction")
                if function := options.peer(f"liger_kernel.ops.{where[0]}", where[1]):
                    forwards["liger"] = functools.partial(
                        halves, functools.partial(liger, function.apply), act, swapped
                    )
                    notes["liger"] = "copies the halves" + (", tanh GELU" if act == "gelu" else "")
                # Each by autograd, from the forward pass that it would have; ours calls what its autograd calls.
                backwards = {key: backward(run) for key, run in forwards.items()} | {"triton": ours_backward}
                if options.tune:
                    forwards |= configurations(kernel, ours, "_geglu_kernel")
                    backwards |= configurations(kernel, ours_backward, "_geglu_backward_kernel")
                size = traffic(T, shape.N, dtype.itemsize)
                yield Case(name, T, dtype, make, plain, forwards, size, notes=notes)
                size = traffic(T, shape.N, dtype.itemsize, back=True)
                truth = backward(plain, once=True)
                yield Case(f"{name} backward", T, dtype, make_backward, truth, backwards, size, notes=notes)


def configurations(kernel: Any, run: Callable[..., Any], name: str) -> dict[str, Any]:
    return {
        f"BLOCK_T={t} BLOCK_N={n} warps={warps}": patched(
            run, kernel, BLOCK_T=t, BLOCK_N=n, **{name: Launch(getattr(kernel, name), num_warps=warps)}
        )
        for t in (1, 2, 4, 8, 16, 32)
        for n in (128, 256, 512, 1024)
        for warps in (4, 8)
        if 512 <= t * n <= 4096
    }


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("geglu", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("geglu", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
