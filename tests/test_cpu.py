"""The CPU's fast paths: packed weights, 8-bit weights, long attention, and what happens where they don't work."""

import copy
import io
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite.ops import cpu, onednn
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.linear import Int8Linear, Linear, PackedLinear, pack

FP32 = torch.float32
SIZES = [(1, 8), (5, 7), (12, 16), (64, 33), (130, 96)]  # (M, K)
TOKENS = [1, 2, 31, 65, 513]
ONEDNN = onednn.works(FP32)
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN linear")
BF16 = onednn.works(torch.bfloat16)
DTYPES = [FP32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BF16, reason="no bf16 in oneDNN here"))]

SMALL_VOCAB = {
    "vocab_size": 500,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(5, 400, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.fixture
def forced(monkeypatch):
    """oneDNN wherever it works, whether or not it pays on this machine."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")


@pytest.fixture
def unprobed():
    """Lets the probes run again, in the test and after it."""
    probes = onednn.works, onednn.int8_works, onednn.pays, onednn.gain
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def within_twice(got, plain, truth):
    error, allowed = ((x.double() - truth).abs().max().item() for x in (got, plain))
    return error <= (2e-5 if got.dtype == plain.dtype == FP32 else 2 * allowed + 1e-6)


def is_packed(network) -> bool:
    return any(isinstance(module, PackedLinear) for module in network.modules())


def layer_of(weight, bias=None, parts=1, int8=False) -> Linear:
    """A layer of that weight (M, K), as inference holds it."""
    layer = Linear(weight.shape[1], len(weight), bias is not None, parts).requires_grad_(False).eval()
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    pack(layer, int8=int8)
    return layer


# ---- products with packed weights ----------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SIZES)
@torch.inference_mode()
def test_packed_products_equal_plain_ones(forced, shape, bias, dtype):
    weight = (randn(*shape, seed=1) * shape[1] ** -0.5).to(dtype)
    b = randn(shape[0], seed=2).to(dtype) if bias else None
    layer = layer_of(weight, b)
    assert type(layer) is PackedLinear
    for tokens in TOKENS:
        x, residual = randn(tokens, shape[1], seed=tokens).to(dtype), randn(tokens, shape[0], seed=3).to(dtype)
        plain = F.linear(x, weight, b)
        truth = x.double() @ weight.double().t() + (0 if b is None else b.double())
        assert within_twice(layer(x), plain, truth)
        got = layer(x, residual.clone())
        assert within_twice(got, residual + plain, truth + residual.double())
        assert got.dtype == FP32 or dtype == FP32  # the residual stream is kept in fp32
        part = slice(shape[0] // 3, None)
        assert within_twice(layer.part(x, part), plain[:, part], truth[:, part])


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_gated_products_equal_plain_ones(forced, act, bias, dtype):
    weight = (randn(2 * 37, 24, seed=1) * 24**-0.5).to(dtype)
    b = randn(2 * 37, seed=2).to(dtype) if bias else None
    for parts in (1, 2):
        layer = layer_of(weight, b, parts)
        for tokens in TOKENS:
            x = randn(tokens, 24, seed=tokens).to(dtype)
            y = F.linear(x, weight, b)
            z = x.double() @ weight.double().t() + (0 if b is None else b.double())
            for swapped in (False, True):
                halves = (v.chunk(2, -1)[:: -1 if swapped else 1] for v in (y, z))
                plain, truth = (ops.ACTIVATIONS[act](activated) * gate for activated, gate in halves)
                assert within_twice(layer.gated(x, act, swapped), plain, truth)
            assert within_twice(layer(x), y, z)  # the two halves as one


@needs_onednn
@torch.inference_mode()
def test_strided_and_empty_input_is_multiplied_right(forced):
    weight = randn(6, 16, seed=1)
    layer = layer_of(weight)
    x = randn(9, 40)[:, 3:19]
    assert torch.allclose(layer(x), F.linear(x, weight), atol=2e-5)
    assert layer(x[:0]).shape == (0, 6)
    assert torch.allclose(layer(x[None]), F.linear(x[None], weight), atol=2e-5)


@needs_onednn
def test_gradients_flow_through_packed_weights(forced):
    weight, x = randn(12, 16), randn(5, 16, seed=1).requires_grad_()
    layer = layer_of(weight)
    (layer(x).square().sum() + layer.gated(x, "gelu").sum()).backward()
    y = x.detach().clone().requires_grad_()
    first, second = F.linear(y, weight).chunk(2, -1)
    (F.linear(y, weight).square().sum() + (F.gelu(first) * second).sum()).backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)


# ---- a packed layer is a layer to everybody else -------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_gives_its_numbers_back_bit_for_bit(forced, parts, dtype):
    weight = randn(38, 23).to(dtype)
    layer = layer_of(weight, parts=parts)
    assert torch.equal(layer.weight, weight)
    assert (layer.weight.dtype, layer.weight.device) == (dtype, weight.device)
    assert "PackedLinear(in_features=23, out_features=38, bias=False, " + str(dtype).removeprefix("torch.") in repr(
        layer
    )


@needs_onednn
@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: torch.nn.init.ones_(layer.weight),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_to_what_weight_gives_changes_no_layer(forced, write, mode):
    for int8 in (False, True):
        layer = layer_of(randn(4, 6), int8=int8)
        kept = layer.weight
        with mode():
            write(layer)
        assert torch.equal(layer.weight, kept)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = torch.nn.Parameter(torch.zeros(4, 6))
        with pytest.raises(TypeError, match=r"packed for inference: they can't be trained; load it with packed=False"):
            layer.requires_grad_(True)


@needs_onednn
@pytest.mark.parametrize("int8", [False, True])
def test_a_state_is_read_in_inference_mode_too(forced, int8, tmp_path):
    layer = layer_of(randn(12, 16), randn(12), int8=int8)
    with torch.inference_mode():
        state = layer.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], layer.weight)


@pytest.fixture
def layer(forced):
    if not ONEDNN:
        pytest.skip("this torch has no oneDNN linear")
    weight = randn(12, 16)
    layer = layer_of(weight, randn(12), parts=2)
    assert type(layer) is PackedLinear
    return layer, weight


def test_a_layer_s_state_is_plain_and_loads_anywhere(layer, tmp_path):
    linear, dense = layer
    state = linear.state_dict()
    assert type(state["weight"]) is torch.Tensor
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], dense)
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], dense)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert type(read) is Linear
    assert torch.equal(read.weight, dense)
    assert torch.equal(read.bias, linear.bias)
    linear.load_state_dict({"weight": dense * 2, "bias": state["bias"]})
    with torch.inference_mode():
        assert torch.allclose(linear(torch.ones(3, 16)), F.linear(torch.ones(3, 16), dense * 2, linear.bias), atol=1e-5)


def test_a_copy_stays_packed_and_is_a_copy(layer):
    linear, dense = layer
    other = copy.deepcopy(linear)
    assert type(other) is PackedLinear
    other.load_state_dict({"weight": dense * 2, "bias": linear.bias * 3})
    assert torch.equal(other.weight, dense * 2)
    assert torch.equal(linear.weight, dense)
    assert type(linear) is PackedLinear


def test_a_state_without_the_weight_leaves_it_packed(layer):
    linear, _ = layer
    linear.load_state_dict({"bias": torch.zeros(12)}, strict=False)
    assert type(linear) is PackedLinear
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        linear.load_state_dict({"bias": torch.zeros(12)})


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.half()])
def test_moved_to_another_device_or_dtype_a_layer_is_plain(layer, move):
    linear, dense = layer
    moved = move(linear)
    assert type(moved) is Linear
    assert list(dict(moved.named_parameters())) == ["bias", "weight"] or not moved.training
    assert moved.weight.is_meta or torch.equal(moved.weight, dense.to(moved.weight.dtype))
    assert not moved.weight.requires_grad


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.eval(), lambda m: m.cpu()])
def test_moved_nowhere_it_stays_packed(layer, move):
    linear, dense = layer
    assert type(move(linear)) is PackedLinear
    assert torch.equal(linear.weight, dense)


def test_a_network_to_train_is_one_that_is_not_packed(make_checkpoint, forced):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(TypeError, match=r"can't be trained; load it with packed=False"):
        ml.load_model(folder, device="cpu").requires_grad_(True)
    network = ml.load_model(folder, device="cpu", packed=False).requires_grad_(True)
    optimizer, batch = torch.optim.SGD(network.parameters(), lr=0.1), ml.pack(token_ids(70))
    before = network.layers[0].attn.Wqkv.weight.clone()
    network.train()
    network(batch)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(network.layers[0].attn.Wqkv.weight, before)


# ---- a network, packed ---------------------------------------------------------------------------------------------

LENGTHS = (1, 64, 65, 130, 257, 3, 3)


@needs_onednn
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_loaded_network_holds_each_linear_weight_once(make_checkpoint, forced, dtype):
    folder, reference = make_checkpoint("ModernBertForSequenceClassification", **SMALL_VOCAB)
    network = ml.load_model(folder, device="cpu", dtype=dtype)
    layers = [m for m in network.modules() if isinstance(m, Linear)]
    assert len(layers) == 4 * network.config.num_hidden_layers + 1
    assert all(isinstance(m, PackedLinear) for m in layers)
    int8 = [m for m in layers if isinstance(m, Int8Linear)]
    assert len(int8) == (0 if dtype == "float32" else 4 * network.config.num_hidden_layers)
    if dtype == "float32":
        state = network.state_dict()
        assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())
        assert set(state) == set(reference.state_dict())


def test_the_switches_leave_weights_as_they_are(make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    assert not is_packed(ml.load_model(folder, device="cpu", packed=False))
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    assert not is_packed(ml.load_model(folder, device="cpu"))


@needs_onednn
def test_a_packed_network_obeys_a_backend_that_is_chosen_later(make_checkpoint, forced, monkeypatch):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    network, batch = ml.load_model(folder, device="cpu"), ml.pack(token_ids(*LENGTHS))
    fast = network(batch)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    monkeypatch.setattr(onednn, "multiply", None)
    assert (network(batch) - fast).abs().max() <= 2e-5


@pytest.mark.skipif(not BF16, reason="no bf16 in oneDNN here")
def test_bf16_keeps_the_residual_stream_in_fp32_and_is_more_exact_than_transformers(make_checkpoint, forced):
    folder, reference = make_checkpoint(**SMALL_VOCAB, num_hidden_layers=6)
    ids = token_ids(257)[0]
    with torch.inference_mode():
        exact = reference(ids[None]).last_hidden_state[0]
        theirs = reference.bfloat16()(ids[None]).last_hidden_state[0]
        got = ml.load_model(folder, device="cpu", dtype="bfloat16")(ml.pack([ids]))
    assert got.dtype == torch.bfloat16
    assert (got - exact).square().mean() < 0.7 * (theirs - exact).square().mean()


@needs_onednn
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_torch_compile_of_a_packed_network_is_refused_as_a_whole_and_right_in_parts(make_checkpoint, forced, dtype):
    folder, _ = make_checkpoint(**SMALL_VOCAB, num_hidden_layers=2)
    network, batch = ml.load_model(folder, device="cpu", dtype=dtype), ml.pack(token_ids(5, 70))
    expected = network(batch)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (torch.compile(network, backend="aot_eager")(batch) - expected).abs().max() <= 2e-5
        torch.compiler.reset()
        with pytest.raises(Exception, match="packed=False"):
            torch.compile(network, backend="aot_eager", fullgraph=True)(batch)


def test_int8_is_always_packed(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(ValueError, match="'int8' is for inference: with packed=False use float32"):
        ml.load_model(folder, device="cpu", dtype="int8", packed=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("loaded", "later"), [("onednn", "onednn"), ("onednn", "torch"), ("torch", "onednn")])
def test_rows_of_a_global_last_layer_in_every_dtype(make_checkpoint, monkeypatch, dtype, packed, loaded, later):
    """What a CLS-pooled embedder runs."""
    packed = packed or dtype == "int8"
    folder, _ = make_checkpoint(**SMALL_VOCAB, num_hidden_layers=4)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", loaded)
    network, batch = ml.load_model(folder, device="cpu", dtype=dtype, packed=packed), ml.pack(token_ids(*LENGTHS))
    assert network.config.layer_types[-1] == "full_attention"
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", later)
    rows = batch.cu_seqlens[:-1].long()
    with torch.inference_mode():
        got, expected = network(batch, rows), network(batch)[rows]
    assert got.dtype == expected.dtype
    cosines = torch.cosine_similarity(got.double(), expected.double())
    assert cosines.min() >= {"float32": 1 - 1e-9, "int8": 0.99}.get(dtype, 0.999)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_hooks_keep_what_they_saw(make_checkpoint, forced, dtype):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    network, seen, copies = ml.load_model(folder, device="cpu", dtype=dtype), [], []

    def keep(module, given, out):
        seen.append(out)
        copies.append(out.clone())

    for layer in network.layers:
        layer.register_forward_hook(keep)
    network(ml.pack(token_ids(*LENGTHS)))
    assert len(seen) == network.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


@needs_onednn
def test_biases_alone_can_be_trained(make_checkpoint, forced):
    folder, _ = make_checkpoint(**SMALL_VOCAB, attention_bias=True, mlp_bias=True)
    network = ml.load_model(folder, device="cpu")
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    network(ml.pack(token_ids(70))).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in network.named_parameters() if n.endswith(("Wqkv.bias", "Wi.bias")))


@needs_onednn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_autocast_around_a_packed_network(make_checkpoint, forced, dtype):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    network, batch = ml.load_model(folder, device="cpu", dtype=dtype), ml.pack(token_ids(*LENGTHS))
    expected = network(batch).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(network(batch).float(), expected).min() >= 0.999


def test_unpacked_a_network_is_of_one_dtype(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    tensors = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    network = ml.load_model(folder, device="cpu", packed=False)
    assert {p.dtype for p in network.parameters()} == {FP32}


# ---- the embedding table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_16_bit_table_stays_as_it_is_stored_and_changes_nothing(make_checkpoint, stored, dtype):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    tensors = {k: v.to(stored) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    batch = ml.pack(token_ids(*LENGTHS))
    network = ml.load_model(folder, device="cpu", dtype=dtype)
    table = network.embeddings.tok_embeddings
    assert table.weight.dtype == stored
    got = network(batch)
    table.weight = torch.nn.Parameter(table.weight.to(network.final_norm.weight.dtype), requires_grad=False)
    assert torch.equal(network(batch), got)


def test_a_table_too_large_for_16_bits_stays_in_fp32(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.tok_embeddings.weight"][7, 3] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert ml.load_model(folder, device="cpu", dtype="int8").embeddings.tok_embeddings.weight.dtype == FP32


# ---- int8 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["packed", "dense"])
def int8(request, monkeypatch, unprobed):
    """With oneDNN's product of 8-bit numbers, and without it."""
    if request.param == "packed":
        if not onednn.int8_works():
            pytest.skip("this torch has no int8 linear")
    else:
        monkeypatch.setattr(onednn, "int8_works", lambda: False)
    return request.param


@pytest.mark.parametrize("shape", SIZES)
def test_8_bit_weights_are_off_by_half_a_step_at_most(int8, shape):
    weight = randn(*shape) * 10 ** randn(shape[0], 1, seed=1)
    weight[0] = 0
    layer = layer_of(weight, int8=True)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= 0.5001 * step + 1e-30).all()
    assert (layer.weight.shape, layer.weight.dtype) == (weight.shape, FP32)
    assert "Int8Linear" in repr(layer)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [*TOKENS, 1025])
