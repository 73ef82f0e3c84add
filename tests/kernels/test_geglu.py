"""The GeGLU kernel against the torch reference: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import numpy as np
import pytest
import torch
from kernel_geglu_cases import DEVICE, assert_as_good_as_torch, exact, halves, launches, whole  # noqa: F401
from torch import Tensor

from modernbert_lite.kernels import geglu as kernel

triton = pytest.importorskip("triton")


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


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
            "activated has dtype torch.float64; it must be float16, bfloat16 or float32",
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
    grid = (-(-T // kernel.BLOCK_T) * -(-1152 // kernel.BLOCK_N), 1, 1)
    assert [call.args for call in launches.__getitem__.call_args_list] == [(grid,)] * 2


# The backward pass
