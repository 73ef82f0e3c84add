"""Ctrl-C, SIGTERM and SIGHUP end a command in the same way, whenever they come, and lose nothing that is finished."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli
from modernbert_lite.cli import console
from modernbert_lite.cli.writers import VectorWriter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


def status(name):
    return 128 + getattr(signal, name)


def command(work, before="", *argv):
    """A real process of a command that does `work`; it prints a line when it is there."""
    program = f"""
import signal, sys, time
from modernbert_lite.cli import commands as cli
from modernbert_lite.cli import console
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in a shell's background
{before}
def work(args):
    print("there", flush=True)
    {work}
cli._embed = cli._rerank = cli._fill_mask = cli._info = cli._doctor = work
sys.exit(cli.main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *(argv or ("info",))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if "there" not in before:
        assert process.stdout.readline() == "there\n"
    return process


@pytest.fixture
def model(monkeypatch):
    """embed without a model: eight texts a block."""

    class Model:
        def stream(self, texts, **_):
            texts = list(texts)
            for i in range(0, len(texts), 8):
                yield np.ones((len(texts[i : i + 8]), 3), np.float32)

    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: Model())


@pytest.fixture(autouse=True)
def handlers_are_given_back():
    numbers = [getattr(signal, name) for name in SIGNALS]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers[:1]}
    before |= {number: signal.signal(number, signal.SIG_DFL) for number in numbers[1:]}
    yield
    assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler, *[signal.SIG_DFL] * 2]
    for number, handler in before.items():
        signal.signal(number, handler)


def embed(path, texts=20):
    return cli.main(["embed", "--model", "tiny", "-o", str(path), *map(str, range(texts))])


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("argv", ["embed a", "rerank a b", "fill-mask a --model b", "info", "doctor"])
def test_every_command_ends_with_one_line_and_its_status(name, argv):
    process = command("time.sleep(60)", "", *argv.split())
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == status(name)
    assert err == f"modernbert-lite: {SIGNALS[name]}\n"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_that_is_ignored_stays_ignored(name):
    """As by nohup, and Ctrl-C in a shell's background."""
    process = command("time.sleep(0.5)", f"signal.signal(signal.{name}, signal.SIG_IGN)")
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


def test_a_second_signal_does_not_disturb_the_report_of_the_first():
    slow = """
def slowly(message, say=console.say):
    print("there", flush=True)
    time.sleep(0.5)
    say(message)
console.say = slowly
"""
    process = command("time.sleep(60)", slow)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "modernbert-lite: terminated\n"


@pytest.mark.parametrize("lost", ["raise ImportError('numpy.core.multiarray failed to import')", "pass"])
def test_a_signal_that_was_swallowed_still_ends_the_command(lost):
    """C code that imports makes an ImportError of any exception, or drops it."""
    work = f"""
    try:
        print("trying", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        {lost}
    console.check_signals()
    time.sleep(60)
"""
    process = command(work.strip())
    assert process.stdout.readline() == "trying\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "modernbert-lite: terminated\n")


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
def test_finished_rows_are_kept(tmp_path, model, monkeypatch, capsys, name, format):
    write = VectorWriter.write

    def then_killed(self, *args):
        write(self, *args)
        if self.rows == 16:
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(VectorWriter, "write", then_killed)
    out = tmp_path / f"v.{format}"
    assert embed(out) == status(name)
    assert os.listdir(tmp_path) == [f"v.{format}.partial"]
    assert capsys.readouterr().err.splitlines() == [
        f"modernbert-lite: 16 finished rows are in {out}.partial",
        f"modernbert-lite: {SIGNALS[name]}",
    ]
    partial = tmp_path / f"v.{format}.partial"
    rows = partial.read_text().count("\n") if format == "jsonl" else len(np.load(partial))
    assert rows == 16


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_the_model_loads_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: os.kill(os.getpid(), getattr(signal, name)))
    assert embed(tmp_path / "v.npy") == status(name)
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().err == f"modernbert-lite: {SIGNALS[name]}\n"


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_the_archive_is_made_keeps_the_rows(tmp_path, model, monkeypatch, name):
    zip_it = VectorWriter._zip

    def killed(self, file):
        zip_it(self, file)
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(VectorWriter, "_zip", killed)
    assert embed(tmp_path / "v.npz") == status(name)
    assert os.listdir(tmp_path) == ["v.npz.partial"]
    assert np.load(tmp_path / "v.npz.partial").shape == (20, 3)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_beside_the_rename_waits_for_its_end(tmp_path, model, monkeypatch, name, format, when):
    replace = os.replace

    def killed(*names):
        for step in ("before", "rename", "after"):
            if step == "rename":
                replace(*names)
            elif step == when:
                os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(os, "replace", killed)
    assert embed(tmp_path / f"v.{format}") == status(name)
    assert os.listdir(tmp_path) == [f"v.{format}"]


def test_a_second_signal_while_rows_are_kept_loses_none(tmp_path, model, monkeypatch, capsys):
    write, say = VectorWriter.write, console.say

    def killed(self, *args):
        write(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    def said(message):
        os.kill(os.getpid(), signal.SIGINT)
        say(message)

    monkeypatch.setattr(VectorWriter, "write", killed)
    monkeypatch.setattr("modernbert_lite.cli.outputs.say", said)
    assert embed(tmp_path / "v.npy") == 143
    assert np.load(tmp_path / "v.npy.partial").shape == (8, 3)
    assert os.listdir(tmp_path) == ["v.npy.partial"]
    assert "8 finished rows" in capsys.readouterr().err


def test_a_surrounding_program_keeps_its_handlers(tmp_path, model):
    own = []
    before = signal.signal(signal.SIGTERM, lambda *_: own.append("SIGTERM"))
    try:
        with console.stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert own == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(embed(tmp_path / "v.npy")))  # it may set no handlers
    thread.start()
    thread.join()
    assert statuses == [0]
