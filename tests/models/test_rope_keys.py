"""Every key of config.json that changes a number: what transformers makes of it we make of it, or refuse it by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import modernbert_lite as ml
from modernbert_lite import CheckpointError, GteConfig, ModernBertConfig
from modernbert_lite.cli.about import describe
from modernbert_lite.models.modernbert import FULL, SLIDING
from modernbert_lite.ops.choose import backend
from modernbert_lite.ops.rope import Rope, inverse_frequencies, rope_table

FACTORS = [1.0 + 0.25 * i for i in range(8)]  # of head size 16: a frequency each


# Every type of transformers 5, and values that make each of its keys count.
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn, no original length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, ratio of lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8},
    "yarn, betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2, "beta_slow": 0.3},
    "yarn, betas of 0": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0.0},
    "yarn, betas alike": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.5, "beta_slow": 1.5},
    "yarn, betas the other way round": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.1, "beta_slow": 3},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5},
    "yarn, no attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.0},
    "yarn, factor below 1": {"rope_type": "yarn", "factor": 0.5},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2.0 * factor for factor in FACTORS],
        "original_max_position_embeddings": 16,
    },
    "longrope, its factors": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "factor": 4.0,
        "attention_factor": 0.75,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0},
    "proportional, none turns": {"rope_type": "proportional", "partial_rotary_factor": 0.0},
}


# ---- RoPE


@pytest.mark.parametrize("case", SCALINGS)
def test_every_rope_type_equals_transformers_at_every_length_in_one_batch(tmp_path, case, cases):
    """Of a ModernBERT in its global layers, the local ones keep plain RoPE; of a GTE in all. The reference sees each
    text alone: in a batch its dynamic and longrope would depend on the longest."""
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    kinds = {FULL: {**SCALINGS[case], "rope_theta": 300.0}, SLIDING: plain}
    cases.save(tmp_path / "modernbert", "ModernBertModel", rope_parameters=kinds)
    cases.check(tmp_path / "modernbert", "ModernBertModel")
    cases.save(tmp_path / "gte", "GteModel", rope_parameters={**SCALINGS[case], "rope_theta": 300.0})
    cases.check(tmp_path / "gte", "GteModel")
    for name in ("modernbert", "gte"):
        assert SCALINGS[case]["rope_type"] in describe(str(tmp_path / name))["rope type"]


@pytest.mark.parametrize("case", [case for case in SCALINGS if case != "dynamic"])
def test_frequencies_equal_transformers_to_the_bit(case, cases):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**SCALINGS[case], "rope_theta": 777.0}
    reference = transformers.GteConfig(**{**cases.GTE, "rope_parameters": dict(scaling)})
    rope = GteConfig.from_dict({"model_type": "gte", **cases.GTE, "rope_parameters": scaling}).rope
    if rope.type == "default":
        theirs, factor = transformers.models.gte.modeling_gte.GteRotaryEmbedding(reference).inv_freq, 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[rope.type](reference, "cpu")
    assert torch.equal(inverse_frequencies(rope, 16, torch.device("cpu")), theirs)
    assert rope.attention_factor == factor


@pytest.mark.parametrize("length", [31, 32, 33, 64, 1000])
def test_dynamic_frequencies_grow_with_the_text_alone(length):
    """theta (factor L / 32 - (factor - 1))^(D / (D - 2)) beyond 32 positions: a batch's other texts don't count."""
    rope = Rope(100.0, "dynamic", 3.0, 32)
    lengths = torch.tensor([length, 5, 100_000])
    cos, sin = rope_table(rope, 16, torch.ones(3, dtype=torch.int64), lengths)
    theta = 100.0 * (3.0 * max(length, 32) / 32 - 2.0) ** (16 / 14)
    wanted = torch.tensor([theta ** (-j / 16) for j in range(0, 16, 2)], dtype=torch.float64)
    assert (torch.atan2(sin[0], cos[0]).double() - wanted).abs().max() < 1e-6
    with pytest.raises(ValueError, match="'dynamic' depend on the lengths of texts"):
        rope_table(rope, 16, torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_the_rope_kernel_gets_the_frequencies_of_each_text(tmp_path, monkeypatch, case, cases):
    cases.save(tmp_path, "GteModel", rope_parameters={**SCALINGS[case], "rope_theta": 300.0}, max_position_embeddings=8)
    texts = cases.sequences((3, 17, 9))
    theirs = cases.expected(tmp_path, "GteModel", texts)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    if backend("rope", torch.empty(1)) != "triton":
        pytest.skip("no triton here")
    assert cases.difference(cases.actual(tmp_path, texts), theirs) <= 2e-5


def test_what_rests_on_the_length_of_a_text_is_the_same_for_rows(tmp_path, cases):
    """The last layer of a classifier computes one token a text, whose frequencies are its text's."""
    cases.save(tmp_path, "GteForSequenceClassification", rope_parameters=SCALINGS["dynamic"], num_labels=3)
    cases.check(tmp_path, "GteForSequenceClassification")


