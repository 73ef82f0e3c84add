"""The shell commands with standard streams that are closed or full, in other locales, with warnings as errors."""

import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli
from modernbert_lite.cli import console

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shells and devices")
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
COMMAND = f"'{sys.executable}' -m modernbert_lite"


def shell(command, **environment):
    return subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def assert_failed_before_work(done, message):
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("modernbert-lite: ")
    assert message in line
    assert "bundled" not in line


def test_with_an_output_standard_output_may_be_closed(tmp_path):
    done = shell(f"{COMMAND} embed one --model tiny -o '{tmp_path}/v.npy' >&- <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(tmp_path / "v.npy").shape == (1, 384)


@pytest.mark.parametrize("what", ["embed one", "rerank a b", "fill-mask [MASK] --model x", "info", "doctor"])
def test_without_an_output_a_closed_standard_output_is_found_before_the_work(what):
    assert_failed_before_work(shell(f"{COMMAND} {what} >&-"), "standard output is closed")


@FULL
@pytest.mark.parametrize("what", ["embed one", "embed one --format npy", "rerank a b", "info", "doctor", "--version"])
def test_a_full_standard_output_is_found_before_the_work(what):
    assert_failed_before_work(shell(f"{COMMAND} {what} >/dev/full"), "No space left on device: 'standard output'")


def test_the_version_to_a_closed_standard_output_is_a_failure():
    assert shell(f"{COMMAND} --version >&-").returncode == 1


def test_a_closed_standard_input_is_no_texts():
    done = shell(f"{COMMAND} embed --model tiny <&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input is closed" in done.stderr


@FULL
@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full"])
def test_standard_error_is_not_needed(tmp_path, how):
    """Nor does what belongs there get into the output: print(file=None) writes to standard output."""
    done = shell(f"{COMMAND} embed one --truncate-dim 2 {how}")  # has to say that it takes the bundled model
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["text"] == "one"
    assert shell(f"{COMMAND} embed one --model no/such-model {how}").returncode == 1
    assert shell(f"{COMMAND} embed --nonsense {how}").returncode == 2


def test_no_stream_at_all(tmp_path):
    """The output file would be number 0, 1 or 2, and lie under what libraries print there."""
    program = f"""
import os, sys
from modernbert_lite.cli import commands as cli
opened = []
os.open, original = (lambda *args, **options: opened.append(original(*args, **options)) or opened[-1]), os.open
status = cli.main(["embed", "one", "--output", {str(tmp_path / "v.npy")!r}])
sys.exit(status if min(opened[3:]) > 2 else 9)
"""
    (tmp_path / "program.py").write_text(program)
    done = shell(f"'{sys.executable}' '{tmp_path}/program.py' <&- >&- 2>&-")
    assert done.returncode == 0
    assert np.load(tmp_path / "v.npy").shape == (1, 384)


def test_a_stream_of_text_only_is_refused_before_the_work(capsys):
    """As a program has it that calls `cli.main` and gathers what it says."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["embed", "a"]) == 2
    error = capsys.readouterr().err
    assert "standard output is a stream of text only: give --output" in error
    assert "bundled" not in error
    assert out.getvalue() == ""


def test_stderr_without_isatty_is_enough(monkeypatch, tmp_path):
    class Log:
        lines = ""

        def write(self, text):
            self.lines += text

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Log())
    assert cli.main(["embed", "one", "-o", str(tmp_path / "v.npy")]) == 0
    assert "bundled model 'tiny'" in sys.stderr.lines
    assert isinstance(sys.stderr, Log)


def test_warnings_as_errors_lose_no_result(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 600)
    done = shell(f"{COMMAND} embed --model tiny -i '{tmp_path}/long.txt' --truncate-dim 2", PYTHONWARNINGS="error")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["embedding"]) == 2
    assert "1 of 1 texts were longer than 512 tokens and were cut" in done.stderr


def test_arguments_are_utf_8_in_the_c_locale(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"{COMMAND} embed 'Ж猫' --model tiny -o '{tmp_path}/Ж.jsonl'", **locale)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "Ж.jsonl").read_bytes())
    assert record["text"] == "Ж猫"
    expected = Embedder.from_pretrained("tiny").encode("Ж猫")
    assert np.abs(np.array(record["embedding"]) - expected).max() <= 1e-6
    ranked = shell(f"{COMMAND} rerank 'Ж' 'Ж猫' --format jsonl", **locale)
    assert json.loads(ranked.stdout)["text"] == "Ж猫"


def test_an_argument_that_is_no_utf_8_is_bad_usage():
    for argument in ("embed", "embed one --prompt", "rerank", "rerank query"):
        done = subprocess.run(
            [sys.executable, "-m", "modernbert_lite", *argument.split(), b"caf\xe9"], capture_output=True, timeout=60
        )
        assert done.returncode == 2
        (line,) = done.stderr.decode().splitlines()
        assert r"'caf\udce9' is not UTF-8" in line


def test_messages_are_one_bounded_printable_line(tmp_path, capsys):
    long = "x" * 50_000
    for argv in (
        ["embed", "one", "--model", "no/" + long],
        ["embed", "--input", long],
        ["embed", "one", "--format", long],
        ["embed", "one", "--" + long],
        ["embed", "one", "--model", "a\x1b[31m\nb\x07"],
        ["info", "\x1b]0;title\x07" + long],
        ["embed", "one", "--output", f"{tmp_path}/{long}.npy"],
        ["embed", "one", "--model", "tiny", "--prompt-name", long],
    ):
        try:
            status = cli.main(argv)
        except SystemExit as end:
            status = end.code
        assert status in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("modernbert-lite: ")
        assert line.isprintable()
        assert len(line) < 1_000


def test_a_warning_is_one_bounded_printable_line(capsys):
    import warnings

    with console.quiet_streams():
        warnings.warn("bad\x1b[0m\nname " + "y" * 5_000, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("modernbert-lite: bad\\x1b[0m name yyy")
    assert len(line) < 1_000


def test_the_table_of_info_is_bounded_and_printable(monkeypatch, capsys):
    facts = {"prompts": {"query": "p" * 100_000}, "labels": ["\x1b[31m\n"] * 3}
    monkeypatch.setattr("modernbert_lite.cli.about.describe", lambda *_, **__: facts)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 1_000 for line in lines)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
