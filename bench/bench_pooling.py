"""The mean of each sequence: GB/s beside a large copy's.

python -m bench.bench_pooling [--out DIR] [--tokens 1024 8192 ...] [--check] [--smoke]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.bench_attention import ragged
from bench.runner import Case, Options, Promise, compiled, kernel_main, packed, run_cases, split

# Written only to be faster than torch.
PROMISES = [Promise("base mean", 32768, "speedup", 1.0)]
LENGTH = 512


def traffic(T: int, B: int, C: int, itemsize: int) -> int:
    """Every token read, fp32 vectors written."""
    return T * C * itemsize + B * C * 4


def cases(options: Options) -> Iterator[Case]:
    for dtype, (name, shape) in product(options.torch_dtypes(), options.shapes("base", "large", "small").items()):
        for T in options.sizes(1024, 8192, 32768, 131072, smoke=77):
            yield _case(f"{name} mean", split(T, 70 if options.smoke else LENGTH), shape.C, dtype, options)
            if not options.smoke:
                yield _case(f"{name} mean ragged", ragged(T), shape.C, dtype, options)


def _case(name: str, lengths: list[int], C: int, dtype: torch.dtype, options: Options) -> Case:
    from modernbert_lite.kernels import pooling as kernel
    from modernbert_lite.ops import pooling  # not before TRITON_INTERPRET is decided

    T, batch = sum(lengths), packed(lengths, options.device)

    def make() -> tuple[Tensor, ...]:
        return ((torch.randn((T, C), device=options.device) + 0.5).to(dtype),)

    def plain(x: Tensor) -> Tensor:
        return pooling.mean(x, batch)

    def ours(x: Tensor) -> Tensor:
        return kernel.pool(x, batch.cu_seqlens, check=False)

    providers = {"torch": plain, "triton": ours}
    if options.compiles(name.split()[0]) and "ragged" not in name:
        providers["torch.compile"] = compiled(plain)
    truth = functools.partial(exact, lengths=lengths)
    return Case(name, T, dtype, make, truth, providers, traffic(T, len(lengths), C, dtype.itemsize))


def exact(x: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([part.mean(0) for part in x.split(list(lengths))])


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("pooling", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("pooling", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
