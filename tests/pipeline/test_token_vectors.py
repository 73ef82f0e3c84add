"""encode(.., output_value=..): a vector for every token, as sentence-transformers gives them, and where it is."""

import numpy as np
import pytest
from sentence_files import write_sentence_files

import modernbert_lite as ml
from modernbert_lite import Embedder, OptionError

TEXTS = ["A man is playing a guitar.", "", "   ", "naïve café 東京 🙂", "word " * 40, "spelled [SEP] out"]
SMALL = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = {"query": "Search query: ", "tight": "x"}


@pytest.fixture
def make(make_checkpoint):
    """make(keys of the sentence files..) -> a folder with prompts."""

    def make(**options):
        folder, _ = make_checkpoint(whole_tokenizer=True, **SMALL)
        return write_sentence_files(folder, prompts=PROMPTS, **options)

    return make


def reference(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("include_prompt", [False, True])
def test_values_are_those_of_sentence_transformers(make, normalize, include_prompt):
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": include_prompt}
    folder = make(normalize=normalize, pooling=pooling)
    theirs, model = reference(folder), Embedder.from_pretrained(folder)
    for name in (None, "query"):
        wanted = theirs.encode(TEXTS, output_value=None, prompt_name=name)
        tokens = model.encode(TEXTS, output_value="token_embeddings", prompt_name=name)
        everything = model.encode(TEXTS, output_value=None, prompt_name=name)
        for one, row, other in zip(tokens, everything, wanted, strict=True):
            kept = other["attention_mask"].bool()
            assert (one.dtype, one.shape) == (np.float32, (int(kept.sum()), 64))
            assert np.abs(one - other["token_embeddings"][kept].numpy()).max() <= 2e-5
            assert np.array_equal(row["token_embeddings"], one)
            assert row["input_ids"].tolist() == other["input_ids"][kept].tolist()
            assert row["attention_mask"].tolist() == [1] * len(one)
            assert np.abs(row["sentence_embedding"] - other["sentence_embedding"].numpy()).max() <= 1e-5
        vectors = model.encode(TEXTS, prompt_name=name)
        assert np.abs(np.stack([row["sentence_embedding"] for row in everything]) - vectors).max() <= 1e-5


def test_the_last_hidden_states_come_for_a_list_a_string_and_an_iterator(make, monkeypatch):
    folder = make()
    model, network = Embedder.from_pretrained(folder), ml.load_model(folder)
    rows = model.encode(TEXTS, output_value="token_embeddings")
    for text, row in zip(TEXTS, rows, strict=True):
        assert np.abs(row - network(ml.pack(model.tokenizer.encode([text])[0])).numpy()).max() <= 2e-5
    assert np.abs(model.encode(TEXTS[0], output_value="token_embeddings") - rows[0]).max() <= 1e-5
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 2)
    again = model.encode(iter(TEXTS), output_value="token_embeddings")
    assert max(np.abs(a - b).max() for a, b in zip(again, rows, strict=True)) <= 1e-5
    one = model.encode(TEXTS[0], output_value=None)
    assert list(one) == ["input_ids", "attention_mask", "token_embeddings", "sentence_embedding"]
    assert model.encode([], output_value="token_embeddings") == []
    assert model.encode([], output_value=None) == []
    assert np.array_equal(model.encode(TEXTS, output_value="sentence_embedding"), model.encode(TEXTS))


def test_normalising_and_cutting_are_of_sentence_vectors_alone(make):
    """As in sentence-transformers."""
    folder = make()
    theirs, model = reference(folder), Embedder.from_pretrained(folder, truncate_dim=48)
    options = {"normalize_embeddings": True, "truncate_dim": 16}
    wanted = theirs.encode(TEXTS[0], output_value="token_embeddings", **options)
    got = model.encode(TEXTS[0], output_value="token_embeddings", **options)
    assert got.shape == (len(wanted), 64)
    assert np.abs(got - wanted.numpy()).max() <= 2e-5
    row = model.encode(TEXTS[0], output_value=None, **options)
    assert np.abs(row["sentence_embedding"] - model.encode(TEXTS[0], **options)).max() <= 1e-5
    assert model.encode(TEXTS[0], output_value=None)["sentence_embedding"].shape == (48,)


def test_low_precision_gives_fp32_vectors(make):
    folder = make()
    exact, rough = (
        Embedder.from_pretrained(folder, dtype=d).encode(TEXTS[0], output_value=None) for d in (None, "bfloat16")
    )
    for key in ("token_embeddings", "sentence_embedding"):
        assert rough[key].dtype == np.float32
        assert 0 < np.abs(exact[key] - rough[key]).max() < 0.2


def test_the_bundled_model_and_its_dense_free_width():
    model = Embedder.from_pretrained("tiny")
    tokens, places = model.encode("two words", output_value="token_embeddings"), model.token_offsets("two words")
    assert tokens.shape == (len(places), 384)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_value": "tokens"}, "output_value is 'tokens'; it must be one of sentence_embedding, token_emb"),
        (
            {"output_value": "token_embeddings", "precision": "int8"},
            "precision is 'int8'; with output_value='token_embe",
        ),
        ({"output_value": None, "truncate_dim": 65}, "truncate_dim is 65; it must be from 1 to 64"),
        ({"output_value": None, "prompt_name": "no"}, "prompt_name is 'no'"),
    ],
)
def test_bad_options_are_named(make, options, message):
    with pytest.raises(OptionError, match=message):
        Embedder.from_pretrained(make()).encode(TEXTS, **options)


