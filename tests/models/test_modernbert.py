"""Hidden states against transformers, packing, and the facts of RoPE and the local window."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from model_cases import RAGGED, VOCAB, YARN, difference, make, sequences, token_ids  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.weights import load_weights
from modernbert_lite.models.modernbert import FULL, SLIDING, ModernBert, ModernBertConfig
from modernbert_lite.ops.linear import narrower

LENGTHS = [1, 2, 63, 64, 65, 66, 127, 128, 129, 130, 257, 1025]


def thetas(full, sliding):
    return {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": float(full)},
            SLIDING: {"rope_type": "default", "rope_theta": float(sliding)},
        }
    }


VARIATIONS = {
    "heads of 64": {"hidden_size": 192, "num_attention_heads": 3},
    "heads of 128": {"hidden_size": 256, "num_attention_heads": 2},
    "28 heads of 64": {
        "hidden_size": 1792,
        "num_attention_heads": 28,
        "intermediate_size": 64,
        "initializer_range": 0.02,
    },
    "heads of 26": {"hidden_size": 78, "num_attention_heads": 3},
    "one layer": {"num_hidden_layers": 1},
    "silu": {"hidden_activation": "silu"},
    "tanh gelu": {"hidden_activation": "gelu_pytorch_tanh"},
    "silu, mlp bias": {"hidden_activation": "silu", "mlp_bias": True},
    "ettin thetas": thetas(160000, 160000),
    "granite thetas": thetas(80000, 10000),
    "granite multilingual thetas": thetas(150000, 160000),
    "finnish theta": thetas(1000000, 10000),
    "norm bias": {"norm_bias": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "every bias": {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
    "large norm eps": {"norm_eps": 0.05},
    "tiny norm eps": {"norm_eps": 1e-12},
    "window 2": {"local_attention": 2},
    "window 32": {"local_attention": 32},
    "window 127": {"local_attention": 127},  # odd: 63 on each side
    "window 256": {"local_attention": 256},
    "window of everything": {"local_attention": 8192},
    "all global": {"global_attn_every_n_layers": 1},
    "every second global": {"global_attn_every_n_layers": 2},
    "every fourth global": {"global_attn_every_n_layers": 4},
    "layer_types": {"layer_types": [SLIDING, SLIDING, FULL, FULL, SLIDING]},
    "only sliding": {"layer_types": [SLIDING] * 5},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 32768},
    # A short original length puts the ramp, and what it turns slower, in the middle of the frequencies.
    "yarn, short": {"rope_scaling": {**YARN, "factor": 8.0, "original_max_position_embeddings": 64}},
    "yarn, own attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.75}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
}


def padded(rows, side):
    """(B, S) ids, 0 where padded, and their mask."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def hidden(reference, ids, mask=None):
    with torch.inference_mode():
        return reference(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_hidden_states_equal_transformers(make, attn):
    folder, reference = make(attn=attn)
    model = ml.load_model(folder)
    for length in LENGTHS:
        ids = token_ids(length)
        expected = hidden(reference, ids[None])[0]
        assert 1 < expected.abs().max() < 10  # so that the bound means something
        assert difference(model(ml.pack([ids])), expected) <= 2e-5, length


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_hidden_states_equal_transformers_on_every_cpu_backend(make, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    for name, biases in (("without", {}), ("with", {"norm_bias": True, "attention_bias": True, "mlp_bias": True})):
        folder, reference = make(name=name, **biases)
        model = ml.load_model(folder)
        for length in (1, 2, 64, 65, 66, 130, 257):
            ids = token_ids(length)
            assert difference(model(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5
        ids, mask = padded(sequences(), "right")
        expected = hidden(reference, ids, mask)[mask.bool()]
        assert difference(model(ml.from_padded(ids, mask)), expected) <= 2e-5


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_batches_equal_transformers_padded_ones(make, side, attn):
    folder, reference = make(attn=attn)
    rows = sequences()
    ids, mask = padded(rows, side)
    batch = ml.from_padded(ids, mask)
    assert batch.seqlens == tuple(RAGGED)
    got = ml.load_model(folder)(batch)

    expected = hidden(reference, ids, mask)
    assert difference(got, expected[mask.bool()]) <= 2e-5

    back = ml.to_padded(got, mask, value=7.0)
    assert difference(back[mask.bool()], expected[mask.bool()]) <= 2e-5
    assert (back[~mask.bool()] == 7.0).all()


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_config_variation_equals_transformers(make, variation):
    folder, reference = make(**VARIATIONS[variation])
    model = ml.load_model(folder)
    ids, mask = padded(sequences([1, 66, 130, 2, 257]), "right")
    for attn in ("eager", "sdpa"):
        reference.set_attn_implementation(attn)
        expected = hidden(reference, ids, mask)[mask.bool()]
        assert difference(model(ml.from_padded(ids, mask)), expected) <= 2e-5


# Sizes can't be ignored, and an epsilon of 1e-12 for 1e-5 is below rounding.
IGNORABLE = [name for name in VARIATIONS if not name.startswith(("heads", "28 heads", "one layer", "tiny norm eps"))]


@pytest.mark.parametrize("variation", IGNORABLE)
def test_a_config_variation_that_is_ignored_would_show(make, variation):
    """So that the test above means something: the same weights, read with ModernBERT-base's settings, differ."""
    folder, reference = make(**VARIATIONS[variation])
    plain = ["hidden_activation", "norm_eps", "local_attention", "layer_types", "rope_parameters"]
    plain += ["global_attn_every_n_layers", "norm_bias", "attention_bias", "mlp_bias"]
    raw = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in plain}
    model = ModernBert(ModernBertConfig.from_dict(raw)).eval()
    model.load_state_dict(reference.state_dict(), strict=False)
    ids = token_ids(257)
    with torch.inference_mode():
        assert difference(model(ml.pack([ids])), hidden(reference, ids[None])[0]) > 2e-4


def old_form(folder, **keys):
    """Rewrites config.json as transformers 4.48 wrote it."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key in ("layer_types", "rope_parameters", "dtype"):
        raw.pop(key, None)
    path.write_text(json.dumps({**raw, "torch_dtype": "float32", **keys}))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_old_config_keys_equal_transformers(make, every):
    folder, reference = make(global_attn_every_n_layers=every, **thetas(80000, 20000))
    old_form(folder, global_attn_every_n_layers=every, global_rope_theta=80000.0, local_rope_theta=20000.0)
    ids = token_ids(257)
    expected = hidden(reference, ids[None])[0]
    assert difference(ml.load_model(folder)(ml.pack([ids])), expected) <= 2e-5
    # ... and what transformers itself makes of the file that we wrote.
    again = transformers.ModernBertModel.from_pretrained(folder)
    assert difference(hidden(again, ids[None])[0], expected) <= 1e-6


def test_old_rope_scaling_applies_to_both_kinds_of_layers(make):
    folder, reference = make(rope_scaling=YARN, **thetas(160000, 160000))
    old_form(folder, global_rope_theta=160000.0, local_rope_theta=160000.0, rope_scaling=YARN)
    ids = token_ids(257)
    assert difference(ml.load_model(folder)(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5


def test_local_theta_null_means_the_global_one_and_absent_means_10000(make):
    ids = token_ids(257)
    folder, reference = make(name="null", **thetas(80000, 80000))
    old_form(folder, global_rope_theta=80000.0, local_rope_theta=None)
    assert difference(ml.load_model(folder)(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5

    folder, reference = make(name="absent", **thetas(80000, 10000))
    old_form(folder, global_rope_theta=80000.0)
    assert difference(ml.load_model(folder)(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5


def test_a_head_dim_key_is_ignored_as_transformers_4_does(make):
    folder, reference = make()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 64}))
    ids = token_ids(130)
    assert difference(ml.load_model(folder)(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5


def test_real_size_layers_equal_transformers(make):
    """ModernBERT-base's 22 layers of 768 x 12 heads x 1152, with only the vocabulary smaller."""
    base = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12}
    folder, reference = make(**base, initializer_range=0.02, initializer_cutoff_factor=2.0)
    model = ml.load_model(folder)
    for length in (1, 66, 257):
        ids = token_ids(length)
        expected = hidden(reference, ids[None])[0]
        assert expected.abs().max() > 1
        assert difference(model(ml.pack([ids])), expected) <= 2e-5
    ids, mask = padded(sequences([65, 3, 130, 1]), "left")
    expected = hidden(reference, ids, mask)[mask.bool()]
    assert difference(model(ml.from_padded(ids, mask)), expected) <= 2e-5


# --- bf16 and fp16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("packed", [True, False])
def test_half_precision_is_as_near_to_fp32_as_transformers(make, dtype, activation, packed):
    folder, reference = make(hidden_activation=activation)
    rows = sequences([66, 130, 1, 257, 64])
    ids, mask = padded(rows, "right")
    exact = hidden(reference, ids, mask)[mask.bool()]
    theirs = hidden(reference.to(dtype), ids, mask)[mask.bool()].float()

    model = ml.load_model(folder, dtype=dtype, packed=packed)
    batch = ml.pack(rows)
    got = model(batch)
    assert got.dtype == (torch.float32 if packed and narrower(got.device, dtype) else dtype)  # see test_half.py
    assert difference(got, exact) <= 2 * difference(theirs, exact) + 1e-6
    for ours, right in zip(ml.unpack(got.float(), batch.cu_seqlens), exact.split(batch.seqlens), strict=True):
        assert torch.cosine_similarity(ours.mean(0), right.mean(0), dim=0) >= 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_packed_and_one_by_one_are_equally_exact(make, dtype):
    folder, reference = make()
    rows = sequences([66, 130, 66, 2])
    model = ml.load_model(folder, dtype=dtype)
    exact = torch.cat([hidden(reference, row[None])[0] for row in rows])
    theirs = torch.cat([hidden(reference.to(dtype), row[None])[0] for row in rows]).float()
    alone = torch.cat([model(ml.pack([row])) for row in rows])
    bound = 2 * difference(theirs, exact) + 1e-6
    assert difference(alone, exact) <= bound
    assert difference(model(ml.pack(rows)), exact) <= bound


# --- packing


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_packed_equals_one_by_one(make, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make()
    model = ml.load_model(folder)
    rows = sequences()
    batch = ml.pack(rows)
    for row, got in zip(rows, ml.unpack(model(batch), batch.cu_seqlens), strict=True):
        assert difference(got, model(ml.pack([row]))) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_a_sequence_does_not_see_its_neighbours(make, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make()
    model = ml.load_model(folder)
    rows = sequences([66, 130, 66, 66, 5])
    before = model(ml.pack(rows)).split([66, 130, 66, 66, 5])
    for changed in range(len(rows)):
        others = [token_ids(len(row), 77 + i) if i == changed else row for i, row in enumerate(rows)]
        after = model(ml.pack(others)).split([66, 130, 66, 66, 5])
        for i in range(len(rows)):
            if i == changed:
                assert difference(before[i], after[i]) > 0.1
            else:
                assert difference(before[i], after[i]) <= 1e-5


def test_permuted_sequences_permute_the_outputs(make):
    folder, _ = make()
    model = ml.load_model(folder)
    rows = sequences()
    batch = ml.pack(rows)
    outputs = ml.unpack(model(batch), batch.cu_seqlens)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = ml.pack([rows[i] for i in order])
    for i, got in zip(order, ml.unpack(model(shuffled), shuffled.cu_seqlens), strict=True):
        assert difference(got, outputs[i]) <= 1e-5


def test_many_short_sequences_and_empty_ones(make):
    folder, reference = make()
    model = ml.load_model(folder)
    rows = sequences([1] * 40 + [0, 3, 0, 0] + [2] * 30 + [0])
    batch = ml.pack(rows)
    got = ml.unpack(model(batch), batch.cu_seqlens)
    for row, one in zip(rows, got, strict=True):
        expected = hidden(reference, row[None])[0] if len(row) else torch.empty(0, 96)
        assert one.shape == expected.shape
        if len(row):
            assert difference(one, expected) <= 2e-5
    assert model(ml.pack([])).shape == (0, 96)
    assert model(ml.pack([[], []])).shape == (0, 96)


def test_padding_token_and_vocabulary_edges_are_plain_tokens(make):
    """Packed, nothing is padding: an id equal to pad_token_id is a token like any other, the last id too."""
    folder, reference = make()
    ids = torch.tensor([1, 0, VOCAB - 1, 0, 2])
    assert difference(ml.load_model(folder)(ml.pack([ids])), hidden(reference, ids[None])[0]) <= 2e-5


def test_the_weights_may_be_changed_after_a_forward_pass(make):
    folder, _ = make()
    model = ml.load_model(folder, packed=False)
    batch = ml.pack(sequences([66, 3]))
    before = model(batch)
    model.layers[1].mlp.Wi.weight.mul_(1.5)
    fresh = load_weights(
        ModernBert,
        ml.read_config(folder),
        Folder(folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        packed=False,
    )
    fresh.layers[1].mlp.Wi.weight.data.mul_(1.5)
    assert difference(model(batch), before) > 1e-3
    assert difference(model(batch), fresh(batch)) <= 1e-6


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_gradients_equal_transformers(make, monkeypatch, backend):
    """Loaded weights are frozen; unfrozen, every one of them gets transformers' gradient."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, reference = make()
    model = ml.load_model(folder, packed=False).requires_grad_(True)
    rows = sequences([130, 3])
    ids, mask = padded(rows, "right")
    weights = torch.linspace(-1, 1, 133 * 96).view(133, 96)
    (model(ml.pack(rows)) * weights).sum().backward()
    (reference(ids, mask).last_hidden_state[mask.bool()] * weights).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        right = expected[name].grad
        # Sums over all tokens, so larger than hidden states: relative to the largest.
        assert difference(parameter.grad, right) <= 2e-5 * max(1.0, right.abs().max().item()), name


# --- the window
