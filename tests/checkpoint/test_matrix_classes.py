"""Every known checkpoint in the class that opens it, on small random weights; and the table of them all."""

from __future__ import annotations

import json
import re
import string
from typing import Any

import pytest
import tokenizers
import torch
from checkpoints_cases import (  # noqa: F401
    DATA,
    ENTRIES,
    MASK,
    NAMES,
    ROOT,
    VOCABULARY,
    base,
    difference,
    every_entry,
    is_gte,
    small,
    their_rows,
)
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.nn import functional as F

import modernbert_lite as ml

TEXTS = [
    "a short one",
    "the tide came in over the flats while the boats lay on their sides and nobody looked up " * 2,
    "x",
    "rain, then: more rain",
]


def token_ids(folder, text, pair=None) -> tuple[list[int], list[int]]:
    encoding = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, pair)
    return encoding.ids, encoding.type_ids


def their_hidden(folder, network, text) -> torch.Tensor:
    """(tokens, C) of one text alone."""
    output, _ = their_rows(base(network), [token_ids(folder, text)[0]])
    return output.last_hidden_state[0]


def their_dense(folder, x) -> torch.Tensor:
    """What the Dense and LayerNorm modules make of vectors."""
    for module in json.loads((folder / "modules.json").read_text()):
        path = folder / module["path"]
        if module["type"].endswith(".LayerNorm"):
            tensors = load_file(path / "model.safetensors")
            x = F.layer_norm(x, x.shape[-1:], tensors["norm.weight"], tensors["norm.bias"])
        if module["type"].endswith(".Dense"):
            tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
            y = F.linear(x, tensors["linear.weight"], tensors.get("linear.bias"))
            y = F.gelu(y) if config["activation_function"].endswith("GELU") else y
            if config.get("use_residual"):
                y = y + (F.linear(x, tensors["residual.weight"]) if "residual.weight" in tensors else x)
            x = y
    return x


def of_use(use) -> Any:
    entries = [entry for entry in ENTRIES if entry["use"] == use]
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry["id"])


@of_use("Embedder")
def test_embedders_pool_and_prompt_as_the_repository_says(small, entry):
    folder, network, _ = small(entry)
    sentence = entry["sentence"]
    model = ml.Embedder.from_pretrained(folder)
    longest = sentence.get("max_seq_length", entry["config"]["max_position_embeddings"])
    assert model.max_seq_length == longest

    def expected(prompt):
        hidden = [their_hidden(folder, network, prompt + text) for text in TEXTS]
        pooled = torch.stack([x[0] if sentence["pooling"] == "cls" else x.mean(0) for x in hidden])
        return F.normalize(pooled, dim=-1) if sentence["normalize"] else pooled

    if not is_gte(entry):  # sentence-transformers opens these without a repository's code
        theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        assert difference(theirs.encode(TEXTS), expected("")) <= 2e-5
    assert difference(model.encode(TEXTS), expected("")) <= 2e-5
    assert model.prompts == sentence["prompts"]
    for name, prompt in sentence["prompts"].items():
        assert difference(model.encode(TEXTS, prompt_name=name), expected(prompt)) <= 2e-5
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        assert difference(encode(TEXTS), expected(sentence["prompts"].get(role, ""))) <= 2e-5
    narrow = F.normalize(expected("")[:, :20], dim=-1)
    assert difference(model.encode(TEXTS, truncate_dim=20, normalize_embeddings=True), narrow) <= 2e-5


def test_only_gte_multilingual_base_has_sparse_weights(small):
    for entry in (e for e in ENTRIES if e["use"] == "Embedder"):
        folder, network, _ = small(entry)
        model = ml.Embedder.from_pretrained(folder)
        assert model.sparse == (len(entry["architectures"]) == 2)
        if not model.sparse:
            continue
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {tokenizer.token_to_id(name) for name in NAMES["unigram"].values()}
        for text, got in zip(TEXTS, model.encode_sparse(TEXTS), strict=True):
            ids, _ = token_ids(folder, text)
            weights = their_rows(network, [ids])[0].logits[0, :, 0].relu()
            expected: dict[str, float] = {}
            for i, weight in zip(ids, weights.tolist(), strict=True):
                if i not in special and weight > 0:
                    key = tokenizer.decode([i])
                    expected[key] = max(expected.get(key, 0.0), weight)
            assert {key for key, weight in got.items() if weight > 0} == set(expected)
            assert all(abs(got[key] - weight) <= 2e-5 for key, weight in expected.items())


