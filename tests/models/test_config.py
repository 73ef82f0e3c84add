"""config.json of every generation: what is read, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
from modernbert_configs import V4, read, rope, v4, v5

from modernbert_lite import CheckpointError, ModernBertConfig, read_config
from modernbert_lite.models.modernbert import FULL, SLIDING
from modernbert_lite.ops.rope import Rope

DATA = Path(__file__).parents[1] / "data"


LARGE = json.loads((DATA / "modernbert-tokenizer" / "config.json").read_text())  # ModernBERT-large's own, of 2024


GTE_BASE = {
    "architectures": ["ModernBertModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "float16",
    "transformers_version": "4.48.0.dev0",
    "vocab_size": 50368,
}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 30, "beta_slow": 2.0}


# Every dict that transformers 5 reads as it was meant.
SAME_AS_TRANSFORMERS = {
    "nothing but the type": {"model_type": "modernbert"},
    "4.48": v4(),
    "5": v5(),
    "large, verbatim": LARGE,
    "gte-modernbert-base, verbatim": GTE_BASE,
    "both, alike": {**v4(), **v5()},
    "both, different": {
        **v4(),
        **v5(layer_types=[SLIDING] * 6 + [FULL], rope_parameters={FULL: rope(7.5), SLIDING: rope(9)}),
    },
    "5, one kind of layer named": v5(rope_parameters={FULL: rope(5000.0)}),
    "5, kinds without a theta": {**v4(), "rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {}}},
    "5, empty rope_parameters": {**v4(), "rope_parameters": {}},
    "5, null for both": v4(layer_types=None, rope_parameters=None),
    "5, linear": v5(rope_parameters={FULL: rope(80.0, rope_type="linear", factor=2.5), SLIDING: rope(9.0)}),
    "5, yarn in one kind": v5(rope_parameters={FULL: rope(160000.0, **YARN, rope_type="yarn"), SLIDING: rope(9.0)}),
    "5, yarn by its old key": v5(
        rope_parameters={FULL: {"type": "yarn", "factor": 2.0, "rope_theta": 9e4}, SLIDING: rope(9.0)}
    ),
    "4, yarn": v4(rope_scaling={"rope_type": "yarn", **YARN}, max_position_embeddings=32768),
    "4, yarn and its theta": v4(rope_scaling={"rope_type": "yarn", "rope_theta": 5e5, **YARN}),
    "4, yarn without an original length": v4(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "4, linear": v4(rope_scaling={"rope_type": "linear", "factor": 3}),
    "scaling over parameters": v5(rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "no local theta": {k: v for k, v in V4.items() if k != "local_rope_theta"},
    "no theta": {k: v for k, v in V4.items() if "theta" not in k},
    "every 1": v4(global_attn_every_n_layers=1),
    "every 5": v4(global_attn_every_n_layers=5),
    "every 9 of 7": v4(global_attn_every_n_layers=9),
    "window odd": v4(local_attention=129),
    "silu": v4(hidden_activation="silu", classifier_activation="relu"),
    "all biases": v4(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, decoder_bias=False),
    "untied": v4(tie_word_embeddings=False, norm_eps=1e-6, classifier_pooling="mean"),
    "odd ids": v4(pad_token_id=179935, bos_token_id=None, cls_token_id=1, eos_token_id=None, sep_token_id=179938),
    "id2label": v4(id2label={"0": "no", "1": "maybe", "2": "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2}),
    "id2label, unordered": v4(id2label={"2": "yes", "0": "no", "1": "maybe"}),
    "one label": v4(
        id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, architectures=["ModernBertForTokenClassification"]
    ),
    "eleven labels": v4(id2label={str(i): f"l{i}" for i in range(11)}),
    "num_labels": v4(num_labels=5),
    "junk": v4(
        layer_norm_eps=1e-12,
        position_embedding_type="sans_pos",
        gradient_checkpointing=True,
        is_gated=["?"],
        reference_compile=True,
        repad_logits_with_grad=False,
        _name_or_path="somewhere/else",
    ),
}


SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_activation",
    "max_position_embeddings",
    "norm_eps",
    "norm_bias",
    "attention_bias",
    "mlp_bias",
    "local_attention",
    "classifier_pooling",
    "classifier_bias",
    "classifier_activation",
    "decoder_bias",
    "tie_word_embeddings",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SAME_AS_TRANSFORMERS)
def test_every_generation_is_read_as_transformers_reads_it(case):
    from transformers import ModernBertConfig as Reference

    raw = SAME_AS_TRANSFORMERS[case]
    kept = copy.deepcopy(raw)
    config = read(raw)
    assert raw == kept, "the caller's dict was changed"
    reference = Reference.from_dict(copy.deepcopy(raw))

    for field in SAME_FIELDS:
        assert getattr(config, field) == getattr(reference, field), field
    if "pad_token_id" in raw:
        assert config.pad_token_id == reference.pad_token_id
    assert config.layer_types == tuple(reference.layer_types)
    for kind, got in ((FULL, config.full_rope), (SLIDING, config.sliding_rope)):
        wanted = reference.rope_parameters[kind]
        assert got.type == wanted["rope_type"], kind
        assert got.theta == wanted["rope_theta"], kind
        if got.type != "default":
            assert got.factor == wanted["factor"], kind
        if got.type == "yarn":
            # transformers 5.23 keeps the length it falls back to one level too high; the value is the same.
            original = wanted.get("original_max_position_embeddings", reference.max_position_embeddings)
            assert got.original_max_position_embeddings == original, kind
            assert got.beta_fast == wanted.get("beta_fast", 32), kind
            assert got.beta_slow == wanted.get("beta_slow", 1), kind
    assert config.labels == tuple(reference.id2label[i] for i in range(reference.num_labels))
    assert config.architecture == (raw.get("architectures") or ["ModernBertModel"])[0]
    for layer, kind in enumerate(reference.layer_types):
        side = reference.sliding_window if kind == SLIDING else -1
        assert config.window_size(layer) == (side, side)


def test_the_two_generations_of_one_network_are_equal():
    assert read(v4()) == read(v5())


def test_the_newer_keys_win_where_both_are_there():
    config = read({**v4(), **v5(layer_types=[SLIDING] * 7, rope_parameters={FULL: rope(1.5), SLIDING: rope(2.5)})})
    assert config.layer_types == (SLIDING,) * 7
    assert (config.full_rope.theta, config.sliding_rope.theta) == (1.5, 2.5)


def test_modernbert_large_verbatim():
    config = read(LARGE)
    assert config.architecture == "ModernBertForMaskedLM"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 28, 16)
    assert (config.intermediate_size, config.head_dim, config.vocab_size) == (2624, 64, 50368)
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == list(range(0, 28, 3))
    assert (config.full_rope, config.sliding_rope) == (Rope(160000.0), Rope(10000.0))
    assert config.window_size(0) == (-1, -1)
    assert config.window_size(1) == (64, 64)
    assert config.pad_token_id == 50283


def test_gte_base_verbatim_is_the_base_size_and_keeps_its_classifier_pooling_apart():
    config = read(GTE_BASE)
    defaults = ModernBertConfig()
    expected = dataclasses.replace(defaults, classifier_pooling="mean", pad_token_id=50283)
    assert config == expected


def test_defaults_are_those_of_a_config_that_says_nothing():
    assert read({"model_type": "modernbert"}) == ModernBertConfig()


def test_null_local_theta_is_the_global_one_and_an_absent_one_is_10000():
    assert read(v4(local_rope_theta=None)).sliding_rope == Rope(80000.0)
    assert read(v4(local_rope_theta=None, global_rope_theta=None)).sliding_rope == Rope(160000.0)
    without = v4()
    del without["local_rope_theta"]
    assert read(without).sliding_rope == Rope(10000.0)


def test_null_local_theta_gives_way_to_rope_parameters():
    config = read(v5(local_rope_theta=None))
    assert config.sliding_rope == Rope(20000.0)


@pytest.mark.filterwarnings("ignore:rope_scaling names 'yarn' by its old key")  # test_config_keys.py
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_of_either_spelling_applies_to_both_kinds(key):
    config = read(v4(rope_scaling={key: "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}))
    for got, theta in ((config.full_rope, 80000.0), (config.sliding_rope, 20000.0)):
        assert got == Rope(theta, "yarn", 4.0, 8192, 32.0, 1.0, pytest.approx(0.1 * math.log(4) + 1))
        assert got.attention_factor == pytest.approx(1.138629436, abs=1e-9)


def test_yarn_takes_its_factor_from_the_lengths_where_none_is_given():
    config = read(
        v4(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 8192}, max_position_embeddings=32768)
    )
    assert config.full_rope.factor == 4.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"attention_factor": 0.75}, 0.75),
        ({"factor": 0.5}, 1.0),
        ({"factor": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 1.0}, 0.1 * math.log(4) + 1),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn_attention_factor(given, expected):
    config = read(v4(rope_scaling={"rope_type": "yarn", **YARN, **given}))
    assert config.full_rope.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("given", [{}, {"mscale": 0.707, "mscale_all_dim": 0.5}, {"attention_factor": 1.25}])
def test_yarn_frequencies_and_factor_equal_transformers(given):
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = v4(rope_scaling={"rope_type": "yarn", **YARN, **given}, hidden_size=192)
    reference = transformers.ModernBertConfig.from_dict(copy.deepcopy(raw))
    wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](reference, "cpu", layer_type=FULL)
    got = read(raw).full_rope
    assert got.attention_factor == pytest.approx(factor, rel=1e-12)

    from modernbert_lite.ops.rope import rope_table

    cos, sin = rope_table(got, 64, torch.arange(3))
    angle = torch.atan2(sin[1].float(), cos[1].float())[:32]  # at position 1 the angles are the frequencies
    assert (angle - wanted).abs().max() < 1e-6


NULLABLE = [field.name for field in dataclasses.fields(ModernBertConfig) if field.name in {**LARGE, **GTE_BASE}]


@pytest.mark.parametrize(
    "key", [*NULLABLE, "layer_types", "rope_parameters", "rope_scaling", "id2label", "architectures"]
)
def test_null_takes_the_default(key):
    raw = v4()
    raw.pop(key, None)
    if key in ("hidden_size", "num_attention_heads"):
        raw["hidden_size"], raw["num_attention_heads"] = 768, 12  # their defaults go together
    absent = {k: v for k, v in raw.items() if k != key}
    assert read({**raw, key: None}) == read(absent)


def test_a_config_is_frozen_hashable_and_has_its_own_labels():
    config = read(v4(id2label={"0": "a", "1": "b", "2": "c"}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 5  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.full_rope.theta = 5.0  # type: ignore[misc]
    assert hash(config) == hash(copy.deepcopy(config))
    assert config.labels == ("a", "b", "c")


def test_labels_are_in_the_order_of_their_numbers_not_of_their_spelling():
    many = {str(i): f"label {i}" for i in reversed(range(12))}
    assert read(v4(id2label=many)).labels == tuple(f"label {i}" for i in range(12))


def test_id2label_wins_over_num_labels():
    assert read(v4(id2label={"0": "only"}, num_labels=4)).labels == ("only",)
    assert read(v4(num_labels=3)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert read(v4()).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            "torch.nn.modules.linear.Identity",
        ),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid", "version": "4.0.1"}}, "torch.nn.Sigmoid"),
        ({"sentence_transformers": {"version": "5.1.0"}}, None),
        ({"sentence_transformers": None, "sbert_ce_default_activation_function": None}, None),
    ],
)
def test_a_cross_encoder_may_name_its_activation_in_either_place(extra, expected):
    assert read(v4(**extra)).activation_fn == expected


def test_a_head_dim_key_is_ignored():
    assert read(v4(head_dim=64)).head_dim == 32


def test_head_size_32_and_the_widest_known_models_are_read():
    assert read(v4(hidden_size=384, num_attention_heads=12)).head_dim == 32
    assert read(v4(hidden_size=1792, num_attention_heads=28, vocab_size=262152)).head_dim == 64


def test_the_path_of_an_unreadable_file_stands_once_in_its_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert str(error.value).count("config.json") == 1
