"""Strings in, vectors out, on a card: the base shape with random weights and ModernBERT's own tokenizer.

    python -m bench.bench_strings [--texts 20000] [--out DIR]
    python -m bench.bench_strings --smoke      # tiny shape, 30 texts, on any machine

Rows: "strings" (`Embedder.encode`), "ids" (`encode_ids`: no tokenizer), "tokenizer" (`token_ids`: no network), and
"sentence-transformers" on the first part of the same texts. `idle` is the share of the time between the first and the
last kernel of a run in which the card did nothing, from a trace by torch's profiler.

Lengths are lognormal, in no order: median 100 words, from 8 to 2,048. The tokenizer is a development file (tests/data).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import modernbert_lite as ml
from bench import records
from bench.bench_encode_gpu import SHAPES
from bench.records import NOT_MEASURED, Rows
from bench.timing import attempt, synchronize

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "data" / "modernbert-tokenizer"
PEER_TEXTS = TRACED_TEXTS = 4_000
COLUMNS = ("case", "shape", "texts", "tokens", "dtype", "provider", "tokens_per_s", "seconds", "idle", "cosine", "note")


def write_checkpoint(folder: Path, shape: str, device: str, dtype: torch.dtype) -> None:
    """Random weights of the shape, a mean-pooling embedder's files, and the tokenizer."""
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    sizes = {k: v for k, v in SHAPES[shape].items() if not k.endswith("_id") and k != "vocab_size"}
    with torch.device(device):
        model = ModernBertModel(ModernBertConfig(**sizes))
    model.to(dtype).save_pretrained(folder)
    for path in TOKENIZER.iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    kinds = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    modules = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, path, kind in kinds
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def draw(count: int) -> list[str]:
    generator = random.Random(1)
    words = [word for word in (ROOT / "bench" / "LOG.md").read_text(encoding="utf-8").split() if word.isalpha()]
    lengths = (min(max(int(generator.lognormvariate(4.6, 0.8)), 8), 2048) for _ in range(count))
    return [" ".join(generator.choices(words, k=n)) for n in lengths]


def idle_share(run: Callable[[], Any]) -> float:
    """The share of the time between a run's first and last kernel in which no kernel and no copy ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    device = torch.autograd.DeviceType.CUDA
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == device)
    busy, at = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, at))
        at = max(at, end)
    return 1 - busy / (at - spans[0][0])


def run(options: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> None:
    cuda = not options.smoke
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shape, texts = ("base", draw(options.texts)) if cuda else ("smoke", draw(30))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, shape, device, dtype)
        model = ml.Embedder.from_pretrained(folder, device=device, dtype=dtype)
        vectors: Any = model.encode(texts)  # warm
        ids = model.token_ids(texts)
        head = {"case": "strings", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        where = records.gpu_environment()

        def row(provider: str, run: Callable[[], Any], count: int, traced: Callable[[], Any] | None = None) -> None:
            best, tokens = float("inf"), sum(map(len, ids[:count]))
            for _ in range(3):
                synchronize()
                begin = time.perf_counter()
                result = run()
                synchronize()
                best = min(best, time.perf_counter() - begin)
            found = dict.fromkeys(COLUMNS, "") | head | {"provider": provider, "texts": count, "tokens": tokens}
            found |= {"tokens_per_s": f"{tokens / best:.0f}", "seconds": f"{best:.3f}"}
            if provider != "tokenizer":
                cosine = torch.cosine_similarity(torch.as_tensor(result), torch.as_tensor(vectors[:count]))
                found["cosine"] = f"{float(cosine.min()):.5f}"
            if traced and cuda:  # a trace takes the profiler a while to read, so it is of the first texts only
                share, found["note"] = attempt(lambda: idle_share(traced))
                found["idle"] = "" if share is None else f"{share:.3f}"
            emit(found | where)

        part = TRACED_TEXTS
        row("modernbert-lite strings", lambda: model.encode(texts), len(texts), lambda: model.encode(texts[:part]))
        row("modernbert-lite ids", lambda: model.encode_ids(ids), len(texts), lambda: model.encode_ids(ids[:part]))
        row("tokenizer", lambda: model.token_ids(texts), len(texts))
        if options.peer:
            from sentence_transformers import SentenceTransformer

            peer = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})
            count = len(texts[:PEER_TEXTS])
            row("sentence-transformers", lambda: peer.encode(texts[:count], batch_size=128), count)


def line(row: dict[str, Any]) -> str:
    return " ".join(f"{key} {row[key]}" for key in COLUMNS if row[key] != "")


def table(rows: Rows) -> str:
    if not rows:
        return NOT_MEASURED
    lines = ["| what | texts | tokens | tokens/s | idle | note |", "|---|---|---|---|---|---|"]
    for r in rows:
        cells = [r["provider"], f"{int(r['texts']):,}", f"{int(r['tokens']):,}", f"{int(r['tokens_per_s']):,}"]
        lines.append(f"| {' | '.join([*cells, str(r['idle']), str(r['note'])])} |")
    return "\n".join([*lines, "", records.where(rows)])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="a folder: strings_gpu.csv is written there")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without sentence-transformers")
    parser.add_argument("--smoke", action="store_true", help="does it run? On the CPU, no measurement")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("bench_strings: no CUDA device here (--smoke runs anywhere)", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if options.out:
            records.write_csv(options.out / "strings_gpu.csv", rows)

    run(options, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
