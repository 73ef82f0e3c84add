"""Sparse encoders (SPLADE): Embedder.encode_sparse gives sentence-transformers' SparseEncoder's weights."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from modernbert_lite import CheckpointError, Embedder, FillMask, LateInteraction, OptionError, Reranker
from modernbert_lite.checkpoint import hub
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.open import Checkpoint
from modernbert_lite.cli.about import describe
from modernbert_lite.pipeline import sparse

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat sat on mat dog ##s run ##ning in park capital of france is paris ? ,"
VOCABULARY = {word: i for i, word in enumerate(WORDS.split())}
SIZE = 40  # of the network's vocabulary, as in doc-v3-gte larger than the tokenizer's
TEXTS = [
    "the cat sat on the mat",
    "",
    "dogs running in the park, the cat sat",
    "paris",
    "a dog a cat a park a capital of france is paris ? the cat",
    "[MASK] of [SEP] france",
    "cat",
    "unseen",
]
OLD = {
    "Router": "sentence_transformers.models.Router",
    "MLMTransformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
    "SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
    "SparseStaticEmbedding": "sentence_transformers.sparse_encoder.models.SparseStaticEmbedding",
}


def read(path):
    return json.loads(path.read_text())


def write(path, value):
    path.write_text(json.dumps(value))


def edit(file, /, **keys):
    write(file, {**read(file), **keys})


def word_pieces(folder: Path, longest: int = 64) -> None:
    """A tokenizer of BERT's kind, as opensearch's sparse encoders have."""
    made = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "mask_token": "[MASK]"}
    write(folder / "tokenizer_config.json", settings | names)


def network(folder: Path, kind: str) -> Path:
    """A random masked language model in transformers' own files."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": SIZE,
        "initializer_range": 0.3,
    }
    if kind == "gte":
        config = transformers.GteConfig(**sizes, intermediate_size=40, max_position_embeddings=64, type_vocab_size=2)
        model = transformers.GteForMaskedLM(config)
    else:
        rest = {
            "intermediate_size": 40,
            "initializer_cutoff_factor": 3.0,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **rest))
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.get_output_embeddings().bias.data.sub_(0.2 if kind == "gte" else 2)  # so that some weights are 0
    model.save_pretrained(folder)
    word_pieces(folder)
    return folder


def idf(folder: Path, tokenizer) -> SparseStaticEmbedding:
    """Weights of tokens; one is 0, one below it."""
    weight = torch.linspace(0.5, 4, len(VOCABULARY))
    weight[VOCABULARY["cat"]], weight[VOCABULARY["of"]] = 0, -1.25
    return SparseStaticEmbedding(tokenizer=tokenizer, weight=weight, frozen=True)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return {kind: network(tmp_path_factory.mktemp(kind), kind) for kind in ("modernbert", "gte")}


@pytest.fixture
def save(networks, tmp_path):
    """save(kind, routed=.., **pooling) -> a folder that SparseEncoder wrote."""

    def made(kind="modernbert", routed=False, name="sparse", strategy="max", activation="relu", **options) -> Path:
        net = Transformer(str(networks[kind]), transformer_task="fill-mask")
        pooling = SpladePooling(strategy, activation)
        modules = [net, pooling]
        if routed:
            modules = [Router.for_query_document([idf(networks[kind], net.tokenizer)], modules)]
        SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(
            str(tmp_path / name), create_model_card=False
        )
        return tmp_path / name

    return made


def weights(tensor):
    """SparseEncoder's tensor as dicts {id: weight}."""
    rows = tensor.to_dense()
    return [{int(i): float(row[i]) for i in row.nonzero().flatten()} for row in rows]


def assert_near(got, expected, bound=2e-5):
    assert len(got) == len(expected)
    for mine, right in zip(got, expected, strict=True):
        assert all(weight != 0 for weight in mine.values())
        # A logit of about 0 may be on either side of it.
        assert max((abs(mine.get(i, 0) - right.get(i, 0)) for i in mine | right), default=0) <= bound


