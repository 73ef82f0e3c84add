"""ops.attention on every CPU backend, beside a softmax that is written out."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ops_cases import FAST, attend, naive_attention, on, packed, randn  # noqa: F401

from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.rope import Rope, rope_table

WINDOWS = [(0, 0), (1, 2), (64, 64), (-1, -1), (-1, 0), (5, -1)]


MIXES = [
    [1],
    [2],
    [63, 64, 65, 66],
    [127, 128],
    [129, 130],
    [257],
    [1, 257, 2, 64, 130, 1],
    [66, 66, 66],
    [0, 3, 0, 65],
]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("seqlens", MIXES, ids=str)
def test_attention_equals_a_naive_softmax(on, name, window, seqlens):
    on(name)
    qkv = randn(sum(seqlens), 3, 2, 16, seed=sum(seqlens)) * 2  # scores of order 16: a key let in or left out shows
    out = attend(qkv, packed(seqlens), window)
    assert out.shape == (sum(seqlens), 2, 16)
    assert (out - naive_attention(qkv, seqlens, window)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("window", [(64, 64), (-1, -1), (3, -1)], ids=str)
@pytest.mark.parametrize("keys", [(1, 40, 130, 0, 5), (3, 66, 131, 0, 5), (2, 66, 64, 0, 1)], ids=str)
def test_hidden_keys_are_seen_by_nobody_and_see_the_rest(on, name, window, keys):
    """Each hidden token is as a query of its own that asks the sequence's visible part."""
    on(name)
    seqlens = [3, 66, 131, 0, 5]
    qkv = randn(sum(seqlens), 3, 2, 16, seed=1) * 2
    batch = replace(packed(seqlens), key_seqlens=keys)
    out = attend(qkv, batch, window)
    naive = torch.cat(
        [visible_attention(part, n, window) for part, n in zip(qkv.double().split(seqlens), keys, strict=True)]
    )
    assert (out - naive).abs().max() <= 1e-5
    rows = torch.tensor([2, 68, 199, 204])
    one = replace(packed([3, 66, 131, 5]), key_seqlens=tuple(n for n in keys if n))
    got = ops.row_attention(qkv[rows, 0].contiguous(), qkv[:, 1:].flatten(1, 2), rows, one)
    if window == (-1, -1):
        assert (got - naive[rows]).abs().max() <= 1e-5


def visible_attention(qkv: torch.Tensor, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """All tokens of a sequence over its first `keys`, zeros for one that sees none."""
    distance = torch.arange(keys) - torch.arange(len(qkv))[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance >= -window[0]) if window[0] >= 0 else True
    seen &= (distance <= window[1]) if window[1] >= 0 else True
    q, k, v = qkv[:, 0], qkv[:keys, 1], qkv[:keys, 2]
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(), v)


@pytest.mark.parametrize("name", FAST)
def test_a_window_is_inclusive_on_both_sides(on, name):
    """With equal scores the output is the mean of the values seen: value j is 1 at j alone."""
    on(name)
    S, left, right = 200, 64, 64
    qkv = torch.zeros(S, 3, 1, S)
    qkv[:, 2, 0] = torch.eye(S)
    seen = attend(qkv, packed([S]), (left, right))[:, 0] > 0
    for i in (0, 1, 63, 64, 65, 100, 135, 136, 199):
        assert seen[i].nonzero().flatten().tolist() == list(range(max(0, i - left), min(S, i + right + 1)))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", [(64, 64), (-1, -1)])
