"""Classifier: labels and scores of texts and pairs, and zero-shot classification, as transformers' pipelines give them;
what a Reranker makes of single texts."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Classifier, OptionError, Reranker
from modernbert_lite.checkpoint.open import Checkpoint

TOKENIZER = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"
TEXTS = [
    "A man is playing a guitar.",
    "",
    "   ",
    "naïve café 東京 🙂",
    "word " * 40,
    "Stocks fell [MASK] on\nMonday [SEP] x",
]
PREMISES = [text for text in TEXTS if text]  # the zero-shot pipeline refuses an empty one
NLI = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}
SIZES = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {**SIZES, "vocab_size": 50368, "pad_token_id": 50283, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make("ModernBert" or "Gte", seed, keys of the config..) -> a sequence classifier's folder, made once."""
    made = {}

    def make(family="ModernBert", seed=0, **config):
        import transformers

        key = json.dumps([family, seed, config], sort_keys=True)
        if key not in made:
            torch.manual_seed(seed)
            if "id2label" in config and "label2id" not in config:
                config["label2id"] = {label: i for i, label in config["id2label"].items()}
            settings = getattr(transformers, family + "Config")(**SMALL, **config)
            network = getattr(transformers, family + "ForSequenceClassification")(settings)
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):  # away from 0: one left out shows
                    parameter.data.add_(torch.randn(parameter.shape) * 0.2)
            made[key] = tmp_path_factory.mktemp("classifier")
            network.save_pretrained(made[key])
            for path in TOKENIZER.glob("*token*.json"):
                shutil.copy(path, made[key])
        return made[key]

    return make


def copy(folder, to, file="config.json", **keys):
    """The folder elsewhere, with keys of a file set, or taken out (None)."""
    shutil.copytree(folder, to)
    path = to / file
    stored = {**(json.loads(path.read_text()) if path.exists() else {}), **keys}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    return to


@functools.cache
def ours(folder):
    """A folder's Classifier, opened once."""
    return Classifier.from_pretrained(folder)


@functools.cache
def pipeline(task, folder, **options):
    from transformers import pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(task, str(folder), device="cpu", **options)


def assert_same(got, wanted):
    """Labels exactly, scores within 1e-5."""
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-5)
        assert all(type(entry["score"]) is float and list(entry) == ["label", "score"] for entry in ours)


def assert_same_zero_shot(got, wanted):
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert list(ours) == ["sequence", "labels", "scores"]
        assert (ours["sequence"], ours["labels"]) == (theirs["sequence"], theirs["labels"])
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)


# ---- one text or one pair -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "labels", "problem_type", "function"),
    [
        ("ModernBert", 4, None, "softmax"),
        ("ModernBert", 4, "single_label_classification", "softmax"),
        ("ModernBert", 4, "multi_label_classification", "sigmoid"),
        ("ModernBert", 3, "regression", "none"),
        ("ModernBert", 1, None, "sigmoid"),
        ("ModernBert", 1, "regression", "none"),
        ("Gte", 4, None, "softmax"),
        ("Gte", 3, "multi_label_classification", "sigmoid"),
        ("Gte", 1, None, "sigmoid"),
    ],
)
def test_labels_and_scores_are_those_of_the_pipeline(make, family, labels, problem_type, function):
    names = {i: f"topic {i}" for i in range(labels)}
    folder = make(family, id2label=names, problem_type=problem_type)
    theirs = pipeline("text-classification", folder)
    model = ours(folder)
    assert model.function_to_apply == function
    assert model.labels == tuple(names.values())
    for top_k in (None, 1, 2):
        assert_same(model.predict(TEXTS, top_k=top_k), theirs(TEXTS, top_k=top_k))
    for chosen in ("softmax", "sigmoid", "none", "Sigmoid"):
        wanted = theirs(TEXTS[:2], top_k=None, function_to_apply=chosen)
        assert_same(model.predict(TEXTS[:2], function_to_apply=chosen), wanted)


