"""dtype "float8" beside bfloat16 on a card: a pass of the network, its wide products, and what the numbers lose.

    python -m bench.bench_float8 [--shapes base large] [--cases 128 512 2048] [--out DIR]
    python -m bench.bench_float8 --smoke      # a small shape on the CPU: does it run? No measurement

Rows "pass": 32,768 tokens; the card's time alone, the tokens per second of that, and `cosine`, the least one of a
text's mean vector to float32's. With random weights the cosines tell the dtypes apart, not what a real model loses:
for that see `bench.accuracy`. Rows "product": Wqkv's and Wi's shapes; rounding x is in the time of float8.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modernbert_lite as ml
from bench import records, timing
from bench.bench_encode_gpu import SHAPES, fresh
from bench.records import Rows
from modernbert_lite.ops.linear import FLOAT8, Linear, pack

TOKENS = 32_768
COLUMNS = ("what", "shape", "case", "tokens", "dtype", "milliseconds", "tokens_per_s", "tflop_per_s", "cosine", "ratio")


def network(shape: str, device: str) -> nn.Module:
    """Random weights, in float32."""
    from modernbert_lite.models.registry import network_class

    config = ml.ModernBertConfig.from_dict({"model_type": "modernbert", **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device(device):
        model = network_class(config.architecture)(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 1.0 if "embeddings" in name else weight.shape[1] ** -0.5)
    return model


def in_float8(model: nn.Module) -> nn.Module:
    """A copy as `dtype="float8"` loads it: the products that widen."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.out_features > layer.in_features:
            pack(layer, narrow=FLOAT8)
    return model


def times(runs: dict[str, Callable[[], Tensor]], cuda: bool) -> dict[str, float]:
    return timing.gpu_times(runs, repeats=10) if cuda else timing.measure(runs, 1)


def means(hidden: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.float().mean(0) for part in hidden.split(lengths)])


def passes(shape: str, cases: list[str], device: str) -> list[dict[str, Any]]:
    cuda, rows = device == "cuda", []
    exact = network(shape, device)
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    models = {"bfloat16": plain, "float8": in_float8(plain)}
    for case in cases:
        count = max(TOKENS // int(case), 1) if cuda else 3
        generator = torch.Generator().manual_seed(1)
        high = exact.get_submodule("embeddings.tok_embeddings").num_embeddings
        texts = [torch.randint(5, high, (int(case),), generator=generator) for _ in range(count)]
        batch, lengths = ml.pack(texts, device), [int(case)] * count
        few = ml.pack(texts[:16], device)
        expected = means(exact(few), lengths[:16])
        runs = {name: lambda model=model, batch=batch: model(fresh(batch)) for name, model in models.items()}
        seconds = times(runs, cuda)
        for name, model in models.items():
            cosine = torch.cosine_similarity(means(model(few), lengths[:16]), expected).min()
            tokens = sum(lengths)
            rows.append({"what": "pass", "shape": shape, "case": case, "tokens": tokens, "dtype": name})
            rows[-1] |= {"milliseconds": f"{seconds[name] * 1e3:.3f}", "cosine": f"{float(cosine):.5f}"}
            rows[-1] |= {"tokens_per_s": f"{tokens / seconds[name]:.0f}"}
            rows[-1] |= {"ratio": f"{seconds['bfloat16'] / seconds[name]:.2f}"}
    return rows


def products(shape: str, device: str) -> list[dict[str, Any]]:
    cuda, rows = device == "cuda", []
    first = SHAPES[shape].get("hidden_size", 768)
    wide = {"Wqkv": 3 * first, "Wi": 2 * SHAPES[shape].get("intermediate_size", 1152)}
    for name, width in wide.items():
        tokens = TOKENS if cuda else 48
        x = torch.randn(tokens, first, device=device).bfloat16()
        plain = Linear(first, width, bias=False).to(device, torch.bfloat16).requires_grad_(False)
        layers = {"bfloat16": plain, "float8": in_float8(plain)}
        seconds = times({key: lambda layer=layer, x=x: layer(x) for key, layer in layers.items()}, cuda)
        for key, s in seconds.items():
            rows.append({"what": "product", "shape": shape, "case": name, "tokens": tokens, "dtype": key})
            rows[-1] |= {"milliseconds": f"{s * 1e3:.4f}", "ratio": f"{seconds['bfloat16'] / s:.2f}"}
            rows[-1] |= {"tflop_per_s": f"{2 * tokens * first * width / s / 1e12:.0f}"}
    return rows


def table(rows: Rows) -> str:
    lines = ["| what | tokens | bfloat16 | float8 | x | cosines |", "|---" * 6 + "|"]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    for a, b in pairs:
        cosines = f"{a['cosine']}, {b['cosine']}" if a["cosine"] else ""
        unit = "ms" if a["what"] == "pass" else "us"
        ms = [float(r["milliseconds"]) * (1 if unit == "ms" else 1e3) for r in (a, b)]
        what = f"{a['shape']}, texts of {a['case']}" if a["what"] == "pass" else f"{a['shape']}, {a['case']}"
        cells = [what, f"{int(a['tokens']):,}", *(f"{x:.1f} {unit}" for x in ms), b["ratio"], cosines]
        lines.append(f"| {' | '.join(cells)} |")
    last = rows[-1]
    where = ", ".join(f"{name} {last[name]}" for name in ("driver", "torch", "triton", "commit", "date"))
    return "\n".join([*lines, "", f"{last['card']}, {where}."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["base", "large"], default=["base", "large"])
    parser.add_argument("--cases", nargs="+", default=["128", "512", "2048"])
    parser.add_argument("--smoke", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--out", type=Path, help="a folder: float8_gpu.csv is written there")
    args = parser.parse_args(argv)
    if not args.smoke and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        print("bench_float8: no card with 8-bit floats here (--smoke runs anywhere)", file=sys.stderr)
        return 2
    shapes, cases, device = (["smoke"], ["20"], "cpu") if args.smoke else (args.shapes, args.cases, "cuda")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in shapes:
            found = passes(shape, cases, device) + products(shape, device)
            rows += [dict.fromkeys(COLUMNS, "") | row | records.gpu_environment() for row in found]
            if args.out:
                records.write_csv(args.out / "float8_gpu.csv", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
