"""End to end on a GPU: hidden states of real tokens a second, beside transformers on the same random weights.

    python -m bench.bench_encode --device cuda                    # base shape, bf16
    python -m bench.bench_encode --device cuda --shapes base large --compile --check

Parity comes before a number is printed: against transformers in fp32, the error of hidden states and the distance of
mean-pooled vectors (1 - cosine) may be twice those of transformers in the same dtype. A provider that fails, or has no
room, gets a row that says so and no speed.

What is counted: `tokens` are real ones, never padding. `seconds` is the wall's, a call of many that follow each other
("query": of one whose result is waited for); `host_ms` is what the host needs to queue a call, `gpu_ms`
what the GPU needs when it waits for nobody. MFU is the model's exact FLOPs (`model_flops`) over the datasheet's peak
(`mfu`) and over a large matrix product of the same run (`mfu_measured`). Memory is the weights and the most that a call
adds to them; `memory_limit_mb` is what is promised, `memory_limit`. transformers gets texts sorted by length and 32,768
padded tokens at a time: more saturates no card further, and might not fit.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modernbert_lite as ml
from bench import cards, records, timing
from bench.flops import memory_limit, model_flops
from bench.records import NOT_MEASURED, Rows, where
from bench.texts import QUERY_TOKENS, batch_of, pool_lengths
from bench.timing import attempt, free, peak_memory, waited

OURS, GRAPHS, COMPILED = "modernbert-lite", "modernbert-lite graphs", "modernbert-lite compiled"
THEIRS, FLASH = "transformers sdpa", "flash_attention_2"
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16},
    "smoke": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    | {"sep_token_id": 2},
}
CASES = ("query", "128", "512", "2048", "8192", "ragged")
BATCH_TOKENS = (32_768, 4_096, 131_072, 16_384, 8_192, 65_536)  # the most telling first: time may run out
PADDED_TOKENS = 32_768
GRAPH_TOKENS = 32_768  # what Graphed replays by default
FP32_TOLERANCE = 2e-5
MIN_COSINE = 0.999
Run = Callable[[], Tensor]
Emit = Callable[[dict[str, Any]], None]
COLUMNS = (
    *("case", "shape", "tokens", "batch_tokens", "sequences", "dtype", "provider", "tokens_per_s", "seconds"),
    *("host_ms", "gpu_ms", "mfu", "mfu_measured", "peak_allocated_mb", "peak_reserved_mb", "memory_limit_mb"),
    *("ratio", "cosine", "max_difference", "note"),
)


@dataclass
class Pool:
    """The texts of a case, what transformers in fp32 makes of them, and how far off it is in the dtype."""

    texts: list[Tensor]
    expected: list[Tensor]
    error: float
    distance: float = 0.0  # 1 - the least cosine of its mean-pooled vectors

    @property
    def most(self) -> float:
        """The largest difference of hidden states that a provider may have."""
        return max(2 * self.error + 1e-6, FP32_TOLERANCE)

    @property
    def least_cosine(self) -> float:
        """Of mean-pooled vectors. With random weights, the mean of a long text is small beside the rounding of its
        tokens, in transformers too: 0.998 at 2,048 tokens in bf16."""
        return 1 - max(2 * self.distance, 1 - MIN_COSINE)

    def told(self, cosine: float, difference: float) -> str:
        return f"cosine {cosine:.6f} of {self.least_cosine:.6f}, difference {difference:.2e} of {self.most:.2e}"


class Models:
    """One shape's networks with one set of random weights."""

    @torch.inference_mode(False)  # weights as they are elsewhere
    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device):
        from transformers import ModernBertConfig, ModernBertModel

        from modernbert_lite.models.modernbert import ModernBert

        torch.manual_seed(0)
        with torch.device(device):  # drawing 395 M random numbers on the host takes half a minute
            exact = ModernBertModel(ModernBertConfig(attn_implementation="sdpa", **SHAPES[shape]))
        self.exact = exact.to(device).eval().requires_grad_(False)
        self.theirs = copy.deepcopy(self.exact)
        for parameter in self.theirs.parameters():  # not .to(dtype): that would also round RoPE's frequencies
            parameter.data = parameter.data.to(dtype)
        raw = {**self.exact.config.to_dict(), "architectures": ["ModernBertModel"]}
        self.config = ml.ModernBertConfig.from_dict(raw)
        self.ours = ModernBert(self.config)
        self.ours.load_state_dict(self.exact.state_dict())
        self.ours = self.ours.to(device, dtype).eval().requires_grad_(False)
        self.weights = sum(p.numel() * p.element_size() for p in self.ours.parameters())
        self.shape, self.device = shape, device
        self.pools: dict[str, Pool] = {}

    def pool(self, case: str) -> Pool:
        if case not in self.pools:
            generator = torch.Generator().manual_seed(1)
            high = min(50_000, self.config.vocab_size)
            texts = [torch.randint(5, high, (n,), generator=generator) for n in pool_lengths(case)]
            order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
            batches = padded([texts[i] for i in order], self.config.pad_token_id or 0, self.device)
            exact, rough = hidden_states(self.exact, batches), hidden_states(self.theirs, batches)
            rows = dict(zip(order, exact.split([len(texts[i]) for i in order]), strict=True))
            error = float((rough.float() - exact).abs().max())
            pool = self.pools[case] = Pool(texts, [rows[i] for i in range(len(texts))], error)
            pool.distance = 1 - compare(rough, pool, order)[0]
        return self.pools[case]

    def variant(self, change: Callable[[nn.Module], Any]) -> nn.Module:
        """A copy of transformers' network, changed."""
        model = copy.deepcopy(self.theirs)
        change(model)
        return model


