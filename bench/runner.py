"""What the kernels' benches share: a Case (inputs, providers, the truth, the fewest bytes and the useful
operations) becomes rows, each checked against the truth before it is timed and beside what the card gives.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.records import gpu_environment, write_csv
from bench.timing import ceilings, dtype_name, gpu_times, rotate

# ---- parity ----


def error_ratio(got: Any, plain: Any, truth: Any) -> tuple[float, float]:
    """(the largest error of `got`, the largest ratio of an error to what it may be): the rule that an error against
    the truth is at most 2 x that of plain torch in the same dtype, + 1e-6. Tensors, or tuples of them, of which `got`
    may have fewer. A ratio above 1, infinity or NaN breaks the rule."""
    if not tensors(got):
        raise ValueError("no output")
    largest, ratio = 0.0, 0.0
    for g, p, t in zip(tensors(got), tensors(plain), tensors(truth)):  # noqa: B905  `got` may have fewer
        if g.shape != t.shape:
            raise ValueError(f"shape {tuple(g.shape)}, not {tuple(t.shape)}")
        if not t.numel():
            continue
        error, allowed = (float((x.to(t.dtype) - t).abs().max()) for x in (g, p))
        this = error / (2 * allowed + 1e-6)
        largest = error if math.isnan(error) else max(largest, error)
        ratio = this if math.isnan(this) else max(ratio, this)
        if math.isnan(ratio):
            break
    return largest, ratio


def tensors(x: Any) -> list[Tensor]:
    return [y for y in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(y, Tensor)]


# ---- the kernels' benches ----


class Shape(NamedTuple):
    C: int  # hidden_size
    H: int  # heads
    D: int  # head_dim
    N: int  # intermediate_size


SHAPES = {
    "base": Shape(768, 12, 64, 1152),
    "large": Shape(1024, 16, 64, 2624),
    "small": Shape(384, 12, 32, 576),
    "gte": Shape(768, 12, 64, 3072),
    "1792": Shape(1792, 28, 64, 3840),
}
TINY = Shape(64, 2, 32, 72)  # --smoke


@dataclass
class Options:
    tokens: Sequence[int] | None = None  # None: the bench's own
    dtypes: Sequence[str] = ("bfloat16",)
    cases: Sequence[str] | None = None  # beginnings of names; None: all
    compile: bool = True
    smoke: bool = False
    repeats: int = 20
    seconds: float = 0.2  # of GPU time a provider and case
    deadline: float | None = None  # of time.monotonic(): no case starts after it
    tune: bool = False  # launch parameters instead of peers
    failures: list[str] = field(default_factory=list)  # filled in: which providers missed parity
    emit: Callable[[dict[str, Any]], None] | None = None  # gets each row as soon as it is known

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def shapes(self, *names: str) -> dict[str, Shape]:
        if self.smoke:
            return {names[0]: TINY}
        return {name: SHAPES[name] for name in names}

    def sizes(self, *default: int, smoke: int) -> Sequence[int]:
        return [smoke] if self.smoke else self.tokens or (self.tune and default[-2:-1]) or default

    def torch_dtypes(self) -> list[torch.dtype]:
        return [getattr(torch, name) for name in self.dtypes]

    def compiles(self, case: str) -> bool:
        """Only the base shape: it takes seconds a case."""
        return self.compile and not self.smoke and not self.tune and case == "base"

    def peer(self, module: str, name: str) -> Any:
        """A function of a peer's, or None where it isn't installed or doesn't load."""
        if self.device != "cuda" or self.tune:
            return None
        try:
            return getattr(importlib.import_module(module), name, None)
        except Exception:  # noqa: BLE001  compiled extensions fail with errors of many kinds
            return None

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass
class Case:
    """Providers are called with what `make` gives, and so is `truth`, in fp64. "torch" is the plain one."""

    name: str
    tokens: int
    dtype: torch.dtype
    make: Callable[[], tuple[Tensor, ...]]
    truth: Callable[..., Any]
    providers: dict[str, Callable[..., Any]]
    bytes: int  # the fewest that must be read and written
    flops: int = 0  # the useful ones
    notes: dict[str, str] = field(default_factory=dict)  # a provider -> how it differs; its parity is only reported
    look: Callable[[Any], Any] = tensors  # the part of an output that `truth` gives


