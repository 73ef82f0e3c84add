"""Random config.json, with every key that transformers' classes and Alibaba's NewConfig have, at normal and at odd
values: the numbers are transformers', or the file is refused by an error that a user of this package expects.

MODERNBERT_LITE_FUZZ=2000 draws as many, new ones each time; without it the same few are drawn each time.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import modernbert_lite as ml
from modernbert_lite.models.modernbert import FULL, SLIDING

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DRAWS = int(os.environ.get("MODERNBERT_LITE_FUZZ") or 70)
EXPECTED = (ml.CheckpointError, ml.OptionError, ValueError, TypeError)
LENGTHS = (1, 11, 24, 6)  # beyond windows, original lengths and max_position_embeddings of 8 and 16

pick = st.sampled_from
_ODD = [None, -1, 0, 1, 2, 7, 0.0, 0.5, 1.5, -0.5, 1.0, True, False, "", "x", "8", "true", [], [1], {}, {"a": 1}]
ODD = pick([*_ODD, float("nan"), float("inf"), -float("inf"), 1e-40, 1e-20, 1e20, 1e40, 10**400])


def mostly(*normal: Any) -> st.SearchStrategy[Any]:
    """One of the normal values, or, a fifth of the time, an odd one."""
    return st.integers(0, 4).flatmap(lambda i: pick(normal) if i else ODD)


factors = st.lists(pick([0.5, 1.0, 2.0, 3.5]), min_size=8, max_size=8)
ROPE: dict[str, st.SearchStrategy[Any]] = {
    "rope_theta": mostly(1.5, 100, 10_000.0, 160_000.0, 1e6),
    "factor": mostly(0.5, 1, 2.0, 4.0, 8),
    "original_max_position_embeddings": mostly(1, 4, 8, 16, 64),
    "attention_factor": mostly(0.0, -0.5, 1, 0.7, 1.3),
    "beta_fast": mostly(0, 0.5, 2, 32.0),
    "beta_slow": mostly(0, 0.5, 1, 2.0),
    "mscale": mostly(0, 0.7, 1.0, -3.0),
    "mscale_all_dim": mostly(0, 0.5, 1, 2.0),
    "truncate": mostly(True, False),
    "low_freq_factor": mostly(0.5, 1, 1.0),
    "high_freq_factor": mostly(1, 4.0, 0.25),
    "short_factor": st.one_of(factors, factors, ODD),
    "long_factor": st.one_of(factors, factors, ODD),
    "partial_rotary_factor": mostly(1.0, 0.5, 0.25, 1),
    "mrope_section": mostly([4, 4]),
}
NEEDED = {
    "linear": ["factor"],
    "dynamic": ["factor"],
    "yarn": ["factor"],
    "longrope": ["short_factor", "long_factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
    "proportional": ["partial_rotary_factor"],
}
TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """What a type needs, mostly, and some more."""
    kind = draw(pick(TYPES * 4 + ["ntk", "axial", None, 5]))
    keys = {*draw(st.lists(pick(sorted(ROPE)), max_size=4))}
    if draw(st.integers(0, 9)):
        keys |= {"rope_theta", *NEEDED.get(kind, ())}
    values = {key: draw(ROPE[key]) for key in sorted(keys)}
    named = draw(pick([("rope_type",)] * 6 + [("type",), ("type", "rope_type"), ()]))
    return {**values, **dict.fromkeys(named, kind)}


kinds = st.one_of(
    st.fixed_dictionaries({FULL: ropes(), SLIDING: ropes()}),
    st.fixed_dictionaries({FULL: ropes(), SLIDING: st.just({"rope_type": "default", "rope_theta": 50.0})}),
    st.fixed_dictionaries({SLIDING: ropes()}),
    ropes(),
    ODD,
)
ACTIVATIONS = mostly("gelu", "silu", "relu2", "gelu_new", "quick_gelu", "mish", "laplace", "prelu", "swish7")
LABELS = mostly({"0": "a", "1": "b"}, {"0": "a", "2": "b"}, {"1": "x"}, {"one": 1}, {"0": 5, "1": None})

# Of transformers' PreTrainedConfig, and of older ones.
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "architectures": mostly([], [None], ["Unknown"], ["ModernBertModel"], ["GteModel"]),
    "add_cross_attention": ODD,
    "attention_chunk_size": mostly(4),
    "bos_token_id": mostly(3),
    "chunk_size_feed_forward": mostly(0, 4),
    "cls_token_id": mostly(3),
    "dtype": mostly("float32", "bfloat16"),
    "eos_token_id": mostly(3),
    "head_dim": mostly(16, 8, 20, 15),
    "id2label": LABELS,
    "initializer_range": ODD,
    "is_causal": ODD,
    "is_decoder": ODD,
    "is_encoder_decoder": ODD,
    "label2id": mostly({"a": 0}),
    "max_position_embeddings": mostly(8, 16, 64),
    "name_or_path": ODD,
    "num_key_value_heads": mostly(1),
    "num_labels": pick([None, -1, 0, 1, 2, 3, "2", 2.0, True]),
    "original_max_position_embeddings": mostly(4, 8),
    "output_attentions": ODD,
    "output_hidden_states": ODD,
    "pad_token_id": mostly(-1, 0, 5, 60, 61),
    "partial_rotary_factor": mostly(1.0, 0.5),
    "per_layer_config": mostly({}, {"1": {"norm_eps": 0.1}}),
    "problem_type": mostly("regression", "single_label_classification"),
    "pruned_heads": mostly({"0": [1]}),
    "quantization_config": mostly({"quant_method": "fp8"}),
    "rope_theta": mostly(50.0),
    "sep_token_id": mostly(3),
    "tie_word_embeddings": mostly(True, False),
    "torch_dtype": mostly("float16"),
    "transformers_version": mostly("4.48.0"),
    "type_vocab_size": pick([0, 1, 2, None, -1, "1"]),
    "use_bidirectional_attention": ODD,
    "use_cache": ODD,
    "vocab_size": pick([61, 62, None, "61", 61.0]),
}
MODERNBERT: dict[str, st.SearchStrategy[Any]] = {
    **COMMON,
    "attention_bias": mostly(False),
    "attention_dropout": mostly(0.1),
    "classifier_activation": ACTIVATIONS,
    "classifier_bias": mostly(False),
    "classifier_dropout": mostly(0.1),
    "classifier_pooling": mostly("cls", "mean", "max"),
    "decoder_bias": mostly(True),
    "deterministic_flash_attn": ODD,
    "embedding_dropout": mostly(0.1),
    "global_attn_every_n_layers": mostly(1, 2, 3),
    "global_rope_theta": mostly(50.0),
    "hidden_activation": ACTIVATIONS,
    "hidden_size": pick([32, 64, None, "32", 32.0]),
    "initializer_cutoff_factor": ODD,
    "intermediate_size": pick([20, 10, None, "20", 20.0]),
    "layer_types": mostly(
        [FULL] * 3, [SLIDING, FULL, SLIDING], [FULL] * 2, ["attention", SLIDING, SLIDING], ["conv"] * 3
    ),
    "local_attention": mostly(0, 1, 2, 5, 12),
    "local_rope_theta": mostly(50.0),
    "mlp_bias": mostly(False),
    "mlp_dropout": mostly(0.1),
    "norm_bias": mostly(False),
    "norm_eps": mostly(1e-5, 1e-3, 1e-12),
    "num_attention_heads": pick([2, 4, 1, 3, None, "2"]),
    "num_hidden_layers": pick([3, 2, None, "3", 0]),
    "reference_compile": ODD,
    "repad_logits_with_grad": ODD,
    "rope_parameters": kinds,
    "rope_scaling": st.one_of(ropes(), ropes(), ODD),
    "sliding_window": mostly(0, 1, 4, 7),
    "sparse_pred_ignore_index": ODD,
    "sparse_prediction": ODD,
}
GTE: dict[str, st.SearchStrategy[Any]] = {
    **COMMON,
    "attention_probs_dropout_prob": mostly(0.1),
    "classifier_dropout": mostly(0.1),
    "hidden_act": ACTIVATIONS,
    "hidden_dropout_prob": mostly(0.1),
    "hidden_size": pick([32, 64, None, "32", 32.0]),
    "intermediate_size": pick([20, 10, None, "20", 20.0]),
    "layer_norm_eps": mostly(1e-5, 1e-3, 1e-12),
    "num_attention_heads": pick([2, 4, 1, 3, None, "2"]),
    "num_hidden_layers": pick([2, 1, None, "2", 0]),
    "rope_parameters": st.one_of(ropes(), ropes(), ODD, st.just(...)),
    "rope_scaling": st.one_of(ropes(), ODD),
}
NEW = {
    **GTE,
    "layer_norm_type": mostly("layer_norm", "rms_norm"),
    "logn_attention_clip1": mostly(True, False, "true"),
    "logn_attention_scale": mostly(True, False, "false"),
    "pack_qkv": mostly(True, "true"),
    "position_embedding_type": mostly("rope", "absolute"),
    "rope_scaling": mostly(None, {"type": "ntk", "factor": 2.0}, {"type": "ntk", "factor": 8, "mixed_b": 0.5}),
    "unpad_inputs": mostly(True, "true"),
    "use_memory_efficient_attention": mostly(True, "true"),
}
ENDS = ["Model", "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
# What a network is built with, and shows in the shapes of its weights: normal values.
BUILT = {
    "ModernBert": st.fixed_dictionaries(
        {"num_labels": pick([1, 2, 3])},
        optional={
            "attention_bias": st.booleans(),
            "mlp_bias": st.booleans(),
            "norm_bias": st.booleans(),
            "classifier_bias": st.booleans(),
            "decoder_bias": st.booleans(),
            "tie_word_embeddings": st.booleans(),
            "classifier_pooling": pick(["cls", "mean"]),
            "num_attention_heads": pick([1, 2, 4, 8, 16]),
        },
    ),
    "Gte": st.fixed_dictionaries(
        {"num_labels": pick([1, 2, 3])},
        optional={
            "type_vocab_size": pick([0, 1, 2]),
            "tie_word_embeddings": st.booleans(),
            "num_attention_heads": pick([1, 2, 4]),
            "head_dim": pick([2, 8, 16, 20]),
        },
    ),
}


@st.composite
def edits(draw: st.DrawFn, keys: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    chosen = draw(st.lists(pick(sorted(keys)), max_size=4, unique=True))
    if draw(st.booleans()):  # RoPE has the most to say
        chosen = [draw(pick(["rope_parameters", "rope_scaling"])), *chosen[:2]]
    return {key: draw(keys[key]) for key in dict.fromkeys(chosen)}


@pytest.fixture(scope="module")
def seen():
    """How often what happened; shown with -s."""
    counts: Counter[str] = Counter()
    yield counts
    print(dict(counts))


def outcome(cases: Any, folder: Path) -> list[torch.Tensor] | str:
    """This package's numbers, or the message with which it refuses; "warned" where it says that it differs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ml.read_config(folder)
            numbers = cases.actual(folder, cases.sequences(LENGTHS))
        except EXPECTED as error:
            return f"refused: {error}"
    return "warned" if any("by its old key" in str(w.message) for w in said) else numbers


