"""The LayerNorm kernels against torch: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from modernbert_lite.kernels import layer_norm as kernel  # noqa: E402

EPS = 1e-5
Tensors = tuple[torch.Tensor, ...]
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))).to(DEVICE, dtype)


def parameters(C: int, bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor | None]:
    return 1 + rand(C, dtype=dtype, seed=1) / 2, rand(C, dtype=dtype, seed=2) if bias else None


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = EPS) -> torch.Tensor:
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), None if bias is None else bias.double(), eps)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = EPS) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def assert_as_good(got: torch.Tensor | None, plain: torch.Tensor | None, truth: torch.Tensor | None) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    if truth is None:
        assert got is None
        return
    assert got.shape == truth.shape
    assert got.dtype == plain.dtype
    if got.numel():
        error, allowed = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 2 * allowed + 1e-6, f"{error:.3g}, plain torch {allowed:.3g}"


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, got: torch.Tensor) -> None:
    assert_as_good(got, plain(x, weight, bias), exact(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("C", [1, 31, 96, 384, 768, 1024, 1792])
@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 64, 65])
def test_layer_norm_equals_torch(T, C, bias, dtype):
    x, (w, b) = rand(T, C, dtype=dtype), parameters(C, bias, dtype)
    kept = x.clone()
    check(x, w, b, kernel.layer_norm(x, w, b, EPS))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("C", [1, 31, 96, 384, 768, 1024, 1792])
@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 65])
def test_the_sum_is_given_and_is_what_is_normalised(T, C, bias, dtype):
    x, residual, (w, b) = rand(T, C, dtype=dtype), rand(T, C, dtype=dtype, seed=3), parameters(C, bias, dtype)
    kept = x.clone(), residual.clone()
    y, total = kernel.add_layer_norm(x, residual, w, b, EPS)
    assert torch.equal(total, x + residual)
    check(total, w, b, y)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("C", [1, 31, 768, 1792])
@pytest.mark.parametrize("T", [0, 1, 5, 65])
def test_a_residual_is_added_before_it_is_normalised(T, C, bias, dtype):
    x, residual, (w, b) = rand(T, C, dtype=dtype), rand(T, C, dtype=dtype, seed=3), parameters(C, bias, dtype)
    kept = x.clone(), residual.clone()
    got = kernel.layer_norm(x, w, b, EPS, residual)
    assert_as_good(got, plain(x + residual, w, b), exact(x.double() + residual.double(), w, b))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_a_sum_that_is_not_kept_is_rounded_nowhere():
    """2048 + 1 is 2048 in fp16; in fp32 it has a deviation."""
    x = torch.full((1, 96), 2048.0, device=DEVICE, dtype=torch.float16)
    residual = torch.arange(96, device=DEVICE).remainder(2).to(torch.float16)[None]
    w = torch.ones(96, device=DEVICE, dtype=torch.float16)
    y = kernel.layer_norm(x, w, None, EPS, residual)
    error = (y.double() - exact(x.double() + residual.double(), w, None)).abs().max()
    assert error <= 2**-11  # half a unit in the last place of a 1 in fp16: the result's own rounding, and no other


def test_the_residual_must_be_like_x():
    x, w = rand(3, 8), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="residual"):
        kernel.layer_norm(x, w, residual=rand(2, 8))


def test_the_sum_is_rounded_before_it_is_normalised():
    """2048 + 1 is 2048 in fp16: what is stored has no deviation, though the sum in fp32 had."""
    x = torch.full((1, 96), 2048.0, device=DEVICE, dtype=torch.float16)
    residual = torch.arange(96, device=DEVICE).remainder(2).to(torch.float16)[None]
    y, total = kernel.add_layer_norm(x, residual, torch.ones(96, device=DEVICE, dtype=torch.float16))
    assert (total == 2048).all()
    assert (y == 0).all()


def test_layer_norm_in_bfloat16():
    """To one unit in the last place: Triton's interpreter cuts bf16 off where a GPU rounds it (see the gpu tests)."""
    x, residual = rand(5, 384, dtype=torch.bfloat16), rand(5, 384, dtype=torch.bfloat16, seed=3)
    w, b = parameters(384, True, torch.bfloat16)
    y, total = kernel.add_layer_norm(x, residual, w, b)
    for got, truth in (
        (kernel.layer_norm(x, w, b), exact(x, w, b)),
        (total, x.double() + residual.double()),
        (y, exact(total, w, b)),
    ):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()


