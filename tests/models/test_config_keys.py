"""Keys of config.json beside RoPE's: windows, heads, labels, special tokens, architectures, activations."""

from __future__ import annotations

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import CheckpointError, GteConfig, ModernBertConfig
from modernbert_lite.cli.about import describe
from modernbert_lite.ops import reference as ops


@pytest.mark.parametrize("window", [0, 1, 5, 16])
def test_sliding_window_is_half_of_local_attention_and_wins(tmp_path, window, cases):
    cases.save(tmp_path, "ModernBertModel")
    cases.edit(tmp_path, sliding_window=window)
    assert ml.read_config(tmp_path).window_size(1) == (window, window)
    cases.check(tmp_path, "ModernBertModel")
    cases.edit(tmp_path, local_attention=...)
    cases.check(tmp_path, "ModernBertModel")


def test_a_sliding_window_of_null_says_nothing():
    raw = {"model_type": "modernbert", "local_attention": 66, "sliding_window": None}
    assert ModernBertConfig.from_dict(raw).window_size(1) == (33, 33)


@pytest.mark.parametrize("value", [-1, 64.0, "64", True])
def test_a_bad_sliding_window_is_refused(value):
    with pytest.raises(CheckpointError, match=r"sliding_window is .*; it must be a whole number from 0"):
        ModernBertConfig.from_dict({"model_type": "modernbert", "sliding_window": value})


def test_a_local_attention_of_0_lets_a_token_see_itself(tmp_path, cases):
    cases.save(tmp_path, "ModernBertModel", local_attention=0)
    cases.check(tmp_path, "ModernBertModel")


@pytest.mark.parametrize("head_dim", [4, 20, 32])
@pytest.mark.parametrize("architecture", ["GteModel", "GteForSequenceClassification"])
def test_a_gte_may_have_heads_of_its_own_size(tmp_path, architecture, head_dim, cases):
    cases.save(tmp_path, architecture, head_dim=head_dim, num_attention_heads=3)
    config = ml.read_config(tmp_path)
    assert (config.head_dim, config.num_attention_heads, config.hidden_size) == (head_dim, 3, 32)
    cases.check(tmp_path, architecture)
    assert describe(str(tmp_path))["heads"] == f"3 x {head_dim}"


def test_heads_of_the_usual_size_may_be_named(cases):
    native = {"model_type": "gte", **cases.GTE, "rope_parameters": {"rope_type": "default"}}
    assert GteConfig.from_dict({**native, "head_dim": 16}) == GteConfig.from_dict(native)
    assert GteConfig.from_dict({**native, "head_dim": None}) == GteConfig.from_dict(native)
    with pytest.raises(CheckpointError, match="head_dim is 15; it must be even"):
        GteConfig.from_dict({**native, "head_dim": 15})
    with pytest.raises(CheckpointError, match="head_dim is '16'; it must be a whole number"):
        GteConfig.from_dict({**native, "head_dim": "16"})


# ---- keys that aren't supported, and those that change nothing


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("per_layer_config", {"1": {"intermediate_size": 64}}),
        ("is_causal", True),
        ("configuration_files", ["config.4.0.0.json"]),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_its_name(key, value):
    for raw in ({"model_type": "modernbert"}, {"model_type": "new"}):
        with pytest.raises(CheckpointError, match=f"{key} is "):
            _read({**raw, key: value})
        for nothing in (None, False, {}, []):
            assert _read({**raw, key: nothing}) == _read(raw)


def _read(raw):
    return (ModernBertConfig if raw["model_type"] == "modernbert" else GteConfig).from_dict(raw)


# Every other key of transformers' two classes and their base that isn't in this package's configs.
NOTHING = {
    "attention_dropout": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "chunk_size_feed_forward": 4,
    "classifier_dropout": 0.5,
    "deterministic_flash_attn": True,
    "dtype": "float32",
    "embedding_dropout": 0.5,
    "hidden_dropout_prob": 0.5,
    "initializer_range": 9.0,
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "mlp_dropout": 0.5,
    "sparse_prediction": True,
    "sparse_pred_ignore_index": 3,
    "pruned_heads": {"0": [1]},
    "use_bidirectional_attention": False,
    "use_cache": True,
    "attention_chunk_size": 3,
    "num_key_value_heads": 1,
    "pad_token_id": 5,
    "bos_token_id": 7,
    "auto_map": {"AutoModel": "x--y.Z"},
}