@pytest.mark.parametrize(("seed", "pooling"), [(1, "cls"), (2, "mean"), (3, "mean")])
def test_both_poolings_of_modernbert_and_the_reference_backend(make, monkeypatch, seed, pooling):
    folder = make(seed=seed, num_labels=5, classifier_pooling=pooling)
    wanted = pipeline("text-classification", folder, top_k=None)(TEXTS)
    assert_same(Classifier.from_pretrained(folder).predict(TEXTS), wanted)
    assert_same(Classifier.from_pretrained(folder, batch_tokens=1).predict(TEXTS), wanted)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    assert_same(Classifier.from_pretrained(folder).predict(TEXTS), wanted)


@pytest.mark.parametrize("family", ["ModernBert", "Gte"])
def test_pairs_are_those_of_the_pipeline(make, family):
    folder = make(family, num_labels=3)
    pairs = [("a premise", "its hypothesis"), ("", "x"), ("word " * 30, "東京")]
    wanted = pipeline("text-classification", folder, top_k=None)([{"text": a, "text_pair": b} for a, b in pairs])
    model = ours(folder)
    assert_same(model.predict(pairs), wanted)
    assert_same(model.predict(iter([list(pair) for pair in pairs])), wanted)
    alone, mixed = model.predict(["a text"]), model.predict(["a text", pairs[0]])
    assert_same(mixed, [alone[0], wanted[0]])
    # Two strings in a list or a tuple are two texts, not a pair.
    assert_same(model.predict(pairs[0]), model.predict(list(pairs[0])))
    assert len(model.predict(pairs[0])) == 2


def test_one_string_gives_its_labels_alone(make):
    model = ours(make(num_labels=4))
    rows = model.predict(TEXTS)
    assert_same([model.predict(TEXTS[0])], rows[:1])
    assert model(TEXTS[0]) == model.predict(TEXTS[0])
    assert_same(model.predict(iter(TEXTS)), rows)
    assert model.predict([]) == []
    assert len(model.predict(TEXTS[0], top_k=99)) == 4


def test_probabilities_come_as_one_array(make):
    folder = make(num_labels=4)
    model = ours(folder)
    logits = torch.cat([ml.load_model(folder)(ml.pack(model.tokenizer.encode([text])[0])) for text in TEXTS])
    got = model.predict_proba(iter(TEXTS))
    assert (got.shape, got.dtype) == ((len(TEXTS), 4), np.float32)
    assert np.abs(got - logits.softmax(-1).numpy()).max() <= 1e-5
    assert np.abs(model.predict_proba(TEXTS, function_to_apply="none") - logits.numpy()).max() <= 1e-5
    assert model.predict_proba(TEXTS[0]).shape == (4,)
    assert model.predict_proba([]).shape == (0, 4)


def test_equal_scores_stay_in_the_order_of_their_ids(make, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(make(num_labels=4), tmp_path / "ties")
    state = load_file(folder / "model.safetensors")
    state["classifier.weight"].zero_()
    state["classifier.bias"].copy_(torch.tensor([0.5, 2.0, 0.5, 2.0]))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    got = ours(folder).predict("a text")
    assert [entry["label"] for entry in got] == ["LABEL_1", "LABEL_3", "LABEL_0", "LABEL_2"]
    assert_same([got], pipeline("text-classification", folder, top_k=None)(["a text"]))


def test_low_precision_gives_fp32_scores(make):
    folder = make(num_labels=4)
    exact, rough = (Classifier.from_pretrained(folder, dtype=d).predict_proba(TEXTS) for d in (None, "bfloat16"))
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_long_texts_are_cut_and_counted(make):
    folder = make(num_labels=4)
    model = Classifier.from_pretrained(folder, max_seq_length=16)
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 16 tokens and were cut") as caught:
        got = model.predict(["word " * 50, "short"])
    assert len(caught) == 1
    assert_same(got, ours(folder).predict(["word " * 13 + "word", "short"]))
    with pytest.raises(ValueError, match="text 1 is longer than 16 tokens"):
        Classifier.from_pretrained(folder, max_seq_length=16, on_long="error").predict(["a", "word " * 50])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([1], "text 0 is int"),
        (["a", ("a", 2)], "text 1 is int"),
        (["a", ("a", "b", "c")], "pair 1 is tuple .*; each must be two strings"),
        ([["a"]], "pair 0 is list"),
        (b"bytes", "texts is bytes"),
        ({"text": "a"}, "texts is dict"),
        (None, "texts is NoneType"),
    ],
)
def test_what_is_no_text_and_no_pair_is_named_before_work(make, monkeypatch, texts, message):
    model = ours(make(num_labels=4))
    monkeypatch.setattr(model, "run", lambda *_: pytest.fail("work was done"))
    with pytest.raises(TypeError, match=message):
        model.predict(texts)


