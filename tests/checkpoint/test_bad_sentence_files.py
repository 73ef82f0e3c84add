"""Damaged files of sentence-transformers are errors that name the file."""

from __future__ import annotations

import pytest
import torch
from bad_checkpoints_cases import ST, folder, write, write_modules  # noqa: F401
from safetensors.torch import save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.embedder import Embedder


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"{}", b"null", b"5", b'["Transformer"]', b"[[]]", b"[null]", b"[" * 100_000, b"\xff"],
    ids=range(10),
)
def test_a_malformed_modules_json_is_refused(folder, content):
    (folder / "modules.json").write_bytes(content)
    for reads in (lambda f: Folder(f).modules, lambda f: read_sentence_config(Folder(f)), Embedder.from_pretrained):
        with pytest.raises(CheckpointError, match=r"modules\.json"):
            reads(folder)


@pytest.mark.parametrize(
    "kind", ["sentence_transformers.models.CNN", "os.system", "my_module.Custom", "", None, 5, ["Pooling"]]
)
def test_an_unknown_module_is_refused_by_name(folder, kind):
    write_modules(folder, {"idx": 2, "name": "2", "path": "", "type": kind})
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    for part in (repr(kind), "Transformer", "Pooling", "Dense", "Normalize"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"pooling_mode": "median"}',
        b'{"pooling_mode": []}',
        b'{"pooling_mode": 5}',
        b'{"pooling_mode": {"cls": true}}',
        b'{"pooling_mode": ["cls", "median"]}',
        b'{"pooling_mode": [["cls"]]}',
        b'{"pooling_mode": [{}]}',
        b'{"pooling_mode": [null]}',
    ],
    ids=range(12),
)
def test_a_malformed_pooling_config_is_refused(folder, content):
    (folder / "1_Pooling" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)


def test_a_pooling_module_without_its_config_is_refused(folder):
    """A copy that lost its subfolders would otherwise be pooled in some way that nobody chose."""
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)
    (folder / "1_Pooling").rmdir()
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"prompts": ["query: "]}',
        b'{"prompts": {"query": 5}}',
        b'{"default_prompt_name": "queri"}',
        b'{"default_prompt_name": 5}',
        b'{"default_prompt_name": []}',
        b'{"default_prompt_name": {}}',
        b'{"similarity_fn_name": "cos"}',
        b'{"similarity_fn_name": ["cosine"]}',
        b'{"similarity_fn_name": 5}',
    ],
    ids=range(13),
)
def test_a_malformed_sentence_transformers_config_is_refused(folder, content):
    (folder / "config_sentence_transformers.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, -1, "512", 1.5, [], {}, True, 10**30])
def test_a_malformed_max_seq_length_is_refused(folder, length):
    write(folder / "sentence_bert_config.json", {"max_seq_length": length})
    with pytest.raises(CheckpointError, match="max_seq_length"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_a_malformed_length_file_is_refused(folder, name):
    (folder / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Embedder.from_pretrained(folder)


def add_dense(folder, config, tensors=None):
    write_modules(folder, {"idx": 2, "name": "2", "path": "2_Dense", "type": ST + "Dense"})
    (folder / "2_Dense").mkdir()
    if config is not None:
        write(folder / "2_Dense" / "config.json", config)
    if tensors is not None:
        save_file(tensors, folder / "2_Dense" / "model.safetensors")


DENSE = {"in_features": 32, "out_features": 3, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}


def test_a_dense_module_is_read(folder):
    add_dense(folder, DENSE, {"linear.weight": torch.ones(3, 32)})
    assert Embedder.from_pretrained(folder).encode("a").shape == (3,)


def test_a_dense_module_of_a_pickle_is_refused_with_how_to_convert_it(folder):
    add_dense(folder, DENSE)
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(CheckpointError, match=r"2_Dense.*pytorch_model\.bin.*never read.*Convert"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "os.system"}, "os.system"),
        ({"activation_function": "my.Tanh"}, "my.Tanh"),
        ({"activation_function": "torch.load"}, "torch.load"),
        ({"activation_function": 5}, "5"),
        ({"activation_function": ["torch.nn.Tanh"]}, "torch.nn.Tanh"),
        ({"in_features": 31}, "31"),
        ({"out_features": "3"}, "'3'"),
        ({"in_features": None}, "None"),
        ({"bias": True}, "linear.bias"),
        ({"use_residual": True}, "residual.weight"),
        ({"module_input_name": "pixels"}, "pixels"),
    ],
)
def test_a_dense_module_that_cannot_be_honoured_is_refused(folder, change, said):
    add_dense(folder, {**DENSE, **change}, {"linear.weight": torch.ones(3, 32)})
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    assert "2_Dense" in str(error.value) or "activation" in str(error.value)
    assert said in str(error.value)


def test_a_dense_module_without_config_or_of_another_width_is_refused(folder):
    add_dense(folder, None, {"linear.weight": torch.ones(3, 32)})
    with pytest.raises(CheckpointError, match=r"2_Dense"):
        Embedder.from_pretrained(folder)
    write(folder / "2_Dense" / "config.json", {**DENSE, "in_features": 64})
    save_file({"linear.weight": torch.ones(3, 64)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense|in_features|64"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, ["torch.nn.Sigmoid"], "os.system", "evil.Sigmoid"])
def test_a_cross_encoder_s_activation_that_is_not_known_is_refused(make_checkpoint, name):
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_hidden_layers=1, num_labels=1)
    write(folder / "config_sentence_transformers.json", {"activation_fn": name})
    write(folder / "modules.json", [{"type": ST + "Transformer", "path": ""}])
    with pytest.raises(CheckpointError, match="activation"):
        ml.Reranker.from_pretrained(folder)


# --- anything at all