class Promise(NamedTuple):
    """Of the provider "triton" in bfloat16: case, the fewest tokens it is for, a column and the least it must hold."""

    case: str
    tokens: int
    column: str
    least: float


COLUMNS = (
    *("op", "case", "tokens", "dtype", "provider", "microseconds", "bytes", "flops", "gb_per_s", "tflop_per_s"),
    *("fraction", "ceiling", "speedup", "max_error", "note"),
)


def run_cases(op: str, cases: Iterable[Case], options: Options) -> list[dict[str, Any]]:
    """A row for each case and provider that runs and keeps parity, printed as it comes. `ops` is held to plain torch
    meanwhile: it is the baseline here."""
    rows: list[dict[str, Any]] = []
    if not options.smoke:
        ceilings()
    with backend("torch"), torch.no_grad():
        for case in cases:
            if options.cases is not None and not case.name.startswith(tuple(options.cases)):
                continue
            if options.late():
                print(f"{op}: out of time at {case.name}, {case.tokens} tokens", file=sys.stderr)
                break
            try:
                new = _run_case(op, case, options)
            except torch.OutOfMemoryError:
                print(f"{op} {case.name} {case.tokens}: not enough memory for the case", file=sys.stderr)
                new = []
            except Exception as error:  # noqa: BLE001  the other cases' numbers are worth having
                options.failures.append(f"{op} {case.name} {case.tokens}: {type(error).__name__} {error}")
                print(options.failures[-1], file=sys.stderr)
                new = []
            for row in new:
                if not rows:
                    print(_line(dict(zip(COLUMNS, COLUMNS, strict=True))))
                print(_line(row), flush=True)
                rows.append(row)
                if options.emit:
                    options.emit(row)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return rows


def _run_case(op: str, case: Case, options: Options) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = case.make()
    truth = [t.double() for t in tensors(case.truth(*(x.double() if x.is_floating_point() else x for x in inputs)))]
    where = f"{op} {case.name} {case.tokens} {dtype_name(case.dtype)}"
    plain = got = copies = None
    errors: dict[str, float] = {}
    for name, run in list(case.providers.items())[: 8 if options.smoke else None]:  # of --tune's configurations a few
        ours = name in ("torch", "triton")
        if options.late() and not ours:
            continue
        try:
            copies = [x.clone() for x in inputs]
            # The memory that the output will most likely lie in: what isn't written shows.
            poison = [torch.full_like(x, math.nan) for x in tensors(plain)]
            del poison
            got = run(*copies)
            plain = got if name == "torch" else plain
            errors[name], ratio = error_ratio(case.look(got), case.look(plain), truth)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a peer, a compiler or a configuration may fail in any way: a row less
            why = (str(error).strip().splitlines() or [""])[0][:150]
            print(f"{where}: {name} can't run: {type(error).__name__} {why}", file=sys.stderr)
            if name == "torch":
                raise
            if ours:
                options.failures.append(f"{where}: {name} can't run")
            continue
        if not ratio <= 1 and (name not in case.notes or math.isnan(ratio)):
            options.failures.append(f"{where}: {name} errs by {errors.pop(name):.3g}, {ratio:.2f} of what it may")
            print(options.failures[-1], file=sys.stderr)
    size = sum(x.nbytes for x in (*inputs, *tensors(plain)))
    runs = {name: case.providers[name] for name in errors}
    del inputs, truth, plain, got, copies
    times = {} if options.smoke else _times(runs, case.make, size, options)
    return [_row(op, case, name, times, errors[name]) for name in runs]


