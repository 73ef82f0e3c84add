"""`modernbert-lite embed`."""

import json
import os

import numpy as np
import pytest
from cli_cases import TEXTS, assert_one_line, expected, jsonl, read_vectors, run  # noqa: F401

from modernbert_lite import Embedder


def test_embed_arguments_to_jsonl(run, expected):
    result = run("embed", *TEXTS)
    assert result.status == 0
    assert [list(record) for record in result.records] == [["text", "embedding"]] * 3
    assert [record["text"] for record in result.records] == TEXTS
    # Nine digits give every float32 back.
    assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6
    assert_one_line(result.err, "'tiny'", "gte-modernbert-base", "--model")


def test_a_named_model_says_nothing(run):
    assert run("embed", "one", "--model", "tiny").err == ""


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_embed_to_a_file_and_to_stdout_are_the_same(run, tmp_path, expected, format):
    out = tmp_path / f"vectors.{format}"
    result = run("embed", *TEXTS, "--model", "tiny", "-o", out)
    assert (result.status, result.out, result.err) == (0, b"", "")
    piped = run("embed", *TEXTS, "--model", "tiny", "--format", format)
    assert np.abs(read_vectors(out, format) - expected).max() <= 1e-6
    assert np.array_equal(read_vectors(out, format), read_vectors(piped.out, format))
    assert read_vectors(out, format).dtype == np.float32
    assert os.listdir(tmp_path) == [out.name]


def test_embed_format_wins_over_the_ending(run, tmp_path):
    run("embed", "one", "--model", "tiny", "-o", tmp_path / "data.bin", "--format", "npy")
    assert np.load(tmp_path / "data.bin").shape == (1, 384)
    run("embed", "one", "--model", "tiny", "-o", tmp_path / "UPPER.NPY")
    assert np.load(tmp_path / "UPPER.NPY").shape == (1, 384)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_embed_reads_standard_input_by_lines(run, expected, ending):
    content = (ending or "\n").join(TEXTS) + ending
    for argv in ((), ("--input", "-")):
        result = run("embed", "--model", "tiny", *argv, stdin=content.encode())
        assert [record["text"] for record in result.records] == TEXTS
        assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6


def test_an_empty_line_is_an_empty_text(run):
    result = run("embed", "--model", "tiny", stdin=b"one\n\ntwo\n")
    assert [record["text"] for record in result.records] == ["one", "", "two"]