Padded = list[tuple[Tensor, "Tensor | None", "Tensor | None"]]


def padded(texts: list[Tensor], pad: int, device: torch.device) -> Padded:
    """Texts, longest first -> (ids, mask, places of the real tokens) of at most PADDED_TOKENS; no mask, no places
    where all texts are of one length, which spares transformers the work."""
    batches: Padded = []
    while texts:
        rows = max(PADDED_TOKENS // len(texts[0]), 1)
        part, texts = texts[:rows], texts[rows:]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad).to(device)
        if len(part[-1]) == len(part[0]):
            batches.append((ids, None, None))
            continue
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in part], batch_first=True)
        batches.append((ids, mask.to(device), mask.flatten().nonzero().flatten().to(device)))
    return batches


def hidden_states(model: nn.Module, batches: Padded) -> Tensor:
    """(T, C) of the real tokens."""
    parts = []
    for ids, mask, places in batches:
        hidden = model(ids, attention_mask=mask).last_hidden_state.flatten(0, 1)
        parts.append(hidden if places is None else hidden[places])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fresh(batch: ml.PackedBatch) -> ml.PackedBatch:
    """The same batch, with an empty cache, and known to the host as before."""
    new = replace(batch)
    object.__setattr__(new, "_host", batch._host)
    return new


def providers(models: Models, texts: list[Tensor], compiled: bool) -> dict[str, Run]:
    """All give the hidden states of the real tokens, (T, C)."""
    batch = ml.pack(texts, models.device)
    rows = padded(texts, models.config.pad_token_id or 0, models.device)
    cuda = models.device.type == "cuda"

    # A new batch a call: what ops keep in one (lists of tiles) is part of the work. Its ids are on the card, as are
    # transformers', and known to the host, as they are in the pipeline.
    def ours(make: Callable[[], Callable[..., Tensor]]) -> Run:
        model = functools.cache(make)  # on the first call, where a failure costs one row
        return lambda: model()(fresh(batch))

    def theirs(make: Callable[[], nn.Module]) -> Run:
        model = functools.cache(make)
        return lambda: hidden_states(model(), rows)

    def graphed() -> Callable[..., Tensor]:
        from modernbert_lite.ops.graphs import Graphed

        network = Graphed(models.ours, max_tokens=GRAPH_TOKENS)
        for _ in range(2):  # a shape is captured when it comes for the second time
            network(fresh(batch))
        if not network._graphs:  # it then goes on without, silently
            raise RuntimeError("no graph was captured")
        return network

    runs = {OURS: ours(lambda: models.ours), THEIRS: theirs(lambda: models.theirs)}
    if cuda and len(batch.input_ids) <= GRAPH_TOKENS:
        runs[GRAPHS] = ours(graphed)
    if cuda and importlib.util.find_spec("flash_attn"):
        runs["transformers flash"] = theirs(lambda: models.variant(lambda m: m.set_attn_implementation(FLASH)))
    if cuda and importlib.util.find_spec("packed_encoders"):
        pack = importlib.import_module("packed_encoders").pack
        runs["packed-encoders"] = theirs(lambda: models.variant(pack))
    if compiled:
        torch.compiler.reset()
        # Shapes stay as they are for a case: the best that the compiler can do.
        runs[COMPILED] = ours(lambda: torch.compile(models.ours, dynamic=False))
        runs["transformers compiled"] = theirs(lambda: torch.compile(models.theirs, dynamic=False))
    return runs


def compare(out: Tensor, pool: Pool, indices: list[int]) -> tuple[float, float]:
    """(the least cosine of mean-pooled vectors, the largest difference of hidden states); NaN stays NaN."""
    expected = [pool.expected[i] for i in indices]
    if out.shape != (sum(map(len, expected)), expected[0].shape[1]):
        raise ValueError(f"hidden states of shape {tuple(out.shape)}")
    got = out.float().split([len(e) for e in expected])
    a, b = (torch.stack([x.mean(0) for x in rows]) for rows in (got, expected))
    cosine = float(nn.functional.cosine_similarity(a, b).min())
    return cosine, float((out.float() - torch.cat(expected)).abs().max())