@of_use("Reranker")
def test_rerankers_score_pairs(small, entry):
    folder, network, raw = small(entry)
    model = ml.Reranker.from_pretrained(folder)
    pairs = [(TEXTS[3], text) for text in TEXTS]
    encoded = [token_ids(folder, *pair) for pair in pairs]
    many = is_gte(entry) and raw["type_vocab_size"] > 1
    rows, types = [ids for ids, _ in encoded], [kinds for _, kinds in encoded] if many else None
    output, _ = their_rows(network, rows, types)
    modular = "head_modules" in entry
    logits = their_dense(folder, output.last_hidden_state[:, 0]) if modular else output.logits
    expected = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits
    assert expected.std() > 1e-3
    if not is_gte(entry):  # sentence-transformers opens these without a repository's code
        theirs = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        assert difference(theirs.predict(pairs), expected) <= 2e-5
    assert difference(model.predict(pairs), expected) <= 2e-5
    assert difference(model.predict(pairs, activation_fn="identity"), logits.squeeze(-1)) <= 2e-5


@of_use("FillMask")
def test_masked_language_models_fill_masks(small, entry):
    folder, network, _ = small(entry)
    model = ml.FillMask.from_pretrained(folder)
    mask = NAMES[entry["tokenizer"]["kind"]][MASK]
    assert model.mask_token == mask
    text = f"the {mask} came in over the {mask} and nobody looked up"
    ids, _ = token_ids(folder, text)
    places = [i for i, token in enumerate(ids) if token == model.tokenizer.mask_token_id]
    assert len(places) == 2
    probabilities = their_rows(network, [ids])[0].logits[0, places].softmax(-1)
    for got, row in zip(model.predict(text, top_k=VOCABULARY), probabilities, strict=True):
        scores = torch.zeros(VOCABULARY)
        for prediction in got:
            scores[prediction["token_id"]] = prediction["score"]
        assert difference(scores, row) <= 2e-5
        assert got[0]["token_id"] == int(row.argmax())


@of_use("LateInteraction")
def test_late_interaction_models_give_a_vector_a_token(small, entry):
    folder, network, _ = small(entry)
    model = ml.LateInteraction.from_pretrained(folder)
    # No punctuation, which is skipped, and nothing to cut, where the row doesn't say how long a document may be.
    texts = [text.translate(str.maketrans("", "", string.punctuation))[:150] for text in TEXTS]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    many = entry["multi_vector"]

    def expected(text, marker, length):
        first, *rest = tokenizer.encode(text).ids
        ids = [first, tokenizer.token_to_id(marker), *rest]
        assert length is None or len(ids) <= length
        hidden = their_rows(base(network), [ids])[0].last_hidden_state[0]
        return F.normalize(their_dense(folder, hidden), dim=-1)

    for text, got in zip(texts, model.encode_documents(texts), strict=True):
        assert difference(got, expected(text, many["document_prefix"], many["document_length"])) <= 2e-5
    short = [text for text in texts if len(text) < 25]
    for text, got in zip(short, model.encode_queries(short), strict=True):
        right = expected(text, many["query_prefix"], many["query_length"])
        assert got.shape[1] == right.shape[1] == many["dense"][-1]["out_features"]
        assert difference(got[: len(right)], right) <= 2e-5


# --- c. what is refused


