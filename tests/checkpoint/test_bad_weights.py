"""Damaged and hostile checkpoints: a clear error and nothing else. And what the package's code must never do."""

from __future__ import annotations

import json
import struct

import pytest
from bad_checkpoints_cases import folder, with_header, write  # noqa: F401
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.embedder import Embedder
from modernbert_lite.models.registry import read_config


def test_a_sound_folder_opens(folder):
    assert Embedder.from_pretrained(folder).encode("a").shape == (32,)


# --- config.json


def test_a_folder_without_config_json_is_refused(folder, tmp_path):
    (folder / "config.json").unlink()
    for opens in (ml.load_model, ml.read_config, Embedder.from_pretrained, ml.Reranker.from_pretrained):
        with pytest.raises(CheckpointError, match=r"no config\.json in .*checkpoint"):
            opens(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model_type": "modernbert"',
        b"{'model_type': 'modernbert'}",
        b"\xff\xfe\x00junk",
        b'{"model_type": "\x80"}',
        b"[]",
        b"null",
        b'"modernbert"',
        b"5",
        b"[" * 100_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b'{"vocab_size": ' + b"9" * 5_000 + b"}",
        b" " * ((1 << 20) + 1),
    ],
    ids=range(14),
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ml.load_model(folder)


def test_json_nested_to_any_depth_is_refused_or_read(tmp_path):
    """Just below the depth at which the parser gives up, printing the value in an error message must work, too."""
    for depth in (*range(100, 900, 100), *range(900, 1010)):
        for key in ("hidden_size", "layer_types", "rope_parameters", "architectures"):
            (tmp_path / "config.json").write_text(
                f'{{"model_type": "modernbert", "{key}": {"[" * depth}1{"]" * depth}}}'
            )
            with pytest.raises(CheckpointError):
                read_config(tmp_path)


def test_the_message_about_a_huge_value_is_short(tmp_path):
    write(tmp_path / "config.json", {"model_type": "modernbert", "hidden_activation": "x" * 900_000})
    with pytest.raises(CheckpointError, match="hidden_activation") as error:
        read_config(tmp_path)
    assert len(str(error.value)) < 2_000


# --- safetensors


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as safetensors .*cut short"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all" * 100,
        b"\0" * 64,
        b"\x80\x04\x95pickle",
        b"PK\x03\x04zip",
        b"<html>404</html>",
        b"\xff" * 64,
    ],
    ids=["text", "zeros", "pickle", "zip", "html", "ones"],
)
def test_weights_that_are_something_else_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_a_file_pointer_that_was_never_resolved_is_refused(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 298041696\n"
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_a_header_that_claims_more_than_the_file_is_refused(folder):
    with_header(folder, {}, claimed=1_000_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        ml.load_model(folder)


@pytest.mark.parametrize("claimed", [(16 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_of_more_than_16_mib_is_not_even_read(folder, claimed):
    with_header(folder, {}, claimed=claimed)
    with pytest.raises(CheckpointError, match=rf"header claims {claimed} bytes, more than {16 << 20}"):
        ml.load_model(folder)


def test_tensors_that_claim_more_than_the_file_are_refused(folder):
    size = 1 << 40
    with_header(
        folder, {"final_norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"\0" * 64
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}}",
        b"null",
        b'{"a": 5}',
        b"\xff\xfe",
        b"[" * 10_000,
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"__metadata__": {"format": 5}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=range(13),
)
def test_a_malformed_header_is_refused(folder, header):
    with_header(folder, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_an_empty_header_is_named(folder):
    with_header(folder, {})
    with pytest.raises(CheckpointError, match=r"doesn't fit its config\.json: it has no tensor at all"):
        ml.load_model(folder)


def rewritten_header(folder, change):
    """Changes model.safetensors' header and leaves its data."""
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    with_header(folder, header, raw[8 + size :])


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F4", "F8_E8M0", "C64", "U64"])
def test_types_that_torch_may_not_know_are_refused_by_name(folder, dtype):
    bits = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "F8_E8M0": 8, "C64": 64, "U64": 64}[dtype]
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    size = 32 * bits // 8
    raw = (folder / "model.safetensors").read_bytes()
    at = len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]

    def change(header):
        header["final_norm.weight"] = {"dtype": dtype, "shape": [32], "data_offsets": [at, at + size]}

    rewritten_header(folder, change)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * size)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight"):
        ml.load_model(folder)


def test_a_directory_in_the_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


# --- paths that a checkpoint's files name
