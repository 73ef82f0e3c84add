"""Weights that don't fit their config, tied decoders, pickles, dtypes and devices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from weights_cases import DTYPES, SMALL_VOCAB, assert_holds, edit, edit_config, renamed, stored_values

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.open import pick_device, pick_dtype
from modernbert_lite.models.modernbert import ModernBert


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)

    def spoil(tensors):
        del tensors["layers.1.attn_norm.weight"]
        tensors["layers.0.attn_norm.weight"] = torch.ones(96)  # layer 0 has none
        tensors["layers.2.mlp.Wi.weight"] = tensors["layers.2.mlp.Wi.weight"][:-1]
        tensors["extra.thing"] = torch.ones(2)

    edit(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    for part in (
        str(folder),
        "missing layers.1.attn_norm.weight",
        "unexpected layers.0.attn_norm.weight",
        "unexpected extra.thing",
        "layers.2.mlp.Wi.weight has the shape (287, 96), the config asks for (288, 96)",
    ):
        assert part in str(error.value)


def test_a_long_list_of_problems_is_cut_and_counted(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit(folder, lambda tensors: renamed(tensors, lambda name: name if "final" in name else "bert." + name))
    with pytest.raises(CheckpointError, match=r"missing embeddings\.tok_embeddings\.weight.* and \d+ more$") as error:
        ml.load_model(folder)
    count = len(stored_values(folder)) * 2 - 2
    assert str(error.value).endswith(f"and {count - 12} more")


def test_names_of_which_none_is_known_are_one_line_with_what_is(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit(folder, lambda tensors: renamed(tensors, lambda name: "tower_" + name))
    with pytest.raises(CheckpointError, match=r"such as 'tower_.*begin with 'embeddings', after one of 'model\.', ''$"):
        ml.load_model(folder)


def test_a_pointer_of_git_lfs_is_named(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs, not the weights: run `git lfs pull`"):
        ml.load_model(folder)


def test_a_missing_shard_is_missing_and_not_damaged(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing: the checkpoint was"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 192, "num_attention_heads": 3}, "embeddings.tok_embeddings.weight"),
        ({"intermediate_size": 143}, "layers.0.mlp.Wi.weight"),
        ({"vocab_size": 332}, "embeddings.tok_embeddings.weight"),
        ({"num_hidden_layers": 6, "layer_types": None}, "missing layers.5.attn.Wqkv.weight"),
        ({"num_hidden_layers": 4, "layer_types": None}, "unexpected layers.4.attn.Wqkv.weight"),
        ({"norm_bias": True}, "missing embeddings.norm.bias"),
        ({"attention_bias": True}, "missing layers.0.attn.Wo.bias"),
        ({"mlp_bias": True}, "missing layers.0.mlp.Wi.bias"),
    ],
)
def test_a_config_that_asks_for_other_tensors_is_refused(make_checkpoint, change, named):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        ml.load_model(folder)


def test_a_tensor_under_both_prefixes_is_refused(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit(folder, lambda tensors: tensors.update({"model.final_norm.weight": tensors["final_norm.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"(model\.)?final_norm\.weight and (model\.)?final_norm\.weight"):
        ml.load_model(folder)


def test_a_tied_decoder_is_the_embedding_itself(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    assert "decoder.weight" not in stored_values(folder)
    model = ml.load_model(folder)
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight


def test_a_tied_decoder_may_be_in_the_file_if_it_is_equal(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    key = "model.embeddings.tok_embeddings.weight"
    edit(folder, lambda tensors: tensors.update({"decoder.weight": tensors[key].clone()}))
    model = ml.load_model(folder)
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight


def test_a_tied_decoder_that_differs_is_its_own_as_in_transformers_5(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)

    def differ(tensors):
        tensors["decoder.weight"] = tensors["model.embeddings.tok_embeddings.weight"].clone()
        tensors["decoder.weight"][330, 95] += 0.5

    edit(folder, differ)
    import transformers

    with pytest.warns(UserWarning, match=r"decoder\.weight differs.*tie_word_embeddings"):
        network = ml.load_model(folder)
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(folder).eval()
    ids = torch.arange(5, 60)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert (network(ml.pack([ids])) - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("packed", [True, False])
def test_of_tied_tensors_one_may_be_stored_under_either_name(make_checkpoint, packed):
    """safetensors.torch.save_model keeps one name of two, the first in the alphabet."""
    import transformers
    from safetensors.torch import save_model

    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(folder).eval()
    save_model(theirs, str(folder / "model.safetensors"), {"format": "pt"})
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "decoder.weight" in file.keys()  # noqa: SIM118
        assert "model.embeddings.tok_embeddings.weight" not in file.keys()  # noqa: SIM118
    ids = torch.arange(5, 60)
    with torch.no_grad():
        expected, hidden = theirs(ids[None]).logits[0], theirs.model(ids[None]).last_hidden_state[0]
    assert (ml.load_model(folder, packed=packed)(ml.pack([ids])) - expected).abs().max() <= 2e-5
    edit_config(folder, architectures=["ModernBertModel"])  # an encoder: the decoder is its table, too
    assert (ml.load_model(folder, packed=packed)(ml.pack([ids])) - hidden).abs().max() <= 2e-5
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing embeddings\.tok_embeddings\.weight"):
        ml.load_model(folder, packed=packed)


def test_tensors_that_are_left_over_are_named_with_what_to_do(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit(folder, lambda tensors: tensors.update({"temperature": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected temperature; if they are left over.* without them"):
        ml.load_model(folder)


def test_an_untied_decoder_is_its_own_and_must_be_there(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", tie_word_embeddings=False, **SMALL_VOCAB)
    model = ml.load_model(folder)
    assert_holds(model, stored_values(folder), torch.float32)
    assert not torch.equal(model.decoder.weight, model.model.embeddings.tok_embeddings.weight)
    edit(folder, lambda tensors: tensors.pop("decoder.weight"))
    with pytest.raises(CheckpointError, match=r"missing decoder\.weight"):
        ml.load_model(folder)


def test_a_decoder_without_bias(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", decoder_bias=False, **SMALL_VOCAB)
    assert ml.load_model(folder).decoder.bias is None


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "np", "by": "someone else"}])
def test_the_header_s_metadata_doesn_t_matter(make_checkpoint, metadata):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit(folder, lambda tensors: None, metadata)
    header = (folder / "model.safetensors").read_bytes()[8:40]
    assert (b"__metadata__" in header) == (metadata is not None)
    assert_holds(ml.load_model(folder), stored_values(folder), torch.float32)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_stored_as_no_plain_float_are_refused(make_checkpoint, stored):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    name = "layers.1.attn.Wo.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].clamp(0, 1).to(stored)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is stored as {stored}; only float32"):
        ml.load_model(folder)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["layers.3.mlp.Wo.weight", "embeddings.tok_embeddings.weight", "final_norm.weight"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_a_value_that_is_not_finite_shows_in_results(make_checkpoint, bad, name, dtype):
    """Weights are mapped, not read through: the classes refuse such a result, and name the text (test_not_finite)."""
    folder, _ = make_checkpoint(**SMALL_VOCAB)

    def spoil(tensors):
        tensors[name].view(-1, tensors[name].shape[-1])[-1, 5] = float(bad)

    edit(folder, spoil)
    last = SMALL_VOCAB["vocab_size"] - 1
    got = ml.load_model(folder, device="cpu", dtype=dtype)(ml.pack([[5, last, 7]]))
    assert not got.isfinite().all()


def test_values_too_large_for_fp16_load_as_others(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    name = "layers.2.attn.Wqkv.weight"
    edit(folder, lambda tensors: tensors[name][0, :1].fill_(70_000.0))
    weight = {d: ml.load_model(folder, dtype=d, packed=False).layers[2].attn.Wqkv.weight[0, 0] for d in DTYPES}
    assert weight["float16"].isinf()
    assert weight["bfloat16"] == torch.tensor(70_000.0).bfloat16()
    assert weight["float32"] == 70_000.0


@pytest.mark.parametrize("others", [["pytorch_model.bin"], ["model.pt", "training_args.bin"], ["weights.ckpt"]])
def test_a_folder_of_pickles_is_refused_with_how_to_convert_it(make_checkpoint, others):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    (folder / "model.safetensors").unlink()
    for name in others:
        (folder / name).write_bytes(b"\x80\x04never read")
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    for part in (*others, "never read", "Convert", "weights_only=True", others[0], str(folder)):
        assert part in str(error.value)


@pytest.mark.parametrize("architecture", ["ModernBertModel", "ModernBertForMaskedLM"])
def test_the_conversion_that_the_error_gives_works(make_checkpoint, architecture):
    folder, reference = make_checkpoint(architecture, **SMALL_VOCAB)
    expected = ml.load_model(folder).state_dict()
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")  # where tied tensors share memory
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    code = re.search(r'python -c "(.*)"', str(error.value)).group(1)  # type: ignore[union-attr]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, cwd=folder)
    got = ml.load_model(folder).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_pickles_beside_safetensors_are_left_alone(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    ml.load_model(folder)


@pytest.mark.parametrize(
    "dtype", ["fp16", "torch.float16", "int4", "", torch.uint8, torch.float64, torch.float8_e5m2, int, 16]
)
def test_an_unknown_dtype_is_refused_with_the_known_ones(make_checkpoint, dtype):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(ValueError, match=r"dtype is .*; it must be one of float32, float16, bfloat16, int8"):
        ml.load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:9999", "", "xyz:0", "cpu:junk", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(make_checkpoint, device):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(ValueError, match=f"device '{device}' can't be used"):
        ml.load_model(folder, device=device)


def test_a_device_may_be_a_name_or_an_object(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    for device in ("cpu", torch.device("cpu")):
        assert ml.load_model(folder, device=device).final_norm.weight.device.type == "cpu"
    assert pick_device("cpu") == torch.device("cpu")


def test_the_default_dtype_on_the_cpu_is_fp32():
    assert pick_dtype(None, torch.device("cpu")) == torch.float32


def test_a_folder_may_be_a_string_a_path_or_relative(make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (str(folder), folder, folder.name, f"./{folder.name}", f"~/{folder.name}", f"{folder}{os.sep}"):
        assert type(ml.load_model(name)) is ModernBert


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing-folder", "a/b/c", "/missing", "", "."])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a folder|config\.json|name is empty"):
        ml.load_model(name)


def test_a_file_is_no_folder(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is not a folder"):
        ml.load_model(folder / "model.safetensors")


def test_the_bundled_model_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ml.load_model("tiny").config.hidden_size == 384
