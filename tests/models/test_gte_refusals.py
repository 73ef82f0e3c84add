"""GTE checkpoints and batches that are refused, by name."""

from __future__ import annotations

import math
import re

import pytest
import torch
from gte_cases import (  # noqa: F401
    CLASSES,
    FORMS,
    MASKED_LM,
    SEQUENCE,
    TOKEN,
    config_of,
    difference,
    make,
    prefixed,
    sequences,
    split,
    state_of,
    vary,
    write,
)

import modernbert_lite as ml
from modernbert_lite import CheckpointError


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
        with pytest.warns(UserWarning, match=r"lm_head\.decoder\.weight differs from .*tie_word_embeddings"):
            untied = ml.load_model(other)(ml.pack(rows))
        changed = (untied - expected).abs().amax(0) > 1e-3
        assert changed.nonzero().flatten().tolist() == [5]  # the table's own row is as it was


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
