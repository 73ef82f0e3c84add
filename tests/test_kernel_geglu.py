"""The GeGLU kernel against the torch reference: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import os
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from modernbert_lite.ops import reference as ops

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)

from modernbert_lite.kernels import geglu as kernel  # noqa: E402


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def halves(T: int, N: int, dtype: torch.dtype, order: str) -> tuple[Tensor, Tensor]:
    """(activated, gate): views of one (T, 2N), ModernBERT's order (first half activated) or GTE's (second)."""
    wide = (torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(T + N)) * 2).to(DEVICE, dtype)
    first, second = wide.chunk(2, -1)
    return (first, second) if order == "first" else (second, first)


def exact(activated: Tensor, gate: Tensor, act: str) -> Tensor:
    return ops.ACTIVATIONS[act](activated.double()) * gate.double()


def assert_within_twice(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    if got.numel():
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


def assert_as_good_as_torch(got: Tensor, activated: Tensor, gate: Tensor, act: str) -> None:
    assert_within_twice(got, ops.ACTIVATIONS[act](activated) * gate, exact(activated, gate, act))


def gradients(grad: Tensor, activated: Tensor, gate: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """By autograd of the reference, in the arguments' dtype."""
    leaves = activated.detach().clone().requires_grad_(), gate.detach().clone().requires_grad_()
    return torch.autograd.grad(ops.ACTIVATIONS[act](leaves[0]) * leaves[1], leaves, grad)


def assert_gradients_as_good_as_torch(
    got: Tensor, grad: Tensor, activated: Tensor, gate: Tensor, act: str, *, swapped: bool
) -> None:
    """Each half by itself: their sizes differ."""
    plain = gradients(grad, activated, gate, act)
    truth = gradients(grad.double(), activated.double(), gate.double(), act)
    assert got.shape == (len(grad), 2 * grad.shape[1])
    for half, p, t in zip(got.chunk(2, -1)[:: -1 if swapped else 1], plain, truth, strict=True):
        assert_within_twice(half, p, t)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Also where both are NaN, and -0.0 is not 0.0."""
    as_integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.view(as_integers), y.view(as_integers))


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [1, 63, 144, 1152])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_geglu_equals_the_reference(T, N, dtype, order, act):
    activated, gate = halves(T, N, dtype, order)
    assert_as_good_as_torch(kernel.geglu(activated, gate, act), activated, gate, act)


def test_geglu_in_bfloat16():
    """To one unit in the last place: Triton's interpreter cuts bf16 off where a GPU rounds it (see the gpu test)."""
    activated, gate = halves(7, 144, torch.bfloat16, "first")
    got, truth = kernel.geglu(activated, gate), exact(activated, gate, "gelu")
    assert got.dtype == torch.bfloat16
    assert ((got.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()


def test_the_halves_are_not_exchanged():
    activated, gate = torch.full((3, 5), -2.0, device=DEVICE), torch.full((3, 5), 10.0, device=DEVICE)
    assert torch.allclose(kernel.geglu(activated, gate), torch.full_like(gate, -0.4550026), atol=1e-5)


def test_gelu_is_the_exact_one():
    """The tanh formula is off by up to 4.7e-4."""
    x = torch.linspace(-4, 4, 801, device=DEVICE)[None]
    got = kernel.geglu(x, torch.ones_like(x)).double()
    assert (got - 0.5 * x.double() * (1 + torch.erf(x.double() * 0.5**0.5))).abs().max() <= 1e-6


@pytest.mark.parametrize("N", [1, 63, 144, 1025])
def test_nothing_is_written_beside_the_output(monkeypatch, N):
    """The output lies in the middle of a poisoned buffer."""
    T, poison, margin = 7, -12345.0, 2048
    buffer = torch.full((2 * margin + T * N,), poison, device=DEVICE)

    def inside(shape, **_):
        return buffer[margin : margin + T * N].view(shape)

    activated, gate = halves(T, N, torch.float32, "first")
    kept = activated.clone(), gate.clone()
    monkeypatch.setattr(kernel.torch, "empty", inside)
    got = kernel.geglu(activated, gate)
    monkeypatch.undo()
    assert_as_good_as_torch(got, activated, gate, "gelu")
    assert (buffer[:margin] == poison).all()
    assert (buffer[margin + T * N :] == poison).all()
    assert torch.equal(activated, kept[0])
    assert torch.equal(gate, kept[1])


def test_nothing_is_read_beside_the_halves():
    """The views lie between columns of NaN."""
    wide = torch.full((5, 3 * 70), torch.nan, device=DEVICE)
    wide[:, 5:68], wide[:, 90:153] = 1.0, 2.0
    got = kernel.geglu(wide[:, 5:68], wide[:, 90:153])
    assert torch.allclose(got, torch.full_like(got, 2 * 0.8413447))


def test_halves_of_different_strides():
    activated = torch.randn(6, 200, device=DEVICE)[:, 10:73]
    gate = torch.randn(12, 63, device=DEVICE)[::2]
    assert_as_good_as_torch(kernel.geglu(activated, gate), activated, gate, "gelu")


def test_values_that_are_not_finite_stay_where_they_are():
    activated, gate = halves(3, 63, torch.float32, "first")
    activated[1, 5] = torch.nan
    got = kernel.geglu(activated, gate)
    assert got.isnan().nonzero().tolist() == [[1, 5]]


@pytest.fixture
def launches(monkeypatch) -> MagicMock:
    """In place of both kernels."""
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_geglu_kernel", launch)
    monkeypatch.setattr(kernel, "_geglu_backward_kernel", launch)
    return launch


@pytest.mark.parametrize(
    ("activated", "gate", "act", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "gelu", r"gate is \(2, 4\).*activated \(2, 3\).*must be \(T, N\)"),
        (torch.zeros(6), torch.zeros(6), "gelu", r"must be \(T, N\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "gelu", r"must be \(T, N\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), "gelu", "float16.*of one dtype"),
        (
            torch.zeros(2, 3).double(),
            torch.zeros(2, 3).double(),
            "gelu",
            "activated has dtype torch.float64; it must be float32",
        ),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), "gelu", "activated has dtype torch.int64"),
        (torch.zeros(3, 2).T, torch.zeros(2, 3), "gelu", "last dimension .* must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 6)[:, ::2], "gelu", "last dimension .* must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "relu", "act is 'relu'; it must be 'gelu' or 'silu'"),
    ],
)
def test_geglu_refuses_what_it_can_not_do(launches, activated, gate, act, message):
    with pytest.raises(ValueError, match=message):
        kernel.geglu(there(activated), there(gate), act)
    assert not launches.mock_calls


