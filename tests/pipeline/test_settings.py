"""Settings after loading take effect and are checked, and what goes on around a call changes nothing in it."""

import copy

import numpy as np
import pytest
import torch

from modernbert_lite import Embedder, FillMask, LateInteraction, OptionError, Reranker

TEXTS = ["a man is playing a guitar, and another one sings along to it", "stone", "", "river " * 12]


@pytest.fixture
def tiny():
    return Embedder.from_pretrained("tiny", device="cpu")


@pytest.fixture
def late(small_folders):
    return LateInteraction.from_pretrained(small_folders["late"], device="cpu")


def test_max_seq_length_takes_effect(tiny):
    expected = Embedder.from_pretrained("tiny", device="cpu", max_seq_length=8)
    uncut = tiny.encode(TEXTS)
    tiny.max_seq_length = 8
    for model in (tiny, expected):
        with pytest.warns(UserWarning, match="^2 of 4 texts were longer than 8 tokens"):
            model.vectors = model.encode(TEXTS)
    assert np.array_equal(tiny.vectors, expected.vectors)
    assert np.abs(tiny.vectors - uncut).max() > 1e-3
    assert repr(tiny) == "Embedder(ModernBertModel, 8 tokens, cpu)"
    tiny.on_long = "error"
    with pytest.raises(ValueError, match="text 0 is longer than 8 tokens"):
        tiny.encode(TEXTS)
    tiny.max_seq_length = 512
    assert np.array_equal(tiny.encode(TEXTS), uncut)


def test_it_takes_effect_as_in_sentence_transformers(small_folders):
    st = pytest.importorskip("sentence_transformers")
    ours, theirs = (
        Embedder.from_pretrained(small_folders["dense"], device="cpu"),
        st.SentenceTransformer(str(small_folders["dense"]), device="cpu"),
    )
    ours.max_seq_length = theirs.max_seq_length = 8
    with pytest.warns(UserWarning, match="were cut"):
        got = ours.encode(TEXTS)
    assert np.abs(got - theirs.encode(TEXTS)).max() <= 2e-5


def test_every_class_takes_it(small_folders):
    for cls, name, call in (
        (Reranker, "reranker", lambda model: model.predict([(TEXTS[0], TEXTS[3])])),
        (FillMask, "masked", lambda model: model.predict("[MASK] " + TEXTS[3])),
        (LateInteraction, "late", lambda model: model.encode_document(TEXTS[0])),
    ):
        model = cls.from_pretrained(small_folders[name], device="cpu")
        model.max_seq_length = 9
        with pytest.warns(UserWarning, match="^1 of 1 texts were longer than 9 tokens"):
            call(model)


def test_query_length_takes_effect_with_what_is_padded_to_it(late, small_folders):
    assert (late.query_length, late.padded_length, late.max_seq_length) == (16, 16, 40)
    late.query_length = 9
    expected = LateInteraction.from_pretrained(small_folders["late"], device="cpu", query_length=9)
    for model in (late, expected):
        with pytest.warns(UserWarning, match="^1 of 1 texts were longer than 9 tokens"):
            model.vectors = model.encode_queries(TEXTS[0])
    assert late.vectors.shape == (9, 32)
    assert np.array_equal(late.vectors, expected.vectors)
    assert late.encode_queries("a").shape == (9, 32)
    assert late.encode_documents(TEXTS[0]).shape[0] > 9
    assert late.max_seq_length == 40
    for bad in (2, 0, 10_000, "9", True, 9.0):
        with pytest.raises(OptionError, match="query_length is "):
            late.query_length = bad
    assert (late.query_length, late.padded_length) == (9, 9)


def test_the_other_settings_take_effect(tiny, monkeypatch):
    seen, network = [], tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda batch, *rest: seen.append(batch.seqlens) or network(batch, *rest))
    expected = tiny.encode(TEXTS)
    assert len(seen) == 1
    tiny.batch_tokens = np.int64(1)
    assert np.abs(tiny.encode(TEXTS) - expected).max() <= 1e-5
    assert len(seen) == 1 + len(TEXTS)
    tiny.truncate_dim = 10
    assert np.abs(tiny.encode(TEXTS) - tiny.encode(TEXTS, truncate_dim=10)).max() == 0
    tiny.truncate_dim = None
    assert tiny.encode("a").shape == (384,)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("max_seq_length", 2, "max_seq_length is 2; it must be over 3"),
        ("max_seq_length", "5", "max_seq_length is '5'; it must be .*a whole number"),
        ("max_seq_length", None, "max_seq_length is None"),
        ("max_seq_length", 1 << 40, "max_seq_length is 1099511627776"),
        ("batch_tokens", 0, "batch_tokens is 0; it must be at least 1"),
        ("batch_tokens", "5", "batch_tokens is '5'; it must be at least 1, a whole number"),
        ("on_long", "cut", "on_long is 'cut'; it must be one of truncate, error"),
        ("truncate_dim", 385, "truncate_dim is 385; it must be from 1 to 384"),
        ("truncate_dim", "5", "truncate_dim is '5'; it must be from 1 to 384, a whole number"),
    ],
)
def test_settings_are_checked(tiny, name, bad, message):
    before = getattr(tiny, name)
    with pytest.raises(OptionError, match=message):
        setattr(tiny, name, bad)
    assert getattr(tiny, name) == before
    if bad is not None:
        with pytest.raises(OptionError, match=message):
            Embedder.from_pretrained("tiny", device="cpu", **{name: bad})


