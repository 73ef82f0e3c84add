"""End to end on this machine's CPU: hidden states of real tokens a second, beside transformers on the same weights.

    python -m bench.bench_encode              # ModernBERT-base shape, random weights, fp32; about six minutes
    python -m bench.bench_encode --check      # also fails if a ratio is under what is promised
    python -m bench.bench_encode --device cuda --help    # on a GPU: bench_encode_gpu.py

transformers gets what it needs: a padded batch, sorted by length, 8 rows at a time for the ragged set. Parity is
checked before a number is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import modernbert_lite as ml
from bench.records import RESULTS, Rows, environment, where, write_csv
from bench.texts import ragged_lengths
from bench.timing import measure

# name -> (lengths, rows in a padded batch, tokens/s over transformers' that are promised)
CASES: dict[str, tuple[list[int], int, float]] = {
    "1x32": ([32], 1, 1.0),
    "8x128": ([128] * 8, 8, 1.0),
    "2x512": ([512] * 2, 2, 1.0),
    "1x2048": ([2048], 1, 1.5),
    "ragged": ([], 8, 1.5),
}
TOLERANCE = 2e-5


def setup(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, transformers' with sdpa): the base shape, one set of random weights."""
    from transformers import ModernBertConfig, ModernBertModel

    from modernbert_lite.models.modernbert import ModernBert
    from modernbert_lite.ops.linear import Linear, pack

    torch.manual_seed(seed)
    reference = ModernBertModel(ModernBertConfig(attn_implementation="sdpa")).eval()
    ours = ModernBert(ml.ModernBertConfig())
    ours.load_state_dict(reference.state_dict())
    for layer in ours.modules():
        if isinstance(layer, Linear):
            pack(layer)  # as load_model does
    return ours.eval().requires_grad_(False), reference.requires_grad_(False)


def providers(
    ours: torch.nn.Module, reference: torch.nn.Module, lengths: list[int], rows: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Both give the hidden states of the real tokens, (T, C)."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(5, 50_000, (n,), generator=generator) for n in lengths]
    packed = ml.pack(texts)
    padded = []
    for i in range(0, len(texts), rows):
        ids = torch.nn.utils.rnn.pad_sequence(texts[i : i + rows], batch_first=True, padding_value=50_283)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts[i : i + rows]], batch_first=True)
        padded.append((ids, mask))

    def transformers_sdpa() -> torch.Tensor:
        return torch.cat([reference(i, attention_mask=m).last_hidden_state[m.bool()] for i, m in padded])

    return {"modernbert-lite": lambda: ours(packed), "transformers sdpa": transformers_sdpa}


def table(rows: Rows) -> str:
    """A line a case, and one that says where it was measured."""
    lines = [
        "| batch | tokens | modernbert-lite | transformers sdpa | ratio | max difference |",
        "|---|---|---|---|---|---|",
    ]
    cells = {(row["case"], row["provider"]): row for row in rows}
    for case in dict.fromkeys(row["case"] for row in rows):
        ours, theirs = cells[case, "modernbert-lite"], cells[case, "transformers sdpa"]
        lines.append(
            f"| {case} | {ours['tokens']} | {ours['tokens_per_s']} | {theirs['tokens_per_s']} | {ours['ratio']} | "
            f"{ours['max_difference']} |"
        )
    return "\n".join([*lines, "", where(rows)])


def main(argv: list[str] | None = None) -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    known, rest = first.parse_known_args(argv)
    if known.device == "cuda":
        from bench import bench_encode_gpu

        return bench_encode_gpu.main(rest)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS / "encode_cpu.csv")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is under what is promised")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; cuda has options of its own")
    args = parser.parse_args(argv)

    ours, reference = setup()
    where = environment("modernbert-lite", "torch", "transformers")
    table, short = [], []
    with torch.inference_mode():
        for case in args.cases:
            lengths, rows, promised = CASES[case]
            lengths = lengths or ragged_lengths()
            runs = providers(ours, reference, lengths, rows)
            difference = float((runs["modernbert-lite"]() - runs["transformers sdpa"]()).abs().max())
            if difference > TOLERANCE:
                print(f"{case}: hidden states differ by {difference:.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
                return 1
            seconds = measure(runs, args.repeats)
            for provider, median in seconds.items():
                row = {"case": case, "tokens": sum(lengths), "dtype": "float32", "provider": provider}
                row |= {"tokens_per_s": f"{sum(lengths) / median:.0f}"}
                row |= {"ratio": f"{seconds['transformers sdpa'] / median:.2f}", "max_difference": f"{difference:.1e}"}
                table.append(row | where)
            speed = sum(lengths) / seconds["modernbert-lite"]
            ratio = seconds["transformers sdpa"] / seconds["modernbert-lite"]
            print(f"{case:8} {speed:7.0f} tokens/s, {ratio:.2f} x transformers sdpa")
            if ratio < promised:
                short.append(f"{case}: {ratio:.2f}, promised {promised}")
    write_csv(args.out, table)
    if args.check and short:
        print("under what is promised: " + "; ".join(short), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
