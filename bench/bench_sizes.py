"""Batches of ever-new sizes beside known ones, on a CPU: what a new number of tokens costs in time and in memory.

    python -m bench.bench_sizes               # 2,000 sizes per dtype; about an hour on one core
    python -m bench.bench_sizes --smoke       # seconds; writes nothing, unless --out says where

Texts are ragged, so nearly every batch of real texts has a number of tokens that was never seen before. The other
benches repeat their shapes, and don't see what a library builds, and keeps, for each shape.

Each dtype has a process of its own, with the bundled model. After a few batches of 4,096 tokens come batches of other
sizes, no size twice. Each batch is run when its size is new, and at once again when its size is known: `cpu_ratio` and
`wall_ratio` are the sums of new over known. `grown_mb` is the process's own memory after all sizes, less that before
them; `peak_mb` is the most after any batch, less that before them (10^6 bytes). Before both readings glibc gives back
what it keeps of freed memory: up to 64 MB stay or go by chance, whatever the sizes were. `peak_mb` counts them, too.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

import modernbert_lite as ml
from bench import records

MODEL, DTYPES = "tiny", ("float32", "bfloat16", "int8")
LEAST, MOST = 16, 4096  # tokens of a batch; MOST is what the warm-up has seen
SMOKE_SIZES, SMOKE_MOST = 8, 256
RATIO, GROWN_MB = 1.05, 100.0  # what is promised: no more than this; less than that
HEAD = f"{'dtype':9} {'sizes':>5} {'grown MB':>8} {'peak MB':>7} {'new/known, CPU':>14} {'wall':>5} {'tokens/s':>8}"
Row = dict[str, str]


def sizes_of(count: int, most: int) -> list[int]:
    """So many numbers of tokens, all different, LEAST at least and less than `most`; the same ones in every run."""
    sizes = list(range(LEAST, most))
    random.Random(0).shuffle(sizes)
    return sizes[:count]


def batch_of(tokens: int, vocab_size: int) -> ml.PackedBatch:
    """Texts of `tokens` together, longest first: lognormal lengths, as bench_encode's ragged ones, the last one cut."""
    numbers, texts = random.Random(tokens), []
    while tokens:
        length = min(tokens, max(8, min(512, round(100 * numbers.lognormvariate(0, 0.8)))))
        texts.append(numbers.choices(range(5, vocab_size), k=length))
        tokens -= length
    return ml.pack(sorted(texts, key=len, reverse=True))


def resident_mb() -> float:
    """This process's own memory, also what was swapped out, 10^6 bytes; files that it maps don't count. Raises OSError
    where there is no /proc."""
    status = Path("/proc/self/status").read_text()
    return sum(int(status.partition(f"{name}:")[2].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024 / 1e6


def held_mb() -> float:
    """`resident_mb` without freed memory that glibc keeps for later."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return resident_mb()


def measure(dtype: str, count: int, most: int, threads: int) -> Row:
    """The row of a dtype, measured in this process, which should have done nothing else."""
    torch.set_num_threads(threads)
    network = ml.load_model(MODEL, device="cpu", dtype=dtype)
    config = network.config

    def seconds(batch: ml.PackedBatch) -> tuple[float, float]:  # CPU time of all threads, wall time
        batch = replace(batch)  # what ops keep in a batch is part of the work
        cpu, wall = time.process_time(), time.perf_counter()
        network(batch)
        return time.process_time() - cpu, time.perf_counter() - wall

    new, known, peak = [0.0, 0.0], [0.0, 0.0], 0.0
    sizes = sizes_of(count, most)
    with torch.inference_mode():
        for _ in range(3):
            seconds(batch_of(most, config.vocab_size))
        before = held_mb()
        for size in sizes:
            batch = batch_of(size, config.vocab_size)
            for sums in (new, known):
                sums[:] = (total + more for total, more in zip(sums, seconds(batch), strict=True))
                peak = max(peak, resident_mb() - before)
    row: Row = {"model": MODEL, "shape": f"{config.num_hidden_layers}x{config.hidden_size}", "dtype": dtype}
    row |= {"sizes": str(count), "tokens": str(sum(sizes))}
    row |= {"grown_mb": f"{held_mb() - before:.0f}", "peak_mb": f"{peak:.0f}"}
    for name, n, k in zip(("cpu", "wall"), new, known, strict=True):
        row |= {f"new_{name}_s": f"{n:.3f}", f"known_{name}_s": f"{k:.3f}", f"{name}_ratio": f"{n / k:.3f}"}
    row |= {"tokens_per_s": f"{sum(sizes) / new[1]:.0f}", **records.environment("modernbert-lite", "torch")}
    return row | {"capability": torch.backends.cpu.get_cpu_capability()}


def missed(rows: list[Row]) -> list[str]:
    """What is promised of the rows, and isn't so. The ratio is CPU time's: other processes disturb it less."""
    bad = []
    for row in rows:
        if not float(row["cpu_ratio"]) <= RATIO:
            bad.append(f"{row['dtype']}: a new size takes {row['cpu_ratio']} x a known one, promised {RATIO}")
        if not float(row["grown_mb"]) < GROWN_MB:
            bad.append(f"{row['dtype']}: memory grows by {row['grown_mb']} MB, promised less than {GROWN_MB:.0f}")
    return bad


def line(row: Row) -> str:
    memory = f"{row['sizes']:>5} {row['grown_mb']:>8} {row['peak_mb']:>7}"
    return f"{row['dtype']:9} {memory} {row['cpu_ratio']:>14} {row['wall_ratio']} {row['tokens_per_s']:>8}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--sizes", type=int, default=2000, help="per dtype; default: 2000")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=here, help=f"default: all cores, {here} here")
    parser.add_argument("--out", type=Path, help="default: bench/results/sizes_cpu.csv (with --smoke: none)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a new size costs more than is promised")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_SIZES} sizes under {SMOKE_MOST} tokens")
    args = parser.parse_args(argv)
    if not 1 <= args.sizes <= MOST - LEAST or args.threads < 1:
        parser.error(f"--sizes must be from 1 to {MOST - LEAST}, --threads at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not Path("/proc/self/status").exists():
        print("bench_sizes: memory is read from /proc/self/status, which this system doesn't have", file=sys.stderr)
        return 2
    out = args.out or (None if args.smoke else records.RESULTS / "sizes_cpu.csv")
    count, most = (min(args.sizes, SMOKE_SIZES), SMOKE_MOST) if args.smoke else (args.sizes, MOST)
    rows: list[Row] = []
    print(HEAD)
    for dtype in args.dtype:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            row = process.submit(measure, dtype, count, most, args.threads).result()
        rows.append(row | ({"smoke": "smoke"} if args.smoke else {}))
        print(line(row), flush=True)
        if out:
            records.write_csv(out, rows)
    bad = missed(rows) if args.check and not args.smoke else []
    if bad:
        print("not as promised: " + "; ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
