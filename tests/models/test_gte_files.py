"""GTE's weights under every name and in every form in which files store them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from gte_cases import (  # noqa: F401
    BASE,
    CLASSES,
    FORMS,
    MASKED_LM,
    SEQUENCE,
    SMALL,
    TOKEN,
    as_new,
    assert_equal,
    config_of,
    difference,
    expected_of,
    make,
    native,
    plain,
    prefixed,
    sequences,
    split,
    state_of,
    write,
)

import modernbert_lite as ml
from modernbert_lite.models.gte import Gte
from modernbert_lite.models.registry import architectures
from modernbert_lite.ops import onednn
from modernbert_lite.ops.linear import Linear, PackedLinear


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
