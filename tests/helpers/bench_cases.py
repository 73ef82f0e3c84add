"""Shared by tests/bench: test_bench_encode, test_bench_gpu. Rows as the benches write them; sections of bench.gpu."""

import json
import sys

WHERE = {"card": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
WHERE |= {"commit": "abc", "date": "2026-01-01"}


def sample_encode(case: str, batch_tokens: int, provider: str) -> dict[str, str]:
    from bench import bench_encode_gpu as bench

    names = {"ours": bench.OURS, "graphs": bench.GRAPHS, "theirs": bench.THEIRS}
    speed = {"ours": 2_000_000, "graphs": 2_100_000, "theirs": 500_000}[provider] + batch_tokens // 4096 - 1
    row = dict.fromkeys(bench.COLUMNS, "") | {"case": case, "shape": "base", "tokens": str(batch_tokens)}
    row |= {"batch_tokens": str(batch_tokens), "dtype": "bfloat16", "provider": names[provider]}
    row |= {"tokens_per_s": str(speed), "seconds": f"{batch_tokens / speed:.6f}", "mfu": "0.500", "ratio": "4.00"}
    row |= {"mfu_measured": "0.625", "peak_allocated_mb": "800", "memory_limit_mb": "1000", "host_ms": "1.0"}
    return row | {"gpu_ms": "1.5", "max_difference": "1e-2"} | WHERE


def sample_kernel(op: str, case: str, tokens: int, provider: str) -> dict[str, str]:
    row = {"op": op, "case": case, "tokens": str(tokens), "dtype": "bfloat16", "provider": provider, "note": ""}
    row |= {"microseconds": "20.5", "gb_per_s": "4000.0", "tflop_per_s": "", "fraction": "0.9", "ceiling": "copy"}
    return row | {"speedup": "2.0"} | WHERE


def sample_rows():
    encode = [sample_encode(c, n, p) for c in ("query", "512") for n in (4096, 32768) for p in ("ours", "theirs")]
    encode.append(encode[0] | {"provider": "big", "tokens_per_s": "", "seconds": "", "note": "out of memory"})
    kernels = [sample_kernel("rope", "base", n, p) for n in (1024, 32768) for p in ("triton", "torch")]
    kernels.append(sample_kernel("attention", "base 512 local", 32768, "triton"))
    return encode, kernels


SAY = """
import json, os, sys, time
f = open(os.environ["BENCH_GPU_LINES"], "a")
def say(**what): print(json.dumps(what), file=f, flush=True)
say(table="kernels", row=json.loads(sys.argv[1]))
"""


def saying(code: str, row: dict[str, str]) -> list[str]:
    """A section's command: says a row, then does as told."""
    return [sys.executable, "-c", SAY + code, json.dumps(row)]