def _times(
    runs: dict[str, Callable[..., Any]], make: Callable[[], tuple[Tensor, ...]], size: int, options: Options
) -> dict[str, float]:
    copies = rotate(make, size)
    for run in runs.values():  # backward providers do their forward pass here
        for copy in copies:
            run(*copy)
    # Results are kept as long as inputs rest, so that the allocator's next output is not in the cache either.
    kept: deque[Any] = deque(maxlen=len(copies))

    def turning(run: Callable[..., Any]) -> Callable[[], None]:
        place = 0

        def call() -> None:
            nonlocal place
            place = (place + 1) % len(copies)
            kept.append(run(*copies[place]))

        return call

    return gpu_times({name: turning(run) for name, run in runs.items()}, options.repeats, options.seconds)


def _row(op: str, case: Case, provider: str, times: dict[str, float], error: float) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS, "") | {"op": op, "case": case.name, "tokens": case.tokens, "provider": provider}
    row |= {"dtype": dtype_name(case.dtype), "bytes": case.bytes, "flops": case.flops}
    row |= {"max_error": f"{error:.2e}", "note": case.notes.get(provider, "")}
    if times:
        seconds = times[provider]
        floors = {"copy": case.bytes / ceilings().copy, "product": case.flops / ceilings().flops(case.dtype)}
        # The larger floor is the one that binds.
        ceiling = "product" if floors["product"] > floors["copy"] else "copy"
        row |= {"microseconds": round(seconds * 1e6, 2), "gb_per_s": round(case.bytes / seconds / 1e9, 1)}
        row |= {"tflop_per_s": round(case.flops / seconds / 1e12, 2) if case.flops else ""}
        row |= {"fraction": round(floors[ceiling] / seconds, 3), "ceiling": ceiling}
        row |= {"speedup": round(times["torch"] / seconds, 2) if "torch" in times else ""}
    return row | gpu_environment()


def _line(row: dict[str, Any]) -> str:
    widths = {"op": 10, "case": 22, "tokens": 7, "dtype": 9, "provider": 30, "microseconds": 12, "gb_per_s": 9}
    widths |= {"tflop_per_s": 12, "fraction": 9, "ceiling": 8, "speedup": 8, "max_error": 10, "note": 0}
    return " ".join(f"{row[name]!s:{width}}" for name, width in widths.items()).rstrip()


def missed(rows: Sequence[dict[str, Any]], promises: Iterable[Promise]) -> list[str]:
    """What is promised and not kept, or not measured."""
    bad = []
    for promise in promises:
        held = [
            row
            for row in rows
            if (row["case"], row["dtype"], row["provider"]) == (promise.case, "bfloat16", "triton")
            and row["tokens"] >= promise.tokens
        ]
        name = f"{promise.case} from {promise.tokens} tokens, {promise.column} at least {promise.least:.3g}"
        bad += [] if held else [f"{name}: not measured"]
        bad += [
            f"{name}: {row[promise.column]} at {row['tokens']}"
            for row in held
            if row[promise.column] == "" or row[promise.column] < promise.least
        ]
    return bad


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a --tune's rows, the fastest of each case, and the one that is built in ("triton")."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["provider"] != "torch" and row["microseconds"] != "":
            groups.setdefault((row["case"], row["tokens"], row["dtype"]), []).append(row)
    found = []
    for group in groups.values():
        found.append(min(group, key=lambda row: row["microseconds"]))
        found += [row for row in group if row["provider"] == "triton" and row is not found[-1]]
    return found


