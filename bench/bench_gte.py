"""GTE v1.5 beside ModernBERT: how much of the same machine our network of each gets a FLOP, in one run, taking turns.

    python -m bench.bench_gte                              # large shapes, fp32 on a CPU
    python -m bench.bench_gte --shapes large base --check  # also fails where GTE is slower a FLOP than ModernBERT
    python -m bench.bench_gte --device cuda                # bf16, 32,768 tokens at a time
    python -m bench.bench_gte --smoke                      # tiny shapes; writes nothing, unless --out says where

`per_flop` is a provider's TFLOP/s over those of our ModernBERT; FLOPs are exact (`model_flops`: real tokens, and the
keys that they see), so that its local layers count for the little attention that they do. `ratio` is tokens a second
over transformers' GteModel with sdpa, where transformers has one (5.23).

Parity comes before a number is printed: GTE's with that GteModel, ModernBERT's (and GTE's where there is none) with our
plain torch reference. In 16 bits the error of hidden states, and the distance of mean vectors (1 - cosine), may be
twice those of either in the same dtype.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modernbert_lite as ml
from bench import bench_encode_gpu, records, runner, timing
from bench.bench_encode_gpu import Emit, Pool, Run, Unequal, hidden_states, padded
from bench.flops import model_flops
from bench.records import NOT_MEASURED, Rows, where
from bench.texts import batch_of, pool_lengths, ragged_lengths

GTE, MODERNBERT, THEIRS = "modernbert-lite GTE", "modernbert-lite ModernBERT", "transformers sdpa"
# gte-large-en-v1.5's and gte-base-en-v1.5's; ModernBERT's of the same name are bench_encode_gpu's.
SHAPES: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"type_vocab_size": 2, "rope_theta": 160_000.0},
    "base": {"type_vocab_size": 0, "rope_theta": 500_000.0},
    "smoke": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"type_vocab_size": 2, "rope_theta": 160_000.0, "vocab_size": 512},
}
COMMON = {"vocab_size": 30_528, "max_position_embeddings": 8192, "pad_token_id": 0}
NTK = 2.0
CASES = {"cpu": ("8x128", "2x512", "ragged"), "cuda": ("512", "8192", "128", "ragged")}
BATCH_TOKENS = 32_768  # of the cases that don't say how many texts
PADDED_ROWS = 8  # of transformers' batches on a CPU
LEAST = 0.97  # per_flop: 1, less what runs on one machine differ by


def lengths_of(case: str, device: str) -> list[int]:
    """ "8x128" -> [128] * 8; "128" -> as many as make BATCH_TOKENS; "ragged": as in bench_encode, of that device."""
    if case == "ragged" and device == "cpu":
        return ragged_lengths()
    if "x" in case:
        count, length = map(int, case.split("x"))
        return [length] * count
    lengths = pool_lengths(case)
    return [lengths[i] for i in batch_of(lengths, BATCH_TOKENS)]


def configs(shape: str) -> dict[str, Any]:
    gte = {"model_type": "new", "rope_scaling": {"type": "ntk", "factor": NTK}, **COMMON, **SHAPES[shape]}
    other = {"model_type": "modernbert", **bench_encode_gpu.SHAPES[shape]}
    return {GTE: ml.GteConfig.from_dict(gte), MODERNBERT: ml.ModernBertConfig.from_dict(other)}


class Models:
    """A shape's networks with random weights, in fp32 until `convert`."""

    def __init__(self, shape: str, device: torch.device):
        from modernbert_lite.models.registry import network_class

        self.configs, self.device = configs(shape), device
        torch.manual_seed(0)
        with torch.device(device):  # drawing as many random numbers on the host takes half a minute
            self.ours = {name: network_class(c.architecture)(c).eval() for name, c in self.configs.items()}
        for model in self.ours.values():
            for table in (m for m in model.requires_grad_(False).modules() if isinstance(m, nn.Embedding)):
                nn.init.normal_(table.weight)  # they start as zeros
        self.theirs = transformers_gte(self.ours[GTE], SHAPES[shape], device)

    def convert(self, dtype: torch.dtype) -> None:
        """As load_model leaves them: in the dtype, linear layers packed where that is faster."""
        from modernbert_lite.ops.linear import Linear, pack

        for model in (*self.ours.values(), *([self.theirs] if self.theirs else [])):
            for parameter in model.parameters():  # not .to(dtype): that would also round transformers' frequencies
                parameter.data = parameter.data.to(dtype)
            for layer in model.modules():
                if isinstance(layer, Linear):
                    pack(layer)

    def providers(self, texts: list[Tensor]) -> dict[str, Run]:
        """All give the hidden states of the real tokens, (T, C)."""
        batch = ml.pack(texts, self.device)
        # A new batch a call: what ops keep in one (lists of tiles) is part of the work.
        runs: dict[str, Run] = {name: lambda m=model: m(replace(batch)) for name, model in self.ours.items()}
        if self.theirs:
            step = PADDED_ROWS if self.device.type == "cpu" else len(texts)
            parts = (padded(texts[i : i + step], 0, self.device) for i in range(0, len(texts), step))
            batches = [batch for part in parts for batch in part]
            runs[THEIRS] = lambda: hidden_states(self.theirs, batches)
        return runs

    def expected(self, texts: list[Tensor]) -> dict[str, Tensor]:
        """What each of ours is held to, as it is in the networks' present dtype."""
        runs = self.providers(texts)
        with runner.backend("torch"):
            return {GTE: runs.get(THEIRS, runs[GTE])().float(), MODERNBERT: runs[MODERNBERT]().float()}


