"""What the shell takes for texts: txt, jsonl, csv, tsv, json; checked whole before the work, refused by name."""

import csv
import io
import json
import sys

import numpy as np
import pytest

from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli
from modernbert_lite.cli import inputs as record_files
from modernbert_lite.reading import OptionError


def records(content, format, field="text"):
    content = content if isinstance(content, bytes) else content.encode()
    return list(record_files.records(io.BytesIO(content), format, field, "FILE"))


@pytest.fixture
def run(monkeypatch, capfd):
    """run("embed", ..) -> (status, records on stdout, stderr), without a model: a vector is (characters, 1)."""

    def stream(self, texts, **_):
        for text in texts:
            yield np.array([[len(text), 1.0]], np.float32)

    class Model:
        pass

    Model.stream = stream
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: Model())

    def call(*argv):
        capfd.readouterr()
        try:
            status = cli.main([str(part) for part in argv])
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return status, [json.loads(line) for line in out.split("\n")[:-1]], err

    return call


TABLE = [{"id": "1", "text": 'says "hello",\nand more'}, {"id": "2", "text": "naïve\t猫"}, {"id": "", "text": ""}]


def table(delimiter):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return file.getvalue()


# ---- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",")),
        ("A.CSV", "\ufeff" + table(",")),
        ("a.tsv", table("\t")),
        ("a.tab", table("\t")),
        ("a.json", json.dumps(TABLE, indent=1)),
        ("A.JSON", "\ufeff" + json.dumps(TABLE)),
        ("A.JSONL", "".join(json.dumps(record) + "\n" for record in TABLE)),
        ("a.NdJson", "".join(json.dumps(record) + "\r\n\r\n" for record in TABLE)),
    ],
)
def test_each_ending_is_read_as_what_it_says(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    status, out, err = run("embed", "--model", "tiny", "-i", tmp_path / name)
    assert (status, err) == (0, "")
    assert out == [{**record, "embedding": [len(record["text"]), 1]} for record in TABLE]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "a", "a.b.unknown", "README"])
def test_other_endings_are_texts_by_line(run, tmp_path, name):
    (tmp_path / name).write_text("id,text\n1,one\n")
    assert [record["text"] for record in run("embed", "-m", "tiny", "-i", tmp_path / name)[1]] == ["id,text", "1,one"]


