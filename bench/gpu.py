"""The whole suite on whatever GPU is here, within some minutes, from the checkout alone:

    python -m bench.gpu --out DIR [--minutes 9] [--skip-tests] [--anyway]
    python -m bench.gpu --out DIR --smoke    # the same machinery on any CPU, with tiny shapes

Leaves in DIR: encode_gpu.csv, gte_gpu.csv, kernels_gpu.csv, tune_gpu.csv (launch parameters), strings_gpu.csv,
report.md, roofline.svg and sections.log. Each section is a process of its own with a share of the time that is left:
one that crashes or hangs costs only itself. What is known is written every two seconds, so that a run that is killed
leaves what it had. The first section asks whether the numbers are right (bench/right.py). If they aren't, nothing is
timed, unless --anyway is given.
Exit status: 0; 1 if a section failed or numbers were wrong; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KERNELS = ("attention", "rope", "geglu", "layer_norm", "pooling")
# Of these the ones marked gpu; the others in them can run on a card, too, with TRITON_INTERPRET=0, but not in minutes.
TESTS = ("tests/kernels/test_*.py", "tests/ops/test_gpu*.py", "tests/ops/test_float8.py")
RIGHT, LOG = "is it right?", "sections.log"
SIZES = (32_768, 8_192, 131_072, 1_024)  # tokens in a kernel's batch: what is promised is of the first
TABLES = ("encode", "gte", "kernels", "tune", "strings")


@dataclass
class Section:
    name: str
    weight: float  # its share of what is left, beside those that follow
    command: list[str]
    longest: float = 600  # seconds


def plan(smoke: bool, skip_tests: bool) -> list[Section]:
    """The most telling first: time may run out."""
    tests = test_files() if importlib.util.find_spec("pytest") else []
    # -W: what else is installed there may warn.
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        *tests,
        "-m",
        "gpu",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    if smoke:
        tiny = shlex.split("encode --device cpu --dtype float32 --shapes smoke --cases query 128 ragged --batch-tokens")
        tiny += shlex.split("300 --repeats 3 --case-seconds 0.1")
        parts = [("encode", 2, tiny), ("kernels", 2, ["kernels", *KERNELS]), ("tune", 1, ["tune", "attention"])]
        parts += [("strings", 1, ["strings", "--smoke", "--no-peer"])]
        parts += [("gte", 1, ["gte", "--smoke", "--cases", "8x128", "--repeats", "1"])]
        first = Section("tests", 1, [*pytest, "-q", "--collect-only"])
    else:
        main, more = ["--batch-tokens", "32768", "4096", "131072"], ["--batch-tokens", "16384", "8192", "65536"]
        fixed = ["--cases", "128", "512", "2048", "8192", "ragged"]
        parts = [
            ("ceilings", 0.5, ["ceilings"]),
            ("encode base", 5, ["encode", *main]),
            ("strings", 3.5, ["strings"]),
            *((name, 3 if name == "attention" else 1, ["kernels", name]) for name in KERNELS),
            ("tune attention", 3, ["tune", "attention"]),
            ("encode large", 2, ["encode", "--shapes", "large", *main]),
            ("gte", 1.5, ["gte", "--device", "cuda"]),
            ("encode base, more sizes", 2, ["encode", *fixed, *more]),
            ("tune", 1, ["tune", "geglu", "layer_norm", "rope"]),
            ("torch.compile, kernels", 0.7, ["compiled", *KERNELS[1:]]),
            ("torch.compile, encode", 1, ["encode", "--compile", "--cases", "512", "2048", *main[:2]]),
        ]
        first = Section("tests", 9, [*pytest, "-v"], 180)  # -v: a test that hangs has its name in the log
    own = [sys.executable, "-m", "bench.gpu", *(["--smoke"] if smoke else []), "--section"]
    right = Section(RIGHT, 6, [*own, "right"], 180)
    sections = [Section(name, weight, [*own, *words]) for name, weight, words in parts]
    return [right, *([] if skip_tests or not tests else [first]), *sections]


def test_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in TESTS for path in ROOT.glob(pattern))


# ---- a section's own process ----


def say(**what: Any) -> None:
    """A line to the process that started this one; what was said stays said if this one is killed."""
    with open(os.environ["BENCH_GPU_LINES"], "a") as lines:
        lines.write(json.dumps(what, default=str) + "\n")


def section(kind: str, words: Sequence[str], smoke: bool) -> int:
    left = max(float(os.environ["BENCH_GPU_DEADLINE"]) - time.time(), 1)  # after it nothing more is started
    if kind == "ceilings":
        from bench.timing import ceilings

        say(ceilings=ceilings()._asdict())
        return 0
    if kind == "right":
        from bench import right

        found = right.wrong(smoke)
        for what in found:
            say(failure=f"wrong: {what}")
        return 1 if found else 0
    if kind == "encode":
        return encode([*words, "--seconds", str(left)])
    if kind == "strings":
        return strings(words)
    if kind == "gte":
        return gte([*words, "--seconds", str(left)])
    return kernels(kind, words, time.monotonic() + left, smoke)


def encode(words: Sequence[str]) -> int:
    from bench import bench_encode_gpu

    def emit(row: dict[str, Any]) -> None:
        print(bench_encode_gpu.line(row), flush=True)
        say(table="encode", row=row)
        if row["note"]:
            who = f"{row['shape']} {row['case']}, {row['batch_tokens']} tokens, {row['provider']}"
            say(failure=f"{who}: {row['note']}")

    return 0 if bench_encode_gpu.run(bench_encode_gpu.parse(list(words)), emit) else 1


def strings(words: Sequence[str]) -> int:
    from bench import bench_strings

    def emit(row: dict[str, Any]) -> None:
        print(bench_strings.line(row), flush=True)
        say(table="strings", row=row)

    bench_strings.run(bench_strings.parse(list(words)), emit)
    return 0


def gte(words: Sequence[str]) -> int:
    from bench import bench_encode_gpu, bench_gte

    def emit(row: dict[str, Any]) -> None:
        print(bench_gte.line(row), flush=True)
        say(table="gte", row=row)

    try:
        bench_gte.run(bench_gte.parse(list(words)), emit)
    except bench_encode_gpu.Unequal as error:
        say(failure=f"gte: {error}")
        return 1
    return 0


def kernels(kind: str, names: Sequence[str], ends: float, smoke: bool) -> int:
    """kind: "kernels", "tune" (launch parameters), or "compiled" (only torch.compile's rows)."""
    from bench import runner

    failures: list[str] = []
    for i, name in enumerate(names):
        now = time.monotonic()
        options = runner.Options(dtypes=("float32",) if smoke else ("bfloat16",), smoke=smoke, compile=False)
        options.deadline = now + max(ends - now, 0) / (len(names) - i)
        options.failures = failures
        if name != "attention":
            options.tokens = SIZES
        if kind == "tune":
            options.tune, options.repeats, options.seconds, options.tokens = True, 5, 0.02, SIZES[:1]
        if kind == "compiled":
            options.compile, options.cases, options.tokens = True, ("base",), SIZES[:1]
        said = len(failures)
        for row in importlib.import_module(f"bench.bench_{name}").rows(options):
            if kind != "compiled" or row["provider"] == "torch.compile":
                say(table="tune" if kind == "tune" else "kernels", row=row)
        for failure in failures[said:]:
            say(failure=failure)
    return 1 if failures else 0


# ---- the process that starts them ----


@dataclass
class Findings:
    """What the sections say, by and by."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
    ceilings: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)  # section -> how it ended

    def take(self, lines: Iterable[str]) -> None:
        """{"table": "encode", "row": {...}}, {"ceilings": {...}} or {"failure": "..."} each."""
        for line in lines:
            said = json.loads(line)
            if "row" in said:
                self.rows[said["table"]].append(said["row"])
            self.ceilings |= said.get("ceilings", {})
            self.failures += [said["failure"]] if "failure" in said else []


def run(sections: Sequence[Section], out: Path, seconds: float, smoke: bool, anyway: bool = False) -> Findings:
    """Runs them one after another and writes what they find into `out` meanwhile. anyway: also if numbers are wrong."""
    findings, ends = Findings(), time.monotonic() + seconds
    for name in TABLES:
        (out / f"{name}_gpu.csv").unlink(missing_ok=True)  # an older run's would look like this one's
    (out / LOG).unlink(missing_ok=True)

    def heard(lines: list[str]) -> None:
        findings.take(lines)
        write(findings, out, smoke)

    for i, part in enumerate(sections):
        begun = time.monotonic()
        limit = min(part.longest, (ends - begun) * part.weight / sum(s.weight for s in sections[i:]))
        if ends - begun < 5:
            findings.status[part.name] = "no time left"
            continue
        findings.status[part.name] = "running"
        heard([])
        known = {"BENCH_CEILINGS": json.dumps(findings.ceilings)} if findings.ceilings else {}
        code = follow(part, limit, out / LOG, smoke, heard, known)
        how = "ok" if code == 0 else f"stopped at its limit of {limit:.0f} s" if code is None else f"exit {code}"
        findings.status[part.name] = f"{how}, {time.monotonic() - begun:.0f} s"
        print(f"{part.name}: {findings.status[part.name]}", flush=True)
        if part.name == RIGHT and code is None:  # it may be the compiler that was slow
            findings.failures.append("whether the numbers are right is not known: there was no time for all of it")
        elif part.name == RIGHT and code and not anyway:
            findings.failures.append("the numbers are wrong, or could not be had: nothing was timed (see sections.log)")
            break
    heard([])
    return findings


def follow(
    part: Section,
    limit: float,
    log: Path,
    smoke: bool,
    heard: Callable[[list[str]], None],
    known: dict[str, str] | None = None,
    every: float = 2.0,
) -> int | None:
    """Runs a section, with `known` in its environment, and passes on the lines that it says. Its exit status, or None:
    stopped at its limit."""
    with tempfile.TemporaryDirectory() as folder, log.open("a") as output:
        told = Path(folder) / "lines"
        told.touch()
        environment = os.environ | {
            "BENCH_GPU_LINES": str(told),
            "BENCH_GPU_DEADLINE": str(time.time() + max(0.8 * limit, limit - 20)),
            "TRITON_INTERPRET": "1" if smoke else "0",
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever a machine has: warnings are errors in the tests
            "PYTHONUNBUFFERED": "1",
        }
        environment |= known or {}
        environment |= {"OMP_NUM_THREADS": "1"} if smoke else {}  # tiny work: threads would only wait for each other
        output.write(f"\n==== {part.name}, at most {limit:.0f} s\n")
        output.flush()
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        ends, rest, code = time.monotonic() + limit, "", None
        try:
            with told.open() as lines:
                while code is None and time.monotonic() < ends:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(min(every, max(ends - time.monotonic(), 0.01)))
                    *whole, rest = (rest + lines.read()).split("\n")  # the last one may be half written
                    if whole:
                        heard(whole)
        finally:  # it, and whatever it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code


def write(findings: Findings, out: Path, smoke: bool) -> None:
    from bench import plot, records
    from bench.records import replacing

    mark = {"smoke": "smoke"} if smoke else {}
    for name in TABLES:
        if rows := findings.rows[name]:
            columns = dict.fromkeys(key for row in rows for key in row)
            with replacing(out / f"{name}_gpu.csv") as path:
                records.write_csv(path, ({**dict.fromkeys(columns, ""), **row, **mark} for row in rows))
    note = "a smoke run, no measurements" if smoke else machine(findings)
    for name, make in {
        "report.md": lambda: report(findings, out, smoke),
        "roofline.svg": lambda: plot.roofline(findings.rows["encode"], findings.rows["kernels"], note),
    }.items():
        try:
            text = make()
        except Exception:  # noqa: BLE001  the rows are safe, and the sections to come are worth more than this page
            text = traceback.format_exc()
        with replacing(out / name) as path:
            path.write_text(text)


def machine(findings: Findings) -> str:
    row = next((row for name in TABLES for row in findings.rows[name]), {})
    names = ["card", "driver", "cuda", "python", "torch", "triton", "transformers", "sentence-transformers", "commit"]
    return ", ".join(f"{name} {row.get(name, 'unknown')}" for name in [*names, "date"])


def promised(findings: Findings) -> list[tuple[str, str, str, str]]:
    """(what, promised, measured or "", "yes", "no" or "") of the whole model and of the kernels."""
    from bench import bench_encode_gpu, bench_gte, cards

    card = next((row.get("card") for name in TABLES for row in findings.rows[name]), None)
    told = None if card is None or card in cards.CARDS else f"none for this card ({card})"
    table = bench_encode_gpu.promises(findings.rows["encode"])
    table.append(bench_gte.promise(findings.rows["gte"]))
    for name in KERNELS:
        try:
            promises = importlib.import_module(f"bench.bench_{name}").PROMISES
        except Exception as error:  # noqa: BLE001  its own section says why; the others' go on
            promises = []
            table.append((name, f"unknown: {type(error).__name__}", "", ""))
        for p in promises:
            held = [
                float(row[p.column])
                for row in findings.rows["kernels"]
                if (row["op"], row["case"], row["provider"], row["dtype"]) == (name, p.case, "triton", "bfloat16")
                and int(row["tokens"]) >= p.tokens
                and row[p.column] != ""
            ]
            what = f"{name}, {p.case}, from {p.tokens:,} tokens: {p.column}"
            met = ("yes" if min(held) >= p.least else "no") if held and not told else ""
            table.append((what, told or f">= {p.least:.3g}", f"{min(held):g}" if held else "", met))
    return table


def report(findings: Findings, out: Path, smoke: bool) -> str:
    from bench import bench_encode_gpu, bench_gte, bench_strings, tables

    title = "Smoke run: tiny shapes on a CPU, no measurements" if smoke else "On a GPU"
    lines = [f"# {title}", "", machine(findings), "", f"Is it right? {findings.status.get(RIGHT, 'not asked')}", ""]
    lines += [f"- {failure}" for failure in findings.failures if failure.startswith("wrong: ")]
    if found := findings.ceilings:
        products = ", ".join(f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in found.items() if k != "copy")
        lines += [f"Measured ceilings: copy {found['copy'] / 1e12:.2f} TB/s read and written; products {products}.", ""]
    lines += ["## Sections", "", "| section | ended |", "|---|---|"]
    lines += [f"| {name} | {status} |" for name, status in findings.status.items()]
    lines += ["", f"Tests: {tests_summary(out)}", "", "## Promised and measured", ""]
    lines += ["| what | promised | measured | kept |", "|---|---|---|---|"]
    lines += [f"| {what} | {p} | {got or 'not measured'} | {met or '-'} |" for what, p, got, met in promised(findings)]
    lines += ["", "## Whole model, tokens a second", "", bench_encode_gpu.table(findings.rows["encode"], every=True)]
    lines += ["", "## Strings to vectors", "", bench_strings.table(findings.rows["strings"])]
    lines += ["", "## GTE beside ModernBERT", "", bench_gte.table(findings.rows["gte"])]
    lines += ["", "## Kernels", "", tables.kernels_gpu(findings.rows["kernels"], every=True), "", "## Failures", ""]
    lines += [f"- {failure}" for failure in findings.failures] or ["None."]
    return "\n".join(lines) + "\n"


def tests_summary(out: Path) -> str:
    """pytest's last line."""
    log = (out / LOG).read_text() if (out / LOG).exists() else ""
    _, *parts = re.split(r"^==== (.*), at most \d+ s$", log, flags=re.MULTILINE)  # name, what it said, name, ..
    said = dict(zip(parts[::2], parts[1::2], strict=True)).get("tests", "").split("\n")
    if lines := [line for line in said if line.strip()]:
        return lines[-1]
    return "not run" if importlib.util.find_spec("pytest") else "not run: pytest is not installed"


def summary(findings: Findings, out: Path, smoke: bool) -> int:
    """Prints the short of it."""
    for what, p, got, met in promised(findings):
        print(f"{met or '-':3} {what}: {got or 'not measured'}, promised {p}")
    print(f"tests: {tests_summary(out)}")
    print("\n".join(findings.failures[:20]) or "no failures")
    print(f"{'smoke: ' if smoke else ''}{sum(map(len, findings.rows.values()))} rows; see {out / 'report.md'}")
    good = all(status.startswith(("ok", "no time")) for status in findings.status.values())
    return 0 if good else 1


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--section" in argv:  # what `plan` puts together
        at = argv.index("--section")
        return section(argv[at + 1], argv[at + 2 :], "--smoke" in argv[:at])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--anyway", action="store_true", help="time also what gives wrong numbers")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it all hang together?")
    args = parser.parse_args(argv)
    import torch

    if not args.smoke and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device here (--smoke runs anywhere, with tiny shapes)", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section that runs is ended too
    sections = plan(args.smoke, args.skip_tests)
    return summary(run(sections, out, 60 * args.minutes - 10, args.smoke, args.anyway), out, args.smoke)


if __name__ == "__main__":
    sys.exit(main())
