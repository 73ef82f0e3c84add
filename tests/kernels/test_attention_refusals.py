"""What attention's launchers refuse before anything runs."""

from unittest import mock

import pytest
import torch
from kernel_attention_cases import DEVICE, HALF, ends, randn, reference_is_torch  # noqa: F401

from modernbert_lite.kernels import attention as kernel

triton = pytest.importorskip("triton")

# Numpy, on which the interpreter runs, warns of what becomes of the NaN and infinities that tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@pytest.fixture
def no_launch(monkeypatch):
    """What is refused is refused before the kernel could meet it."""
    stub = mock.MagicMock()
    stub.__getitem__.side_effect = AssertionError("the kernel was launched")
    monkeypatch.setattr(kernel, "_attention_kernel", stub)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (ints(1, 10), r"cu_seqlens is \[1, 10\].*must start at 0, never decrease, end at T = 10"),
        (ints(-1, 10), "cu_seqlens .* must start at 0"),
        (ints(0, 7, 5, 10), r"cu_seqlens is \[0, 7, 5, 10\].*never decrease"),
        (ints(0, 11, 10), "cu_seqlens .*never decrease"),
        (ints(0, 5, 9), "cu_seqlens .* end at T = 10"),
        (ints(0, 5, 11), "cu_seqlens .* end at T = 10"),
        (ints(0, 10, dtype=torch.int64), r"cu_seqlens is \(2,\) torch.int64; it must be \(B \+ 1,\) int32"),
        (ints(0, 10).float(), "cu_seqlens is .*float32; it must be"),
        (ints(0, 10)[None], r"cu_seqlens is \(1, 2\) torch.int32; it must be"),
        (ints(10)[0], r"cu_seqlens is \(\) torch.int32"),
        (ints(0), r"cu_seqlens is \(1,\) torch.int32; .* B at least 1"),
        (ints(), r"cu_seqlens is \(0,\) torch.int32"),
    ],
)
def test_bad_cu_seqlens_are_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        kernel.attention(randn(10, 3, 1, 32), cu_seqlens)
    with pytest.raises(ValueError, match=message):
        kernel.check_cu_seqlens(cu_seqlens, 10)


def test_good_cu_seqlens_are_brought_to_the_host():
    assert kernel.check_cu_seqlens(ints(0, 3, 3, 10), 10) == [0, 3, 3, 10]
    assert kernel.check_cu_seqlens(ints(0, 0), 0) == [0, 0]


def huge(*shape: int, stride: int) -> torch.Tensor:
    """`stride` elements from row to row, and no memory behind it."""
    strides = [stride, *torch.empty(shape[1:], device="meta").stride()]
    return torch.empty_strided(shape, strides, dtype=HALF, device="meta")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(10, 3, 32), r"qkv is \(10, 3, 32\); it must be \(T, 3, H, D\)"),
        (torch.zeros(2, 5, 3, 1, 32), r"qkv is .*must be \(T, 3, H, D\)"),
        (torch.zeros(10, 2, 1, 32), r"qkv is \(10, 2, 1, 32\); it must be \(T, 3, H, D\)"),
        (torch.zeros(10, 3, 1, 48), "qkv has head_dim 48; it must be one of 32, 64, 128"),
        (torch.zeros(10, 3, 1, 256), "qkv has head_dim 256"),
        (torch.zeros(10, 3, 1, 0), "qkv has head_dim 0"),
        (torch.zeros(10, 3, 1, 32).double(), "qkv has dtype torch.float64; it must be float16, bfloat16 or float32"),
        (torch.zeros(10, 3, 1, 32).int(), "qkv has dtype torch.int32"),
        (torch.zeros(10, 3, 1, 32).to(torch.complex64), "qkv has dtype torch.complex64"),
        (torch.zeros(10, 3, 1, 64)[..., ::2], "the last dimension of qkv must be contiguous"),
        (torch.zeros(10, 3, 32, 2).transpose(2, 3), "the last dimension of qkv must be contiguous"),
        (huge(10, 3, 1, 32, stride=2**31 // 10 + 1), r"qkv spans 10 rows of 214748365 elements, 2\^31 or more"),
        (huge(10, 3, 1, 32, stride=2**40), r"qkv spans 10 rows"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_bad_qkv_is_refused(qkv, message, listed):
    table = {"tile_table": torch.zeros(1, 4, dtype=torch.int32, device=DEVICE), "block": 64} if listed else {}
    with pytest.raises(ValueError, match=message):
        kernel.attention(there(qkv), ends([10]), **table)


@pytest.mark.usefixtures("no_launch")
def test_too_many_tokens_are_refused():
    T = 2**31 // 96 + 1
    table = torch.zeros(1, 4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"qkv spans .*2\^31 or more; split the batch"):
        kernel.attention(huge(T, 3, 1, 32, stride=96), ends([T]), tile_table=table, block=64)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(3, 3, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, 1, 4, dtype=torch.int32),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(3, 4),
        torch.zeros(4, 3, dtype=torch.int32).T,
        torch.zeros(3, 8, dtype=torch.int32)[:, :4],
    ],
)
def test_a_bad_tile_table_is_refused(table):
    with pytest.raises(ValueError, match=r"tile_table is .*; it must be what `tiles` gives"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), tile_table=there(table), block=32)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("block", [48, -1, -64, 1, 2**20])
