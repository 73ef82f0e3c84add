"""Networks whose linear weights are packed, and their embedding table."""

import warnings

import pytest
import torch
from cpu_cases import BF16, FP32, SMALL_VOCAB, forced, int8, is_packed, layer, needs_onednn, token_ids, unprobed  # noqa: F401
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite.ops import onednn
from modernbert_lite.ops.linear import Int8Linear, Linear, PackedLinear

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

    for each in network.layers:
        each.register_forward_hook(keep)
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