@pytest.mark.parametrize(
    "ending", ["gz", "jsonl.gz", "ZST", "parquet", "xlsx", "pdf", "docx", "npy", "html", "xml", "yaml", "png", "zip"]
)
def test_endings_whose_lines_are_no_texts_are_refused_by_name(run, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text("one\n")
    status, out, err = run("embed", "-m", "tiny", "-i", path)
    assert (status, out) == (2, [])
    assert err.startswith(f"modernbert-lite: --input {path}: its ending names no format that is read (txt, jsonl, csv,")
    status, out, _ = run("embed", "-m", "tiny", "-i", path, "--input-format", "txt")
    assert (status, [record["text"] for record in out]) == (0, ["one"])


def test_the_given_format_wins_over_the_ending(run, tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    status, _, err = run("embed", "-m", "tiny", "-i", tmp_path / "a.json")
    assert status == 1
    assert "a.json: not valid JSON: Extra data" in err
    assert "add --input-format jsonl" in err
    out = run("embed", "-m", "tiny", "-i", tmp_path / "a.json", "--input-format", "jsonl")[1]
    assert [record["text"] for record in out] == ["one", "two"]


def test_standard_input_is_what_it_is_said_to_be(run, monkeypatch):
    for format, content in (("csv", table(",")), ("tsv", table("\t")), ("json", json.dumps(TABLE))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        status, out, _ = run("embed", "-m", "tiny", "--input-format", format)
        assert (status, [record["text"] for record in out]) == (0, [record["text"] for record in TABLE])


def test_other_commands_read_tables_too(monkeypatch, tmp_path):
    (tmp_path / "a.csv").write_text("body,n\none,1\ntwo,2\n")
    taken = []
    monkeypatch.setattr(cli, "_rerank", lambda args: taken.extend(cli._read(args)))
    assert cli.main(["rerank", "q", "-i", str(tmp_path / "a.csv"), "--field", "body"]) == 0
    assert taken == [{"body": "one", "n": "1"}, {"body": "two", "n": "2"}]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_column_is_named_by_field():
    assert records("a,b\n1,one\n2,two\n", "csv", "b") == [{"a": "1", "b": "one"}, {"a": "2", "b": "two"}]


def test_empty_lines_and_crlf_are_no_rows():
    assert records("text\r\n\r\none\r\n\r\n", "csv") == [{"text": "one"}]
    assert records('text\n""\n', "csv") == [{"text": ""}]


def test_a_cell_may_be_long():
    """Python's own limit is 131,072 characters."""
    assert records("text\n" + "x" * 200_000 + "\n", "csv") == [{"text": "x" * 200_000}]


BAD_TABLES = {
    "short row": (b"a,text\n1,one\n2\n", "FILE, line 3: it has 1 cells, and the header has 2"),
    "long row": (b'a,text\n"x\ny",one\n2,two,3\n', "FILE, line 4: it has 3 cells"),
    "no column": (b"a;text\n1;one\n", "FILE, line 1: the header has no column 'text': ['a;text'] (see --field)"),
    "two columns": (b"text,text\n1,2\n", "FILE, line 1: the header has more than one column 'text': ['text', 'text']"),
    "two other columns": (b"a,a,text\n1,2,3\n", "FILE, line 1: two columns of the header have the same name"),
    "nothing": (b"", "FILE is empty; a first line with the columns' names is needed"),
    "quote": (b'text\n"a"b\n', "FILE, line 2: ',' expected after '\"'"),
    "open quote": (b'text\none\n"two\nthree\n', "FILE, line 3: unexpected end of data"),
    "no UTF-8": (b"text\ncaf\xe9\n", "FILE, line 2: not UTF-8"),
    "UTF-16": ("text\none\n".encode("utf-16"), "FILE starts with the mark of UTF-16"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_malformed_table_is_refused_by_line(name):
    content, message = BAD_TABLES[name]
    with pytest.raises(ValueError) as error:
        records(content, "csv")
    assert str(error.value).startswith(message)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_json_is_an_array_of_objects_or_of_strings():
    assert records('["one", "two"]', "json") == [{"text": "one"}, {"text": "two"}]
    assert records('[{"b": "one", "n": 1}]', "json", "b") == [{"b": "one", "n": 1}]
    assert records("[]", "json") == []


BAD_JSON = {
    "object": ('{"text": "one"}', "FILE holds a JSON dict; an array of objects or of strings is needed"),
    "string": ('"one"', "FILE holds a JSON str; an array"),
    "number": ("[7]", "FILE, item 0: it is no object"),
    "empty": ("", "FILE: not valid JSON"),
    "no field": ('["one", {"body": "two"}]', "FILE, item 1: its 'text' is missing"),
    "no string": ('[{"text": null}]', "FILE, item 0: its 'text' is NoneType"),
    "lines": ('{"text": "one"}\n{"text": "two"}\n', "FILE: not valid JSON: Extra data"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_malformed_json_is_refused_by_item(name):
    content, message = BAD_JSON[name]
    with pytest.raises(ValueError) as error:
        records(content, "json")
    assert str(error.value).startswith(message)


def test_strings_have_no_field_of_another_name():
    with pytest.raises(ValueError, match="FILE, item 0: it is no object; an object with a string in 'body' is needed"):
        records('["one"]', "json", "body")


BAD_VALUES = {
    "NaN": ('{"text": "a", "score": NaN}', "NaN is no JSON value; write null"),
    "Infinity": ('{"text": "a", "deep": [{"score": -Infinity}]}', "-Infinity is no JSON value"),
    "beyond float": ('{"text": "a", "score": 1e999}', "the number '1e999' is too large"),
    "too long": ('{"text": "a", "n": ' + "9" * 5_000 + "}", "not valid JSON: Exceeds the limit"),
    "twice": ('{"text": "a", "text": "b"}', "the key 'text' comes twice"),
    "twice inside": ('{"text": "a", "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
    "deep": ('{"text": "a", "b": ' + "[" * 200 + "]" * 200 + "}", "it is nested more than 100 levels deep"),
    "half a pair": ('{"text": "a\\ud83d"}', "its 'text' holds half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("format", ["jsonl", "json"])
def test_values_that_no_json_could_hold_are_refused_before_the_work(name, format):
    """What can't be written again, or is read differently by others."""
    line, message = BAD_VALUES[name]
    good = '{"text": "fine"}'
    content = f"{good}\n{line}\n" if format == "jsonl" else f"[{good}, {line}]"
    with pytest.raises(ValueError) as error:
        records(content, format)
    assert message in str(error.value)
    assert str(error.value).startswith("FILE, line 2: " if format == "jsonl" else "FILE")
    assert len(str(error.value)) < 500


def test_whole_numbers_and_nesting_are_kept():
    record = {"text": "a", "n": 10**400, "x": 0.1, "deep": [[[{"a": [None, True]}]]], "e": 5e-324}
    assert records(json.dumps(record), "jsonl") == [record]


# ---- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-16-be with a mark"])
def test_utf_16_and_32_are_named_with_or_without_their_mark(format, encoding):
    mark, encoding = ("\ufeff" if "mark" in encoding else ""), encoding.partition(" ")[0]
    text = {"txt": "hello\nyou\n", "csv": "text\none\n", "json": '["one"]'}.get(format, '{"text": "one"}\n')
    with pytest.raises(
        ValueError, match=r"only UTF-8 is read: convert it, as by iconv -f (UTF-\d\d\w*) -t UTF-8"
    ) as error:
        records((mark + text).encode(encoding), format)
    named = str(error.value).partition("iconv -f ")[2].split()[0]
    assert encoding.upper().replace("-LE", "LE").replace("-BE", "BE").startswith(named)


def test_a_nul_alone_is_text():
    assert records(b"a\0b\nc\0\n\0\n", "txt") == [{"text": "a\0b"}, {"text": "c\0"}, {"text": "\0"}]


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_field_of_the_vectors_can_not_be_the_texts(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"embedding": "one"}\n')
    argv = ("embed", "-m", "tiny", "-i", tmp_path / "a.jsonl", "--field", "embedding")
    status, out, err = run(*argv)
    assert (status, out) == (2, [])
    assert "--field embedding: jsonl output has the vector there" in err
    assert run(*argv, "-o", tmp_path / "v.npy")[0] == 0
    assert np.load(tmp_path / "v.npy").tolist() == [[3, 1]]


def test_an_old_embedding_is_replaced(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"embedding": [9, 9], "text": "one", "id": 7}\n')
    out = run("embed", "-m", "tiny", "-i", tmp_path / "a.jsonl")[1]
    assert out == [{"text": "one", "id": 7, "embedding": [3, 1]}]


def test_a_field_of_plain_text_or_of_arguments_is_refused(run, tmp_path):
    (tmp_path / "a.txt").write_text("")
    for argv in (["-i", tmp_path / "a.txt", "--field", "b"], ["one", "--field", "b"], ["one", "--input-format", "csv"]):
        status, out, err = run("embed", "-m", "tiny", *argv)
        assert (status, out) == (2, [])
        assert "--field" in err
    with pytest.raises(OptionError, match="--field b needs jsonl input"):
        records("", "txt", "b")


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "1.0", "9" * 5_000, "4294967296", "²"])
@pytest.mark.parametrize("option", ["--batch-tokens", "--max-seq-length", "--threads", "--truncate-dim"])
def test_a_number_out_of_range_is_one_line(run, option, value):
    status, out, err = run("embed", "one", f"{option}={value}")
    assert (status, out) == (2, [])
    (line,) = err.splitlines()
    assert f"argument {option}: " in line
    assert "is no whole number from 1 to 2147483647" in line


def test_scores_that_are_not_finite_are_no_json(monkeypatch, capsys):
    monkeypatch.setattr("modernbert_lite.cli.about.describe", lambda *_, **__: {"theta": float("inf")})
    assert cli.main(["info", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "the result holds NaN or infinity" in err


@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "json"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(monkeypatch, format):
    monkeypatch.setattr(record_files, "_LONGEST_CELL", 1 << 20)

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    with pytest.raises(ValueError, match="FILE, line 1: it has more than 1 MiB; break it into lines"):
        list(record_files.records(io.BufferedReader(Endless()), format, "text", "FILE"))
