"""GeGLU as a torch.library operator, and real shapes on a card."""

import pytest
import torch
from kernel_geglu_cases import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    assert_as_good_as_torch,
    assert_gradients_as_good_as_torch,
    assert_within_twice,
    halves,
    launches,
    same_bits,
    whole,
)
from torch import Tensor
from torch.library import opcheck

from modernbert_lite.kernels import geglu as kernel
from modernbert_lite.ops import reference as ops

triton = pytest.importorskip("triton")


needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)


def reference(x: Tensor, act: str, swapped: bool) -> Tensor:
    activated, gate = x.chunk(2, -1)[:: -1 if swapped else 1]
    return ops.ACTIVATIONS[act](activated) * gate


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "N"), [(0, 8), (1, 1), (7, 63), (17, 144)])
def test_the_operator_and_its_gradient(T, N, dtype, swapped, act):
    x = whole(T, N, dtype)
    weight = halves(T, N, dtype, "first")[1]
    kept, results = x.clone(), []
    for f, of in ((kernel.geglu_op, x), (reference, x), (reference, x.double())):
        leaf = of.clone().requires_grad_()
        y = f(leaf, act, swapped)
        (grad,) = torch.autograd.grad(y, leaf, weight.to(y.dtype))
        results.append((y.detach(), *grad.chunk(2, -1)))
    for got, plain, truth in zip(*results, strict=True):
        assert_within_twice(got, plain, truth)
    assert same_bits(kernel.geglu_op(x, act, swapped), results[0][0])
    assert same_bits(x, kept)


def test_a_second_backward_gives_the_same_gradient():
    """Nothing that was saved is written over."""
    x, weight = whole(17, 63).requires_grad_(), torch.randn(17, 63, device=DEVICE)
    kept = x.detach().clone(), weight.clone()
    y = kernel.geglu_op(x, "gelu", False)
    (first,) = torch.autograd.grad(y, x, weight, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, weight)
    assert same_bits(first, second)
    assert same_bits(x.detach(), kept[0])
    assert same_bits(weight, kept[1])