def transformers_gte(ours: nn.Module, shape: dict[str, Any], device: torch.device) -> nn.Module | None:
    """transformers' network of the same weights; None where it has no such class."""
    try:
        from transformers import GteConfig, GteModel
    except ImportError:
        return None
    from modernbert_lite.checkpoint import names
    from modernbert_lite.models import gte

    # Its class says NTK as a larger theta, and positions divided.
    theta, factor = NTK * shape["rope_theta"], NTK ** (2 / ours.config.head_dim)
    config = {key: value for key, value in {**COMMON, **shape}.items() if key != "rope_theta"}
    config |= {"rope_parameters": {"rope_type": "linear", "rope_theta": theta, "factor": factor}}
    with torch.device(device):
        model = GteModel(GteConfig(**config, attn_implementation="sdpa"))
    state, theirs = ours.state_dict(), {}
    for key in model.state_dict():
        _, name, piece, pieces = names._place(key, gte.NAMES)
        theirs[key] = state[name].chunk(pieces)[piece]
    model.load_state_dict(theirs)
    return model.eval().requires_grad_(False)


def run(options: argparse.Namespace, emit: Emit) -> None:
    """Every case, a row a provider emitted as soon as it is known. Raises Unequal if the numbers of one are wrong."""
    started, cpu = time.monotonic(), options.device == "cpu"
    where = records.environment("modernbert-lite", "torch", "transformers") if cpu else records.gpu_environment()
    for shape in options.shapes:
        models = Models(shape, torch.device(options.device))
        generator = torch.Generator().manual_seed(1)
        high = min(config.vocab_size for config in models.configs.values())
        texts = {
            case: [torch.randint(5, high, (n,), generator=generator) for n in lengths_of(case, options.device)]
            for case in options.cases
        }
        with torch.inference_mode():
            exact = {case: models.expected(texts[case]) for case in texts}
        models.convert(getattr(torch, options.dtype))
        for case in texts:
            if options.seconds and time.monotonic() - started > options.seconds:
                print(f"no time left for {shape} {case}", file=sys.stderr)
                continue
            head = {"case": case, "shape": shape, "tokens": sum(map(len, texts[case])), "dtype": options.dtype}
            with torch.inference_mode():
                rows = run_case(models, case, texts[case], exact.pop(case), options)
            for row in rows:
                emit(head | row | where)
        del models, exact
        bench_encode_gpu.free()


