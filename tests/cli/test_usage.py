"""The shell commands: mostly by main() in this process; a real process where signals, pipes or imports count."""

import io
import subprocess
import sys
import time

import pytest
from cli_cases import assert_one_line, run  # noqa: F401

import modernbert_lite
from modernbert_lite import Embedder


def test_help_answers_quickly_and_without_torch():
    seconds, done = [], None
    for _ in range(4):  # the best of four: other work on the machine must not fail this
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "modernbert_lite", "--help"], capture_output=True, text=True, timeout=30
        )
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    for command in ("embed", "rerank", "fill-mask", "info", "doctor"):
        assert command in done.stdout
    assert min(seconds) < 0.3

    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "modernbert_lite", "embed", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "triton", "tokenizers", "safetensors", "huggingface_hub", "transformers"}


@pytest.mark.parametrize("command", ["embed", "rerank", "fill-mask", "info", "doctor"])
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.status == 0
    assert "--debug" in result.text
    assert result.err == ""


def test_version(run):
    assert run("--version").text == f"modernbert-lite {modernbert_lite.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["embed", "--format", "csv"],
        ["embed", "--nonsense"],
        ["embed", "a", "--precision", "int4"],
        ["embed", "a", "--truncate-dim", "many"],
        ["embed", "a", "--on-long", "warn"],
        ["embed", "a", "--output", "vectors.csv"],
        ["embed", "a", "--output", "no-such-folder/vectors.npy"],
        ["embed", "a", "--input", "texts.txt"],
        ["embed", "--input", "no-such-file.txt"],
        ["rerank"],
        ["rerank", "q", "--input", "no-such-file.txt"],
        ["rerank", "q", "a", "--format", "npy"],
        ["fill-mask", "a [MASK]"],
    ],
)
def test_bad_usage_is_status_2_and_one_line(run, argv):
    result = run(*argv)
    assert result.status == 2
    assert result.out == b""
    assert_one_line(result.err)


@pytest.mark.parametrize(
    "option", [("--truncate-dim", 0), ("--batch-tokens", 0), ("--max-seq-length", 0), ("--batch-tokens", -1)]
)
def test_numbers_that_can_never_work_are_bad_usage(run, option):
    result = run("embed", "a", "--model", "tiny", *option)
    assert result.status == 2
    assert_one_line(result.err)


def test_more_threads_than_processors_are_bad_usage(run):
    result = run("embed", "a", "--model", "no/such-model", "--threads", 1_000_000)
    assert result.status == 2
    assert_one_line(result.err, "threads is 1000000; it must be a whole number from 1 to")


def test_threads_and_batch_tokens_are_passed_on(run, monkeypatch):
    given = {}

    def loaded(*_, **options):
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(Embedder, "from_pretrained", loaded)
    run("embed", "a", "--model", "tiny", "--threads", "1", "--dtype", "int8")
    assert (given["threads"], given["batch_tokens"], given["dtype"]) == (1, None, "int8")
    run("embed", "a", "--model", "tiny", "--batch-tokens", "300")
    assert (given["threads"], given["batch_tokens"], given["dtype"]) == (None, 300, None)


def test_top_k_that_can_never_work_is_bad_usage(run):
    assert run("rerank", "q", "a", "--top-k", "0").status == 2


def test_a_field_needs_jsonl(run, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    result = run("embed", "--model", "tiny", "--input", tmp_path / "a.txt", "--field", "body")
    assert result.status == 2
    assert_one_line(result.err, "--field body needs jsonl input")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_a_terminal_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    result = run("embed")
    assert result.status == 2
    assert_one_line(result.err, "no texts: give them as arguments, by --input FILE, or on standard input")


def test_a_failure_is_status_1_and_one_line(run, tmp_path):
    result = run("embed", "a", "--model", tmp_path)
    assert result.status == 1
    assert_one_line(result.err, "no config.json")
    result = run("info", "no/such-model", "--local-files-only")
    assert result.status == 1
    assert_one_line(result.err, "not in the hub cache")


def test_debug_shows_the_traceback(run, tmp_path):
    result = run("embed", "a", "--model", tmp_path, "--debug")
    assert result.status == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("modernbert-lite: ")


# ---- embed ---------------------------------------------------------------------------------------------------------
