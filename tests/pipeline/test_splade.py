"""Sparse encoders (SPLADE): Embedder.encode_sparse gives sentence-transformers' SparseEncoder's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from splade_cases import SIZE, TEXTS, VOCABULARY, assert_near, both, edit, networks, save, weights, write  # noqa: F401

from modernbert_lite import CheckpointError, Embedder, OptionError
from modernbert_lite.pipeline import sparse


@pytest.mark.parametrize("kind", ["modernbert", "gte"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_the_weights_are_those_of_sparse_encoder(save, kind, strategy, activation):
    mine, theirs = both(save(kind, strategy=strategy, activation=activation))
    expected = weights(theirs.encode(TEXTS))
    assert 5 < len(expected[0]) < SIZE  # neither empty nor full
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), expected)
    assert_near([mine.encode_sparse(TEXTS[2], keys="ids")], expected[2:3])
    assert mine.encode_sparse([]) == []


def test_tokens_that_are_not_in_the_text_have_weights_and_special_ones_too(save):
    mine, theirs = both(save())
    found = mine.encode_sparse("the cat sat")
    expected = weights(theirs.encode(["the cat sat"]))[0]
    assert found.keys() == {mine.tokenizer.decode(i) for i in expected}
    assert found.keys() - {"the", "cat", "sat", "[CLS]", "[SEP]"}
    special = {i for i in expected if i < 5}
    assert special
    assert {mine.tokenizer.decode(i) for i in special} <= found.keys()


def test_of_ids_that_are_decoded_alike_the_largest_counts(save):
    mine, theirs = both(save())
    for text in TEXTS:
        by_id = weights(theirs.encode([text]))[0]
        nameless = [weight for i, weight in by_id.items() if i >= len(VOCABULARY)]  # rows that no token has
        assert len(nameless) > 1
        assert mine.encode_sparse(text)[""] == pytest.approx(max(nameless), abs=2e-5)


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_logits_are_held_in_pieces(save, monkeypatch, strategy, rows):
    """Of a long text, too; and no piece is larger."""
    mine, theirs = both(save(strategy=strategy))
    expected = weights(theirs.encode(TEXTS))
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), expected)
    monkeypatch.setattr(sparse, "_MOST_LOGITS", rows * SIZE + 5)
    seen, logits = [], mine.network.logits
    monkeypatch.setattr(mine.network, "logits", lambda x: seen.append(len(x)) or logits(x))
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), expected)
    assert max(seen) <= rows < sum(seen)


def test_a_text_has_the_same_weights_in_any_batch(save):
    folder = save(strategy="sum")
    mine = Embedder.from_pretrained(folder, device="cpu")
    small = Embedder.from_pretrained(folder, device="cpu", batch_tokens=9)
    alone = [mine.encode_sparse(text, keys="ids") for text in TEXTS]
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), alone, 1e-5)
    assert_near(small.encode_sparse(TEXTS[::-1] * 3, keys="ids"), alone[::-1] * 3, 1e-5)


@pytest.mark.parametrize("kind", ["modernbert", "gte"])
def test_in_bfloat16_it_is_no_further_off_than_torch(save, kind):
    folder = save(kind)
    exact, half = both(folder)[1], SparseEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    mine = Embedder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    right, theirs = (model.encode(TEXTS).to_dense().float() for model in (exact, half))
    got = torch.zeros_like(right)
    for row, found in zip(got, mine.encode_sparse(TEXTS, keys="ids"), strict=True):
        row[list(found)] = torch.tensor(list(found.values()))
    assert (got - right).abs().max() <= 2 * (theirs - right).abs().max() + 1e-6


def test_weights_that_are_not_finite_are_an_error_that_names_the_text(save):
    folder = save()
    state = load_file(folder / "model.safetensors")
    state["head.norm.weight"].fill_(9e36)
    state["model.embeddings.tok_embeddings.weight"] *= 100
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"text 0, .*not finite"):
        Embedder.from_pretrained(folder, device="cpu").encode_sparse(["cat"])


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("rows", [3, 1 << 20])
def test_one_logit_that_is_not_finite_names_its_text_alone(save, monkeypatch, strategy, value, rows):
    """-inf, too, which the relu and a larger logit hide; in a long text that is computed in pieces, too."""
    mine = Embedder.from_pretrained(save(strategy=strategy), device="cpu")
    cat = mine.tokenizer.encode(["cat"])[0][0][1]
    encoder, logits, where = mine.forward, mine.network.logits, []

    def spoilt(x):
        out = logits(x)
        first, where[0] = where[0][: len(x)], where[0][len(x) :]
        out[first, 5] = value
        return out

    def noted(batch, *options):
        where[:] = [batch.input_ids == cat]
        return encoder(batch, *options)

    monkeypatch.setattr(sparse, "_MOST_LOGITS", rows * SIZE)
    texts = ["the dog is", "a dog runs and the cat", "dog"]
    expected = mine.encode_sparse([texts[0], texts[2]])
    monkeypatch.setattr(mine.network, "logits", lambda x: spoilt(x) if where else logits(x))
    monkeypatch.setattr(mine, "forward", noted)
    with pytest.raises(ValueError, match=r"^the result of text 1, .*, is not finite in float32"):
        mine.encode_sparse(texts)
    assert mine.encode_sparse([texts[0], texts[2]]) == expected


def test_with_modernberts_own_tokenizer_ids_keep_apart_what_tokens_do_not(make_checkpoint, tmp_path):
    """Parts of a character are all decoded as U+FFFD."""
    net, _ = make_checkpoint("ModernBertForMaskedLM", hidden_size=32, num_attention_heads=1, num_hidden_layers=2)
    modules = [Transformer(str(net), transformer_task="fill-mask"), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save_pretrained(str(tmp_path / "own"), create_model_card=False)
    mine, theirs = both(tmp_path / "own")
    texts = ["naïve café 東京 🙂", "", "Stocks fell sharply on Monday, said the [MASK].", "word " * 40]
    right = weights(theirs.encode(texts))
    assert_near(mine.encode_sparse(texts, keys="ids"), right)
    found = mine.encode_sparse(texts[0])
    parts = [weight for i, weight in right[0].items() if mine.tokenizer.decode(i) == "\ufffd"]
    assert len(parts) > 10
    assert found["\ufffd"] == pytest.approx(max(parts), abs=2e-5)


# ---- queries ----


@pytest.mark.parametrize("kind", ["modernbert", "gte"])
def test_queries_of_a_router_need_no_network(save, monkeypatch, kind):
    mine, theirs = both(save(kind, routed=True, activation="log1p_relu"))
    document, query = weights(theirs.encode_document(TEXTS)), weights(theirs.encode_query(TEXTS))
    assert_near(mine.encode_sparse_document(TEXTS, keys="ids"), document)
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), document)  # the default route
    monkeypatch.setattr(mine, "forward", None)
    found = mine.encode_sparse_query(TEXTS, keys="ids")
    assert found == query  # exactly: nothing is computed
    assert found[1] == {}
    of, paris = VOCABULARY["of"], VOCABULARY["paris"]
    assert found[4][of] == -1.25
    assert VOCABULARY["cat"] not in found[4]
    assert mine.encode_sparse_query("paris paris") == {"paris": query[3][paris]}
    assert mine.encode_sparse("paris", task="query") == {"paris": query[3][paris]}


def test_queries_are_cut_to_their_own_tokenizers_length_without_special_tokens(save):
    folder = save(routed=True)
    edit(folder / "query_0_SparseStaticEmbedding/tokenizer_config.json", model_max_length=4)
    mine, theirs = both(folder, max_seq_length=5)
    texts = ["the cat sat on mat", "the dog"]
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 4 tokens"):
        found = mine.encode_sparse_query(texts, keys="ids")
    assert found == weights(theirs.encode_query(texts))
    theirs.max_seq_length = 5
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 5 tokens"):
        found = mine.encode_sparse_document(texts, keys="ids")
    theirs[0].sub_modules["document"][0].max_seq_length = 5
    assert_near(found, weights(theirs.encode_document(texts)))


def test_prompts_are_put_before_texts(save):
    prompts = {"query": "of france ", "document": "the ", "other": "a dog ", "passage": "paris "}
    mine, theirs = both(save(routed=True, prompts=prompts, default_prompt_name="other"))
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), weights(theirs.encode(TEXTS)))
    assert_near(mine.encode_sparse_document(TEXTS, keys="ids"), weights(theirs.encode_document(TEXTS)))
    assert mine.encode_sparse_query(TEXTS, keys="ids") == weights(theirs.encode_query(TEXTS))
    other = weights(theirs.encode_query(TEXTS, prompt_name="other"))
    assert mine.encode_sparse_query(TEXTS, keys="ids", prompt_name="other") == other
    assert mine.encode_sparse_query(TEXTS, keys="ids", prompt="a dog ") == other


def test_a_passage_prompt_is_not_taken_for_documents(save):
    """SparseEncoder always has a prompt named "document", an empty one if need be, and takes that."""
    mine, theirs = both(save(prompts={"passage": "paris "}, default_prompt_name="passage"))
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), weights(theirs.encode(TEXTS)))
    assert_near(mine.encode_sparse_document(TEXTS, keys="ids"), weights(theirs.encode_document(TEXTS)))


def test_only_the_largest_weights_are_kept(save):
    folder = save(routed=True, max_active_dims=6)
    mine, theirs = both(folder)
    assert mine.max_active_dims == 6
    for most in (None, 1, 3, 1000):
        right = weights(theirs.encode_document(TEXTS, max_active_dims=most))
        assert max(map(len, right)) == min(6 if most is None else most, max(map(len, right)))
        assert_near(mine.encode_sparse_document(TEXTS, keys="ids", max_active_dims=most), right)
        right = weights(theirs.encode_query(TEXTS, max_active_dims=most))
        assert mine.encode_sparse_query(TEXTS, keys="ids", max_active_dims=most) == right
    assert mine.encode_sparse(TEXTS, max_active_dims=np.int64(2)) == mine.encode_sparse(TEXTS, max_active_dims=2)
    with pytest.raises(OptionError, match="truncate_dim is 3; a sparse encoder has max_active_dims"):
        Embedder.from_pretrained(folder, truncate_dim=3)
    for bad in (0, -1, True, "3", 2.0):
        with pytest.raises(OptionError, match="max_active_dims"):
            mine.encode_sparse(TEXTS, max_active_dims=bad)
        with pytest.raises(OptionError, match="max_active_dims"):
            mine.max_active_dims = bad
    with pytest.raises(OptionError, match="truncate_dim is 3; a sparse encoder has max_active_dims"):
        mine.truncate_dim = 3
    mine.max_active_dims = 1
    assert [len(weights) for weights in mine.encode_sparse(TEXTS[:2], keys="ids")] == [1, 1]


@pytest.mark.parametrize(
    "parameters",
    [
        {"default_route": "query", "allow_empty_key": True},
        {"default_route": None, "allow_empty_key": True},
        {"default_route": None, "allow_empty_key": False},
        {"default_route": "document", "route_mappings": {"('query', 'text')": "document", "(None, None)": "query"}},
        {"default_route": "document", "route_mappings": {"('document', None)": "query"}},
        {"default_route": "document", "route_mappings": {"(None, 'text')": "query"}},
    ],
)
def test_routes_are_picked_as_the_router_picks_them(save, parameters):
    folder = save(routed=True)
    edit(folder / "router_config.json", parameters=parameters)
    mine, theirs = both(folder)
    for task in ("query", "document", None):
        try:
            right = weights(theirs.encode(TEXTS, task=task))
        except ValueError:
            with pytest.raises(OptionError, match="task is None, for which this model has no route"):
                mine.encode_sparse(TEXTS, task=task)
        else:
            assert_near(mine.encode_sparse(TEXTS, keys="ids", task=task), right)


def test_queries_may_share_the_documents_network(networks, tmp_path):
    net = Transformer(str(networks["modernbert"]), transformer_task="fill-mask")
    router = Router.for_query_document([net, SpladePooling("sum")], [net, SpladePooling("max", "log1p_relu")])
    SparseEncoder(modules=[router], device="cpu").save_pretrained(str(tmp_path / "shared"), create_model_card=False)
    mine, theirs = both(tmp_path / "shared")
    assert_near(mine.encode_sparse_query(TEXTS, keys="ids"), weights(theirs.encode_query(TEXTS)))
    assert_near(mine.encode_sparse_document(TEXTS, keys="ids"), weights(theirs.encode_document(TEXTS)))


def test_weights_may_be_in_a_json_file_of_tokens(save):
    folder = save(routed=True)
    place = folder / "query_0_SparseStaticEmbedding"
    stored = load_file(place / "model.safetensors")["weight"]
    right = Embedder.from_pretrained(folder).encode_sparse_query(TEXTS)
    (place / "model.safetensors").unlink()
    write(place / "idf.json", {token: float(stored[i]) for token, i in VOCABULARY.items() if token != "paris"})
    edit(place / "config.json", path="idf.json")
    found = Embedder.from_pretrained(folder).encode_sparse_query(TEXTS)
    for row in right:
        row.pop("paris", None)
    assert found == right
    for bad in ({"no such": 1.0}, {"cat": None}, {"cat": True}, {"cat": float("nan")}, {"cat": 10**400}):
        write(place / "idf.json", bad)
        with pytest.raises(CheckpointError, match=r"idf.json: .* must be a token of the vocabulary and its weight"):
            Embedder.from_pretrained(folder)


# ---- layouts ----
