"""What RoPE's launchers refuse before anything runs."""

from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from kernel_rope_cases import DEVICE, torch_backend  # noqa: F401
from torch import Tensor

from modernbert_lite.kernels import rope as kernel

triton = pytest.importorskip("triton")


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def of_shape(*shape: int, strides: tuple[int, ...] | None = None, dtype: type = np.float32) -> Tensor:
    """A tensor that lies about its memory, of which it has one element: only for what is refused before a launch."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    memory = np.zeros(1, dtype)
    return torch.from_numpy(np.lib.stride_tricks.as_strided(memory, shape, [n * memory.itemsize for n in strides]))


QKV, TABLE = torch.zeros(5, 6, 8), torch.ones(7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv is \(6, 8\) and heads 4; it must be \(T, N, D\), with at most N heads"),
        ({"qkv": QKV.flatten(1)}, r"qkv is \(5, 48\)"),
        ({"qkv": QKV[None]}, r"qkv is \(1, 5, 6, 8\)"),
        ({"qkv": QKV[:, :0]}, r"qkv is \(5, 0, 8\)"),
        ({"qkv": QKV.unflatten(1, (3, 2))}, r"qkv is \(5, 3, 2, 8\)"),
        ({"heads": 7}, "and heads 7"),
        ({"heads": -1}, "and heads -1"),
        ({"qkv": QKV.double()}, "qkv has dtype torch.float64; it must be float16, bfloat16 or float32"),
        ({"qkv": QKV.int()}, "qkv has dtype torch.int32"),
        ({"qkv": QKV[..., :7]}, "qkv has head_dim 7; it must be even"),
        ({"qkv": QKV[..., :0]}, "qkv has head_dim 0"),
        ({"qkv": torch.zeros(5, 6, 16)[..., ::2]}, "the last dimension of qkv must be contiguous"),
        ({"qkv": torch.zeros(5, 8, 6).transpose(1, 2)}, "the last dimension of qkv must be contiguous"),
        ({"cos": torch.ones(7)}, r"cos is \(7,\).*it must be \(P, 4\) float32, contiguous"),
        ({"cos": torch.ones(7, 8)}, r"cos is \(7, 8\).*\(P, 4\)"),
        ({"cos": TABLE.half()}, "cos is .*torch.float16; .*float32"),
        ({"cos": TABLE.double()}, "cos is .*torch.float64; .*float32"),
        ({"cos": torch.ones(7, 8)[:, :4]}, "cos is .*contiguous"),
        ({"cos": torch.ones(1, 4).expand(7, 4)}, "cos is .*contiguous"),
        ({"sin": torch.ones(7, 1, 4)}, r"sin is \(7, 1, 4\).*it must be \(P, 4\) float32, contiguous"),
        ({"sin": torch.ones(7, 3)}, r"sin is \(7, 3\).*\(P, 4\)"),
        ({"sin": TABLE.bfloat16()}, "sin is .*torch.bfloat16; .*float32"),
        ({"sin": torch.ones(4, 7).T}, "sin is .*contiguous"),
        ({"sin": torch.ones(8, 4)}, "cos has 7 rows and sin 8"),
        ({"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, "cos has 4 rows and sin 4; T is 5"),
        (
            {"cos": torch.ones(0, 4), "sin": torch.ones(0, 4), "position_ids": torch.zeros(5, dtype=torch.int32)},
            "cos has 0 rows",
        ),
        (
            {"position_ids": torch.zeros(4, dtype=torch.int32)},
            r"position_ids is \(4,\) torch.int32; it must be \(5,\) int32 or int64, contiguous",
        ),
        ({"position_ids": torch.zeros(1, 5, dtype=torch.int32)}, r"position_ids is \(1, 5\)"),
        ({"position_ids": torch.zeros(5)}, r"position_ids is \(5,\) torch.float32; .*int32 or int64"),
        ({"position_ids": torch.zeros(5, dtype=torch.int16)}, r"position_ids is \(5,\) torch.int16"),
        ({"position_ids": torch.zeros(5, dtype=torch.bool)}, r"position_ids is \(5,\) torch.bool"),
        ({"position_ids": torch.zeros(10, dtype=torch.int32)[::2]}, "position_ids .*contiguous"),
        ({"position_ids": torch.zeros(1, dtype=torch.int64).expand(5)}, "position_ids .*contiguous"),
    ],
)
def test_rope_refuses_what_it_can_not_do(monkeypatch, arguments, message):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    given = {"qkv": QKV, "cos": TABLE, "sin": TABLE, "position_ids": None, "heads": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        kernel.rope_(**{name: there(x) if isinstance(x, Tensor) else x for name, x in given.items()})
    assert not launch.mock_calls


@pytest.mark.parametrize(
    ("shape", "strides", "heads"),
    [
        ((932_068, 36, 64), None, 24),  # base's first length beyond
        ((2**20 + 1, 3, 4), (2**11, 4, 1), 2),
        ((2**10 + 1, 6, 4), (2**21, 4, 1), 4),
        # Rows are near to each other, the last head is not.
        ((3, 9, 4), (4, 2**30, 1), 2),
        ((2, 1025, 4), (4, 2**21, 1), 1024),
    ],
)
def test_a_projection_that_spans_too_much_is_refused(monkeypatch, shape, strides, heads):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    qkv = of_shape(*shape, strides=strides, dtype=np.float16)
    table = of_shape(shape[0], shape[2] // 2)
    with pytest.raises(ValueError, match=r"qkv .*2\^31"):
        kernel.rope_(qkv, table, table, heads=heads)
    assert not launch.mock_calls


def test_the_longest_projection_is_not_refused(monkeypatch):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    table = of_shape(932_067, 32)
    kernel.rope_(of_shape(932_067, 36, 64, dtype=np.float16), table, table, heads=24)
    assert launch.__getitem__.call_args.args == ((-(-932_067 // kernel.BLOCK_T) * -(-24 // kernel.BLOCK_H), 1, 1),)


def test_tables_that_span_too_much_are_refused(monkeypatch):
    launch = MagicMock()
    monkeypatch.setattr(kernel, "_rope_kernel", launch)
    table = of_shape(2**29, 4)
    with pytest.raises(ValueError, match=r"cos .*2\^31"):
        kernel.rope_(torch.zeros(5, 6, 8), table, table, heads=4)
    assert not launch.mock_calls
