"""FillMask: the likeliest tokens for every [MASK], and what is refused."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import CheckpointError, FillMask

TEXTS = [
    "The capital of France is [MASK].",
    "[MASK] [MASK] and " + "more words " * 60 + "[MASK]",
    "A [MASK]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("masked")
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    for path in (Path(__file__).parents[1] / "data" / "modernbert-tokenizer").glob("*token*.json"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return FillMask.from_pretrained(folder)


def expected(model, folder, text, top_k):
    """By the logits of the bare network over the whole text."""
    ids = model.tokenizer.encode([text])[0][0]
    probabilities = ml.load_model(folder)(ml.pack([ids])).softmax(-1)
    return [probabilities[i].topk(top_k) for i, token in enumerate(ids) if token == 50284]


def test_every_mask_gets_its_likeliest_tokens(model, folder):
    got = model.predict(TEXTS, top_k=3)
    assert [len(masks) for masks in got] == [1, 3, 1]
    for text, masks in zip(TEXTS, got, strict=True):
        for tokens, (scores, ids) in zip(masks, expected(model, folder, text, 3), strict=True):
            assert [t["token_id"] for t in tokens] == ids.tolist()
            assert np.abs(np.array([t["score"] for t in tokens]) - scores.numpy()).max() <= 1e-5
            assert all(t.keys() == {"token", "token_id", "score"} for t in tokens)
            assert [t["token"] for t in tokens] == [model.tokenizer.decode(i) for i in ids.tolist()]


def test_one_string_gives_its_masks_alone(model):
    alone = model.predict(TEXTS[1])
    assert len(alone) == 3
    assert [len(tokens) for tokens in alone] == [5, 5, 5]
    together = model.predict(TEXTS)[1]
    assert [[t["token_id"] for t in m] for m in alone] == [[t["token_id"] for t in m] for m in together]
    assert model(TEXTS[1]) == alone


def test_texts_come_in_order_whatever_the_batch(folder, model):
    ids = [[[t["token_id"] for t in tokens] for tokens in masks] for masks in model.predict(iter(TEXTS * 2))]
    assert ids[:3] == ids[3:]
    small = FillMask.from_pretrained(folder, batch_tokens=1)
    assert ids[:3] == [[[t["token_id"] for t in tokens] for tokens in masks] for masks in small.predict(TEXTS)]


def test_many_masks_are_taken_in_parts(model, monkeypatch):
    """More [MASK]s than logits are held for at a time."""
    texts = ["[MASK] a" * n for n in (1, 4, 2)]
    whole = model.predict(texts)
    monkeypatch.setattr("modernbert_lite.fill_mask._ROWS", 3)
    parts = model.predict(texts)
    assert [len(masks) for masks in parts] == [1, 4, 2]
    assert [[[t["token_id"] for t in m] for m in masks] for masks in parts] == [
        [[t["token_id"] for t in m] for m in masks] for masks in whole
    ]


def test_no_texts_give_an_empty_list(model):
    assert model.predict([]) == []
    assert model.predict(iter(())) == []


def test_probabilities_of_the_whole_vocabulary_add_up_to_one(model):
    (tokens,) = model.predict("a [MASK]", top_k=50368)
    assert len(tokens) == 50368
    assert sum(t["score"] for t in tokens) == pytest.approx(1, abs=1e-4)
    assert [t["score"] for t in tokens] == sorted((t["score"] for t in tokens), reverse=True)


@pytest.mark.parametrize("top_k", [0, -1, 50369])
def test_a_top_k_outside_the_vocabulary_is_refused(model, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be from 1 to 50368"):
        model.predict("a [MASK]", top_k=top_k)


def test_a_text_without_a_mask_is_named(model):
    with pytest.raises(ValueError, match=r"text 1 has no \[MASK\]; put one"):
        model.predict(["a [MASK]", "none", "b [MASK]"])
    with pytest.raises(ValueError, match=r"text 0 has no \[MASK\]"):
        model.predict("")


@pytest.mark.filterwarnings("ignore:1 of 1 texts were longer than 16 tokens")
def test_a_mask_that_is_cut_off_is_missed(folder):
    model = FillMask.from_pretrained(folder, max_seq_length=16)
    with pytest.raises(ValueError, match=r"\[MASK\] of text 0 lies beyond its first 16 tokens"):
        model.predict("word " * 30 + "[MASK]")
    strict = FillMask.from_pretrained(folder, max_seq_length=16, on_long="error")
    with pytest.raises(ValueError, match="text 0 is longer than 16 tokens"):
        strict.predict("word " * 30 + "[MASK]")


def test_items_that_are_no_strings_are_named(model):
    with pytest.raises(TypeError, match="text 1 is int"):
        model.predict(["a [MASK]", 7])


def test_a_mask_may_be_the_first_token_of_a_text(folder, tmp_path):
    """Where the tokenizer adds no [CLS]."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    stored = json.loads((bare / "tokenizer.json").read_text(encoding="utf-8"))
    (bare / "tokenizer.json").write_text(json.dumps({**stored, "post_processor": None}), encoding="utf-8")
    model = FillMask.from_pretrained(bare)
    assert model.tokenizer.encode(["[MASK]"])[0] == [[50284]]
    texts = ["[MASK] a", "[MASK]", "b [MASK]"]
    together = [[[t["token_id"] for t in tokens] for tokens in masks] for masks in model.predict(texts)]
    assert [len(masks) for masks in together] == [1, 1, 1]
    assert together == [[[t["token_id"] for t in tokens] for tokens in model.predict(text)] for text in texts]


def test_the_mask_token_is_public(model):
    assert model.mask_token == "[MASK]"