def test_8_bit_products_are_as_exact_as_8_bits_allow(int8, tokens, bias):
    """Against fp64: activations and weights are each off by half a step at most, at random."""
    x, weight, residual = randn(tokens, 96), randn(74, 96, seed=1), randn(tokens, 74, seed=2)
    x[0] *= 1e4  # one row's size is its own matter
    b = randn(74, seed=3) if bias else None
    layer = layer_of(weight, b, 2, int8=True)
    truth = x.double() @ weight.double().t() + (0 if b is None else b)
    noise = 96**0.5 * (x.abs().amax(1, keepdim=True) / 127 + x.square().mean(1, keepdim=True).sqrt() / 127 * 4)
    assert ((layer(x) - truth).abs() <= 1.5 * noise).all()
    got = layer(x, residual.clone())
    assert ((got - truth - residual).abs() <= 1.5 * noise).all()
    y = layer(x)
    for act in ("gelu", "silu"):
        first, second = y.chunk(2, -1)
        expected = ops.ACTIVATIONS[act](first) * second
        assert torch.allclose(layer.gated(x, act), expected, rtol=1e-4, atol=1e-3 * noise.max())


@torch.inference_mode()
def test_8_bit_products_of_a_row_do_not_depend_on_the_rows_beside_it(int8):
    x, layer = randn(700, 96), layer_of(randn(74, 96, seed=1), int8=True)
    x[1] *= 1e6
    together = layer(x)
    for rows in (slice(0, 1), slice(5, 40), slice(511, 514)):
        difference = (layer(x[rows]) - together[rows]).abs().max()
        assert difference <= (0 if int8 == "packed" else 2e-5)


