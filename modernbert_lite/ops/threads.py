"""How many threads compute: what the process may use, and no more, in containers too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..reading import OptionError, as_whole, shown
from . import tracing

VARIABLE = "MODERNBERT_LITE_THREADS"
_TOKENIZER = "RAYON_NUM_THREADS"  # read when the tokenizers library first tokenizes a batch
_ours: str | None = None  # what was set here for the tokenizer, and so may be set again
_watching = False  # whether forks are
_forked = False  # whether this process is a fork of one that had loaded a model


def available(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity, and the CPU quota of its container, rounded up."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([processors, *_quotas(root)])


def set_threads(threads: int | None) -> None:
    """Sets torch's threads in this process: `threads`, else MODERNBERT_LITE_THREADS, else torch's own number, but no
    more than `available()`. If a number was asked for, the tokenizer gets as many, unless RAYON_NUM_THREADS is set.

    Raises OptionError for a number that is not from 1 to the available processors.
    """
    most, name, value = available(), "threads", threads
    text = os.environ.get(VARIABLE, "").strip()
    if threads is None and (_forked or not text):
        if torch.get_num_threads() > most:
            torch.set_num_threads(most)
        return
    if threads is None:
        name, value = VARIABLE, int(text) if text.isdecimal() and len(text) < 10 else None
    value = as_whole(value)
    if value is None or not 1 <= value <= most:
        got = shown(threads if name == "threads" else text, 60)
        raise OptionError(
            f"{name} is {got}; it must be a whole number from 1 to {most}, the processors that this process may use"
        )
    if _forked and value > 1:
        raise OptionError(
            f"threads is {value}; a process that was forked after a model was loaded computes with one thread. Start "
            "it by 'spawn' or 'forkserver' instead, or load models in it only"
        )
    torch.set_num_threads(value)
    bound_tokenizer()


def bound_tokenizer() -> None:
    """Gives the tokenizer as many threads as torch has: both compute on the same processors."""
    global _ours
    if os.environ.get(_TOKENIZER) in (None, _ours):
        os.environ[_TOKENIZER] = _ours = str(torch.get_num_threads())


def survive_forks() -> None:
    """From now on a forked process computes, with one thread. (A fork has none of the threads of OpenMP and of the
    tokenizer, and would wait for them for ever.)"""
    global _watching
    if not _watching and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
        _watching = True


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tracing.after_fork()


def _quotas(root: Path) -> Iterator[int]:
    """The CPU quotas of the container, from its own control group: version 2, then version 1. A file that can't be read
    or understood limits nothing."""
    group = root / "sys/fs/cgroup"
    for files in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        try:
            # "150000 100000", microseconds of each 100,000; "max 100000" and -1 are no limit.
            quota, period = map(int, " ".join((group / file).read_text() for file in files).split())
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            yield -(-quota // period)
