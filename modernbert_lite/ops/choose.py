"""Which implementation of an operation runs: chosen by the tensor's device, by the machine, or by the user."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..reading import OptionError, warn
from .tracing import constant

P = ParamSpec("P")
R = TypeVar("R")
Twins = Mapping[str, Callable[..., Any]]

OPS = ("linear", "layer_norm", "rope", "attention", "geglu", "mean_pool")
BACKENDS = ("auto", "torch", "triton", "onednn")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_SWITCH = "MODERNBERT_LITE_BACKEND"
# The dictionary behind os.environ, where Python has one. Each operation asks, and os.environ.get takes 0.7 us.
_environ: Any = getattr(os.environ, "_data", os.environ)
_key: Any = os.environ.encodekey(_SWITCH) if _environ is not os.environ else _SWITCH

_used: tuple[Twins, ...] = ()
_loaded: dict[str, Twins] = {}


def op(reference: Callable[P, R]) -> Callable[P, R]:
    """Makes a plain function an operation. A call asks the twins of the same name first: those of `using`, then the one
    in cpu.py or gpu.py. A twin has the same signature, and returns None for what it doesn't do. The plain function is
    the specification, the fallback, and (as `.reference`) the tests' oracle."""
    name = reference.__name__

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for twins in _used:
            if name in twins and (y := twins[name](*args, **kwargs)) is not None:
                return y
        x: Any = args[0]
        wing = _wing(x.device, x.dtype)
        twin = None if wing is None else _twins(wing).get(name)
        y = None if twin is None else twin(*args, **kwargs)
        return reference(*args, **kwargs) if y is None else y

    call.reference = reference  # type: ignore[attr-defined]
    return call


def _twins(wing: str) -> Twins:
    if wing not in _loaded:  # an import takes a microsecond, also the second time
        from . import cpu, gpu

        _loaded.update(cpu=cpu.TWINS, gpu=gpu.TWINS)
    return _loaded[wing]


@contextmanager
def using(twins: Twins) -> Iterator[None]:
    """Asks these twins (by name of operation) before all others: `with using({"attention": padded_attention}): ..`. It
    holds for the whole process until the block ends. Of nested blocks, the innermost is asked first."""
    global _used
    before = _used
    _used = (twins, *before)
    try:
        yield
    finally:
        _used = before


def wanted() -> str:
    """The value of MODERNBERT_LITE_BACKEND. Raises OptionError for an unknown name."""
    if not _environ.get(_key):
        return "auto"
    name = os.environ[_SWITCH]
    if name not in BACKENDS:
        raise OptionError(f"MODERNBERT_LITE_BACKEND is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


@constant
def _wing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Which twins are asked: "cpu", "gpu", or None."""
    name = wanted()
    if name == "torch" or dtype not in FLOATS:
        return None
    if device.type == "cuda":
        return None if name == "onednn" else "gpu"
    if name == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return "gpu"
        _warn_of_no_gpu(device.type)
        return None
    # torch.compile uses oneDNN in its own way.
    return "cpu" if device.type == "cpu" and not torch.compiler.is_compiling() else None


@functools.cache
def _warn_of_no_gpu(device: str) -> None:
    warn(
        f"MODERNBERT_LITE_BACKEND is 'triton', but its kernels need a GPU, and this tensor is on {device!r}; using "
        "torch. (To have them interpreted, slowly, set TRITON_INTERPRET=1 before Python starts)",
    )


def backend(op: str, x: Tensor) -> str:
    """The backend that runs `op` on a tensor like `x`: "onednn", "triton" or "torch". A twin may still decline for
    another reason than device and dtype. "linear" is oneDNN's only where packing a weight pays."""
    return backend_for(op, x.device, x.dtype)


def backend_for(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """`backend` for tensors that don't exist yet. Raises OptionError for an unknown MODERNBERT_LITE_BACKEND."""
    from . import cpu, gpu

    wing = _wing(device, dtype)
    if wing == "cpu":
        return "onednn" if op in cpu.ONEDNN and (op != "linear" or cpu.packs(dtype)) else "torch"
    if wing == "gpu":
        return "triton" if op in gpu.TRITON and gpu.works(device) else "torch"
    return "torch"