def test_values_far_from_zero():
    """The mean of squares less the square of the mean has no digit left here; centred squares have all that fp32 has:
    a few units in the last place of the mean, over the deviation."""
    mean, deviation = 1e3, 0.05
    x, w = rand(5, 768) * deviation + mean, torch.ones(768, device=DEVICE)
    truth = exact(x, w, None)
    cancelled = ((x**2).mean(1) - x.mean(1) ** 2).clamp(min=0)
    naive = (x - x.mean(1, keepdim=True)) / (cancelled + EPS)[:, None].sqrt()
    assert (naive.double() - truth).abs().max() > 0.5
    units = 4 * 2**-14 / deviation  # of 1000 in fp32
    assert (kernel.layer_norm(x, w).double() - truth).abs().max() <= units
    y, total = kernel.add_layer_norm(x - 1, torch.ones_like(x), w)
    assert (y.double() - exact(total, w, None)).abs().max() <= units


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 100.0])
@pytest.mark.parametrize("C", [96, 768])
def test_rows_of_one_value_give_the_bias(C, value):
    x, (w, b) = torch.full((3, C), value, device=DEVICE), parameters(C, True)
    got = kernel.layer_norm(x, w, b)
    # The mean may be a unit in the last place or two off, over the root of eps: that far is a normalised value from 0.
    off = (abs(value) * 2**-22 + 2**-30) / EPS**0.5
    assert (got - b).abs().max() <= off * w.abs().max()
    grad = rand(3, C, seed=5)
    grad_x, grad_weight, grad_bias = kernel.layer_norm_backward(grad, x, w, b)
    truth = gradients(plain, [x.double(), w.double(), b.double()], (grad.double(),))
    assert ((grad_x - truth[0]).abs() <= 1e-6 * truth[0].abs().max()).all()
    assert ((grad_weight - truth[1]).abs() <= off * grad.abs().sum(0)).all()
    assert (grad_bias - truth[2]).abs().max() <= 1e-6


def test_eps_counts():
    x, w = rand(3, 96) * 1e-3, torch.ones(96, device=DEVICE)
    for eps in (1e-12, 1e-5, 1.0):
        assert_as_good(kernel.layer_norm(x, w, None, eps), plain(x, w, None, eps), exact(x, w, None, eps))