@pytest.mark.parametrize("architecture", ["ModernBertForSequenceClassification", "GteForSequenceClassification"])
def test_keys_that_change_nothing_in_transformers_change_nothing(tmp_path, architecture, cases):
    cases.save(tmp_path, architecture)
    before = cases.expected(tmp_path, architecture)
    cases.edit(tmp_path, **NOTHING)
    assert cases.difference(cases.expected(tmp_path, architecture), before) == 0
    assert cases.difference(cases.actual(tmp_path), before) <= 2e-5


def test_keys_of_other_families_change_nothing_in_modernbert(tmp_path, cases):
    cases.save(tmp_path, "ModernBertModel")
    other = {"hidden_act": "relu", "layer_norm_eps": 0.5, "rope_theta": 9.0, "position_embedding_type": "absolute"}
    cases.edit(tmp_path, **other, original_max_position_embeddings=4, type_vocab_size=2)
    cases.check(tmp_path, "ModernBertModel")


def test_what_only_alibaba_s_class_has_is_refused_in_transformers_own(tmp_path, cases):
    cases.save(tmp_path, "GteModel")
    cases.edit(tmp_path, layer_norm_type="rms_norm")
    with pytest.raises(CheckpointError, match="layer_norm_type is 'rms_norm', which Alibaba's NewConfig has"):
        ml.read_config(tmp_path)


# ---- labels, special tokens, architectures


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, ("a", "LABEL_1")),
        ({"id2label": {"3": "a", "1": "b", "0": "c"}}, ("c", "b", "LABEL_2")),
        ({"id2label": {"0": 5}}, ("5",)),
        ({"id2label": {}, "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": ..., "num_labels": 1}, ("LABEL_0",)),
    ],
)
@pytest.mark.parametrize("architecture", ["ModernBertForSequenceClassification", "GteForTokenClassification"])
def test_gaps_in_id2label_are_as_many_labels_as_it_has_ids(tmp_path, architecture, keys, labels, cases):
    cases.save(tmp_path, architecture, num_labels=len(labels))
    cases.edit(tmp_path, label2id=..., **keys)
    assert ml.read_config(tmp_path).labels == labels
    if keys["id2label"] != {}:  # of which transformers makes no label at all
        cases.check(tmp_path, architecture)


def test_no_labels_are_none_for_an_encoder_and_refused_for_a_classifier(tmp_path, cases):
    cases.save(tmp_path, "ModernBertForSequenceClassification")
    cases.edit(tmp_path, num_labels=0, id2label=..., label2id=...)
    with pytest.raises(CheckpointError, match="num_labels is 0; a ModernBertForSequenceClassification must have"):
        ml.load_model(tmp_path)
    cases.edit(tmp_path, architectures=["ModernBertModel"])
    cases.check(tmp_path, "ModernBertModel")


@pytest.mark.parametrize("architecture", ["ModernBertModel", "GteModel"])
def test_a_pad_token_of_minus_1_is_none(tmp_path, architecture, cases):
    cases.save(tmp_path, architecture)
    cases.edit(tmp_path, pad_token_id=-1)
    assert ml.read_config(tmp_path).pad_token_id is None
    cases.check(tmp_path, architecture)


@pytest.mark.parametrize("named", [..., None, [], [None], [""]])
@pytest.mark.parametrize("architecture", ["ModernBertForMaskedLM", "GteForTokenClassification"])
def test_without_architectures_the_encoder_is_loaded(tmp_path, architecture, named, cases):
    cases.save(tmp_path, architecture)
    cases.edit(tmp_path, architectures=named)
    encoder = architecture.partition("For")[0] + "Model"
    assert ml.read_config(tmp_path).architecture == encoder
    if named != [None] and named != [""]:
        theirs = cases.expected(tmp_path, encoder)
        assert cases.difference(cases.actual(tmp_path), theirs) <= 2e-5
    assert describe(str(tmp_path))["architecture"] == f"{encoder} (config.json names none)"


@pytest.mark.parametrize(
    ("saved", "named"),
    [("ModernBertModel", "GteModel"), ("ModernBertModel", "NewModel"), ("GteModel", "ModernBertForMaskedLM")],
)
def test_an_architecture_of_the_other_family_is_refused(tmp_path, saved, named, cases):
    cases.save(tmp_path, saved)
    cases.edit(tmp_path, architectures=[named])
    with pytest.raises(CheckpointError, match=f"architectures names '{named}', which is no class of model_type"):
        ml.load_model(tmp_path)


