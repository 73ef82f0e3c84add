"""Ctrl-C, closed pipes, and terminals that can't show a text."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_cases import POSIX, assert_one_line, jsonl, process, readable_rows, run  # noqa: F401

from modernbert_lite import Embedder


@POSIX
@pytest.mark.parametrize("format", ["npy", "jsonl"])
def test_ctrl_c_keeps_finished_rows(tmp_path, format):
    out, partial = tmp_path / f"v.{format}", tmp_path / f"v.{format}.partial"
    # Its own handler of SIGINT, which is ignored where the tests run in a shell's background.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from modernbert_lite import cli; from modernbert_lite.pipeline import feed\n"
    code += "feed._WINDOW_TEXTS = 64; sys.exit(cli.main())"
    with process("embed", "--model", "tiny", "-o", out, code=code) as started:
        # One whole window, and a beginning of the next, whose end never comes.
        started.stdin.write(b"".join(b"text %d\n" % i for i in range(64 + 10)))
        started.stdin.flush()
        size, deadline = 0, time.monotonic() + 60
        while time.monotonic() < deadline and not size:  # until the first window is written
            time.sleep(0.1)
            size = partial.stat().st_size // 65_536 if partial.exists() else 0
        time.sleep(1.0)
        started.send_signal(signal.SIGINT)
        err = started.stderr.read().decode()
    assert started.returncode == 130
    assert err.splitlines() == [
        f"modernbert-lite: 64 finished rows are in {partial}",
        "modernbert-lite: interrupted",
    ]
    assert readable_rows(partial, format).shape == (64, 384)
    assert os.listdir(tmp_path) == [partial.name]


def test_ctrl_c_before_anything_is_finished_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Embedder, "stream", interrupted)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 130
    assert_one_line(result.err, "interrupted")
    assert os.listdir(tmp_path) == []


@POSIX
def test_ctrl_c_while_the_model_loads_is_one_line(run, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modernbert_lite.checkpoint.open.load_weights", interrupted)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 130
    assert_one_line(result.err, "interrupted")


@POSIX
def test_a_closed_pipe_is_quiet(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("text\n" * 300)
    with process("embed", "--model", "tiny", "-i", path, stdin=subprocess.DEVNULL) as started:
        started.stdout.readline()
        started.stdout.close()  # as `| head -1` does
        err = started.stderr.read().decode()
    assert started.returncode in (0, 1)
    assert err == ""


@POSIX
def test_a_whole_pipeline_in_the_shell():
    command = f'printf "one\\ntwo\\n" | {sys.executable} -m modernbert_lite embed --model tiny --format npy | cat'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert done.stderr == b""
    assert np.load(io.BytesIO(done.stdout)).shape == (2, 384)


@pytest.mark.parametrize("format", ["table", "jsonl"])
def test_text_that_the_terminal_can_not_show_is_no_failure(run, monkeypatch, format):
    """Hours of work must not end in a UnicodeEncodeError of print (Windows, PYTHONIOENCODING, LC_ALL=POSIX)."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    result = run("rerank", "music", "Ж猫 and naïve", "--format", format)
    assert result.status == 0, result.err
    assert b"and na" in narrow.buffer.getvalue()


# ---- rerank, fill-mask, info, doctor -------------------------------------------------------------------------------
