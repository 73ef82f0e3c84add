"""This project on a CPU beside the engines that people leave PyTorch for: one checkpoint, one run, taking turns.

    pip install -e '.[test,bench]'          # the peers: transformers, sentence-transformers, onnxruntime, openvino
    python -m bench.bench_cpu               # about 20 minutes on 2 cores; writes bench/results/cpu.csv and cpu.svg
    python -m bench.bench_cpu --check       # also fails if a ratio, or the peak memory, is not what is promised
    python -m bench.bench_cpu --work DIR    # keeps the checkpoint (600 MB) and what is exported from it (750 MB)
    python -m bench.bench_cpu --smoke       # seconds, tiny shapes: does it all hang together?

The checkpoint is ModernBERT-base's shape with random weights. Every engine is a process of its own, started anew for
each case and dtype, so that its peak memory and its load time (process start to model ready; first_s: to the first
result of 32 tokens) are its own. Nobody is timed before its hidden states were compared with transformers' in fp32.
Then they take turns, every second round backwards; a turn repeats the call for a while, and the median of the turns'
medians counts. Tokens are real ones. We get packed batches, the peers padded ones as they are used: the ragged set
sorted by length, 8 rows at a time. Tokenizing is left out; but sentence-transformers loads its tokenizer.
onnxruntime and openvino read one ONNX file of dynamic shape, by torch.export; onnxruntime's int8 is its
quantize_dynamic, a channel at a time.
"""

from __future__ import annotations

# Only the standard library, here: a worker's load time and memory are its engine's alone.
import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench.engines import DTYPES, OURS, PROVIDERS, REFERENCE, ROOT, make, worker

PACKAGES = tuple(dict.fromkeys(["torch", *PROVIDERS, "onnx"]))  # whose versions a row has

# name -> (lengths, rows in a padded batch); slow ones last, so that a run that is cut off has the most
CASES: dict[str, tuple[list[int], int]] = {
    "1x32": ([32], 1),
    "8x128": ([128] * 8, 8),
    "2x512": ([512] * 2, 2),
    "1x2048": ([2048], 1),
    "ragged": ([], 8),
    "1x8192": ([8192], 1),
}
SMOKE_CASES = {"1x32": ([32], 1), "ragged": ([70, 24, 9], 2)}
LEFT_OUT = {("onnxruntime", "int8", "1x8192")}  # 10 GB, and nothing is promised there

# Ours over the named peer of the same dtype.
NAMED = {"float32": "openvino", "bfloat16": "openvino", "int8": "onnxruntime"}
PROMISES: dict[str, dict[str, float]] = {
    "float32": {"1x32": 1.0, "8x128": 1.0, "2x512": 1.1, "1x2048": 1.5, "1x8192": 3.0, "ragged": 1.5},
    "bfloat16": {"1x32": 1.0, "8x128": 1.0, "2x512": 1.0, "1x2048": 1.4, "1x8192": 2.5, "ragged": 1.4},
    "int8": {"1x32": 1.0, "8x128": 1.3, "2x512": 1.5, "1x2048": 2.5, "ragged": 1.5},
}
PEAK_MB = 1500  # ours, float32, 1x8192
TOLERANCE, PEERS_TOLERANCE = 2e-5, 1e-4  # float32: max |difference| of hidden states; the peers promise nothing
COSINE = {"bfloat16": 0.999, "int8": 0.98}  # ours, the worst of mean-pooled vectors

TURN_S = 0.2  # a turn repeats a call for so long, at least once
LIMIT_S = 30.0  # no new round of a case and dtype after this time, once there were three (two of slow ones)
SLOW_ROUND_S = 60.0
PAUSE_S = 0.05  # before a turn: the threads of the one before spin for some milliseconds, then sleep
ANSWER_S = 900.0  # the longest that a worker may take for anything
RESERVE_MB = 4000  # with less memory left, a worker ends after its turn

