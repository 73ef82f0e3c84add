"""Attention as torch.library operators: opcheck, gradients, compiling, exporting; then real shapes on a card."""

import inspect
import itertools
import random

import pytest
import torch
from kernel_attention_cases import (  # noqa: F401
    DEVICE,
    FULL,
    HALF,
    INTERPRETED,
    LOCAL,
    SINGLE,
    assert_within_twice,
    ends,
    randn,
    reference,
    reference_is_torch,
    same,
    spans,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from modernbert_lite.kernels import attention as kernel

triton = pytest.importorskip("triton")

# Numpy, on which the interpreter runs, warns of what becomes of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")


needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)


def op_inputs(lengths: list[int], window, dtype=SINGLE, H=1, D=32, seed=0):
    qkv, cu_seqlens = randn(sum(lengths), 3, H, D, dtype=dtype, seed=seed), ends(lengths)
    return qkv, cu_seqlens, kernel.tiles(lengths, 32).to(DEVICE), 32, *window


@pytest.mark.parametrize("window", [(3, 40), FULL])
def test_attention_passes_opcheck(window):
    torch.library.opcheck(kernel.attention_op, op_inputs([3, 0, 40], window))


def test_the_operator_has_no_gradient_and_says_so():
    qkv, *rest = op_inputs([3, 40], FULL)
    result = kernel.attention_op(qkv.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="backward through modernbert_lite"):
        result.sum().backward()


def test_attention_of_a_view_passes_opcheck():
    """The operator's result is contiguous, whatever qkv is."""
    qkv, *rest = op_inputs([3, 40], LOCAL, dtype=HALF, H=2)
    view = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert kernel.attention_op(view, *rest).is_contiguous()
    torch.library.opcheck(kernel.attention_op, (view, *rest))


def test_row_attention_passes_opcheck():
    qkv, cu_seqlens, *_ = op_inputs([3, 1, 40], FULL, H=2)
    first = cu_seqlens[:-1].long()
    torch.library.opcheck(kernel.row_attention_op, (qkv[first, 0], qkv[:, 1:], cu_seqlens))
    assert same(
        kernel.row_attention_op(qkv[first, 0], qkv[:, 1:], cu_seqlens),
        kernel.row_attention(qkv[first, 0], qkv[:, 1:], cu_seqlens),
    )


def test_the_operators_have_names():
    for name in ("attention", "row_attention"):
        assert getattr(torch.ops.modernbert_lite, name).default is not None