def both(folder, **options):
    return Embedder.from_pretrained(folder, device="cpu", **options), SparseEncoder(str(folder), device="cpu")


# ---- documents ----


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


def test_the_layout_of_the_hub_opens(save):
    """opensearch's: sentence-transformers 5.0's names of classes, and the network's files in the top folder, where the
    router's part is named "", without sentence_bert_config.json."""
    folder = save("gte", routed=True, activation="log1p_relu")
    mine, _ = both(folder)
    right = mine.encode_sparse_document(TEXTS), mine.encode_sparse_query(TEXTS)
    for path in (folder / "document_0_Transformer").iterdir():
        if path.name != "sentence_bert_config.json":
            shutil.move(path, folder)
    shutil.rmtree(folder / "document_0_Transformer")
    query, pooling = "query_0_SparseStaticEmbedding", "document_1_SpladePooling"
    types = {query: OLD["SparseStaticEmbedding"], "": OLD["MLMTransformer"], pooling: OLD["SpladePooling"]}
    structure = {"query": [query], "document": ["", pooling]}
    edit(folder / "router_config.json", types=types, structure=structure)
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": OLD["Router"]}])
    edit(folder / "document_1_SpladePooling/config.json", word_embedding_dimension=SIZE)
    mine, theirs = both(folder)
    assert (mine.encode_sparse_document(TEXTS), mine.encode_sparse_query(TEXTS)) == right
    assert_near(mine.encode_sparse_document(TEXTS, keys="ids"), weights(theirs.encode_document(TEXTS)))
    # Alibaba's own config, which transformers opens with its code only.
    config = read(folder / "config.json")
    theta = config.pop("rope_parameters")["rope_theta"]
    write(folder / "config.json", config | {"model_type": "new", "architectures": ["NewForMaskedLM"]})
    edit(folder / "config.json", rope_theta=theta, pack_qkv=True, position_embedding_type="rope")
    assert_near(Embedder.from_pretrained(folder).encode_sparse(TEXTS, keys="ids"), weights(theirs.encode(TEXTS)))


def test_what_is_fetched_from_the_hub_is_all_that_it_needs(save, tmp_path, monkeypatch):
    """And a cache of an older version, which didn't fetch the router's files, is not complete."""
    folder = save(routed=True)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=hub._NEEDED_PATTERNS):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "cache" / name)
    mine, fetched = (Embedder.from_pretrained(place) for place in (folder, tmp_path / "cache"))
    assert fetched.encode_sparse_query(TEXTS) == mine.encode_sparse_query(TEXTS)
    assert fetched.encode_sparse(TEXTS) == mine.encode_sparse(TEXTS)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: object())  # no other file exists
    assert hub._is_complete(Folder(tmp_path / "cache"), "some/model")
    for part in ("document_1_SpladePooling/config.json", "query_0_SparseStaticEmbedding/config.json"):
        (tmp_path / "cache" / part).rename(tmp_path / "aside")
        assert not hub._is_complete(Folder(tmp_path / "cache"), "some/model")
        (tmp_path / "aside").rename(tmp_path / "cache" / part)
    for path in (tmp_path / "cache" / "document_0_Transformer").iterdir():
        shutil.copy(path, tmp_path / "cache")
    (tmp_path / "cache" / "router_config.json").unlink()
    assert not hub._is_complete(Folder(tmp_path / "cache"), "some/model")


def test_older_names_of_classes_open(save):
    folder = save()
    right = Embedder.from_pretrained(folder).encode_sparse(TEXTS)
    (folder / "sentence_bert_config.json").unlink()
    write(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": OLD["MLMTransformer"]},
            {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": OLD["SpladePooling"]},
        ],
    )
    mine, theirs = both(folder)
    assert mine.encode_sparse(TEXTS) == right
    assert_near(mine.encode_sparse(TEXTS, keys="ids"), weights(theirs.encode(TEXTS)))


