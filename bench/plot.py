"""Charts as SVG, by hand: a drawing library is not a reason for a dependency."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 760, 320, 52, 34, 40, 230
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#b7950b", "#2d3436")
Series = dict[str, dict[int, float]]  # a line's name -> x -> share, 0 to 1


def roofline(encode: Iterable[dict[str, Any]], kernels: Iterable[dict[str, Any]], note: str = "") -> str:
    """Shares of what the card gives: the whole model's, of a matrix product's rate, and attention's, by length of the
    texts (at the best batch size); the other kernels' (forward) by tokens in the batch."""
    lengths: Series = {}
    for r in encode:
        if r["mfu_measured"] and str(r["case"]).isdigit():
            line = lengths.setdefault(f"{r['provider']}, {r['shape']}", {})
            line[int(r["case"])] = max(float(r["mfu_measured"]), line.get(int(r["case"]), 0.0))
    attention: Series = {}
    tokens: Series = {}
    for r in kernels:
        if r["fraction"] == "" or r["provider"] != "triton" or str(r["case"]).split()[0] != "base":
            continue
        if "backward" in r["case"]:
            continue
        if r["op"] != "attention":
            name = f"{r['op']}{r['case'].removeprefix('base')}"
            tokens.setdefault(name, {})[int(r["tokens"])] = float(r["fraction"])
        elif found := re.fullmatch(r"base (\d+) (\w+)", r["case"]):
            attention.setdefault(found[2], {})[int(found[1])] = float(r["fraction"])
    floor = "its floor's time (a large product's or copy's rate, whichever binds) over its own"
    charts = [
        panel("Whole model: its FLOP/s over those of a large matrix product", "tokens of a text", lengths, 0),
        panel(f"Attention: {floor}", "tokens of a text", attention, HEIGHT),
        panel(f"Other kernels: {floor}", "tokens in the batch", tokens, 2 * HEIGHT),
    ]
    return page(charts, note)


def speeds(rows: Iterable[dict[str, Any]], note: str = "") -> str:
    """Tokens a second of the providers in groups of bars, a group a case, a chart a dtype."""
    charts: dict[str, dict[str, dict[str, float]]] = {}
    for r in rows:
        bars_of = charts.setdefault(str(r["dtype"]), {}).setdefault(str(r["case"]), {})
        if r.get("tokens_per_s"):
            bars_of[str(r["provider"])] = float(r["tokens_per_s"])
    names = list(dict.fromkeys(name for cases in charts.values() for group in cases.values() for name in group))
    return page([bars(f"{d}: tokens a second", c, names, i * HEIGHT) for i, (d, c) in enumerate(charts.items())], note)


def bars(title: str, groups: dict[str, dict[str, float]], names: Sequence[str], top: int) -> str:
    """group -> name -> value; a name has its colour in every chart."""
    base, high, wide = top + HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT
    most = max([1.0, *(value for group in groups.values() for value in group.values())])
    each = wide / max(len(groups), 1)
    bar = 0.8 * each / max(len(names), 1)
    step = max(s * 10**e for e in range(7) for s in (1, 2, 5) if s * 10**e <= max(most / 4, 1))
    parts = [f'<text x="{LEFT}" y="{top + 20}" font-size="13" font-weight="bold">{escape(title)}</text>']
    for value in range(0, int(most) + 1, step):
        y = round(base - high * value / most, 1)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + wide}" y2="{y}" stroke="#e3e2e0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:,}</text>')
    for i, (case, group) in enumerate(groups.items()):
        middle = round(LEFT + each * (i + 0.5), 1)
        parts.append(f'<text x="{middle}" y="{base + 16}" text-anchor="middle">{escape(case)}</text>')
        for name, value in group.items():
            x, tall = middle + bar * (names.index(name) - len(names) / 2), high * value / most
            place = f'x="{x:.1f}" y="{base - tall:.1f}" width="{0.9 * bar:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect {place} fill="{COLOURS[names.index(name) % len(COLOURS)]}"/>')
    return "\n".join(parts + [key(name, i, top) for i, name in enumerate(names)])


def key(name: str, i: int, top: int) -> str:
    """A line's or bar's name beside the chart, with its colour."""
    x, y = WIDTH - RIGHT + 10, top + TOP + 14 * i
    square = f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>'
    return f'{square}\n<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>'


def page(charts: Sequence[str], note: str) -> str:
    """Charts of HEIGHT below each other, then the note."""
    top = len(charts) * HEIGHT
    notes = textwrap.wrap(note, 120)
    height = top + 14 * len(notes) + 10
    lines = (f'<text x="{LEFT}" y="{top + 14 * i + 10}">{escape(n)}</text>' for i, n in enumerate(notes))
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *charts,
            *lines,
            "</svg>\n",
        ]
    )


def panel(title: str, label: str, series: Series, top: int) -> str:
    """Shares over sizes, these in equal steps whatever their distance."""
    sizes = sorted({x for line in series.values() for x in line})
    most = max([1.0, *(y for line in series.values() for y in line.values())])  # caches can beat a copy
    base, high, wide = top + HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT

    def at(x: int, y: float) -> tuple[float, float]:
        return round(LEFT + wide * (sizes.index(x) + 0.5) / len(sizes), 1), round(base - high * y / most, 1)

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-size="13" font-weight="bold">{escape(title)}</text>']
    for i in range(int(most / 0.2 + 1e-9) + 1):
        y = round(base - high * i * 0.2 / most, 1)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + wide}" y2="{y}" stroke="#e3e2e0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{20 * i} %</text>')
    for size in sizes:
        parts.append(f'<text x="{at(size, 0)[0]}" y="{base + 16}" text-anchor="middle">{size}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{base + 32}" text-anchor="middle">{escape(label)}</text>')
    if not series:
        parts.append(f'<text x="{LEFT + 20}" y="{base - high / 2}">nothing measured</text>')
    for i, (name, line) in enumerate(series.items()):
        parts += _line([at(x, y) for x, y in sorted(line.items())], COLOURS[i % len(COLOURS)], i >= len(COLOURS))
        parts.append(key(name, i, top))
    return "\n".join(parts)


def _line(points: Sequence[tuple[float, float]], colour: str, dashed: bool) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    dots = [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>', *dots]