def test_another_checkpoint_is_refused(make_checkpoint):
    folder, _ = make_checkpoint(num_hidden_layers=1, hidden_size=32, num_attention_heads=1)
    with pytest.raises(CheckpointError, match=r"a ModernBertModel, no masked language model: use Embedder for it"):
        FillMask.from_pretrained(folder)


def test_a_model_must_be_named():
    with pytest.raises(TypeError, match=r"FillMask\.from_pretrained needs a model"):
        FillMask.from_pretrained()


def test_a_tokenizer_without_a_mask_is_refused(folder, tmp_path):
    copy = tmp_path / "unmasked"
    shutil.copytree(folder, copy)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    stored = (copy / "tokenizer.json").read_text(encoding="utf-8").replace('"[MASK]"', '"[HIDDEN]"')
    json.loads(stored)
    (copy / "tokenizer.json").write_text(stored, encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no mask token"):
        FillMask.from_pretrained(copy)


def test_the_encoder_runs_once_however_many_masks_there_are(make_checkpoint, monkeypatch):
    model = ml.FillMask.from_pretrained(make_checkpoint("ModernBertForMaskedLM")[0])
    text = " ".join(["a [MASK]"] * 7)
    expected = model.predict(text, top_k=2)
    runs = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr("modernbert_lite.fill_mask._ROWS", 2)
    got = model.predict(text, top_k=2)
    assert len(runs) == 1
    assert [[p["token_id"] for p in mask] for mask in got] == [[p["token_id"] for p in mask] for mask in expected]


# ---- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        ["Paris", "\u0120Paris", "ing"],  # as the vocabulary spells them
        [" Paris", " London"],  # as decoded: one token each
        "Paris",
        ["Paris", "Paris", " Paris", "unbelievabilities", "東京"],  # twice, and of several tokens
        ["a", "b", "c", "d", "e", "f", "g"],  # more than top_k
        ["", "x"],
        ["[MASK]", "[SEP]"],
    ],
)
@pytest.mark.parametrize("top_k", [1, 5])
def test_targets_are_scored_as_the_pipeline_does(model, folder, targets, top_k):
    from transformers import pipeline

    theirs = pipeline("fill-mask", str(folder), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.predict(TEXTS, targets=targets, top_k=top_k)
        wanted = [theirs(text, targets=targets, top_k=top_k) for text in TEXTS]
    for masks, others in zip(got, wanted, strict=True):
        others = others if isinstance(others[0], list) else [others]  # the pipeline gives one [MASK]'s list alone
        for tokens, entries in zip(masks, others, strict=True):
            assert [t["token_id"] for t in tokens] == [e["token"] for e in entries]
            assert [t["token"] for t in tokens] == [e["token_str"] for e in entries]
            assert [t["score"] for t in tokens] == pytest.approx([e["score"] for e in entries], abs=1e-5)


def test_a_target_has_the_probability_that_it_has_among_all(model):
    everything = {t["token_id"]: t["score"] for t in model.predict(TEXTS[0], top_k=50368)[0]}
    got = model.predict(TEXTS[0], targets=iter([" Paris", " London"]))[0]
    assert {t["token"] for t in got} == {" Paris", " London"}
    assert all(t["score"] == pytest.approx(everything[t["token_id"]], abs=1e-7) for t in got)


def test_a_target_of_several_tokens_is_told_once_and_before_work(model):
    with pytest.warns(UserWarning, match=r"the targets \['unbelievabilities', ''\] are no single tokens") as caught:
        got = model.predict(TEXTS, targets=["unbelievabilities", "", " Paris"])
    assert len(caught) == 1
    assert [t["token"] for t in sorted(got[0][0], key=lambda t: t["token"])] == [" Paris", "un"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of one token each: nothing to tell
        model.predict(TEXTS, targets=[" Paris", "\u0120London", "."])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, "targets has no token; at least one is needed"),
        ("", ValueError, "targets has no token"),
        (["a", 7], TypeError, "text 1 is int"),
        (7, TypeError, "targets is int"),
        ({"a": 1}, TypeError, "targets is dict"),
        (["\ud800"], ValueError, "is not valid Unicode"),
    ],
)
def test_bad_targets_are_refused(model, targets, error, message):
    with pytest.raises(error, match=message):
        model.predict(TEXTS, targets=targets)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{}, {"targets": ["Paris", " London"]}])
def test_one_logit_that_is_not_finite_names_the_text(folder, value, options):
    """-inf, too: the softmax makes 0 of it. The other texts of the batch are fine."""
    model = FillMask.from_pretrained(folder, device="cpu")
    logits, rows = model.network.logits, len(model.predict("a [MASK] [MASK]"))

    def spoilt(x):
        out = logits(x)
        if len(x) > rows:
            out[1, 77] = value  # batches are sorted: the second row is the second text's here
        return out

    model.network.logits = spoilt
    with pytest.raises(ValueError, match=r"^the result of text 1, .*b \[MASK\] b.*, is not finite in float32"):
        model.predict(["a [MASK] a a a", "b [MASK] b b", "c [MASK]"], **options)


def test_a_token_is_decoded_once(folder, monkeypatch):
    import copy
    import pickle

    tokenizer = FillMask.from_pretrained(folder, device="cpu").tokenizer
    texts, calls, rust = [tokenizer.decode(i) for i in range(300)], [], tokenizer._rust

    class Counting:
        def decode(self, ids, **options):
            calls.extend(ids)
            return rust.decode(ids, **options)

    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert [other.decode(i) for i in range(301)] == [*texts, rust.decode([300], skip_special_tokens=False)]
    monkeypatch.setattr(tokenizer, "_rust", Counting())
    assert [tokenizer.decode(i) for i in [*range(300), 300, 300]] == [*texts, *[rust.decode([300])] * 2]
    assert calls == [300]