@pytest.mark.parametrize("truncate", [True, False, None])
def test_truncate_of_yarn_is_honoured_in_gte(tmp_path, truncate, cases):
    """null is false there, as for transformers; whole pairs are the default."""
    scaling = {**SCALINGS["yarn"], "rope_theta": 300.0, "beta_fast": 2, "beta_slow": 0.3, "truncate": truncate}
    cases.save(tmp_path, "GteModel", rope_parameters=scaling)
    cases.check(tmp_path, "GteModel")
    assert ml.read_config(tmp_path).rope.truncate is (truncate is True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["truncate"] = "no"
    with pytest.raises(CheckpointError, match="truncate is 'no'; it must be true or false"):
        GteConfig.from_dict(config)


def test_truncate_of_yarn_changes_nothing_in_modernbert(tmp_path, cases):
    """transformers 5 looks for the key beside the kinds of layers, where its config allows none."""
    kinds = {kind: {**SCALINGS["yarn"], "rope_theta": 300.0, "truncate": False} for kind in (FULL, SLIDING)}
    cases.save(tmp_path, "ModernBertModel", rope_parameters=kinds)
    cases.check(tmp_path, "ModernBertModel")


@pytest.mark.parametrize("case", ["yarn", "longrope", "llama3"])
def test_an_original_length_at_the_top_wins_in_gte(tmp_path, case, cases):
    cases.save(tmp_path, "GteModel", rope_parameters={**SCALINGS[case], "rope_theta": 300.0})
    cases.edit(tmp_path, original_max_position_embeddings=12)
    cases.check(tmp_path, "GteModel")
    assert ml.read_config(tmp_path).rope.original_max_position_embeddings == 12


def test_rope_scaling_takes_the_place_of_rope_parameters_in_gte(tmp_path, cases):
    """All of it: the theta of rope_parameters goes too, and the default is in its place."""
    cases.save(tmp_path, "GteModel", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0})
    cases.edit(tmp_path, rope_scaling={"type": "linear", "factor": 3.0})
    cases.check(tmp_path, "GteModel")
    assert ml.read_config(tmp_path).rope == Rope(160_000.0, "linear", 3.0)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 300.0}])
def test_a_scaling_that_alibaba_s_class_doesn_t_know_makes_it_transformers(tmp_path, theta, cases):
    cases.save(tmp_path, "GteModel")
    cases.edit(tmp_path, rope_parameters=..., rope_scaling={"type": "yarn", "factor": 3.0}, **theta)
    cases.check(tmp_path, "GteModel")
    assert ml.read_config(tmp_path).rope.theta == theta.get("rope_theta", 160_000.0)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_type_by_its_old_key_applies_to_modernbert_with_a_warning(kind):
    """transformers 4 takes it; 5 keeps plain RoPE, unless rope_parameters without a type stand beside it."""
    raw = {"model_type": "modernbert", "rope_scaling": {"type": kind, "factor": 4.0}}
    with pytest.warns(UserWarning, match=f"rope_scaling names '{kind}' by its old key `type`.*transformers 5"):
        config = ModernBertConfig.from_dict(raw)
    assert (config.full_rope.type, config.sliding_rope.type, config.full_rope.factor) == (kind, kind, 4.0)
    reference = transformers.ModernBertConfig.from_dict(json.loads(json.dumps(raw)))
    assert reference.rope_parameters[FULL]["rope_type"] == "default"  # the day it isn't, the warning can go


def test_a_type_by_its_old_key_beside_rope_parameters_is_as_in_transformers(tmp_path, cases):
    cases.save(tmp_path, "ModernBertModel")
    kinds = {FULL: {"rope_theta": 300.0}, SLIDING: {"rope_theta": 100.0}}
    cases.edit(tmp_path, rope_parameters=kinds, rope_scaling={"type": "linear", "factor": 4.0})
    cases.check(tmp_path, "ModernBertModel")
    assert ml.read_config(tmp_path).full_rope == Rope(300.0, "linear", 4.0)


def test_a_factor_without_a_type_is_refused():
    with pytest.raises(CheckpointError, match=r"RoPE of full_attention has \['factor'\] and no type; rope_type must"):
        ModernBertConfig.from_dict({"model_type": "modernbert", "rope_scaling": {"factor": 4.0}})


