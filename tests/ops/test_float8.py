"""8-bit floats: the product beside plain arithmetic, the layer, and a whole network, on the CPU."""

import copy
import pickle

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.open import pick_dtype
from modernbert_lite.checkpoint.weights import load_weights
from modernbert_lite.models.modernbert import ModernBert
from modernbert_lite.models.registry import read_config
from modernbert_lite.ops import linear
from modernbert_lite.ops.linear import FLOAT8, Float8Linear, Linear
from modernbert_lite.ops.reference import geglu, layer_norm, to_float8

pytestmark = pytest.mark.filterwarnings("ignore:dtype 'float8' is slow on a CPU:UserWarning")
E4M3 = sorted({float(x) for x in torch.arange(256, dtype=torch.uint8).view(FLOAT8).float() if x == x})


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_layer(K: int = 48, M: int = 96, bias: bool = True, dtype: torch.dtype = torch.float32) -> Float8Linear:
    layer = Linear(K, M, bias).requires_grad_(False).to(dtype)
    layer.weight.copy_(rows(M, K, seed=1))
    linear.pack(layer, narrow=FLOAT8)
    assert type(layer) is Float8Linear
    return layer


def assert_within_twice(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()


def emulated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T in fp64, of numbers that were rounded by a search among all of e4m3's."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True) / 448
        known = torch.tensor(E4M3)
        return known[((x / scale)[..., None] - known).abs().argmin(-1)].double() * scale

    return rounded(x) @ rounded(weight).T


def test_each_row_is_rounded_to_the_nearest_of_e4m3():
    x = rows(7, 33) * torch.tensor([1e-6, 1.0, 1e4, 3.0, 0.0, 5.0, 1e-30])[:, None]
    numbers, scale = to_float8(x)
    assert numbers.dtype == FLOAT8
    known, scaled = torch.tensor(E4M3), x / scale
    nearest = (scaled[..., None] - known).abs().amin(-1)
    # Multiplying by a reciprocal is wrong by two roundings of fp32 more than the division here.
    assert ((numbers.float() - scaled).abs() <= nearest + 3 * 2**-24 * scaled.abs()).all()
    assert (numbers.float().abs().amax(1)[[0, 1, 2, 3, 5, 6]] == 448).all()
    assert not numbers[4].float().any()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    layer, x = packed_layer(), rows(5, 48)
    x[1] *= 1000
    together = layer(x)
    for i in range(5):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_s_forms_are_those_of_the_emulated_product(bias):
    layer, x, residual = packed_layer(bias=bias), rows(11, 48, seed=2), rows(11, 96, seed=3)
    if bias:
        layer.bias.copy_(rows(96, seed=4))
    exact = emulated(x, rows(96, 48, seed=1)) + (layer.bias if bias else 0)
    # Plain fp32: the same rounded numbers, made dense before the product.
    numbers, scale = to_float8(x)
    plain = linear.linear(numbers.float() * scale, layer.weight, layer.bias)
    assert_within_twice(layer(x), plain, exact)
    assert_within_twice(layer.part(x, slice(16, 50)), plain[:, 16:50], exact[:, 16:50])
    assert_within_twice(layer(x, residual), plain + residual, exact + residual)
    for swapped in (False, True):
        assert_within_twice(
            layer.gated(x, "gelu", swapped), geglu(plain, "gelu", swapped), geglu(exact, "gelu", swapped)
        )
    weight = torch.ones(96)
    normed = layer.normed(x, residual, weight, None, 1e-5)
    assert_within_twice(
        normed,
        layer_norm(plain, weight, None, 1e-5, residual),
        layer_norm(exact, weight.double(), None, 1e-5, residual.double()),
    )


def test_numbers_that_are_not_finite_stay_so():
    layer, x = packed_layer(bias=False), rows(5, 48)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[[0, 4]], layer(x[[0, 4]]))
    assert not y[1].any()
    assert not y[2:4].isfinite().any()


def torch_multiplies_8_bit_floats() -> bool:
    eight, one = torch.ones(16, 16).to(FLOAT8), torch.ones(16, 1)
    try:
        return bool((torch._scaled_mm(eight, eight.t(), one, one.t(), out_dtype=torch.bfloat16) == 16).all())
    except (RuntimeError, NotImplementedError):
        return False


@pytest.mark.parametrize("bias", [False, True])
def test_a_card_s_operator_is_called_with_the_scales_in_their_places(bias):
    """torch's CPU has the same operator."""
    layer, x = packed_layer(bias=bias, dtype=torch.bfloat16), rows(11, 48, seed=2).bfloat16()
    if bias:
        layer.bias.copy_(rows(96, seed=4))
    if not torch_multiplies_8_bit_floats():
        pytest.skip("this torch multiplies no 8-bit floats on a CPU")
    numbers, scale = to_float8(x)
    found = linear._scaled(numbers, scale, layer._packed.numbers.t(), layer._packed.scale.t(), layer.bias, x.dtype)
    exact = emulated(x.float(), rows(96, 48, seed=1).bfloat16().float()) + (layer.bias if bias else 0)
    plain = linear.linear((numbers.float() * scale).bfloat16(), layer.weight, layer.bias)
    assert_within_twice(found, plain, exact)