def test_bad_texts_are_named(make):
    model = Embedder.from_pretrained(make())
    for use in (lambda texts: model.encode(texts, output_value="token_embeddings"), model.token_offsets):
        with pytest.raises(TypeError, match="text 1 is int"):
            use(["a", 7])
        with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
            use(["a", "\ud800"])


# ---- where tokens are -----------------------------------------------------------------------------------------------


def test_offsets_are_the_tokenizers_own(make):
    from transformers import AutoTokenizer

    folder = make()
    model = Embedder.from_pretrained(folder)
    wanted = AutoTokenizer.from_pretrained(folder)(TEXTS, return_offsets_mapping=True)["offset_mapping"]
    got = model.token_offsets(TEXTS)
    assert [[tuple(span) for span in text.tolist()] for text in got] == wanted
    assert all(text.dtype == np.int64 for text in got)
    assert model.token_offsets(TEXTS[0]).tolist() == got[0].tolist()
    assert [text.tolist() for text in model.token_offsets(iter(TEXTS))] == [text.tolist() for text in got]
    assert model.token_offsets([]) == []


def test_offsets_are_made_a_window_at_a_time(make, monkeypatch):
    """So that memory is bounded: the tokenizer's own results are much larger than the arrays."""
    from modernbert_lite.pipeline import feed as pipeline

    model = Embedder.from_pretrained(make())
    wanted, sizes, offsets = model.token_offsets(TEXTS), [], model.tokenizer.offsets
    monkeypatch.setattr(model.tokenizer, "offsets", lambda texts, *first: sizes.append(len(texts)) or offsets(texts))
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 4)
    got = model.token_offsets(iter(TEXTS))
    assert [text.tolist() for text in got] == [text.tolist() for text in wanted]
    assert sizes == [4, 2]


@pytest.mark.parametrize(("option", "value"), [("prompt_name", "query"), ("prompt", "a prompt:\n"), ("prompt", "e")])
def test_offsets_are_of_the_text_without_its_prompt(make, option, value):
    """Every row has its place; the rows of the prompt have none, and the text's cover it."""
    model = Embedder.from_pretrained(make())
    vectors = model.encode(TEXTS, output_value="token_embeddings", **{option: value})
    for text, rows, places in zip(TEXTS, vectors, model.token_offsets(TEXTS, **{option: value}), strict=True):
        assert len(rows) == len(places)
        assert {i for start, end in places.tolist() for i in range(start, end)} == set(range(len(text)))
        assert places[0].tolist() == places[-1].tolist() == [0, 0]
    tokens = [TEXTS[0][a:b] for a, b in model.token_offsets(TEXTS[0], prompt_name="query").tolist()]
    assert tokens == ["", "", "", "", "A", " man", " is", " playing", " a", " guitar", ".", ""]


def test_a_token_over_the_border_has_its_part_of_the_text(make):
    model = Embedder.from_pretrained(make())
    assert model.token_offsets("layer", prompt="p").tolist() == [[0, 0], [0, 5], [0, 0]]  # "player"


def test_the_default_prompt_counts(make):
    folder = make(default_prompt_name="query")
    model = Embedder.from_pretrained(folder)
    assert len(model.token_offsets("x")) == len(model.encode("x", output_value="token_embeddings")) == 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_cut_text_has_the_places_of_what_is_left(make, side):
    import json

    folder = make(max_seq_length=12)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": side}))
    model = Embedder.from_pretrained(folder)
    text = " ".join(f"w{i}" for i in range(40))
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 12 tokens and were cut"):
        rows = model.encode([text], output_value="token_embeddings")[0]
    places = model.token_offsets(text)
    assert len(rows) == len(places) == 12
    assert places[1 if side == "right" else -2].tolist() == ([0, 1] if side == "right" else [len(text) - 2, len(text)])


def test_late_chunking(make):
    """The mean of the tokens of a part of a text, read with all of it: other than that of the part alone."""
    model = Embedder.from_pretrained(make(pooling={"pooling_mode_mean_tokens": True}))
    text = "Berlin is a city. It has three million people."
    vectors, places = model.encode(text, output_value="token_embeddings"), model.token_offsets(text)
    border = text.index(" It")
    chunks = [
        vectors[(places[:, 1] > start) & (places[:, 0] < end)] for start, end in ((0, border), (border, len(text)))
    ]
    assert sum(map(len, chunks)) == len(vectors) - 2
    assert np.abs(chunks[1].mean(0) - model.encode(text[border:])).max() > 1e-2


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_a_vector_that_is_not_finite_names_the_text(make, output_value):
    model = Embedder.from_pretrained(make())
    model.network.final_norm.weight.data[3] = np.inf
    with pytest.raises(ValueError, match=r"the result of text 0, str .*, is not finite in float32"):
        model.encode(TEXTS[:1], output_value=output_value)
