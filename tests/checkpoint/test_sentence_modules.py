"""The modules that modules.json names: their order, activations and classes."""

from __future__ import annotations

import json

import pytest
import torch
from sentence_settings_cases import MEAN, TEXTS, assert_same, folder, ours, set_modules, theirs, write  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.checkpoint.dense import score_activation
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.open import Checkpoint


def dense(width=32, out=24, activation="Tanh", **names):
    name = f"torch.nn.modules.activation.{activation}"
    return ("Dense", {"in_features": width, "out_features": out, "activation_function": name, **names})


ALONE = {"module_output_name": "projected"}


CASES = {
    "dropout": [MEAN, ("Dropout", {"dropout": 0.9})],
    "dropout between": [MEAN, ("Dropout", {"dropout": 0.9}), dense(), ("Dropout", {"dropout": 0.1})],
    "normalize before dense": [MEAN, ("Normalize", None), dense()],
    "normalize around dense": [MEAN, ("Normalize", {}), dense(activation="ReLU"), ("Normalize", None)],
    "normalize before layer norm": [MEAN, ("Normalize", None), ("LayerNorm", {"dimension": 32})],
    "normalized tokens": [("Normalize", {"module_input_name": "token_embeddings"}), MEAN],
    "tokens normalized too late": [MEAN, ("Normalize", {"module_input_name": "token_embeddings"})],
    "normalize of nothing": [
        MEAN,
        ("Normalize", {"module_input_name": "x"}),
    ],
    "normalize to another name": [MEAN, ("Normalize", ALONE)],
    "dense on tokens": [dense(out=40, module_input_name="token_embeddings"), MEAN, dense(width=40)],
    "dense on tokens too late": [MEAN, dense(module_input_name="token_embeddings")],
    "dense to another name": [MEAN, dense(**ALONE)],
    "there and back": [
        MEAN,
        dense(**ALONE),
        dense(width=24, out=16, module_input_name="projected", module_output_name="sentence_embedding"),
    ],
    "two poolings": [MEAN, dense(), ("Pooling", {"pooling_mode": "max", "embedding_dimension": 32})],
    "cls after tokens": [
        dense(module_input_name="token_embeddings"),
        ("Pooling", {"pooling_mode": "cls", "embedding_dimension": 24}),
    ],
    "another width said": [("Pooling", {"pooling_mode": "mean", "word_embedding_dimension": 768})],
    "new and old names": [
        ("sentence_transformers.sentence_transformer.modules.pooling.Pooling", {"embedding_dimension": 32}),
        ("sentence_transformers.base.modules.normalize.Normalize", {}),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_modules_in_every_order_equal_sentence_transformers(folder, case):
    set_modules(folder, *CASES[case])
    texts = TEXTS[:3]
    model = ours(folder)
    got = model.encode(texts)
    assert_same(got, theirs(folder).encode(texts))
    assert got.shape[1] == model.dimension


ACTIVATIONS = ["Identity", "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"]
ACTIVATIONS += ["LogSigmoid", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign"]
ACTIVATIONS += ["Tanh", "Tanhshrink"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_that_is_one_function_is_torchs_own(folder, name):
    x = torch.linspace(-9, 9, 200)
    for dotted in (f"torch.nn.{name}", f"torch.nn.modules.activation.{name}", f"torch.nn.modules.{name}"):
        assert torch.equal(score_activation(dotted)(x), getattr(torch.nn, name)()(x))


@pytest.mark.parametrize(
    "name", ["relu", "ReLU", "torch.relu", "torch.nn.functional.relu", "torch.nn.PReLU", "my.ReLU", "torch.nn.relu", ""]
)
def test_an_activation_that_is_no_such_class_is_refused(folder, name):
    """sentence-transformers passes over a name without "torch." in front, with a warning, and takes Tanh."""
    set_modules(folder, MEAN, ("Dense", {"in_features": 32, "out_features": 8, "activation_function": name}))
    with pytest.raises(ml.CheckpointError, match=f"2_Dense: activation function '{name}' is not supp"):
        ours(folder)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([dense()], r"Dense \(1_Dense\) works on 'sentence_embedding', which no module before it makes"),
        ([("Normalize", None)], "none of its modules makes 'sentence_embedding': is one missing, such as Pooling"),
        ([("Dropout", {})], r"Dropout \(1_Dropout\) works on 'sentence_embedding'"),
        ([MEAN, ("Transformer", None)], "'sentence_transformers.models.Transformer' is not supported"),
        ([MEAN, dense(module_output_name="token_embeddings"), MEAN], "Pooling of what was pooled before"),
        ([dense(module_input_name="token_embeddings", module_output_name="sentence_embedding")], "without Pooling"),
        ([("Pooling", {"pooling_mode": "mean", "temperature": 2})], r"\['temperature'\] is not known"),
        ([MEAN, ("Asym", None)], "'sentence_transformers.models.Asym' is not supported"),
        ([MEAN, ("Router", None)], "Router' is not supported"),
        ([("WordWeights", None), MEAN], "WordWeights' is not supported"),
        ([("WeightedLayerPooling", None), MEAN], "WeightedLayerPooling' is not supported"),
        ([MEAN, ("Normalize", {"module_input_name": ["a"]})], "they must be names"),
        ([MEAN, ("Normalize", {"module_input_name": None})], "they must be names"),
    ],
    ids=str,
)
def test_modules_that_cannot_be_followed_are_refused_by_name(folder, modules, said):
    set_modules(folder, *modules)
    with pytest.raises(ml.CheckpointError, match=said):
        Checkpoint.find(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *("my_pooling.Pooling", "Pooling", "sentence_transformers_extra.models.Pooling", "pylate_like.Pooling"),
        *("x.sentence_transformers.models.Pooling", "transformers.Pooling"),
    ],
)
def test_a_class_outside_of_the_libraries_is_refused_whatever_its_last_name(folder, kind):
    set_modules(folder, ("a." + kind if kind == "Pooling" else kind, MEAN[1]))
    with pytest.raises(ml.CheckpointError, match=f"{kind}' .a class of its own: a repository's code is never run"):
        Checkpoint.find(folder)


def test_a_network_of_a_class_of_its_own_is_refused_and_names_no_folder(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "path": "0_Transformer"}
    write(folder / "modules.json", modules)
    with pytest.raises(ml.CheckpointError, match=r"custom_st\.Transformer' .a class of its own"):
        ours(folder)
    assert Folder(folder).network == folder


def test_modules_of_one_name_and_an_empty_list_are_refused(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["name"] = "0"
    write(folder / "modules.json", modules)
    with pytest.raises(ml.CheckpointError, match=r"modules\.json: two modules have one name: \['0', '0'\]"):
        ours(folder)
    write(folder / "modules.json", [])
    with pytest.raises(ml.CheckpointError, match=r"modules\.json must hold a list of objects, one at least"):
        ours(folder)