@torch.inference_mode()
def test_8_bit_products_of_zeros_nan_and_infinities(int8):
    x, layer = randn(5, 16), layer_of(randn(6, 16, seed=1), int8=True)
    expected = layer(x)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    got = layer(x)
    assert (got[1] == 0).all()
    assert not got[2:4].isfinite().any()
    assert torch.equal(got[[0, 4]], expected[[0, 4]])


def test_int8_embeddings_of_the_bundled_model_are_near_fp32(int8):
    texts = [
        "The capital of France is Paris.", "a", "", "Berlin is where the German parliament meets.", "🙂 emoji",
        "def add(a, b):\n    return a + b", "How do I unpack a tar archive?", "tar -xf archive.tar",
        "long " * 300, "The mitochondrion is the powerhouse of the cell, as every pupil has heard.",
    ]  # fmt: skip
    exact = ml.Embedder.from_pretrained("tiny", device="cpu").encode(texts)
    embedder = ml.Embedder.from_pretrained("tiny", device="cpu", dtype="int8")
    cosines = (exact * embedder.encode(texts)).sum(1)
    assert cosines.mean() >= 0.995
    assert cosines.min() >= 0.98
    one_by_one = [embedder.encode(text) for text in texts]
    assert abs(embedder.encode(texts) - one_by_one).max() <= 1e-5