def wall_times(runs: dict[str, Run], case: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds a call. Of "query" each result is waited for; of the rest only the last of a round of calls."""
    once = timing.measure({name: waited(run, 1) for name, run in runs.items()}, 1)
    cuda = options.device == "cuda"
    calls = {name: 1 if case == "query" or not cuda else max(5, math.ceil(0.02 / t)) for name, t in once.items()}
    round_s = sum(calls[name] * once[name] for name in runs)
    most = 20 * options.repeats if case == "query" and cuda else options.repeats
    repeats = max(3, min(most, int(options.case_seconds / round_s)))
    total = timing.measure({name: waited(run, calls[name]) for name, run in runs.items()}, repeats)
    return {name: seconds / calls[name] for name, seconds in total.items()}


def run_case(
    models: Models, case: str, tokens: int, options: argparse.Namespace, where: dict[str, str], emit: Emit
) -> bool:
    """Emits a row a provider. False if one gave wrong numbers, or ours failed."""
    dtype = getattr(torch, options.dtype)
    pool = models.pool(case)
    indices = batch_of([len(t) for t in pool.texts], tokens)
    texts = [pool.texts[i] for i in indices]
    lengths = [len(t) for t in texts]
    total, flops = sum(lengths), model_flops(models.config, lengths)
    head = {"case": case, "shape": models.shape, "tokens": total, "batch_tokens": tokens, "sequences": len(lengths)}
    limit = memory_limit(models.config, total, dtype.itemsize, models.weights)
    rows: dict[str, dict[str, Any]] = {}
    live: dict[str, Run] = {}
    ok = True

    def check(name: str, run: Run, row: dict[str, Any]) -> None:
        """Fills in parity and memory. Raises what the provider raises, or that it is wrong."""
        if name != GRAPHS:
            run()  # compilers and workspaces: not what a call needs
        out, allocated, reserved = peak_memory(run)  # of graphs, what capturing takes: a replay allocates nothing
        cosine, difference = compare(out, pool, indices)
        row |= {"cosine": f"{cosine:.6f}", "max_difference": f"{difference:.2e}"}
        if not (cosine >= pool.least_cosine and difference <= pool.most):  # NaN fails
            raise Unequal(pool.told(cosine, difference))
        if options.device == "cuda":
            row["peak_allocated_mb"] = f"{(models.weights + allocated) / 1e6:.0f}"
            row["peak_reserved_mb"] = f"{(models.weights + reserved) / 1e6:.0f}"
            row["memory_limit_mb"] = f"{limit / 1e6:.0f}"

    for name, run in providers(models, texts, options.compile).items():
        row = rows[name] = dict.fromkeys(COLUMNS, "") | head | {"dtype": options.dtype, "provider": name}
        _, row["note"] = attempt(lambda name=name, run=run, row=row: check(name, run, row))
        if not row["note"]:
            live[name] = run
        elif name.startswith(OURS) or row["note"].startswith(Unequal.__name__):
            ok = False
    seconds, note = attempt(lambda: wall_times(live, case, options)) if live else ({}, "")
    for name, row in rows.items():
        if name not in live:
            continue
        if note:  # one has no room beside the others, or fails now and then
            row["note"] = note
            ok = False
            continue
        s = seconds[name]
        row |= {"tokens_per_s": f"{total / s:.0f}", "seconds": f"{s:.6f}"}
        row |= speeds(flops / s, where["card"], dtype, options)
        if options.device == "cuda":
            turns = 10 if s < 0.05 else 3
            pair, row["note"] = attempt(lambda run=live[name], n=turns: timing.host_and_gpu_time(run, n))
            row |= {"host_ms": f"{pair[0] * 1e3:.3f}", "gpu_ms": f"{pair[1] * 1e3:.3f}"} if pair else {}
        if THEIRS in seconds:
            row["ratio"] = f"{seconds[THEIRS] / s:.2f}"
    for row in rows.values():
        emit(row | where)
    live.clear()
    free()
    return ok


class Unequal(ValueError):
    """A provider's numbers are not the reference's."""


def speeds(flops_per_s: float, card: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, str]:
    row = {}
    if peak := cards.peak_flops(card, dtype):
        row["mfu"] = f"{flops_per_s / peak:.3f}"
    if options.device == "cuda":
        row["mfu_measured"] = f"{flops_per_s / timing.ceilings().flops(dtype):.3f}"
    return row


def run(options: argparse.Namespace, emit: Emit) -> bool:
    """Every case, a row emitted as soon as it is known. False if a provider gave wrong numbers, or ours failed."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = records.gpu_environment()
    started, ok = time.monotonic(), True
    fixed = [case for case in options.cases if case != "query"]
    plan = [("query", QUERY_TOKENS)] if "query" in options.cases else []
    plan += [(case, tokens) for tokens in options.batch_tokens for case in fixed]
    plan = [(case, tokens) for case, tokens in plan if batch_of(pool_lengths(case), tokens)]
    with torch.inference_mode():
        if options.device == "cuda":
            timing.ceilings()  # before the card is full
        for shape in options.shapes:
            models: Models | None = None
            for case, tokens in plan:
                if options.seconds and time.monotonic() - started > options.seconds:
                    print(f"no time left for {shape} {case} in batches of {tokens}", file=sys.stderr)
                    continue
                models = models or Models(shape, dtype, device)
                fine, note = attempt(
                    lambda models=models, case=case, tokens=tokens: run_case(models, case, tokens, options, where, emit)
                )
                ok &= bool(fine)
                if note:
                    row = dict.fromkeys(COLUMNS, "") | {"case": case, "shape": shape, "batch_tokens": tokens}
                    emit(row | {"dtype": options.dtype, "provider": OURS, "note": note} | where)
            models = None
            free()
    return ok


def promises(rows: list[dict[str, str]]) -> cards.Promises:
    return cards.promises(rows, OURS, GRAPHS)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["base"])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=list(BATCH_TOKENS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile of both too: it takes minutes")
    parser.add_argument("--repeats", type=int, default=7, help="rounds at most, 3 at least")
    parser.add_argument("--case-seconds", type=float, default=3.0, help="about so long for the rounds of a case")
    parser.add_argument("--seconds", type=float, default=0, help="start no case after so many")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "encode_gpu.csv")
    parser.add_argument("--check", action="store_true", help="exit with 1 if less is reached than is promised")
    return parser.parse_args(argv)