def test_a_bad_block_is_refused(block, listed):
    table = {"tile_table": kernel.tiles([10], 64).to(DEVICE)} if listed else {}
    with pytest.raises(ValueError, match=f"block is {block}"):
        kernel.attention(randn(10, 3, 1, 32), ends([10]), block=block, **table)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("q", "kv", "cu_seqlens", "message"),
    [
        (
            torch.zeros(2, 1, 32),
            torch.zeros(9, 3, 1, 32),
            ints(0, 4, 9),
            r"q is .*kv .*must be \(B, H, D\) and \(T, 2,",
        ),
        (torch.zeros(2, 1, 32), torch.zeros(9, 3, 32), ints(0, 4, 9), r"kv \(9, 3, 32\)"),
        (torch.zeros(3, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(3, 1, 32\)"),
        (torch.zeros(2, 3, 32), torch.zeros(9, 2, 2, 32), ints(0, 4, 9), r"q is \(2, 3, 32\)"),
        (torch.zeros(2, 1, 64), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(2, 1, 64\)"),
        (torch.zeros(2, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), r"q is \(2, 32\)"),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9).long(), "cu_seqlens is torch.int64"),
        (torch.zeros(2, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 4, 9).float(), "cu_seqlens is torch.float32"),
        (torch.zeros(1, 1, 32), torch.zeros(9, 2, 1, 32), ints(0, 9, 0, 9).view(2, 2), "cu_seqlens"),
        (torch.zeros(1, 1, 32), torch.zeros(9, 2, 1, 32), ints(9)[0], "cu_seqlens"),
        (torch.zeros(2, 1, 32).half(), torch.zeros(9, 2, 1, 32), ints(0, 4, 9), "q torch.float16, kv torch.float32"),
        (torch.zeros(2, 1, 32).long(), torch.zeros(9, 2, 1, 32).long(), ints(0, 4, 9), "dtype torch.int64"),
        (torch.zeros(2, 1, 32).double(), torch.zeros(9, 2, 1, 32).double(), ints(0, 4, 9), "dtype torch.float64"),
        (torch.zeros(2, 1, 48), torch.zeros(9, 2, 1, 48), ints(0, 4, 9), "head_dim 48"),
        (
            torch.zeros(2, 1, 64)[..., ::2],
            torch.zeros(9, 2, 1, 32),
            ints(0, 4, 9),
            "last dimension of q must be contiguous",
        ),
        (
            torch.zeros(2, 1, 32),
            torch.zeros(9, 2, 1, 64)[..., ::2],
            ints(0, 4, 9),
            "last dimension of kv must be contiguous",
        ),
        (torch.zeros(2, 1, 32).half(), huge(9, 2, 1, 32, stride=2**28), ints(0, 4, 9), r"2\^31 or more"),
    ],
)
def test_row_attention_refuses_what_it_can_not_do(q, kv, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        kernel.row_attention(there(q), there(kv), cu_seqlens)


# ---- operators -----------------------------------------------------------------------------------------------------
