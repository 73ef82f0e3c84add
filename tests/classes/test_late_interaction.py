"""LateInteraction: the same vectors as sentence-transformers' MultiVectorEncoder on the same folder, in PyLate's form
and its own; MaxSim; and what is refused."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from late_interaction_cases import (  # noqa: F401
    OLD,
    TEXTS,
    add_dense,
    assert_equal_to_reference,
    assert_same,
    pylate,
    reference,
    write_modules,
)

from modernbert_lite.late_interaction import LateInteraction, maxsim


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attend_to_expansion_tokens": True},
        {"do_query_expansion": False},
        {"query_length": 90},  # farther than a local layer sees
        {"query_length": None, "document_length": None, "skiplist_words": None, "do_query_expansion": None},
        {"model_type": None, "attend_to_expansion_tokens": None, "attend_to_mask_tokens": True},
        {"query_prefix": "query: ", "document_prefix": ""},
        {"prompts": {"query": "Find: ", "document": "[D] Text: "}},
        {"query_expansion": {"strategy": "min", "length": 16, "token": "[SEP]"}, "query_length": 40},
        {"query_expansion": {"strategy": "min", "length": 16}, "query_length": 16},
        {"query_expansion": {"strategy": "fixed", "length": 20, "attend": True}},
    ],
    ids=str,
)
def test_pylates_form_gives_sentence_transformers_vectors(pylate, monkeypatch, changes):
    folder = pylate(**changes)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    _, queries, documents = assert_equal_to_reference(folder)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")
    model = LateInteraction.from_pretrained(folder, device="cpu")
    with pytest.warns(UserWarning, match="were cut"):
        again = model.encode_queries(TEXTS) + model.encode_documents(TEXTS)
    assert_same(again, queries + documents, 1e-5)


@pytest.mark.parametrize("local_attention", [8, 128])
def test_padding_farther_from_the_text_than_a_window(make_checkpoint, pylate, local_attention):
    folder = pylate(query_length=40)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "local_attention": local_attention}))
    assert_equal_to_reference(folder)


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("form", ["expansion", "none", "meanmaxsim"])
def test_sentence_transformers_own_form(pylate, tmp_path, form, attend):
    """Saved by it: what PyLate has in one file is in three modules'."""
    theirs = reference(pylate(attend_to_expansion_tokens=attend, do_query_expansion=form != "none"))
    theirs[2].skiplist_words, theirs[2].skiplist_tasks = [".", ",", "[MASK]"], ["query", "document"]
    if form == "meanmaxsim":
        theirs.similarity_fn_name = form
    theirs.save_pretrained(str(tmp_path / "saved"))
    model, queries, _ = assert_equal_to_reference(tmp_path / "saved")
    assert model.similarity_fn_name == ("meanmaxsim" if form == "meanmaxsim" else "maxsim")
    assert model.padded_length == (0 if form == "none" else 32)
    assert len(queries[1]) == 3  # [CLS] [Q] [SEP]: the skip list holds here for queries, and for padding


def test_several_dense_layers_with_residuals_and_biases(pylate):
    folder = pylate()
    shutil.rmtree(folder / "1_Dense")
    add_dense(folder, "1_Dense", 40, 96, bias=True, activation_function="torch.nn.modules.activation.GELU")
    add_dense(folder, "2_Dense", 24, 40, seed=1, use_residual=True)
    add_dense(folder, "3_Dense", 24, 24, seed=2, use_residual=True, module_input_name="token_embeddings")
    dense = [(f"{i}_Dense", "pylate.models.Dense.Dense") for i in (1, 2, 3)]
    write_modules(folder, ("", OLD + "Transformer"), *dense)
    model, queries, _ = assert_equal_to_reference(folder)
    assert model.dimension == queries[0].shape[1] == 24


def test_without_a_dense_vectors_have_the_networks_width(pylate):
    folder = pylate()
    write_modules(folder, ("", OLD + "Transformer"))
    model, queries, _ = assert_equal_to_reference(folder)
    assert model.dimension == queries[0].shape[1] == 96


@pytest.mark.parametrize("prefix", ["[Q] ", "[Q]"])
def test_a_prefix_that_the_tokenizer_would_take_apart_stays_one_token(pylate, prefix):
    """In the vocabulary, but of no merges and no added token, as [unused0] is in BERT's: text never becomes it."""
    folder = pylate(("[X] ", "[D] "), query_prefix="[Q] ")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    model = data["model"]
    added = {token["content"] for token in data["added_tokens"]}
    last = max(set(model["vocab"]) - added, key=model["vocab"].__getitem__)
    number = model["vocab"].pop(last)
    model["vocab"][prefix] = number
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if last not in (*pair, "".join(pair))]
    path.write_text(json.dumps(data))
    ours, _, _ = assert_equal_to_reference(folder)
    assert ours.tokenizer.encode(["[Q] house"])[0][0][1] == number


def test_a_stored_prefix_meets_a_normalizer(pylate):
    folder = pylate(whole_tokenizer=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "Lowercase"}}))
    ours, _, _ = assert_equal_to_reference(folder)
    assert ours.tokenizer.encode(["[Q] house"])[0][0][1] == 50368


def test_a_prefix_that_the_tokenizer_does_not_know_is_text(pylate):
    folder = pylate(("[X] ", "[Y] "))
    model, _, _ = assert_equal_to_reference(folder)
    assert len(model.tokenizer.encode(["[Q] house"])[0][0]) > 5


