"""config.json of the GTE encoders: three dialects of one architecture, their defaults, RoPE, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers

import modernbert_lite as ml
from modernbert_lite import CheckpointError, GteConfig
from modernbert_lite.ops.rope import Rope, inverse_frequencies

# Two published files as they are, but for auto_map.
MULTILINGUAL = {
    "architectures": ["NewModel", "NewForTokenClassification"],
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "max_position_embeddings": 8192,
    "model_type": "new",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_labels": 1,
    "pack_qkv": True,
    "pad_token_id": 1,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"},
    "rope_theta": 20000,
    "torch_dtype": "float16",
    "transformers_version": "4.39.1",
    "type_vocab_size": 1,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 250048,
}
ENGLISH = {
    **{key: value for key, value in MULTILINGUAL.items() if key not in ("classifier_dropout", "num_labels")},
    "architectures": ["NewModel"],
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "pad_token_id": 0,
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 500000,
    "torch_dtype": "float32",
    "type_vocab_size": 0,
    "vocab_size": 30528,
}
# snowflake-arctic-embed-m-v2.0: the old keys under the new name, and booleans that are strings.
SNOWFLAKE = {
    **{key: value for key, value in MULTILINGUAL.items() if key not in ("classifier_dropout", "num_labels")},
    "architectures": ["GteModel"],
    "auto_map": {"AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel"},
    "model_type": "gte",
    "pack_qkv": "true",
    "rope_scaling": None,
    "rope_theta": 160000,
    "torch_dtype": "float32",
    "unpad_inputs": "true",
    "use_memory_efficient_attention": "true",
}
NATIVE = {"model_type": "gte", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


class NewConfig(transformers.PreTrainedConfig):
    """What Alibaba's class does with RoPE's keys, to see what transformers 5 writes for it."""

    model_type = "new"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, **keys):
        super().__init__(**keys)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling


def saved(config, folder):
    """The dictionary that transformers writes for a config."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def frequencies(rope, head_dim=64):
    return inverse_frequencies(rope, head_dim, torch.device("cpu")).double()