def run_case(
    models: Models, case: str, texts: list[Tensor], exact: dict[str, Tensor], options: argparse.Namespace
) -> list[dict[str, str]]:
    """A row a provider. Raises Unequal if the numbers of one are wrong."""
    lengths = [len(text) for text in texts]
    runs = models.providers(texts)
    rough = exact if options.dtype == "float32" else models.expected(texts)
    differences = {}
    for name, provider in runs.items():
        network = MODERNBERT if name == MODERNBERT else GTE
        error = float((rough[network] - exact[network]).abs().max())
        pool = Pool(texts, list(exact[network].split(lengths)), error)
        pool.distance = 1 - bench_encode_gpu.compare(rough[network], pool, list(range(len(texts))))[0]
        cosine, differences[name] = bench_encode_gpu.compare(provider(), pool, list(range(len(texts))))
        if not (cosine >= pool.least_cosine and differences[name] <= pool.most):  # NaN fails
            raise Unequal(f"{options.dtype} {case}, {name}: {pool.told(cosine, differences[name])}")
    cuda = options.device == "cuda"
    seconds = bench_encode_gpu.wall_times(runs, case, options) if cuda else timing.measure(runs, options.repeats)
    configs = {THEIRS: models.configs[GTE], **models.configs}
    speeds = {name: model_flops(configs[name], lengths) / s for name, s in seconds.items()}
    rows = []
    for name, s in seconds.items():
        row = {"provider": name, "tokens_per_s": f"{sum(lengths) / s:.0f}", "tflop_per_s": f"{speeds[name] / 1e12:.4g}"}
        row |= {"per_flop": f"{speeds[name] / speeds[MODERNBERT]:.3f}"}
        row |= {"ratio": f"{seconds[THEIRS] / s:.2f}" if THEIRS in seconds and name != MODERNBERT else ""}
        rows.append(row | {"max_difference": f"{differences[name]:.1e}"})
    return rows


def promise(rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """(what, promised, measured, "yes" or "no"), the last two "" without rows: the least, or all that are under it."""
    found = sorted((float(row["per_flop"]), f"{row['shape']} {row['case']}") for row in rows if row["provider"] == GTE)
    low = [pair for pair in found if pair[0] < LEAST]
    measured = ", ".join(f"{per_flop:.3f} ({where})" for per_flop, where in low or found[:1])
    return "GTE's TFLOP/s over ModernBERT's", f">= {LEAST}", measured, ("no" if low else "yes") if found else ""


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:6} {row['case']:>6} {row['provider']:27} {row['tokens_per_s']:>8} tokens/s"
    return f"{head}, {row['tflop_per_s']} TFLOP/s, per FLOP {row['per_flop']}, ratio {row['ratio'] or '-'}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="float32; of cuda bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=("large", "base"), default=["large"])
    parser.add_argument("--cases", nargs="+", choices=list(dict.fromkeys(sum(CASES.values(), ()))))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0, help="start no case after so many")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if ours of GTE has a per_flop under {LEAST}")
    parser.add_argument("--out", type=Path, help="default: gte_cpu.csv or gte_gpu.csv in bench/results")
    parser.set_defaults(case_seconds=3.0)
    options = parser.parse_args(argv)
    options.cases = options.cases or list(CASES[options.device])
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.smoke:
        options.shapes = ["smoke"]
    elif not options.out:
        options.out = records.RESULTS / f"gte_{options.device.replace('cuda', 'gpu')}.csv"
    return options


def table(rows: Rows) -> str:
    """A line a case: our GTE, and our ModernBERT of the same name of a shape, in the same run."""
    if not rows:
        return NOT_MEASURED
    lines = [
        "| shape | texts | tokens | dtype | GTE, tokens/s | TFLOP/s | ModernBERT, TFLOP/s | per FLOP | "
        "x transformers sdpa | max difference |",
        "|---" * 10 + "|",
    ]
    cells = {(row["shape"], row["case"], row["dtype"], row["provider"]): row for row in rows}
    for (shape, case, dtype, provider), row in cells.items():
        other = cells.get((shape, case, dtype, MODERNBERT))
        if provider == GTE and other:  # a run that goes on may not have said it yet
            values = [
                shape,
                case,
                f"{int(row['tokens']):,}",
                dtype,
                f"{int(row['tokens_per_s']):,}",
                row["tflop_per_s"],
            ]
            values += [other["tflop_per_s"], row["per_flop"], row["ratio"] or "–", row["max_difference"]]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join([*lines, "", where(rows)])


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_gte: no CUDA device here", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row | ({"smoke": "smoke"} if options.smoke else {}))
        print(line(row), flush=True)
        if options.out:
            records.write_csv(options.out, rows)

    bad = []
    try:
        run(options, emit)
    except Unequal as error:
        bad.append(str(error))
    what, promised, measured, met = promise(rows)
    if options.check and met != "yes":
        bad.append(f"{what}: {measured or 'not measured'}, promised {promised}")
    if bad:
        print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
