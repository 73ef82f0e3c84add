"""Is it right, on the card that is here? Before any time is measured.

    python -m bench.right            # exits with 1 if a number is wrong
    python -m bench.right --smoke    # small shapes in Triton's interpreter, on any machine

Each operation, a network, and its replay from a graph, in each dtype that the card has. Before NVIDIA's Ampere there
is neither a kernel for attention nor a graph. The error may be twice that of
plain torch in the same dtype.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import modernbert_lite as ml
from modernbert_lite.ops import gpu
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.linear import has_float8
from modernbert_lite.ops.rope import Rope, rope_table

from .runner import backend

SMALLEST = 1e-5  # an error that fp32 may always have
Make = Callable[..., Tensor]


def judge(what: str, got: Tensor, plain: Tensor, exact: Tensor) -> str:
    """What is wrong with `got`; "" if nothing is."""
    error, allowed = (float((x.double() - exact.double()).abs().max()) for x in (got, plain))
    if error <= max(2 * allowed, SMALLEST):  # NaN is wrong
        return ""
    return f"{what}: off by {error:.2e}, plain torch by {allowed:.2e}"


def operations(device: torch.device, smoke: bool) -> dict[str, Callable[[Callable[..., Any], Make], Tensor]]:
    """Of odd shapes. Each takes an operation, or its reference, and what makes tensors."""
    lengths = [1, 65, 7] if smoke else [1, 64, 65, 700, 0, 7]
    T, C, H, D = sum(lengths), 96 if smoke else 768, 2 if smoke else 12, 64
    batch = ml.pack([[1] * n for n in lengths], device)
    turn = (*rope_table(Rope(theta=160.0), D, batch.position_ids), None)

    def attention(window: tuple[int, int]) -> Callable[[Callable[..., Tensor], Make], Tensor]:
        return lambda op, new: op(new(T, 3 * H, D), H, batch, window)

    whole = ml.pack([[1] * n for n in lengths if n], device)  # no query in an empty text

    rows = whole.cu_seqlens[:-1].long()
    found: dict[str, Callable[[Callable[..., Any], Make], Tensor]] = {
        "geglu": lambda op, new: op(new(T, 2 * C + 2), "gelu"),
        "layer_norm": lambda op, new: op(new(T, C), new(C), None, 1e-5, new(T, C)),
        "rope": lambda op, new: op(new(T, 3 * H, D), 2 * H, turn),
        "attention local": attention((64, 64)),
        "attention global": attention((-1, -1)),
        "row_attention": lambda op, new: op(new(len(rows), H, D), new(T, 2 * H, D), rows, whole),
        "mean_pool": lambda op, new: op(new(T, C), batch),
    }
    if device.type == "cuda":
        found["linear"] = lambda op, new: op(new(T, C), new(C + 8, C), None, new(T, C + 8))
    if has_float8(device):
        found["to_float8"] = lambda op, new: _restored(op, new(T, C))
    if not gpu.has_matrix_units(device):
        del found["row_attention"]  # torch's, like all attention on such a card
    return found


def _restored(op: Callable[..., Any], x: Tensor) -> Tensor:
    """What the numbers and their scales stand for. It is exact if it is x itself, which the call in fp64 says. The
    reference in the dtype is off by half a step, so a number that lies between two may go either way."""
    if x.dtype == torch.float64:
        return x
    numbers, scale = op(x)
    return numbers.float() * scale


def wrong_operations(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[str]:
    for name, run in operations(device, smoke).items():
        op: Any = getattr(ops, name.split()[0])
        twin, declined = gpu.TWINS[op.__name__], []

        def kernel(*args: Any, twin: Any = twin, op: Any = op, declined: list[int] = declined) -> Any:
            y = twin(*args)
            if y is None:
                declined.append(1)
            return op.reference(*args) if y is None else y

        results = []
        for call, computes in ((kernel, dtype), (op.reference, dtype), (op.reference, torch.float64)):
            generator = torch.Generator().manual_seed(0)

            def new(*shape: int, g: torch.Generator = generator, to: torch.dtype = computes) -> Tensor:
                return torch.randn(shape, generator=g).to(dtype).to(device, to)

            results.append(run(call, new))
        yield f"{name} in {dtype}: its kernel did not run" if declined else judge(f"{name} in {dtype}", *results)


def wrong_networks(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[str]:
    from modernbert_lite.models.modernbert import ModernBert

    width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2} if smoke else {}
    config = ml.ModernBertConfig.from_dict(
        {"model_type": "modernbert", "num_hidden_layers": 3, "vocab_size": 512, "pad_token_id": 0, **width}
    )
    torch.manual_seed(0)
    exact = ModernBert(config).eval().requires_grad_(False)
    for weight in exact.parameters():
        if weight.dim() > 1:
            weight.normal_(0, weight.shape[1] ** -0.5)
    exact = exact.to(device)
    batch = ml.pack([torch.arange(n) * 7 % 500 + 5 for n in ((1, 65, 7) if smoke else (1, 64, 65, 700, 7))], device)
    with backend("torch"):
        truth = exact(batch)
        model = exact.to(dtype)  # its own weights: there is no other use of `exact`
        plain = model(batch)
    yield judge(f"the network in {dtype}", model(batch), plain, truth)
    captures = gpu.has_matrix_units(device) and os.environ.get("MODERNBERT_LITE_CUDA_GRAPHS", "1") != "0"
    if device.type == "cuda" and dtype != torch.float32 and captures:
        graphed = ml.Graphed(model)
        for _ in range(3):
            replayed = graphed(batch)
        if not graphed._graphs:
            yield f"no graph was captured in {dtype}"
        yield judge(f"a replayed graph in {dtype}", replayed, plain, truth)


def wrong(smoke: bool) -> list[str]:
    device = torch.device("cpu" if smoke else "cuda")
    dtypes = [torch.float32, torch.float16]
    if not smoke and torch.cuda.get_device_capability() >= (8, 0):
        dtypes.append(torch.bfloat16)
    with torch.inference_mode(), backend("triton" if smoke else "auto"):
        found = [x for d in dtypes for check in (wrong_operations, wrong_networks) for x in check(device, d, smoke)]
    return [x for x in found if x]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        print("bench.right: no CUDA device here (--smoke runs anywhere)", file=sys.stderr)
        return 2
    found = wrong(args.smoke)
    print("\n".join(found) or "right")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
