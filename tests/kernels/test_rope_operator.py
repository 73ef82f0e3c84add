"""RoPE's gradient and its torch.library operators, and real shapes on a card."""

import pytest
import torch
from kernel_rope_cases import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    assert_as_good_as_torch,
    assert_rotates_as_the_reference,
    exact,
    inside_a_buffer,
    places,
    projection,
    rope_,
    rope_op,
    same_bits,
    tables,
    torch_backend,
    turned,
)
from torch import Tensor
from torch.library import opcheck

from modernbert_lite.kernels import rope as kernel

triton = pytest.importorskip("triton")


needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)


def gradient(of, qkv: Tensor, weight: Tensor) -> Tensor:
    """Of sum(weight * of(qkv)) for qkv."""
    leaf = qkv.clone().requires_grad_()
    (of(leaf) * weight).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("parts", "positions"), [(3, None), (3, torch.int32), (3, torch.int64), (2, torch.int32), (1, None)]
)
def test_the_gradient_equals_autograd_of_the_reference(parts, positions, inverse, dtype):
    T, H, D = 9, 3, 32
    qkv, weight, (cos, sin) = projection(T, H, D, dtype), projection(T, H, D, dtype, seed=1), tables(20, D)
    qkv, weight = qkv[:, :parts], weight[:, :parts]
    position_ids = None if positions is None else places(T, 20, positions)
    rows = torch.arange(T, device=DEVICE) if position_ids is None else position_ids.long()
    c, s = cos[rows], sin[rows] * (-1 if inverse else 1)
    kept = qkv.clone()
    out = rope_op(qkv, cos, sin, position_ids, inverse)
    assert torch.equal(qkv, kept)
    assert_as_good_as_torch(out, turned(qkv, c, s), exact(qkv, c, s))
    got = gradient(lambda x: rope_op(x, cos, sin, position_ids, inverse), qkv, weight)
    truth = gradient(lambda x: exact(x, c, s), qkv.double(), weight.double())
    assert_as_good_as_torch(got, gradient(lambda x: turned(x, c, s), qkv, weight), truth)
    if parts > 1:
        assert same_bits(got[:, -1], weight[:, -1])


def test_a_second_backward_gives_the_same_gradient():
    qkv, weight, (cos, sin) = projection(9, 3, 6).requires_grad_(), projection(9, 3, 6, seed=1), tables(20, 6)
    position_ids = places(9, 20)
    kept = weight.clone()
    out = rope_op(qkv, cos, sin, position_ids, False)
    (first,) = torch.autograd.grad(out, qkv, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out, qkv, weight)
    assert same_bits(first, second)
    assert same_bits(weight, kept)


def test_the_gradient_of_the_gradient():
    """A rotation is linear: the gradient of <gradient for weight, direction> for weight is the direction, rotated."""
    qkv, weight, direction = (projection(9, 3, 6, seed=i) for i in range(3))
    qkv.requires_grad_(), weight.requires_grad_()
    cos, sin = tables(9, 6)
    (first,) = torch.autograd.grad(rope_op(qkv, cos, sin, None, False), qkv, grad_outputs=weight, create_graph=True)
    (second,) = torch.autograd.grad(first, weight, direction)
    assert same_bits(second, rope_op(direction, cos, sin, None, False))


def test_a_gradient_of_stride_0():
    """As sum() hands it back."""
    qkv, (cos, sin) = projection(9, 3, 6).requires_grad_(), tables(9, 6)
    rope_op(qkv, cos, sin, None, False).sum().backward()
    truth = exact(torch.ones_like(qkv), cos, -sin)
    assert (qkv.grad.double() - truth).abs().max() <= 1e-6


def test_the_tables_get_no_gradient():
    qkv, (cos, sin) = projection(9, 3, 6).requires_grad_(), tables(9, 6)
    rope_op(qkv, cos.requires_grad_(), sin, None, False).sum().backward()
    assert cos.grad is None


@pytest.mark.parametrize("layout", ["rows wider than the projection", "heads first", "wide heads"])
def test_the_operators_take_views(layout):
    buffer, view = inside_a_buffer(layout, 9, 3, 6)
    qkv, (cos, sin), position_ids = projection(9, 3, 6), tables(20, 6), places(9, 20)
    view.copy_(qkv)
    kept = buffer.clone()
    expected = rope_(qkv, cos, sin, position_ids)
    got = rope_op(view, cos, sin, position_ids, False)
    assert got.is_contiguous()
    assert same_bits(got, expected)
    assert same_bits(buffer, kept)


def operands(layout: str, positions: torch.dtype | None, dtype: torch.dtype = torch.float32) -> tuple:
    qkv = projection(9, 3, 6, dtype)
    if layout != "contiguous":
        view = inside_a_buffer(layout, 9, 3, 6)[1].to(dtype)
        qkv = view.copy_(qkv)
    return qkv.flatten(1, 2), *tables(20, 6), None if positions is None else places(9, 20, positions)