def test_bad_options_are_named(make):
    model = ours(make(num_labels=4))
    with pytest.raises(OptionError, match="top_k is 0; it must be at least 1"):
        model.predict("a", top_k=0)
    with pytest.raises(OptionError, match="function_to_apply is 'tanh'; it must be one of softmax, sigmoid, none"):
        model.predict("a", function_to_apply="tanh")
    scores = model.predict_proba("a")
    model.function_to_apply = "foo"
    with pytest.raises(OptionError, match="function_to_apply is 'foo'; it must be one of softmax"):
        model.predict("a")
    model.function_to_apply = "Sigmoid"
    assert not np.allclose(model.predict_proba("a"), scores)


# ---- zero-shot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "seed"), [("ModernBert", 0), ("ModernBert", 1), ("Gte", 0)])
@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_is_that_of_the_pipeline(make, family, seed, multi_label):
    folder = make(family, seed, id2label=NLI)
    theirs, model = pipeline("zero-shot-classification", folder), ours(folder)
    for labels, template in (
        ("politics,  , sports and music,東京", "This example is {}."),
        (["politics", "a, b", ""], "Es geht um {0}, {0}!"),
        (["alone"], "{}"),
    ):
        options = {"hypothesis_template": template, "multi_label": multi_label}
        got = model.zero_shot(PREMISES, labels, **options)
        assert_same_zero_shot(got, theirs(PREMISES, labels, **options))
        assert_same_zero_shot([model.zero_shot(PREMISES[0], labels, **options)], got[:1])
    assert_same_zero_shot(model.zero_shot(iter(PREMISES), iter(labels), **options), got)
    assert model.zero_shot([], ["a"]) == []