def test_what_was_saved_may_not_change_before_the_backward():
    x = whole(7, 63).requires_grad_()
    scaled = x * 1
    y = kernel.geglu_op(scaled, "gelu", False)
    scaled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    x = whole(7, 63).requires_grad_()
    (grad,) = torch.autograd.grad(kernel.geglu_op(x, "gelu", False).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="geglu_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["stride 0", "transposed"])
def test_gradients_of_other_layouts(layout):
    x = whole(7, 63).requires_grad_()
    weight = torch.full((), 3.0, device=DEVICE).expand(7, 63)
    if layout == "transposed":
        weight = torch.randn(63, 7, device=DEVICE).T
    (got,) = torch.autograd.grad(kernel.geglu_op(x, "gelu", True), x, weight)
    (expected,) = torch.autograd.grad(kernel.geglu_op(x, "gelu", True), x, weight.contiguous())
    assert same_bits(got, expected)


def test_the_gradient_of_no_tokens():
    """sum() hands back a gradient of stride 0, which counts as contiguous where there is nothing in it."""
    x = whole(0, 7).requires_grad_()
    kernel.geglu_op(x, "gelu", False).sum().backward()
    assert x.grad.shape == (0, 14)


def test_the_operator_takes_views():
    """Rows inside a wider buffer."""
    buffer = torch.full((9, 2 * 63 + 10), torch.nan, device=DEVICE)
    view = buffer[::2, 5:-5]
    view.copy_(whole(5, 63))
    kept = buffer.clone()
    leaf = view.detach().requires_grad_()
    y = kernel.geglu_op(leaf, "silu", False)
    assert same_bits(y.detach(), kernel.geglu_op(whole(5, 63), "silu", False))
    y.sum().backward()
    assert leaf.grad.isfinite().all()
    assert same_bits(buffer, kept)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_operator_refuses_a_width_that_has_no_halves(launches, width):
    with pytest.raises(ValueError, match=r"\bx is|activated is|gate is"):
        kernel.geglu_op(torch.zeros(2, width, device=DEVICE), "gelu", False)
    assert not launches.mock_calls


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_opcheck(swapped, act):
    for x in (whole(5, 7), whole(9, 70)[::2, 3:17]):
        opcheck(kernel.geglu_op, (x, act, swapped))
        opcheck(kernel.geglu_op, (x.detach().requires_grad_(), act, swapped))
        opcheck(kernel.geglu_backward_op, (torch.randn(5, 7, device=DEVICE), x, act, swapped))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_in_half_precision(dtype):
    opcheck(kernel.geglu_op, (whole(5, 7, dtype).requires_grad_(), "gelu", False))


def test_opcheck_of_no_tokens():
    opcheck(kernel.geglu_op, (whole(0, 7).requires_grad_(), "gelu", False))


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_compiled(swapped, act):
    """The same bits as eager, forward and backward, and one graph for any number of tokens."""
    weight = torch.randn(10, 2 * 63, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def f(x):
        return kernel.geglu_op(x @ weight, act, swapped) + 1

    torch.compiler.reset()
    fast = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, T in enumerate((9, 17, 3)):
        x = whole(T, 5).requires_grad_()
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            got = fast(x)
        expected = f(x)
        assert same_bits(got, expected)
        grad = torch.randn_like(got)
        assert same_bits(*(torch.autograd.grad(y, x, grad)[0] for y in (got, expected)))
    torch.compiler.reset()


def test_exported():
    class Gate(torch.nn.Module):
        def forward(self, x):
            return kernel.geglu_op(x * 2, "gelu", True)

    T = torch.export.Dim("T", min=2, max=4096)
    exported = torch.export.export(Gate(), (whole(9, 7),), dynamic_shapes=({0: T},))
    for x in (whole(9, 7), whole(17, 7)):
        assert same_bits(exported.module()(x), Gate()(x))


# Real shapes, on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "N"), [(16_384, 1152), (16_384, 2624), (2_048, 3072), (1, 1152), (4_097, 1151)])
def test_geglu_at_real_shapes(T, N, dtype, order, act):
    """ModernBERT base (1152) and large (2624), GTE v1.5 base (3072), at the default budget of tokens."""
    activated, gate = halves(T, N, dtype, order)
    assert_as_good_as_torch(kernel.geglu(activated, gate, act), activated, gate, act)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "N"), [(16_384, 1152), (16_384, 2624), (2_048, 3072), (1, 1152), (4_097, 1151)])
def test_the_backward_at_real_shapes(T, N, dtype, swapped, act):
    activated, gate = halves(T, N, dtype, "second" if swapped else "first")
    grad = torch.randn(T, N, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    kept = activated.clone(), gate.clone()
    got = kernel.geglu_backward(grad, activated, gate, act, swapped=swapped)
    assert_gradients_as_good_as_torch(got, grad, activated, gate, act, swapped=swapped)
    assert torch.equal(activated, kept[0])
    assert torch.equal(gate, kept[1])


@pytest.mark.gpu
@needs_gpu
def test_the_longest_halves():
    """One row below 2^31 elements, 4.3 GB, and its gradient: the addresses of the last rows don't wrap around."""
    T, N = 932_067, 1152
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    x = torch.zeros(T, 2 * N, device=DEVICE, dtype=torch.float16)
    ends = torch.cat((torch.arange(9), torch.arange(T // 2, T // 2 + 9), torch.arange(T - 9, T))).to(DEVICE)
    part = whole(len(ends), N, torch.float16)
    x[ends] = part
    activated, gate = x.chunk(2, -1)
    got, expected = kernel.geglu(activated, gate), kernel.geglu(*part.chunk(2, -1))
    assert same_bits(got[ends], expected)
    got[ends] = 0
    assert not got.any()
    grad = torch.zeros_like(got)
    grad[ends] = expected
    got = kernel.geglu_backward(grad, activated, gate)
    assert same_bits(got[ends], kernel.geglu_backward(expected, *part.chunk(2, -1)))
    got[ends] = 0
    assert not got.any()
