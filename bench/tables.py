"""The tables and plots of docs/: from the rows under bench/results, and the checkpoints that the tests run.
`python -m bench.tables` writes them, a test checks them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plot
from bench.runner import RESULTS, read_csv

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS.parent / "tests" / "data"
NOT_MEASURED = (
    "Not measured yet: no run on a GPU has been recorded. `python -m bench.gpu --out bench/results` makes this table."
)
NOT_MEASURED_CPU = "Not measured yet: `python -m bench.bench_cpu` makes this table."
NOT_MEASURED_GTE = "Not measured yet: `python -m bench.bench_gte` makes this table."
Rows = Sequence[dict[str, Any]]  # as csv gives them, all strings, or as they were measured


def encode_cpu(rows: Rows) -> str:
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
    return "\n".join([*lines, "", _where(rows)])


def cpu(rows: Rows) -> str:
    """A line a dtype and provider: tokens a second of each case, ours with the ratio to the peer that the promises
    name; peak memory of the longest case, times from a process's start."""
    from bench.bench_cpu import NAMED, OURS, PROMISES

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


def encode_gpu(rows: Rows, every: bool = False) -> str:
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
    return "\n".join([*lines, "", _where(measured)])


def kernels_gpu(rows: Rows, every: bool = False) -> str:
    """A line a case, of 32,768 tokens where there are such (every: of each number of tokens): ours and how much of the
    ceiling it reaches, and the others."""
    measured = [r for r in rows if r["microseconds"] != ""]
    if not measured:
        return NOT_MEASURED
    groups: dict[Any, dict[str, dict[str, Any]]] = {}
    for r in measured:
        groups.setdefault((r["op"], r["case"], r["dtype"], int(r["tokens"])), {})[r["provider"]] = r
    lines = [
        "| kernel | case | tokens | dtype | triton, us | GB/s | TFLOP/s | of the ceiling | x torch | others, us |",
        "|---" * 10 + "|",
    ]
    for key, group in groups.items():
        op, case, dtype, tokens = key
        same = [other for other in groups if other[:3] == key[:3]]
        if not every and key != max(same, key=lambda k: (k[3] == 32_768, k[3])):
            continue
        ours = group.get("triton") or dict.fromkeys(next(iter(group.values())), "")
        columns = ("microseconds", "gb_per_s", "tflop_per_s", "fraction", "speedup")
        fraction = f"{ours['fraction']} ({ours['ceiling']})" if ours["fraction"] != "" else ""
        values = [fraction if c == "fraction" else ours[c] for c in columns]
        others = ", ".join(f"{n} {r['microseconds']}" for n, r in group.items() if n != "triton")
        lines.append(f"| {' | '.join(map(str, [op, case, f'{tokens:,}', dtype, *values, others]))} |")
    return "\n".join([*lines, "", _where(measured)])


def gte(rows: Rows) -> str:
    """A line a case: our GTE, and our ModernBERT of the same name of a shape, in the same run."""
    from bench.bench_gte import GTE, MODERNBERT

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
    return "\n".join([*lines, "", _where(rows)])


def _ours_first(row: dict[str, Any]) -> tuple[bool, int]:
    return row["provider"].startswith("modernbert-lite"), int(row["tokens_per_s"])


def _order(key: tuple[str, str, str, int]) -> tuple[Any, ...]:
    shape, case, dtype, batch_tokens = key
    return shape, dtype, case != "query", not case.isdigit(), int(case) if case.isdigit() else 0, case, batch_tokens


def _where(rows: Rows) -> str:
    """Where rows were measured; they may be of more than one run."""
    texts = []
    for r in rows:
        machine = f"{r['machine']}, {r['threads']} threads" if "machine" in r else f"{r['card']}, driver {r['driver']}"
        triton = f", triton {r['triton']}" if "triton" in r else ""
        texts.append(
            f"{machine}, torch {r['torch']}{triton}, transformers {r['transformers']}, {r['dtype']}, commit "
            f"{r['commit']}, {r['date']}."
        )
    return " ".join(dict.fromkeys(texts))


def checkpoints(entries: Rows, golden: Rows) -> str:
    """A line a checkpoint, or a family of those that differ in nothing that the line says. entries: of
    tests/data/checkpoints.json; golden: of golden.json, whose `model` says whose numbers are published."""
    published = {name for row in golden for name in row["model"].split()}
    lines: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        # What a test compares with: transformers' own classes, whose names for Alibaba's are Gte...
        peers = ", ".join(f"`{re.sub('^New', 'Gte', name)}`" for name in entry["architectures"])
        use = f"`{entry['use']}`" + (", once it is converted" if entry.get("weights") == "pickle" else "")
        known = "known" if entry["id"] in published else "not known"
        name = entry.get("family", entry["id"])
        lines.setdefault((name, use, peers, known, entry.get("note", "")), []).append(entry["id"])
    rows = ["| checkpoint | loads with | parity tested on | golden numbers | |", "|---|---|---|---|---|"]
    for (name, *cells), ids in lines.items():
        before, _, after = name.partition("{}")
        sizes = ", ".join(member.removeprefix(before).removesuffix(after) for member in ids)
        rows.append(f"| {' | '.join([name.replace('{}', f'{{{sizes}}}'), *cells])} |")
    return "\n".join(rows)


TABLES = {"cpu": cpu, "encode_cpu": encode_cpu, "encode_gpu": encode_gpu, "kernels_gpu": kernels_gpu}
TABLES |= {"gte_cpu": gte, "gte_gpu": gte}


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with every table made anew."""
    tables = {}
    for name, make in TABLES.items():
        path = results / f"{name}.csv"
        rows = read_csv(path) if path.exists() else []
        missing = {"cpu": NOT_MEASURED_CPU, "gte_cpu": NOT_MEASURED_GTE}.get(name, NOT_MEASURED)
        tables[name] = make(rows) if rows and not rows[0].get("smoke") else missing
    read = {name: json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")) for name in ("checkpoints", "golden")}
    tables["checkpoints"] = checkpoints(read["checkpoints"]["checkpoints"], read["golden"]["entries"])
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    return text


def plots(results: Path = RESULTS) -> dict[str, str]:
    """The plots of docs/, by their files' names. bench_cpu writes its own plot beside its rows."""
    rows = read_csv(results / "encode_cpu.csv")
    return {"encode_cpu.svg": plot.speeds(rows, _where(rows))}


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, svg in plots().items():
        (DOCS / name).write_text(svg, encoding="utf-8")
