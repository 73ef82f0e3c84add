"""The tables and plots of docs/: from the rows under bench/results, and the checkpoints that the tests run.
`python -m bench.tables` writes them, a test checks them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import bench_cpu, bench_encode, bench_encode_gpu, bench_float8, bench_gte, bench_host, bench_strings, plot
from bench.records import NOT_MEASURED, RESULTS, Rows, read_csv, where

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS.parent / "tests" / "data"
NOT_MEASURED_CPU = "Not measured yet: `python -m bench.bench_cpu` makes this table."
NOT_MEASURED_GTE = "Not measured yet: `python -m bench.bench_gte` makes this table."


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
    return "\n".join([*lines, "", where(measured)])


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


TABLES = {"cpu": bench_cpu.table, "encode_cpu": bench_encode.table, "encode_gpu": bench_encode_gpu.table}
TABLES |= {
    "h100/encode_gpu": bench_encode_gpu.table,
    "kernels_gpu": kernels_gpu,
    "gte_cpu": bench_gte.table,
    "gte_gpu": bench_gte.table,
    "strings_gpu": bench_strings.table,
    "float8_gpu": bench_float8.table,
    "host": bench_host.table,
}


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
    return {"encode_cpu.svg": plot.speeds(rows, where(rows))}


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, svg in plots().items():
        (DOCS / name).write_text(svg, encoding="utf-8")
