"""Attention in packed sequences, with and without a window: TFLOP/s of visible keys, and the time over its floor.

python -m bench.bench_attention [--out DIR] [--tokens 32768] [--check] [--tune] [--smoke]

"fraction" is the floor over the time: the useful operations at a large product's rate, or q, k, v and the result at a
large copy's, whichever takes longer. Cases are named by shape, length ("ragged": lognormal), local (64, 64) or global;
"rows": the first token's query alone, as the last layer of a CLS-pooled embedder needs it. torch.compile is left out:
it would unroll the plain one's loop over lengths.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.runner import Case, Options, Promise, Shape, kernel_main, packed, run_cases, split

PROMISES = [
    # Within 1.5 x of the memory floor.
    *(Promise(f"base {length} local", 16384, "fraction", 1 / 1.5) for length in (512, 2048, 8192)),
    Promise("base 2048 global", 16384, "tflop_per_s", 350.0),
]
WINDOWS = {"local": (64, 64), "global": (-1, -1)}
LENGTHS = (512, 2048, 128, 20, 8192)  # the most telling first: time may run out


def visible(length: int, window_size: tuple[int, int]) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""

    def on_a_side(reach: int) -> int:  # the sum over i of min(i, reach)
        reach = length - 1 if reach < 0 else min(reach, length - 1)
        return reach * (reach + 1) // 2 + (length - 1 - reach) * reach

    return length + sum(on_a_side(reach) for reach in window_size) if length else 0


def flops(lengths: Sequence[int], window_size: tuple[int, int], H: int, D: int) -> int:
    """Two products of D, 2 operations each, a visible pair and head."""
    return 4 * D * H * sum(visible(n, window_size) for n in lengths)


def traffic(T: int, H: int, D: int, itemsize: int) -> int:
    """q, k and v read, the result written."""
    return T * 4 * H * D * itemsize


def row_traffic(T: int, B: int, H: int, D: int, itemsize: int) -> int:
    """k and v read; a query read and a result written a sequence."""
    return (2 * T + 2 * B) * H * D * itemsize


def ragged(T: int) -> list[int]:
    """Lognormal, median 100, sigma 0.8, from 8 to 2048, in no order: about T tokens of them."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < T:
        n = int((torch.randn(1, generator=generator) * 0.8).exp() * 100)
        lengths.append(min(max(n, 8), 2048))
    return lengths


def some_heads(output: Tensor) -> list[Tensor]:
    """The first and the last: the truth of all would not fit."""
    return [output[:, [0, -1]]]


