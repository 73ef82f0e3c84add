"""Shared by several files of tests/checkpoint:

test_bad_weights, test_paths, test_bad_tokenizers, test_bad_sentence_files, test_random_damage,
test_no_code_is_run.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

ST = "sentence_transformers.models."


MADE: dict[str, Path] = {}  # sound folders, made once


@pytest.fixture
def folder(make_checkpoint, tmp_path_factory):
    """A small sound embedding model: 32 wide, a vocabulary of 31, a tokenizer of three words."""
    if "folder" not in MADE:
        made, _ = make_checkpoint(
            hidden_size=32,
            num_attention_heads=1,
            intermediate_size=9,
            num_hidden_layers=2,
            vocab_size=31,
            pad_token_id=3,
        )
        write(made / "tokenizer.json", tokenizer_with())
        write_modules(made)
        (made / "1_Pooling").mkdir()
        write(made / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True})
        MADE["folder"] = tmp_path_factory.mktemp("made") / "folder"
        shutil.move(made, MADE["folder"])
    return shutil.copytree(MADE["folder"], tmp_path_factory.mktemp("test") / "folder")


def write(path, value):
    path.write_text(json.dumps(value))


def write_modules(folder, *more, pooling="1_Pooling"):
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": ST + "Transformer"},
        {"idx": 1, "name": "1", "path": pooling, "type": ST + "Pooling"},
        *more,
    ]
    write(folder / "modules.json", modules)


def tokenizer_with(**parts):
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1, "[MASK]": 2}, "unk_token": "[UNK]"},
        **parts,
    }


def with_header(folder, header, data=b"", claimed=None):
    """A model.safetensors with this header: an object, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if claimed is None else claimed
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)
