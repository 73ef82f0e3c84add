"""The pooling kernels against pooling.py: in Triton's interpreter anywhere, and compiled where there is a GPU."""

import os
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

import modernbert_lite as ml
from modernbert_lite.ops import pooling

triton = pytest.importorskip("triton")
# Decided when triton is imported, for the whole process: a GPU run sets TRITON_INTERPRET=0.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from modernbert_lite.kernels import pooling as kernel  # noqa: E402

EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 130, 193, 257)  # around the chunks of 64 tokens
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)


@pytest.fixture(autouse=True)
def plain_reference(monkeypatch):
    """pooling.py is the oracle here, so it must not be the kernel itself."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def there(x: torch.Tensor) -> torch.Tensor:
    """x on the device with its strides, where `to` would make it contiguous."""
    if x.is_meta:
        return x
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (numbers,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))).to(DEVICE, dtype)


def lengths_to_cu(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def reference(x, lengths) -> torch.Tensor:
    """pooling.py, whose mean is in fp32; in fp64 sequence by sequence where x is."""
    if x.dtype == torch.float64:
        pooled = torch.stack([part.sum(0) for part in x.split(lengths)])
        return pooled / torch.tensor(lengths, device=DEVICE).clamp(min=1)[:, None]
    return pooling.mean(x, ml.pack([[0] * n for n in lengths], DEVICE)).float()


def check(x, lengths, got=None) -> torch.Tensor:
    """Not more than twice as far from fp64 as the reference is."""
    got = kernel.pool(x, lengths_to_cu(lengths)) if got is None else got
    assert got.shape == (len(lengths), x.shape[1])
    assert got.dtype == torch.float32
    if got.numel():
        truth = reference(x.double(), lengths)
        allowed = (reference(x, lengths).double() - truth).abs().max()
        error = (got.double() - truth).abs().max()
        assert error <= 2 * allowed + 1e-6, f"{error:.3g}, the reference {allowed:.3g}"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pool_equals_the_reference(dtype):
    lengths = [65, 1, 130, 64, 2]
    x = rand(sum(lengths), 96, dtype=dtype)
    kept = x.clone()
    check(x, lengths)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("length", EDGES)
def test_lengths_around_the_chunks(length):
    """Alone, after another sequence, and before one."""
    for lengths in ([length], [3, length], [length, 3]):
        x = rand(sum(lengths), 31)
        check(x, lengths)


@pytest.mark.parametrize("start", [0, 1, 62, 63, 64, 65, 127])
def test_starts_around_the_chunks(start):
    lengths = [start, 64, 65, 1, 63, 129]
    check(rand(sum(lengths), 7), lengths)


@pytest.mark.parametrize("C", [1, 31, 384, 768, 1025, 1792])
def test_widths(C):
    x = rand(68, C)
    check(x, [65, 3])


@pytest.mark.parametrize(
    "lengths",
    [[0, 5, 70], [5, 0, 70], [5, 70, 0], [0, 0, 0, 64, 0, 0, 1, 0], [0], [0, 0, 0], [0] * 130 + [3] + [0] * 70],
)
def test_empty_sequences_give_zeros(lengths):
    """At the start, in the middle, at the end, nothing but empty ones, and more of them than a chunk has tokens."""
    got = check(rand(sum(lengths), 31), lengths)
    assert got.any(1).tolist() == [n > 0 for n in lengths]


def test_no_sequences_give_no_rows():
    for T in (0, 5):
        got = kernel.pool(rand(T, 31), torch.zeros(1, dtype=torch.int32, device=DEVICE))
        assert got.shape == (0, 31)
        assert got.dtype == torch.float32


def test_one_long_sequence_among_many_short_ones():
    lengths = [3, 1] * 12 + [700] + [2, 5, 1] * 8
    check(rand(sum(lengths), 31), lengths)


def test_a_padded_batch_pools_as_it_would_without_padding():
    """As a CUDA graph has it: more rows than tokens, whatever is in them, and cu_seqlens filled up with T."""
    lengths = [65, 3, 130]
    x = rand(198, 31)
    expected = kernel.pool(x, lengths_to_cu(lengths))
    padded = torch.cat([x, torch.full((130, 31), torch.nan, device=DEVICE)])
    got = kernel.pool(padded, lengths_to_cu([*lengths, *[0] * 9]), check=False)
    assert torch.equal(got[:3], expected)
    assert (got[3:] == 0).all()


def test_a_sequence_has_the_same_bits_in_any_batch():
    """Alone, permuted, and beside neighbours of other values, infinite ones and NaN."""
    lengths = [1, 65, 0, 64, 130, 2, 257]
    parts = [rand(n, 31, seed=i) for i, n in enumerate(lengths)]
    got = kernel.pool(torch.cat(parts), lengths_to_cu(lengths))
    order = [4, 2, 6, 0, 5, 1, 3]
    permuted = kernel.pool(torch.cat([parts[i] for i in order]), lengths_to_cu([lengths[i] for i in order]))
    assert torch.equal(permuted, got[order])
    for i, part in enumerate(parts):
        assert torch.equal(kernel.pool(part, lengths_to_cu(lengths[i : i + 1]))[0], got[i])
    for value in (1e6, torch.nan):
        others = [part if i % 2 else torch.full_like(part, value) for i, part in enumerate(parts)]
        beside = kernel.pool(torch.cat(others), lengths_to_cu(lengths))
        assert torch.equal(beside[1::2], got[1::2])


def test_mean_of_many_tokens_far_from_zero():
    """Sums of 64, not one running sum, whose error would grow with the length."""
    x = rand(2048, 4) + 100
    got = kernel.pool(x, lengths_to_cu([2048]))
    truth = x.double().mean(0)
    assert (got.double() - truth).abs().max() <= 100 * 2**-21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_may_be_strided(dtype):
    """NaN between the rows: nothing else is read. The poisoned rows before and after x stay unread too."""
    wide = torch.full((100, 41), torch.nan, device=DEVICE, dtype=dtype)
    wide[10:90, 5:36] = rand(80, 31, dtype=dtype)
    check(wide[10:90, 5:36], [65, 0, 15])


def test_no_cu_seqlens_leads_outside_of_x():
    """Rows of NaN before and after x, and a finite result, whatever the device's values are."""
    buffer = torch.full((4096, 8), torch.nan, device=DEVICE)
    buffer[2000:2080] = 1.0
    for values in (
        [0, 50, 300],  # beyond x
        [0, 2000, 4000],
        [0, 70, 20, 80],  # falling
        [30, 60, 80],  # not from 0
        [-300, 20, 80],  # before x
        [0, 20, -300, -200, 80],
        [*range(-500, -480), 5, 80],
        [2**31 - 1, 2**31 - 1, -(2**31), 2**31 - 1],  # last: what reads far outside ends the process
    ):
        cu_seqlens = torch.tensor(values, dtype=torch.int32, device=DEVICE)
        with pytest.raises(ValueError, match=r"cu_seqlens is .* it must start at 0, never decrease, end at T = 80"):
            kernel.pool(buffer[2000:2080], cu_seqlens)
        got = kernel.pool(buffer[2000:2080], cu_seqlens, check=False)
        assert got.shape == (len(values) - 1, 8)
        assert not got.isnan().any(), values


