"""`modernbert-lite rerank`, `fill-mask`, `info` and `doctor`."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from cli_cases import TEXTS, assert_one_line, expected, jsonl, run  # noqa: F401

import modernbert_lite
from modernbert_lite import Embedder
from modernbert_lite.ops import half, onednn


def test_rerank_without_a_model_ranks_by_cosine_and_says_so(run):
    result = run("rerank", "someone plays music", *TEXTS)
    assert result.status == 0
    header, *rows = result.text.splitlines()
    assert header.split() == ["rank", "score", "document", "text"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    scores = [float(row.split()[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[2].split()[2] == "1"  # the stocks
    assert "'tiny'" in result.err
    assert "cosine" in result.err
    model = Embedder.from_pretrained("tiny")
    expected = model.similarity(model.encode("someone plays music"), model.encode(TEXTS))[0]
    assert scores == [round(float(s), 4) for s in sorted(expected, reverse=True)]


def test_rerank_to_jsonl(run, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"body": text} for text in TEXTS])
    result = run("rerank", "music", "-i", path, "--field", "body", "--format", "jsonl", "--top-k", "2")
    assert [set(record) for record in result.records] == [{"corpus_id", "score", "text"}] * 2
    assert all(TEXTS[r["corpus_id"]] == r["text"] for r in result.records)
    assert run("rerank", "music", "--format", "jsonl", stdin=b"").out == b""


def test_rerank_reads_documents_from_standard_input(run):
    result = run("rerank", "music", "--format", "jsonl", stdin="\n".join(TEXTS).encode())
    assert sorted(r["corpus_id"] for r in result.records) == [0, 1, 2]


def test_rerank_shows_long_documents_on_one_line(run):
    result = run("rerank", "music", "line one\nline two\t" + "x" * 500, "short")
    assert len(result.text.splitlines()) == 3
    assert max(map(len, result.text.splitlines())) < 150


def test_rerank_with_a_reranker_is_a_cross_encoder(run, make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_labels=1, num_hidden_layers=2)
    result = run("rerank", "music", *TEXTS, "--model", folder, "--format", "jsonl")
    expected = modernbert_lite.Reranker.from_pretrained(folder).rank("music", TEXTS, return_documents=True)
    assert [r["corpus_id"] for r in result.records] == [r["corpus_id"] for r in expected]
    assert [r["score"] for r in result.records] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert result.err == ""
    refused = run("embed", "a", "--model", folder)
    assert refused.status == 1
    assert_one_line(refused.err, "use Reranker")


def test_rerank_refuses_an_embedder_by_name(run):
    result = run("rerank", "music", "a", "--model", "tiny")
    assert result.status == 1
    assert_one_line(result.err, "use Embedder")


def test_fill_mask(run, make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", num_hidden_layers=2)
    texts = ["The [MASK] is here.", "[MASK] and [MASK]"]
    result = run("fill-mask", *texts, "--model", folder, "--top-k", "3", "--format", "jsonl")
    expected = modernbert_lite.FillMask.from_pretrained(folder).predict(texts, top_k=3)
    assert [record["text"] for record in result.records] == texts
    for record, masks in zip(result.records, expected, strict=True):
        assert [[t["token_id"] for t in m] for m in record["masks"]] == [[t["token_id"] for t in m] for m in masks]
    table = run("fill-mask", *texts, "--model", folder, "--top-k", "3").text.splitlines()
    assert table[0].split() == ["text", "mask", "token", "probability"]
    assert [row.split()[:2] for row in table[1:]] == [["0", "0"]] * 3 + [["1", "0"]] * 3 + [["1", "1"]] * 3
    missing = run("fill-mask", "no mask", "--model", folder)
    assert missing.status == 1
    assert_one_line(missing.err, "text 0 has no [MASK]")


def test_info(run):
    facts = json.loads(run("info", "--json").text)
    assert facts["architecture"] == "ModernBertModel"
    assert facts["use"] == "Embedder"
    assert facts["hidden size"] == 384
    assert facts["vocabulary"] == 16384
    assert facts["layers"] == "4 (2 global)"
    assert facts["local window"] == "128 (64 on each side)"
    assert facts["pooling"] == "mean"
    assert facts["normalizes"] is True
    assert facts["max length"] == 512
    assert facts["prompts"] == {"query": "", "document": ""}
    size = (Path(modernbert_lite.__file__).parent / "tiny" / "model.safetensors").stat().st_size
    assert facts["files"]["model.safetensors"] == size
    assert "1_Pooling/config.json" in facts["files"]
    bits = {"F32": 4, "F16": 2, "BF16": 2}[facts["stored as"]]
    assert 0 < size - bits * facts["parameters"] < 20_000
    table = run("info", "tiny").text
    for key in facts:
        assert re.search(rf"^{re.escape(key)}  ", table, re.MULTILINE)


def test_info_of_a_classifier(run, make_checkpoint):
    folder, model = make_checkpoint(
        "ModernBertForSequenceClassification",
        num_hidden_layers=1,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    facts = json.loads(run("info", folder, "--json").text)
    assert (facts["use"], facts["labels"], facts["pooling"]) == ("Classifier or Reranker", ["no", "yes"], "none said")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_doctor(run):
    start = time.perf_counter()
    result = run("doctor")
    assert result.status == 0
    assert time.perf_counter() - start < 15
    for what in ("torch", "device", "backend of linear", "backend of attention", "C compiler for Triton", "threads"):
        assert re.search(rf"^{what} +\S", result.text, re.MULTILINE), what
    assert "self-check passed" in result.text
    if re.search(r"^device +cpu$", result.text, re.MULTILINE):
        for dtype in ("float32", "float16", "bfloat16", "int8"):
            assert re.search(rf"^{dtype} on this CPU +\w.*: [1-9]\d* GFLOP/s *$", result.text, re.MULTILINE), dtype


def test_doctor_says_what_a_cpu_without_products_in_16_bits_and_8_bits_does(run, monkeypatch):
    monkeypatch.setattr(onednn, "supported", lambda dtype: dtype == torch.float32)
    for fbgemm in {half.works(), False}:
        monkeypatch.setattr(half, "works", lambda known=fbgemm: known)
        more, text = "" if fbgemm else ", converted for each product", run("doctor").text
        for dtype in ("float16", "bfloat16"):
            line = rf"^{dtype} on this CPU +16-bit weights, float32 sums{more}: [1-9]\d* GFLOP/s *$"
            assert re.search(line, text, re.MULTILINE), text


def test_doctor_fails_when_the_numbers_are_wrong(run, monkeypatch):
    right = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, *a, **k: right(self, *a, **k)[:, ::-1] * -1 + 0.3)
    result = run("doctor")
    assert result.status == 1
    assert_one_line(result.err, "self-check failed")


def test_doctor_names_an_unknown_backend(run, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "cuda")
    result = run("doctor")
    assert result.status == 2
    assert_one_line(result.err, "MODERNBERT_LITE_BACKEND is 'cuda'")