def test_a_byte_order_mark_is_no_text(run, tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [record["text"] for record in run("embed", "--model", "tiny", "-i", path).records] == ["one", "two"]


def test_other_line_separators_and_nul_are_text(run):
    result = run("embed", "--model", "tiny", stdin="a\u2028b\x0bc\x0c\0d\n".encode())
    assert [record["text"] for record in result.records] == ["a\u2028b\x0bc\x0c\0d"]


def test_embed_reads_jsonl_and_keeps_its_fields(run, tmp_path, expected):
    path = jsonl(tmp_path / "in.jsonl", [{"id": i, "body": text, "x": None} for i, text in enumerate(TEXTS)])
    result = run("embed", "--model", "tiny", "--input", path, "--field", "body")
    assert [list(record) for record in result.records] == [["id", "body", "x", "embedding"]] * 3
    assert [record["id"] for record in result.records] == [0, 1, 2]
    assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6
    piped = run("embed", "--model", "tiny", "--input-format", "jsonl", "--field", "body", stdin=path.read_bytes())
    assert piped.out == result.out


def test_embed_of_nothing(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for format, shape in (("npy", (0, 384)), ("npz", (0, 384))):
        out = tmp_path / f"e.{format}"
        assert run("embed", "--model", "tiny", "-i", tmp_path / "empty.txt", "-o", out).status == 0
        assert read_vectors(out, format).shape == shape
    result = run("embed", "--model", "tiny", "--format", "jsonl")
    assert (result.status, result.out) == (0, b"")
    out = tmp_path / "t.npy"
    run("embed", "--model", "tiny", "-o", out, "--truncate-dim", "96")
    assert np.load(out).shape == (0, 96)


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float16", "float16", 384), ("int8", "int8", 384), ("binary", "int8", 48), ("ubinary", "uint8", 48)],
)
def test_embed_precision(run, tmp_path, precision, dtype, width):
    out = tmp_path / "v.npy"
    run("embed", *TEXTS, "--model", "tiny", "-o", out, "--precision", precision)
    vectors = np.load(out)
    assert (vectors.shape, vectors.dtype) == ((3, width), np.dtype(dtype))
    assert np.array_equal(vectors, Embedder.from_pretrained("tiny").encode(TEXTS, precision=precision))
    lines = run("embed", *TEXTS, "--model", "tiny", "--precision", precision).records
    assert np.allclose([line["embedding"] for line in lines], vectors.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("format", ["npy", "jsonl"])
def test_a_failure_before_the_range_is_known_keeps_the_rows_in_float32(
    run, tmp_path, monkeypatch, expected, precision, format
):
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 2)
    out = tmp_path / f"v.{format}"
    argv = ("embed", *TEXTS[:2], "word " * 600, "--model", "tiny", "--precision", precision, "--on-long", "error")
    result = run(*argv, "-o", out)
    assert result.status == 1
    lines = result.err.splitlines()
    assert lines[0].endswith(f"what is finished is kept in float32: {precision} needs the range of all vectors")
    assert lines[1].endswith(f"2 finished rows are in {out}.partial")
    assert len(lines) == 3
    assert "text 2 " in lines[2]
    for advice in (".finished", "`", "rows were finished"):
        assert advice not in result.err
    partial = tmp_path / f"v.{format}.partial"
    if format == "npy":
        kept = np.load(partial)
        assert kept.dtype == np.float32
    else:
        records = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
        assert [record["text"] for record in records] == TEXTS[:2]
        kept = np.array([record["embedding"] for record in records])
    assert np.abs(kept - expected[:2]).max() <= 1e-5
    result = run(*argv)
    assert (result.status, result.out) == (1, b"")


def test_one_text_has_no_range_for_int8(run, tmp_path):
    result = run("embed", "one", "--model", "tiny", "--precision", "int8", "-o", tmp_path / "v.npy")
    assert result.status == 2
    assert_one_line(result.err, "--precision int8: one text has no range to be cut by; give two or more")
    assert os.listdir(tmp_path) == []


def test_float16_that_overflows_names_the_text_of_a_later_block(run, tmp_path, monkeypatch):
    blocks = [np.zeros((2, 3), np.float32), np.array([[0, 0, 0], [0, 1e5, 0]], np.float32)]

    def stream(self, texts, **_):
        list(texts)
        return iter(blocks)

    monkeypatch.setattr(Embedder, "stream", stream)
    result = run("embed", *"abcd", "--model", "tiny", "--precision", "float16", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert result.err.splitlines()[1].endswith("embedding 3 is not finite in float16")


def test_embed_options(run, tmp_path):
    model = Embedder.from_pretrained("tiny")
    out = tmp_path / "v.npy"
    run("embed", "one", "--model", "tiny", "-o", out, "--truncate-dim", "96", "--prompt", "find: ", "--normalize")
    assert np.abs(np.load(out) - model.encode(["find: one"], truncate_dim=96)).max() <= 1e-6
    run("embed", "one two three four five", "--model", "tiny", "-o", out, "--max-seq-length", "5", "--dtype", "float32")
    assert np.abs(np.load(out) - model.encode(["one two three"])).max() <= 1e-6
    result = run("embed", "one", "--model", "tiny", "--prompt-name", "nonsense")
    assert result.status in (1, 2)
    assert_one_line(result.err, "prompt_name is 'nonsense'; this model has ['document', 'query']")


def test_over_long_texts_are_counted_in_one_line(run):
    result = run("embed", "--model", "tiny", stdin=(b"word " * 600 + b"\nshort\n") * 2)
    assert (result.status, len(result.records)) == (0, 4)
    assert_one_line(result.err, "2 of 4 texts were longer than 512 tokens and were cut")


def test_over_long_texts_may_be_an_error(run, tmp_path):
    out = tmp_path / "v.npy"
    result = run("embed", "--model", "tiny", "--on-long", "error", "-o", out, stdin=b"short\n" + b"word " * 600)
    assert result.status == 1
    assert_one_line(result.err, "text 1 is longer than 512 tokens", "truncate")
    assert os.listdir(tmp_path) == []


# ---- bad lines -----------------------------------------------------------------------------------------------------
