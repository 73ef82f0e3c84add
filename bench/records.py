"""Rows of results: where they were measured, and the files that keep them."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PEERS = ("transformers", "sentence-transformers", "flash-attn", "liger-kernel", "packed-encoders")
Rows = Sequence[dict[str, Any]]  # as csv gives them, all strings, or as they were measured
NOT_MEASURED = (
    "Not measured yet: no run on a GPU has been recorded. `python -m bench.gpu --out bench/results` makes this table."
)


def environment(*packages: str) -> dict[str, str]:
    """Machine, versions and commit, for the columns of a row."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": _processor(),
        "threads": str(torch.get_num_threads()),
        **{package: _version(package) for package in packages},
    }


@functools.cache
def gpu_environment() -> dict[str, str]:
    """Card, driver, versions (of the peers too) and commit, for the columns of a row."""
    here = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "card": torch.cuda.get_device_name() if here else "none",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if here else "none",
        "driver": _driver() if here else "none",
        "cuda": str(torch.version.cuda or (torch.version.hip and f"hip {torch.version.hip}") or "none"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **{package: _version(package) for package in PEERS},
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that then takes the other's place: whoever kills this finds the old file or the new one."""
    new = path.with_name(f"{path.name}.new")
    yield new
    new.replace(path)


def where(rows: Rows) -> str:
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    # Clouds hide the product's name: family and model tell the generation (AMD 25 is Zen 3 or 4, 26 Zen 5).
    return f"{named.get('model name', platform.machine())}, family {named.get('cpu family')} model {named.get('model')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit, and whether anything differs from it; a copy without git's folder may be told which one it is."""
    commit = _run("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("MODERNBERT_LITE_COMMIT", "unknown")
    return commit + ("+changes" if _run("git", "status", "--porcelain") else "")


def _driver() -> str:
    lines = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "unknown"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