REFUSED = {
    "modernbert-decoder": "'modernbert-decoder' is not supported: a causal decoder",
    "bert": "'bert' is not supported",
    "nomic_bert": "'nomic_bert' is not supported",
    "xlm-roberta": "'xlm-roberta' is not supported",
    None: "None is not supported",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoders_and_unknown_types_are_refused_by_name(small, tmp_path, capsys, model_type):
    from modernbert_lite.cli.commands import main

    folder, _, raw = small(ENTRIES[2])
    raw = {key: value for key, value in raw.items() if key != "model_type"}
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes((folder / "1_Pooling" / "config.json").read_bytes())
    changed = raw if model_type is None else {**raw, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    classes = (ml.Embedder, ml.Reranker, ml.Classifier, ml.TokenClassifier, ml.FillMask, ml.LateInteraction)
    for function in (ml.load_model, *(each.from_pretrained for each in classes)):
        with pytest.raises(ml.CheckpointError, match=re.escape(REFUSED[model_type])):
            function(tmp_path)
    assert main(["info", str(tmp_path)]) == 1
    assert REFUSED[model_type] in capsys.readouterr().err


@every_entry
def test_info_names_what_a_checkpoint_loads_with(small, entry):
    from modernbert_lite.cli.about import describe

    folder, _, raw = small(entry)
    facts = describe(str(folder))
    use = {"load_model": "FillMask"}.get(entry["use"], entry["use"])
    assert use in facts["use"].split(" (")[0].split(" or ")
    assert ("encode_sparse" in facts["use"]) == (len(entry["architectures"]) == 2)
    assert facts["architecture"] == raw["architectures"][0]
    assert facts["heads"] == f"3 x {raw['hidden_size'] // 3}"


# --- d. the table itself


def test_the_table_has_every_checkpoint_of_the_specification():
    """Their names, as published; families member by member."""
    ids = [entry["id"] for entry in ENTRIES]
    assert len(ids) == len(set(ids)) == 63
    sizes = ("17m", "32m", "68m", "150m", "400m", "1b")
    wanted = [f"jhu-clsp/ettin-encoder-{size}" for size in sizes]
    wanted += [f"cross-encoder/ettin-reranker-{size}-v1" for size in sizes]
    japanese = ("30m", "70m", "130m", "310m")
    wanted += [f"sbintuitions/modernbert-ja-{size}" for size in japanese]
    wanted += [f"cl-nagoya/ruri-v3-{size}" for size in japanese]
    wanted += [
        "Alibaba-NLP/gte-base-en-v1.5",
        "Alibaba-NLP/gte-en-mlm-base",
        "Alibaba-NLP/gte-en-mlm-large",
        "Alibaba-NLP/gte-large-en-v1.5",
        "Alibaba-NLP/gte-modernbert-base",
        "Alibaba-NLP/gte-multilingual-base",
        "Alibaba-NLP/gte-multilingual-mlm-base",
        "Alibaba-NLP/gte-multilingual-reranker-base",
        "Alibaba-NLP/gte-reranker-modernbert-base",
        "Snowflake/snowflake-arctic-embed-m-v2.0",
        "answerdotai/ModernBERT-base",
        "answerdotai/ModernBERT-large",
        "lightonai/GTE-ModernColBERT-v1",
        "tomaarsen/reranker-ModernBERT-large-gooaq-bce",
    ]
    assert set(wanted) <= set(ids)


def test_entries_say_what_is_not_known():
    for entry in ENTRIES:
        known = {*entry, *entry["config"], *entry.get("sentence", {}), *entry.get("multi_vector", {})}
        missing = set(entry["unverified"]) - known if "unverified" in entry else set()
        # A key may be unverified because it is absent.
        assert missing <= {"vocab_size", "classifier_pooling"}, entry["id"]
        classes = ("Embedder", "Reranker", "Classifier", "TokenClassifier", "FillMask", "LateInteraction", "load_model")
        assert entry["use"] in classes
        assert entry["generation"] in (None, "4.48", "5", "new", "gte-old", "gte")
        if "family" in entry:
            before, after = entry["family"].split("{}")
            assert entry["id"].startswith(before)
            assert entry["id"].endswith(after)


def test_the_page_shows_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.tables import checkpoints

    golden = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["entries"]
    made = checkpoints(ENTRIES, golden)
    assert f"<!-- table: checkpoints -->\n{made}\n<!-- end -->" in (ROOT / "docs" / "checkpoints.md").read_text(
        encoding="utf-8"
    )
    lines = made.splitlines()[2:]
    for entry in ENTRIES:
        (line,) = [
            line
            for line in lines
            if line.startswith(f"| {entry.get('family', entry['id']).split('{}')[0]}")
            and (entry.get("family") or f"| {entry['id']} |" in line)
        ]
        assert f"| `{entry['use']}`" in line
        published = any(entry["id"] in row["model"].split() for row in golden)
        assert ("| known |" if published else "| not known |") in line
