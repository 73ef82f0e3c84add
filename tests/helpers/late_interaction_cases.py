"""Shared by tests/classes: test_late_interaction, test_late_interaction_settings."""

import json
import string

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modernbert_lite.late_interaction import LateInteraction

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
