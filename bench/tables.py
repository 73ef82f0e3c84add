"""README's tables from the rows under bench/results: `python -m bench.tables` writes them, a test checks them."""

from __future__ import annotations

import re
from pathlib import Path

from bench.runner import RESULTS, read_csv

README = Path(__file__).parents[1] / "README.md"


def encode_cpu(rows: list[dict[str, str]]) -> str:
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
    r = rows[0]
    where = (
        f"{r['machine']}, {r['threads']} threads, torch {r['torch']}, transformers {r['transformers']}, "
        f"{r['dtype']}, commit {r['commit']}, {r['date']}."
    )
    return "\n".join([*lines, "", where])


def fill(text: str) -> str:
    """README with every table made anew."""
    for name, make in {"encode_cpu": encode_cpu}.items():
        table = make(read_csv(RESULTS / f"{name}.csv"))
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