def inside_of_nan(T: int, C: int, margin: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A (T, C) view between columns of NaN."""
    wide = torch.full((T, C + 2 * margin), torch.nan, device=DEVICE, dtype=dtype)
    wide[:, margin : margin + C] = rand(T, C, dtype=dtype, seed=seed)
    return wide[:, margin : margin + C]


@pytest.mark.parametrize("C", [31, 384])
def test_rows_may_be_strided(C):
    """Each input with a stride of its own, NaN on both sides: nothing else is read."""
    w, b = parameters(C, True)
    x, residual = inside_of_nan(6, C, 5, torch.float32), inside_of_nan(6, C, 8, torch.float32, 3)
    grad, grad_total = inside_of_nan(6, C, 3, torch.float32, 4), inside_of_nan(6, C, 16, torch.float32, 5)
    check(x, w, b, kernel.layer_norm(x, w, b))
    y, total = kernel.add_layer_norm(x, residual, w, b)
    assert torch.equal(total, x + residual)
    check(total, w, b, y)
    got = kernel.layer_norm_backward(grad, x, w, b, EPS, grad_total)
    dense = kernel.layer_norm_backward(grad.contiguous(), x.contiguous(), w, b, EPS, grad_total.contiguous())
    for one, other in zip(got, dense, strict=True):
        # A card loads aligned rows in wider pieces, and so adds their numbers up in another order.
        assert torch.equal(one, other) if INTERPRETED else torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert not any(one.isnan().any() for one in got)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter: inf - inf
def test_a_row_that_is_not_finite_stays_alone():
    x, (w, b) = rand(9, 96), parameters(96, True)
    expected = kernel.layer_norm(x, w, b)
    x[4, 3], x[7, 0] = torch.nan, torch.inf
    got = kernel.layer_norm(x, w, b)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [4, 7]
    assert torch.equal(got[[0, 1, 2, 3, 5, 6, 8]], expected[[0, 1, 2, 3, 5, 6, 8]])


def test_rows_do_not_depend_on_their_neighbours():
    x, (w, b) = rand(13, 384), parameters(384, True)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = kernel.layer_norm(x, w, b)
    assert torch.equal(kernel.layer_norm(x[order], w, b), got[order])
    for i in (0, 6, 12):
        assert torch.equal(kernel.layer_norm(x[i : i + 1], w, b), got[i : i + 1])


def gradients(f: Callable[..., Tensors], inputs: list[torch.Tensor | None], grads: Tensors) -> list[torch.Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, grads)
    return [leaf.grad for leaf in leaves if leaf is not None]


def assert_gradients(x, weight, bias, dtype, op, grad, residual=None, grad_total=None) -> None:
    """x, weight and bias (and the residual) against autograd in fp64 and, for the bound, in the same dtype."""
    if residual is None:
        inputs, grads = [x, weight, bias], (grad,)

        def reference(x, weight, bias):
            return plain(x, weight, bias)
    else:
        inputs, grads = [x, residual, weight, bias], (grad, grad_total)

        def reference(x, residual, weight, bias):
            return plain(x + residual, weight, bias), x + residual

    got = gradients(lambda *leaves: op(*leaves, EPS), inputs, grads)
    torchs = gradients(reference, inputs, grads)
    truth = gradients(
        reference, [None if x is None else x.double() for x in inputs], tuple(grad.double() for grad in grads)
    )
    assert len(got) == len(truth) == len(inputs) - (bias is None)
    for ours, theirs, right in zip(got, torchs, truth, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("T", "C"), [(0, 31), (1, 1), (1, 384), (3, 31), (5, 96), (65, 384), (5, 1792)])
def test_gradients_equal_autograd_in_fp64(T, C, bias, dtype):
    """65 rows are more than the interpreter's two programs take at a time, so that they go round."""
    x, grad, (w, b) = rand(T, C, dtype=dtype), rand(T, C, dtype=dtype, seed=5), parameters(C, bias, dtype)
    assert_gradients(x, w, b, dtype, kernel.layer_norm_op, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("T", "C"), [(0, 31), (1, 1), (3, 31), (65, 384), (5, 1792)])
def test_gradients_of_both_results_equal_autograd_in_fp64(T, C, bias, dtype):
    x, residual = rand(T, C, dtype=dtype), rand(T, C, dtype=dtype, seed=3)
    if dtype == torch.float16:  # so that the sum is exact, and the same function is differentiated
        x, residual = (x * 64).round() / 64, (residual * 64).round() / 64
        assert torch.equal((x + residual).double(), x.double() + residual.double())
    grad, grad_total = rand(T, C, dtype=dtype, seed=5), rand(T, C, dtype=dtype, seed=6)
    w, b = parameters(C, bias, dtype)
    assert_gradients(x, w, b, dtype, kernel.add_layer_norm_op, grad, residual, grad_total)


@pytest.mark.parametrize("T", [7, 8, 9, 16, 23])
def test_every_row_counts_once_in_the_weights_gradients(T):
    """Whatever the number of programs and of rows each takes at a time: of ones, the bias's gradient counts rows."""
    x, (w, b) = rand(T, 31), parameters(31, True)
    _, grad_weight, grad_bias = kernel.layer_norm_backward(torch.ones_like(x), x, w, b)
    assert (grad_bias == T).all()
    normed = exact(x, torch.ones_like(w), None).sum(0)
    assert (grad_weight.double() - normed).abs().max() <= 1e-5


def test_gradients_in_bfloat16():
    """The rows' gradient to one unit in the last place (see the gpu tests), the weights' as well: sums are in fp32."""
    x, grad = rand(9, 96, dtype=torch.bfloat16), rand(9, 96, dtype=torch.bfloat16, seed=5)
    w, b = parameters(96, True, torch.bfloat16)
    truth = gradients(plain, [x.double(), w.double(), b.double()], (grad.double(),))
    for got, right in zip(kernel.layer_norm_backward(grad, x, w, b), truth, strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - right).abs() <= 2**-7 * right.abs() + 1e-5).all()