@pytest.mark.parametrize("C", [1, 31, 384])
def test_nothing_is_written_beside_the_results(monkeypatch, C):
    """The result, and the sums in between, lie in the middle of poisoned buffers. No part of a result is left out."""
    poison, margin, buffers = -12345.0, 4096, []

    def inside(shape, **options):
        n = torch.Size(shape).numel()
        buffers.append((torch.tensor(poison, **options).repeat(2 * margin + n), n))
        return buffers[-1][0][margin : margin + n].fill_(torch.nan).view(shape)

    lengths = [65, 0, 1, 130, 0]
    x, cu_seqlens = rand(sum(lengths), C), lengths_to_cu(lengths)
    kept = x.clone(), cu_seqlens.clone()
    monkeypatch.setattr(kernel.torch, "empty", inside)
    got = kernel.pool(x, cu_seqlens)
    monkeypatch.undo()
    check(x, lengths, got)
    assert len(buffers) == 2
    for buffer, n in buffers:
        assert (buffer[:margin] == poison).all()
        assert (buffer[margin + n :] == poison).all()
    assert torch.equal(x, kept[0])
    assert torch.equal(cu_seqlens, kept[1])


def test_pool_in_bfloat16():
    """The sums are in fp32, so that only the values are bf16."""
    x = rand(70, 31, dtype=torch.bfloat16)
    check(x, [65, 5])


