"""Each operation against its formula, in fp64 where rounding counts, on every backend that this machine has."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import modernbert_lite as ml
from modernbert_lite.ops import choose, gpu, onednn
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.choose import OPS, backend
from modernbert_lite.ops.linear import Linear, pack
from modernbert_lite.ops.rope import Rope, rope_table

FAST = ["torch", "onednn"]


@pytest.fixture
def on(monkeypatch):
    """on("onednn"): sets the backend; skips where the machine doesn't have it."""

    def choose(name: str) -> None:
        if name == "triton":
            pytest.importorskip("triton")
        if name == "onednn" and not onednn.works(torch.float32):
            pytest.skip("this torch has no oneDNN linear")
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", name)

    return choose


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(seqlens: list[int]) -> ml.PackedBatch:
    return ml.pack([[0] * n for n in seqlens])


# ---- the choice of a backend ---------------------------------------------------------------------------------------


def test_an_unknown_backend_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MODERNBERT_LITE_BACKEND is 'cuda'; it must be one of auto, torch, triton, o"):
        backend("linear", torch.zeros(1))


@pytest.mark.parametrize("op", OPS)
def test_torch_is_torch_for_every_op(monkeypatch, op):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    assert backend(op, torch.zeros(1)) == "torch"


def test_a_backend_is_taken_only_where_the_op_has_it(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    assert {op: backend(op, torch.zeros(1)) for op in OPS} == {
        "linear": "torch",
        "layer_norm": "triton",
        "rope": "triton",
        "attention": "triton",
        "geglu": "triton",
        "mean_pool": "triton",
    }
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")
    chosen = {op: backend(op, torch.zeros(1)) for op in OPS}
    assert chosen["linear"] == chosen["attention"] == "onednn"
    assert chosen["layer_norm"] == chosen["rope"] == chosen["geglu"] == "torch"


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_reference_for_other_dtypes_and_devices(op):
    assert backend(op, torch.zeros(1, dtype=torch.float64)) == "torch"
    assert backend(op, torch.zeros(1, dtype=torch.int64)) == "torch"
    assert backend(op, torch.zeros(1, device="meta")) == "torch"


@pytest.mark.parametrize("faster", [True, False])
def test_auto_multiplies_by_onednn_where_that_is_faster(monkeypatch, faster):
    monkeypatch.setattr(onednn, "pays", lambda dtype: faster)
    assert backend("linear", torch.zeros(1)) == ("onednn" if faster else "torch")
    assert backend("attention", torch.zeros(1)) == "onednn"


# ---- attention -----------------------------------------------------------------------------------------------------


def attend(qkv: torch.Tensor, batch: ml.PackedBatch, window: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """qkv (T, 3, H, D): as many heads of k and v as of q."""
    return ops.attention(qkv.flatten(1, 2), qkv.shape[2], batch, window)


def naive_attention(qkv: torch.Tensor, seqlens: list[int], window: tuple[int, int]) -> torch.Tensor:
    """One whole softmax a sequence, in fp64."""
    outs = []
    for part in qkv.double().split(seqlens):
        q, k, v = part.unbind(1)  # (S, H, D)
        i = torch.arange(len(part))
        distance = i[None, :] - i[:, None]  # key - query
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            seen &= distance >= -window[0]
        if window[1] >= 0:
            seen &= distance <= window[1]
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
        probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", probabilities, v))
    return torch.cat(outs)


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


def recording(seen: list[str]) -> dict[str, object]:
    """Twins that note their calls; those of linear decline."""

    def twin(name: str):
        def call(*args, **kwargs):
            seen.append(name)
            return None if name == "linear" else getattr(ops, name).reference(*args, **kwargs)

        return call

    return {name: twin(name) for name in ("linear", "layer_norm", "rope", "attention", "row_attention", "geglu")}


@pytest.mark.parametrize("name", [*FAST, "triton"])
def test_using_puts_twins_before_all_others(on, name, make_checkpoint):
    on(name)
    folder, _ = make_checkpoint(num_hidden_layers=2)
    network, batch, seen = ml.load_model(folder, device="cpu", packed=False), ml.pack([[5, 6, 7], [8, 9]]), []
    with torch.inference_mode():
        expected = network(batch)
        with choose.using(recording(seen)):
            got = network(batch)
    assert (got - expected).abs().max() <= 2e-5
    layer = ["layer_norm", "linear", "attention", "rope", "linear", "layer_norm", "linear", "geglu", "linear"]
    assert seen == ["layer_norm", *layer[1:], *layer, "layer_norm"]
    network(batch)
    assert len(seen) == 2 + 2 * len(layer) - 1  # outside of the block they are not asked


def test_using_ends_with_its_block_whatever_happens():
    def failing(*_):
        raise RuntimeError("no")

    mark = torch.full((3,), 7.0)
    with pytest.raises(RuntimeError, match="no"), choose.using({"mean_pool": failing}):
        ops.mean_pool(randn(3, 4), packed([3]))
    with choose.using({"mean_pool": failing}), choose.using({"mean_pool": lambda *_: mark}):
        assert ops.mean_pool(randn(3, 4), packed([3])) is mark  # the innermost
    assert ops.mean_pool(randn(3, 4), packed([3])).shape == (1, 4)


def test_a_choice_costs_little():
    """A call of an operation beside a call of its plain function: the least of many, since other work disturbs."""
    x, weight = randn(1, 8), torch.ones(8)
    times = {}
    with torch.inference_mode():
        for _ in range(30):
            for f in (ops.layer_norm, ops.layer_norm.reference):
                start = time.perf_counter()
                for _ in range(200):
                    f(x, weight, None, 1e-5)
                times[f] = min(times.get(f, 1.0), (time.perf_counter() - start) / 200)
    assert times[ops.layer_norm] - times[ops.layer_norm.reference] < 20e-6


# ---- RoPE ----------------------------------------------------------------------------------------------------------


def turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rope` of q and k in qkv (T, 3, H, D)."""
    return ops.rope(qkv.flatten(1, 2), 2 * qkv.shape[2], (cos, sin, None)).unflatten(1, qkv.shape[1:3])


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
@pytest.mark.parametrize("head_dim", [2, 30, 64])
def test_rope_equals_its_formula(theta, head_dim):
    """As a product of complex numbers, in fp64: pair j, (x[j], x[j + D/2]), turns by position * theta^(-2j/D)."""
    batch = packed([7, 1, 130])
    qkv = randn(138, 3, 2, head_dim)
    cos, sin = rope_table(Rope(theta), head_dim, batch.position_ids)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (138, head_dim // 2)
    got = turn(qkv.clone(), cos, sin)

    first, second = qkv.double().chunk(2, dim=-1)
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = batch.position_ids.double()[:, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    expected[:, 2] = qkv[:, 2].double()
    assert (got - expected).abs().max() <= 2e-5


def test_rope_turns_by_distance_only():
    """The score of a query and a key depends on how far apart they are, not on where."""
    qkv = randn(1, 3, 1, 32).expand(300, 3, 1, 32).contiguous()
    table = rope_table(Rope(10_000.0), 32, torch.arange(300))
    q, k, _ = turn(qkv, *table).unbind(1)
    scores = (q[:, 0] @ k[:, 0].T).double()
    for shift in (0, 1, 17):
        assert scores.diagonal(shift).std() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_works_in_place_and_leaves_v_alone(on, dtype):
    on("torch")
    qkv = randn(9, 3, 2, 8).to(dtype)
    kept = qkv.clone()
    table = rope_table(Rope(10_000.0), 8, torch.arange(9))
    flat = qkv.flatten(1, 2)
    assert ops.rope(flat, 4, (*table, None)) is flat
    assert torch.equal(qkv[:, 2], kept[:, 2])
    assert torch.equal(qkv[0], kept[0])  # position 0 doesn't turn
    assert not torch.equal(qkv[1:, :2], kept[1:, :2])
    # One rounding at the end: the fp32 result, rounded.
    exact = turn(kept.float(), *table)
    assert torch.equal(qkv, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rope_of_16_bits_on_the_cpu_is_not_rounded(on, dtype):
    on("onednn")
    qkv, batch = randn(9, 3, 2, 8).to(dtype), packed([9])
    table = rope_table(Rope(10_000.0), 8, batch.position_ids)
    got = ops.attention(qkv.flatten(1, 2), 2, batch, (-1, -1), (*table, None))
    expected = attend(turn(qkv.float(), *table), batch)
    assert torch.equal(got, expected.to(dtype))
    q, kv, rows = qkv[:1, 0], qkv[:, 1:].flatten(1, 2), torch.tensor([0])
    assert torch.equal(ops.row_attention(q, kv, rows, batch, (*table, None)), expected[:1].to(dtype))


def test_rope_in_place_on_a_view_leaves_its_neighbours_alone():
    wide = randn(5, 6, 12)
    kept = wide.clone()
    ops.rope(wide[..., 2:10], 4, (*rope_table(Rope(10_000.0), 8, torch.arange(5)), None))
    assert torch.equal(wide[..., :2], kept[..., :2])
    assert torch.equal(wide[..., 10:], kept[..., 10:])
    assert torch.equal(wide[:, 4:], kept[:, 4:])
    assert (wide[1:, :4, 2:10] != kept[1:, :4, 2:10]).any((1, 2)).all()


def test_linear_rope_stretches_positions():
    plain = rope_table(Rope(10_000.0), 16, torch.arange(10))
    stretched = rope_table(Rope(10_000.0, "linear", 4.0), 16, torch.arange(10) * 4)
    for a, b in zip(plain, stretched, strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    rope = Rope(160_000.0, "yarn", 4.0, 8192, attention_factor=1.25)
    cos, sin = rope_table(rope, 64, torch.tensor([0, 1]))
    assert cos[0].unique().tolist() == [1.25]
    angle = torch.atan2(sin[1], cos[1]).double()
    plain = 160_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (angle[:3] / plain[:3] - 1).abs().max() <= 1e-5
    assert (angle[-3:] / plain[-3:] - 1 / 4).abs().max() <= 1e-5
    assert (angle.diff() < 0).all()


def test_rope_angles_of_far_positions_are_not_rounded_away():
    """bf16 tables would give positions 8000 and 8001 the same angle."""
    table = rope_table(Rope(10_000.0), 64, torch.tensor([8000, 8001]))
    exact = torch.tensor([8000.0, 8001.0], dtype=torch.float64)
    assert (table[0][:, 0] - exact.cos()).abs().max() <= 1e-6


# ---- products, norm, gate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("T", [0, 1, 7, 66])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_equals_fp64(on, name, T, bias, residual):
    on(name)
    x, weight = randn(T, 45), randn(33, 45, seed=1)
    b = randn(33, seed=2) if bias else None
    r = randn(T, 33, seed=3) if residual else None
    kept = None if r is None else r.clone()
    with torch.inference_mode():
        got = ops.linear(x, weight, b, r)
    expected = x.double() @ weight.double().T + (0 if b is None else b.double()) + (0 if r is None else r.double())
    assert got.shape == (T, 33)
    assert torch.allclose(got.double(), expected, rtol=0, atol=2e-5)
    assert r is None or torch.equal(r, kept)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("N", [1, 63, 144])
def test_gated_linear_activates_the_first_half_or_swapped_the_second(on, name, act, bias, swapped, N):
    on(name)
    x, weight = randn(13, 24), randn(2 * N, 24, seed=1)
    b = randn(2 * N, seed=2) if bias else None
    with torch.inference_mode():
        got = ops.geglu(ops.linear(x, weight, b), act, swapped)
    first, second = F.linear(x.double(), weight.double(), None if b is None else b.double()).chunk(2, -1)
    first, second = (second, first) if swapped else (first, second)
    function = {
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "relu": lambda z: z.clamp(min=0),
        "gelu_pytorch_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    }[act]
    expected = function(first) * second
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max() + 2e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_equals_its_formula(on, name, bias):
    on(name)
    x, weight = randn(7, 45) * 3 + 1, randn(45, seed=1)
    b = randn(45, seed=2) if bias else None
    z = x.double()
    expected = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt() * weight
    got = ops.layer_norm(x, weight, b, 1e-3)
    assert (got - expected - (0 if b is None else b)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_layer_norm_of_a_sum_is_that_of_the_sum(on, name, bias, T):
    on(name)
    x, residual, weight = randn(T, 48), randn(T, 48, seed=1) * 3, randn(48, seed=2)
    b = randn(48, seed=3) if bias else None
    kept = x.clone(), residual.clone()
    got = ops.layer_norm(x, weight, b, 1e-3, residual)
    exact = (x.double() + residual).clone()
    expected = F.layer_norm(exact, (48,), weight.double(), None if b is None else b.double(), 1e-3)
    assert got.shape == (T, 48)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_layer_norm_of_a_wide_sum_with_narrow_weights_adds_the_residual(on):
    """The CPU's residual stream is in fp32 where packed weights are in 16 bits."""
    on("onednn")
    x, residual, weight = randn(5, 48), randn(5, 48, seed=1) * 3, (1 + randn(48, seed=2) / 4).bfloat16()
    got = ops.layer_norm(x, weight, None, 1e-5, residual)
    expected = F.layer_norm(x + residual, (48,), weight.float(), None, 1e-5)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("name", [*FAST, "triton"])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 66])
def test_linear_layer_norm_is_a_product_a_sum_and_a_norm(on, name, packs, dtype, T):
    on(name)
    if name == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter cuts bf16 off where a GPU rounds it
    x, residual, weight, b = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(T, 45), (T, 33), (33, 45), (33,)]))
    norm = 1 + randn(33, seed=5).to(dtype) / 4, randn(33, seed=6).to(dtype), 1e-5
    total = F.linear(x.double(), weight.double(), b.double()) + residual
    truth = F.layer_norm(total, (33,), norm[0].double(), norm[1].double(), 1e-5)
    plain = F.layer_norm(residual + F.linear(x, weight, b), (33,), *norm)
    layer = Linear(45, 33, bias=True).requires_grad_(False)
    layer.weight.data, layer.bias.data = weight, b
    if packs:
        pack(layer)
    with torch.inference_mode():
        got = layer.normed(x, residual.clone(), *norm)
    assert (got.shape, got.dtype) == ((T, 33), dtype)
    if T:
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.3, 300])
def test_rms_norm_equals_its_formula(dtype, size):
    x, weight = (randn(7, 45) * size).to(dtype), randn(45, seed=1).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    got = ops.rms_norm(x, weight, 0.5)
    assert got.dtype == dtype
    plain = weight * exact.to(dtype)
    assert torch.allclose(got.double(), plain.double(), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    assert ops.rms_norm(x.float(), weight, 0.5).dtype == dtype  # a sum that is kept wide


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_gradients_flow_through_products_whatever_the_backend(on, name):
    on(name)
    x = randn(5, 16).requires_grad_()
    weight, bias = (randn(*shape, seed=1).requires_grad_() for shape in ((12, 16), (12,)))
    residual = randn(5, 6, seed=2).requires_grad_()
    out = ops.geglu(ops.linear(x, weight, bias), "gelu")
    ops.linear(out, torch.eye(6), None, residual).square().sum().backward()
    got = [t.grad.clone() for t in (x, weight, bias, residual)]

    for t in (x, weight, bias, residual):
        t.grad = None
    first, second = F.linear(x, weight, bias).chunk(2, -1)
    (F.gelu(first) * second + residual).square().sum().backward()
    for a, t in zip(got, (x, weight, bias, residual), strict=True):
        assert torch.allclose(a, t.grad, atol=1e-4)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", [(64, 64), (-1, -1)])
def test_gradients_flow_through_attention(on, name, window):
    on(name)
    seqlens = [130, 3]
    qkv = randn(133, 3, 2, 8).requires_grad_()
    weight = randn(133, 2, 8, seed=1)
    (attend(qkv, packed(seqlens), window) * weight).sum().backward()
    got, qkv.grad = qkv.grad.clone(), None
    (naive_attention(qkv, seqlens, window) * weight).sum().backward()
    assert (got - qkv.grad).abs().max() <= 1e-4


@pytest.mark.parametrize("name", FAST)
def test_gradients_flow_after_inference_of_the_same_shape(on, name):
    """What is kept between calls (window masks, frequencies) was made under inference_mode, by the first call."""
    on(name)
    rope, seqlens = Rope(12_345.0), [131, 7]  # numbers of this test alone: nothing is kept of them yet
    batch, weight = packed(seqlens), randn(138, 2, 10, seed=1)

    def forward(qkv):
        turned = turn(qkv * 1.0, *rope_table(rope, 10, batch.position_ids))
        return (attend(turned, batch, (33, 31)) * weight).sum()

    qkv = randn(138, 3, 2, 10)
    with torch.inference_mode():
        expected = forward(qkv)
    qkv.requires_grad_()
    loss = forward(qkv)
    loss.backward()
    assert torch.allclose(loss, expected)
    assert (qkv.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_gradients_flow_through_a_whole_network(make_checkpoint, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    folder, reference = make_checkpoint(num_hidden_layers=2)
    model = ml.load_model(folder, packed=False).requires_grad_(True)
    ids = torch.randint(5, 50000, (1, 70), generator=torch.Generator().manual_seed(0))
    model(ml.pack([ids[0]])).square().mean().backward()
    reference(ids).last_hidden_state.square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_triton_asked_for_keeps_gradients(monkeypatch):
    """Its kernel has no backward: where gradients are wanted, torch computes."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    x, weight = randn(5, 16), randn(12, 16, seed=1).requires_grad_()
    ops.geglu(ops.linear(x, weight), "gelu").sum().backward()
    assert weight.grad is not None


def test_triton_that_can_not_run_is_one_warning(monkeypatch):
    import modernbert_lite.kernels.geglu as kernel

    def missing(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    monkeypatch.setattr(kernel, "geglu", missing)
    gpu._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Failed to find C compiler") as warned:
            assert {backend(op, randn(2, 3)) for op in OPS} == {"torch"}
        assert len(warned) == 1
    finally:
        gpu._works.cache_clear()