@pytest.mark.skipif(not onednn.int8_works(), reason="this torch has no int8 linear")
def test_8_bit_weights_take_a_quarter(make_checkpoint):
    weight = randn(768, 768)
    numbers = onednn.quantize(weight).numbers
    assert numbers.numel() * numbers.element_size() == weight.numel()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_int8_is_refused_on_other_devices(device):
    from modernbert_lite.checkpoint.weights import pick_dtype

    with pytest.raises(ValueError, match=f"'int8' is for the CPU, and the device is '{device}'"):
        pick_dtype("int8", torch.device(device))


# ---- attention -----------------------------------------------------------------------------------------------------


def attended(qkv, batch, window_size=(-1, -1)):
    with torch.inference_mode():
        return ops.attention(qkv.flatten(1, 2), qkv.shape[2], batch, window_size)


@needs_onednn
@pytest.mark.parametrize("lengths", [[1], [2, 2, 511], [513], [1100, 3, 1100]])
def test_attention_in_chunks_equals_the_formula(forced, monkeypatch, lengths):
    monkeypatch.setattr(cpu, "attends_in_chunks", lambda length, dtype: True)
    monkeypatch.setattr(cpu, "_QUERIES", 256)
    batch, qkv = ml.pack([[0] * n for n in lengths]), randn(sum(lengths), 3, 3, 24)
    qkv[:, 1] += 5  # what all keys have in common
    for got, one in zip(attended(qkv, batch).split(lengths), qkv.double().split(lengths), strict=True):
        q, k, v = one.permute(1, 2, 0, 3)
        truth = torch.softmax(q @ k.transpose(1, 2) / 24**0.5, -1) @ v
        assert (got - truth.transpose(0, 1)).abs().max() <= 1e-5


