"""Gated activation: act(activated) * gate, each read once, the product written once."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _geglu_kernel(
    activated,
    gate,
    out,
    T,
    N,
    stride_activated,
    stride_gate,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # T * stride may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    # fp32 from the load on: erf needs it, and the interpreter's own bf16 arithmetic is wrong.
    x = tl.load(activated + row * stride_activated + column, mask=inside).to(tl.float32)
    g = tl.load(gate + row * stride_gate + column, mask=inside).to(tl.float32)
    if GELU:  # noqa: SIM108  compiled away
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        y = x / (1.0 + tl.exp(-x))
    tl.store(out + row * N + column, (y * g).to(out.dtype.element_ty), mask=inside)


def geglu(activated: torch.Tensor, gate: torch.Tensor, act: str = "gelu") -> torch.Tensor:
    """act(activated) * gate: two (T, N) views with contiguous rows, often halves of one (T, 2N), -> (T, N).

    act: "gelu" (exact, by erf) or "silu". fp32 arithmetic, the inputs' dtype. Forward only. Raises ValueError for
    other shapes, dtypes, strides or activations.
    """
    if activated.dim() != 2 or activated.shape != gate.shape or activated.dtype != gate.dtype:
        raise ValueError(
            f"activated is {tuple(activated.shape)} {activated.dtype}, gate {tuple(gate.shape)} {gate.dtype}; "
            "both must be (T, N) of one dtype"
        )
    if activated.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {activated.dtype}; it must be float32, float16 or bfloat16")
    if activated.stride(1) != 1 or gate.stride(1) != 1:
        raise ValueError("the last dimension of activated and gate must be contiguous")
    if act not in ("gelu", "silu"):
        raise ValueError(f"act is {act!r}; it must be 'gelu' or 'silu'")
    T, N = activated.shape
    out = torch.empty((T, N), dtype=activated.dtype, device=activated.device)
    if out.numel():
        _geglu_kernel[(T, triton.cdiv(N, BLOCK))](
            activated, gate, out, T, N, activated.stride(0), gate.stride(0), GELU=act == "gelu", BLOCK=BLOCK
        )
    return out