def test_nulls_among_architectures_are_passed_over():
    raw = {"model_type": "modernbert", "architectures": [None, "ModernBertForMaskedLM"]}
    assert ModernBertConfig.from_dict(raw).architecture == "ModernBertForMaskedLM"


def test_without_architectures_a_class_opens_what_it_needs(make_checkpoint, cases):
    from modernbert_lite import Embedder, FillMask, Reranker

    classifier, _ = make_checkpoint("ModernBertForSequenceClassification", num_labels=1, num_hidden_layers=2)
    named = Reranker.from_pretrained(classifier).predict([("a cat", "a dog")])
    cases.edit(classifier, architectures=None)
    assert Reranker.from_pretrained(classifier).predict([("a cat", "a dog")]) == named
    with pytest.warns(UserWarning, match="no pooling files"):
        assert Embedder.from_pretrained(classifier).encode("a cat").shape == (96,)
    with pytest.raises(CheckpointError, match="no masked language model: use"):
        FillMask.from_pretrained(classifier)

    masked, _ = make_checkpoint("ModernBertForMaskedLM", name="masked", num_hidden_layers=2)
    named = FillMask.from_pretrained(masked).predict("a [MASK] barks")
    cases.edit(masked, architectures=[])
    assert FillMask.from_pretrained(masked).predict("a [MASK] barks") == named
    with pytest.raises(CheckpointError, match="no reranker"):
        Reranker.from_pretrained(masked)


def test_an_unknown_architecture_is_refused_by_load_model_and_opened_as_an_encoder(make_checkpoint, cases):
    from modernbert_lite import Embedder, Reranker

    folder, _ = make_checkpoint(num_hidden_layers=2)
    with pytest.warns(UserWarning, match="no pooling files"):
        named = Embedder.from_pretrained(folder).encode("a cat")
    cases.edit(folder, architectures=["MyEncoderWithTricks"])
    with pytest.warns(UserWarning, match="no pooling files"):
        assert (Embedder.from_pretrained(folder).encode("a cat") == named).all()
    with pytest.raises(
        CheckpointError, match=r"architecture 'MyEncoderWithTricks' is not supported; known: .*Embedder"
    ):
        ml.load_model(folder)
    with pytest.raises(CheckpointError, match="holds a MyEncoderWithTricks, no reranker"):
        Reranker.from_pretrained(folder)


# ---- activations


def test_every_activation_of_transformers_is_known_or_has_weights():
    from transformers.activations import ACT2CLS

    from modernbert_lite.models.fields import _SAME_ACTIVATIONS
    from modernbert_lite.ops.reference import ACTIVATIONS

    assert set(ACTIVATIONS) | set(_SAME_ACTIVATIONS) == set(ACT2CLS) - {"prelu", "xielu"}
    assert set(ACTIVATIONS) == set(ops.ACTIVATIONS)


def activations():
    from transformers.activations import ACT2CLS

    return sorted(set(ACT2CLS) - {"prelu", "xielu"})


@pytest.mark.parametrize("name", activations())
def test_every_activation_equals_transformers(name):
    """To the bit, but for the order of two products."""
    from transformers.activations import ACT2FN

    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, 1e4, -1e4])])
    config = ModernBertConfig.from_dict({"model_type": "modernbert", "hidden_activation": name})
    ours, theirs = ops.ACTIVATIONS[config.hidden_activation](x.clone()), ACT2FN[name](x.clone())
    assert ((ours - theirs).abs() <= 1e-7 * theirs.abs()).all()


@pytest.mark.parametrize("backend", ["torch", "onednn", "triton"])
@pytest.mark.parametrize("name", ["swish", "gelu_new", "linear"])
def test_activations_are_right_on_every_backend(tmp_path, monkeypatch, backend, name, cases):
    """Two of them as kernels know none for, one by its other name."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    texts = cases.sequences((3, 9))
    for architecture, keys in (
        ("ModernBertForMaskedLM", {"hidden_activation": name, "classifier_activation": name}),
        ("GteModel", {"hidden_act": name}),
    ):
        cases.save(tmp_path / architecture, architecture, **keys)
        theirs = cases.expected(tmp_path / architecture, architecture, texts)
        assert cases.difference(cases.actual(tmp_path / architecture, texts), theirs) <= 2e-5