LONG = SCALINGS["longrope"]


LLAMA = SCALINGS["llama3"]


# Values of RoPE from which no finite number comes, or transformers' own error.
DEGENERATE = {
    "theta 1 of yarn": ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "a rope_theta of 1"),
    "theta 0": ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
    "theta below 0": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": -9.0}, "rope_theta is -9.0"),
    "theta NaN": ({"rope_type": "default", "rope_theta": float("nan")}, "rope_theta is nan"),
    "theta infinite": ({"rope_type": "default", "rope_theta": float("inf")}, "rope_theta is inf"),
    "theta beyond fp32": ({"rope_type": "default", "rope_theta": 1e39}, "rope_theta is 1e\\+39"),
    "theta that is 0 in fp32": ({"rope_type": "linear", "factor": 1.0, "rope_theta": 1e-50}, "rope_theta is 1e-50"),
    "factor 0": ({"rope_type": "linear", "factor": 0}, "factor is 0; it must be a positive number"),
    "factor below 0": ({"rope_type": "dynamic", "factor": -2.0}, "factor is -2.0"),
    "no factor of linear": ({"rope_type": "linear"}, "type 'linear'.* has no factor; it must be a positive number"),
    "no factor of dynamic": ({"rope_type": "dynamic", "factor": None}, "type 'dynamic'.* has no factor"),
    "no factor of llama3": ({**LLAMA, "factor": None}, "type 'llama3'.* has no factor"),
    "no low_freq_factor": ({**LLAMA, "low_freq_factor": None}, "type 'llama3'.* has no low_freq_factor"),
    "low_freq_factor 0": ({**LLAMA, "low_freq_factor": 0}, "low_freq_factor is 0"),
    "llama3's factors alike": ({**LLAMA, "low_freq_factor": 4.0}, "low_freq_factor and high_freq_factor are both 4"),
    "original length 0": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "whole number"),
    "beta below 0": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast is -1"),
    "beta false": ({"rope_type": "yarn", "factor": 2.0, "beta_slow": False}, "beta_slow is False"),
    "attention factor NaN": (
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": float("nan")},
        "attention_factor is nan; it must be a number",
    ),
    "mscale divides by 0": (
        {"rope_type": "yarn", "factor": 2.0, "mscale": 1, "mscale_all_dim": -10 / 0.6931471805599453},
        "mscale_all_dim is -14.427",
    ),
    "logarithm of 1": (
        {**LONG, "original_max_position_embeddings": 1, "factor": 2.0},
        "original_max_position_embeddings is 1, whose logarithm",
    ),
    "short_factor too short": (
        {**LONG, "short_factor": FACTORS[1:]},
        "short_factor is .* a list of 8",
    ),
    "no long_factor": ({**LONG, "long_factor": None}, "has no long_factor; it must be a list of positive numbers"),
    "long_factor with a 0": ({**LONG, "long_factor": [0.0] * 8}, "long_factor is .*a list of positive numbers"),
    "long_factor of strings": ({**LONG, "long_factor": ["1"] * 8}, "long_factor is .*a list of positive numbers"),
    "a share over 1": ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    "a share of linear": (
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported with .*'linear'",
    ),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_rope_without_finite_numbers_is_refused_at_load(case, cases):
    values, message = DEGENERATE[case]
    values = {"rope_theta": 300.0, **values}
    with pytest.raises(CheckpointError, match=message):
        GteConfig.from_dict({"model_type": "gte", **cases.GTE, "rope_parameters": values})
    kinds = {FULL: {"rope_type": "default"}, SLIDING: values}
    with pytest.raises(CheckpointError, match=message):
        ModernBertConfig.from_dict({"model_type": "modernbert", **cases.MODERNBERT, "rope_parameters": kinds})


def test_a_share_at_the_top_of_the_config_counts(cases):
    scaling = {"rope_type": "proportional", "rope_theta": 300.0}
    raw = {"model_type": "gte", **cases.GTE, "rope_parameters": scaling, "partial_rotary_factor": 0.5}
    assert GteConfig.from_dict(raw).rope.rotated == 0.5
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor 0.5 is not supported"):
        ModernBertConfig.from_dict({"model_type": "modernbert", "partial_rotary_factor": 0.5})


def test_dynamic_rope_of_heads_of_two_is_refused():
    raw = {"model_type": "gte", "hidden_size": 4, "num_attention_heads": 2, "rope_parameters": SCALINGS["dynamic"]}
    with pytest.raises(CheckpointError, match="'dynamic' needs heads of at least 4 numbers"):
        GteConfig.from_dict(raw)


# ---- windows, heads