def packed_attention(qkv: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """As a compiled model has it: the tile list is made on the device, of a size that T and B give."""
    table = kernel.device_tiles(cu_seqlens, qkv.shape[0] // 32 + cu_seqlens.shape[0] - 1, 32)
    return kernel.attention_op(qkv * 1.0, cu_seqlens, table, 32, 20, 20) + 1.0


DYNAMIC = [[5, 70, 33], [64, 2], [3, 3, 3, 3, 3], [1, 0, 100, 31], [7, 40]]


def test_a_compiled_graph_serves_every_batch():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(DYNAMIC):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(compiled(qkv, cu_seqlens), packed_attention(qkv, cu_seqlens))
    assert counter.frame_count == 1


def test_row_attention_compiles():
    def first_rows(qkv, cu_seqlens):
        return kernel.row_attention_op(qkv[cu_seqlens[:-1].long(), 0], qkv[:, 1:], cu_seqlens) + 1.0

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(first_rows, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(([5, 70, 33], [64, 2], [3] * 5)):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(compiled(qkv, cu_seqlens), first_rows(qkv, cu_seqlens))
    assert counter.frame_count == 1


class Attend(torch.nn.Module):
    def forward(self, qkv, cu_seqlens):
        return packed_attention(qkv, cu_seqlens)


def test_an_exported_program_serves_every_batch():
    T, ends_dim = torch.export.Dim("T", min=2), torch.export.Dim("ends", min=3)
    example = (randn(50, 3, 1, 32), ends([10, 33, 7]))
    shapes = {"qkv": {0: T}, "cu_seqlens": {0: ends_dim}}
    program = torch.export.export(Attend(), example, dynamic_shapes=shapes)
    assert any("modernbert_lite.attention" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for i, lengths in enumerate(DYNAMIC):
        qkv, cu_seqlens = randn(sum(lengths), 3, 1, 32, seed=i), ends(lengths)
        assert torch.equal(module(qkv, cu_seqlens), packed_attention(qkv, cu_seqlens))


# ---- on a GPU ------------------------------------------------------------------------------------------------------


SHAPES = [(12, 64), (16, 64), (8, 32), (8, 128)]  # ModernBERT base and large, small models, wide heads


MIXES = {
    "mix": [1, 2000, 64, 0, 513, 65, 128, 3, 1024, 129, 31, 700, 1],
    "8192": [8192],
    "32x512": [512] * 32,
}


def card_has(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability() >= (8, 0)


def math_reference(qkv: torch.Tensor, lengths: list[int], window: tuple[int, int]) -> torch.Tensor:
    """In fp32 without a fused kernel, four heads at a time: the scores of 8192 tokens are 1 GB then."""
    with sdpa_kernel(SDPBackend.MATH):
        parts = [reference(part.float(), lengths, window) for part in qkv.split(4, 2)]
    return torch.cat(parts, 1).double()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_attention_at_real_shapes(H, D, window, mix, dtype):
    if not card_has(dtype):
        pytest.skip("this card has no bf16")
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    got = kernel.attention(qkv, ends(lengths), window)
    assert_within_twice(got, reference(qkv, lengths, window), math_reference(qkv, lengths, window))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("window", [FULL, LOCAL])
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_attention_is_as_good_as_torchs_varlen(H, D, window, mix, dtype):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's varlen_attn has no window")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("varlen_attn needs sm_80")
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    cu_seqlens, longest = ends(lengths), max(lengths)
    got = kernel.attention(qkv, cu_seqlens, window)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    plain = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
    assert_within_twice(got, plain, math_reference(qkv, lengths, window))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize(("H", "D"), SHAPES)
def test_row_attention_at_real_shapes(H, D, mix, dtype):
    if not card_has(dtype):
        pytest.skip("this card has no bf16")
    lengths = [n for n in MIXES[mix] if n]
    qkv = randn(sum(lengths), 3, H, D, dtype=dtype)
    first = ends(lengths)[:-1].long()
    got = kernel.row_attention(qkv[first, 0], qkv[:, 1:], ends(lengths))
    plain, truth = reference(qkv, lengths)[first], math_reference(qkv, lengths, FULL)[first]
    assert_within_twice(got, plain, truth)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [FULL, LOCAL])
def test_results_repeat_to_the_bit(window):
    lengths = MIXES["mix"]
    qkv = randn(sum(lengths), 3, 12, 64, dtype=HALF)
    first = kernel.attention(qkv, ends(lengths), window)
    assert all(same(kernel.attention(qkv, ends(lengths), window), first) for _ in range(20))


@pytest.mark.gpu
@needs_gpu
def test_addresses_near_two_to_the_31():
    """The last rows of the largest batch that is taken give what they give alone."""
    H, D = 12, 64
    T = (2**31 - 1) // (3 * H * D)
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    lengths = [512] * (T // 512) + [T % 512]
    qkv = torch.empty(T, 3, H, D, dtype=HALF, device=DEVICE).normal_()
    got = kernel.attention(qkv, ends(lengths), LOCAL)
    for cut in (spans(lengths)[i] for i in (0, len(lengths) // 2, -2, -1)):
        assert same(got[cut], kernel.attention(qkv[cut], ends([cut.stop - cut.start]), LOCAL))


@pytest.mark.gpu
@needs_gpu
def test_ten_thousand_random_batches_are_finite(monkeypatch):
    """Every element is written, and none is NaN. The GPU is waited for once in a hundred batches."""
    rng = random.Random(0)
    dtypes = [dtype for dtype in (torch.bfloat16, HALF) if card_has(dtype)]
    pools = [randn(2400, 3, 2, D, dtype=dtype) * 3 for D in (64, 128, 32) for dtype in dtypes]

    def full_of_nan(shape, *, dtype, device):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(kernel.torch, "empty", full_of_nan)
    bad = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for number in range(10_000):
        lengths = [
            rng.choice((0, 1, 64, rng.randrange(1, 20), rng.randrange(1, 300))) for _ in range(rng.randrange(1, 9))
        ]
        pool = rng.choice(pools)
        start = rng.randrange(2400 - sum(lengths) + 1)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)  # on the host: no wait for it
        qkv = pool[start : start + sum(lengths)]
        out = kernel.attention(qkv, cu_seqlens, rng.choice((FULL, LOCAL)))
        bad += out.isfinite().logical_not().sum()
        if number % 100 == 99:
            assert bad.item() == 0, f"batches {number - 99} to {number}"