def test_copies_pickles_and_files_of_the_layer():
    layer, x = packed_layer(), rows(3, 48)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    plain = pickle.loads(pickle.dumps(layer))
    assert type(plain) is Linear
    assert torch.equal(plain.weight, layer.weight)
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    assert (layer.weight - rows(96, 48, seed=1)).abs().max() <= 2**-4 * rows(96, 48, seed=1).abs().max()
    with pytest.raises(TypeError, match="can't be trained"):
        layer.requires_grad_(True)
    assert type(layer.to(torch.float32)) is Float8Linear
    weight = layer.weight
    assert type(layer.double()) is Linear
    assert torch.equal(layer.weight, weight.double())


def test_gradients_reach_x():
    layer, x = packed_layer(), rows(3, 48).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    plain = torch.ones(3, 96) @ layer.weight
    assert_within_twice(gradient, plain, layer.weight.double().sum(0).expand(3, -1))


def test_a_network_is_as_near_to_fp32_as_its_wide_products_in_8_bits(make_checkpoint):
    folder, reference = make_checkpoint("ModernBertModel")
    texts = [torch.arange(5, 5 + n) * 7 % 500 + 5 for n in (33, 1, 70)]

    def states(model):
        return torch.cat([model(text[None]).last_hidden_state[0] for text in texts])

    class InFloat8(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return emulated(x[0], self.weight).float()[None]

    with torch.no_grad():
        exact, rough = states(reference), copy.deepcopy(reference)
        for layer in rough.layers:
            layer.attn.Wqkv, layer.mlp.Wi = InFloat8(layer.attn.Wqkv.weight), InFloat8(layer.mlp.Wi.weight)
        theirs = float((states(rough) - exact).abs().max())
    network = ml.load_model(folder, device="cpu", dtype="float8")
    got = network(ml.pack(texts))
    assert theirs > 1e-3
    assert float((got - exact).abs().max()) <= 2 * theirs
    eight = [name for name, module in network.named_modules() if isinstance(module, Float8Linear)]
    assert eight == [f"layers.{i}.{name}" for i in range(len(network.layers)) for name in ("attn.Wqkv", "mlp.Wi")]


def test_embeddings_of_the_bundled_model_are_near_fp32():
    texts = ["The capital of France is Paris.", "a", "", "def add(a, b): return a + b", "long " * 300]
    exact = ml.Embedder.from_pretrained("tiny", device="cpu").encode(texts)
    embedder = ml.Embedder.from_pretrained("tiny", device="cpu", dtype="float8")
    got = embedder.encode(texts)
    cosines = (exact * got).sum(1)
    assert 0.995 <= cosines.min() < 0.99999
    assert abs(got - [embedder.encode(text) for text in texts]).max() <= 1e-5


def test_a_warning_says_that_it_is_slow_on_a_cpu():
    with pytest.warns(UserWarning, match="'float8' is slow on a CPU"):
        ml.Embedder.from_pretrained("tiny", device="cpu", dtype="float8")


def test_sides_that_sixteen_does_not_divide_stay_as_they_are(make_checkpoint):
    """torch's product of 8-bit floats takes only those that it divides."""
    folder, _ = make_checkpoint("ModernBertModel", intermediate_size=100, num_hidden_layers=1)
    network = ml.load_model(folder, device="cpu", dtype="float8")
    assert type(network.layers[0].attn.Wqkv) is Float8Linear
    assert type(network.layers[0].mlp.Wi) is not Float8Linear


def test_weights_that_are_stored_in_another_dtype_get_to_the_device(make_checkpoint):
    """By way of no buffer of the CPU's. (The meta device is any other than the CPU.)"""
    folder, model = make_checkpoint("ModernBertModel", num_hidden_layers=1)
    model.half().save_pretrained(folder)
    files, device = Folder(folder), torch.device("meta")
    network = load_weights(ModernBert, read_config(folder, read=files.json), files, device=device, dtype=FLOAT8)
    tensors = [*network.parameters(), *network.layers[0].mlp.Wi._packed[:2], *network.layers[0].attn.Wqkv._packed[:2]]
    assert {x.device for x in tensors} == {device}


def test_it_is_refused_where_it_cannot_be(make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint("ModernBertModel", num_hidden_layers=1)
    with pytest.raises(ValueError, match="'float8' is for inference: with packed=False use float32"):
        ml.load_model(folder, device="cpu", dtype="float8", packed=False)
    for capability, fine in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert linear.has_float8(torch.device("cuda")) == fine
        if not fine:
            with pytest.raises(ValueError, match="'float8' needs an NVIDIA card from Ada or Hopper on"):
                pick_dtype("float8", torch.device("cuda"))
    with pytest.raises(ValueError, match="'float8' needs an NVIDIA card"):
        pick_dtype("float8", torch.device("mps"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_gives_what_the_emulation_gives(make_checkpoint):
    if not linear.has_float8(torch.device("cuda")):
        pytest.skip("this card has no 8-bit floats")
    folder, _ = make_checkpoint("ModernBertModel", num_hidden_layers=3)
    batch = ml.pack([torch.arange(5, 5 + n) * 7 % 500 + 5 for n in (33, 1, 200)])
    with torch.inference_mode():
        exact = ml.load_model(folder, device="cpu", dtype="float32")(batch)
        emulated = ml.load_model(folder, device="cpu", dtype="float8")(batch)
        rough = ml.load_model(folder, device="cuda", dtype="bfloat16")(batch.to("cuda")).float().cpu()
        got = ml.load_model(folder, device="cuda", dtype="float8")(batch.to("cuda")).float().cpu()
    most = float((emulated - exact).abs().max() + (rough - exact).abs().max())
    assert float((got - exact).abs().max()) <= 2 * most