def test_a_bare_architecture_in_config_json_still_means_a_masked_language_model(save):
    """As AutoModelForMaskedLM sees it."""
    folder = save()
    right = Embedder.from_pretrained(folder).encode_sparse(TEXTS)
    edit(folder / "config.json", architectures=["ModernBertModel"])
    assert Embedder.from_pretrained(folder).encode_sparse(TEXTS) == right


# ---- beside it ----


def test_other_calls_say_what_to_do(save):
    folder = save(routed=True, max_active_dims=9)
    mine = Embedder.from_pretrained(folder)
    assert mine.sparse is True
    assert mine.dimension == SIZE
    assert mine.similarity_fn_name == "dot"
    for call in (mine.encode, mine.encode_query, mine.encode_document, lambda texts: next(mine.stream(texts))):
        with pytest.raises(
            CheckpointError, match=r"a sparse encoder .*, without dense vectors: use Embedder.encode_sparse"
        ):
            call(["cat"])
    with pytest.raises(OptionError, match="task is 'passage'"):
        mine.encode_sparse("cat", task="passage")
    with pytest.raises(OptionError, match="keys is 'token'; it must be one of tokens, ids"):
        mine.encode_sparse("cat", keys="token")
    for task in ("query", "document"):
        with pytest.raises(TypeError, match="text 1 is int"):
            mine.encode_sparse(["cat", 3], task=task)
    for other in (Reranker, LateInteraction):
        with pytest.raises(CheckpointError, match="use Embedder"):
            other.from_pretrained(folder)
    assert Checkpoint.find(folder).use == "Embedder"
    facts = describe(str(folder))
    assert facts["use"] == "Embedder (encode_sparse)"
    assert facts["weights kept"] == 9
    assert facts["weights of documents"] == "max of relu"
    assert "without the network" in facts["weights of queries"]
    assert FillMask.from_pretrained(folder).predict("the [MASK]")  # the network is one
    assert pickle.loads(pickle.dumps(mine)).encode_sparse_query(TEXTS) == mine.encode_sparse_query(TEXTS)


def test_the_largest_kept_and_ids_are_options_of_a_token_classifier_too():
    row = torch.tensor([4, 9, 7]), torch.tensor([0.5, 2.0, 1.0])
    assert sparse.to_dict(row, 2, None) == {9: 2.0, 7: 1.0}
    assert sparse.to_dict(row, None, lambda i: "x" if i != 7 else "y") == {"x": 2.0, "y": 1.0}