def _order(key: tuple[str, str, str, int]) -> tuple[Any, ...]:
    shape, case, dtype, batch_tokens = key
    return shape, dtype, case != "query", not case.isdigit(), int(case) if case.isdigit() else 0, case, batch_tokens


def _ours_first(row: dict[str, Any]) -> tuple[bool, int]:
    return row["provider"].startswith("modernbert-lite"), int(row["tokens_per_s"])


def table(rows: Rows, every: bool = False) -> str:
    """A line a shape and case, at the batch size that suits ours best (every: a line a batch size, too): every
    provider's tokens a second, the rest of the fastest of ours."""
    measured = [r for r in rows if r["tokens_per_s"]]
    if not measured:
        return NOT_MEASURED
    names = list(dict.fromkeys(r["provider"] for r in measured))
    columns = ("ratio", "mfu", "host_ms", "gpu_ms", "peak_allocated_mb", "max_difference")
    head = ["shape", "texts of", "batch", *names, "ratio", "MFU", "host ms", "GPU ms", "peak MB", "max difference"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups: dict[Any, dict[str, dict[str, Any]]] = {}
    for r in measured:
        key = r["shape"], r["case"], str(r["dtype"]), int(r["batch_tokens"])
        groups.setdefault(key, {})[r["provider"]] = r
    best = {key: max(group.values(), key=_ours_first) for key, group in groups.items()}
    for key in sorted(groups, key=_order):
        same = [other for other in groups if other[:3] == key[:3]]
        if not every and key != max(same, key=lambda k: _ours_first(best[k])):
            continue
        group, ours = groups[key], best[key]
        speeds = [f"{int(group[n]['tokens_per_s']):,}" if n in group else "" for n in names]
        cells = [key[0], key[1], f"{int(ours['tokens']):,}", *speeds, *(ours[c] for c in columns)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", where(measured)])


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_encode: no CUDA device here", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), flush=True)
        records.write_csv(options.out, rows)

    ok = run(options, emit)
    missed = []
    if options.check:
        missed = cards.missed(promises(rows))
        if missed:
            print("under what is promised: " + "; ".join(missed), file=sys.stderr)
    return 0 if ok and not missed else 1


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:6} {row['case']:>6} {row['batch_tokens']!s:>6} {row['provider']:24}"
    if not row["seconds"]:
        return f"{head} {row['note']}"
    host, gpu, mfu, ratio = (row[name] or "-" for name in ("host_ms", "gpu_ms", "mfu", "ratio"))
    return (
        f"{head} {row['tokens_per_s']:>8} tokens/s, {float(row['seconds']) * 1e3:8.2f} ms (host {host}, GPU {gpu}), "
        f"MFU {mfu}, ratio {ratio}, differs by {row['max_difference']} {row['note']}"
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