fuzz = settings(
    max_examples=DRAWS,
    deadline=None,
    database=None,
    derandomize="MODERNBERT_LITE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["ModernBert", "Gte"])
@fuzz
@given(data=st.data())
def test_a_random_config_has_transformers_numbers_or_is_refused(tmp_path_factory, cases, seen, family, data):
    transformers.logging.set_verbosity_error()
    architecture = family + data.draw(pick(ENDS), "end")
    built = data.draw(BUILT[family], "built")
    changes = data.draw(edits(MODERNBERT if family == "ModernBert" else GTE), "config.json")
    folder = tmp_path_factory.mktemp("drawn", numbered=True)
    try:
        model = cases.save(folder, architecture, **built)
        cases.edit(folder, **changes)
        ours = outcome(cases, folder)
        theirs = None
        with suppress(Exception):  # whatever it raises: there is nothing to compare with
            config = type(model.config).from_pretrained(folder)
            kind = architecture if "architectures" not in changes else f"{family}Model"  # what isn't named is opened
            reference = getattr(transformers, kind)(config)
            state = model.state_dict()
            prefix = model.base_model_prefix + "."
            if kind != architecture:
                state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                state = {key: value for key, value in state.items() if not key.startswith("pooler")}
            reference.load_state_dict(state)
            theirs = cases.outputs(reference.eval(), cases.sequences(LENGTHS))
    finally:
        shutil.rmtree(folder)
    computes = theirs is not None and all(bool(x.isfinite().all()) for x in theirs)
    if isinstance(ours, str):
        seen["refused, and transformers computes" if computes else ours.partition(":")[0]] += 1
        assert changes or not ours.startswith("refused"), ours
        assert ours.isprintable()
        assert len(ours) < 3000
    elif computes:
        seen["equal"] += 1
        assert cases.difference(ours, theirs) <= 2e-5
    else:
        seen["computed, and transformers doesn't"] += 1


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(end=pick(ENDS), changes=edits(NEW))
def test_a_random_config_of_alibaba_s_is_computed_or_refused(tmp_path_factory, cases, seen, end, changes):
    """Without a reference for the numbers, which test_gte.py has."""
    folder = tmp_path_factory.mktemp("drawn", numbered=True)
    try:
        cases.save(folder, f"Gte{end}")
        cases.edit(folder, model_type="new", rope_parameters=..., rope_theta=10_000.0)
        cases.edit(folder, architectures=[f"New{end}"])
        cases.edit(folder, **changes)
        ours = outcome(cases, folder)
    finally:
        shutil.rmtree(folder)
    seen["refused (new)" if isinstance(ours, str) else "computed (new)"] += 1
    assert isinstance(ours, str) or all(bool(x.isfinite().all()) for x in ours)
    assert changes or not isinstance(ours, str), ours