BAD = {
    "strategy": ("document_1_SpladePooling/config.json", {"pooling_strategy": "mean"}, "pooling_strategy is 'mean'"),
    "activation": ("document_1_SpladePooling/config.json", {"activation_function": "gelu"}, "activation_function is"),
    "task": (
        "document_0_Transformer/sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
        "transformer_task .* 'feature-extraction'; it must be 'fill-mask'",
    ),
    "kept": ("config_sentence_transformers.json", {"max_active_dims": 0}, "max_active_dims is 0"),
    "similarity": ("config_sentence_transformers.json", {"similarity_fn_name": "best"}, "similarity_fn_name is 'best'"),
    "types": ("router_config.json", {"types": []}, r"types is \[\]"),
    "structure": ("router_config.json", {"structure": {"query": ["nowhere"]}}, r"route 'query' is \['nowhere'\]"),
    "odd structure": ("router_config.json", {"structure": {"query": [[]]}}, r"route 'query' is \[\[\]\]"),
    "default": ("router_config.json", {"parameters": {"default_route": ["x"]}}, r"route \['x'\] for None"),
    "picture": (
        "router_config.json",
        {"parameters": {"route_mappings": {"(None, 'image')": "query"}}},
        r"for \"\(None, 'image'\)\" is not supported",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_refused_by_name(save, name):
    file, keys, message = BAD[name]
    folder = save(routed=True)
    edit(folder / file, **keys)
    with pytest.raises(CheckpointError, match=message):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["router_config.json", "document_1_SpladePooling/config.json"])
def test_missing_files_are_named(save, missing):
    folder = save(routed=True)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        Embedder.from_pretrained(folder)


def test_query_weights_that_are_missing_or_misshapen_are_refused(save):
    folder = save(routed=True)
    file = folder / "query_0_SparseStaticEmbedding/model.safetensors"
    for bad, message in [
        ({"weight": torch.ones(len(VOCABULARY) + 1)}, r"\(24,\).* has .*\(25,\)"),
        ({"weight": torch.ones(len(VOCABULARY), 1)}, r"\(24, 1\)"),
        ({"weights": torch.ones(len(VOCABULARY))}, "weights"),
    ]:
        save_file(bad, file)
        with pytest.raises(CheckpointError, match=message):
            Embedder.from_pretrained(folder)
    save_file({"weight": torch.full((len(VOCABULARY),), torch.nan)}, file)
    with pytest.raises(ValueError, match=r"^the result of text 1, str \('a cat'\), is not finite"):
        Embedder.from_pretrained(folder).encode_sparse_query(["", "a cat"])
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors in .*query_0_SparseStaticEmbedding"):
        Embedder.from_pretrained(folder)


def test_paths_stay_in_the_folder(save):
    folder = save(routed=True)
    config = read(folder / "router_config.json")
    for part in ("query_0_SparseStaticEmbedding", "document_0_Transformer", "document_1_SpladePooling"):
        for outside in (f"../{folder.name}/{part}", str(folder / part)):
            changed = json.loads(json.dumps(config).replace(part, outside))
            write(folder / "router_config.json", changed)
            with pytest.raises(CheckpointError, match="leaves the model's folder"):
                Embedder.from_pretrained(folder)
    write(folder / "router_config.json", config)
    edit(folder / "query_0_SparseStaticEmbedding/config.json", path="../../idf.json")
    with pytest.raises(CheckpointError, match="leaves the model's folder"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("which", [0, 1])
def test_a_class_of_a_repositorys_own_is_not_taken_for_sentence_transformers(save, which):
    folder = save()
    modules = read(folder / "modules.json")
    modules[which]["type"] = "my_code." + modules[which]["type"].rpartition(".")[2]
    write(folder / "modules.json", modules)
    with pytest.raises(CheckpointError, match="my_code"):
        Embedder.from_pretrained(folder)


def test_other_modules_beside_them_are_refused_by_name(save, tmp_path):
    folder = save()
    modules = read(folder / "modules.json")
    st = "sentence_transformers.sparse_encoder.modules."
    more = {"idx": 2, "name": "2", "path": "2_X", "type": ""}
    for kind in ("SparseAutoEncoder", "SparseStaticEmbedding", "Dense"):
        write(folder / "modules.json", [*modules, more | {"type": st + kind}])
        with pytest.raises(CheckpointError, match=f"{kind}.* is not supported"):
            Embedder.from_pretrained(folder)
    write(folder / "modules.json", [modules[1] | {"type": st + "SparseStaticEmbedding"}])
    with pytest.raises(CheckpointError, match="has 0 networks"):
        Embedder.from_pretrained(folder)
    folder = save(routed=True, name="routed")
    write(folder / "modules.json", [*read(folder / "modules.json"), more | {"type": st + "SpladePooling"}])
    with pytest.raises(CheckpointError, match="SpladePooling' after a sparse encoder's Router"):
        Embedder.from_pretrained(folder)


def test_a_router_of_dense_models_is_refused_by_name(save):
    folder = save(routed=True)
    config = read(folder / "router_config.json")
    config["types"] = dict.fromkeys(config["types"], "sentence_transformers.base.modules.transformer.Transformer")
    write(folder / "router_config.json", config)
    with pytest.raises(CheckpointError, match="Router' is not supported"):
        Embedder.from_pretrained(folder)
