"""LateInteraction: the same vectors as sentence-transformers' MultiVectorEncoder on the same folder, in PyLate's form
and its own; MaxSim; and what is refused."""

import copy
import json
import pickle
import random
import shutil
import string
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.late_interaction import LateInteraction, maxsim

TEXTS = [
    "What is the capital of France?",
    "",
    "a",
    "He said: (stop), now! -- and didn't, e.g., [wait]...",
    "river stone quick green house " * 30,
    " leading space; MASK [MASK] tokens, too",
    "Grüße aus Köln, 東京.",
]
OLD = "sentence_transformers.models."
PYLATE = {
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "model_type": "ColBERT",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 32,
    "document_length": 48,
    "attend_to_expansion_tokens": False,
    "skiplist_words": list(string.punctuation),
    "do_query_expansion": True,
}


def add_tokens(folder, *tokens, normalized=True):
    """As a checkpoint with prefix tokens stores them: behind the vocabulary of 50,368."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    first = 1 + max(token["id"] for token in data["added_tokens"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": False}
    data["added_tokens"] += [{"id": first + i, "content": token, **flags} for i, token in enumerate(tokens)]
    path.write_text(json.dumps(data))


def add_dense(folder, name, rows, columns, seed=0, bias=False, **config):
    weights = {"linear.weight": torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1}
    if bias:
        weights["linear.bias"] = torch.linspace(-0.2, 0.2, rows)
    if config.get("use_residual") and rows != columns:
        weights["residual.weight"] = torch.linspace(-0.2, 0.3, rows * columns).view(rows, columns)
    (folder / name).mkdir()
    save_file(weights, folder / name / "model.safetensors")
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    config = {"in_features": columns, "out_features": rows, "bias": bias, **identity, **config}
    (folder / name / "config.json").write_text(json.dumps(config))


def write_modules(folder, *modules):
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))


@pytest.fixture
def pylate(make_checkpoint):
    """make(**changes of config_sentence_transformers.json) -> a folder in PyLate's form; None leaves a key out."""

    def make(prefixes=("[Q] ", "[D] "), normalized=True, dense=True, whole_tokenizer=False, **changes):
        folder, _ = make_checkpoint(vocab_size=50370, num_hidden_layers=4, whole_tokenizer=whole_tokenizer)
        add_tokens(folder, *prefixes, normalized=normalized)
        if dense:
            add_dense(folder, "1_Dense", 24, 96)
            write_modules(folder, ("", OLD + "Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
        config = {key: value for key, value in {**PYLATE, **changes}.items() if value is not None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 47, "do_lower_case": False}))
        return folder

    return make


def reference(folder):
    st = pytest.importorskip("sentence_transformers")
    if not hasattr(st, "MultiVectorEncoder"):
        pytest.skip("this sentence-transformers has no MultiVectorEncoder")
    return st.MultiVectorEncoder(str(folder), device="cpu")


def assert_same(ours, theirs, tolerance=2e-5):
    assert [len(a) for a in ours] == [len(b) for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == np.float32
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= tolerance


def assert_equal_to_reference(folder, texts=TEXTS):
    model, theirs = LateInteraction.from_pretrained(folder, device="cpu"), reference(folder)
    with pytest.warns(UserWarning, match="were cut"):
        queries, documents = model.encode_queries(texts), model.encode_documents(texts)
    expected_queries = theirs.encode_query(texts, convert_to_numpy=True, batch_size=3)
    expected_documents = theirs.encode_document(texts, convert_to_numpy=True, batch_size=3)
    assert_same(queries, expected_queries)
    assert_same(documents, expected_documents)
    scores = model.similarity(queries, documents)
    assert np.abs(scores - theirs.similarity(expected_queries, expected_documents).numpy()).max() <= 1e-4
    return model, queries, documents


# ---- the same numbers ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("architecture", "right"),
    [("ModernBertForMaskedLM", "FillMask"), ("ModernBertForSequenceClassification", "Classifier or Reranker")],
)
def test_another_kind_of_checkpoint_names_its_class(make_checkpoint, architecture, right):
    folder, _ = make_checkpoint(architecture)
    with pytest.raises(CheckpointError, match=f"no late-interaction model: use {right}"):
        LateInteraction.from_pretrained(folder)