Row = dict[str, Any]
Absent = dict[tuple[str, str], str]  # (provider, dtype) -> why it can't run


def prepare(name: str, folder: Path, smoke: bool, log: Path) -> str:
    """Makes a part of the folder if it isn't there yet. What went wrong, or ""."""
    if (folder / name).is_dir():
        return ""
    command = [sys.executable, "-m", "bench.bench_cpu", "--make", name, str(folder), "smoke" if smoke else "base"]
    print(f"making {folder / name} ...", file=sys.stderr, flush=True)
    with log.open("a") as file:
        done = subprocess.run(command, cwd=ROOT, env=quiet(), stdout=file, stderr=subprocess.PIPE, text=True)
        file.write(done.stderr)
    if done.returncode == 0:
        return ""
    last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return f"{name} could not be made: {last[-1].strip()}"[:200]


def quiet(threads: int | None = None) -> dict[str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    if threads:
        # A libiomp5 spins for 200 ms after its work, while the next one is measured already; libgomp for a few.
        env |= {"OMP_NUM_THREADS": str(threads), "MODERNBERT_LITE_THREADS": str(threads), "KMP_BLOCKTIME": "20"}
    return env


# ---- the parent's side ----


class WorkerError(RuntimeError):
    pass


class Worker:
    """A provider's process; started when it is needed, kept between turns while there is memory."""

    def __init__(self, provider: str, dtype: str, folder: Path, threads: int, log: Path):
        self.command = [sys.executable, "-m", "bench.bench_cpu", "--worker", provider, dtype, str(folder), str(threads)]
        self.env, self.log = quiet(threads), log
        self.process: subprocess.Popen[str] | None = None
        self.peak_mb = 0.0
        self.case: Row = {}
        self.load_s = self.first_s = 0.0

    def start(self, case: Row, save: Path | None = None) -> None:
        """Loads, runs 32 tokens, then the case. Raises WorkerError."""
        self.case = case
        begin = time.perf_counter()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()
        load_s = time.perf_counter() - begin
        self._ask(texts=[list(range(5, 37))], rows=1, save=None)
        if not self.first_s:  # the times of the first start: later ones find the machine's caches warm
            self.load_s, self.first_s = load_s, time.perf_counter() - begin
        self._ask(**case, save=save and str(save))

    def turn(self) -> float:
        """Median seconds of a call. Raises WorkerError."""
        if self.process is None:
            self.start(self.case)
        time.sleep(PAUSE_S)
        return float(self._ask(turn=TURN_S)["seconds"])

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):  # what it hadn't read
                self.process.stdin.close()
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def close_if_short_of_memory(self) -> None:
        if available_mb() < RESERVE_MB:
            self.close()

    def _ask(self, **command: Any) -> Row:
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        timer = threading.Timer(ANSWER_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        self.peak_mb = max(self.peak_mb, answer["peak_mb"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


def available_mb() -> float:
    try:
        return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return float("inf")


def compare(got: Any, expected: Any, lengths: Sequence[int]) -> dict[str, float]:
    """Hidden states (T, C): the largest difference; the mean and the worst cosine of the texts' mean vectors."""
    import numpy as np

    if got.shape != expected.shape:
        raise WorkerError(f"hidden states are {got.shape}, not {expected.shape}")
    starts = np.cumsum([0, *lengths[:-1]])
    a, b = (np.add.reduceat(x.astype(np.float64), starts) for x in (got, expected))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    largest = np.abs(got - expected).max()
    return {"max_difference": float(largest), "cosine": float(cosine.mean()), "worst_cosine": float(cosine.min())}


def unequal(provider: str, dtype: str, parity: dict[str, float]) -> str:
    """Why a provider gets no speed, or "". Of peers, 16 and 8 bits are reported, not judged: the weights are random."""
    if dtype == "float32":
        tolerance = TOLERANCE if provider == OURS else PEERS_TOLERANCE
        if not parity["max_difference"] <= tolerance:  # NaN too
            return f"unequal: hidden states differ by {parity['max_difference']:.1e}, more than {tolerance:.0e}"
        return ""
    least = COSINE[dtype] if provider == OURS else -1.1
    if not parity["worst_cosine"] >= least:
        return f"unequal: worst cosine {parity['worst_cosine']:.5f}, less than {least}"
    return ""


def texts_of(lengths: Sequence[int]) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(5, 50_000) for _ in range(n)] for n in lengths]


class Run(NamedTuple):
    folder: Path  # what they all read
    log: Path  # of the workers
    threads: int
    repeats: int
    absent: Absent


def reference(run: Run, case: str, lengths: Sequence[int], rows: int) -> Any:
    """transformers' hidden states in fp32, made once a folder. Raises WorkerError."""
    import numpy as np

    path = run.folder / f"reference-{case}-{version(REFERENCE)}.npy"
    if not path.exists():
        new = path.with_suffix(".new.npy")
        one = Worker(REFERENCE, "float32", run.folder, run.threads, run.log)
        try:
            one.start({"texts": texts_of(lengths), "rows": rows}, new)
        finally:
            one.close()
        new.replace(path)
    return np.load(path)


def measure_case(
    run: Run, case: str, lengths: Sequence[int], rows: int, dtype: str, providers: Sequence[str]
) -> list[Row]:
    """A row a provider. Each is started, checked, then timed in turns; who fails costs its own row only."""
    import numpy as np

    given = {"texts": texts_of(lengths), "rows": rows}
    found: dict[str, Row] = {}
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {}
    try:
        expected, broken = reference(run, case, lengths, rows), ""
    except WorkerError as error:
        expected, broken = None, f"nothing to compare with: {error}"
    try:
        for name in providers:
            found[name] = {"case": case, "tokens": sum(lengths), "dtype": dtype, "provider": name, "note": ""}
            if why := run.absent.get((name, dtype)) or broken:
                found[name]["note"] = why
                continue
            workers[name] = one = Worker(name, dtype, run.folder, run.threads, run.log)
            with failing(workers, found, name), tempfile.TemporaryDirectory() as folder:
                one.start(given, Path(folder) / "hidden.npy")
                parity = compare(np.load(Path(folder) / "hidden.npy"), expected, lengths)
                found[name] |= {"max_difference": f"{parity['max_difference']:.1e}"}
                found[name] |= {key: f"{parity[key]:.5f}" for key in ("cosine", "worst_cosine")}
                if why := unequal(name, dtype, parity):
                    raise WorkerError(why)
                one.close_if_short_of_memory()
        times = take_turns(workers, run.repeats, lambda name: failing(workers, found, name))
        for name, one in workers.items():
            speed = sum(lengths) / statistics.median(times[name])
            found[name] |= {"tokens_per_s": f"{speed:.0f}", "peak_mb": f"{one.peak_mb:.0f}"}
            found[name] |= {"load_s": f"{one.load_s:.2f}", "first_s": f"{one.first_s:.2f}"}
    finally:
        for one in workers.values():
            one.close()
    return with_ratios(list(found.values()))


@contextlib.contextmanager
def failing(workers: dict[str, Worker], found: dict[str, Row], name: str) -> Iterator[None]:
    """A worker that fails is out, and its row says why."""
    try:
        yield
    except WorkerError as error:
        workers.pop(name).close()
        found[name]["note"] = str(error)


def take_turns(
    workers: dict[str, Any], repeats: int, guard: Callable[[str], contextlib.AbstractContextManager[None]]
) -> dict[str, list[float]]:
    """Seconds of each worker's turns; `guard` may take one out of `workers`."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    begin = time.monotonic()
    for turn in range(repeats):
        for name in list(workers)[:: -1 if turn % 2 else 1]:
            with guard(name):
                times[name].append(workers[name].turn())
                workers[name].close_if_short_of_memory()
        spent = time.monotonic() - begin
        least = 2 if spent > SLOW_ROUND_S * (turn + 1) else 3
        if spent > LIMIT_S and turn + 1 >= least:
            break
    return times


def with_ratios(rows: list[Row]) -> list[Row]:
    """Rows of one case and dtype, with every speed over the named peer's."""
    speeds = {row["provider"]: int(row["tokens_per_s"]) for row in rows if row.get("tokens_per_s")}
    named = speeds.get(NAMED[rows[0]["dtype"]]) if rows else None
    for row in rows:
        speed = speeds.get(row["provider"])
        row["ratio"] = f"{speed / named:.2f}" if speed and named else ""
    return rows


def missed(rows: Sequence[Row]) -> list[str]:
    """What is promised of the cases and dtypes in the rows, and isn't so; also what couldn't be compared."""
    bad = []
    for row in rows:
        case, dtype = row["case"], row["dtype"]
        if row["provider"] != OURS:
            continue
        promised = PROMISES[dtype].get(case)
        if promised is not None and not row.get("ratio"):
            bad.append(f"{dtype} {case}: no ratio to {NAMED[dtype]}" + (f" ({row['note']})" if row["note"] else ""))
        elif promised is not None and float(row["ratio"]) < promised:
            bad.append(f"{dtype} {case}: {row['ratio']} x {NAMED[dtype]}, promised {promised}")
        if (dtype, case) == ("float32", "1x8192") and row.get("peak_mb") and float(row["peak_mb"]) >= PEAK_MB:
            bad.append(f"{dtype} {case}: peak memory {row['peak_mb']} MB, promised less than {PEAK_MB}")
    return bad


COLUMNS = (
    "case", "tokens", "dtype", "provider", "tokens_per_s", "ratio", "peak_mb", "load_s", "first_s", "max_difference",
    "cosine", "worst_cosine", "note",
)  # fmt: skip


def write(out: Path, rows: Sequence[Row], where: dict[str, str]) -> None:
    from bench import plot
    from bench.records import replacing, write_csv

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "cpu.csv") as path:
        write_csv(path, [{**dict.fromkeys(COLUMNS, ""), **row, **where} for row in rows])
    with replacing(out / "cpu.svg") as path:
        note = ", ".join(f"{key} {value}" for key, value in where.items())
        path.write_text(plot.speeds(rows, note))