@pytest.mark.skipif(not BF16, reason="no bf16 in oneDNN here")
def test_long_bf16_attention_is_as_exact_as_products_in_bf16(forced):
    qkv = randn(1500, 3, 2, 64)
    q, k, v = qkv.bfloat16().permute(1, 2, 0, 3)
    exact = F.scaled_dot_product_attention(*(x.double()[None] for x in (q, k, v)))[0].transpose(0, 1)
    plain = (torch.softmax(q @ k.transpose(1, 2) / 8, -1) @ v).transpose(0, 1)
    assert cpu.attends_in_chunks(1500, torch.bfloat16)
    got = attended(qkv.bfloat16(), ml.pack([[0] * 1500]))
    assert got.dtype == torch.bfloat16
    assert within_twice(got, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_local_attention_in_16_bits_is_more_exact_than_torch_s(forced, dtype):
    qkv, batch = randn(300, 3, 2, 32), ml.pack([[0] * 270, [0] * 30])
    truth = attended(qkv.to(dtype).double(), batch, (64, 64))
    got = attended(qkv.to(dtype), batch, (64, 64))
    assert got.dtype == dtype
    assert (got - truth).abs().max() <= (truth.to(dtype) - truth).abs().max() * 1.01


def test_when_attention_goes_in_chunks(monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda dtype: True)
    monkeypatch.setattr(onednn, "gain", lambda: 2.3)
    assert cpu.attends_in_chunks(8192, FP32)
    assert not cpu.attends_in_chunks(2048, FP32)
    assert cpu.attends_in_chunks(2048, torch.bfloat16)
    assert not cpu.attends_in_chunks(512, torch.bfloat16)
    assert not cpu.attends_in_chunks(8192, torch.float64)
    monkeypatch.setattr(onednn, "gain", lambda: 1.2)
    assert not cpu.attends_in_chunks(8192, FP32)


# ---- where oneDNN is missing, wrong, or slow -----------------------------------------------------------------------


def missing(*_: object) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")


def failing(*_: object) -> torch.Tensor:
    raise RuntimeError("mkldnn: could not create a primitive")


@pytest.mark.parametrize("broken", [missing, failing])
@pytest.mark.parametrize("name", ["pack", "multiply"])
def test_a_torch_without_the_operators_falls_back_with_one_warning(
    make_checkpoint, forced, monkeypatch, unprobed, broken, name
):
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    monkeypatch.setattr(onednn, name, broken)
    with pytest.warns(UserWarning, match="no usable oneDNN linear") as caught:
        network, _ = ml.load_model(folder, device="cpu"), ml.load_model(folder, device="cpu")
    assert len(caught) == 1
    ids = token_ids(70)[0]
    got = network(ml.pack([ids]))
    with torch.inference_mode():
        assert (got - reference(ids[None]).last_hidden_state[0]).abs().max() <= 2e-5


@needs_onednn
def test_operators_that_give_other_numbers_are_left_alone(forced, monkeypatch, unprobed):
    right = onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *args: right(*args) * 1.01)
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert type(layer_of(randn(12, 16))) is Linear


