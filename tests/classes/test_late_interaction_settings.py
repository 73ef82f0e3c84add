"""Late interaction: settings, padding sides and inputs that are refused or taken."""

import copy
import json
import pickle
import random
import shutil

import numpy as np
import pytest
from late_interaction_cases import (  # noqa: F401
    OLD,
    PYLATE,
    TEXTS,
    add_dense,
    assert_equal_to_reference,
    assert_same,
    pylate,
    write_modules,
)

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.late_interaction import LateInteraction


@pytest.mark.parametrize(
    ("architecture", "right"),
    [("ModernBertForMaskedLM", "FillMask"), ("ModernBertForSequenceClassification", "Classifier or Reranker")],
)
def test_another_kind_of_checkpoint_names_its_class(make_checkpoint, architecture, right):
    folder, _ = make_checkpoint(architecture)
    with pytest.raises(CheckpointError, match=f"no late-interaction model: use {right}"):
        LateInteraction.from_pretrained(folder)


def test_an_embedder_is_no_late_interaction_model():
    with pytest.raises(CheckpointError, match="no late-interaction model: use Embedder"):
        LateInteraction.from_pretrained("tiny")
    with pytest.raises(TypeError, match=r"use LateInteraction\.from_pretrained"):
        LateInteraction("tiny")


