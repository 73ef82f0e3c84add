"""Token ids in the place of texts, and lengths that are arguments."""

import json

import numpy as np
import pytest
import torch

from modernbert_lite import Embedder, OptionError
from modernbert_lite.pipeline import feed

TEXTS = ["a river", "", "the green house on the hill " * 9, "seven", "naïve 図書館"]


@pytest.fixture(scope="module")
def model():
    return Embedder.from_pretrained("tiny", device="cpu")


def test_encode_is_encode_ids_of_token_ids(model):
    ids = model.token_ids(TEXTS)
    assert [type(sequence) for sequence in ids] == [list] * len(TEXTS)
    assert np.array_equal(model.encode_ids(ids), model.encode(TEXTS))
    options = {"truncate_dim": 7, "normalize_embeddings": True}
    assert np.array_equal(model.encode_ids(ids, **options), model.encode(TEXTS, **options))


def test_ids_are_those_that_encode_feeds(model):
    ids = model.token_ids(TEXTS, prompt="find: ")
    assert ids == model.tokenizer.encode([f"find: {text}" for text in TEXTS])[0]
    assert model.token_ids("seven") == model.token_ids(["seven"])[0]
    assert np.array_equal(model.encode_ids(ids), model.encode(TEXTS, prompt="find: "))


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda ids: np.array(ids, ">i2")], ids=range(4))
def test_ids_come_as_a_server_or_a_trainer_has_them(model, kind):
    ids = [sequence for sequence in model.token_ids(TEXTS) if max(sequence) < 1 << 15]
    expected = model.encode_ids(ids)
    assert len(ids) >= 3
    assert np.array_equal(model.encode_ids(map(kind, ids)), expected)
    assert np.array_equal(model.encode_ids([kind(sequence) for sequence in ids]), expected)


def test_windows_of_ids(model, monkeypatch):
    ids = model.token_ids(TEXTS)
    expected = model.encode_ids(ids)
    monkeypatch.setattr(feed, "_WINDOW_TEXTS", 2)
    monkeypatch.setattr(feed, "_PIECE_CHARACTERS", 3)
    assert np.allclose(model.encode_ids(iter(ids)), expected, atol=1e-6)
    assert model.token_ids(iter(TEXTS)) == ids
    assert model.encode_ids([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([[5], "text"], TypeError, r"sequence 1 is str \('text'\); each must be a list of token ids"),
        ([[5], 7], TypeError, r"sequence 1 is int \(7\)"),
        ([[5, 6.0]], TypeError, r"sequence 0 holds float \(6.0\); token ids are whole numbers"),
        ([[5, True]], TypeError, r"sequence 0 holds bool \(True\)"),
        ([[[5]]], TypeError, r"sequence 0 holds list"),
        ([[5], []], ValueError, r"sequence 1 has 0 token ids; it must have 1 to \d+ \(max_seq_length\)"),
        ([[5] * 5000], ValueError, r"sequence 0 has 5000 token ids"),
        ([[5], [6, -1]], ValueError, r"sequence 1 holds the token id -1; ids are 0 to \d+"),
        ([[5, 1 << 40]], ValueError, r"sequence 0 holds the token id 1099511627776"),
        ("text", TypeError, r"sequence 0 is str \('text'\)"),
        ({"a": [5]}, TypeError, r"sequences is dict; it must be an iterable of lists of token ids"),
        (5, TypeError, r"sequences is int; it must be an iterable of lists of token ids"),
    ],
)
def test_other_ids_are_refused_by_name_before_any_work(model, monkeypatch, sequences, error, message):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(error, match=message):
        model.encode_ids(sequences)


def test_texts_that_are_too_long_are_as_in_encode(model):
    short = Embedder.from_pretrained("tiny", device="cpu", max_seq_length=8)
    with pytest.warns(UserWarning, match="2 of 5 texts were longer than 8 tokens and were cut"):
        ids = short.token_ids(TEXTS)
    with pytest.warns(UserWarning, match="2 of 5 texts were longer than 8 tokens"):
        assert np.array_equal(short.encode_ids(ids), short.encode(TEXTS))
    short.on_long = "error"
    with pytest.raises(ValueError, match="text 2 is longer than 8 tokens, and on_long is 'error'"):
        short.token_ids(TEXTS)


def test_a_prompt_that_is_not_pooled(make_checkpoint):
    folder, _ = make_checkpoint(num_hidden_layers=1, whole_tokenizer=True)
    types = "sentence_transformers.models"
    modules = [{"type": f"{types}.Transformer", "path": ""}, {"type": f"{types}.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    model = Embedder.from_pretrained(folder, device="cpu")
    ids, skip = model.token_ids(TEXTS, prompt="Find: "), model.tokenizer.prompt_length("Find: ")
    assert np.array_equal(model.encode_ids(ids, prompt_tokens=skip), model.encode(TEXTS, prompt="Find: "))
    assert not np.allclose(model.encode_ids(ids), model.encode(TEXTS, prompt="Find: "))
    with pytest.raises(OptionError, match="prompt_tokens is -1"):
        model.encode_ids(ids, prompt_tokens=-1)


def test_an_error_in_the_middle_keeps_what_was_done(model):
    def sequences():
        yield from model.token_ids(["a", "b"])
        yield [-5]

    with pytest.raises(ValueError, match=r"sequence 2 holds the token id -5.*rows were finished"):
        model.encode_ids(sequences())