@pytest.mark.parametrize("broken", [missing, failing, lambda *_: torch.zeros(3, 5)])
def test_an_int8_product_that_is_missing_or_wrong_is_made_dense_with_one_warning(monkeypatch, unprobed, broken):
    monkeypatch.setattr(onednn, "_int8_product", broken)
    weight, x = randn(12, 16), randn(5, 16, seed=1)
    with pytest.warns(UserWarning, match="int8 is slow here") as caught:
        quantized = [layer_of(weight, int8=True) for _ in range(2)]
    assert len(caught) == 1
    with torch.inference_mode():
        got = quantized[0](x)
    assert (got - F.linear(x, weight)).abs().max() < 0.2


@pytest.mark.parametrize(
    ("vendor", "ratio", "pays"),
    [("AuthenticAMD", 0.5, True), ("GenuineIntel", 1.0, False), ("GenuineIntel", 1.2, False), ("", 2.0, True)],
)
def test_fp32_is_packed_on_amd_and_elsewhere_where_it_measures_faster(monkeypatch, unprobed, vendor, ratio, pays):
    monkeypatch.setattr(onednn, "_cpu_vendor", lambda: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(onednn, "gain", lambda: ratio)
    monkeypatch.setattr(onednn, "works", lambda dtype: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn.pays(FP32) is pays


@needs_onednn
@pytest.mark.parametrize("around", ["float64 by default", "meta by default", "autocast", "inference mode"])
def test_what_is_around_a_probe_does_not_sway_it(monkeypatch, unprobed, around):
    answers = {
        "float64 by default": lambda: torch.set_default_dtype(torch.float64),
        "meta by default": lambda: torch.set_default_device("meta"),
    }
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"),
        torch.inference_mode(around == "inference mode"),
    ):
        try:
            answers.get(around, lambda: None)()
            assert onednn.works(FP32)
            assert onednn.works(torch.bfloat16) is BF16
            assert onednn.gain() > 0
            onednn.int8_works()
        finally:
            torch.set_default_dtype(FP32)
            torch.set_default_device(None)


def test_int8_without_the_mkldnn_operators(make_checkpoint, monkeypatch, unprobed):
    class Nothing:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    monkeypatch.setattr(torch.ops, "onednn", Nothing())
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    with pytest.warns(UserWarning, match="no usable oneDNN"):
        network = ml.load_model(folder, device="cpu", dtype="int8")
    ids = token_ids(70)[0]
    with torch.inference_mode():
        got, exact = network(ml.pack([ids])), reference(ids[None]).last_hidden_state[0]
    assert torch.cosine_similarity(got, exact).min() > 0.99


@needs_onednn
def test_the_gain_is_measured_in_a_few_milliseconds(unprobed):
    assert 0.1 < onednn.gain() < 10


def test_bf16_on_a_cpu_without_it_is_torch_s_own_with_one_warning(make_checkpoint, monkeypatch, unprobed):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.warns(UserWarning, match="this CPU has no fast bfloat16 products") as caught:
        networks = [ml.load_model(folder, device="cpu", dtype="bfloat16") for _ in range(2)]
    assert len(caught) == 1
    assert not is_packed(networks[0])
    assert networks[0](ml.pack(token_ids(70))).isfinite().all()


def test_without_avx512_everything_still_works():
    """A CPU of 2013, as far as oneDNN and torch play it: right, in fp32, bf16 and int8."""
    code = """
import warnings, torch, modernbert_lite as ml
warnings.simplefilter("ignore")
exact = ml.load_model("tiny", device="cpu", packed=False)
batch = ml.pack([list(range(5, 90)), [7, 8]])
with torch.inference_mode():
    for dtype, least in (("float32", 0.99999), ("bfloat16", 0.99), ("int8", 0.98)):
        got = ml.load_model("tiny", device="cpu", dtype=dtype)(batch).float()
        cosine = torch.cosine_similarity(got, exact(batch)).mean()
        assert cosine >= least, (dtype, cosine)
print("right")
"""
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "right", done.stderr
