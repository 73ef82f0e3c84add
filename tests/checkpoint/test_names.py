"""What tensors are called in files that people have: derived buffers, prefixes of classes around the network."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError

FEW = {"vocab_size": 331, "pad_token_id": 3, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 1}
GTE = {**FEW, "intermediate_size": 48, "layer_norm_eps": 1e-5, "max_position_embeddings": 64, "initializer_range": 0.1}
ARCHITECTURES = ["ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"]
DERIVED = {
    "layers.0.attn.rotary_emb.inv_freq": torch.ones(16),
    "layers.1.attn.rotary_emb.cos_cached": torch.ones(64, 16),
    "layers.1.attn.rotary_emb.sin_cached": torch.ones(64, 16),
    "rotary_emb.full_attention_inv_freq": torch.ones(16),
    "rotary_emb.sliding_attention_original_inv_freq": torch.ones(16),
    "rotary_emb.original_inv_freq": torch.ones(16),
    "embeddings.rotary_emb.inv_freq": torch.ones(16),
    "embeddings.position_ids": torch.arange(64)[None],
    "embeddings.token_type_ids": torch.zeros(1, 64, dtype=torch.int64),
}
BATCH = ml.pack([[5, 6, 7, 8, 9, 10], [11, 12]])


@pytest.fixture
def make_gte(tmp_path):
    def make(architecture="GteModel"):
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(transformers.GteConfig(**GTE)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                parameter.data.add_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(tmp_path / "gte")
        return tmp_path / "gte", model

    return make


def rewrite(folder, rename=lambda name: name, more=None):
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **(more or {})}, folder / "model.safetensors", {"format": "pt"})


def assert_same(model, expected):
    got = model.state_dict()
    assert sorted(got) == sorted(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def reference(folder, kind):
    """transformers' hidden states of BATCH's texts, one after the other."""
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(input_ids=ids[None])[0][0] for ids in BATCH.input_ids.split(BATCH.seqlens)]
    return torch.cat(rows)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_buffer_decides_nothing_whatever_it_says(make_checkpoint, name, prefix):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, lambda key: prefix + key, {prefix + name: DERIVED[name]})
    assert torch.allclose(ml.load_model(folder)(BATCH), reference(folder, "ModernBertModel"), atol=2e-5)


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_buffer_of_gte_decides_nothing(make_gte, name):
    folder, _ = make_gte()
    rewrite(folder, more={name: DERIVED[name]})
    assert torch.allclose(ml.load_model(folder)(BATCH), reference(folder, "GteModel"), atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_s_file_may_have_derived_buffers_and_a_pooler(make_checkpoint, architecture):
    folder, _ = make_checkpoint(architecture, **FEW)
    expected = ml.load_model(folder).state_dict()
    derived = {f"model.{name}": tensor for name, tensor in DERIVED.items()}
    rewrite(folder, more={**derived, "pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)})
    assert_same(ml.load_model(folder), expected)


@pytest.mark.parametrize(
    "name",
    [
        "pooler.dense.weight",
        "head.dense.weight",
        "decoder.bias",
        "classifier.weight",
        "lm_head.weight",
        "cls.predictions.bias",
        "qa_outputs.weight",
        "score.weight",
        "loss_fct.weight",
    ],
)
def test_an_encoder_leaves_out_what_stands_on_it(make_checkpoint, name):
    folder, _ = make_checkpoint(**FEW)
    expected = ml.load_model(folder).state_dict()
    rewrite(folder, more={name: torch.ones(2, 32)})
    assert_same(ml.load_model(folder), expected)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.rotary_emb.freq",
        "projection.weight",
        "log_vars",
        "embeddings.token_type_embeddings.weight",
        "headless.weight",
        "layers.0.attn.inv_freq_scale",
        "embeddings.position_embeddings.weight",
        "inv_frequency",
    ],
)
def test_what_is_not_known_is_refused_by_name(make_checkpoint, name):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, more={name: torch.ones(2, 32)})
    with pytest.raises(CheckpointError, match=f"unexpected {re.escape(name)}"):
        ml.load_model(folder)


def test_gamma_and_beta_are_a_norm_s_weight_and_bias(make_gte, make_checkpoint):
    folder, _ = make_gte()
    expected = reference(folder, "GteModel")
    rewrite(
        folder, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    )
    assert "embeddings.LayerNorm.beta" in load_file(folder / "model.safetensors")
    assert torch.allclose(reference(folder, "GteModel"), expected)  # transformers renames them, too
    assert torch.allclose(ml.load_model(folder)(BATCH), expected, atol=2e-5)

    folder, _ = make_checkpoint("ModernBertForMaskedLM", norm_bias=True, **FEW)
    state = ml.load_model(folder).state_dict()
    rewrite(folder, lambda n: re.sub(r"norm\.bias$", "norm.beta", re.sub(r"norm\.weight$", "norm.gamma", n)))
    assert_same(ml.load_model(folder), state)


def test_a_norm_under_both_names_is_refused(make_checkpoint):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, more={"final_norm.gamma": torch.ones(32)})
    with pytest.raises(
        CheckpointError, match=r"final_norm\.(gamma|weight) and final_norm\.(gamma|weight) are the same"
    ):
        ml.load_model(folder)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "0.auto_model.",
    "0.model.",
    "encoder.",
    "bert.",
    "model.model.",
]
PREFIXES += ["transformer.", "base_model.model.", "_fsdp_wrapped_module.", "auto_model.", "model.encoder.", "a.b.c.d."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_before_all_names_is_taken_off(make_checkpoint, architecture, prefix):
    folder, _ = make_checkpoint(architecture, **FEW)
    expected = ml.load_model(folder).state_dict()
    rewrite(folder, lambda name: prefix + name, {f"{prefix}rotary_emb.inv_freq": torch.ones(16)})
    assert_same(ml.load_model(folder), expected)


@pytest.mark.parametrize("prefix", [*PREFIXES[:6], "module.new.", "_orig_mod.gte.", "0.auto_model.new."])
@pytest.mark.parametrize("architecture", ["GteModel", "GteForMaskedLM", "GteForTokenClassification"])
def test_a_prefix_before_all_names_of_gte_is_taken_off(make_gte, architecture, prefix):
    if prefix.endswith(("new.", "gte.")) and architecture != "GteModel":
        pytest.skip("these are of the encoder only")
    folder, _ = make_gte(architecture)
    expected = ml.load_model(folder).state_dict()
    rewrite(folder, lambda name: prefix + name)
    assert_same(ml.load_model(folder), expected)


def test_an_encoder_under_a_prefix_and_its_head_beside_it(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", **FEW)
    expected = ml.load_model(folder).state_dict()
    rewrite(folder, lambda name: name.replace("model.", "bert.", 1))
    assert_same(ml.load_model(folder), expected)


@pytest.mark.parametrize("spoil", ["missing", "misshapen", "extra"])
def test_a_prefix_excuses_nothing_else(make_checkpoint, spoil):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, lambda name: "module." + name)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    name = "module.layers.1.mlp.Wi.weight"
    if spoil == "missing":
        del tensors[name]
    elif spoil == "misshapen":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors["module.layers.1.mlp.more.weight"] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"DataParallel.*layers\.1\.mlp\.(Wi|more)\.weight"):
        ml.load_model(folder)


def command(error):
    return re.search(r'python -c "(.*?)"', str(error.value)).group(1)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_line_that_takes_a_prefix_off_works(make_checkpoint, monkeypatch, sharded):
    """Where a part of the names has a prefix there are two readings."""
    folder, _ = make_checkpoint(**FEW)
    expected = ml.load_model(folder).state_dict()
    rewrite(folder, lambda name: name if "final" in name else "_orig_mod." + name)
    if sharded:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'_orig_mod\.', which torch\.compile left there") as error:
        ml.load_model(folder)
    monkeypatch.chdir(folder)
    exec(command(error), {})
    assert_same(ml.load_model(folder), expected)


def test_two_encoders_in_a_file_are_refused_with_the_line_that_keeps_one(make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint(**FEW)
    expected = ml.load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, lambda name: f"query.{name}", {f"passage.{n}": t + 1 for n, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"'passage\.' or 'query\.'|'query\.' or 'passage\.'") as error:
        ml.load_model(folder)
    kept = re.search(r"under '(\w+)\.'", str(error.value)).group(1)
    monkeypatch.chdir(folder)
    exec(command(error), {})
    add = 1 if kept == "passage" else 0
    assert_same(ml.load_model(folder), {name: tensor + add for name, tensor in expected.items()})


@pytest.mark.parametrize("prefix", ["x');import os;('", "a b.", 'x"y.', "$(x).", "`x`."])
def test_a_command_holds_nothing_that_a_file_has_made_up(make_checkpoint, prefix):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, lambda name: name if "final" in name else f"{prefix}.{name}")
    with pytest.raises(CheckpointError, match="a class around the network") as error:
        ml.load_model(folder)
    assert "python -c" not in str(error.value)


def test_an_adapter_that_is_not_merged_is_refused_as_such(make_checkpoint):
    folder, _ = make_checkpoint(**FEW)

    def rename(name):
        return "base_model.model." + name.replace("Wqkv.weight", "Wqkv.base_layer.weight")

    more = {f"base_model.model.layers.0.attn.Wqkv.lora_{part}.default.weight": torch.ones(4, 4) for part in "AB"}
    rewrite(folder, rename, more)
    with pytest.raises(CheckpointError, match=r"a PEFT adapter that is not merged.*merge_and_unload"):
        ml.load_model(folder)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "qweight"])
def test_quantized_matrices_are_refused_as_such(make_checkpoint, suffix):
    folder, _ = make_checkpoint(**FEW)
    rewrite(folder, more={f"layers.0.attn.Wqkv.{suffix}": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"are quantized.*only float32, float16 and bfloat16"):
        ml.load_model(folder)


def test_thousands_of_bad_names_of_any_kind_are_one_short_line(make_checkpoint):
    folder, _ = make_checkpoint(**FEW)
    bad = {f"{i}\n\x1b[31m\u202e{'x' * 1_000}.embeddings.tok_embeddings.weight": torch.ones(1) for i in range(2_000)}
    rewrite(folder, more=bad)
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 2_000
    save_file(bad, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 2_000