def test_an_embedder_refuses_a_late_interaction_model(pylate):
    with pytest.raises(CheckpointError, match="use LateInteraction for it"):
        ml.Embedder.from_pretrained(pylate())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_length": "32"}, "query_length is '32'"),
        ({"document_length": 0}, "document_length is 0"),
        ({"query_prefix": 3}, "the prefixes of queries and documents are .'query': 3"),
        ({"skiplist_words": "!?"}, r"skiplist_words is '!\?'; it must be a list of strings"),
        ({"query_expansion": 5}, "query_expansion is 5"),
        (
            {"query_expansion": {"strategy": "min", "length": 16}, "query_length": 8},
            "query_length is 8; it must be at lea",
        ),
        ({"query_expansion": {"strategy": "most", "length": 3}}, "strategy is 'most'; it must be one of fixed, min"),
        ({"query_expansion": {"strategy": "min"}}, "length is 0"),
        ({"query_length": 1 << 31}, "query_length is 2147483648, .* no more than 8192"),
        (
            {"query_expansion": {"strategy": "fixed", "length": 1 << 24}, "query_length": None},
            "the expansion's length 16777216; .* than 8192",
        ),
        ({"attend_to_expansion_tokens": "no"}, "attend_to_expansion_tokens is 'no'"),
        ({"query_prefix": "\ud800"}, "is not valid Unicode"),
        ({"query_expansion": {"strategy": "min", "length": 9, "token": "\ud800"}}, "padded with .* is not known"),
        ({"query_expansion": {"strategy": "min", "length": 9, "attend": "no"}}, "attend is 'no'"),
        ({"query_expansion": {"strategy": "min", "length": 9, "token": 3}}, "token of query_expansion is 3"),
        (
            {"query_expansion": {"strategy": "min", "length": 9, "token": "[?]"}},
            r"padded with \[\?\], which is not known",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(pylate, changes, message):
    with pytest.raises(CheckpointError, match=message):
        LateInteraction.from_pretrained(pylate(**changes), device="cpu")


def test_randomly_changed_settings_are_read_or_refused(pylate):
    folder, rng = pylate(), random.Random(0)
    expansion = {"strategy": "min", "length": 9, "attend": False, "token": "[MASK]"}
    values = [None, True, -1, 0, 7, 1 << 70, 0.5, "", "[Q] ", [], [1], ["!"], {}, {"a": 1}, {"query": "q"}]
    for _ in range(300):
        config = {**PYLATE, "query_expansion": {**expansion, rng.choice(list(expansion)): rng.choice(values)}}
        config |= {rng.choice(list(config)): rng.choice(values) for _ in range(2)}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
        try:
            read_sentence_config(Folder(folder))
        except CheckpointError:
            continue


def test_modules_that_it_does_not_know_are_refused_by_name(pylate):
    folder = pylate()
    write_modules(folder, ("", OLD + "Transformer"), ("1_Pooling", OLD + "Pooling"))
    with pytest.raises(CheckpointError, match=r"Pooling' is not supported; known: .*MultiVectorMask"):
        read_sentence_config(Folder(folder))


def test_padding_outside_the_vocabulary_is_refused(make_checkpoint):
    folder, _ = make_checkpoint(vocab_size=50284, whole_tokenizer=True)  # [MASK] is 50284
    config = {key: value for key, value in PYLATE.items() if not key.endswith("prefix")}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    model = LateInteraction.from_pretrained(folder, device="cpu")
    assert len(model.encode_documents("a")) == 3
    with pytest.raises(ValueError, match="token id 50284 is outside the vocabulary"):
        model.encode_queries("a")


def test_a_dense_layer_of_another_width_or_place_is_refused(pylate):
    folder = pylate(dense=False)
    write_modules(folder, ("", OLD + "Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    add_dense(folder, "1_Dense", 24, 80)
    with pytest.raises(CheckpointError, match="1_Dense: in_features is 80; it gets 96"):
        LateInteraction.from_pretrained(folder, device="cpu")
    shutil.rmtree(folder / "1_Dense")
    add_dense(folder, "1_Dense", 24, 96, module_input_name="sentence_embedding")
    with pytest.raises(CheckpointError, match=r"1_Dense\) works on 'sentence_embedding', which no module"):
        LateInteraction.from_pretrained(folder, device="cpu")


def set_padding_side(folder, side):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
    return folder


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_padding_on_the_left_gives_sentence_transformers_vectors(pylate, monkeypatch, attends, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder = set_padding_side(pylate(attend_to_expansion_tokens=attends), "left")
    _, queries, _ = assert_equal_to_reference(folder)
    right = LateInteraction.from_pretrained(set_padding_side(folder, "right"), device="cpu").encode_queries(TEXTS[:2])
    assert np.abs(queries[0] - right[0]).max() > 0.01


def test_tokenizer_json_s_padding_side_counts_where_no_other_file_has_one(pylate):
    folder = pylate()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("padding_side", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["padding"] = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    stored["padding"] |= {"pad_id": 50283, "pad_type_id": 0, "pad_token": "[PAD]"}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    assert LateInteraction.from_pretrained(folder, device="cpu").pads_left
    assert_equal_to_reference(folder)


def test_padding_on_the_left_beyond_a_local_window_is_refused(pylate):
    folder = set_padding_side(pylate(query_length=90), "left")
    with pytest.raises(CheckpointError, match=r"padding_side is .left., and queries are padded to 90 tokens; .* to 65"):
        LateInteraction.from_pretrained(folder, device="cpu")


def test_another_padding_side_is_refused(pylate):
    with pytest.raises(CheckpointError, match="padding_side is 'top'; it must be 'right' or 'left'"):
        LateInteraction.from_pretrained(set_padding_side(pylate(), "top"), device="cpu")


@pytest.mark.parametrize("bad", [b"text", 3, [1], ["a", None]])
def test_what_is_no_text_is_refused(pylate, bad):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    for encode in (model.encode_queries, model.encode_documents):
        with pytest.raises(TypeError, match="must be a str"):
            encode(bad)


def test_half_a_surrogate_pair_is_a_word_that_no_vocabulary_has(pylate):
    model = LateInteraction.from_pretrained(pylate(skiplist_words=["\ud800", "!"]), device="cpu")
    assert len(model.skip_ids["document"]) == 1


@pytest.mark.parametrize(
    ("changes", "padded"), [({"do_query_expansion": "false"}, 0), ({"attend_to_expansion_tokens": "false"}, 32)]
)
def test_booleans_may_be_strings(pylate, changes, padded):
    model = LateInteraction.from_pretrained(pylate(**changes), device="cpu")
    assert (model.padded_length, model.attends) == (padded, False)


def test_a_longer_query_than_the_model_has_positions_for_is_refused(pylate):
    with pytest.raises(ml.OptionError, match=r"query_length is 8193, .* no more than 8192"):
        LateInteraction.from_pretrained(pylate(), device="cpu", query_length=8193)


def test_it_can_be_pickled_and_copied(pylate):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(other.encode_queries(TEXTS[:3]), model.encode_queries(TEXTS[:3]), 1e-6)


@pytest.mark.parametrize("name", ["maxsim", "meanmaxsim"])
def test_similarity_takes_generators_and_nothing(pylate, name):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    model.similarity_fn_name = name
    queries, documents = [np.eye(3, dtype=np.float32)] * 2, [np.eye(3, dtype=np.float32)] * 3
    assert model.similarity((q for q in queries), documents).shape == (2, 3)
    assert model.similarity([], documents).shape == (0, 3)


def test_sentence_transformers_names_work_too(pylate):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    assert np.array_equal(model.encode_query("a"), model.encode_queries("a"))
    assert np.array_equal(model.encode_document("a"), model.encode_documents("a"))
