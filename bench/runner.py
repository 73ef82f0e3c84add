"""Timing that holds on a noisy machine: providers take turns, medians are kept, a row says where it was measured."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def measure(providers: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds a call of each provider: one warm-up, then `repeats` rounds in which they take turns, every
    second round backwards, so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()
    for turn in range(repeats):
        for name in list(providers)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            providers[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def environment(*packages: str) -> dict[str, str]:
    """Machine, versions and commit, for the columns of a row."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "machine": _processor(),
        "threads": str(torch.get_num_threads()),
        **versions,
    }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    # Clouds hide the product's name: family and model tell the generation (AMD 25 is Zen 3 or 4, 26 Zen 5).
    return f"{named.get('model name', platform.machine())}, family {named.get('cpu family')} model {named.get('model')}"


def _git(*args: str) -> str:
    try:
        return subprocess.run(("git", *args), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