def expected_frequencies(function, head_dim=64):
    return torch.tensor([function(2 * j / head_dim) for j in range(head_dim // 2)], dtype=torch.float64)


def assert_near(a, b, relative=1e-6):
    assert a.shape == b.shape
    assert ((a - b).abs() / b).max().item() <= relative


# --- the dialects


def test_an_empty_new_config_has_new_config_s_defaults():
    config = GteConfig.from_dict({"model_type": "new"})
    assert config == GteConfig()
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("NewModel", 30528, 768)
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (12, 12, 64)
    assert (config.intermediate_size, config.max_position_embeddings, config.type_vocab_size) == (3072, 2048, 1)
    assert (config.hidden_act, config.layer_norm_type, config.layer_norm_eps) == ("gelu", "layer_norm", 1e-12)
    assert (config.position_embedding_type, config.rope) == ("rope", Rope(10_000.0))
    assert (config.tie_word_embeddings, config.pad_token_id, config.labels) == (True, None, ("LABEL_0", "LABEL_1"))
    assert not config.sparse


def test_old_keys_under_the_name_gte_have_new_config_s_defaults():
    config = GteConfig.from_dict({"model_type": "gte", "rope_theta": 160000})
    assert config == GteConfig(rope=Rope(160_000.0))


def test_transformers_own_config_has_its_own_defaults():
    config = GteConfig.from_dict({"model_type": "gte", "rope_parameters": {"rope_type": "default"}})
    theirs = transformers.GteConfig()
    for field in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(config, field) == getattr(theirs, field), field
    assert config.rope == Rope(theirs.rope_parameters["rope_theta"]) == Rope(160_000.0)
    assert (config.architecture, config.position_embedding_type) == ("GteModel", "rope")


def test_gte_multilingual_base_as_published():
    config = GteConfig.from_dict(MULTILINGUAL)
    assert config == GteConfig(
        vocab_size=250048,
        max_position_embeddings=8192,
        rope=Rope(20_000.0, "ntk", 8.0),
        pad_token_id=1,
        labels=("LABEL_0",),
        sparse=True,
    )


def test_gte_base_en_as_published():
    config = GteConfig.from_dict(ENGLISH)
    assert config == GteConfig(
        max_position_embeddings=8192, type_vocab_size=0, rope=Rope(500_000.0, "ntk", 2.0), pad_token_id=0
    )


def test_snowflake_arctic_as_published():
    config = GteConfig.from_dict(SNOWFLAKE)
    assert config == GteConfig(
        architecture="GteModel",
        vocab_size=250048,
        max_position_embeddings=8192,
        rope=Rope(160_000.0),
        pad_token_id=1,
    )


def test_booleans_may_be_strings():
    for value in (True, False):
        config = GteConfig.from_dict({**MULTILINGUAL, "tie_word_embeddings": str(value).lower()})
        assert config.tie_word_embeddings is value
    same = {"logn_attention_scale": "false", "logn_attention_clip1": "true"}
    assert GteConfig.from_dict({**MULTILINGUAL, **same}) == GteConfig.from_dict(MULTILINGUAL)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, Rope(160_000.0)),
        ({"rope_type": "default", "rope_theta": 20000.0}, Rope(20_000.0)),
        ({"rope_type": "linear", "rope_theta": 1e6, "factor": 1.5}, Rope(1e6, "linear", 1.5)),
    ],
)
def test_configs_that_transformers_writes_for_gte(tmp_path, rope, expected):
    theirs = transformers.GteConfig(
        vocab_size=997,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_act="silu",
        max_position_embeddings=300,
        type_vocab_size=2,
        layer_norm_eps=1e-6,
        pad_token_id=3,
        tie_word_embeddings=False,
        num_labels=3,
        rope_parameters=rope,
        architectures=["GteForTokenClassification"],
    )
    saved(theirs, tmp_path)
    assert ml.read_config(tmp_path) == GteConfig(
        architecture="GteForTokenClassification",
        vocab_size=997,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_act="silu",
        max_position_embeddings=300,
        type_vocab_size=2,
        layer_norm_eps=1e-6,
        rope=expected,
        tie_word_embeddings=False,
        pad_token_id=3,
        labels=("LABEL_0", "LABEL_1", "LABEL_2"),
    )


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("model_type", ["new", "gte"])
@pytest.mark.parametrize("source", [MULTILINGUAL, ENGLISH, SNOWFLAKE], ids=["multilingual", "english", "snowflake"])
def test_a_new_config_that_transformers_5_saved_again_means_the_same(tmp_path, monkeypatch, source, model_type):
    monkeypatch.setattr(NewConfig, "model_type", model_type)
    raw = saved(NewConfig(**{key: value for key, value in source.items() if key != "model_type"}), tmp_path)
    assert "rope_parameters" in raw  # the form this is about
    assert "rope_scaling" not in raw
    assert raw["rope_theta"] == source["rope_theta"]
    if source["rope_scaling"]:
        assert {"type", "factor", "rope_type", "rope_theta"} == set(raw["rope_parameters"])
    assert ml.read_config(tmp_path) == GteConfig.from_dict({**source, "model_type": model_type})


def test_ntk_by_its_name_is_new_config_s_alone():
    for key in ("type", "rope_type"):
        rope = {key: "ntk", "factor": 8.0, "rope_theta": 20000.0}
        config = GteConfig.from_dict({"model_type": "gte", "rope_parameters": rope})
        assert config == GteConfig(rope=Rope(20_000.0, "ntk", 8.0))


def test_transformers_own_class_never_has_absolute_positions():
    """It ignores the key, which files converted from BERT's still have."""
    assert GteConfig.from_dict({**NATIVE, "position_embedding_type": "absolute"}).position_embedding_type == "rope"
    config = GteConfig.from_dict({**MULTILINGUAL, "position_embedding_type": "absolute"})
    assert config.position_embedding_type == "absolute"


def test_one_label_of_a_token_classifier_is_a_sparse_weight():
    def sparse(architectures, labels):
        return GteConfig.from_dict({**MULTILINGUAL, "architectures": architectures, "num_labels": labels}).sparse

    assert sparse(["NewModel", "NewForTokenClassification"], 1)
    assert not sparse(["NewModel"], 1)
    assert not sparse(["NewForSequenceClassification"], 1)
    assert not sparse(["NewModel", "NewForTokenClassification"], 2)