@pytest.mark.parametrize("used", ["y", "total"])
def test_one_of_the_two_results_may_go_unused(used):
    inputs = [rand(5, 31), rand(5, 31, seed=3), *parameters(31, True)]
    chosen = ("y", "total").index(used)
    grad = rand(5, 31, seed=5)
    got = gradients(lambda *leaves: kernel.add_layer_norm_op(*leaves, EPS)[chosen], inputs, (grad,))
    if used == "total":
        assert torch.equal(got[0], grad)
        assert torch.equal(got[1], grad)
        assert not got[2].any()
        assert not got[3].any()
    else:
        truth = gradients(lambda x, r, w, b: plain(x + r, w, b), [x.double() for x in inputs], (grad.double(),))
        assert all((a.double() - b).abs().max() <= 1e-5 for a, b in zip(got, truth, strict=True))


def test_gradients_that_are_expanded_views():
    x, (w, b) = rand(5, 31), parameters(31, True)
    got = gradients(
        lambda *leaves: kernel.layer_norm_op(*leaves, EPS).sum(), [x, w, b], (torch.ones((), device=DEVICE),)
    )
    expected = kernel.layer_norm_backward(torch.ones_like(x), x, w, b)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("C", [1, 31, 384, 1025])
@pytest.mark.parametrize("T", [1, 9])
def test_nothing_is_written_beside_the_results(monkeypatch, T, C):
    """Each result, and each buffer in between, lies in the middle of a poisoned one. Inputs stay as they were."""
    poison, margin, buffers = -12345.0, 8192, []

    def inside(fill):
        def allocate(shape, **options):
            n = torch.Size(shape).numel()
            buffers.append((torch.tensor(poison, **options).repeat(2 * margin + n), n))
            return buffers[-1][0][margin : margin + n].fill_(fill).view(shape)

        return allocate

    x, residual, grad, grad_total = (rand(T, C, seed=seed) for seed in range(4))
    w, b = parameters(C, True)
    inputs = [x, residual, grad, grad_total, w, b]
    kept = [tensor.clone() for tensor in inputs]
    monkeypatch.setattr(kernel.torch, "empty", inside(torch.nan))
    monkeypatch.setattr(kernel.torch, "zeros", inside(0.0))
    monkeypatch.setattr(
        kernel.torch, "zeros_like", lambda like: inside(0.0)(like.shape, dtype=like.dtype, device=DEVICE)
    )
    results = [
        kernel.layer_norm(x, w, b),
        *kernel.add_layer_norm(x, residual, w, b),
        *kernel.layer_norm_backward(grad, x, w, b, EPS, grad_total),
    ]
    monkeypatch.undo()
    assert len(buffers) == 6
    for buffer, n in buffers:
        assert (buffer[:margin] == poison).all()
        assert (buffer[margin + n :] == poison).all()
        assert not buffer.isnan().any()
    assert not any(result.isnan().any() for result in results)
    assert all(torch.equal(tensor, old) for tensor, old in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_pass_opcheck(bias):
    def arguments():
        return [None if x is None else x.requires_grad_() for x in (rand(5, 31), *parameters(31, bias))]

    x, w, b = arguments()
    torch.library.opcheck(kernel.layer_norm_op, (x, w, b, EPS))
    torch.library.opcheck(kernel.add_layer_norm_op, (x, rand(5, 31, seed=3).requires_grad_(), w, b, EPS))
    plain_arguments = [None if t is None else t.detach() for t in (rand(5, 31, seed=5), x, w, b)]
    torch.library.opcheck(kernel.layer_norm_backward_op, (*plain_arguments, EPS, None))
    torch.library.opcheck(kernel.layer_norm_backward_op, (*plain_arguments, EPS, rand(5, 31, seed=6)))


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_pass_through_torch_compile(bias):
    """Forward and backward, in one graph, with the same bits."""
    w, b = parameters(31, bias)

    def f(x, residual, weight, bias=None):
        y, total = kernel.add_layer_norm_op(x * 2, residual, weight, bias, EPS)
        return kernel.layer_norm_op(y + total, weight, bias, EPS), total

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for T in (5, 9):
        inputs = [rand(T, 31), rand(T, 31, seed=3), w, *([] if b is None else [b])]
        for one, other in zip(f(*inputs), compiled(*inputs), strict=True):
            assert torch.equal(one, other)
        grads = (rand(T, 31, seed=5), rand(T, 31, seed=6))
        for one, other in zip(gradients(f, inputs, grads), gradients(compiled, inputs, grads), strict=True):
            assert torch.equal(one, other)


X, W = torch.zeros(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(8), W), r"x is \(8,\)"),
        ((torch.zeros(2, 3, 8), W), r"x is \(2, 3, 8\)"),
        ((torch.zeros(4, 0), torch.ones(0)), r"x is \(4, 0\)"),
        ((X.double(), W), "x has dtype torch.float64; it must be float16, bfloat16 or float32"),
        ((X.long(), W), "x has dtype torch.int64"),
        ((torch.zeros(1, 8193), torch.ones(8193)), "x is 8193 wide; the kernel takes 8192"),
        ((torch.zeros(8, 4).T, W), "last dimension of x must be contiguous"),
        ((torch.zeros(4, 16)[:, ::2], W), "last dimension of x must be contiguous"),
        ((X, torch.ones(7)), r"weight is \(7,\); it must be \(8,\)"),
        ((X, torch.ones(1, 8)), r"weight is \(1, 8\)"),
        ((X, torch.ones(16)[::2]), r"weight is .*contiguous"),
        ((X, W, torch.ones(9)), r"bias is \(9,\); it must be \(8,\)"),
        ((X, W, torch.ones(16)[::2]), r"bias is .*contiguous"),
    ],
)
def test_layer_norm_refuses_what_it_can_not_do(arguments, message):
    arguments = [there(x) for x in arguments]
    with pytest.raises(ValueError, match=message):
        kernel.layer_norm(*arguments)
    x, *rest = arguments
    with pytest.raises(ValueError, match=message):
        kernel.add_layer_norm(x, x, *rest)
    with pytest.raises(ValueError, match=message):
        kernel.layer_norm_backward(x, x, *rest)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(5, 8), r"is \(5, 8\) .*x \(4, 8\)"),
        (torch.zeros(4, 9), r"is \(4, 9\)"),
        (torch.zeros(4, 8).half(), "float16.*of one dtype"),
        (torch.zeros(8, 4).T, "last dimension of .* must be contiguous"),
    ],
)
@pytest.mark.parametrize("name", ["residual", "grad", "grad_total"])
def test_the_other_inputs_must_be_like_x(name, other, message):
    x, w, other = X.to(DEVICE), W.to(DEVICE), other.to(DEVICE)
    call = {
        "residual": lambda: kernel.add_layer_norm(x, other, w),
        "grad": lambda: kernel.layer_norm_backward(other, x, w),
        "grad_total": lambda: kernel.layer_norm_backward(x, x, w, None, EPS, other),
    }[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert f"{name} " in str(error.value)


def test_too_many_elements_are_refused():
    with pytest.raises(ValueError, match=r"x spans 2097152 rows of 1024 elements, 2\^31 or more"):
        kernel.layer_norm(torch.empty(2**21, 1024, device="meta"), torch.empty(1024, device="meta"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("T", "C"), [(16_384, 384), (16_384, 768), (16_384, 1024), (16_384, 1792), (1, 768), (4_097, 31)]
)
def test_layer_norm_at_real_shapes(T, C, bias, dtype):
    """bge/GTE small and ModernBERT base and large, at the default budget of tokens: forward and backward."""
    x, residual = rand(T, C, dtype=dtype), rand(T, C, dtype=dtype, seed=3)
    w, b = parameters(C, bias, dtype)
    check(x, w, b, kernel.layer_norm(x, w, b))
    y, total = kernel.add_layer_norm(x, residual, w, b)
    assert torch.equal(total, x + residual)
    check(total, w, b, y)
    grad, grad_total = rand(T, C, dtype=dtype, seed=5), rand(T, C, dtype=dtype, seed=6)
    assert_gradients(x, w, b, dtype, kernel.layer_norm_op, grad)
    x, residual = ((t.clamp(-3, 3) * 16).round() / 16 for t in (x, residual))  # their sum is exact in bf16 too
    assert torch.equal((x + residual).double(), x.double() + residual.double())
    assert_gradients(x, w, b, dtype, kernel.add_layer_norm_op, grad, residual, grad_total)