@pytest.mark.parametrize("layout", ["contiguous", "rows wider than the projection", "wide heads"])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
def test_opcheck(positions, layout):
    qkv, *rest = operands(layout, positions)
    for inverse in (False, True):
        opcheck(kernel.rope_op, (qkv, *rest, inverse, 6))
        opcheck(kernel.rope_op, (qkv.detach().requires_grad_(), *rest, inverse, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_in_half_precision(dtype):
    qkv, *rest = operands("contiguous", torch.int32, dtype)
    opcheck(kernel.rope_op, (qkv, *rest, False, 6))


def test_opcheck_of_no_tokens():
    qkv, (cos, sin) = projection(0, 3, 6).flatten(1, 2), tables(4, 6)
    opcheck(kernel.rope_op, (qkv.requires_grad_(), cos, sin, None, False, 6))


@pytest.fixture
def compiled():
    """Compiles a function once, for any number of tokens: the second call is with another one and must not compile."""

    def run(f, calls):
        torch.compiler.reset()
        fast = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
        for i, arguments in enumerate(calls):
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                yield fast(*arguments), f(*arguments)

    yield run
    torch.compiler.reset()


@pytest.mark.parametrize("positions", [None, torch.int32])
def test_compiled_out_of_place_with_its_gradient(compiled, positions):
    cos, sin = tables(40, 6)

    def f(qkv, position_ids, inverse):
        return rope_op(qkv * 2, cos, sin, position_ids, inverse).square()

    for inverse in (False, True):
        calls = [
            (projection(T, 3, 6).requires_grad_(), None if positions is None else places(T, 40, positions), inverse)
            for T in (9, 17, 3)
        ]
        for (qkv, *_), (got, expected) in zip(calls, compiled(f, calls), strict=True):
            assert same_bits(got, expected)
            weight = torch.randn_like(got)
            (got_grad,) = torch.autograd.grad(got, qkv, weight)
            (expected_grad,) = torch.autograd.grad(expected, qkv, weight)
            assert same_bits(got_grad, expected_grad)


def test_exported():
    class Rotate(torch.nn.Module):
        def forward(self, qkv, cos, sin, position_ids):
            return rope_op(qkv, cos, sin, position_ids, False), rope_op(qkv, cos, sin, position_ids, True)

    T = torch.export.Dim("T", min=2, max=4096)
    (cos, sin), example = tables(40, 6), (projection(9, 3, 6), places(9, 40))
    exported = torch.export.export(
        Rotate(), (example[0], cos, sin, example[1]), dynamic_shapes=({0: T}, None, None, {0: T})
    )
    for T in (9, 17):
        arguments = projection(T, 3, 6), cos, sin, places(T, 40)
        for got, expected in zip(exported.module()(*arguments), Rotate()(*arguments), strict=True):
            assert same_bits(got, expected)


# Real shapes, on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("T", "H", "D"),
    [
        (16_384, 12, 64),
        (16_384, 16, 64),
        (4_097, 12, 64),
        (1, 12, 64),
        (8_191, 8, 128),
        (8_193, 12, 32),
        (1_001, 3, 80),
    ],
)
def test_rope_at_real_shapes(T, H, D, positions, dtype):
    """ModernBERT base (12 heads of 64) and large (16) at the default budget of tokens, and odd ones."""
    assert_rotates_as_the_reference(projection(T, H, D, dtype), positions)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H", [12, 16])
def test_the_gradient_at_real_shapes(H, dtype):
    T, D = 16_384, 64
    qkv, weight, (cos, sin) = projection(T, H, D, dtype), projection(T, H, D, dtype, seed=1), tables(8192, D)
    position_ids = places(T, 8192)
    c, s = cos[position_ids.long()], sin[position_ids.long()]
    got = gradient(lambda x: rope_op(x, cos, sin, position_ids, False), qkv, weight)
    truth = gradient(lambda x: exact(x, c, s), qkv.double(), weight.double())
    assert_as_good_as_torch(got, gradient(lambda x: turned(x, c, s), qkv, weight), truth)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_inverse_and_the_order_of_tokens_at_real_shapes(dtype):
    T, H, D = 16_384, 12, 64
    qkv, (cos, sin), position_ids = projection(T, H, D, dtype), tables(8192, D), places(T, 8192)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    c, s = cos[position_ids.long()], sin[position_ids.long()]
    permuted = rope_(qkv[order], cos, sin, position_ids[order])
    rope_(qkv, cos, sin, position_ids)
    assert same_bits(permuted, qkv[order])
    plain, truth = turned(qkv, c, -s), exact(qkv, c, -s)
    assert_as_good_as_torch(rope_(qkv, cos, sin, position_ids, inverse=True), plain, truth)


@pytest.mark.gpu
@needs_gpu
def test_the_longest_projection():
    """One row below 2^31 elements, 4.3 GB: the addresses of its last rows don't wrap around."""
    T, H, D = 932_067, 12, 64
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    qkv = torch.zeros(T, 3, H, D, device=DEVICE, dtype=torch.float16)
    (cos, sin), position_ids = tables(8192, D), places(T, 8192)
    ends = torch.cat((torch.arange(9), torch.arange(T // 2, T // 2 + 9), torch.arange(T - 9, T))).to(DEVICE)
    part = projection(len(ends), H, D, torch.float16)
    qkv[ends] = part
    rope_(qkv, cos, sin, position_ids)
    assert same_bits(qkv[ends], rope_(part, cos, sin, position_ids[ends]))
    qkv[ends] = 0
    assert not qkv.any()


@pytest.mark.gpu
@needs_gpu
def test_any_number_of_tokens_shares_one_compilation():
    """T and the tables' length are arguments that the kernel is not specialised for."""
    cos, sin = tables(300, 64)
    for T in (1, 2, 15, 16, 33, 160, 257):
        qkv = projection(T, 12, 64, torch.float16)
        rope_(qkv, cos[:T].contiguous(), sin[:T].contiguous())
        if T == 2:
            compiled = [len(caches[0]) for caches in kernel._rope_kernel.device_caches.values()]
    assert [len(caches[0]) for caches in kernel._rope_kernel.device_caches.values()] == compiled