ROWS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad": torch.zeros(2, 4)}, r"activated is \(2, 3\) torch.float32, grad \(2, 4\).*must be \(T, N\) of one"),
        ({"grad": torch.zeros(3)}, r"grad is \(3,\)"),
        ({"grad": ROWS.half()}, "activated is .*float32, grad .*float16"),
        ({"grad": torch.zeros(3, 2).T}, "the last dimension of grad must be contiguous"),
        ({"grad": torch.zeros(1, 1).expand(2, 3)}, "the last dimension of grad must be contiguous"),
        ({"activated": torch.zeros(1, 3)}, r"activated is \(1, 3\)"),
        ({"activated": torch.zeros(2, 6)[:, ::2]}, "the last dimension of activated must be contiguous"),
        ({"gate": torch.zeros(2, 5)}, r"gate is \(2, 5\)"),
        ({"gate": ROWS.bfloat16()}, "gate is .*bfloat16"),
        ({"gate": torch.zeros(3, 2).T}, "the last dimension of gate must be contiguous"),
        ({"grad": ROWS.double(), "activated": ROWS.double(), "gate": ROWS.double()}, "grad has dtype torch.float64"),
        ({"act": "gelu_pytorch_tanh"}, "act is 'gelu_pytorch_tanh'; it must be 'gelu' or 'silu'"),
    ],
)
def test_the_backward_refuses_what_it_can_not_do(launches, arguments, message):
    given = {"grad": ROWS, "activated": ROWS, "gate": ROWS, **arguments}
    with pytest.raises(ValueError, match=message):
        kernel.geglu_backward(**{name: there(x) if isinstance(x, Tensor) else x for name, x in given.items()})
    assert not launches.mock_calls


def of_shape(*shape: int, strides: tuple[int, ...]) -> Tensor:
    """A tensor that lies about its memory, of which it has one element: only for what is refused before a launch."""
    memory = np.zeros(1, np.float16)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(memory, shape, [n * memory.itemsize for n in strides]))


@pytest.mark.parametrize(
    ("T", "N", "stride"),
    [(932_068, 1152, 2304), (2**20 + 1, 4, 2**11), (2**10 + 1, 3, 2**21), (2**21 + 1, 1000, 1024), (3, 2**29, 2**30)],
)
def test_halves_that_span_too_much_are_refused(launches, T, N, stride):
    huge = of_shape(T, N, strides=(stride, 1))
    for activated, gate in (
        (huge, huge),
        (huge, of_shape(T, N, strides=(8, 1))),
        (of_shape(T, N, strides=(8, 1)), huge),
    ):
        name = "activated" if activated is huge else "gate"
        with pytest.raises(ValueError, match=rf"{name} .*2\^31"):
            kernel.geglu(activated, gate)
        with pytest.raises(ValueError, match=rf"{name} .*2\^31"):
            kernel.geglu_backward(of_shape(T, N, strides=(8, 1)), activated, gate)
    with pytest.raises(ValueError, match=r"grad .*2\^31"):
        kernel.geglu_backward(huge, of_shape(T, N, strides=(8, 1)), of_shape(T, N, strides=(8, 1)))
    assert not launches.mock_calls


def test_too_many_elements_in_little_memory_are_refused(launches, monkeypatch):
    """Rows of stride 0: what comes out has no less than 2^31 elements all the same."""
    monkeypatch.setattr(kernel.torch, "empty", lambda *_, **__: pytest.fail("no room for the output"))
    repeated = of_shape(2**21, 1024, strides=(0, 1))
    with pytest.raises(ValueError, match=r"activated .*2\^31"):
        kernel.geglu(repeated, repeated)
    with pytest.raises(ValueError, match=r"grad .*2\^31"):
        kernel.geglu_backward(repeated, repeated, repeated)
    assert not launches.mock_calls


def test_the_longest_halves_are_not_refused(launches, monkeypatch):
    monkeypatch.setattr(kernel.torch, "empty", lambda shape, **_: of_shape(*shape, strides=(shape[1], 1)))
    T = 932_067
    half = of_shape(T, 1152, strides=(2304, 1))
    kernel.geglu(half, half)
    kernel.geglu_backward(half, half, half)
    grid = (-(-T // kernel.BLOCK_T) * -(-1152 // kernel.BLOCK_N),)
    assert [call.args for call in launches.__getitem__.call_args_list] == [(grid,)] * 2


# The backward pass


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


def whole(T: int, N: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (T, 2N)."""
    return (torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(T + N)) * 2).to(DEVICE, dtype)


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
