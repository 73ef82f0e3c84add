"""Rows in 8-bit floats: the kernel beside plain torch."""

import os

import pytest
import torch

pytest.importorskip("triton")

from modernbert_lite.kernels.float8 import quantize
from modernbert_lite.ops.linear import has_float8
from modernbert_lite.ops.reference import to_float8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


def e4m3_rows(T: int, C: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose scaled numbers e4m3 has, so that nothing is rounded. (Triton 3.9's interpreter rounds 7.9 down to 4.)
    The largest is 448 times a power of two."""
    generator = torch.Generator().manual_seed(T * C)
    known = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    x = known[torch.randint(0, 127, (T, C), generator=generator)]
    x *= torch.randint(0, 2, (T, C), generator=generator) * 2 - 1
    x[:, C // 2] = 448
    return (x * 2.0 ** torch.randint(-6, 6, (T, 1), generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "C"), [(1, 1), (5, 37), (3, 768), (9, 1152), (2, 1000), (0, 16), (1, 8192)])
def test_it_gives_the_reference_s_numbers_and_scales(T, C, dtype):
    x = e4m3_rows(T, C, dtype)
    (numbers, scale), (expected, scales) = quantize(x), to_float8.reference(x)
    assert (numbers.dtype, numbers.shape, scale.shape) == (torch.float8_e4m3fn, (T, C), (T, 1))
    assert torch.equal(numbers.float(), expected.float())
    assert torch.equal(scale, scales)
    assert torch.equal(numbers.float() * scale, x.float())


def test_rows_may_lie_apart_and_a_row_of_zeros_stays_one():
    wide = e4m3_rows(6, 96, torch.bfloat16)
    wide[2, 32:64] = 0
    numbers, scale = quantize(wide[:, 32:64])
    assert torch.allclose(numbers.float() * scale, wide[:, 32:64].float(), rtol=2**-4)
    assert not numbers[2].float().any()
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_a_number_that_is_not_finite_is_not_hidden():
    x = e4m3_rows(4, 40, torch.bfloat16)
    x[1, 3], x[2, 39] = float("nan"), float("-inf")
    numbers, scale = quantize(x)
    finite = (numbers.float() * scale).isfinite()
    assert finite[[0, 3]].all()
    assert not finite[[1, 2]].any(1).any()
    assert scale[[0, 3]].equal(to_float8.reference(x[[0, 3]])[1])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device and TRITON_INTERPRET=0")
@pytest.mark.parametrize("C", [31, 768, 1792])
def test_a_card_rounds_to_the_nearest(C):
    """The reciprocal of a scale may differ in its last place, and move a few numbers that lie between two."""
    if not has_float8(torch.device("cuda")):
        pytest.skip("this card has no 8-bit floats")
    x = torch.randn(1000, C, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    (numbers, scale), (expected, scales) = quantize(x), to_float8.reference(x)
    assert torch.allclose(scale, scales, rtol=1e-6)
    other = numbers.float() != expected.float()
    assert other.float().mean() < 1e-3
    assert ((numbers.float() - expected.float()).abs() <= expected.float().abs() * 0.126 + 2**-9).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "it must be \\(T, C\\)"),
        (torch.zeros(2, 8193), "C at most 8192"),
        (torch.zeros(2, 0), "it must be"),
        (torch.zeros(4, 3).t(), "must be contiguous"),
        (torch.zeros(2, 3, dtype=torch.int32), "it must be float16, bfloat16 or float32"),
    ],
)
def test_what_it_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        quantize(x.to(DEVICE))


def test_it_has_no_gradient_and_says_so():
    with pytest.raises(ValueError, match=r"which this function has none of: use no_grad$"):
        quantize(torch.ones(2, 3, device=DEVICE, requires_grad=True))
