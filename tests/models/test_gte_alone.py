"""What transformers' GTE lacks, beside the network written out as one plain function."""

from __future__ import annotations

import pytest
import torch
from gte_cases import (  # noqa: F401
    as_new,
    assert_equal,
    config_of,
    difference,
    expected_of,
    make,
    ntk,
    plain,
    sequences,
    state_of,
    types_of,
    vary,
    write,
)

import modernbert_lite as ml
from modernbert_lite.ops.linear import narrower


def plainly(folder, rows, types=None):
    weights = {name: tensor.double() for name, tensor in state_of(folder).items()}
    kinds = types or [None] * len(rows)
    return torch.cat([plain(config_of(folder), weights, *pair) for pair in zip(rows, kinds, strict=True)])


@pytest.mark.parametrize("types", [0, 1, 2])
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_plain_function_equals_transformers(make, types, act):
    """So that what it says of the other variants means something."""
    folder, reference = make(type_vocab_size=types, hidden_act=act, rope_parameters=ntk(20_000.0, 8.0, 32))
    as_new(folder, 20000, {"type": "ntk", "factor": 8.0})
    rows = sequences()
    kinds = types_of(rows) if types == 2 else None
    assert_equal(expected_of(reference, rows, kinds), plainly(folder, rows, kinds))


LACKING = {
    "clip1 without logn": ("plain", {"logn_attention_clip1": True}),
    "rms_norm": ("rms_norm", {}),
    "rms_norm, large eps": ("rms_norm", {"layer_norm_eps": 0.05}),
    "absolute": ("absolute", {}),
}


@pytest.mark.parametrize("backend", ["torch", "onednn"])
@pytest.mark.parametrize("case", LACKING)
def test_what_transformers_lacks_equals_the_plain_function(make, monkeypatch, case, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    variant, keys = LACKING[case]
    folder, _ = make(type_vocab_size=2)
    rows = sequences()
    types = types_of(rows)
    before = plainly(as_new(folder, 20000), rows, types)
    vary(folder, variant, **keys)
    expected = plainly(folder, rows, types)
    assert_equal(ml.load_model(folder)(ml.pack(rows, token_type_ids=types)), expected)
    if case != "clip1 without logn":
        assert difference(expected, before) > 1e-3  # it does something


@pytest.mark.parametrize("variant", ["rms_norm", "absolute"])
def test_what_transformers_lacks_runs_on_triton(make, monkeypatch, variant):
    pytest.importorskip("triton")
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    folder, _ = make(num_hidden_layers=2)
    vary(folder, variant)
    rows = sequences([5, 66, 1])
    assert_equal(ml.load_model(folder)(ml.pack(rows)), plainly(folder, rows))


@pytest.mark.parametrize("variant", ["rms_norm", "absolute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
def test_what_transformers_lacks_in_half_precision(make, variant, dtype, packed):
    folder, _ = make()
    vary(folder, variant)
    batch = ml.pack(sequences())
    got, exact = ml.load_model(folder, dtype=dtype, packed=packed)(batch), ml.load_model(folder)(batch)
    assert got.dtype == (torch.float32 if packed and narrower(got.device, dtype) else dtype)  # see test_half.py
    assert torch.cosine_similarity(got.double(), exact.double()).min() >= 0.999


def test_absolute_positions_start_anew_in_each_sequence_and_nothing_is_turned(make):
    folder, _ = make()
    model = ml.load_model(vary(folder, "absolute"))
    row = sequences([31])[0]
    once, twice = model(ml.pack([row])), model(ml.pack([row, row]))
    assert difference(twice[:31], once) <= 1e-5
    assert difference(twice[31:], once) <= 1e-5
    raw = config_of(folder)
    write(folder, {**raw, "rope_theta": 10.0, "rope_scaling": {"type": "ntk", "factor": 50.0}}, state_of(folder))
    assert torch.equal(ml.load_model(folder)(ml.pack([row])), once)


# --- bad input
