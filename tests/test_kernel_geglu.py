"""Triton kernels against the torch reference: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import os

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import ops

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from modernbert_lite.kernels import geglu as kernel  # noqa: E402


def halves(T: int, N: int, dtype: torch.dtype, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(activated, gate): views of one (T, 2N), ModernBERT's order (first half activated) or GTE's (second)."""
    wide = (torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(T + N)) * 2).to(DEVICE, dtype)
    first, second = wide.chunk(2, -1)
    return (first, second) if order == "first" else (second, first)


def exact(activated: torch.Tensor, gate: torch.Tensor, act: str) -> torch.Tensor:
    return ops.activation(act)(activated.double()) * gate.double()


def assert_as_good_as_torch(got: torch.Tensor, activated: torch.Tensor, gate: torch.Tensor, act: str) -> None:
    """The error is at most twice that of plain torch in the same dtype."""
    truth = exact(activated, gate, act)
    assert got.shape == activated.shape
    assert got.dtype == activated.dtype
    if got.numel():
        plain = (ops.activation(act)(activated) * gate).double()
        assert (got.double() - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


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
        (torch.zeros(2, 3), torch.zeros(2, 4), "gelu", r"activated is \(2, 3\).*gate \(2, 4\).*must be \(T, N\)"),
        (torch.zeros(6), torch.zeros(6), "gelu", r"must be \(T, N\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "gelu", r"must be \(T, N\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), "gelu", "float16.*of one dtype"),
        (torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), "gelu", "dtype is torch.float64; it must be float32"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), "gelu", "dtype is torch.int64"),
        (torch.zeros(3, 2).T, torch.zeros(2, 3), "gelu", "last dimension .* must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 6)[:, ::2], "gelu", "last dimension .* must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "relu", "act is 'relu'; it must be 'gelu' or 'silu'"),
    ],
)
def test_geglu_refuses_what_it_can_not_do(activated, gate, act, message):
    with pytest.raises(ValueError, match=message):
        kernel.geglu(activated.to(DEVICE), gate.to(DEVICE), act)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_model_takes_the_kernel_when_asked(make_checkpoint, monkeypatch, act):
    folder, _ = make_checkpoint(hidden_activation=act, num_hidden_layers=3)
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    batch = ml.pack([[50281, *range(100, 100 + n), 50282] for n in (1, 5, 70)], DEVICE)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    expected = model(batch)

    assert ops._triton_works(torch.device(DEVICE))  # the probe has its own launch, once
    calls = []
    launch = kernel.geglu

    def counted(activated, gate, act="gelu"):
        calls.append(act)
        return launch(activated, gate, act)

    monkeypatch.setattr(kernel, "geglu", counted)
    assert torch.equal(model(batch), expected)
    assert calls == []
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    got = model(batch)
    assert calls == [act] * 3
    assert (got - expected).abs().max() <= 2e-5


def test_an_activation_without_a_kernel_takes_the_reference(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    activated, gate = halves(3, 8, torch.float32, "first")
    monkeypatch.setattr(kernel, "geglu", lambda *_: pytest.fail("no kernel for relu"))
    assert torch.equal(ops.geglu(activated, gate, "relu"), activated.relu() * gate)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0")
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "N"), [(16_384, 1152), (16_384, 2624), (2_048, 3072), (1, 1152), (4_097, 1151)])
def test_geglu_at_real_shapes(T, N, dtype, order, act):
    """ModernBERT base (1152) and large (2624), GTE v1.5 base (3072), at the default budget of tokens."""
    activated, gate = halves(T, N, dtype, order)
    assert_as_good_as_torch(kernel.geglu(activated, gate, act), activated, gate, act)