def backward(forward: Callable[..., Any], grads: int = 1, *, once: bool = False) -> Callable[..., Any]:
    """A provider of gradients by autograd: its last `grads` inputs are those of forward's outputs, the others get
    theirs. The forward pass runs once for each set of inputs, so that only the backward pass is timed. once: it is
    forgotten at once."""
    graphs: dict[int, Any] = {}  # by identity, and holding what it stands for, so that no identity comes twice

    def run(*inputs: Tensor) -> Any:
        if id(inputs[0]) not in graphs:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in inputs[:-grads]]
                graphs[id(inputs[0])] = inputs, leaves, tensors(forward(*leaves))
        _, leaves, outputs = (graphs.pop if once else graphs.get)(id(inputs[0]))
        return torch.autograd.grad(outputs, leaves, inputs[-grads:], retain_graph=True)

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for these very shapes, from a clean state: what was compiled before counts towards a limit."""
    importlib.import_module("torch._functorch.config").donated_buffer = False  # the backward pass runs more than once
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.get("MODERNBERT_LITE_BACKEND")
    os.environ["MODERNBERT_LITE_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["MODERNBERT_LITE_BACKEND"]
        else:
            os.environ["MODERNBERT_LITE_BACKEND"] = before


def patched(function: Callable[..., Any], module: Any, **names: Any) -> Callable[..., Any]:
    """The function with names of the module exchanged while it runs."""

    def run(*args: Any) -> Any:
        before = {name: getattr(module, name) for name in names}
        try:
            for name, value in names.items():
                setattr(module, name, value)
            return function(*args)
        finally:
            for name, value in before.items():
                setattr(module, name, value)

    return run


class Launch:
    """A kernel whose launches get more keywords, such as num_warps."""

    def __init__(self, kernel: Any, **more: Any) -> None:
        self.kernel, self.more = kernel, more

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch, more = self.kernel[grid], self.more
        return lambda *args, **keywords: launch(*args, **{**keywords, **more})


def packed(lengths: Sequence[int], device: str) -> Any:
    """A PackedBatch of these lengths; its ids are all 0."""
    import modernbert_lite as ml

    return ml.pack([torch.zeros(n, dtype=torch.int64) for n in lengths]).to(device)


def split(T: int, length: int) -> list[int]:
    """T tokens in sequences of `length`, the last one shorter if need be: 13, 5 -> [5, 5, 3]"""
    return [min(length, T - start) for start in range(0, T, length)]


def kernel_main(
    op: str,
    doc: str | None,
    rows: Callable[[Options], list[dict[str, Any]]],
    promises: Sequence[Promise],
    argv: Sequence[str] | None,
) -> int:
    """The command line of every bench_<op>.py. 0; 1 if parity or a promise is missed; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"a folder: {op}.csv is written there (tune_{op}.csv)")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens a batch")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--cases", nargs="+", help="only cases whose names begin so: base, large, ...")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes seconds a case")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--check", action="store_true", help="exit with 1 if less than promised is reached")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any machine: parity, no times, no files")
    parser.add_argument("--tune", action="store_true", help="launch parameters instead of peers; prints the best")
    args = parser.parse_args(argv)

    here = torch.cuda.is_available()
    if not here and not args.smoke:
        print(f"bench_{op}: there is no GPU here; --smoke runs anywhere, without times", file=sys.stderr)
        return 2
    if not here:
        os.environ["TRITON_INTERPRET"] = "1"  # decides when triton is imported
    # Triton's interpreter does not round bf16 as a card does.
    dtypes = args.dtype or ["float32", "float16"][: 2 * args.smoke] + ["bfloat16"][:here]
    options = Options(
        args.tokens, dtypes, args.cases, not args.no_compile, args.smoke, args.repeats, tune=args.tune,
        deadline=None if args.minutes is None else time.monotonic() + 60 * args.minutes,
    )  # fmt: skip
    if args.tune:
        options.repeats, options.seconds = 5, 0.02
    found = rows(options)
    if args.tune and not args.smoke:
        print("\nbest, and what is built in:")
        for row in best(found):
            print(_line(row))
    if args.out and found and not args.smoke:
        write_csv(args.out / f"{'tune_' if args.tune else ''}{op}.csv", found)
    bad = list(options.failures)
    if args.check and not args.smoke and not args.tune:
        bad += missed(found, promises)
    if bad or not found:
        print("\n".join(bad or ["nothing was measured"]), file=sys.stderr)
        return 1
    return 0
