"""The GTE v1.5 encoder and its heads: against transformers, against a plain function of the architecture where
transformers lacks a case, by every name that its tensors have in the wild, and end to end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from gte_cases import (  # noqa: F401
    BASE,
    CLASSES,
    LENGTHS,
    MASKED_LM,
    SEQUENCE,
    SMALL,
    TOKEN,
    VOCAB,
    as_new,
    assert_equal,
    config_of,
    difference,
    expected_of,
    make,
    native,
    ntk,
    padded,
    plain,
    sequences,
    split,
    state_of,
    types_of,
    vary,
    write,
)

import modernbert_lite as ml
from modernbert_lite.ops.linear import Int8Linear, narrower

HEADS_OF_64 = {"hidden_size": 128, "num_attention_heads": 2}


# --- checkpoints


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
    assert got.dtype == (torch.float32 if narrower(got.device, dtype) else dtype)  # see test_half.py
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