X, CU = torch.zeros(4, 8), torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "cu_seqlens", "message"),
    [
        (torch.zeros(8), CU, r"x is \(8,\)"),
        (torch.zeros(2, 4, 8), CU, r"x is \(2, 4, 8\)"),
        (torch.zeros(4, 0), CU, r"x is \(4, 0\)"),
        (torch.zeros(4, 8193), CU, r"x is \(4, 8193\).*8192"),
        (X.double(), CU, "x has dtype torch.float64; it must be"),
        (X.long(), CU, "x has dtype torch.int64"),
        (torch.zeros(8, 4).T, CU, "last dimension of x must be contiguous"),
        (X, CU.long(), "cu_seqlens is .*int64; it must be .*int32"),
        (X, CU[None], r"cu_seqlens is \(1, 2\)"),
        (X, CU[:0], r"cu_seqlens is \(0,\)"),
    ],
)
def test_pool_refuses_what_it_can_not_do(x, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        kernel.pool(there(x), there(cu_seqlens))


def test_strided_cu_seqlens_are_refused():
    """Every second value of a longer tensor: the kernel would read the values between them."""
    wide = torch.tensor([0, 99, 3, 99, 5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"cu_seqlens .*contiguous"):
        kernel.pool(rand(5, 8), wide[::2])


def test_devices_are_compared():
    with pytest.raises(ValueError, match=r"cu_seqlens is on meta, x on .*one device"):
        kernel.pool(rand(5, 8), lengths_to_cu([5]).to("meta"))


def test_too_many_elements_are_refused():
    with pytest.raises(ValueError, match=r"x spans 2097152 rows of 1024 elements, 2\^31 or more"):
        kernel.pool(torch.empty(2**21, 1024, device="meta"), CU.to("meta"))


def test_the_operator_passes_opcheck():
    x, cu_seqlens = rand(70, 31), lengths_to_cu([65, 0, 5])
    torch.library.opcheck(kernel.pool_op, (x, cu_seqlens))


def test_the_operator_passes_through_torch_compile():
    def f(x, cu_seqlens):
        return F.normalize(kernel.pool_op(x * 2, cu_seqlens), dim=-1)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for lengths in ([65, 5], [3, 0, 8]):
        x, cu_seqlens = rand(sum(lengths), 31), lengths_to_cu(lengths)
        assert torch.equal(f(x, cu_seqlens), compiled(x, cu_seqlens))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("C", [384, 768, 1024, 1792])
@pytest.mark.parametrize(
    "lengths",
    [[512] * 32, [16_384], [8192, *[16] * 256, *[64] * 64], [*EDGES] * 8, [1] * 1000],
    ids=["32x512", "1x16384", "one-long", "edges", "1000x1"],
)
def test_pool_at_real_shapes(lengths, C, dtype):
    """The same bits alone as in the batch."""
    x = rand(sum(lengths), C, dtype=dtype)
    got = check(x, lengths)
    i = len(lengths) // 2
    alone = x.split(lengths)[i]
    assert torch.equal(kernel.pool(alone, lengths_to_cu([lengths[i]]))[0], got[i])
