"""LayerNorm, alone and with the residual's addition, forward and backward: GB/s beside a large copy's.

python -m bench.bench_layer_norm [--out DIR] [--tokens 1024 8192 ...] [--check] [--tune] [--smoke]

"torch" is ATen's own: its backward is called by itself, on the statistics that its forward saved.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.runner import Case, Options, Promise, backward, compiled, kernel_main, patched, run_cases

EPS = 1e-5
PROMISES = [Promise(f"base{kind}", 32768, "fraction", 0.85) for kind in ("", " add", " backward", " add backward")]


def traffic(T: int, C: int, itemsize: int, *, add: bool = False, back: bool = False) -> int:
    """Forward: x (and the residual) read, the result (and the sum) written. Backward: x, the result's gradient (and
    the sum's) read, x's written. The weights are few."""
    return T * (2 + back + (1 if back else 2) * add) * C * itemsize


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight, bias), total


def aten_backward() -> Callable[..., Any]:
    """native_layer_norm_backward of (x, weight, [bias,] grad), on statistics of a forward pass that isn't timed."""
    saved: dict[int, Any] = {}

    def run(x: Tensor, weight: Tensor, *more: Tensor) -> Any:
        *bias, grad = more
        if id(x) not in saved:
            b = bias[0] if bias else None
            saved[id(x)] = x, torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, b, EPS)[1:]
        mean, scale = saved[id(x)][1]
        mask = [True, True, bool(bias)]
        b = bias[0] if bias else None
        return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, scale, weight, b, mask)

    return run


def aten_add_backward() -> Callable[..., Any]:
    """Of (total, weight, grad, grad_total): ATen's, then the sum's own gradient."""
    alone = aten_backward()

    def run(total: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor) -> Any:
        grad_x, grad_weight, _ = alone(total, weight, grad)
        return grad_x.add_(grad_total), grad_weight

    return run


def cases(options: Options) -> Iterator[Case]:
    from modernbert_lite.kernels import layer_norm as kernel

    widths = {name: (shape.C, False) for name, shape in options.shapes("base", "large", "small", "1792").items()}
    widths["bias"] = (widths["base"][0], True)
    for dtype in options.torch_dtypes():
        for name, (C, biased) in widths.items():
            for T in options.sizes(1024, 8192, 32768, 131072, smoke=9):

                def tensors_of(big: int, small: int, more: int, T=T, C=C, dtype=dtype) -> tuple[Tensor, ...]:
                    """(T, C) ones, (C,) ones, and (T, C) ones again; off 0, where cancellation would show."""
                    shapes = [(T, C)] * big + [(C,)] * small + [(T, C)] * more
                    return tuple((torch.randn(s, device=options.device) + 0.5).to(dtype) for s in shapes)

                weights = 1 + biased
                for kind in ("", " add", " backward", " add backward"):
                    if "add" in kind and biased:
                        continue
                    make, truth, providers, notes = _kind(kind, kernel, tensors_of, weights, options, name)
                    size = traffic(T, C, dtype.itemsize, add="add" in kind, back="backward" in kind)
                    yield Case(name + kind, T, dtype, make, truth, providers, size, notes=notes)


def _kind(
    kind: str, kernel: Any, tensors_of: Callable[..., Any], weights: int, options: Options, name: str
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], dict[str, str]]:
    """(make, truth, providers, notes). Inputs: x, [residual,] weight, [bias,] [grad, [grad of the sum]]."""
    flash = options.peer("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    liger = options.peer("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
    providers: dict[str, Any]
    notes: dict[str, str] = {}

    def flash_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return flash(x, weight, bias, eps=EPS)

    def flash_add(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return flash(x, weight, None, residual=residual, eps=EPS, prenorm=True)

    def liger_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return liger.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, EPS)

    def ours_backward(x: Tensor, weight: Tensor, *more: Tensor) -> Any:
        *bias, grad = more
        return kernel.layer_norm_backward(grad, x, weight, bias[0] if bias else None, EPS)

    def ours_add_backward(total: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor) -> Any:
        return kernel.layer_norm_backward(grad, total, weight, None, EPS, grad_total)

    if kind == " add":
        make, truth = functools.partial(tensors_of, 2, 1, 0), add_norm
        providers = {"torch": add_norm, "triton": functools.partial(kernel.add_layer_norm, eps=EPS)}
        peers = {"torch.compile": add_norm} | ({"flash-attn": flash_add} if flash else {})
    elif kind == " add backward":
        make = functools.partial(tensors_of, 1, 1, 2)
        truth = backward(lambda total, weight: (norm(total, weight), total * 1), 2, once=True)
        providers, peers = {"torch": aten_add_backward(), "triton": ours_add_backward}, {}
    else:
        forwards = {"torch.compile": norm} | ({"flash-attn": flash_norm} if flash else {})
        if liger:
            forwards["liger"] = liger_norm
            notes |= {"liger": "with a bias of zeros"} if weights == 1 else {}
        if kind == "":
            make, truth = functools.partial(tensors_of, 1, weights, 0), norm
            providers = {"torch": norm, "triton": functools.partial(kernel.layer_norm, eps=EPS)}
            peers = forwards
        else:
            make, truth = functools.partial(tensors_of, 1, weights, 1), backward(norm, once=True)
            providers = {"torch": aten_backward(), "triton": ours_backward}
            peers = {key: run if key == "torch.compile" else backward(run) for key, run in forwards.items()}
    if "torch.compile" in peers:
        if options.compiles(name):
            peers["torch.compile"] = compiled(peers["torch.compile"])
            if kind == " backward":
                peers["torch.compile"] = backward(peers["torch.compile"])
        else:
            del peers["torch.compile"]
    if options.tune:
        peers |= configurations(kernel, providers["triton"])
    return make, truth, providers | peers, notes


def configurations(kernel: Any, run: Callable[..., Any]) -> dict[str, Any]:
    built_in = kernel.row_shape

    def with_shape(rows: int, warps: int) -> Callable[..., Any]:
        return patched(run, kernel, row_shape=lambda C: {**built_in(C), "ROWS": rows, "num_warps": warps})

    return {f"ROWS={r} warps={warps}": with_shape(r, warps) for r in (1, 2, 4, 8) for warps in (1, 2, 4, 8)}


def rows(options: Options) -> list[dict[str, Any]]:
    return run_cases("layer_norm", cases(options), options)


def main(argv: Sequence[str] | None = None) -> int:
    return kernel_main("layer_norm", __doc__, rows, PROMISES, argv)


if __name__ == "__main__":
    sys.exit(main())
