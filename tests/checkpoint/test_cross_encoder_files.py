"""A cross-encoder's prompts, activation and modules, as CrossEncoder of sentence-transformers 6.2 has them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer

import modernbert_lite as ml

SEQUENCE = "ModernBertForSequenceClassification"
QUERY = "Which tide?"
DOCUMENTS = ["The ferry leaves at nine.", "", "tide and boats " * 30, "a [MASK] and a [SEP]", "図書館"]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
PROMPTS = {"web": "Judge the relevance: ", "code": "", "odd": "Wozu? [SEP]"}


def theirs(folder, **options):
    return CrossEncoder(str(folder), device="cpu", **options)


def edit(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5


@pytest.fixture
def saved(small_checkpoint, tmp_path):
    """save(labels, **of CrossEncoder) -> a folder that sentence-transformers wrote."""

    def save(labels=1, **options):
        source = small_checkpoint(SEQUENCE, num_labels=labels, classifier_pooling="mean")
        theirs(source, **options).save_pretrained(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize("labels", [1, 3])
def test_prompts_of_cross_encoders_are_put_before_the_first_text(saved, labels):
    folder = saved(labels, prompts=PROMPTS, default_prompt_name="web")
    ours, reference = ml.Reranker.from_pretrained(folder), theirs(folder)
    assert (ours.prompts, ours.default_prompt_name) == (PROMPTS, "web")
    for call in ({}, {"prompt_name": "odd"}, {"prompt_name": "code"}, {"prompt": "So: "}, {"prompt": ""}):
        assert_same(ours.predict(PAIRS, **call), reference.predict(PAIRS, **call))
        assert_same(ours.predict(PAIRS[0], **call), reference.predict(PAIRS[0], **call))
    plain = ours.predict(PAIRS, prompt="")
    assert np.abs(ours.predict(PAIRS) - plain).max() > 1e-3
    np.testing.assert_allclose(
        ours.predict([(PROMPTS["web"] + a, b) for a, b in PAIRS], prompt=""), ours.predict(PAIRS)
    )


def test_rank_takes_prompts_as_there(saved):
    folder = saved(prompts=PROMPTS, default_prompt_name="web")
    ours, reference = ml.Reranker.from_pretrained(folder), theirs(folder)
    for call in ({}, {"prompt_name": "odd"}, {"prompt": "So: "}):
        got, expected = ours.rank(QUERY, DOCUMENTS, **call), reference.rank(QUERY, DOCUMENTS, **call)
        assert [hit["corpus_id"] for hit in got] == [hit["corpus_id"] for hit in expected]
        assert [hit["score"] for hit in got] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_a_prompt_counts_where_long_pairs_are_cut(saved):
    folder = saved(prompts={"web": "Judge the relevance of all of this: "}, default_prompt_name="web", max_length=24)
    ours = ml.Reranker.from_pretrained(folder)
    assert ours.max_seq_length == 24
    with pytest.warns(UserWarning, match="were longer than 24 tokens and were cut"):
        got = ours.predict(PAIRS)
    assert_same(got, theirs(folder).predict(PAIRS))


def test_a_cross_encoder_has_no_usual_prompts(saved):
    ours = ml.Reranker.from_pretrained(saved(prompts=PROMPTS))
    for name in ("query", "document", "lost"):
        with pytest.raises(ml.OptionError, match=rf"prompt_name is '{name}'; this model has \['code', 'odd', 'web'\]"):
            ours.predict(PAIRS, prompt_name=name)
    with pytest.raises(TypeError, match="prompt is int"):
        ours.rank(QUERY, DOCUMENTS, prompt=5)
    plain = ours.predict(PAIRS)
    ours.default_prompt_name = "web"
    assert np.abs(ours.predict(PAIRS) - plain).max() > 1e-3
    with pytest.raises(ml.OptionError, match="default_prompt_name is 'query'"):
        ours.default_prompt_name = "query"


def test_a_default_prompt_that_a_cross_encoder_lacks_is_refused(saved):
    folder = saved()
    edit(folder / "config_sentence_transformers.json", default_prompt_name="query")
    with pytest.raises(ml.CheckpointError, match="default_prompt_name 'query' is not among the prompts"):
        ml.Reranker.from_pretrained(folder)
    with pytest.raises(ValueError, match="Default prompt name 'query' not found"):
        theirs(folder)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("torch.nn.modules.activation.Softsign", 1), ("torch.nn.Tanh", 3), ("torch.nn.Identity", 1), (None, 1), (None, 3)],
)
def test_the_stored_activation_wins_over_config_json(saved, name, labels):
    folder = saved(labels)
    edit(folder / "config_sentence_transformers.json", activation_fn=name, keep_in_fp32_modules=["0.model.classifier"])
    edit(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.activation.ReLU"})
    assert_same(ml.Reranker.from_pretrained(folder).predict(PAIRS), theirs(folder).predict(PAIRS))


@pytest.mark.parametrize("name", ["relu", "my.Act", "torch.nn.functional.relu", "Sigmoid"])
def test_a_stored_activation_that_is_no_class_of_torch_is_refused(saved, name):
    """sentence-transformers takes the sigmoid for those without "torch." in front."""
    folder = saved()
    edit(folder / "config_sentence_transformers.json", activation_fn=name)
    with pytest.raises(ml.CheckpointError, match=f"activation function '{name}' is not supported"):
        ml.Reranker.from_pretrained(folder)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_head_in_modules_pools_without_the_prompt_where_the_file_says_so(small_checkpoint, tmp_path, include_prompt):
    source = small_checkpoint()
    torch.manual_seed(3)
    modules = [
        Transformer(str(source), max_seq_length=128),
        Normalize(module_input_name="token_embeddings"),
        Pooling(32, pooling_mode=("mean", "max"), include_prompt=include_prompt),
        Dense(64, 32, activation_function=torch.nn.GELU()),
        LayerNorm(32),
        Normalize(),
        Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    model = CrossEncoder(modules=modules, device="cpu", prompts=PROMPTS, default_prompt_name="web")
    model.save_pretrained(str(tmp_path / "saved"))
    ours = ml.Reranker.from_pretrained(tmp_path / "saved")
    for call in ({}, {"prompt_name": "odd"}, {"prompt": ""}):
        assert_same(ours.predict(PAIRS, **call), model.predict(PAIRS, **call))
    assert np.abs(ours.predict(PAIRS) - ours.predict(PAIRS, prompt="")).max() > 1e-4


def test_an_encoders_prompts_and_activation_are_not_a_cross_encoders(saved):
    folder = saved(prompts=PROMPTS, default_prompt_name="web", activation_fn=torch.nn.Tanh())
    for model_type in ("SentenceTransformer", "CrossEncoder"):
        edit(folder / "config_sentence_transformers.json", model_type=model_type)
        ours = ml.Reranker.from_pretrained(folder)
        assert_same(ours.predict(PAIRS), theirs(folder).predict(PAIRS))
        assert ours.prompts == (PROMPTS if model_type == "CrossEncoder" else {})


def test_a_null_activation_in_config_json_is_the_usual_one(small_checkpoint):
    folder = small_checkpoint(SEQUENCE, num_labels=1)
    edit(
        folder / "config.json",
        sentence_transformers={"activation_fn": None},
        sbert_ce_default_activation_function="torch.nn.Tanh",
    )
    assert_same(ml.Reranker.from_pretrained(folder).predict(PAIRS), theirs(folder).predict(PAIRS))


def test_without_modules_json_the_other_files_do_not_count_as_there(small_checkpoint):
    folder = small_checkpoint(SEQUENCE, num_labels=1)
    told = {
        "prompts": {"q": "Query: "},
        "default_prompt_name": "q",
        "activation_fn": "torch.nn.modules.linear.Identity",
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(told))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    both = r"what config_sentence_transformers\.json and sentence_bert_config\.json says doesn't count"
    with pytest.warns(UserWarning, match=r"has no modules\.json: " + both):
        ours = ml.Reranker.from_pretrained(folder)
    assert_same(ours.predict(PAIRS), theirs(folder).predict(PAIRS))
    assert ours.prompts == {}


def test_an_activation_that_is_none_is_refused_before_the_work(small_checkpoint):
    model = ml.Reranker.from_pretrained(small_checkpoint(SEQUENCE, num_labels=1))
    model.activation_fn = 5
    with pytest.raises(ml.OptionError, match="activation_fn is 5; it must be a function, or the name of one"):
        model.predict(PAIRS)