def test_zero_shot_with_types_of_the_second_text(make, tmp_path):
    """A tokenizer whose pairs have types, and a network that reads them."""
    folder = copy(make("Gte", id2label=NLI, type_vocab_size=2), tmp_path / "typed", "tokenizer.json")
    stored = json.loads((folder / "tokenizer.json").read_text())
    for item in stored["post_processor"]["pair"][3:]:
        next(iter(item.values()))["type_id"] = 1
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": names}))
    theirs, model = pipeline("zero-shot-classification", folder), ours(folder)
    assert model.typed
    assert_same_zero_shot(model.zero_shot(PREMISES, ["a", "b"]), theirs(PREMISES, ["a", "b"]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_the_premise_is_cut(make, tmp_path, side):
    """Cutting the longer of the two first would take tokens from these hypotheses."""
    settings = {"model_max_length": 24, "truncation_side": side}
    folder = copy(make(id2label=NLI), tmp_path / "short", "tokenizer_config.json", **settings)
    labels = ["cats", "one two three four five six seven eight nine"]
    theirs, model = pipeline("zero-shot-classification", folder), ours(folder)
    with pytest.warns(UserWarning, match="4 of 6 pairs of a text and a label were longer than 24 tokens and were cut"):
        got = model.zero_shot(["one two " * 30, "short", "three four " * 12], labels)
    assert_same_zero_shot(got, theirs(["one two " * 30, "short", "three four " * 12], labels))


def test_a_text_too_long_for_zero_shot_is_numbered_among_the_texts(make):
    model = Classifier.from_pretrained(make(id2label=NLI), max_seq_length=24, on_long="error")
    with pytest.raises(ValueError, match="text 2 is longer than 24 tokens"):
        model.zero_shot(["short", "a b", "one two " * 30, "c"], ["cats", "dogs", "fish"])


@pytest.mark.parametrize(
    ("id2label", "label2id"),
    [
        ({0: "entailment", 1: "not_entailment"}, None),  # contradiction is then the last label
        ({0: "a", 1: "Entails", 2: "entailment"}, None),
        ({0: "a", 1: "b", 2: "c"}, {"c": 0, "ENTAIL": 1, "entailment": 2}),  # label2id counts, and its order
    ],
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_entailment_is_the_first_label_of_label2id_that_is_named_so(make, id2label, label2id, multi_label):
    folder = make(id2label=id2label, label2id=label2id or {name: i for i, name in id2label.items()})
    wanted = pipeline("zero-shot-classification", folder)(PREMISES, ["x", "y", "z"], multi_label=multi_label)
    assert_same_zero_shot(ours(folder).zero_shot(PREMISES, ["x", "y", "z"], multi_label=multi_label), wanted)


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_a_label_of_entailment_the_last_is_taken_with_a_warning(make, multi_label):
    folder = make(num_labels=3)
    model = ours(folder)
    wanted = pipeline("zero-shot-classification", folder)(PREMISES, ["x", "y"], multi_label=multi_label)
    with pytest.warns(UserWarning, match="no label of .* starts with 'entail': the last one is taken") as caught:
        assert_same_zero_shot(model.zero_shot(PREMISES, ["x", "y"], multi_label=multi_label), wanted)
    assert len(caught) == 1


def test_label2id_may_be_missing_or_of_another_model(make, tmp_path):
    folder = make(id2label=NLI)
    wanted = ours(folder).zero_shot("a text", ["x", "y"])
    without = copy(folder, tmp_path / "without", label2id=None)
    assert_same_zero_shot([Classifier.from_pretrained(without).zero_shot("a text", ["x", "y"])], [wanted])
    other = Classifier.from_pretrained(copy(folder, tmp_path / "other", label2id={"entailment": 3}))
    assert len(other.predict("a text")) == 3  # only zero_shot needs it
    with pytest.raises(CheckpointError, match="label2id has entailment at 3; this model has 3 labels"):
        other.zero_shot("a text", ["x"])


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([], {}, OptionError, "zero_shot needs at least one label"),
        (" , ", {}, OptionError, "zero_shot needs at least one label"),
        (
            ["a"],
            {"hypothesis_template": "no place"},
            OptionError,
            "hypothesis_template 'no place' has no {} for the label",
        ),
        (["a"], {"hypothesis_template": "{x}"}, OptionError, "hypothesis_template '{x}' can't be filled: 'x'"),
        (["a"], {"hypothesis_template": "{} {}"}, OptionError, "can't be filled: Replacement index 1"),
        (["a"], {"hypothesis_template": None}, OptionError, "hypothesis_template None can't be filled"),
        (["a", 7], {}, TypeError, r"^label 1 is int \(7\); each label must be a str"),
        (["\ud800"], {}, ValueError, "^label 0 is not valid Unicode"),
        ("a, \ud800", {}, ValueError, "^label 1 is not valid Unicode"),
        (7, {}, TypeError, "labels is int"),
        (["fits", "word " * 11], {}, OptionError, "leaves no room for a text: max_seq_length is 16; shorten the label"),
    ],
)
def test_what_zero_shot_refuses(make, labels, options, error, message):
    model = Classifier.from_pretrained(make(id2label=NLI), max_seq_length=16)
    with pytest.raises(error, match=message):
        model.zero_shot(["a text"], labels, **options)


# ---- which checkpoints ----------------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match=f"holds a {architecture}, no sequence classifier: use {right} for it"):
        ours(folder)


def test_the_likelier_class_of_a_sequence_classifier_comes_first(make, tmp_path):
    assert Checkpoint.find(make(num_labels=4)).use == "Classifier or Reranker"
    assert Checkpoint.find(make("Gte", num_labels=1)).use == "Reranker or Classifier"
    activation = {"activation_fn": "torch.nn.modules.linear.Identity"}
    cross = copy(make(num_labels=4), tmp_path / "cross", "config_sentence_transformers.json", **activation)
    assert Checkpoint.find(make(num_labels=4)).use == "Classifier or Reranker"
    (cross / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    assert Checkpoint.find(cross).use == "Reranker or Classifier"
    old = copy(make(num_labels=4), tmp_path / "old", sentence_transformers=activation)
    assert Checkpoint.find(old).use == "Reranker or Classifier"


@pytest.mark.parametrize("problem_type", ["multilabel", 7, ["regression"]])
def test_an_unknown_problem_type_is_refused(make, tmp_path, problem_type):
    folder = copy(make(num_labels=4), tmp_path / "odd", problem_type=problem_type)
    with pytest.raises(CheckpointError, match=r"problem_type is .*; it must be one of regression, single_label"):
        ours(folder)


# ---- single texts and Reranker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ModernBert", "Gte"])
def test_a_reranker_of_several_labels_scores_single_texts_as_crossencoder_does(make, family):
    from sentence_transformers import CrossEncoder

    folder = make(family, num_labels=4)
    theirs = CrossEncoder(str(folder), device="cpu")
    wanted = np.stack([theirs.predict(text) for text in TEXTS])
    model = Reranker.from_pretrained(folder)
    got = model.predict(TEXTS)
    assert (got.shape, got.dtype) == ((len(TEXTS), 4), np.float32)
    assert np.abs(got - wanted).max() <= 1e-5
    assert np.abs(got - ours(folder).predict_proba(TEXTS, function_to_apply="none")).max() <= 1e-5
    one = model.predict(TEXTS[0])
    assert one.shape == (4,)
    assert np.abs(one - wanted[0]).max() <= 1e-5
    assert np.abs(model.predict(TEXTS[:1]) - wanted[:1]).max() <= 1e-5
    assert np.abs(model.predict(iter(TEXTS)) - wanted).max() <= 1e-5


def test_two_strings_stay_one_pair_of_a_reranker(make):
    from sentence_transformers import CrossEncoder

    folder = make(num_labels=4)
    model, theirs = Reranker.from_pretrained(folder), CrossEncoder(str(folder), device="cpu")
    pair = ["first text", "second text"]
    assert model.predict(pair).shape == (4,)
    assert np.abs(model.predict(pair) - theirs.predict(pair)).max() <= 1e-5
    mixed = model.predict([tuple(pair), "first text"])
    assert np.abs(mixed - np.stack([theirs.predict(pair), theirs.predict("first text")])).max() <= 1e-5


@pytest.mark.parametrize("texts", ["one text", ["one text"], ["a", "b", "c"], [("a", "b"), "c"]])
def test_a_reranker_of_one_label_names_the_class_for_single_texts(make, texts):
    model = Reranker.from_pretrained(make(num_labels=1))
    with pytest.raises(TypeError, match=r"pair \d is str .*; each must be two strings. Classifier takes single"):
        model.predict(texts)


# ---- results that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_a_logit_that_is_not_finite_names_the_text(make, function):
    """The sigmoid of an infinite logit would hide it."""
    model = Classifier.from_pretrained(make(id2label=NLI))
    model.network.classifier.bias.data[1] = torch.inf
    with pytest.raises(ValueError, match=r"the result of text 0, str \('a text'\), is not finite in float32"):
        model.predict(["a text"], function_to_apply=function)
    with pytest.raises(ValueError, match=r"the result of text 0, str \('a text'\), is not finite"):
        model.zero_shot(["a text"] * 2, ["x", "y"])


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_was_finished_before_an_error_has_the_form_of_the_result(make, monkeypatch, multi_label):
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 2)
    model, labels = ours(make(id2label=NLI)), ["music", "money", "sport"]
    texts = ["a b", "c d", "e f", "g h", "i j"]
    zero_shot = functools.partial(model.zero_shot, labels=labels, multi_label=multi_label)
    # Of zero_shot 15 pairs were waiting: 14 were scored, which are four texts and a part of the fifth.
    for call in (model.predict, model.predict_proba, zero_shot):
        with pytest.raises(TypeError, match=r"text 5 is int \(7\); .* \(4 rows were finished: this error") as caught:
            call(iter([*texts, 7]))
        finished, expected = caught.value.finished, call(texts[:4])
        assert np.array_equal(finished, expected) if call == model.predict_proba else finished == expected
    with pytest.raises(TypeError, match=r"^text 1 is int \(7\); each text must be a str$"):
        model.zero_shot(["a", 7], labels)