def test_copies_of_a_model_share_its_settings_or_not_as_deep_as_they_are(tiny):
    deep = copy.deepcopy(tiny)
    deep.max_seq_length = 8
    assert tiny.max_seq_length == 512


def test_a_named_activation_set_after_loading_is_used(small_folders):
    model = Reranker.from_pretrained(small_folders["reranker"], device="cpu")
    logits = model.predict([("a", "b")], activation_fn="identity")
    model.activation_fn = "identity"
    assert np.array_equal(model.predict([("a", "b")]), logits)


# ---- autocast --------------------------------------------------------------------------------------------------------


def everything(small_folders):
    """All results of all classes, from loading on."""
    opened = {name: small_folders[name] for name in ("dense", "reranker", "masked", "late")}
    dense = Embedder.from_pretrained(opened["dense"], device="cpu")
    tiny = Embedder.from_pretrained("tiny", device="cpu")
    late = LateInteraction.from_pretrained(opened["late"], device="cpu")
    queries, documents = late.encode_queries(TEXTS[:2]), late.encode_documents(TEXTS)
    vectors = dense.encode(TEXTS)
    filled = FillMask.from_pretrained(opened["masked"], device="cpu").predict("[MASK] a", top_k=3)
    return [
        vectors,
        tiny.encode(TEXTS),
        dense.similarity(vectors, vectors),
        *queries,
        *documents,
        late.similarity(queries, documents),
        Reranker.from_pretrained(opened["reranker"], device="cpu").predict([("a", "b"), ("c", TEXTS[3])]),
        np.array([[p["score"] for p in mask] for mask in filled]),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_changes_nothing(small_folders, dtype):
    expected = everything(small_folders)
    with torch.autocast("cpu", dtype=dtype):
        got = everything(small_folders)
        assert torch.is_autocast_enabled("cpu")  # as it was
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_length", 12, "has no max_length: it is max_seq_length here"),
        ("document_length", 12, "has no document_length: it is max_seq_length here"),
        ("batch_size", 1, "has no batch_size: batch size is counted in tokens here: batch_tokens"),
        ("dtype", "bfloat16", "has no dtype: it is an option of from_pretrained"),
        ("dimension", 5, "dimension is the checkpoint's"),
    ],
)
def test_other_names_of_settings_are_refused_and_not_passed_over(tiny, name, value, message):
    with pytest.raises(AttributeError, match=message):
        setattr(tiny, name, value)
    tiny.mine = 5  # a user's own attribute
    assert tiny.mine == 5


def test_a_prompt_that_was_written_into_the_mapping_is_checked(tiny):
    tiny.prompts["bad"] = 5
    with pytest.raises(OptionError, match="the prompt 'bad' is 5; it must be a str"):
        tiny.encode("a", prompt_name="bad")


@pytest.mark.parametrize("kind", ["dense", "reranker", "masked", "late"])
def test_torch_s_default_device_changes_nothing(small_folders, kind):
    """A default of "cuda" beside a model on the CPU does what "meta" does here."""
    cls = {"dense": Embedder, "reranker": Reranker, "masked": FillMask, "late": LateInteraction}[kind]
    call = {
        "dense": lambda model: model.similarity(model.encode(TEXTS), model.encode(TEXTS[:1])),
        "reranker": lambda model: model.predict([(text, "stone") for text in TEXTS]),
        "masked": lambda model: [p["score"] for p in model.predict("a [MASK]")[0]],
        "late": lambda model: model.similarity(model.encode_query(TEXTS[:1]), model.encode_document(TEXTS[:2])),
    }[kind]
    expected = call(cls.from_pretrained(small_folders[kind], device="cpu"))
    with torch.device("meta"):
        got = call(cls.from_pretrained(small_folders[kind], device="cpu"))
    assert np.array_equal(got, expected)
