"""README's code runs as it stands, on small random models under the names that it uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks, but for the two commands that set up and test: those are what runs this."""
    found = re.findall(rf"(<!-- command: .*? -->\n)?```{language}\n(.*?)```", README, flags=re.DOTALL)
    return [code for marked, code in found if not marked]


def cached(cache: Path, repo: str, folder: Path) -> None:
    """Puts a checkpoint in a hub cache, as downloading it would."""
    commit = "0" * 40
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    (home / "refs" / "main").write_text(commit)
    folder.rename(home / "snapshots" / commit)


def sparse_gte(folder: Path) -> Path:
    """gte-multilingual-base's form, with ModernBERT's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.GteConfig(vocab_size=50368, pad_token_id=50283, num_labels=1, initializer_range=0.1, **sizes)
    transformers.GteForTokenClassification(config).save_pretrained(folder)
    for path in (Path(__file__).parent / "data" / "modernbert-tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


@pytest.fixture
def hub(make_checkpoint, tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fixtures", Path(__file__).with_name("conftest.py"))
    fixtures = module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    cache = tmp_path / "hub"
    cached(
        cache,
        "Alibaba-NLP/gte-modernbert-base",
        fixtures.write_sentence_files(make_checkpoint(name="embedder")[0], max_seq_length=None),
    )
    classifier = {"id2label": {0: "LABEL_0"}, "classifier_pooling": "mean"}
    reranker = make_checkpoint("ModernBertForSequenceClassification", name="reranker", **classifier)[0]
    cached(cache, "Alibaba-NLP/gte-reranker-modernbert-base", reranker)
    cached(cache, "answerdotai/ModernBERT-base", make_checkpoint("ModernBertForMaskedLM", name="mlm")[0])
    cached(cache, "Alibaba-NLP/gte-multilingual-base", sparse_gte(tmp_path / "gte"))
    entailment = {"num_labels": 2, "id2label": {0: "entailment", 1: "not_entailment"}}
    entailment["label2id"] = {"entailment": 0, "not_entailment": 1}
    nli = make_checkpoint("ModernBertForSequenceClassification", name="nli", **entailment)[0]
    cached(cache, "MoritzLaurer/ModernBERT-base-zeroshot-v2.0", nli)
    late = make_checkpoint(name="late")[0]
    (late / "1_Dense").mkdir()
    save_file({"linear.weight": torch.eye(8, 96)}, late / "1_Dense" / "model.safetensors")
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    (late / "1_Dense" / "config.json").write_text(
        json.dumps({"in_features": 96, "out_features": 8, "bias": False, **identity})
    )
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    (late / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    prefixes = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 300}
    (late / "config_sentence_transformers.json").write_text(json.dumps(prefixes))
    cached(cache, "lightonai/GTE-ModernColBERT-v1", late)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HF_HUB_CACHE": str(cache), "PATH": path, "PYTHONWARNINGS": "error"}


def test_python_blocks_run(hub, tmp_path):
    codes = blocks("python")
    assert len(codes) == 9
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(codes)], env=hub, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[(4, 384), (3, 384)]" in done.stdout
    assert "Beijing is the capital of China." in done.stdout
    assert "': 0." in done.stdout  # a sparse weight


def test_embedding_and_reranking_take_six_lines():
    embed, _, _, _, rerank = blocks("python")[:5]
    assert [len([line for line in code.splitlines() if line]) for code in (embed, rerank)] == [5, 5]


def test_shell_blocks_run(hub, tmp_path):
    (code,) = blocks("sh")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], env=hub, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert '"embedding": [' in done.stdout
    assert "self-check passed" in done.stdout
    assert (tmp_path / "vectors.jsonl").read_text().startswith('{"id": 7, "body": "a text", "embedding": [')
    assert (tmp_path / "vectors.npy").stat().st_size == 128 + 2 * 384 * 4


def test_commands_are_one_each():
    commands = re.findall(r"<!-- command: (.*?) -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert [name for name, _ in commands] == ["set-up", "test"]
    assert all(code.count("\n") == 1 for _, code in commands)


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.tables import fill

    assert fill(README) == README