def test_queries_are_padded_and_documents_leave_the_skip_list_out(pylate):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    assert [model.encode_queries(text).shape for text in ("", "a b")] == [(32, 24), (32, 24)]
    plain, marked = model.encode_documents(["one two", "one two.,!"])
    assert plain.shape[1] == 24
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    assert len(marked) < len(model.tokenizer.encode(["[D] one two.,!"])[0][0])


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [False, True])
def test_order_and_batches_change_nothing(pylate, attend):
    folder = pylate(attend_to_expansion_tokens=attend, query_length=70)
    model = LateInteraction.from_pretrained(folder, device="cpu", max_seq_length=200)
    texts = [" ".join(["stone", "river,", "quick"] * (i % 7)) for i in range(25)]
    for encode in (model.encode_queries, model.encode_documents):
        alone = [encode(text) for text in texts]
        for batch_tokens in (1, 100, 4096):
            model.batch_tokens = batch_tokens
            assert_same(encode(texts), alone, 1e-5)
            assert_same(encode(iter(texts)), alone, 1e-5)
    assert model.encode_queries([]) == model.encode_documents([]) == []


def test_batches_of_queries_stay_near_the_limit_when_padded(pylate, monkeypatch):
    model = LateInteraction.from_pretrained(pylate(), device="cpu", batch_tokens=256)
    sizes = []
    network = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: (sizes.append(len(batch.input_ids)), network(batch))[1])
    model.encode_queries(["a"] * 40)
    assert sum(sizes) == 40 * 32
    assert max(sizes) <= 256


def test_the_backend_changes_nothing(pylate, monkeypatch):
    """Triton's kernels, interpreted, with keys that end before the queries do."""
    pytest.importorskip("triton")
    folder = pylate()
    expected = LateInteraction.from_pretrained(folder, device="cpu").encode_queries(TEXTS[:4])
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    assert_same(LateInteraction.from_pretrained(folder, device="cpu").encode_queries(TEXTS[:4]), expected)


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_lengths_are_the_repositorys_or_the_callers(pylate):
    folder = pylate()
    model = LateInteraction.from_pretrained(folder, device="cpu")
    assert (model.query_length, model.padded_length, model.max_seq_length) == (32, 32, 48)
    model = LateInteraction.from_pretrained(folder, device="cpu", query_length=12, max_seq_length=20)
    long = "word " * 100
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 12 tokens"):
        assert [len(rows) for rows in model.encode_queries(["a", long])] == [12, 12]
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 20 tokens"):
        assert [len(rows) for rows in model.encode_documents(["a", long])] == [4, 20]
    with pytest.raises(ValueError, match=r"query_length is 2, .* they must be over 2, the special tokens"):
        LateInteraction.from_pretrained(folder, device="cpu", query_length=2)
    strict = LateInteraction.from_pretrained(folder, device="cpu", on_long="error")
    with pytest.raises(ValueError, match="text 1 is longer than 32 tokens"):
        strict.encode_queries(["a", long])


def test_without_expansion_a_length_is_only_a_limit(pylate):
    model = LateInteraction.from_pretrained(pylate(do_query_expansion=False), device="cpu", query_length=64)
    assert (model.query_length, model.padded_length) == (64, 0)
    assert len(model.encode_queries("a")) == 4


# ---- MaxSim --------------------------------------------------------------------------------------------------------


def test_maxsim_is_the_sum_of_the_largest_products(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = (
        [rng.standard_normal((n, 12)).astype(np.float32) for n in lengths]
        for lengths in ((32, 1, 7, 32, 5), (3, 50, 1, 17, 200, 2, 2))
    )
    expected = np.array([[(q @ d.T).max(1).sum() for d in documents] for q in queries])
    for tokens, products in ((1 << 13, 1 << 23), (1, 1), (55, 700)):
        monkeypatch.setattr("modernbert_lite.late_interaction._DOCUMENT_TOKENS", tokens)
        monkeypatch.setattr("modernbert_lite.late_interaction._PRODUCTS", products)
        scores = maxsim(queries, documents)
        assert scores.dtype == np.float32
        assert np.abs(scores - expected).max() <= 1e-4
    assert np.allclose(LateInteraction.maxsim(queries[0], documents), expected[:1], atol=1e-4)
    assert np.allclose(maxsim(queries, torch.from_numpy(documents[4])), expected[:, 4:5], atol=1e-4)
    assert np.allclose(maxsim(np.stack([queries[0], queries[3]]), documents), expected[[0, 3]], atol=1e-4)
    assert maxsim([], documents).shape == (0, 7)
    assert maxsim(queries, []).shape == (5, 0)


def test_maxsim_needs_little_memory():
    rng = np.random.default_rng(0)
    queries = [rng.standard_normal((32, 8)).astype(np.float32) for _ in range(64)]
    documents = [rng.standard_normal((300, 8)).astype(np.float32)] * 400
    tracemalloc.start()
    maxsim(queries, documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all products at once: 983 MB


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        ([np.ones((2, 3)), np.ones((0, 3))], [np.ones((2, 3))], r"query 1 has shape \(0, 3\)"),
        ([np.ones((2, 3))], [np.ones((2, 3)), np.ones((2, 3)), np.ones((0, 3))], r"document 2 has shape \(0, 3\)"),
        ([np.ones((2, 3))], np.ones(3), r"document 0 has shape \(\)"),
        ([np.ones((2, 3))], [np.ones((4, 5))], r"queries have \[3\] dimensions, documents \[5\]"),
        ([np.ones((2, 3))], [np.ones((4, 3)), np.ones((4, 5))], r"queries have \[3\] dimensions, documents \[3, 5\]"),
    ],
)
def test_maxsim_refuses_what_has_no_tokens_or_another_width(queries, documents, message):
    with pytest.raises(ValueError, match=message):
        maxsim(queries, documents)


# ---- what is refused -----------------------------------------------------------------------------------------------