def test_sequences_do_not_see_each_other(on, name, window):
    on(name)
    seqlens = [70, 3, 70, 140]
    qkv = randn(sum(seqlens), 3, 3, 8)
    before = attend(qkv, packed(seqlens), window)
    changed = qkv.clone()
    changed[73:143] = math.nan  # the third
    after = attend(changed, packed(seqlens), window)
    assert torch.equal(after[:73], before[:73])
    assert torch.equal(after[143:], before[143:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", [(64, 64), (-1, -1)])
def test_attention_in_low_precision_is_as_good_as_torch(on, name, window, dtype):
    on(name)
    S = 257
    qkv = randn(S, 3, 2, 32).to(dtype)
    exact = naive_attention(qkv, [S], window)
    i = torch.arange(S)
    seen = (i[None] - i[:, None]).abs() <= (64 if window[0] >= 0 else S)
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)
    error = (attend(qkv, packed([S]), window).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6


def test_local_attention_of_a_long_text_stays_in_its_window(on):
    """Costs O(T * window): no (S, S) scores, which would take 1 GB here."""
    on("torch")
    S = 16_384
    qkv = randn(S, 3, 1, 8)
    out = attend(qkv, packed([S]), (64, 64))
    cut = slice(S // 2 - 200, S // 2 + 200)
    expected = naive_attention(qkv[cut], [400], (64, 64))[100:300]
    assert (out[cut][100:300] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (64, 64), (3, 0)], ids=str)
@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (6, 2), (3, 3)])
def test_heads_of_keys_may_be_shared_and_attention_causal(on, name, window, heads, shared):
    """Against torch's sdpa with every head of k and v repeated, and a mask."""
    on(name)
    seqlens = [1, 70, 3, 131]
    qkv = randn(sum(seqlens), heads + 2 * shared, 32, seed=heads) * 2
    outs = []
    for part in qkv.double().split(seqlens):
        q, k, v = (x.transpose(0, 1)[None] for x in part.split([heads, shared, shared], 1))
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        distance = torch.arange(len(part)) - torch.arange(len(part))[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance >= -window[0]) if window[0] >= 0 else True
        seen &= (distance <= window[1]) if window[1] >= 0 else True
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1))
    expected = torch.cat(outs)
    batch, kept = packed(seqlens), qkv.clone()
    with torch.inference_mode():
        assert (ops.attention(qkv, heads, batch, window) - expected).abs().max() <= 1e-5
        rows = batch.cu_seqlens[1:].long() - 1  # the last token sees all before it, causal or not
        if window[0] < 0:
            got = ops.row_attention(qkv[rows, :heads], qkv[:, heads:], rows, batch)
            assert (got - expected[rows]).abs().max() <= 1e-5
    assert torch.equal(qkv, kept)


@pytest.mark.parametrize("name", [*FAST, "triton"])
def test_shared_heads_turn_with_their_own_positions(on, name):
    """RoPE inside attention is RoPE before attention: of the heads of q and of k, not of v."""
    on(name)
    batch, qkv = packed([5, 70]), randn(75, 4 + 2 * 2, 32)
    table = rope_table(Rope(10_000.0), 32, batch.position_ids)
    with torch.inference_mode():
        before = ops.rope(qkv.clone(), 6, (*table, None))
        assert torch.equal(before[:, 6:], qkv[:, 6:])
        expected = ops.attention(before, 4, batch)
        got = ops.attention(qkv.clone(), 4, batch, (-1, -1), (*table, None))
        assert (got - expected).abs().max() <= 1e-6
        rows = torch.tensor([3, 74])
        got = ops.row_attention(qkv[rows, :4].clone(), qkv[:, 4:].clone(), rows, batch, (*table, None))
        assert (got - expected[rows]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAST)
def test_gradients_of_shared_heads(on, name):
    on(name)
    batch, qkv = packed([5, 70]), randn(75, 4 + 2 * 2, 16).requires_grad_()
    weight = randn(75, 4, 16, seed=1)
    (ops.attention(qkv, 4, batch, (9, 9)) * weight).sum().backward()
    got, qkv.grad = qkv.grad.clone(), None
    q, k, v = qkv.split([4, 2, 2], 1)
    whole = torch.stack([q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)], 1)
    (naive_attention(whole, [5, 70], (9, 9)) * weight).sum().backward()
    assert (got - qkv.grad).abs().max() <= 1e-4


# ---- another set of twins ------------------------------------------------------------------------------------------