@pytest.mark.parametrize("raw", [MULTILINGUAL, ENGLISH, SNOWFLAKE, NATIVE])
def test_read_config_finds_the_dialect_by_itself(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ml.read_config(tmp_path)
    assert isinstance(config, GteConfig)
    assert config == GteConfig.from_dict(raw)


# --- frequencies of RoPE


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_plain_frequencies(theta, head_dim):
    expected = expected_frequencies(lambda exponent: theta**-exponent, head_dim)
    assert_near(frequencies(Rope(theta), head_dim), expected)


@pytest.mark.parametrize(("factor", "times"), [(8.0, 0.937084), (2.0, 0.978572)])
@pytest.mark.parametrize("theta", [20_000.0, 500_000.0])
def test_fixed_ntk_stretches_theta_and_all_frequencies(theta, factor, times):
    assert 1 / factor ** (2 / 64) == pytest.approx(times, rel=1e-6)
    expected = expected_frequencies(lambda exponent: (theta * factor) ** -exponent) / factor ** (2 / 64)
    got = frequencies(Rope(theta, "ntk", factor))
    assert_near(got, expected)
    assert got[0].item() == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize(("theta", "factor"), [(20_000.0, 8.0), (500_000.0, 2.0), (160_000.0, 1.0)])
@pytest.mark.parametrize("heads", [12, 24])
def test_ntk_and_transformers_linear_form_of_it_are_the_same(theta, factor, heads):
    new = {**MULTILINGUAL, "rope_theta": theta, "rope_scaling": {"type": "ntk", "factor": factor}}
    head_dim = 768 // heads
    rope = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    ours = GteConfig.from_dict({**new, "num_attention_heads": heads})
    native = GteConfig.from_dict({"model_type": "gte", "num_attention_heads": heads, "rope_parameters": rope})
    assert ours.head_dim == native.head_dim == head_dim
    assert_near(frequencies(ours.rope, head_dim), frequencies(native.rope, head_dim))
    theirs = transformers.models.gte.modeling_gte.GteRotaryEmbedding(
        transformers.GteConfig(num_attention_heads=heads, rope_parameters=rope)
    )
    assert_near(frequencies(ours.rope, head_dim), theirs.inv_freq.double())


# --- what is refused


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
REFUSED = {
    "unknown scaling": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["rope_scaling type 'dynamic'", "known: default, ntk"],
    ),
    "unknown parameters": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}},
        ["rope_parameters type 'longrope'", "known: default, ntk"],
    ),
    "a factor without a type": ({"rope_scaling": {"factor": 8.0}}, ["rope_scaling has ['factor']", "no type", "ntk"]),
    "parameters by layer": (
        {"model_type": "gte", "rope_scaling": None, "rope_parameters": {"full_attention": LINEAR}},
        ["rope_parameters has ['full_attention']", "no type", "linear, dynamic, yarn"],
    ),
    "linear in a NewConfig": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "known: default, ntk"]),
    "scaling's type is a number": ({"rope_scaling": {"type": 8}}, ["rope_scaling type 8", "known: ", "ntk"]),
    "scaling is a string": ({"rope_scaling": "ntk"}, ["rope_scaling is 'ntk'", "an object or null"]),
    "ntk without a factor": ({"rope_scaling": {"type": "ntk"}}, ["'ntk'", "factor", "a positive number"]),
    "ntk by null": ({"rope_scaling": {"type": "ntk", "factor": None}}, ["'ntk'", "factor", "a positive number"]),
    "ntk by 0": ({"rope_scaling": {"type": "ntk", "factor": 0}}, ["factor is 0;", "a positive number"]),
    "ntk by a string": ({"rope_scaling": {"type": "ntk", "factor": "8"}}, ["factor is '8'", "a positive number"]),
    "ntk by NaN": ({"rope_scaling": {"type": "ntk", "factor": math.nan}}, ["factor is nan", "a positive number"]),
    "mixed": (
        {"rope_scaling": {"type": "ntk", "factor": 8, "mixed_b": "x"}},
        ["mixed_b is 'x'", "not supported", "leave it out"],
    ),
    "two factors": (
        {"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ["rope_parameters", "rope_scaling", "'factor'", "2.0", "8.0"],
    ),
    "two types": (
        {"rope_parameters": LINEAR, "rope_scaling": {"type": "ntk", "factor": 2.0}},
        ["rope_parameters and rope_scaling", "'rope_type'", "'linear'", "'ntk'", "differ"],
    ),
    "logn": ({"logn_attention_scale": True}, ["logn_attention_scale is True", "not supported", "false, or left out"]),
    "logn by a string": ({"logn_attention_scale": "true"}, ["logn_attention_scale is 'true'", "not supported"]),
    "theta is a string": ({"rope_theta": "20000"}, ["rope_theta is '20000'", "a positive number"]),
    "theta below 0": ({"rope_theta": -1}, ["rope_theta is -1", "a positive number"]),
    "norms": ({"layer_norm_type": "batch_norm"}, ["layer_norm_type is 'batch_norm'", "layer_norm, rms_norm"]),
    "positions": (
        {"position_embedding_type": "relative_key"},
        ["position_embedding_type is 'relative_key'", "rope, absolute"],
    ),
    "activation": ({"hidden_act": "prelu"}, ["hidden_act is 'prelu'", "gelu, silu"]),
    "heads don't divide": (
        {"num_attention_heads": 7},
        ["hidden_size 768", "num_attention_heads 7", "a whole, even head size"],
    ),
    "odd heads": (
        {"hidden_size": 36},
        ["hidden_size 36", "num_attention_heads 12", "a whole, even head size"],
    ),
    "types below 0": ({"type_vocab_size": -1}, ["type_vocab_size is -1", "a whole number from 0"]),
    "types a boolean": ({"type_vocab_size": True}, ["type_vocab_size is True", "a whole number from 0"]),
    "too many types": ({"type_vocab_size": 1 << 30}, ["type_vocab_size is 1073741824", "from 0 to 65536"]),
    "vocabulary a string": ({"vocab_size": "30528"}, ["vocab_size is '30528'", "a whole number from 1"]),
    "width a fraction": ({"hidden_size": 768.5}, ["hidden_size is 768.5", "a whole number from 1"]),
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "a whole number from 1 to 1000"]),
    "length a list": ({"max_position_embeddings": [8192]}, ["max_position_embeddings is [8192]", "a whole number"]),
    "no epsilon": ({"layer_norm_eps": 0}, ["layer_norm_eps is 0;", "a positive number"]),
    "logn a word": ({"logn_attention_scale": "yes"}, ["logn_attention_scale is 'yes'", "true or false"]),
    "logn a number": ({"logn_attention_clip1": 1}, ["logn_attention_clip1 is 1;", "true or false"]),
    "tied a word": ({"tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'", "true or false"]),
    "padding a string": ({"pad_token_id": "-1"}, ["pad_token_id is '-1'", "a whole number, or null"]),
    "fewer labels than none": ({"num_labels": -1}, ["num_labels is -1", "a whole number from 0"]),
    "architectures a string": ({"architectures": "NewModel"}, ["architectures is 'NewModel'", "a list of class names"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_value_is_refused_with_its_key_its_value_and_what_is_accepted(tmp_path, case):
    changes, parts = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps({**MULTILINGUAL, **changes}))
    with pytest.raises(CheckpointError) as caught:
        ml.read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("extra", [{}, {"rope_parameters": None}, {"rope_parameters": {}}, {"rope_scaling": None}])
def test_a_config_whose_dialect_can_t_be_told_is_refused(extra):
    raw = {"model_type": "gte", "vocab_size": 997, "hidden_size": 768, "num_attention_heads": 12, **extra}
    with pytest.raises(CheckpointError) as caught:
        GteConfig.from_dict(raw)
    for part in ("model_type is 'gte'", "rope_parameters", "GteConfig", "NewConfig", "rope_theta", "pack_qkv"):
        assert part in str(caught.value)


def test_each_of_new_config_s_own_keys_tells_its_dialect():
    for key, value in (
        ("rope_theta", 10000.0),
        ("rope_scaling", {"type": "ntk", "factor": 8.0}),
        ("pack_qkv", True),
        ("layer_norm_type", "layer_norm"),
        ("unpad_inputs", "true"),
        ("use_memory_efficient_attention", "true"),
        ("logn_attention_scale", False),
        ("logn_attention_clip1", False),
    ):
        assert GteConfig.from_dict({"model_type": "gte", key: value}).vocab_size == 30528, key


def test_a_type_that_is_said_twice_must_be_the_same():
    """`type` is the older name of `rope_type`; a file may have both."""
    both = {"type": "ntk", "rope_type": "ntk", "factor": 8.0}
    assert GteConfig.from_dict({**MULTILINGUAL, "rope_scaling": both}).rope == Rope(20_000.0, "ntk", 8.0)
    with pytest.raises(CheckpointError, match=r"'default'.*'ntk'|'ntk'.*'default'"):
        GteConfig.from_dict({**MULTILINGUAL, "rope_scaling": {**both, "rope_type": "default"}})


@pytest.mark.parametrize("model_type", ["bert", None, ["new"]])
def test_another_model_s_config_is_refused_by_its_name(model_type):
    with pytest.raises(CheckpointError, match=r"model_type .* is not supported; known: .*'new', 'gte'"):
        GteConfig.from_dict({**MULTILINGUAL, "model_type": model_type})


def test_a_config_of_the_other_class_is_named():
    with pytest.raises(
        CheckpointError, match=r"'new' is not supported; known: 'modernbert' \(ModernBertConfig's; read_config"
    ):
        ml.ModernBertConfig.from_dict({"model_type": "new"})
    with pytest.raises(
        CheckpointError, match=r"'modernbert' is not supported; known: 'new', 'gte' \(GteConfig's; read_config"
    ):
        GteConfig.from_dict({"model_type": "modernbert"})
