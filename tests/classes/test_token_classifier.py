"""TokenClassifier: entities with words and places as transformers' token-classification pipeline gives them, for every
kind of tokenizer."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tokenizer_kinds_cases import KINDS

from modernbert_lite import CheckpointError, Embedder, OptionError, Reranker, TokenClassifier
from modernbert_lite.checkpoint.open import Checkpoint
from modernbert_lite.pipeline.tokenizer import Tokenizer

HERE = Path(__file__).parents[1]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
STRATEGIES = ("none", "simple", "first", "average", "max")
TEXTS = [
    "Wolfgang lives in Berlin, Wolfgang's sister doesn't.",
    "",
    "   ",
    " naïve CAFÉ\n東京は大きい 🙂👩‍👩‍👧 e\u0301",
    "word " * 40,
    "[CLS] spelled [SEP] out [MASK]ed [UNK] <unk> </s> ꙮ",
    "The tokenizers tokenize unbelievably-long-hyphenated wordings (12345), don't they?",
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(kind of tokenizer, seed) -> a token classifier's folder, made once: ModernBERT with its own tokenizer, GTE
    with the others."""
    made = {}

    def make(kind="modernbert", seed=0):
        import transformers

        if (kind, seed) in made:
            return made[kind, seed]
        folder = made[kind, seed] = tmp_path_factory.mktemp(kind)
        vocabulary = 1_000
        if kind == "modernbert":
            vocabulary = 50_368
            for path in (HERE / "data" / "modernbert-tokenizer").glob("*token*.json"):
                shutil.copy(path, folder)
        else:
            tokenizer, settings = KINDS[kind]()
            tokenizer.save(str(folder / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        torch.manual_seed(seed)
        family = "ModernBert" if kind == "modernbert" else "Gte"
        config = getattr(transformers, family + "Config")(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            pad_token_id=0,
            initializer_range=0.3,
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
        getattr(transformers, family + "ForTokenClassification")(config).save_pretrained(folder)
        return folder

    return make


@functools.cache
def pipeline(folder):
    from transformers import pipeline

    return pipeline("token-classification", str(folder), device="cpu")


def theirs(folder, texts, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that words are found by a heuristic
        return pipeline(folder)(texts, **options)


def assert_same(got, wanted):
    """Everything exactly, scores within 1e-5."""
    assert len(got) == len(wanted)
    for ours, others in zip(got, wanted, strict=True):
        assert [{**entity, "score": None} for entity in ours] == [{**entity, "score": None} for entity in others]
        assert [list(entity) for entity in ours] == [list(entity) for entity in others]
        assert [e["score"] for e in ours] == pytest.approx([float(e["score"]) for e in others], abs=1e-5)
        assert all(type(entity["score"]) is float for entity in ours)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("modernbert", 0),
        ("modernbert", 1),
        ("bert", 0),
        ("bert", 1),
        ("xlmr", 0),
        ("gemma", 0),
        ("japanese", 0),
        ("qwen", 0),
    ],
)
def test_entities_are_those_of_the_pipeline(make, kind, seed):
    folder = make(kind, seed)
    model = TokenClassifier.from_pretrained(folder)
    for strategy in STRATEGIES:
        for ignored in (["O"], [], ["I-LOC", "PER"]):
            got = model.predict(TEXTS, aggregation_strategy=strategy, ignore_labels=ignored)
            assert_same(got, theirs(folder, TEXTS, aggregation_strategy=strategy, ignore_labels=ignored))
    assert any(got)
    # The default is "simple" without "O".
    assert_same(model.predict(iter(TEXTS)), theirs(folder, TEXTS, aggregation_strategy="simple"))


def test_one_string_gives_its_entities_alone_and_the_batch_does_not_count(make):
    folder = make()
    model = TokenClassifier.from_pretrained(folder)
    rows = model.predict(TEXTS)
    assert_same([model.predict(text) for text in TEXTS], rows)
    assert_same(TokenClassifier.from_pretrained(folder, batch_tokens=1).predict(TEXTS[::-1])[::-1], rows)
    assert model(TEXTS[0]) == model.predict(TEXTS[0])
    assert model.predict([]) == []
    assert model.labels == tuple(LABELS)


def test_windows_keep_texts_and_entities_together(make, monkeypatch):
    model = TokenClassifier.from_pretrained(make())
    rows = model.predict(TEXTS * 2)
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 3)
    assert_same(model.predict(iter(TEXTS * 2)), rows)


def test_the_reference_backend(make, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    folder = make()
    got = TokenClassifier.from_pretrained(folder).predict(TEXTS, aggregation_strategy="none")
    assert_same(got, theirs(folder, TEXTS, aggregation_strategy="none"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_cut_as_the_pipeline_cuts_it(make, tmp_path, side):
    folder = shutil.copytree(make(), tmp_path / "short")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 16, "truncation_side": side}))
    with pytest.warns(UserWarning, match="4 of 7 texts were longer than 16 tokens and were cut") as caught:
        got = TokenClassifier.from_pretrained(folder).predict(TEXTS, ignore_labels=())
    assert len(caught) == 1
    assert_same(got, theirs(folder, TEXTS, aggregation_strategy="simple", ignore_labels=[]))
    with pytest.raises(ValueError, match="text 1 is longer than 16 tokens"):
        TokenClassifier.from_pretrained(folder, on_long="error").predict(["a", TEXTS[4]])


def test_a_text_whose_beginning_alone_is_read_has_the_same_places(make):
    """Beyond 128 characters a token only the beginning of a text is tokenized."""
    model = TokenClassifier.from_pretrained(make(), max_seq_length=8)
    text = "Wolfgang lives in Berlin, " * 100
    with pytest.warns(UserWarning, match="were cut"):
        long, short = model.predict([text, text[:60]], aggregation_strategy="none", ignore_labels=())
    assert len(long) == 6
    assert_same([long], [short])


def test_ignored_labels_may_be_one_string(make):
    model = TokenClassifier.from_pretrained(make())
    everything = model.predict(TEXTS[0], ignore_labels=())
    assert {"PER", "LOC"} <= {entity["entity_group"] for entity in everything}
    kept = [entity for entity in everything if entity["entity_group"] != "PER"]
    assert_same([model.predict(TEXTS[0], ignore_labels="PER")], [kept])


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (
            ["a"],
            {"aggregation_strategy": "mean"},
            OptionError,
            "aggregation_strategy is 'mean'; it must be one of none, ",
        ),
        (["a", 7], {}, TypeError, "text 1 is int"),
        ([("a", "b")], {}, TypeError, "text 0 is tuple"),
        (b"a", {}, TypeError, "texts is bytes"),
        (["a", "\ud800"], {}, ValueError, "text 1 is not valid Unicode"),
    ],
)
def test_what_is_refused(make, texts, options, error, message):
    with pytest.raises(error, match=message):
        TokenClassifier.from_pretrained(make()).predict(texts, **options)


