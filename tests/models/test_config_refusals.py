"""config.json of ModernBERT: what is refused, by name."""

from __future__ import annotations

import json
import math
import re

import pytest
from modernbert_configs import read, rope, v4, v5

from modernbert_lite import CheckpointError, read_config
from modernbert_lite.models.modernbert import FULL, SLIDING
from modernbert_lite.ops.rope import Rope

# what is changed -> what the message must say: the key, the value, what is accepted
REFUSED = {
    "no model_type": ({"model_type": None}, ["model_type", "None", "'modernbert'"]),
    "bert": ({"model_type": "bert"}, ["model_type", "'bert'", "'modernbert'"]),
    "decoder": ({"model_type": "modernbert-decoder"}, ["model_type", "'modernbert-decoder'", "'modernbert'"]),
    "model_type of a wrong type": ({"model_type": ["modernbert"]}, ["model_type", "['modernbert']", "'modernbert'"]),
    "activation": ({"hidden_activation": "swish7"}, ["hidden_activation", "'swish7'", "gelu", "silu"]),
    "activation with weights": ({"hidden_activation": "prelu"}, ["hidden_activation", "'prelu'", "gelu"]),
    "head activation": ({"classifier_activation": "xielu"}, ["classifier_activation", "'xielu'", "gelu"]),
    "activation no string": ({"hidden_activation": 5}, ["hidden_activation", "5", "gelu"]),
    "activation a list": ({"hidden_activation": ["gelu"]}, ["hidden_activation", "['gelu']", "gelu"]),
    "classifier_pooling": ({"classifier_pooling": "max"}, ["classifier_pooling", "'max'", "cls", "mean"]),
    "rope type in scaling": ({"rope_scaling": {"type": "ntk", "factor": 2}}, ["'ntk'", "default", "yarn"]),
    "rope type in parameters": (
        {"rope_parameters": {FULL: rope(9.0), SLIDING: rope(9.0, rope_type="axial")}},
        ["'axial'", SLIDING, "yarn"],
    ),
    "rope type no string": ({"rope_scaling": {"rope_type": ["yarn"]}}, ["['yarn']", "yarn"]),
    "flat rope_parameters": ({"rope_parameters": rope(9.0)}, ["rope_parameters", "rope_theta", FULL, SLIDING]),
    "rope_parameters no object": ({"rope_parameters": [1]}, ["rope_parameters", "[1]", "object"]),
    "a kind no object": ({"rope_parameters": {FULL: 160000.0, SLIDING: rope(9.0)}}, [FULL, "160000.0", "object"]),
    "rope_scaling no object": ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "object"]),
    "theta negative": ({"global_rope_theta": -1.0}, ["global_rope_theta", "-1.0", "positive"]),
    "theta zero": ({"local_rope_theta": 0}, ["local_rope_theta", "0", "positive"]),
    "theta infinite": ({"global_rope_theta": math.inf}, ["global_rope_theta", "inf", "positive"]),
    "theta NaN": ({"local_rope_theta": math.nan}, ["local_rope_theta", "nan", "positive"]),
    "theta a string": ({"local_rope_theta": "10000"}, ["local_rope_theta", "'10000'", "positive"]),
    "theta a bool": ({"local_rope_theta": True}, ["local_rope_theta", "True", "positive"]),
    "theta of a kind": ({"rope_parameters": {FULL: rope("x"), SLIDING: {}}}, ["rope_theta", "'x'", "positive"]),
    "partial rotary": ({"rope_scaling": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5", "1.0"]),
    "yarn factor": ({"rope_scaling": {"type": "yarn", "factor": -4}}, ["factor", "-4", "positive"]),
    "yarn original": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}},
        ["original_max_position_embeddings", "0", "whole number"],
    ),
    "too few layer_types": ({"layer_types": [FULL] * 6}, ["layer_types", FULL, "7", "num_hidden_layers", SLIDING]),
    "too many layer_types": ({"layer_types": [FULL] * 8}, ["layer_types", "7", "num_hidden_layers"]),
    "unknown layer type": (
        {"layer_types": [FULL] * 6 + ["linear_attention"]},
        ["layer_types", "linear_attention", FULL],
    ),
    "layer_types a string": ({"layer_types": FULL}, ["layer_types", FULL, SLIDING]),
    "layer_types of lists": ({"layer_types": [[FULL]] * 7}, ["layer_types", FULL, SLIDING]),
    "layer_types of objects": ({"layer_types": [{}] * 7}, ["layer_types", FULL, SLIDING]),
    "heads don't divide": ({"hidden_size": 100}, ["hidden_size", "100", "num_attention_heads", "3"]),
    "odd head size": ({"hidden_size": 99, "num_attention_heads": 3}, ["hidden_size", "99", "even"]),
    "more heads than width": ({"hidden_size": 96, "num_attention_heads": 192}, ["num_attention_heads", "192"]),
    "layers zero": ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "1 to"]),
    "layers negative": ({"num_hidden_layers": -22}, ["num_hidden_layers", "-22", "1 to"]),
    "layers absurd": ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000", "1 to 1000"]),
    "width absurd": ({"hidden_size": 3 << 20}, ["hidden_size", str(3 << 20), "1 to"]),
    "GLU absurd": ({"intermediate_size": 1 << 40}, ["intermediate_size", str(1 << 40), "1 to"]),
    "vocabulary absurd": ({"vocab_size": 1 << 40}, ["vocab_size", str(1 << 40), "1 to"]),
    "labels absurd": ({"num_labels": 5_000_000}, ["num_labels", "5000000", "0 to"]),
    "labels below 0": ({"num_labels": -1}, ["num_labels", "-1", "0 to"]),
    "every 0": ({"global_attn_every_n_layers": 0}, ["global_attn_every_n_layers", "0", "1 to"]),
    "window below 0": ({"local_attention": -2}, ["local_attention", "-2", "0 to"]),
    "window null-like": ({"local_attention": "128"}, ["local_attention", "'128'", "whole number"]),
    "a float for a size": ({"hidden_size": 96.0}, ["hidden_size", "96.0", "whole number"]),
    "true for a size": ({"num_hidden_layers": True}, ["num_hidden_layers", "True", "whole number"]),
    "a list for a size": ({"vocab_size": [1003]}, ["vocab_size", "[1003]", "whole number"]),
    "eps zero": ({"norm_eps": 0}, ["norm_eps", "0", "positive"]),
    "eps a string": ({"norm_eps": "1e-5"}, ["norm_eps", "'1e-5'", "positive"]),
    "a number beyond floats": ({"norm_eps": 10**400}, ["norm_eps", "1000000", "positive"]),
    "1 for a bool": ({"norm_bias": 1}, ["norm_bias", "1", "true or false"]),
    "'true' for a bool": ({"tie_word_embeddings": "true"}, ["tie_word_embeddings", "'true'", "true or false"]),
    "architectures a string": ({"architectures": "ModernBertModel"}, ["architectures", "'ModernBertModel'", "list"]),
    "architectures of numbers": ({"architectures": [5]}, ["architectures", "[5]", "list"]),
    "architectures no names": ({"architectures": ["a\nb"]}, ["architectures", "'a\\nb'", "list of class names"]),
    "architectures without end": ({"architectures": ["a" * 5000]}, ["architectures", "…", "list of class names"]),
    "id2label a list": ({"id2label": ["a", "b"]}, ["id2label", "['a', 'b']", "object"]),
    "id2label by names": ({"id2label": {"a": "0"}}, ["id2label", "'a'", "whole numbers"]),
    "pad a string": ({"pad_token_id": "[PAD]"}, ["pad_token_id", "'[PAD]'", "whole number"]),
    "pad a list": ({"pad_token_id": [0]}, ["pad_token_id", "[0]", "whole number"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case):
    changes, said = REFUSED[case]
    with pytest.raises(CheckpointError) as error:
        read(v4(**changes))
    for part in said:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


def test_rope_types_are_checked_in_layers_of_both_kinds():
    for kind in (FULL, SLIDING):
        parameters = {FULL: rope(9.0), SLIDING: rope(9.0)}
        parameters[kind]["rope_type"] = "ntk"
        with pytest.raises(CheckpointError, match=f"'ntk' of {kind}"):
            read(v5(rope_parameters=parameters))


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_sizes_at_their_limits_are_read(size):
    assert read(v4(num_hidden_layers=size)).num_hidden_layers == size
    assert len(read(v4(num_hidden_layers=size)).layer_types) == size


def test_read_config_names_the_file_in_its_errors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(v4(hidden_activation="swish7")))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "config.json")) + ".*swish7"):
        read_config(tmp_path)


def test_read_config_takes_strings_paths_and_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(v5()).encode())
    assert read_config(str(tmp_path)) == read_config(tmp_path) == read(v5())


def test_a_config_that_transformers_saved_is_read_back(tmp_path):
    import transformers

    saved = transformers.ModernBertConfig(
        num_hidden_layers=5,
        hidden_size=96,
        num_attention_heads=3,
        global_attn_every_n_layers=2,
        local_attention=66,
        num_labels=3,
    )
    saved.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.layer_types == (FULL, SLIDING, FULL, SLIDING, FULL)
    assert config.window_size(1) == (33, 33)
    assert len(config.labels) == 3
    assert (config.full_rope, config.sliding_rope) == (Rope(160000.0), Rope(10000.0))
