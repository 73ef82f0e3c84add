"""What the kernels share: a launch that is bound once, and the checks of what no kernel takes."""

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

# What Triton 3.6 to 3.9 compile anew for is known. (AMD's backend looks at the sizes of tensors, too.)
_BINDS = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9) and torch.version.hip is None
_bound: dict[Any, tuple[Any, ...]] = {}  # what was compiled, and the constants that it asks for again


def launch(
    kernel: Any,
    programs: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:
    """kernel[programs](*tensors, *numbers, **constants), with multiply-adds fused, on the first tensor's device.

    Triton's own launch takes half of the host's time (bench/bench_host.py). So what it compiled is kept for each kind
    of arguments, and started directly.
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():  # triton launches on the current device
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, numbers, **constants)
    key = (
        id(kernel),  # what was compiled holds it
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
    compiled, rest = _bound.get(key, (None, ()))
    if compiled is not None:
        hooks = triton.knobs.runtime  # of a profiler, which Triton's own launch tells of launches
        if not hooks.launch_enter_hook.calls and not hooks.launch_exit_hook.calls:
            stream = triton.runtime.driver.active.get_current_stream(max(device, 0))
            own = (compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*programs, stream, *own, *tensors, *numbers, *rest)
            return None
    compiled = kernel[programs](*tensors, *numbers, **constants, enable_fp_fusion=True)
    if _BINDS and isinstance(kernel, triton.JITFunction) and compiled is not None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _bound[key] = compiled, [constants[name] for name in names]
    return None


@functools.cache
def row_shape(C: int) -> dict[str, int]:
    """Rows per program, and warps, of a kernel that holds whole rows of C numbers: one warp for a row of up to 2048, so
    that its sums need no barrier."""
    BLOCK = triton.next_power_of_2(C)
    return {"ROWS": 2 if BLOCK <= 1024 else 1, "BLOCK": BLOCK, "num_warps": max(1, BLOCK // 2048)}


def check_rows(operator: str, **tensors: Tensor | None) -> None:
    """Raises ValueError for tensors (rows, .., numbers) that no kernel takes. None is allowed. operator: the name of
    what has a gradient, if anything has."""
    given = {name: x for name, x in tensors.items() if x is not None}
    advice = f"use {operator}, or no_grad" if operator else "use no_grad"
    for name, x in given.items():
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16 or float32")
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous")
        if max(x.numel(), len(x) * x.stride(0)) >= 2**31:
            raise ValueError(f"{name} spans {len(x)} rows of {x.stride(0)} elements, 2^31 or more; split the batch")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name} requires a gradient, which this function has none of: {advice}")
    check_devices(**given)


def check_devices(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on the first one's device. None is allowed."""
    (first, like), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, x in others:
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {like.device}; they must be on one device")


def check_cu_seqlens(cu_seqlens: Tensor, T: int) -> list[int]:
    """Its values, brought to the host. Raises ValueError unless it is (B + 1,) int32, starts at 0, never decreases and
    ends at T."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (B + 1,) int32, B at least 1"
        )
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != T or any(a > b for a, b in pairwise(values)):
        raise ValueError(
            f"cu_seqlens is {values[:8]}..{values[-1]}; it must start at 0, never decrease, end at T = {T}"
        )
    return values