def test_another_checkpoint_is_refused_with_the_right_class(make, make_checkpoint):
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1}
    for architecture, right in (
        ("ModernBertModel", "Embedder"),
        ("ModernBertForMaskedLM", "FillMask"),
        ("ModernBertForSequenceClassification", "Classifier or Reranker"),
    ):
        folder, _ = make_checkpoint(architecture, name=architecture, **small)
        with pytest.raises(CheckpointError, match=f"holds a {architecture}, no token classifier: use {right} for it"):
            TokenClassifier.from_pretrained(folder)
    assert Checkpoint.find(make()).use == "TokenClassifier"
    for other, name in ((Embedder, "embedding model"), (Reranker, "reranker")):
        with pytest.raises(CheckpointError, match=f"no {name}: use TokenClassifier for it"):
            other.from_pretrained(make())


# ---- where tokens are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modernbert", "bert", "xlmr", "gemma", "japanese", "qwen"])
@pytest.mark.parametrize("length", [9, 512])
def test_offsets_belong_to_the_ids_and_are_transformers_own(make, kind, length):
    from transformers import AutoTokenizer

    folder = make(kind)
    tokenizer = Tokenizer(folder, length)
    tokens = tokenizer.offsets(TEXTS)
    assert [[i for i, _ in text] for text in tokens] == tokenizer.encode(TEXTS)[0]
    reference = AutoTokenizer.from_pretrained(folder)
    wanted = reference(
        TEXTS, truncation=True, max_length=length, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    assert [[span or (0, 0) for _, span in text] for text in tokens] == wanted["offset_mapping"]
    assert [[int(span is None) for _, span in text] for text in tokens] == wanted["special_tokens_mask"]


def test_a_logit_that_is_not_finite_names_the_text(make):
    model = TokenClassifier.from_pretrained(make())
    model.network.classifier.bias.data[1] = -torch.inf
    with pytest.raises(ValueError, match=r"the result of text 0, str .*, is not finite in float32"):
        model.predict(TEXTS[:1])
