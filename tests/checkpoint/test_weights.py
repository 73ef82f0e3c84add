"""safetensors of every kind -> a network, with no second copy; and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_cases import DTYPES, SMALL_VOCAB, assert_holds, edit, edit_config, renamed, stored_values

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.open import pick_device
from modernbert_lite.checkpoint.weights import load_weights
from modernbert_lite.models.modernbert import MaskedLM, ModernBert, SequenceClassifier, TokenClassifier
from modernbert_lite.models.registry import read_config
from modernbert_lite.ops.linear import narrower

CLASSES = {
    "ModernBertModel": ModernBert,
    "ModernBertForMaskedLM": MaskedLM,
    "ModernBertForSequenceClassification": SequenceClassifier,
    "ModernBertForTokenClassification": TokenClassifier,
}


BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_every_class_loads_the_values_of_its_file(make_checkpoint, architecture, biases):
    folder, _ = make_checkpoint(architecture, **SMALL_VOCAB, **biases)
    model = ml.load_model(folder)
    assert type(model) is CLASSES[architecture]
    assert_holds(model, stored_values(folder), torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_weights_of_a_model_without_optional_biases_are_as_many_as_published(make_checkpoint):
    for architecture, extra in zip(CLASSES, (0, 3, 4, 4), strict=True):
        folder, _ = make_checkpoint(architecture, name=architecture, **SMALL_VOCAB)
        layers = read_config(folder).num_hidden_layers
        assert len(stored_values(folder)) == 6 * layers + 2 + extra
        ml.load_model(folder)


@pytest.mark.parametrize("architecture", CLASSES)
def test_sharded_files_load_as_the_single_one(make_checkpoint, architecture):
    folder, reference = make_checkpoint(architecture, **SMALL_VOCAB)
    expected = ml.load_model(folder).state_dict()
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="200kB")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not (folder / "model.safetensors").exists()
    got = ml.load_model(folder).state_dict()
    assert sorted(got) == sorted(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_single_file_wins_over_an_index_beside_it(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    ml.load_model(folder)


def test_a_missing_shard_is_named(make_checkpoint):
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="200kB")
    gone = sorted(folder.glob("model-*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=re.escape(gone.name)):
        ml.load_model(folder)


def test_a_tensor_in_two_shards_is_refused(make_checkpoint):
    folder, reference = make_checkpoint(**SMALL_VOCAB)
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="200kB")
    shard = sorted(folder.glob("model-*-of-*.safetensors"))[0]
    tensors = load_file(shard)
    save_file({**tensors, "final_norm.weight": torch.ones(96)}, shard)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight"):
        ml.load_model(folder)


@pytest.mark.parametrize("with_prefix", [True, False], ids=["model.", "bare"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_both_prefixes_load_in_every_class(make_checkpoint, architecture, with_prefix):
    folder, _ = make_checkpoint(architecture, **SMALL_VOCAB)
    expected = ml.load_model(folder).state_dict()

    def rename(name):
        bare = name.removeprefix("model.")
        is_head = bare.partition(".")[0] in ("head", "decoder", "classifier")
        return f"model.{bare}" if with_prefix and not is_head else bare

    edit(folder, lambda tensors: renamed(tensors, rename))
    got = ml.load_model(folder).state_dict()
    assert sorted(got) == sorted(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", list(CLASSES)[1:])
def test_the_encoder_of_a_head_file_is_read_and_the_head_left_out(make_checkpoint, architecture):
    folder, _ = make_checkpoint(architecture, **SMALL_VOCAB)
    model = load_weights(
        ModernBert, read_config(folder), Folder(folder), device=torch.device("cpu"), dtype=torch.float32
    )
    assert_holds(model, stored_values(folder), torch.float32)
    edit_config(folder, architectures=["ModernBertModel"])
    assert type(ml.load_model(folder)) is ModernBert


@pytest.mark.parametrize(
    ("architecture", "missing"),
    [
        ("ModernBertForMaskedLM", ["head.dense.weight", "head.norm.weight", "decoder.bias"]),
        (
            "ModernBertForSequenceClassification",
            ["head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"],
        ),
        ("ModernBertForTokenClassification", ["classifier.weight", "classifier.bias"]),
    ],
)
def test_an_encoder_file_has_no_head_to_read(make_checkpoint, architecture, missing):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit_config(folder, architectures=[architecture])
    with pytest.raises(CheckpointError) as error:
        ml.load_model(folder)
    for name in missing:
        assert f"missing {name}" in str(error.value)
    assert "embeddings" not in str(error.value)


def test_one_head_is_not_taken_for_another(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    edit_config(folder, architectures=["ModernBertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"missing classifier\.weight.*unexpected decoder\.bias"):
        ml.load_model(folder)


def test_an_unknown_architecture_is_refused_with_the_known_ones(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit_config(folder, architectures=["ModernBertForMultipleChoice"])
    with pytest.raises(CheckpointError, match=r"ModernBertForMultipleChoice.*ModernBertForSequenceClassification"):
        ml.load_model(folder)


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_storage_type_loads_as_every_dtype(make_checkpoint, stored, wanted):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    edit(folder, lambda tensors: tensors.update({k: v.to(DTYPES[stored]) for k, v in tensors.items()}))
    for dtype in (wanted, DTYPES[wanted]):
        for packed in (False, True):
            if packed and narrower(pick_device(None), DTYPES[wanted]):  # this CPU computes in fp32: ops/test_half.py
                continue
            model = ml.load_model(folder, dtype=dtype, packed=packed)
            assert_holds(model, stored_values(folder), DTYPES[wanted])


def test_files_of_mixed_types_and_of_fp64_load(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)

    def mix(tensors):
        kinds = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
        tensors.update({k: v.to(kinds[i % 4]) for i, (k, v) in enumerate(sorted(tensors.items()))})

    edit(folder, mix)
    assert_holds(ml.load_model(folder), stored_values(folder), torch.float32)


def test_the_config_s_dtype_key_decides_nothing(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    edit_config(folder, dtype="int4", torch_dtype="float16")
    assert ml.load_model(folder, device="cpu").final_norm.weight.dtype == torch.float32


def mapped_ranges(path):
    """(start, end) of each part of this process's memory that is a view of the file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name == str(path):
            start, end = (int(part, 16) for part in span.split("-"))
            ranges.append((start, end))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_tensors_that_need_no_conversion_stay_in_the_file_s_mapping(make_checkpoint, dtype, sharded):
    folder, reference = make_checkpoint("ModernBertForMaskedLM", **SMALL_VOCAB)
    if sharded:
        (folder / "model.safetensors").unlink()
        reference.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size="150kB")
    else:
        edit(folder, lambda tensors: tensors.update({k: v.to(DTYPES[dtype]) for k, v in tensors.items()}))
    model = ml.load_model(folder, device="cpu", dtype=dtype, packed=False)
    ranges = [r for path in folder.glob("*.safetensors") for r in mapped_ranges(path.resolve())]
    for name, tensor in model.state_dict().items():
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(low <= start and end <= high for low, high in ranges), f"{name} was copied"


