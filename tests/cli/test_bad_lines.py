"""Bad lines of the input are found before the work, and named."""

import os

import pytest
from cli_cases import assert_one_line, run  # noqa: F401

from modernbert_lite import Embedder

BAD_LINES = {
    "no JSON": (b'{"text": "a"', "not valid JSON"),
    "no object": (b'["a"]', "it is no object"),
    "no field": (b'{"body": "a"}', "its 'text' is missing"),
    "no string": (b'{"text": 7}', "its 'text' is int"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_found_before_the_work_starts(run, tmp_path, monkeypatch, name):
    line, message = BAD_LINES[name]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    path.write_bytes(b'{"text": "fine"}\n' * 2_999 + line + b'\n{"text": "fine"}\n')
    out.write_bytes(b"an older result")
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run("embed", "--model", "tiny", "--input", path, "--output", out)
    assert result.status == 1
    assert_one_line(result.err, f"{path}, line 3000", message)
    assert len(result.err) < 1_000
    assert out.read_bytes() == b"an older result"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.npy"]


def test_a_bad_line_on_standard_input_is_named(run):
    result = run("embed", "--model", "tiny", stdin=b"fine\n\xff\xfe\n")
    assert result.status == 1
    assert_one_line(result.err, "standard input, line 2: not UTF-8")


def test_a_folder_as_input_is_one_line(run, tmp_path):
    result = run("embed", "--model", "tiny", "--input", tmp_path)
    assert result.status in (1, 2)
    assert_one_line(result.err)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_is_one_line(run, tmp_path):
    tmp_path.chmod(0o500)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert_one_line(result.err, "v.npy")


# ---- writes that fail ----------------------------------------------------------------------------------------------