def table(rows: Sequence[Row]) -> str:
    """A line a dtype and provider: tokens a second of each case, ours with the ratio to the peer that the promises
    name; peak memory of the longest case, times from a process's start."""
    present = dict.fromkeys(row["case"] for row in rows)
    cases = list(dict.fromkeys([case for case in PROMISES["float32"] if case in present] + list(present)))
    head = ["dtype", "engine", *cases, "peak MB, 1x8192", "loaded, s", "first result, s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["provider"]), {})[row["case"]] = row
    for (dtype, provider), group in sorted(groups.items(), key=lambda item: list(NAMED).index(item[0][0])):
        cells = []
        for row in (group.get(case, {}) for case in cases):
            speed = f"{int(row['tokens_per_s']):,}" if row.get("tokens_per_s") else "–"
            cells.append(f"{speed} ({row['ratio']} x)" if provider == OURS and row.get("ratio") else speed)
        peak = group.get("1x8192", {}).get("peak_mb")
        cells.append(f"{int(peak):,}" if peak else "–")
        for column in ("load_s", "first_s"):
            seconds = [float(row[column]) for row in group.values() if row.get(column)]
            cells.append(f"{statistics.median(seconds):.1f}" if seconds else "–")
        lines.append(f"| {' | '.join([dtype, provider, *cells])} |")
    noted: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            noted.setdefault(f"{row['provider']}, {row['dtype']}: {row['note']}", []).append(row["case"])
    notes = [f"- {note} ({', '.join(where)})" for note, where in noted.items()]
    r = rows[0]
    peers = ("transformers", "sentence-transformers", "onnxruntime", "openvino")
    where = (
        f"x: over {', '.join(f'{peer} in {dtype}' for dtype, peer in NAMED.items())}. {r['machine']}, {r['threads']} "
        f"threads, torch {r['torch']}, {', '.join(f'{p} {r[p]}' for p in peers)}, commit {r['commit']}, {r['date']}."
    )
    return "\n".join([*lines, "", *notes, *([""] if notes else []), where])


def absences(providers: Sequence[str], dtypes: Sequence[str], folder: Path, smoke: bool, log: Path) -> Absent:
    """(provider, dtype) -> why it can't run: a package that isn't there, or a file that couldn't be made."""
    absent = {}
    for name in providers:
        can, needs = PROVIDERS[name]
        gone = [package for package in needs if not importlib.util.find_spec(package.replace("-", "_"))]
        for dtype in (dtype for dtype in dtypes if dtype in can):
            why = f"not installed: {', '.join(gone)}" if gone else ""
            for part in ["onnx", "int8"][: 1 + (dtype == "int8")] if "onnx" in needs else []:
                why = why or prepare(part, folder, smoke, log)
            if why:
                absent[name, dtype] = why
        for why in dict.fromkeys(why for (provider, _), why in absent.items() if provider == name):
            print(f"{name} is skipped: {why}" + (" (pip install -e '.[test,bench]')" if gone else ""), file=sys.stderr)
    return absent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15, help="the most rounds; slow cases get fewer, three or two")
    parser.add_argument("--threads", type=int, default=here, help=f"default: all cores, {here} here")
    parser.add_argument("--out", type=Path, help="a folder; default: bench/results (with --smoke: nothing is written)")
    parser.add_argument(
        "--work", type=Path, help="a folder for the checkpoint and the exports, kept; default: temporary"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if less than promised is reached")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and two tiny cases")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--worker"]:
        return worker(*argv[1:])
    if argv[:1] == ["--make"]:
        return make(*argv[1:])
    args = parse(argv)
    if not importlib.util.find_spec("transformers"):
        print("bench_cpu: the checkpoint is made by transformers: pip install -e '.[test,bench]'", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = (work / ("smoke" if args.smoke else "base")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> int:
    from bench.records import RESULTS, environment
    from bench.texts import ragged_lengths

    log = folder / "workers.log"
    log.unlink(missing_ok=True)
    if why := prepare("checkpoint", folder, args.smoke, log):
        print(f"bench_cpu: {why}", file=sys.stderr)
        return 1
    absent = absences(args.providers, args.dtype, folder, args.smoke, log)
    run = Run(folder, log, args.threads, args.repeats, absent)
    out = args.out or (None if args.smoke else RESULTS)
    where = environment(*PACKAGES) | {"threads": str(args.threads)} | ({"smoke": "smoke"} if args.smoke else {})
    rows: list[Row] = []
    cases = {name: case for name, case in (SMOKE_CASES if args.smoke else CASES).items() if name in args.cases}
    for case, (lengths, at_once) in cases.items():
        for dtype in args.dtype:
            chosen = [p for p in args.providers if dtype in PROVIDERS[p][0] and (p, dtype, case) not in LEFT_OUT]
            new = measure_case(run, case, lengths or ragged_lengths(), at_once, dtype, chosen)
            for row in new:
                said = f"{row['tokens_per_s']:>6} tokens/s {row['ratio']:>5}" if "tokens_per_s" in row else row["note"]
                print(f"{case:8} {dtype:9} {row['provider']:22} {said}", flush=True)
            rows += new
            if out and rows:
                write(out, rows, where)
    print("\n" + table([row | where for row in rows]))
    bad = [f"{r['dtype']} {r['case']}: {r['note']}" for r in rows if r["provider"] == OURS and "unequal" in r["note"]]
    bad += missed(rows) if args.check and not args.smoke else []
    if bad:
        print("not as promised: " + "; ".join(dict.fromkeys(bad)), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
