"""Weights in 16 bits, for CPUs that have no products of 16 bits by 16: FBGEMM's product, the layer, whole networks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import SIZES, SMALL_VOCAB, TOKENS, randn, token_ids, unprobed  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.ops import half, linear, onednn
from modernbert_lite.ops.linear import HalfLinear, Linear
from modernbert_lite.ops.reference import geglu, layer_norm

FLOATS16 = [torch.bfloat16, torch.float16]
needs_fbgemm = pytest.mark.skipif(not half.works(), reason="this torch has no FBGEMM")


@pytest.fixture
def without_products(monkeypatch):
    """A CPU without products of 16 bits by 16."""
    monkeypatch.setattr(onednn, "supported", lambda dtype: dtype == torch.float32)


@pytest.fixture(params=[pytest.param(True, marks=needs_fbgemm), False], ids=["fbgemm", "plain"])
def road(request, monkeypatch):
    """A torch with FBGEMM, and one without."""
    monkeypatch.setattr(half, "works", lambda: request.param)
    return request.param


def layer_of(M: int, K: int, bias: bool = True, dtype: torch.dtype = torch.float16) -> HalfLinear:
    layer = Linear(K, M, bias).requires_grad_(False).eval()
    layer.weight.copy_(randn(M, K))
    if bias:
        layer.bias.copy_(randn(M, seed=5))
    linear.pack(layer, narrow=dtype)
    assert type(layer) is HalfLinear
    return layer


def assert_within_twice(got: torch.Tensor, plain: list[torch.Tensor], truth: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (plain[0].shape, plain[0].dtype)
    assert (got.double() - truth).abs().max() <= 2 * max((y.double() - truth).abs().max() for y in plain)


def products(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    """By plain torch, alone and among many rows: of a few rows it adds in several sums, which is more exact."""
    return [F.linear(x, weight, bias), F.linear(F.pad(x, (0, 0, 0, 64)), weight, bias)[: len(x)]]


@pytest.mark.parametrize("dtype", FLOATS16)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "K"), SIZES)
@pytest.mark.parametrize("T", TOKENS)
def test_products_are_as_near_as_torch_s_in_fp32(T, M, K, bias, dtype, road):
    layer, x, residual = layer_of(M, K, bias, dtype), randn(T, K, seed=1), randn(T, M, seed=2)
    weight = randn(M, K).half()
    parts = weight.float(), layer.bias
    exact = F.linear(x.double(), weight.double(), layer.bias.double() if bias else None)
    plain = products(x, *parts)
    assert torch.equal(layer.weight, parts[0])
    assert_within_twice(layer(x), plain, exact)
    assert_within_twice(layer(x, residual.clone()), [y + residual for y in plain], exact + residual)
    if M % 2 == 0:
        for swapped in (False, True):
            got = layer.gated(x, "gelu", swapped)
            assert_within_twice(got, [geglu(y, "gelu", swapped) for y in plain], geglu(exact, "gelu", swapped))


def test_the_other_forms_of_the_layer(road):
    layer, x, residual, norm = layer_of(96, 48), randn(7, 48, seed=1), randn(7, 96, seed=2), randn(96, seed=3)
    plain = products(x, layer.weight, layer.bias)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_within_twice(layer.part(x, slice(16, 50)), [y[:, 16:50] for y in plain], exact[:, 16:50])
    assert_within_twice(
        layer.normed(x, residual.clone(), norm, None, 1e-5),
        [layer_norm(y, norm, None, 1e-5, residual) for y in plain],
        layer_norm(exact, norm.double(), None, 1e-5, residual.double()),
    )


@needs_fbgemm
@pytest.mark.parametrize("T", [1, 3, 17, 300, 1030])
def test_a_row_does_not_depend_on_the_rows_beside_it(T):
    layer, x = layer_of(130, 96), randn(T, 96, seed=1)
    together, gated = layer(x), layer.gated(x, "gelu")
    for i in {0, T // 2, T - 1}:
        assert torch.equal(layer(x[i : i + 1])[0], together[i])
        assert torch.equal(layer.gated(x[i : i + 1], "gelu")[0], gated[i])


def test_numbers_that_are_not_finite_stay_so(road):
    layer, x = layer_of(96, 48, bias=False), randn(5, 48)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    y = layer(x)
    assert y[[0, 4]].isfinite().all()
    assert not y[1].any()
    assert not y[2:4].isfinite().any()


@pytest.mark.parametrize("number", [1e5, -1e30, 2.0**-16, 1e-30, float("nan")])
def test_weights_that_float16_does_not_have_are_bfloat16(number):
    weight = torch.full((6, 10), number)
    packed = half.pack(weight)
    assert not packed.fast
    assert torch.equal(packed.dense(), weight.bfloat16().float()) or number != number
    assert torch.equal(packed.dense().isfinite(), weight.isfinite())
    weight[0] = 1  # one row doesn't fit, so the whole weight doesn't
    assert not half.pack(weight).fast


@needs_fbgemm
def test_every_number_is_as_near_as_bfloat16_s_is_to_the_row_s_largest():
    """And a row of zeros stays one."""
    weight = randn(64, 200) * 2.0 ** torch.randint(-30, 1, (64, 200), generator=torch.Generator().manual_seed(0))
    weight[5], weight[:, 7] = 0, 2.0**-14
    weight[3] = 0
    packed = half.pack(weight)
    assert packed.fast
    assert ((packed.dense() - weight).abs() <= 2**-9 * weight.abs().amax(1, keepdim=True)).all()
    assert not packed.dense()[3].any()


def test_copies_pickles_and_files_of_the_layer(road):
    layer, x = layer_of(96, 48), randn(3, 48)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    plain = pickle.loads(pickle.dumps(layer))
    assert type(plain) is Linear
    assert torch.equal(plain.weight, layer.weight)
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    with pytest.raises(TypeError, match="can't be trained"):
        layer.requires_grad_(True)
    assert type(layer.to("cpu", torch.float32)) is HalfLinear
    weight = layer.weight
    assert type(layer.double()) is Linear
    assert torch.equal(layer.weight, weight.double())


def test_gradients_reach_x(road):
    layer, x = layer_of(96, 48), randn(3, 48).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    exact = layer.weight.double().sum(0).expand(3, -1)
    assert_within_twice(gradient, [torch.ones(3, 96) @ layer.weight], exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_is_nearer_to_fp32_than_transformers_in_that_dtype(make_checkpoint, dtype, road, without_products):
    folder, reference = make_checkpoint("ModernBertModel", **SMALL_VOCAB)
    ids = token_ids(70, 1, 33)
    with torch.no_grad():
        exact = torch.cat([reference(i[None]).last_hidden_state[0] for i in ids])
        rough = copy.deepcopy(reference).to(getattr(torch, dtype))
        theirs = torch.cat([rough(i[None]).last_hidden_state[0] for i in ids]).float()
    network = ml.load_model(folder, device="cpu", dtype=dtype)
    got = network(ml.pack(ids))
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= (theirs - exact).abs().max()
    layers = [m for m in network.modules() if isinstance(m, Linear)]
    assert layers
    assert all(type(m) is HalfLinear and m._packed.fast == road for m in layers)


@pytest.mark.parametrize("stored", FLOATS16)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_file_in_16_bits_keeps_its_numbers(make_checkpoint, stored, dtype, without_products):
    folder, model = make_checkpoint("ModernBertModel", **SMALL_VOCAB, num_hidden_layers=1)
    model.to(stored).save_pretrained(folder)
    network = ml.load_model(folder, device="cpu", dtype=dtype)
    got, weight = network.layers[0].mlp.Wo.weight, model.layers[0].mlp.Wo.weight.float()
    assert torch.equal(got, weight.half().float())
    if stored == torch.float16:
        assert torch.equal(got, weight)
    assert network(ml.pack(token_ids(9))).isfinite().all()


def test_vectors_of_the_bundled_model_are_near_fp32(without_products):
    texts = ["The capital of France is Paris.", "a", "", "def add(a, b): return a + b", "long " * 300]
    exact = ml.Embedder.from_pretrained("tiny", device="cpu").encode(texts)
    for dtype in ("bfloat16", "float16"):
        embedder = ml.Embedder.from_pretrained("tiny", device="cpu", dtype=dtype)
        got = embedder.encode(texts)
        assert (exact * got).sum(1).min() > 0.99999
        assert abs(got - [embedder.encode(text) for text in texts]).max() <= 1e-5


def test_plain_torch_and_plain_weights_compute_in_the_dtype_itself(make_checkpoint, monkeypatch, without_products):
    folder, _ = make_checkpoint("ModernBertModel", **SMALL_VOCAB, num_hidden_layers=1)

    def is_plain(**options):
        network = ml.load_model(folder, device="cpu", dtype="bfloat16", **options)
        layers = [m for m in network.modules() if isinstance(m, Linear)]
        return all(type(m) is Linear and m.weight.dtype == torch.bfloat16 for m in layers)

    assert is_plain(packed=False)
    assert not is_plain()
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    assert is_plain()


def test_where_fbgemm_is_missing_or_wrong_one_warning_says_so(monkeypatch):
    def missing(*_):
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack_fp16")

    def wrong(x, packed):
        return torch.zeros(len(x), 5)

    half.works.cache_clear()
    try:
        for name, broken in (("linear_prepack_fp16", missing), ("linear_dynamic_fp16", wrong)):
            with monkeypatch.context() as patch:
                patch.setattr(torch.ops.quantized, name, broken)
                with pytest.warns(UserWarning, match="no usable product with 16-bit weights") as caught:
                    layers = [layer_of(12, 16) for _ in range(2)]
                assert len(caught) == 1
                assert not layers[0]._packed.fast
            half.works.cache_clear()
    finally:
        half.works.cache_clear()
