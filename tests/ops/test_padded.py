"""Padded attention, for cards without the kernel: beside the reference, on the CPU; and how many calls it takes."""

import random

import pytest
import torch
import torch.nn.functional as F

import modernbert_lite as ml
from modernbert_lite.ops import gpu, padded
from modernbert_lite.ops.reference import attention

LENGTHS = [[70, 66, 64, 3], [1], [130, 5, 0, 7, 120, 1], [0, 3, 0], [512, 500, 8, 8, 8], [9] * 20]
LENGTHS += [[0, 0, 5], [0, 0, 0, 5, 70], [5, 0, 0, 0, 0], [20, 600, 9, 9], [0, 0, 513, 0, 4], [0]]
WINDOWS = [(-1, -1), (64, 64), (3, 2), (-1, 0), (4, -1), (0, 0)]


@pytest.fixture(autouse=True)
def plain_reference(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")


def qkv_of(lengths, heads=2, shared=2, D=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.randn(sum(lengths), heads + 2 * shared, D, generator=generator).to(dtype)


def batch_of(lengths, keys=None):
    batch = ml.pack([[1] * n for n in lengths])
    object.__setattr__(batch, "key_seqlens", keys)
    return batch


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_it_equals_the_reference(lengths, window):
    qkv = qkv_of(lengths)
    expected = attention.reference(qkv.clone(), 2, batch_of(lengths), window)
    got = padded.attention(qkv, 2, batch_of(lengths), window)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_heads_of_q_may_share_those_of_k_and_v(window):
    lengths = [40, 33, 5]
    qkv = qkv_of(lengths, heads=6, shared=2)
    expected = attention.reference(qkv.clone(), 6, batch_of(lengths), window)
    assert torch.allclose(padded.attention(qkv, 6, batch_of(lengths), window), expected, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_tokens_that_are_not_keys_are_seen_by_none_and_who_sees_none_gets_zeros(window):
    lengths, keys = [40, 33, 5, 6], (10, 33, 1, 0)
    qkv = qkv_of(lengths)
    expected = attention.reference(qkv.clone(), 2, batch_of(lengths, keys), window)
    got = padded.attention(qkv, 2, batch_of(lengths, keys), window)
    assert got.isfinite().all()
    assert torch.allclose(got, expected, atol=1e-5)
    assert not got[-6:].any()


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_are_the_reference_s(window):
    lengths = [20, 17, 0, 3]
    grad = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(f):
        x = qkv_of(lengths, dtype=torch.float64).requires_grad_()
        return torch.autograd.grad(f(x), x, grad)[0]

    # In fp64, sums in another order: some hundred roundings of 2^-53, of numbers below 10.
    got = gradient(lambda x: padded.attention(x, 2, batch_of(lengths), window))
    expected = gradient(lambda x: attention.reference(x.clone(), 2, batch_of(lengths), window))
    assert torch.allclose(got, expected, atol=1e-12)


def test_groups_hold_every_text_once_and_are_padded_to_twice_their_tokens_at_most():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.choice([0, draw.randint(0, 530)]) for _ in range(draw.randint(1, 300))]
        lengths = lengths if draw.random() < 0.5 else sorted(lengths, reverse=True)
        found = list(padded.groups(lengths))
        held = [i for first, last in found for i in range(first, last)]
        assert held == list(range(len(held)))
        assert not any(lengths[len(held) :])  # none is left over but empty ones
        for first, last in found:
            part = lengths[first:last]
            full = sum(n > 0 for n in part) == 1  # a text that is alone, but for empty ones
            assert full or (len(part) * max(part) <= min(2 * sum(part), 1 << 16) and max(part) <= 512)
    for length in (1, 3, 7, 8, 9):  # the width is rounded up
        for first, last in padded.groups([length] * 70_000):
            assert (last - first) * -(-length // 8) * 8 <= 1 << 16
    assert list(padded.groups([64, 60, 9, 9, 9, 8])) == [(0, 4), (4, 6)]
    assert list(padded.groups([0, 0])) == []
    assert list(padded.groups([600, 600, 5, 4])) == [(0, 1), (1, 2), (2, 4)]


@pytest.fixture
def calls(monkeypatch):
    """The calls of torch's attention, on a card that has no kernel of ours (a V100, a T4)."""
    made, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: made.append(1) or sdpa(*args, **more))
    monkeypatch.setattr(gpu, "can_attend", lambda qkv: False)
    return made


def test_ragged_short_texts_take_a_few_calls_a_layer_on_old_cards(calls):
    draw = random.Random(0)
    lengths = sorted((draw.randint(8, 300) for _ in range(94)), reverse=True)
    batch = batch_of(lengths)
    qkv = qkv_of(lengths)
    attention.reference(qkv.clone(), 2, batch, (64, 64))
    assert len(calls) > 150
    calls.clear()
    got = gpu.attention(qkv, 2, batch, (64, 64))
    assert 1 <= len(calls) <= 4
    assert torch.allclose(got, attention.reference(qkv.clone(), 2, batch, (64, 64)), atol=1e-5)


def test_masks_are_made_once_for_all_layers_of_a_kind(calls):
    batch = batch_of([30, 20])
    for _ in range(3):
        for window in ((-1, -1), (64, 64)):
            gpu.attention(qkv_of([30, 20]), 2, batch, window)
    assert len(calls) == 6
    assert len(batch.cache) == 2


def test_a_long_text_is_left_to_the_reference_and_short_ones_beside_it_are_not(calls):
    lengths = [600, *range(40, 60)]
    attention.reference(qkv_of(lengths[:1]), 2, batch_of(lengths[:1]), (64, 64))
    alone = len(calls)
    calls.clear()
    got = gpu.attention(qkv_of(lengths), 2, batch_of(lengths), (64, 64))
    assert len(calls) == alone + 1
    assert torch.allclose(got, attention.reference(qkv_of(lengths), 2, batch_of(lengths), (64, 64)), atol=1e-5)


def test_lengths_must_add_up():
    with pytest.raises(ValueError, match="seqlens add up to 5; the tensor has 6 tokens"):
        padded.attention(qkv_of([6]), 2, batch_of([5]), (-1, -1))
