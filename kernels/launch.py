"""Launches of Triton's kernels. Triton's own takes half of the host's time of a launch (bench/bench_host.py). So what
it compiled is kept for each kind of arguments, and started directly."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

_KNOWN = ((3, 6), (3, 9))  # versions of Triton whose compiled kernels start like this
_BINDS = _KNOWN[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= _KNOWN[1] and torch.version.hip is None
_driver = triton.runtime.driver
_bound: dict[Any, tuple[Any, Callable[..., None], tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    programs: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:
    """kernel[programs](*tensors, *numbers, **constants), with multiply-adds fused, on the first tensor's device.

    constants: tl.constexpr arguments, num_warps, num_stages. On AMD's cards, in the interpreter, under a profiler of
    Triton's and with an unknown version of Triton, this is Triton's own launch.
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():  # triton launches on the current device
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, numbers, **constants)
    if not _BINDS or not isinstance(kernel, triton.JITFunction) or _is_watched():
        kernel[programs](*tensors, *numbers, **constants, enable_fp_fusion=True)
        return None
    key = (
        kernel.fn,
        device,
        *[x.dtype for x in tensors],
        *[x.data_ptr() % 16 == 0 for x in tensors],
        # Of a whole number: whether it is 1, whether 16 divides it, and whether it needs 64 bits.
        *[
            float if type(x) is float else 2 if x == 1 else (x % 16 == 0) + (0 if -(2**31) <= x < 2**31 else 4)
            for x in numbers
        ],
        *constants,
        *constants.values(),
    )
    bound = _bound.get(key)
    if bound is None:
        compiled = kernel[programs](*tensors, *numbers, **constants, enable_fp_fusion=True)
        if compiled is not None:
            rest = kernel.arg_names[len(tensors) + len(numbers) :]
            _bound[key] = (compiled, compiled.run, tuple(constants[name] for name in rest))
        return None
    compiled, run, rest = bound
    stream = _driver.active.get_current_stream(max(device, 0))
    x, y, z = (*programs, 1, 1)[:3]
    run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *tensors, *numbers, *rest)
    return None


def _is_watched() -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