def test_a_mapped_model_does_not_write_to_its_file(make_checkpoint):
    folder, _ = make_checkpoint(**SMALL_VOCAB)
    before = (folder / "model.safetensors").read_bytes()
    model = ml.load_model(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        model.final_norm.weight.fill_(3.0)
    assert (folder / "model.safetensors").read_bytes() == before


# Prints by how many bytes the peak of this process's memory grew while the second model was loaded; the first one, a
# small one, brings in what torch loads lazily.
LOAD_AND_MEASURE = """
import contextlib, sys, torch
import modernbert_lite as ml

def memory(of):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(of)) * 1024

torch.set_num_threads(1)
small, large, dtype = sys.argv[1:]
ml.load_model(small, device="cpu", dtype=dtype)
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = memory("VmRSS")
model = ml.load_model(large, device="cpu", dtype=dtype)
print(memory("VmHWM") - before)
"""


@pytest.fixture
def vocabulary_heavy_fp16(make_checkpoint):
    """A checkpoint of 100 MB in fp16, nearly all of it one tensor, as in the multilingual models (256,000 x 768)."""
    folder, _ = make_checkpoint(**SMALL_VOCAB, num_hidden_layers=1, name="large")

    def grow(tensors):
        tensors.update({k: v.half() for k, v in tensors.items()})
        tensors["embeddings.tok_embeddings.weight"] = torch.zeros(500_000, 96, dtype=torch.float16)

    edit(folder, grow)
    edit_config(folder, vocab_size=500_000)
    return folder


def grown_memory(small, large, dtype):
    """By how many bytes the peak of a process's memory grows while it loads the second checkpoint."""
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(small), str(large), dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_16_bit_embedding_table_is_not_held(vocabulary_heavy_fp16, make_checkpoint, dtype):
    small, _ = make_checkpoint(**SMALL_VOCAB, num_hidden_layers=1, name="small")
    size = (vocabulary_heavy_fp16 / "model.safetensors").stat().st_size
    ratio = grown_memory(small, vocabulary_heavy_fp16, dtype) / size
    assert ratio < 0.25, f"peak memory grew by {ratio:.2f} times the file"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.25)])
def test_linear_weights_are_held_once(make_checkpoint, dtype, share):
    sizes = {"hidden_size": 384, "intermediate_size": 576, "num_attention_heads": 6}
    large, _ = make_checkpoint(**SMALL_VOCAB, **sizes, num_hidden_layers=12, name="large")
    small, _ = make_checkpoint(**SMALL_VOCAB, **sizes, num_hidden_layers=1, name="small")
    size = (large / "model.safetensors").stat().st_size  # 60 MB in fp32
    ratio = grown_memory(small, large, dtype) / size
    assert ratio < share + 0.2, f"peak memory grew by {ratio:.2f} times the file"
