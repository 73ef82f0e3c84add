"""Time on a noisy machine: providers take turns, and medians are kept. Time on a GPU: that of the card alone."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

_T = TypeVar("_T")


def measure(providers: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds a call of each provider: one warm-up, then `repeats` rounds in which they take turns, every
    second round backwards, so that a machine that slows down slows all of them."""
    for run in providers.values():
        run()

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return _medians({name: functools.partial(timed, run) for name, run in providers.items()}, repeats)


def _medians(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(repeats):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            times[name].append(timers[name]())
    return {name: statistics.median(values) for name, values in times.items()}


def gpu_times(providers: dict[str, Callable[[], Any]], repeats: int = 20, seconds: float = 0.2) -> dict[str, float]:
    """Median seconds of GPU time a call of each provider, about `seconds` of it in `repeats` regions of 1 ms at least.

    Before each region the card is given something to wait for, while the host queues the region's calls: between its
    two events lie the kernels end to end, without the gaps in which a slow host launches them.
    """
    timers = {}
    for name, run in providers.items():
        begin = time.perf_counter()
        for _ in range(1000):  # until the clocks are up
            run()
            torch.cuda.synchronize()
            if time.perf_counter() - begin > 0.02:
                break
        begin = time.perf_counter()
        for _ in range(5):
            run()
        host = (time.perf_counter() - begin) / 5
        each = max(_region(run, 5, host), 1e-7)
        # 1 ms at least; beyond that no more calls than the card's queue of launches holds.
        calls = max(math.ceil(1e-3 / each), min(math.ceil(seconds / repeats / each), 200))
        timers[name] = functools.partial(_region, run, calls, host)
    return _medians(timers, repeats)


def _region(run: Callable[[], Any], calls: int, host: float) -> float:
    """Seconds of GPU time a call of `calls` of them, which take the host about `host` each to queue."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    _busy(1.5 * host * calls)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def _busy(seconds: float) -> None:
    """Has the card count to about that many seconds' worth of cycles (at 2 GHz), 0.1 s at most."""
    torch.cuda._sleep(int(min(seconds, 0.1) * 2e9) + 1)


def host_and_gpu_time(run: Callable[[], Any], repeats: int = 10) -> tuple[float, float]:
    """Median seconds that the host takes to queue a call, and that the card takes to work it off without waiting for
    the host. A call that waits for the card counts that wait as the host's."""
    run()
    torch.cuda.synchronize()
    hosts = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    host = statistics.median(hosts)
    return host, statistics.median(_region(run, 1, host) for _ in range(repeats))


def rotate(make: Callable[[], _T], bytes_each: int, bound: int = 8 << 30) -> list[_T]:
    """As many of what `make` gives as overflow the card's L2 cache three times, within `bound` bytes and a quarter of
    the free memory, at least one: so that no call finds its inputs in the cache. One where there is no GPU."""
    copies = 1
    if torch.cuda.is_available():
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        room = min(bound, torch.cuda.mem_get_info()[0] // 4) // max(bytes_each, 1)
        copies = max(1, min(1 + math.ceil(3 * cache / max(bytes_each, 1)), room))
    return [make() for _ in range(copies)]


class Ceilings(NamedTuple):
    """What the card gives, measured: bytes/s of a large copy (read and written), FLOP/s of a large product a dtype."""

    copy: float
    bfloat16: float
    float16: float
    float32: float

    def flops(self, dtype: torch.dtype) -> float:
        return float(getattr(self, dtype_name(dtype)))


@functools.cache
def ceilings() -> Ceilings:
    """Measured once a process, on random data (products of zeros run faster); or what BENCH_CEILINGS says, if another
    process has measured them."""
    if known := os.environ.get("BENCH_CEILINGS"):
        return Ceilings(**json.loads(known))
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4) // 4
    source = torch.randn(size, device="cuda")
    to = torch.empty_like(source)
    rate = 8 * size / gpu_times({"copy": functools.partial(to.copy_, source)})["copy"]
    del source, to
    rates = [_product_rate(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    torch.cuda.empty_cache()
    return Ceilings(rate, *rates)


def _product_rate(dtype: torch.dtype, size: int = 8192) -> float:
    if dtype == torch.bfloat16 and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return math.nan  # emulated
    try:
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        to = torch.empty_like(a)
        return 2 * size**3 / gpu_times({"product": lambda: torch.mm(a, b, out=to)}, repeats=10)["product"]
    except torch.OutOfMemoryError:
        return math.nan


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- runs that may fail, and their memory ----


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """(result, ""), or (None, why not). Frees what a failure left behind."""
    try:
        result = run()
        synchronize()
        return result, ""
    except torch.cuda.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:  # noqa: BLE001  a peer's failure, of whatever kind, costs its own row only
        note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    try:
        free()
    except RuntimeError as error:  # after an illegal access every call fails: the rows still get written
        note += f"; then {type(error).__name__}"
    return None, note


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """(result, the most bytes allocated, the most reserved) beyond what was held before."""
    if not torch.cuda.is_available():
        return run(), 0, 0
    free()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved


def waited(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(calls):
            run()
        synchronize()

    return call
