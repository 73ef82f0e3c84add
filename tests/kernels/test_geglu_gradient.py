"""GeGLU's backward kernel."""

import pytest
import torch
from kernel_geglu_cases import DEVICE, assert_gradients_as_good_as_torch, exact, gradients, halves, same_bits

from modernbert_lite.kernels import geglu as kernel

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "N"), [(0, 8), (1, 1), (7, 63), (16, 128), (17, 144), (3, 1152), (7, 0)])
def test_the_backward_equals_autograd_of_the_reference(T, N, dtype, swapped, act):
    activated, gate = halves(T, N, dtype, "second" if swapped else "first")
    grad = halves(T, N, dtype, "first")[1].flip(-1)
    got = kernel.geglu_backward(grad, activated, gate, act, swapped=swapped)
    assert_gradients_as_good_as_torch(got, grad, activated, gate, act, swapped=swapped)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_backward_in_bfloat16(act):
    """To one unit in the last place, as above."""
    activated, gate = halves(7, 144, torch.bfloat16, "first")
    grad = gate.flip(-1).contiguous()
    got = kernel.geglu_backward(grad, activated, gate, act)
    truth = torch.cat(gradients(grad.double(), activated.double(), gate.double(), act), -1)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_backward_equals_finite_differences_of_the_forward(act):
    """Elementwise, so all columns at once. h^2 / 6 times the third derivative (below 0.8) is 3.3e-5 at most, and
    1e-6 of rounding over 2 h another 3.2e-5."""
    h = 2.0**-6
    x = torch.linspace(-4, 4, 257, device=DEVICE)[None]  # steps of 2^-5: x and x +- h are exact
    one = torch.ones_like(x)
    slope = (kernel.geglu(x + h, one, act) - kernel.geglu(x - h, one, act)) / (2 * h)
    grad_activated, grad_gate = kernel.geglu_backward(one, x, one, act).chunk(2, -1)
    assert (grad_activated - slope).abs().max() <= 1e-4
    assert (grad_gate - kernel.geglu(x, one, act)).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy; it is meant
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_values_far_out(act):
    """exp of them overflows or vanishes: no NaN, and what torch gives."""
    x = torch.tensor([0.0, -0.0, 5.5, -5.5, 30, -30, 88, -88, 89, -89, 104, -104, 1e4, -1e4, 1e19, -1e19, 1e38, -1e38])
    x = x.to(DEVICE)[None]
    one = torch.ones_like(x)
    truth = exact(x, one, act)
    assert ((kernel.geglu(x, one, act).double() - truth).abs() <= 1e-6 * (1 + truth.abs())).all()
    got = kernel.geglu_backward(one, x, one, act)
    truth = torch.cat(gradients(one.double(), x.double(), one.double(), act), -1)
    assert ((got.double() - truth).abs() <= 1e-6 * (1 + truth.abs())).all()
    half = x[:, :14].half()
    assert kernel.geglu(half, torch.ones_like(half), act).isfinite().all()
    assert kernel.geglu_backward(torch.ones_like(half), half, torch.ones_like(half), act).isfinite().all()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("N", [1, 63, 144, 1025])
def test_the_backward_writes_nothing_but_its_output(monkeypatch, N, swapped):
    """The output lies in the middle of a poisoned buffer; what was saved for the backward pass keeps its bits."""
    T, poison, margin = 7, -12345.0, 2048
    buffer = torch.full((2 * margin + T * 2 * N,), poison, device=DEVICE)

    def inside(shape, **_):
        assert tuple(shape) == (T, 2 * N)
        return buffer[margin : margin + T * 2 * N].view(shape)

    activated, gate = halves(T, N, torch.float32, "second" if swapped else "first")
    grad = torch.randn(T, N, device=DEVICE)
    kept = grad.clone(), activated.clone(), gate.clone()
    monkeypatch.setattr(kernel.torch, "empty", inside)
    got = kernel.geglu_backward(grad, activated, gate, swapped=swapped)
    monkeypatch.undo()
    assert_gradients_as_good_as_torch(got, grad, activated, gate, "gelu", swapped=swapped)
    assert (buffer[:margin] == poison).all()
    assert (buffer[margin + T * 2 * N :] == poison).all()
    for x, y in zip((grad, activated, gate), kept, strict=True):
        assert torch.equal(x, y)


def test_the_backward_reads_nothing_beside_its_arguments():
    """The views lie between columns of NaN, with strides of their own."""
    wide, apart = (torch.full((5, n), torch.nan, device=DEVICE) for n in (3 * 70, 80))
    wide[:, 5:68], wide[:, 90:153], apart[:, 10:73] = 1.0, 2.0, 3.0
    got = kernel.geglu_backward(apart[:, 10:73], wide[:, 5:68], wide[:, 90:153])
    slope = 0.8413447 + 0.2419707
    expected = torch.tensor([3 * 2 * slope, 3 * 0.8413447], device=DEVICE).repeat_interleave(63).expand(5, -1)
    assert torch.allclose(got, expected)


def test_a_row_that_is_repeated():
    """Stride 0, as of an expanded gradient."""
    activated, gate = halves(6, 63, torch.float32, "first")
    grad = torch.randn(1, 63, device=DEVICE).expand(6, 63)
    got = kernel.geglu_backward(grad, activated, gate)
    assert_gradients_as_good_as_torch(got, grad, activated, gate, "gelu", swapped=False)


def test_values_that_are_not_finite_stay_where_they_are_in_the_backward():
    activated, gate = halves(3, 63, torch.float32, "first")
    activated[1, 5] = torch.nan
    got = kernel.geglu_backward(torch.ones_like(activated), activated, gate)
    assert got.isnan().nonzero().tolist() == [[1, 5], [1, 63 + 5]]
    grad = torch.ones_like(activated)
    activated[1, 5], grad[2, 62] = 1.0, torch.nan
    assert kernel.geglu_backward(grad, activated, gate).isnan().nonzero().tolist() == [[2, 62], [2, 63 + 62]]


def test_permuting_tokens_permutes_the_output():
    activated, gate = halves(19, 144, torch.float32, "first")
    grad = gate.flip(-1).contiguous()
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert same_bits(kernel.geglu(activated[order], gate[order]), kernel.geglu(activated, gate)[order])
    got = kernel.geglu_backward(grad[order], activated[order], gate[order])
    assert same_bits(got, kernel.geglu_backward(grad, activated, gate)[order])


# The operators