class Bench:
    """One batch of lengths, one shape, one dtype."""

    def __init__(self, name: str, shape: Shape, lengths: list[int], dtype: torch.dtype, options: Options) -> None:
        from modernbert_lite.kernels import attention
        from modernbert_lite.ops import reference as ops  # not before TRITON_INTERPRET is decided

        self.ops, self.kernel = ops, attention
        self.name, self.shape, self.lengths, self.dtype, self.options = name, shape, lengths, dtype, options
        self.T, self.batch = sum(lengths), packed(lengths, options.device)
        self.first = self.batch.cu_seqlens[:-1].long()

    def make(self) -> tuple[Tensor]:
        return (torch.randn(self.T, 3, self.shape.H, self.shape.D, device=self.options.device).to(self.dtype),)

    def ours(
        self, window: tuple[int, int], block: int | None = None, config: dict[str, int] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The tiles are made here, as the model makes them once for all layers."""
        block = block or self.kernel.block_m(self.batch.max_seqlen, self.dtype, window != (-1, -1))
        tiles = self.kernel.tiles(self.batch.seqlens, block).to(self.options.device)
        return functools.partial(
            self.kernel.attention,
            cu_seqlens=self.batch.cu_seqlens, window_size=window, tile_table=tiles, block=block, config=config,
        )  # fmt: skip

    def plain(self, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        return self.ops.attention(qkv.flatten(1, 2), qkv.shape[2], self.batch, window)

    def truth(self, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        return self.plain(qkv[:, :, [0, -1]], window)

    def peers(self, window: tuple[int, int]) -> dict[str, Callable[[Tensor], Any]]:
        cu, longest = self.batch.cu_seqlens, self.batch.max_seqlen
        found: dict[str, Callable[[Tensor], Any]] = {}
        if varlen := self.options.peer("torch.nn.attention.varlen", "varlen_attn"):
            found["torch varlen_attn"] = lambda x: varlen(*x.unbind(1), cu, cu, longest, longest, window_size=window)
        if flash := self.options.peer("flash_attn", "flash_attn_varlen_qkvpacked_func"):
            found["flash-attn"] = lambda x: flash(x, cu, longest, window_size=window)
        if flash3 := self.options.peer("flash_attn_interface", "flash_attn_varlen_func"):
            found["flash-attn 3"] = lambda x: _first(
                flash3(*x.unbind(1), cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, window_size=window)
            )
        return found

    def case(self, kind: str, providers: dict[str, Any], truth: Callable[[Tensor], Tensor], window: Any) -> Case:
        H, D = self.shape.H, self.shape.D
        return Case(
            f"{self.name} {kind}", self.T, self.dtype, self.make, truth, providers,
            traffic(self.T, H, D, self.dtype.itemsize), flops(self.lengths, window, H, D), look=some_heads,
        )  # fmt: skip

    def attention(self, kind: str) -> Case:
        window = WINDOWS[kind]
        providers = {"torch": functools.partial(self.plain, window=window), "triton": self.ours(window)}
        providers |= self.configurations(window) if self.options.tune else self.peers(window)
        return self.case(kind, providers, functools.partial(self.truth, window=window), window)

    def configurations(self, window: tuple[int, int]) -> dict[str, Any]:
        grid = [(block, *rest) for block in (64, 128) for rest in product((64, 128), (4, 8)[: block // 64], (2, 3))]
        if self.options.smoke:
            grid = [(64, 32, 4, 2), (64, 64, 4, 2)]
        return {
            f"block={block} n={n} warps={warps} stages={stages}": self.ours(
                window, block, {"BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            )
            for block, n, warps, stages in grid
        }

    def rows(self) -> Case:
        """Inputs: qkv and the queries of the first tokens. The full one computes all rows, and takes these."""
        (H, D), B = (self.shape.H, self.shape.D), len(self.lengths)
        ours = self.ours((-1, -1))

        def make() -> tuple[Tensor, Tensor]:
            (qkv,) = self.make()
            return qkv, qkv[self.first, 0].contiguous()

        providers = {
            "torch": lambda qkv, q: self.ops.row_attention(q, qkv[:, 1:].flatten(1, 2), self.first, self.batch),
            "triton": lambda qkv, q: self.kernel.row_attention(q, qkv[:, 1:], self.batch.cu_seqlens, check=False),
            "triton, all rows": lambda qkv, q: ours(qkv)[self.first],
        }
        return Case(
            f"{self.name} rows", self.T, self.dtype, make,
            lambda qkv, q: self.truth(qkv, (-1, -1))[self.first], providers,
            row_traffic(self.T, B, H, D, self.dtype.itemsize), 4 * D * H * self.T, look=some_heads,
        )  # fmt: skip


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.torch_dtypes():
        for T in options.sizes(32768, smoke=117):
            for shape_name, shape in options.shapes("base", "large", "small").items():
                batches = {str(n): split(T, n) for n in LENGTHS} | {"ragged": ragged(T)}
                if options.smoke:
                    batches = {"97": [97, 20]}
                for name, lengths in batches.items():
                    bench = Bench(f"{shape_name} {name}", shape, lengths, dtype, options)
                    yield bench.attention("local")
                    yield bench.attention("global")
                    if options.tune:
                        continue
                    if name in ("97", "512", "2048") and shape_name == "base":
                        yield bench.rows()


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("attention", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("attention", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
