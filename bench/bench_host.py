"""The host's side of the CUDA path, measured on any machine: what Python does for a forward pass while a card computes.

    python -m bench.bench_host            # the base shape; seconds; no card is used, also where there is one
    python -m bench.bench_host --check    # exits with 1 if a time is over what is promised
    python -m bench.bench_host --smoke    # a small shape; writes nothing, unless --out says where

Tensors are on torch's meta device: they have shapes and no numbers. Triton compiles the kernels for an H100 and is told
of a card that isn't there, so that a launch ends where the driver would take over. Matrix products give empty tensors.
So the times hold what this library and Triton do, and neither the driver's part of a launch (about 3 us) nor torch's
part of a product (about 6 us each). A replay of a graph does nothing: what fills its batch is measured.

`ms` is the least of many times, `median_ms` their median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import modernbert_lite as ml
from bench import records

LENGTHS = {"forward": [512] * 32, "query": [20]}
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "smoke": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"vocab_size": 512},
}
PROMISED_MS = {"forward": 2.5, "query": 2.5, "pack": 0.5, "forward, replayed": 0.15, "query, replayed": 0.06}
Row = dict[str, str]


class Card:
    """A driver for Triton of a card that isn't there ("sm_90", "gfx942"). `calls` holds what it was asked to launch."""

    def __init__(self, target: str = "sm_90") -> None:
        from triton.backends.compiler import GPUTarget

        amd, self.name = target.startswith("gfx"), target
        self.target = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        self.calls: list[tuple[Any, ...]] = []

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.name  # what compiled kernels are kept by

    def get_current_stream(self, device: int) -> int:
        return 7  # any number, but one that a launch can't hold by chance

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def install(self) -> None:
        """For the rest of the process. Raises RuntimeError where kernels are interpreted, which is decided once."""
        import triton
        from triton.compiler.compiler import CompiledKernel

        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("TRITON_INTERPRET is 1; unset it: interpreted kernels aren't launched")

        def load(kernel: Any) -> None:
            kernel.function, kernel._run = kernel.hash, lambda *args: self.calls.append(args)

        triton.runtime.driver.set_active(self)
        CompiledKernel._init_handles = load


class NoDevice:
    """In place of graphs._Device: a replay does nothing, and nothing is waited for."""

    def __init__(self, device: torch.device) -> None: ...
    def wait(self) -> None: ...

    leave = synchronize = wait

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, run()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """In place of the product."""
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device) if residual is None else residual


def network(shape: str) -> torch.nn.Module:
    """ModernBERT in bf16, without numbers."""
    from modernbert_lite.models.registry import network_class

    config = ml.ModernBertConfig.from_dict({"model_type": "modernbert", **SHAPES[shape]})
    with torch.device("meta"):
        return network_class(config.architecture)(config).eval().requires_grad_(False).to(torch.bfloat16)


def times(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The least and the median time of a call, in ms."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found), 1e3 * statistics.median(found)


def measure(shape: str, repeats: int) -> list[Row]:
    """A row of each: a forward pass of LENGTHS, its replay from a graph, and packing the texts of the first."""
    from modernbert_lite.ops import choose, gpu, graphs

    card = Card()
    card.install()
    model, rows = network(shape), []
    texts = {what: [torch.arange(5, 5 + n) % 500 for n in lengths] for what, lengths in LENGTHS.items()}

    def wing(device: torch.device, dtype: torch.dtype) -> str | None:
        return "gpu" if choose.wanted() == "auto" and dtype in choose.FLOATS else None

    with (
        torch.inference_mode(),
        mock.patch.multiple(choose, _wing=wing),
        mock.patch.multiple(gpu, _succeeds=lambda *_: True),
        mock.patch.multiple(graphs, _Device=NoDevice, _can_capture=lambda device: True),
        mock.patch.dict(gpu.TWINS, {"linear": linear}),
    ):
        runs: dict[str, Callable[[ml.PackedBatch], object]] = {"": model, ", replayed": ml.Graphed(model)}
        for (what, lengths), (how, forward) in product(texts.items(), runs.items()):
            batch = ml.pack(lengths, "meta")

            def run(batch: ml.PackedBatch = batch, forward: Callable[[ml.PackedBatch], object] = forward) -> None:
                batch.cache.clear()  # what ops keep in a batch is part of the work
                card.calls.clear()
                forward(batch)

            least, median = times(run, repeats)
            rows.append({"what": what + how, "ms": f"{least:.3f}", "median_ms": f"{median:.3f}"})
            rows[-1]["launches"] = str(len(card.calls))
    ids = [text.tolist() for text in texts["forward"]]
    least, median = times(lambda: ml.pack(ids), repeats)
    rows.append({"what": "pack", "ms": f"{least:.3f}", "median_ms": f"{median:.3f}", "launches": "0"})
    where = records.environment("modernbert-lite", "torch", "triton", "numpy")
    return [
        {"shape": shape, "tokens": str(sum(LENGTHS["query" if "query" in row["what"] else "forward"]))} | row | where
        for row in rows
    ]


def missed(rows: list[Row]) -> list[str]:
    """What takes longer than is promised."""
    return [
        f"{row['what']}: {row['ms']} ms, promised {PROMISED_MS[row['what']]}"
        for row in rows
        if float(row["ms"]) > PROMISED_MS[row["what"]]
    ]


def table(rows: list[Row]) -> str:
    lines = ["| what | tokens | ms | median, ms | launches |", "|---" * 5 + "|"]
    lines += [f"| {r['what']} | {int(r['tokens']):,} | {r['ms']} | {r['median_ms']} | {r['launches']} |" for r in rows]
    last = rows[-1]
    return "\n".join(
        [
            *lines,
            "",
            f"{last['machine']}, torch {last['torch']}, triton {last['triton']}, "
            f"commit {last['commit']}, {last['date']}.",
        ]
    )


def line(row: Row) -> str:
    tokens = f"{row['what']:17} {row['tokens']:>6} tokens"
    return f"{tokens} {row['ms']:>7} ms, median {row['median_ms']}, {row['launches']} launches"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--check", action="store_true", help="exit with 1 if something takes longer than is promised")
    parser.add_argument("--smoke", action="store_true", help="a small shape")
    parser.add_argument("--out", type=Path, help="default: bench/results/host.csv (with --smoke: none)")
    args = parser.parse_args(argv)
    try:
        rows = measure("smoke" if args.smoke else "base", args.repeats)
    except (ImportError, RuntimeError) as error:
        print(f"bench_host: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(line(row))
    if out := args.out or (None if args.smoke else records.RESULTS / "host.csv"):
        records.write_csv(out, rows)
    bad = missed(rows) if args.check else []
    if bad:
        print("not as promised: " + "; ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
