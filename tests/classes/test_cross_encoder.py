"""Reranker beside sentence-transformers' CrossEncoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers_cases import DOCUMENTS, LONG, QUERY, assert_same

import modernbert_lite as ml

SEQUENCE = "ModernBertForSequenceClassification"


PAIRS = [(QUERY, document) for document in DOCUMENTS] + [("", ""), ("café 🙂", "图书馆"), ("[SEP]", " ")]


def cross_encoder(folder, **options):
    return CrossEncoder(str(folder), device="cpu", **options)


def edit_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("labels", [1, 3])
def test_predict_equals_cross_encoder(make_checkpoint, pooling, labels):
    folder, _ = make_checkpoint(SEQUENCE, classifier_pooling=pooling, num_labels=labels)
    ours, theirs = ml.Reranker.from_pretrained(folder), cross_encoder(folder)
    got, expected = ours.predict(PAIRS), theirs.predict(PAIRS)
    assert got.shape == ((len(PAIRS),) if labels == 1 else (len(PAIRS), labels))
    assert_same(got, expected)
    assert ((got > 0) & (got < 1)).all() == (labels == 1)  # the sigmoid, for one label only
    assert_same(ours.predict([list(pair) for pair in PAIRS]), expected)
    assert_same(np.stack([ours.predict(pair) for pair in PAIRS]), expected)
    for activation in (torch.nn.Identity(), torch.nn.Sigmoid(), torch.tanh):
        assert_same(
            ours.predict(PAIRS, activation_fn=activation),
            theirs.predict(PAIRS, activation_fn=activation),
        )
    assert_same(ours.predict(PAIRS, activation_fn="identity"), theirs.predict(PAIRS, activation_fn=torch.nn.Identity()))
    assert_same(ours.predict(PAIRS, apply_softmax=True), theirs.predict(PAIRS, apply_softmax=True))


def test_rank_equals_cross_encoder(make_checkpoint):
    folder, _ = make_checkpoint(SEQUENCE, classifier_pooling="mean", num_labels=1)
    ours, theirs = ml.Reranker.from_pretrained(folder), cross_encoder(folder)
    for options in ({}, {"top_k": 2}, {"return_documents": True}, {"top_k": 99, "return_documents": True}):
        got, expected = ours.rank(QUERY, DOCUMENTS, **options), theirs.rank(QUERY, DOCUMENTS, **options)
        assert [hit.keys() for hit in got] == [hit.keys() for hit in expected]
        assert [hit["corpus_id"] for hit in got] == [hit["corpus_id"] for hit in expected]
        assert [hit["score"] for hit in got] == pytest.approx([hit["score"] for hit in expected], abs=2e-5)
        assert [hit.get("text") for hit in got] == [hit.get("text") for hit in expected]


def test_rank_of_several_labels_is_refused_as_there(make_checkpoint):
    folder, _ = make_checkpoint(SEQUENCE, num_labels=3)
    with pytest.raises(ValueError, match="3 labels; rank needs one"):
        ml.Reranker.from_pretrained(folder).rank(QUERY, DOCUMENTS)
    with pytest.raises(ValueError, match="num_labels=1"):
        cross_encoder(folder).rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    "keys",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "5.1.0"}},
        {
            "sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh",
            "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
        },
        {"sentence_transformers": {"version": "4.0.1"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", [1, 3])
def test_the_activation_that_config_json_names_equals_cross_encoder(make_checkpoint, keys, labels):
    folder, _ = make_checkpoint(SEQUENCE, num_labels=labels)
    edit_config(folder, **keys)
    assert_same(ml.Reranker.from_pretrained(folder).predict(PAIRS), cross_encoder(folder).predict(PAIRS))


@pytest.mark.parametrize("activation", [None, torch.nn.Identity(), torch.nn.Tanh()], ids=str)
def test_a_cross_encoder_that_sentence_transformers_saved_scores_the_same(make_checkpoint, tmp_path, activation):
    source, _ = make_checkpoint(SEQUENCE, classifier_pooling="mean", num_labels=1)
    theirs = cross_encoder(source, activation_fn=activation, max_length=64)
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours = ml.Reranker.from_pretrained(tmp_path / "saved")
    assert ours.max_seq_length == 64
    with pytest.warns(UserWarning, match="1 of 8 texts were longer than 64 tokens"):
        assert_same(ours.predict(PAIRS), theirs.predict(PAIRS))


def test_long_pairs_are_cut_longest_first_as_there(make_checkpoint):
    folder, _ = make_checkpoint(SEQUENCE, num_labels=1, classifier_pooling="mean")
    short, middle, long = "Which tide?", "When do the boats float again? " * 5, LONG
    pairs = [(short, long), (long, short), (middle, long), (long, middle), (long, long), (long * 9, middle)]
    for limit in (16, 61, 130):
        ours = ml.Reranker.from_pretrained(folder, max_seq_length=limit)
        theirs = cross_encoder(folder, max_length=limit)
        with pytest.warns(UserWarning, match=f"6 of 6 texts were longer than {limit} tokens"):
            got = ours.predict(pairs, activation_fn="identity")
        assert_same(got, theirs.predict(pairs, activation_fn=torch.nn.Identity()))
        for pair, ids in zip(pairs, ours.tokenizer.encode(pairs)[0], strict=True):
            assert ids == theirs.tokenizer(*pair, truncation="longest_first", max_length=limit)["input_ids"]


# --- FillMask
