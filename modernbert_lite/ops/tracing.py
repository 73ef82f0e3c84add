"""What torch.compile must know about the operations; and tensors that are made once and kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Function = TypeVar("Function", bound=Callable[..., Any])

_making = threading.RLock()


def constant(function: Function) -> Function:
    """Marks a function that torch.compile may call once, keeping its result. torch.compiler's own mark
    (assume_constant_result) imports the compiler and triton, which adds a second to every start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: Function) -> Function:
    """Marks a function that torch.compile calls uncompiled. (torch's own mark for this imports the compiler.)"""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def cached(size: int | None) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Keeps the tensors that a function made. They are made outside inference mode, because autograd may meet them
    later. While torch.compile traces, the function itself is called."""

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        kept: Any = functools.lru_cache(maxsize=size)(torch.inference_mode(False)(function))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with _making:  # two threads would make two, and drop the one that a graph may have captured
                return kept(*args, **kwargs)

        return call

    return decorate


def after_fork() -> None:
    """In a forked process: another thread may have held the lock, and that thread doesn't exist here."""
    global _making
    _making = threading.RLock()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an operation on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
