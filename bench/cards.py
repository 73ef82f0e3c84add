"""Cards: what their datasheets say, and what is promised of ModernBERT-base in bf16 on them.

On the H200 and the H100 a promise is what was aimed at or measured (bench/LOG.md). On other cards nothing was measured.
There the time of a pass on an H200 is scaled, the part of products and of long attention by the peak of the datasheets,
the rest by the bandwidth; of that speed nine tenths are promised, because a card that never rests is slower. The
H100's measured times are 2 to 3 % shorter than this arithmetic gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench.texts import QUERY_TOKENS


class Card(NamedTuple):
    """flops: dense bf16 and fp16 with sums in fp32, per second. bandwidth: bytes per second. promised: million tokens
    per second, by the length of texts. query_ms: of a query in a graph. What is missing of these two is derived."""

    flops: float
    bandwidth: float
    promised: dict[str, float] = {}  # noqa: RUF012  a named tuple's default
    query_ms: float | None = None


H200 = Card(989e12, 4.8e12, {"128": 2.05, "512": 2.0, "2048": 1.6, "8192": 0.9}, 1.0)
# By the name that torch gives them: others that are named alike (PCIe, NVL, Laptop) have other clocks.
CARDS = {
    "NVIDIA H200": H200,
    "NVIDIA H100 80GB HBM3": Card(989e12, 3.35e12, {"128": 1.7, "512": 1.6}, 1.1),
    "NVIDIA A100-SXM4-80GB": Card(312e12, 2.039e12),
    "NVIDIA L4": Card(121e12, 0.3e12),
    "NVIDIA GeForce RTX 4090": Card(165.2e12, 1.008e12),
}
# ms of 32,768 tokens on an H200 alone (bench/LOG.md, 2026-11-27): products and long attention; the rest.
PASS_MS = {"128": (10.7, 5.5), "512": (11.5, 5.5), "2048": (14.3, 5.5), "8192": (25.4, 5.5)}
PASS_TOKENS, SUSTAINED = 32_768, 0.9
# A query on an H200: 0.45 ms of the host, 0.6 of 200 small kernels, and the layers' weights are read once.
QUERY_MS, WEIGHTS = 1.05, 220e6
DERIVED = "(derived, not measured)"

Promises = list[tuple[str, str, str, str]]


def peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """The datasheet's, None where it isn't known here."""
    return CARDS[card].flops if card in CARDS and dtype in (torch.bfloat16, torch.float16) else None


def derived(card: Card, case: str) -> float:
    """Million tokens per second."""
    products, rest = PASS_MS[case]
    ms = products * H200.flops / card.flops + rest * H200.bandwidth / card.bandwidth
    return SUSTAINED * PASS_TOKENS / ms / 1e3


def derived_query(card: Card) -> float:
    """Milliseconds."""
    return (QUERY_MS + 1e3 * WEIGHTS / card.bandwidth) / SUSTAINED


def promises(rows: Sequence[dict[str, str]], plain: str, graphs: str) -> Promises:
    """(what, promised, measured, "yes" or "no") of each promise; measured and the last are "" where no row tells. On a
    card that has no promises, what was measured, and "none for this card".

    plain, graphs: the providers whose rows count. Speeds are of the base shape and bf16; of the batch sizes the best
    counts. Rows are of one card."""
    own = [r for r in rows if r["shape"] == "base" and r["dtype"] == "bfloat16" and r["seconds"]]
    own = [r for r in own if r["provider"] in (plain, graphs)]
    card = CARDS.get(own[0]["card"]) if own else H200
    table: Promises = []

    def add(what: str, promised: str, found: list[float], pick: Callable[[list[float]], float], unit: str) -> None:
        sign, limit = promised.split()[:2]
        kept = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__}[sign]
        got = pick(found) if found else None
        met = "" if got is None or card is None else "yes" if kept(got, float(limit)) else "no"
        told = f"none for this card ({own[0]['card']})" if card is None else promised
        table.append((what, told, "" if got is None else f"{got:.2f} {unit}".rstrip(), met))

    for case in PASS_MS:
        speeds = [float(r["tokens_per_s"]) / 1e6 for r in own if r["case"] == case]
        known = (card or H200).promised.get(case)
        least = f"{known} Mtok/s" if known else f"{derived(card or H200, case):.2f} Mtok/s {DERIVED}"
        add(f"base, {case} tokens each", f">= {least}", speeds, max, "Mtok/s")
    query = [float(r["seconds"]) * 1e3 for r in own if r["case"] == "query" and r["provider"] == graphs]
    known = (card or H200).query_ms
    most = f"{known} ms" if known else f"{derived_query(card or H200):.2f} ms {DERIVED}"
    add(f"one query of {QUERY_TOKENS} tokens, with graphs", f"< {most}", query, min, "ms")
    # A query's activations are less than the allocator's grain.
    full = [r for r in own if r["provider"] == plain and r["memory_limit_mb"] and r["case"] != "query"]
    shares: list[Any] = [float(r["peak_allocated_mb"]) / float(r["memory_limit_mb"]) for r in full]
    add("peak memory over weights + 1.2 layers' activations", "<= 1.0", shares, max, "")
    return table


def missed(table: Promises) -> list[str]:
    """What is not kept, or not known, of what is promised."""
    return [
        f"{what}: {got or 'not measured'}, promised {p}"
        for what, p, got, met in table
        if met != "yes" and not p.startswith("none")
    ]
