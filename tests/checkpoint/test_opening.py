"""One road from a name to a network: each file of a checkpoint is read once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import modernbert_lite as ml
from modernbert_lite.checkpoint import folder as folders

# Counts what the process opens below a folder, whoever does it.
COUNT = """
import collections, json, os, sys
import modernbert_lite as ml, torch, modernbert_lite.embedder, modernbert_lite.reranker, modernbert_lite.fill_mask
root, kind = sys.argv[1:3]
counts = collections.Counter()
def seen(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and args[1] is None:  # os.open, which the other uses
        path = os.fsdecode(args[0])
        if path.startswith(root):
            counts[os.path.relpath(path, root)] += 1
sys.addaudithook(seen)
if kind == "load_model":
    ml.load_model(root, device="cpu")
else:
    getattr(ml, kind).from_pretrained(root, device="cpu")
print(json.dumps(counts))
"""


def opened(folder, kind):
    done = subprocess.run([sys.executable, "-c", COUNT, str(folder), kind], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2_000:]
    return {name: count for name, count in json.loads(done.stdout.splitlines()[-1]).items() if name.endswith(".json")}


@pytest.fixture
def embedder(make_checkpoint):
    """A folder with every file that an embedding model has."""
    folder, _ = make_checkpoint(num_hidden_layers=1)
    types = "sentence_transformers.models"
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "type": f"{types}.{kind}", "path": kinds[kind]} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    return folder


@pytest.mark.parametrize("kind", ["load_model", "Embedder"])
def test_each_file_is_read_once(embedder, kind):
    counts = opened(embedder, kind)
    assert set(counts.values()) == {1}, counts
    assert {"config.json", "modules.json"} <= set(counts)
    if kind == "Embedder":
        assert {"tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(
            counts
        )


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("Reranker", "ModernBertForSequenceClassification"), ("FillMask", "ModernBertForMaskedLM")],
)
def test_each_file_of_a_head_is_read_once(make_checkpoint, kind, architecture):
    folder, _ = make_checkpoint(architecture, num_hidden_layers=1, num_labels=1)
    assert set(opened(folder, kind).values()) == {1}


def test_headers_of_weights_are_read_once(make_checkpoint, monkeypatch):
    """Also where a config names no architecture, so that the tensors' names decide. (Tensors are mapped one by one.)"""
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_hidden_layers=1, num_labels=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    read = []
    whole = folders.Folder.weight_files
    monkeypatch.setattr(folders.Folder, "weight_files", lambda self, f: read.append(f) or whole(self, f))
    ml.Reranker.from_pretrained(folder, device="cpu")
    assert read == [folder]


def test_a_folder_that_changed_is_read_anew(embedder):
    assert ml.Embedder.from_pretrained(embedder, device="cpu").max_seq_length == 64
    (embedder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert ml.Embedder.from_pretrained(embedder, device="cpu").max_seq_length == 32