def test_an_embedder_is_no_late_interaction_model():
    with pytest.raises(CheckpointError, match="no late-interaction model: use Embedder"):
        LateInteraction.from_pretrained("tiny")
    with pytest.raises(TypeError, match=r"use LateInteraction\.from_pretrained"):
        LateInteraction("tiny")


def test_an_embedder_refuses_a_late_interaction_model(pylate):
    with pytest.raises(CheckpointError, match="use LateInteraction for it"):
        ml.Embedder.from_pretrained(pylate())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_length": "32"}, "query_length is '32'"),
        ({"document_length": 0}, "document_length is 0"),
        ({"query_prefix": 3}, "the prefixes of queries and documents are .'query': 3"),
        ({"skiplist_words": "!?"}, r"skiplist_words is '!\?'; it must be a list of strings"),
        ({"query_expansion": 5}, "query_expansion is 5"),
        (
            {"query_expansion": {"strategy": "min", "length": 16}, "query_length": 8},
            "query_length is 8; it must be at lea",
        ),
        ({"query_expansion": {"strategy": "most", "length": 3}}, "strategy is 'most'; it must be one of fixed, min"),
        ({"query_expansion": {"strategy": "min"}}, "length is 0"),
        ({"query_length": 1 << 31}, "query_length is 2147483648, .* no more than 8192"),
        (
            {"query_expansion": {"strategy": "fixed", "length": 1 << 24}, "query_length": None},
            "the expansion's length 16777216; .* than 8192",
        ),
        ({"attend_to_expansion_tokens": "no"}, "attend_to_expansion_tokens is 'no'"),
        ({"query_prefix": "\ud800"}, "is not valid Unicode"),
        ({"query_expansion": {"strategy": "min", "length": 9, "token": "\ud800"}}, "padded with .* is not known"),
        ({"query_expansion": {"strategy": "min", "length": 9, "attend": "no"}}, "attend is 'no'"),
        ({"query_expansion": {"strategy": "min", "length": 9, "token": 3}}, "token of query_expansion is 3"),
        (
            {"query_expansion": {"strategy": "min", "length": 9, "token": "[?]"}},
            r"padded with \[\?\], which is not known",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(pylate, changes, message):
    with pytest.raises(CheckpointError, match=message):
        LateInteraction.from_pretrained(pylate(**changes), device="cpu")


def test_randomly_changed_settings_are_read_or_refused(pylate):
    folder, rng = pylate(), random.Random(0)
    expansion = {"strategy": "min", "length": 9, "attend": False, "token": "[MASK]"}
    values = [None, True, -1, 0, 7, 1 << 70, 0.5, "", "[Q] ", [], [1], ["!"], {}, {"a": 1}, {"query": "q"}]
    for _ in range(300):
        config = {**PYLATE, "query_expansion": {**expansion, rng.choice(list(expansion)): rng.choice(values)}}
        config |= {rng.choice(list(config)): rng.choice(values) for _ in range(2)}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
        try:
            read_sentence_config(Folder(folder))
        except CheckpointError:
            continue


def test_modules_that_it_does_not_know_are_refused_by_name(pylate):
    folder = pylate()
    write_modules(folder, ("", OLD + "Transformer"), ("1_Pooling", OLD + "Pooling"))
    with pytest.raises(CheckpointError, match=r"Pooling' is not supported; known: .*MultiVectorMask"):
        read_sentence_config(Folder(folder))


def test_padding_outside_the_vocabulary_is_refused(make_checkpoint):
    folder, _ = make_checkpoint(vocab_size=50284, whole_tokenizer=True)  # [MASK] is 50284
    config = {key: value for key, value in PYLATE.items() if not key.endswith("prefix")}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    model = LateInteraction.from_pretrained(folder, device="cpu")
    assert len(model.encode_documents("a")) == 3
    with pytest.raises(ValueError, match="token id 50284 is outside the vocabulary"):
        model.encode_queries("a")


def test_a_dense_layer_of_another_width_or_place_is_refused(pylate):
    folder = pylate(dense=False)
    write_modules(folder, ("", OLD + "Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    add_dense(folder, "1_Dense", 24, 80)
    with pytest.raises(CheckpointError, match="1_Dense: in_features is 80; it gets 96"):
        LateInteraction.from_pretrained(folder, device="cpu")
    shutil.rmtree(folder / "1_Dense")
    add_dense(folder, "1_Dense", 24, 96, module_input_name="sentence_embedding")
    with pytest.raises(CheckpointError, match=r"1_Dense\) works on 'sentence_embedding', which no module"):
        LateInteraction.from_pretrained(folder, device="cpu")


def set_padding_side(folder, side):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
    return folder


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_padding_on_the_left_gives_sentence_transformers_vectors(pylate, monkeypatch, attends, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder = set_padding_side(pylate(attend_to_expansion_tokens=attends), "left")
    _, queries, _ = assert_equal_to_reference(folder)
    right = LateInteraction.from_pretrained(set_padding_side(folder, "right"), device="cpu").encode_queries(TEXTS[:2])
    assert np.abs(queries[0] - right[0]).max() > 0.01


def test_tokenizer_json_s_padding_side_counts_where_no_other_file_has_one(pylate):
    folder = pylate()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("padding_side", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["padding"] = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    stored["padding"] |= {"pad_id": 50283, "pad_type_id": 0, "pad_token": "[PAD]"}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    assert LateInteraction.from_pretrained(folder, device="cpu").pads_left
    assert_equal_to_reference(folder)


def test_padding_on_the_left_beyond_a_local_window_is_refused(pylate):
    folder = set_padding_side(pylate(query_length=90), "left")
    with pytest.raises(CheckpointError, match=r"padding_side is .left., and queries are padded to 90 tokens; .* to 65"):
        LateInteraction.from_pretrained(folder, device="cpu")


def test_another_padding_side_is_refused(pylate):
    with pytest.raises(CheckpointError, match="padding_side is 'top'; it must be 'right' or 'left'"):
        LateInteraction.from_pretrained(set_padding_side(pylate(), "top"), device="cpu")


@pytest.mark.parametrize("bad", [b"text", 3, [1], ["a", None]])
def test_what_is_no_text_is_refused(pylate, bad):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    for encode in (model.encode_queries, model.encode_documents):
        with pytest.raises(TypeError, match="must be a str"):
            encode(bad)


def test_half_a_surrogate_pair_is_a_word_that_no_vocabulary_has(pylate):
    model = LateInteraction.from_pretrained(pylate(skiplist_words=["\ud800", "!"]), device="cpu")
    assert len(model.skip_ids["document"]) == 1


@pytest.mark.parametrize(
    ("changes", "padded"), [({"do_query_expansion": "false"}, 0), ({"attend_to_expansion_tokens": "false"}, 32)]
)
def test_booleans_may_be_strings(pylate, changes, padded):
    model = LateInteraction.from_pretrained(pylate(**changes), device="cpu")
    assert (model.padded_length, model.attends) == (padded, False)


def test_a_longer_query_than_the_model_has_positions_for_is_refused(pylate):
    with pytest.raises(ml.OptionError, match=r"query_length is 8193, .* no more than 8192"):
        LateInteraction.from_pretrained(pylate(), device="cpu", query_length=8193)


def test_it_can_be_pickled_and_copied(pylate):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(other.encode_queries(TEXTS[:3]), model.encode_queries(TEXTS[:3]), 1e-6)


@pytest.mark.parametrize("name", ["maxsim", "meanmaxsim"])
def test_similarity_takes_generators_and_nothing(pylate, name):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    model.similarity_fn_name = name
    queries, documents = [np.eye(3, dtype=np.float32)] * 2, [np.eye(3, dtype=np.float32)] * 3
    assert model.similarity((q for q in queries), documents).shape == (2, 3)
    assert model.similarity([], documents).shape == (0, 3)


def test_sentence_transformers_names_work_too(pylate):
    model = LateInteraction.from_pretrained(pylate(), device="cpu")
    assert np.array_equal(model.encode_query("a"), model.encode_queries("a"))
    assert np.array_equal(model.encode_document("a"), model.encode_documents("a"))
