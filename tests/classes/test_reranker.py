"""Reranker: scores of pairs, ranking, and what is refused. Equality with CrossEncoder is in another file."""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Reranker

SEQUENCE = "ModernBertForSequenceClassification"
PAIRS = [("what is a cat", "a cat is a small animal " * n) for n in (1, 30, 0, 3)] + [("", "an empty query"), ("", "")]


TOKENIZER = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One label and three labels, random weights, mean and cls pooling."""
    import transformers

    made = {}
    for labels, pooling in ((1, "mean"), (3, "cls")):
        torch.manual_seed(labels)
        config = transformers.ModernBertConfig(
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=labels,
            classifier_pooling=pooling,
            initializer_range=0.1,
        )
        folder = tmp_path_factory.mktemp(f"labels{labels}")
        getattr(transformers, SEQUENCE)(config).save_pretrained(folder)
        for path in TOKENIZER.glob("*token*.json"):
            shutil.copy(path, folder)
        made[labels] = folder
    return made


@pytest.fixture(scope="module")
def one(folders):
    return Reranker.from_pretrained(folders[1])


@pytest.fixture(scope="module")
def three(folders):
    return Reranker.from_pretrained(folders[3])


def logits(model, folder, pairs):
    """By the bare network, a pair at a time."""
    network = ml.load_model(folder)
    return torch.cat([network(ml.pack(model.tokenizer.encode([pair])[0])) for pair in pairs])


def test_one_label_gives_one_probability_a_pair(one, folders):
    scores = one.predict(PAIRS)
    assert (scores.shape, scores.dtype) == ((len(PAIRS),), np.float32)
    expected = torch.sigmoid(logits(one, folders[1], PAIRS)).squeeze(-1).numpy()
    assert np.abs(scores - expected).max() <= 1e-5
    assert np.ptp(scores) > 1e-3


def test_three_labels_give_logits_unless_asked_otherwise(three, folders):
    expected = logits(three, folders[3], PAIRS)
    scores = three.predict(PAIRS)
    assert (scores.shape, scores.dtype) == ((len(PAIRS), 3), np.float32)
    assert np.abs(scores - expected.numpy()).max() <= 1e-5
    probabilities = three.predict(PAIRS, apply_softmax=True)
    assert np.abs(probabilities - expected.softmax(-1).numpy()).max() <= 1e-5
    assert three.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("activation", ["identity", "Identity", "torch.nn.modules.linear.Identity", lambda x: x])
def test_another_activation_may_be_asked_for(one, folders, activation):
    expected = logits(one, folders[1], PAIRS).squeeze(-1).numpy()
    assert np.abs(one.predict(PAIRS, activation_fn=activation) - expected).max() <= 1e-5


@pytest.mark.parametrize("where", ["new", "config", "old"])
def test_the_checkpoint_names_its_activation(folders, tmp_path, where):
    folder = tmp_path / "named"
    shutil.copytree(folders[1], folder)
    name = "torch.nn.modules.activation.Tanh"
    path = folder / ("config_sentence_transformers.json" if where == "new" else "config.json")
    changes = {
        "new": {"activation_fn": name},
        "config": {"sentence_transformers": {"activation_fn": name}},
        "old": {"sbert_ce_default_activation_function": name},
    }[where]
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    model = Reranker.from_pretrained(folder)
    expected = torch.tanh(logits(model, folders[1], PAIRS)).squeeze(-1).numpy()
    assert np.abs(model.predict(PAIRS) - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["os.system", "PReLU", "evil.module.Sigmoid"])
def test_an_unknown_activation_is_refused(one, name):
    with pytest.raises(ml.OptionError, match=f"activation function '{name}' is not supported; known: Identity, Sigm"):
        one.predict(PAIRS, activation_fn=name)


def test_one_pair_gives_one_score(one, three):
    assert one.predict(PAIRS[0]).shape == ()
    assert one.predict(list(PAIRS[0])) == pytest.approx(one.predict(PAIRS)[0], abs=1e-5)
    assert three.predict(PAIRS[0]).shape == (3,)


def test_scores_come_in_order_whatever_the_batch(folders, one):
    expected = one.predict(PAIRS)
    assert np.abs(one.predict(PAIRS[::-1])[::-1] - expected).max() <= 1e-5
    assert np.abs(one.predict(iter(PAIRS)) - expected).max() <= 1e-5
    assert np.abs(one.predict([list(pair) for pair in PAIRS]) - expected).max() <= 1e-5
    small = Reranker.from_pretrained(folders[1], batch_tokens=1)
    assert np.abs(small.predict(PAIRS) - expected).max() <= 1e-5


def test_the_order_within_a_pair_counts(one):
    a, b = one.predict([("first text", "second one"), ("second one", "first text")])
    assert abs(a - b) > 1e-5


def test_no_pairs_give_an_empty_array(one, three):
    assert one.predict([]).shape == (0,)
    assert three.predict(iter(())).shape == (0, 3)
    assert one.predict([]).dtype == np.float32


def test_rank(one):
    documents = ["a cat is an animal", "stocks fell on monday", "", "a cat is an animal", "cats and dogs " * 20]
    scores = one.predict([("what is a cat", d) for d in documents])
    ranked = one.rank("what is a cat", documents)
    assert [r["corpus_id"] for r in ranked] == list(np.argsort(-scores, kind="stable"))
    assert all(r.keys() == {"corpus_id", "score"} for r in ranked)
    assert all(isinstance(r["score"], float) and isinstance(r["corpus_id"], int) for r in ranked)
    assert [r["score"] for r in ranked] == sorted((r["score"] for r in ranked), reverse=True)
    with_text = one.rank("what is a cat", iter(documents), top_k=2, return_documents=True)
    assert len(with_text) == 2
    assert [r["text"] for r in with_text] == [documents[r["corpus_id"]] for r in with_text]
    assert len(one.rank("q", documents, top_k=99)) == 5
    assert one.rank("q", []) == []


@pytest.mark.parametrize("top_k", [0, -1])
def test_rank_refuses_a_top_k_without_results(one, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be at least 1"):
        one.rank("q", ["a"], top_k=top_k)


def test_rank_needs_a_model_of_one_label(three):
    with pytest.raises(ValueError, match=r"this model has 3 labels; rank needs one of a single label\. Use predict"):
        three.rank("q", ["a"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("two words", "pair 1 is str"),
        (("one",), "pair 1 is tuple"),
        (("a", "b", "c"), "pair 1 is tuple"),
        (None, "pair 1 is NoneType"),
        (("a", 7), "text 1 is int"),
        ((None, "a"), "text 1 is NoneType"),
        ({"a": 1, "b": 2}, "pair 1 is dict"),
    ],
)
def test_an_item_that_is_no_pair_is_named(one, bad, message):
    with pytest.raises(TypeError, match=message):
        one.predict([("a", "b"), bad])


def test_a_document_that_is_no_string_is_named(one):
    with pytest.raises(TypeError, match="text 1 is int"):
        one.rank("q", ["a", 5])


def test_a_string_instead_of_pairs_is_refused(one):
    with pytest.raises(TypeError, match="pair 0 is str"):
        one.predict("a string")


def test_a_lone_surrogate_is_named(one):
    with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
        one.predict([("a", "b"), ("a", "\ud800")])


def test_long_pairs_are_cut_and_counted(folders):
    model = Reranker.from_pretrained(folders[1], max_seq_length=16)
    with pytest.warns(UserWarning, match="2 of 3 texts were longer than 16 tokens and were cut") as caught:
        model.predict([("a " * 50, "b"), ("a", "b"), ("a " * 50, "b " * 50)])
    assert len(caught) == 1
    strict = Reranker.from_pretrained(folders[1], max_seq_length=16, on_long="error")
    with pytest.raises(ValueError, match="text 1 is longer than 16 tokens"):
        strict.predict([("a", "b"), ("a " * 50, "b")])


def test_a_short_query_survives_a_long_document(folders):
    """Longest first: only the document is cut."""
    model = Reranker.from_pretrained(folders[1], max_seq_length=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = model.predict([("cat", "word " * 50), ("dog", "word " * 50)])
    assert abs(a - b) > 1e-5


def test_low_precision_scores_are_fp32(folders, one):
    scores = Reranker.from_pretrained(folders[1], dtype="bfloat16").predict(PAIRS)
    assert scores.dtype == np.float32
    assert np.abs(scores - one.predict(PAIRS)).max() <= 0.05


def test_a_nan_is_not_ranked_as_if_it_were_a_score():
    from modernbert_lite.reranker import ranked

    results = ranked(np.array([0.1, math.nan, 0.9], np.float32), ["a", "b", "c"], None, False)
    assert [r["corpus_id"] for r in results] == [2, 0, 1]


@pytest.mark.parametrize(
    ("architecture", "right"),
    [
        ("ModernBertModel", "Embedder"),
        ("ModernBertForMaskedLM", "FillMask"),
        ("ModernBertForTokenClassification", "TokenClassifier"),
    ],
)
def test_another_checkpoint_is_refused_with_the_right_class(make_checkpoint, architecture, right):
    folder, _ = make_checkpoint(architecture, num_hidden_layers=1, hidden_size=32, num_attention_heads=1)
    with pytest.raises(CheckpointError, match=f"holds a {architecture}, no reranker: use {right} for it"):
        Reranker.from_pretrained(folder)


def test_a_model_must_be_named():
    with pytest.raises(TypeError, match=r"Reranker\.from_pretrained needs a model: a folder or a hub id"):
        Reranker.from_pretrained()


def test_the_bundled_embedder_is_refused_as_a_reranker():
    with pytest.raises(CheckpointError, match="use Embedder"):
        Reranker.from_pretrained("tiny")


def test_a_progress_bar_counts_pairs(one, capsys):
    one.predict(PAIRS, show_progress_bar=True)
    assert f"{len(PAIRS)}/{len(PAIRS)}" in capsys.readouterr().err
    one.predict(PAIRS)
    assert capsys.readouterr().err == ""
