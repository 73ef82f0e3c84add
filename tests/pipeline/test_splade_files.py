"""Sparse encoders' files: layouts that open, and those that are refused."""

from __future__ import annotations

import json
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from splade_cases import SIZE, TEXTS, VOCABULARY, assert_near, both, edit, networks, read, save, weights, write  # noqa: F401

from modernbert_lite import CheckpointError, Embedder, FillMask, LateInteraction, OptionError, Reranker
from modernbert_lite.checkpoint import hub
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.open import Checkpoint
from modernbert_lite.cli.about import describe
from modernbert_lite.pipeline import sparse

OLD = {
    "Router": "sentence_transformers.models.Router",
    "MLMTransformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
    "SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
    "SparseStaticEmbedding": "sentence_transformers.sparse_encoder.models.SparseStaticEmbedding",
}


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
