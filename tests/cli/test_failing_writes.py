"""Full disks and failures in the middle lose no finished row."""

import json
import os
import re
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from cli_cases import POSIX, assert_one_line, jsonl, process, readable_rows, run  # noqa: F401

from modernbert_lite import Embedder


@POSIX
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("format", ["jsonl", "npy"])
def test_a_full_disk_behind_standard_output_is_one_line(format):
    with open("/dev/full", "wb") as full:
        started = process("embed", "one", "--model", "tiny", "--format", format, stdout=full)
        _, err = started.communicate(timeout=60)
    assert started.returncode == 1
    assert_one_line(err.decode(), "No space left on device")


@pytest.fixture
def quota():
    """with quota(n): no file may grow over n bytes, like a disk that fills up. Nor may the file that pytest reports to,
    if that is where its output goes: so only as long as needed."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def full(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return full


@pytest.fixture
def small_windows(monkeypatch):
    """4 texts are read, embedded and written at a time."""
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 4)


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_a_disk_that_fills_up_loses_nothing(run, tmp_path, quota, small_windows, format):
    """The old file stays, what is finished is kept as a valid file, the shell says so."""
    out, partial = tmp_path / f"v.{format}", tmp_path / f"v.{format}.partial"
    out.write_bytes(b"an older result")
    texts = [f"text {i}" for i in range(100)]
    with quota(50 * (4_800 if format == "jsonl" else 1_536)):
        result = run("embed", "--model", "tiny", "-o", out, stdin="\n".join(texts).encode())
    assert result.status == 1
    kept = readable_rows(partial, format)
    assert 4 <= len(kept) < 100
    assert np.abs(kept - Embedder.from_pretrained("tiny").encode(texts[: len(kept)])).max() <= 1e-5
    assert out.read_bytes() == b"an older result"
    assert sorted(os.listdir(tmp_path)) == [out.name, partial.name]
    lines = result.err.splitlines()
    assert lines[0] == f"modernbert-lite: {len(kept)} finished rows are in {partial}"
    assert re.search("File too large|No space left", lines[1])
    assert len(lines) == 2


def test_a_disk_that_fills_up_while_the_npz_is_made_loses_nothing(run, tmp_path, quota, small_windows):
    out, partial = tmp_path / "v.npz", tmp_path / "v.npz.partial"
    out.write_bytes(b"an older result")
    with quota(128 + 8 * 1_536 + 50):  # all vectors fit, and the archive's own bytes don't
        result = run("embed", "--model", "tiny", "-o", out, stdin=b"text\n" * 8)
    assert result.status == 1
    assert "Traceback" not in result.err
    assert out.read_bytes() == b"an older result"
    assert readable_rows(partial, "npz").shape == (8, 384)
    assert sorted(os.listdir(tmp_path)) == [out.name, partial.name]


@pytest.mark.parametrize("format", ["jsonl", "npy"])
def test_an_interruption_inside_a_block_leaves_no_torn_row(run, tmp_path, monkeypatch, small_windows, format):
    from modernbert_lite.cli import writers

    written = 0
    line, rows = writers._json_line, np.ascontiguousarray

    def interrupted(function, after):
        def call(*args):
            nonlocal written
            written += 1
            if written > after:
                raise KeyboardInterrupt
            return function(*args)

        return call

    monkeypatch.setattr(writers, "_json_line", interrupted(line, 6))
    monkeypatch.setattr(writers.np, "ascontiguousarray", interrupted(rows, 1))
    out = tmp_path / f"v.{format}"
    result = run("embed", "--model", "tiny", "-o", out, stdin=b"text\n" * 12)
    assert result.status == 130
    kept = readable_rows(tmp_path / f"v.{format}.partial", format)
    assert 4 <= len(kept) <= 6
    assert result.err.splitlines()[0] == f"modernbert-lite: {len(kept)} finished rows are in {out}.partial"


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_a_failure_in_the_middle_keeps_what_is_finished(run, tmp_path, small_windows, format):
    out = tmp_path / f"v.{format}"
    out.write_bytes(b"an older result")
    stdin = b"".join(b"text %d\n" % i for i in range(9)) + b"\xff\n"
    result = run("embed", "--model", "tiny", "-o", out, stdin=stdin)
    assert result.status == 1
    lines = result.err.splitlines()
    assert lines[0] == f"modernbert-lite: 8 finished rows are in {out}.partial"
    assert "line 10: not UTF-8" in lines[1]
    assert out.read_bytes() == b"an older result"
    assert len(readable_rows(tmp_path / f"v.{format}.partial", format)) == 8


def test_what_an_earlier_run_finished_is_not_written_over(run, tmp_path):
    (tmp_path / "v.npy.partial").write_bytes(b"of an earlier run")
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert "v.npy.partial holds what an earlier run finished" in result.err
    assert (tmp_path / "v.npy.partial").read_bytes() == b"of an earlier run"


@POSIX
def test_output_follows_a_link_and_spares_what_is_no_file(run, tmp_path):
    (tmp_path / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("real.npy")
    assert run("embed", "one", "--model", "tiny", "-o", tmp_path / "link.npy").status == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "real.npy").shape == (1, 384)
    os.mkfifo(tmp_path / "pipe.npy")
    assert run("embed", "one", "--model", "tiny", "-o", tmp_path / "pipe.npy").status == 2
    assert (tmp_path / "pipe.npy").is_fifo()


def test_records_keep_their_other_fields_whatever_they_hold(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "ok", "note": "\\ud800", "embedding": [1]}\n')
    assert run("embed", "--model", "tiny", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").status == 0
    line = (tmp_path / "out.jsonl").read_text()
    assert line.count('"embedding"') == 1
    assert json.loads(line)["note"] == "\ud800"


def test_options_that_the_model_does_not_have_are_bad_usage(run):
    for option in (["--truncate-dim", "5000"], ["--prompt-name", "nope"], ["--device", "banana"]):
        assert run("embed", "one", "--model", "tiny", *option).status == 2


def test_a_terminal_s_commands_are_shown_not_obeyed(run):
    result = run("rerank", "q", "evil \x1b]0;title\x07 text")
    assert b"\x1b" not in result.out
    assert b"\\x1b]0;title\\x07" in result.out


# ---- Ctrl-C and pipes ----------------------------------------------------------------------------------------------
