"""Pooling over sequences, alone and with the final norm before it and unit length after it: GB/s beside a large copy's.

python -m bench.bench_pooling [--out DIR] [--tokens 1024 8192 ...] [--check] [--smoke]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_attention import ragged
from bench.runner import Case, Options, Promise, compiled, kernel_main, packed, run_cases, split

# Written only to be faster than torch.
PROMISES = [Promise(f"base {kind}", 32768, "speedup", 1.0) for kind in ("mean", "mean norm unit")]
LENGTH, EPS = 512, 1e-5


def traffic(T: int, B: int, C: int, itemsize: int, mode: str) -> int:
    """Every token (or a sequence's first) read, fp32 vectors written."""
    return (T if mode == "mean" else B) * C * itemsize + B * C * 4


def cases(options: Options) -> Iterator[Case]:
    kinds = [("mean", False, LENGTH), ("mean", True, LENGTH), ("cls", True, LENGTH), ("mean", False, None)]
    for dtype, (name, shape) in product(options.torch_dtypes(), options.shapes("base", "large", "small").items()):
        for T in options.sizes(1024, 8192, 32768, 131072, smoke=77):
            for mode, whole, length in kinds[: 3 if options.smoke else None]:
                lengths = ragged(T) if length is None else split(T, 70 if options.smoke else length)
                case = f"{name} {mode}{' norm unit' if whole else ''}{'' if length else ' ragged'}"
                yield _case(case, lengths, shape.C, dtype, mode, whole, options)


def _case(name: str, lengths: list[int], C: int, dtype: torch.dtype, mode: str, whole: bool, options: Options) -> Case:
    """whole: the norm before it and unit length after it, too."""
    from modernbert_lite.kernels import pooling as kernel
    from modernbert_lite.ops import pooling  # not before TRITON_INTERPRET is decided

    T, batch = sum(lengths), packed(lengths, options.device)

    def make() -> tuple[Tensor, ...]:
        return tuple((torch.randn(s, device=options.device) + 0.5).to(dtype) for s in ((T, C), (C,)))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        x = pooling.cls(x, batch) if mode == "cls" else x  # only these tokens need the norm
        x = F.layer_norm(x, x.shape[-1:], weight, None, EPS) if whole else x
        pooled = pooling.mean(x, batch) if mode == "mean" else x.float()
        return F.normalize(pooled, dim=-1) if whole else pooled

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        norm = {"weight": weight, "eps": EPS, "normalize": True} if whole else {}
        return kernel.pool(x, batch.cu_seqlens, mode, **norm, check=False)

    providers = {"torch": plain, "triton": ours}
    if options.compiles(name.split()[0]) and mode == "mean" and "ragged" not in name:
        providers["torch.compile"] = compiled(plain)
    truth = functools.partial(exact, lengths=lengths, mode=mode, whole=whole)
    return Case(name, T, dtype, make, truth, providers, traffic(T, len(lengths), C, dtype.itemsize, mode))


def exact(x: Tensor, weight: Tensor, lengths: Sequence[int], mode: str, whole: bool) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], weight, None, EPS) if whole else x
    parts = [part.mean(0) if mode == "mean" else part[0] for part in x.split(list(lengths))]
    return F.normalize(torch.stack(parts), dim=-1) if whole else torch.stack(parts)


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("pooling", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("pooling", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
