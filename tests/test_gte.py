"""The GTE v1.5 encoder and its heads: against transformers, against a plain function of the architecture where
transformers lacks a case, by every name that its tensors have in the wild, and end to end."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import modernbert_lite as ml
from modernbert_lite import CheckpointError, OptionError
from modernbert_lite.models.gte import Gte, GteMaskedLM, GteSequenceClassifier, GteTokenClassifier
from modernbert_lite.models.registry import architectures
from modernbert_lite.ops import onednn
from modernbert_lite.ops.linear import Int8Linear, Linear, PackedLinear

VOCAB = 997
LENGTHS = [65, 1, 130, 66, 66, 2, 31]
BASE, MASKED_LM = "GteModel", "GteForMaskedLM"
SEQUENCE, TOKEN = "GteForSequenceClassification", "GteForTokenClassification"
CLASSES = {BASE: Gte, MASKED_LM: GteMaskedLM, SEQUENCE: GteSequenceClassifier, TOKEN: GteTokenClassifier}
# Nothing is square by accident; wide weights, so that attention is sharp and a mistake shows.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "num_labels": 3,
}
HEADS_OF_64 = {"hidden_size": 128, "num_attention_heads": 2}


# --- checkpoints


MADE = {}


@pytest.fixture
def make(tmp_path, tmp_path_factory):
    """make(GteForMaskedLM, hidden_size=...) -> (folder, transformers' model saved in it), fixed random weights. The
    model is shared between tests. name: of the folder, for more than one in a test."""

    def make(architecture=BASE, *, name="checkpoint", **config):
        key = json.dumps([architecture, config], sort_keys=True)
        if key not in MADE:
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(transformers.GteConfig(**{**SMALL, **config})).eval()
            generator = torch.Generator().manual_seed(0)
            for part, parameter in model.named_parameters():
                if "norm" in part.lower() or part.endswith("bias"):  # away from 1 and 0: one left out shows
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            folder = tmp_path_factory.mktemp("made")
            model.save_pretrained(folder)
            MADE[key] = model.requires_grad_(False), config_of(folder), load_file(folder / "model.safetensors")
        model, raw, state = MADE[key]
        return write(tmp_path / name, raw, state), model

    return make


def write(folder, raw, *states):
    """A folder with a config and tensors, in as many files as there are states."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]  # none shares memory
    if len(states) == 1:
        save_file(states[0], folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for i, state in enumerate(states, 1):
        name = f"model-{i:05}-of-{len(states):05}.safetensors"
        save_file(state, folder / name)
        weight_map.update(dict.fromkeys(state, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def state_of(folder):
    return load_file(folder / "model.safetensors")


def as_new(folder, theta, scaling=None, **keys):
    """The config in Alibaba's own dialect, with the tensors as they are."""
    raw = config_of(folder)
    raw.pop("rope_parameters", None)
    names = [name.replace("Gte", "New") for name in raw["architectures"]]
    new = {"model_type": "new", "architectures": names, "rope_theta": theta, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps({**raw, **new, **keys}))
    return folder


def ntk(theta, factor, head_dim):
    """NTK as transformers' class has it."""
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}


def sequences(lengths=LENGTHS, seed=5, high=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(min(1, high - 1), high, (length,), generator=generator) for length in lengths]


def types_of(rows, types=2):
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, types, (len(row),), generator=generator) for row in rows]


def padded(rows):
    """(B, S), 0 where padded on the right, and the mask."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def expected_of(reference, rows, types=None):
    """transformers' result of a padded batch: hidden states or logits of the real tokens, or (B, labels)."""
    ids, mask = padded(rows)
    token_type_ids = None if types is None else padded(types)[0]
    with torch.inference_mode():
        out = reference(input_ids=ids, attention_mask=mask, token_type_ids=token_type_ids)
    values = out.last_hidden_state if type(reference).__name__ == BASE else out.logits
    return values if type(reference).__name__ == SEQUENCE else values[mask.bool()]


def difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def assert_equal(got, expected):
    # 2e-5 on values of order 1-10; logits are sums of a whole row of such values, and rounding grows with them: only
    # beyond 10 is the bound relative to the largest.
    largest = expected.abs().max().item()
    assert largest > 0.1
    assert difference(got, expected) <= (2e-5 if largest <= 10 else 2e-5 * largest)


# --- equal to transformers


VARIATIONS = {
    "plain": {},
    "one layer": {"num_hidden_layers": 1},
    "heads of 64": HEADS_OF_64,
    "heads of 26": {"hidden_size": 78},
    "no types": {"type_vocab_size": 0},
    "two types": {"type_vocab_size": 2},
    "silu": {"hidden_act": "silu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "large eps": {"layer_norm_eps": 0.05},
    "theta 500": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_ragged_batches_equal_transformers(make, architecture, attn):
    folder, reference = make(architecture)
    reference.set_attn_implementation(attn)
    rows = sequences()
    expected = expected_of(reference, rows)
    model = ml.load_model(folder)
    assert type(model) is CLASSES[architecture]
    assert_equal(model(ml.pack(rows)), expected)
    ids, mask = padded(rows)
    assert_equal(model(ml.from_padded(ids, mask)), expected)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_config_variation_equals_transformers(make, variation):
    folder, reference = make(**VARIATIONS[variation])
    rows = sequences()
    assert_equal(ml.load_model(folder)(ml.pack(rows)), expected_of(reference, rows))


@pytest.mark.parametrize(
    "change", [{"hidden_act": "silu"}, {"layer_norm_eps": 0.05}, {"rope_parameters": None}], ids=str
)
def test_a_config_variation_that_is_ignored_would_show(make, change):
    folder, reference = make(rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0})
    rows = sequences()
    write(folder, {**config_of(folder), "rope_theta": 160000.0, **change}, state_of(folder))
    assert difference(ml.load_model(folder)(ml.pack(rows)), expected_of(reference, rows)) > 2e-3


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize("sizes", [{}, HEADS_OF_64], ids=["heads of 32", "heads of 64"])
def test_ntk_equals_transformers_linear_form_of_it(make, factor, sizes):
    head_dim = 64 if sizes else 32
    folder, reference = make(rope_parameters=ntk(20_000.0, factor, head_dim), **sizes)
    rows = sequences()
    expected = expected_of(reference, rows)
    assert_equal(ml.load_model(folder)(ml.pack(rows)), expected)  # as transformers writes it
    as_new(folder, 20000, {"type": "ntk", "factor": factor})
    assert_equal(ml.load_model(folder)(ml.pack(rows)), expected)  # as Alibaba did
    as_new(folder, 20000)
    assert difference(ml.load_model(folder)(ml.pack(rows)), expected) > 2e-3  # left out it shows


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("given", [False, True])
def test_two_token_types_equal_transformers(make, architecture, given):
    folder, reference = make(architecture, type_vocab_size=2)
    rows = sequences()
    types = types_of(rows) if given else None
    expected = expected_of(reference, rows, types)
    model = ml.load_model(folder)
    assert_equal(model(ml.pack(rows, token_type_ids=types)), expected)
    ids, mask = padded(rows)
    assert_equal(model(ml.from_padded(ids, mask, padded(types)[0] if given else None)), expected)
    if given:
        assert difference(model(ml.pack(rows)), expected) > 0.01


@pytest.mark.parametrize("rows_of_types", [0, 1])
def test_fewer_token_types_are_ignored(make, rows_of_types):
    folder, reference = make(type_vocab_size=rows_of_types)
    rows = sequences()
    model = ml.load_model(folder)
    got = model(ml.pack(rows, token_type_ids=types_of(rows, 5)))
    assert torch.equal(got, model(ml.pack(rows)))
    assert_equal(got, expected_of(reference, rows))


def test_the_one_row_of_types_is_added(make):
    folder, _ = make()
    rows = sequences()
    before = ml.load_model(folder)(ml.pack(rows))
    state = state_of(folder)
    state["embeddings.token_type_embeddings.weight"] = -state["embeddings.token_type_embeddings.weight"]
    write(folder, config_of(folder), state)
    assert difference(ml.load_model(folder)(ml.pack(rows)), before) > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_masked_lm_tied_and_not_equals_transformers(make, tied):
    folder, reference = make(MASKED_LM, tie_word_embeddings=tied)
    assert ("lm_head.decoder.weight" in state_of(folder)) is not tied
    model = ml.load_model(folder)
    assert (model.lm_head.decoder.weight is model.model.embeddings.word_embeddings.weight) is tied
    assert torch.equal(model.lm_head.decoder.weight, reference.lm_head.decoder.weight)
    rows = sequences()
    assert_equal(model(ml.pack(rows)), expected_of(reference, rows))


def test_masked_lm_positions_gives_those_rows_of_all_logits(make):
    folder, reference = make(MASKED_LM)
    batch = ml.pack(sequences())
    positions = torch.tensor([0, 64, 65, 66, 195, 3, 3, len(batch.input_ids) - 1])
    assert_equal(ml.load_model(folder)(batch, positions), expected_of(reference, sequences())[positions])


def test_the_head_of_alibaba_s_masked_lm_has_the_encoder_s_activation(make):
    """transformers' own doesn't, as the next test shows."""
    folder, _ = make(MASKED_LM, hidden_act="silu")
    as_new(folder, 160000)
    rows = sequences([31, 1, 65])
    got = ml.load_model(folder)(ml.pack(rows))
    state = {name.removeprefix("gte."): tensor.double() for name, tensor in state_of(folder).items()}
    head = {name.removeprefix("lm_head."): tensor for name, tensor in state.items() if name.startswith("lm_head.")}
    x = torch.cat([plain(config_of(folder), state, row) for row in rows])
    x = F.silu(F.linear(x, head["dense.weight"], head["dense.bias"]))
    x = F.layer_norm(x, (96,), head["norm.weight"], head["norm.bias"], 1e-12)
    assert_equal(got, F.linear(x, state["embeddings.word_embeddings.weight"], head["decoder.bias"]))


def test_the_head_of_transformers_masked_lm_has_gelu(make):
    folder, reference = make(MASKED_LM, hidden_act="silu")
    rows = sequences([31, 1, 65])
    assert_equal(ml.load_model(folder)(ml.pack(rows)), expected_of(reference, rows))


@pytest.mark.parametrize("labels", [1, 5])
@pytest.mark.parametrize("architecture", [SEQUENCE, TOKEN])
def test_classifiers_equal_transformers(make, architecture, labels):
    folder, reference = make(architecture, num_labels=labels)
    rows = sequences()
    got = ml.load_model(folder)(ml.pack(rows))
    assert got.shape == (len(rows) if architecture == SEQUENCE else sum(LENGTHS), labels)
    assert_equal(got, expected_of(reference, rows))


@pytest.mark.parametrize("backend", ["torch", "onednn", "triton"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_every_backend_equals_transformers(make, monkeypatch, architecture, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    if backend == "triton":  # in its interpreter, which is slow
        pytest.importorskip("triton")
        sizes, rows = {"num_hidden_layers": 2, "type_vocab_size": 2}, sequences([5, 66, 1])
    else:
        sizes, rows = {"type_vocab_size": 2}, sequences()
    folder, reference = make(architecture, **sizes)
    types = types_of(rows)
    got = ml.load_model(folder)(ml.pack(rows, token_type_ids=types))
    assert_equal(got, expected_of(reference, rows, types))


def test_real_size_layers_equal_transformers(make):
    """gte-multilingual-base's width and NTK, with fewer layers and words."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 2}
    folder, reference = make(**sizes, initializer_range=0.02, rope_parameters=ntk(20_000.0, 8.0, 64))
    as_new(folder, 20000, {"type": "ntk", "factor": 8.0})
    rows = sequences([65, 1, 130])
    assert_equal(ml.load_model(folder)(ml.pack(rows)), expected_of(reference, rows))


# --- other dtypes


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_transformers(make, monkeypatch, architecture, dtype, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, reference = make(architecture)
    rows = sequences()
    exact = expected_of(reference, rows)
    theirs = expected_of(copy.deepcopy(reference).to(dtype), rows).float()
    got = ml.load_model(folder, dtype=dtype)(ml.pack(rows))
    assert got.dtype == dtype
    assert difference(got, exact) <= 2 * difference(theirs, exact) + 1e-6


def in_8_bits(layer):
    """A plain Linear with weights and inputs in 8 bits, a scale a row each: what int8 means, in the plainest way."""

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round() * scale

    weight = rounded(layer.weight)
    layer.forward = lambda x: F.linear(rounded(x), weight, layer.bias)


@pytest.mark.parametrize("architecture", CLASSES)
def test_int8_is_as_near_to_fp32_as_plain_8_bits(make, architecture):
    folder, reference = make(architecture)
    rows = sequences()
    exact = expected_of(reference, rows)
    rough = copy.deepcopy(reference)
    for name, layer in rough.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            in_8_bits(layer)
    theirs = expected_of(rough, rows)
    model = ml.load_model(folder, device="cpu", dtype="int8")
    got = model(ml.pack(rows))
    assert difference(theirs, exact) > 1e-3
    assert difference(got, exact) <= 2 * difference(theirs, exact) + 1e-6
    small = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert len(small) == 4 * SMALL["num_hidden_layers"]


def test_int8_of_split_and_packed_tensors_is_the_same(make):
    folder, _ = make()
    rows = sequences()
    packed = ml.load_model(folder, device="cpu", dtype="int8")(ml.pack(rows))
    write(folder, config_of(folder), split(state_of(folder)))
    assert torch.equal(ml.load_model(folder, device="cpu", dtype="int8")(ml.pack(rows)), packed)


# --- packing


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_packed_equals_one_by_one(make, monkeypatch, architecture, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make(architecture, type_vocab_size=2)
    model = ml.load_model(folder)
    rows = sequences()
    types = types_of(rows)
    together = model(ml.pack(rows, token_type_ids=types))
    alone = torch.cat([model(ml.pack([row], token_type_ids=[kind])) for row, kind in zip(rows, types, strict=True)])
    # Logits of a whole vocabulary are larger than hidden states.
    assert difference(together, alone) <= 1e-5 * max(1.0, together.abs().max().item() / 10)


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("variant", ["plain", "rms_norm", "absolute"])
def test_rows_gives_those_rows_of_everything(make, monkeypatch, backend, dtype, variant):
    """What a CLS-pooled embedder runs, and any other row of each sequence."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make()
    vary(folder, variant)
    model = ml.load_model(folder, device="cpu", dtype=dtype)
    batch = ml.pack(sequences())
    everything = model(batch)
    starts = batch.cu_seqlens[:-1].long()
    for rows in (starts, starts + torch.tensor(LENGTHS) // 2, batch.cu_seqlens[1:].long() - 1):
        got, expected = model(batch, rows), everything[rows]
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        if dtype == "float32":
            assert difference(got, expected) <= 1e-5
        cosines = torch.cosine_similarity(got.double(), expected.double())
        assert cosines.min() >= {"float32": 1 - 1e-9, "int8": 0.99}.get(dtype, 0.999)


@pytest.mark.parametrize("variant", ["plain", "absolute"])
def test_rows_on_triton(make, monkeypatch, variant):
    pytest.importorskip("triton")
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    folder, _ = make(num_hidden_layers=2)
    model = ml.load_model(vary(folder, variant))
    batch = ml.pack(sequences([9, 1, 17]))
    rows = torch.tensor([3, 9, 26])
    assert difference(model(batch, rows), model(batch)[rows]) <= 1e-5


def test_rows_must_be_one_a_sequence(make):
    model = ml.load_model(make()[0])
    with pytest.raises(ValueError, match=r"rows is \(3,\); it must be \(2,\)"):
        model(ml.pack(sequences([5, 6])), torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="takes a PackedBatch, not Tensor"):
        model(torch.tensor([[1, 2]]))


def test_a_sequence_does_not_see_its_neighbours(make):
    model = ml.load_model(make()[0])
    rows = sequences([66, 130, 66, 5])
    before = model(ml.pack(rows)).split([66, 130, 66, 5])
    others = [sequences([66], 77)[0], *rows[1:]]
    after = model(ml.pack(others)).split([66, 130, 66, 5])
    assert difference(before[0], after[0]) > 0.1
    for a, b in zip(before[1:], after[1:], strict=True):
        assert difference(a, b) <= 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_make_a_round_trip(make, side):
    folder, reference = make(type_vocab_size=2)
    rows = sequences()
    types = types_of(rows)
    ids, mask = padded(rows)
    kinds = padded(types)[0]
    if side == "left":
        flipped = [padded([row.flip(0) for row in part])[0].flip(1) for part in (rows, types)]
        (ids, kinds), mask = flipped, mask.flip(1)
    got = ml.load_model(folder)(ml.from_padded(ids, mask, token_type_ids=kinds))
    expected = expected_of(reference, rows, types)
    assert_equal(got, expected)
    back = ml.to_padded(got, mask, value=7.0)
    assert torch.equal(back[mask.bool()], got)
    assert (back[~mask.bool()] == 7.0).all()


@pytest.mark.parametrize("variant", ["plain", "rms_norm", "absolute"])
def test_empty_batches_and_empty_sequences(make, variant):
    folder, _ = make()
    vary(folder, variant)
    model = ml.load_model(folder)
    assert model(ml.pack([])).shape == (0, 96)
    assert model(ml.pack([[], []])).shape == (0, 96)
    assert model(ml.pack([[], []], token_type_ids=[[], []])).shape == (0, 96)
    rows = sequences([0, 3, 0, 0, 66, 0])
    alone = torch.cat([model(ml.pack([row])) for row in rows if len(row)])
    assert difference(model(ml.pack(rows)), alone) <= 1e-5


def test_heads_of_an_empty_batch(make):
    assert ml.load_model(make(MASKED_LM, name="mlm")[0])(ml.pack([])).shape == (0, VOCAB)
    assert ml.load_model(make(SEQUENCE, name="sequence")[0])(ml.pack([])).shape == (0, 3)
    assert ml.load_model(make(TOKEN, name="token")[0])(ml.pack([])).shape == (0, 3)


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
@pytest.mark.parametrize("architecture", [BASE, SEQUENCE])
def test_gradients_equal_transformers(make, monkeypatch, architecture, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, shared = make(architecture, type_vocab_size=2)
    model = ml.load_model(folder, packed=False).requires_grad_(True)
    reference = copy.deepcopy(shared).requires_grad_(True)
    rows = sequences([66, 3])
    types = types_of(rows)
    got = model(ml.pack(rows, token_type_ids=types))
    (got * torch.linspace(-1, 1, got.numel()).view(got.shape)).sum().backward()
    ids, mask = padded(rows)
    out = reference(input_ids=ids, attention_mask=mask, token_type_ids=padded(types)[0])
    theirs = out.logits if architecture == SEQUENCE else out.last_hidden_state[mask.bool()]
    (theirs * torch.linspace(-1, 1, got.numel()).view(got.shape)).sum().backward()
    right = {name.removeprefix("gte."): p.grad for name, p in reference.named_parameters()}
    ours = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    ours = native(split(ours))
    assert ours.keys() == right.keys()
    for name, gradient in ours.items():
        # Sums over all tokens, so larger than hidden states: relative to the largest.
        assert difference(gradient, right[name]) <= 2e-5 * max(1.0, right[name].abs().max().item()), name


# --- by every name that a tensor has


def split(state):
    """Packed projections in their parts."""
    parts = {}
    for name, tensor in state.items():
        if ".qkv_proj." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                parts[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif ".up_gate_proj." in name:
            up, gate = tensor.chunk(2)
            parts[name.replace("up_gate_proj", "up_proj")] = up
            parts[name.replace("up_gate_proj", "gate_proj")] = gate
        else:
            parts[name] = tensor
    return parts


NATIVE = (
    ("encoder.layer.", "layers."),
    (".attention.", ".self_attn."),
    ("attn_ln", "post_attention_layernorm"),
    ("mlp_ln", "post_mlp_layernorm"),
    ("lm_head.norm", "lm_head.layer_norm"),
)


def native(state):
    """The names of the modules of transformers' class."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in NATIVE:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def prefixed(state, prefix, head=""):
    """From any prefix to this one; head: that of what stands on the encoder."""
    bare = {name.removeprefix("gte."): tensor for name, tensor in state.items()}
    return {(head if name.startswith(HEADS) else prefix) + name: tensor for name, tensor in bare.items()}


HEADS = ("lm_head.", "classifier.")
FORMS = {"packed": lambda state: state, "split": split, "native": lambda state: native(split(state))}


def test_the_native_form_is_that_of_transformers_modules(make):
    folder, reference = make(SEQUENCE)
    assert set(native(split(state_of(folder)))) == set(reference.state_dict())


@pytest.mark.parametrize("prefix", ["", "new.", "gte.", "new.gte.", "model."])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", CLASSES)
def test_every_prefix_and_form_is_read(make, architecture, form, prefix):
    folder, _ = make(architecture)
    rows = sequences([31, 1, 66])
    state = state_of(folder)
    expected = ml.load_model(folder)(ml.pack(rows))
    write(folder, config_of(folder), FORMS[form](prefixed(state, prefix)))
    assert difference(ml.load_model(folder)(ml.pack(rows)), expected) <= 1e-6
    if prefix == "new.gte.":  # as transformers writes a head that it read from Alibaba's file
        write(folder, config_of(folder), FORMS[form](prefixed(state, prefix, head="new.")))
        assert difference(ml.load_model(folder)(ml.pack(rows)), expected) <= 1e-6


def test_a_base_network_has_the_names_of_the_checkpoint(make):
    folder, _ = make(type_vocab_size=2)
    state = ml.load_model(folder, packed=False).state_dict()
    assert set(state) == set(state_of(folder))
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(folder).items())


@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_writes_for_a_file_of_alibaba_s_is_read(make, tmp_path, architecture):
    """It strips `new.`, and puts it back before the names of its own modules."""
    folder, _ = make(architecture)
    rows = sequences([31, 1, 66])
    expected = ml.load_model(folder)(ml.pack(rows))
    write(folder, config_of(folder), prefixed(state_of(folder), "new."))
    again = tmp_path / "again"
    getattr(transformers, architecture).from_pretrained(folder).save_pretrained(again)
    assert any(name.startswith("new.") for name in state_of(again))
    assert difference(ml.load_model(again)(ml.pack(rows)), expected) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "new.", "gte.", "new.gte."])
@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
def test_a_head_s_file_opens_as_an_encoder(make, architecture, prefix, form):
    folder, reference = make(architecture)
    rows = sequences([31, 1, 66])
    state = FORMS[form](prefixed(state_of(folder), prefix))
    write(folder, {**config_of(folder), "architectures": ["NewModel"]}, state)
    model = ml.load_model(folder)
    assert type(model) is Gte
    assert_equal(model(ml.pack(rows)), expected_of(reference.gte, rows))


@pytest.mark.parametrize("prefix", ["", "new.", "gte."])
@pytest.mark.parametrize("architecture", [BASE, MASKED_LM, TOKEN])
def test_a_pooler_that_nothing_asks_for_is_left_out(make, architecture, prefix):
    folder, _ = make(architecture)
    rows = sequences([31, 1, 66])
    expected = ml.load_model(folder)(ml.pack(rows))
    state = prefixed(state_of(folder), prefix)
    state[f"{prefix}pooler.dense.weight"], state[f"{prefix}pooler.dense.bias"] = torch.ones(96, 96), torch.ones(96)
    write(folder, config_of(folder), state)
    model = ml.load_model(folder)
    assert not any("pooler" in name for name in model.state_dict())
    assert difference(model(ml.pack(rows)), expected) <= 1e-6


def test_a_classifier_beside_a_bare_encoder_is_left_out(make):
    """gte-multilingual-base: `new.` before the encoder's names, and a weight for each token."""
    folder, _ = make(num_labels=1)
    rows = sequences([31, 1, 66])
    expected = ml.load_model(folder)(ml.pack(rows))
    state = {
        **prefixed(state_of(folder), "new."),
        "classifier.weight": torch.ones(1, 96),
        "classifier.bias": torch.ones(1),
    }
    as_new(write(folder, config_of(folder), state), 160000, architectures=["NewModel", "NewForTokenClassification"])
    model = ml.load_model(folder)
    assert type(model) is Gte
    assert difference(model(ml.pack(rows)), expected) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_put_together(make, form):
    """Also where the parts of one projection are in different files."""
    folder, _ = make(MASKED_LM)
    rows = sequences([31, 1, 66])
    expected = ml.load_model(folder)(ml.pack(rows))
    state = FORMS[form](prefixed(state_of(folder), "new."))
    names = sorted(state)
    shards = [{name: state[name] for name in names[i::3]} for i in range(3)]
    write(folder, config_of(folder), *shards)
    assert not (folder / "model.safetensors").exists()
    assert difference(ml.load_model(folder)(ml.pack(rows)), expected) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits(make, form, stored):
    folder, reference = make(MASKED_LM)
    rows = sequences([31, 1, 66])
    narrow = {name: tensor.to(stored) for name, tensor in state_of(folder).items()}
    write(folder, config_of(folder), FORMS[form](prefixed(narrow, "new.")))
    rounded = copy.deepcopy(reference)
    for parameter in rounded.parameters():  # (and not the frequencies)
        parameter.data = parameter.to(stored).float()
    got = ml.load_model(folder, dtype="float32")(ml.pack(rows))
    assert got.dtype == torch.float32
    assert_equal(got, expected_of(rounded, rows))


def test_every_architecture_s_name_gives_its_network():
    for ours, network in CLASSES.items():
        assert architectures()[ours] is architectures()[ours.replace("Gte", "New")] is network


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_loaded_network_is_frozen_and_packed_where_that_is_asked(make, monkeypatch, architecture):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")
    folder, _ = make(architecture)
    model = ml.load_model(folder, device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    assert len(layers) >= 4 * SMALL["num_hidden_layers"]
    if onednn.works(torch.float32):
        assert all(isinstance(layer, PackedLinear) for layer in layers)
    plain = ml.load_model(folder, device="cpu", packed=False)
    assert not any(isinstance(layer, PackedLinear) for layer in plain.modules())


# --- what transformers lacks, against a plain function of the architecture


def plain(raw, weights, ids, types=None):
    """The encoder, one sequence, in float64: (S,) ids -> (S, C). weights: float64, packed, without a prefix."""
    C, heads, eps = raw["hidden_size"], raw["num_attention_heads"], raw.get("layer_norm_eps", 1e-12)
    S, D = len(ids), C // heads

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name):
        if raw.get("layer_norm_type") == "rms_norm":
            return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def inverse_frequencies():
        theta, scaling = raw.get("rope_theta", 10000.0), raw.get("rope_scaling") or {}
        j = torch.arange(D // 2, dtype=torch.float64)
        if not scaling:
            return theta ** (-2 * j / D)
        factor = scaling["factor"]
        return (theta * factor) ** (-2 * j / D) / factor ** (2 / D)

    x = weights["embeddings.word_embeddings.weight"][ids]
    if raw.get("type_vocab_size", 1):
        x = x + weights["embeddings.token_type_embeddings.weight"][0 if types is None else types]
    absolute = raw.get("position_embedding_type") == "absolute"
    if absolute:
        x = x + weights["embeddings.position_embeddings.weight"][:S]
    x = F.layer_norm(x, (C,), weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"], eps)
    angles = torch.arange(S, dtype=torch.float64)[:, None] * inverse_frequencies()
    turn = torch.polar(torch.ones_like(angles), angles)
    act = {"gelu": F.gelu, "silu": F.silu}[raw["hidden_act"]]

    for i in range(raw["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = linear(x, f"{layer}.attention.qkv_proj").view(S, 3, heads, D).permute(1, 2, 0, 3)  # (H, S, D) each
        if not absolute:  # pair j is (j, j + D / 2), a complex number
            q, k = (torch.complex(y[..., : D // 2], y[..., D // 2 :]) * turn for y in (q, k))
            q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
        weight = (q @ k.mT / math.sqrt(D)).softmax(-1)
        seen = (weight @ v).transpose(0, 1).reshape(S, C)
        x = norm(x + linear(seen, f"{layer}.attention.o_proj"), f"{layer}.attn_ln")
        up, gate = linear(x, f"{layer}.mlp.up_gate_proj").chunk(2, -1)
        x = norm(x + linear(act(gate) * up, f"{layer}.mlp.down_proj"), f"{layer}.mlp_ln")
    return x


def plainly(folder, rows, types=None):
    weights = {name: tensor.double() for name, tensor in state_of(folder).items()}
    kinds = types or [None] * len(rows)
    return torch.cat([plain(config_of(folder), weights, *pair) for pair in zip(rows, kinds, strict=True)])


def vary(folder, variant, **keys):
    """The same weights in a variant that only Alibaba's code has."""
    state, raw = state_of(folder), {}
    if variant == "rms_norm":
        raw = {"layer_norm_type": "rms_norm"}
        state = {name: tensor for name, tensor in state.items() if not name.endswith("_ln.bias")}
    elif variant == "absolute":
        raw = {"position_embedding_type": "absolute", "max_position_embeddings": 200}
        generator = torch.Generator().manual_seed(4)
        width = config_of(folder)["hidden_size"]
        state["embeddings.position_embeddings.weight"] = torch.randn(200, width, generator=generator) * 0.1
    write(folder, config_of(folder), state)
    return as_new(folder, 20000, **{**raw, **keys})


@pytest.mark.parametrize("types", [0, 1, 2])
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_plain_function_equals_transformers(make, types, act):
    """So that what it says of the other variants means something."""
    folder, reference = make(type_vocab_size=types, hidden_act=act, rope_parameters=ntk(20_000.0, 8.0, 32))
    as_new(folder, 20000, {"type": "ntk", "factor": 8.0})
    rows = sequences()
    kinds = types_of(rows) if types == 2 else None
    assert_equal(expected_of(reference, rows, kinds), plainly(folder, rows, kinds))


LACKING = {
    "clip1 without logn": ("plain", {"logn_attention_clip1": True}),
    "rms_norm": ("rms_norm", {}),
    "rms_norm, large eps": ("rms_norm", {"layer_norm_eps": 0.05}),
    "absolute": ("absolute", {}),
}


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("case", LACKING)
def test_what_transformers_lacks_equals_the_plain_function(make, monkeypatch, case, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    variant, keys = LACKING[case]
    folder, _ = make(type_vocab_size=2)
    rows = sequences()
    types = types_of(rows)
    before = plainly(as_new(folder, 20000), rows, types)
    vary(folder, variant, **keys)
    expected = plainly(folder, rows, types)
    assert_equal(ml.load_model(folder)(ml.pack(rows, token_type_ids=types)), expected)
    if case != "clip1 without logn":
        assert difference(expected, before) > 1e-3  # it does something


@pytest.mark.parametrize("variant", ["rms_norm", "absolute"])
def test_what_transformers_lacks_runs_on_triton(make, monkeypatch, variant):
    pytest.importorskip("triton")
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    folder, _ = make(num_hidden_layers=2)
    vary(folder, variant)
    rows = sequences([5, 66, 1])
    assert_equal(ml.load_model(folder)(ml.pack(rows)), plainly(folder, rows))


@pytest.mark.parametrize("variant", ["rms_norm", "absolute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_transformers_lacks_in_half_precision(make, variant, dtype):
    folder, _ = make()
    vary(folder, variant)
    batch = ml.pack(sequences())
    got, exact = ml.load_model(folder, dtype=dtype)(batch), ml.load_model(folder)(batch)
    assert got.dtype == dtype
    assert torch.cosine_similarity(got.double(), exact.double()).min() >= 0.999


def test_absolute_positions_start_anew_in_each_sequence_and_nothing_is_turned(make):
    folder, _ = make()
    model = ml.load_model(vary(folder, "absolute"))
    row = sequences([31])[0]
    once, twice = model(ml.pack([row])), model(ml.pack([row, row]))
    assert difference(twice[:31], once) <= 1e-5
    assert difference(twice[31:], once) <= 1e-5
    raw = config_of(folder)
    write(folder, {**raw, "rope_theta": 10.0, "rope_scaling": {"type": "ntk", "factor": 50.0}}, state_of(folder))
    assert torch.equal(ml.load_model(folder)(ml.pack([row])), once)


# --- bad input


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        ml.load_model(folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_missing_tensor_is_named(make, architecture, form):
    folder, _ = make(architecture)
    state = FORMS[form](prefixed(state_of(folder), "new."))
    names = [name for name in state if ".1." in name or not re.search(r"\.\d\.", name)]
    for name in names[::2]:
        write(folder, config_of(folder), {key: tensor for key, tensor in state.items() if key != name})
        last_parts = name.split(".")[-2:]
        with pytest.raises(CheckpointError, match="missing") as caught:
            ml.load_model(folder)
        message = str(caught.value)
        assert last_parts[1] in message
        if form == "packed":
            assert ".".join(last_parts) in message
        else:  # by its own name, or by that of the tensor that it is a part of
            whole = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "up_proj": "up_gate", "gate_proj": "up_gate"}
            renamed = {"post_attention_layernorm": "attn_ln", "post_mlp_layernorm": "mlp_ln", "layer_norm": "norm"}
            part = last_parts[0]
            assert any(p in message for p in (part, whole.get(part, part), renamed.get(part, part)))


@pytest.mark.parametrize(
    "name",
    ["new.encoder.layer.1.attention.extra.weight", "new.encoder.layer.3.mlp.down_proj.bias", "new.surprise", "bare"],
)
def test_an_unexpected_tensor_is_named(make, name):
    folder, _ = make()
    state = {**prefixed(state_of(folder), "new."), name: torch.ones(96)}
    refused(write(folder, config_of(folder), state), "unexpected", name)


@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
def test_another_head_s_tensor_is_unexpected_in_a_head(make, architecture):
    folder, _ = make(architecture)
    name = "classifier.weight" if architecture == MASKED_LM else "lm_head.dense.weight"
    refused(write(folder, config_of(folder), {**state_of(folder), name: torch.ones(3, 96)}), "unexpected", name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "encoder.layer.1.attention.qkv_proj.weight",
        "encoder.layer.1.attention.qkv_proj.bias",
        "encoder.layer.1.mlp.up_gate_proj.weight",
        "encoder.layer.0.attn_ln.bias",
    ],
)
def test_a_wrong_shape_is_named_with_what_is_asked_for(make, name, form):
    folder, _ = make()
    state = state_of(folder)
    state = FORMS[form](state)
    key = next(iter(FORMS[form]({name: torch.ones(6)})))  # the first part of it
    right = state[key].shape
    state[key] = torch.ones(right[0] + 2, *right[1:])
    # The shape of the part, or of the whole that it belongs to.
    refused(write(folder, config_of(folder), state), key, "shape")


def test_more_type_rows_than_the_config_says_are_a_wrong_shape(make):
    folder, _ = make(type_vocab_size=2)
    raw = {**config_of(folder), "type_vocab_size": 1}
    refused(write(folder, raw, state_of(folder)), "embeddings.token_type_embeddings.weight", "(2, 96)", "(1, 96)")
    raw["type_vocab_size"] = 0
    refused(write(folder, raw, state_of(folder)), "unexpected", "embeddings.token_type_embeddings.weight")


def test_a_mixture_of_prefixes_names_both_and_what_is_accepted(make):
    folder, _ = make()
    state = prefixed(state_of(folder), "new.")
    odd = "encoder.layer.1.attention.o_proj.weight"
    state[odd] = state.pop(f"new.{odd}")
    write(folder, config_of(folder), state)
    with pytest.raises(CheckpointError) as caught:
        ml.load_model(folder)
    message = str(caught.value)
    assert re.search(rf"(?<!new\.){re.escape(odd)}", message)
    assert "new.e" in message  # a key that has the prefix
    for prefix in ("new.", "gte.", "new.gte.", "model."):
        assert prefix in message


def test_a_projection_that_is_packed_and_split_is_refused(make):
    folder, _ = make()
    both = {**split(state_of(folder)), **state_of(folder)}
    refused(write(folder, config_of(folder), both), "encoder.layer.0.attention.q")

    half = state_of(folder)
    name = "encoder.layer.1.attention.qkv_proj.weight"
    for part, rows in zip("qkv", half[name].chunk(3), strict=True):
        half[name.replace("qkv_proj", f"{part}_proj")] = rows
    refused(write(folder, config_of(folder), half), "encoder.layer.1.attention.q", "qkv_proj.weight")


def test_the_same_tensor_by_two_names_is_refused(make):
    folder, _ = make()
    state = state_of(folder)
    one, other = "encoder.layer.0.attn_ln.weight", "encoder.layer.0.post_attention_layernorm.weight"
    refused(write(folder, config_of(folder), {**state, other: state[one]}), one, other)


def test_tied_weights_that_differ_are_named(make):
    folder, _ = make(MASKED_LM)
    table = state_of(folder)["gte.embeddings.word_embeddings.weight"]
    rows = sequences([31])
    expected = ml.load_model(folder)(ml.pack(rows))
    for prefix, head in (("gte.", ""), ("new.", ""), ("new.gte.", "new.")):
        state = {**state_of(folder), "lm_head.decoder.weight": table.clone()}
        same = write(folder.parent / "same", config_of(folder), prefixed(state, prefix, head))
        assert difference(ml.load_model(same)(ml.pack(rows)), expected) <= 1e-6
        state["lm_head.decoder.weight"][5, 5] += 1
        other = write(folder.parent / "other", config_of(folder), prefixed(state, prefix, head))
        refused(other, "lm_head.decoder.weight", "tie_word_embeddings")


def test_untied_the_decoder_s_weight_must_be_there(make):
    folder, _ = make(MASKED_LM)
    write(folder, {**config_of(folder), "tie_word_embeddings": False}, state_of(folder))
    refused(folder, "missing", "lm_head.decoder.weight")


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_token_outside_the_vocabulary_is_refused(make, architecture):
    model = ml.load_model(make(architecture)[0])
    with pytest.raises(ValueError, match=r"token id 997 is outside the vocabulary \(ids 0 to 996\)"):
        model(ml.pack([[1, 997]]))


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_token_type_outside_the_table_is_refused(make, architecture):
    model = ml.load_model(make(architecture, type_vocab_size=2)[0])
    with pytest.raises(ValueError, match=r"token type 2 .*0 to 1"):
        model(ml.pack([[1, 5], [3]], token_type_ids=[[0, 1], [2]]))
    model(ml.pack([[1, 5], [3]], token_type_ids=[[0, 1], [1]]))


def test_token_types_must_fit_the_sequences():
    with pytest.raises(ValueError, match=r"token_type_ids"):
        ml.pack([[1, 5], [3]], token_type_ids=[[0, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"token_type_ids"):
        ml.pack([[1, 5], [3]], token_type_ids=[[0], [0, 0]])
    with pytest.raises(ValueError, match=r"token_type_ids"):
        ml.pack([[1, 5], [3]], token_type_ids=[[0, 1]])
    with pytest.raises(ValueError, match=r"token_type_ids of sequence 1 .*-1"):
        ml.pack([[1, 5], [3]], token_type_ids=[[0, 1], [-1]])
    with pytest.raises(ValueError, match=r"token_type_ids"):
        ml.pack([[1, 5]], token_type_ids=[[0.5, 1.0]])
    with pytest.raises(ValueError, match=r"token_type_ids \(2, 2\)"):
        ml.from_padded(torch.ones(2, 3, dtype=torch.int64), token_type_ids=torch.ones(2, 2, dtype=torch.int64))


def test_a_sequence_longer_than_the_table_of_positions_is_refused(make):
    model = ml.load_model(vary(make()[0], "absolute"))
    model(ml.pack(sequences([200])))
    with pytest.raises(ValueError, match=r"201 tokens.*200"):
        model(ml.pack(sequences([5, 201])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "encoder.layer.1.attention.qkv_proj.weight",
        "encoder.layer.2.mlp.up_gate_proj.weight",
        "encoder.layer.0.attn_ln.bias",
    ],
)
@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_a_number_that_is_none_shows_in_results(make, monkeypatch, name, form, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make()
    state = state_of(folder)
    state[name][-1:] = math.nan
    state = FORMS[form](state)
    network = ml.load_model(write(folder, config_of(folder), state))
    assert not network(ml.pack([[5, network.config.vocab_size - 1, 7]])).isfinite().all()


def test_an_unknown_head_is_refused_by_name(make):
    folder, _ = make()
    write(folder, {**config_of(folder), "architectures": ["NewForQuestionAnswering"]}, state_of(folder))
    refused(folder, "'NewForQuestionAnswering' is not supported", "NewForMaskedLM", "GteModel")


# --- end to end


WORDS = ["the", "a", "cat", "sat", "on", "mat", "dog", "runs", "in", "park", "is", "what", "small", "animal", "?"]
WORDS += ["capital", "of", "france", "paris", "berlin"]


def word_piece(folder):
    """A BERT tokenizer, uncased, with the pair's second text of type 1."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *WORDS]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return save_tokenizer(folder, made, names)


def unigram(folder):
    """An XLM-R tokenizer: Unigram, two separators between the texts of a pair, all types 0."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>", "bos": "<s>", "eos": "</s>"}
    return save_tokenizer(folder, made, names)


def save_tokenizer(folder, made, names):
    made.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": token for name, token in names.items()}
    settings.update(tokenizer_class="PreTrainedTokenizerFast", model_max_length=512)
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TOKENIZERS = {"WordPiece": word_piece, "Unigram": unigram}
PAIRS = [
    ("what is a cat?", "a cat is a small animal"),
    ("the capital of france", "paris " * 30),
    ("dog", ""),
    ("", "dog runs"),
    ("the park " * 40, "in the park " * 40),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("types", [0, 1, 2])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reranker_equals_transformers(make, kind, types, labels):
    """Of a pair's token types those are used that the model has rows for; with one or none they are dropped."""
    folder, reference = make(SEQUENCE, type_vocab_size=types, num_labels=labels)
    theirs = TOKENIZERS[kind](folder)
    inputs = theirs(
        *map(list, zip(*PAIRS, strict=True)), padding=True, truncation=True, max_length=100, return_tensors="pt"
    )
    assert inputs["token_type_ids"].any() == (kind == "WordPiece")
    if types < 2:
        del inputs["token_type_ids"]
    with torch.inference_mode():
        expected = reference(**inputs).logits
    expected = expected.sigmoid().squeeze(-1) if labels == 1 else expected
    with pytest.warns(UserWarning, match="1 of 5 texts were longer than 100 tokens"):
        scores = ml.Reranker.from_pretrained(folder, max_seq_length=100).predict(PAIRS)
    assert np.abs(scores - expected.numpy()).max() <= 2e-5


def test_token_types_change_a_reranker_s_scores(make):
    """So that the test above means something."""
    folder, _ = make(SEQUENCE, type_vocab_size=2, num_labels=1)
    word_piece(folder)
    scores = ml.Reranker.from_pretrained(folder).predict(PAIRS, activation_fn="identity")
    state = state_of(folder)
    state["gte.embeddings.token_type_embeddings.weight"][1] = state["gte.embeddings.token_type_embeddings.weight"][0]
    write(folder, config_of(folder), state)
    assert np.abs(ml.Reranker.from_pretrained(folder).predict(PAIRS, activation_fn="identity") - scores).max() > 0.01


def test_a_reranker_of_alibaba_s_file_ranks(make):
    folder, _ = make(SEQUENCE, num_labels=1, type_vocab_size=1, rope_parameters=ntk(20_000.0, 8.0, 32))
    unigram(folder)
    pairs = [("what is a cat?", text) for text in ("a cat is a small animal", "the park", "dog runs in the park")]
    scores = ml.Reranker.from_pretrained(folder).predict(pairs)
    raw = {**config_of(folder), "num_labels": 1}
    write(folder, raw, {name: tensor.half() for name, tensor in prefixed(state_of(folder), "new.").items()})
    as_new(folder, 20000, {"type": "ntk", "factor": 8.0})
    model = ml.Reranker.from_pretrained(folder)
    assert type(model.network) is GteSequenceClassifier
    assert np.abs(model.predict(pairs) - scores).max() <= 5e-3
    best = model.rank("what is a cat?", [pair[1] for pair in pairs], return_documents=True)
    assert [row["corpus_id"] for row in best] == np.argsort(-model.predict(pairs)).tolist()


@pytest.mark.parametrize(("kind", "mask"), [("WordPiece", "[MASK]"), ("Unigram", "<mask>")])
def test_fill_mask_equals_transformers(make, kind, mask):
    folder, reference = make(MASKED_LM)
    theirs = TOKENIZERS[kind](folder)
    as_new(folder, 160000)
    texts = [f"the capital of France is {mask}", f"{mask} {mask} cat sat", f"a dog {mask} in the park"]
    model = ml.FillMask.from_pretrained(folder)
    assert model.mask_token == mask
    found = model.predict(texts, top_k=4)
    for text, masks in zip(texts, found, strict=True):
        inputs = theirs(text, return_tensors="pt")
        del inputs["token_type_ids"]
        with torch.inference_mode():
            logits = reference(**inputs).logits[0]
        where = (inputs["input_ids"][0] == theirs.mask_token_id).nonzero().flatten()
        assert len(masks) == len(where) == text.count(mask)
        for predictions, row in zip(masks, logits[where].softmax(-1), strict=True):
            best = row.topk(4)
            assert [p["token_id"] for p in predictions] == best.indices.tolist()
            assert [p["score"] for p in predictions] == pytest.approx(best.values.tolist(), rel=1e-4)
            assert [p["token"] for p in predictions] == [theirs.decode([i]) for i in best.indices.tolist()]


def sentence_files(folder, normalize=False):
    """sentence-transformers' files of an embedding model that takes the first token."""
    st = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 2 + normalize]
    listed = [{"idx": i, "name": str(i), "path": path, "type": st + kind} for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    width = config_of(folder)["hidden_size"]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("types", [0, 1, 2])
def test_an_embedder_takes_the_first_token(make, kind, types):
    folder, reference = make(type_vocab_size=types, rope_parameters=ntk(500_000.0, 2.0, 32))
    theirs = TOKENIZERS[kind](folder)
    sentence_files(folder)
    as_new(folder, 500000, {"type": "ntk", "factor": 2.0})
    texts = ["the capital of France", "", "a cat sat on the mat " * 20, "Berlin?", "the capital of France"]
    inputs = theirs(texts, padding=True, return_tensors="pt")
    del inputs["token_type_ids"]
    with torch.inference_mode():
        expected = reference(**inputs).last_hidden_state[:, 0].numpy()
    model = ml.Embedder.from_pretrained(folder)
    assert (model.dimension, model.max_seq_length) == (96, 512)
    got = model.encode(texts)
    assert np.abs(got - expected).max() <= 2e-5
    assert np.abs(np.stack([model.encode(text) for text in texts]) - got).max() <= 1e-5
    sentence_files(folder, normalize=True)
    unit = ml.Embedder.from_pretrained(folder).encode(texts)
    assert np.abs(unit - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() <= 2e-5


@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
def test_an_embedder_opens_a_head_s_file(make, architecture):
    folder, reference = make(architecture)
    theirs = word_piece(folder)
    sentence_files(folder)
    inputs = theirs("the capital of France", return_tensors="pt")
    with torch.inference_mode():
        expected = reference.gte(input_ids=inputs["input_ids"]).last_hidden_state[0, 0].numpy()
    assert np.abs(ml.Embedder.from_pretrained(folder).encode("the capital of France") - expected).max() <= 2e-5


def test_each_class_refuses_another_class_s_checkpoint_by_name(make):
    base, sequence = make(name="base")[0], make(SEQUENCE, name="sequence")[0]
    mlm = make(MASKED_LM, name="mlm")[0]
    for folder in (base, sequence, mlm):
        word_piece(folder)
    with pytest.raises(CheckpointError, match="GteModel, no reranker: use Embedder"):
        ml.Reranker.from_pretrained(base)
    with pytest.raises(CheckpointError, match="GteForMaskedLM, no reranker: use FillMask"):
        ml.Reranker.from_pretrained(mlm)
    with pytest.raises(CheckpointError, match=r"GteModel; FillMask needs a \.\.\.ForMaskedLM: use Embedder"):
        ml.FillMask.from_pretrained(base)
    with pytest.raises(
        CheckpointError, match=r"GteForSequenceClassification, no embedding model: use Classifier or Reranker"
    ):
        ml.Embedder.from_pretrained(sequence)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ml.Embedder.from_pretrained(base)
    assert ["no pooling files" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_whole_it_takes_batches_of_any_shape(make, dynamic):
    """On the CPU, of plain weights; ModernBERT's network shares what is traced."""
    network = ml.load_model(make()[0], packed=False).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=dynamic)
    for lengths in ([3, 70], [4, 66], [5, 5, 5]):
        batch = ml.pack(sequences(lengths))
        with torch.no_grad():
            assert (compiled(batch) - network(batch)).abs().max() <= 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", CLASSES)
def test_what_is_no_batch_is_a_type_error(make, architecture):
    network = ml.load_model(make(architecture)[0])
    with pytest.raises(TypeError, match="the network takes a PackedBatch, not Tensor"):
        network(torch.zeros(3, dtype=torch.int64))


def test_max_seq_length_ends_where_the_table_of_positions_ends(make):
    """As an option and set on the model; without a table it may be larger than what the model was trained on."""
    folder = vary(make()[0], "absolute")
    word_piece(folder)
    sentence_files(folder)
    message = "max_seq_length is 201; it must be no more than 200, what the model has positions for"
    with pytest.raises(OptionError, match=message):
        ml.Embedder.from_pretrained(folder, max_seq_length=201)
    model = ml.Embedder.from_pretrained(folder, max_seq_length=200)
    with pytest.raises(OptionError, match=message):
        model.max_seq_length = 201
    assert model.max_seq_length == 200
    for wrong in ("200", 3.5, True):
        with pytest.raises(OptionError, match=r"max_seq_length is .* a whole number"):
            model.max_seq_length = wrong
    turned = make(name="turned")[0]
    word_piece(turned)
    sentence_files(turned)
    assert ml.Embedder.from_pretrained(turned, max_seq_length=4_000).max_seq_length == 4_000
