"""Output files: one process writes one, NAME.partial can be read at any moment, no file of the user is written over."""

import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from modernbert_lite.cli import outputs
from modernbert_lite.cli.writers import VectorWriter
from modernbert_lite.reading import OptionError

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks, links and signals")


def block(first, rows=4, width=3):
    """Every row has its number in all its places."""
    return np.repeat(np.arange(first, first + rows, dtype=np.float32)[:, None], width, axis=1)


def write(path, blocks=2, format="npy"):
    with VectorWriter(path, format) as writer:
        for i in range(blocks):
            writer.write([{"text": str(n)} for n in range(4 * i, 4 * i + 4)], block(4 * i))


def read(path, format="npy"):
    if format == "jsonl":
        return np.array([json.loads(line)["embedding"] for line in path.read_text().splitlines()], np.float32)
    loaded = np.load(path, allow_pickle=False)
    return loaded["embeddings"] if format == "npz" else loaded


def start(program, *argv):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# ---- NAME.partial --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
def test_the_partial_can_be_read_after_every_block(tmp_path, format):
    partial = tmp_path / f"v.{format}.partial"
    kept = "jsonl" if format == "jsonl" else "npy"
    with VectorWriter(tmp_path / f"v.{format}", format) as writer:
        assert partial.stat().st_size == 0
        for i in range(3):
            writer.write([{"n": n} for n in range(4)], block(4 * i))
            assert np.array_equal(read(partial, kept), block(0, 4 * i + 4))
    assert np.array_equal(read(tmp_path / f"v.{format}", format), block(0, 12))
    assert os.listdir(tmp_path) == [f"v.{format}"]


@pytest.mark.parametrize("precision", [np.float16, np.int8, np.uint8])
def test_the_partial_has_the_dtype_of_its_rows(tmp_path, precision):
    with VectorWriter(tmp_path / "v.npy", "npy") as writer:
        writer.write([], block(0).astype(precision))
        writer.write([], block(4).astype(precision))
        assert read(tmp_path / "v.npy.partial").dtype == precision
    assert np.array_equal(read(tmp_path / "v.npy"), block(0, 8).astype(precision))


@pytest.mark.parametrize("format", ["npy", "npz"])
def test_the_partial_can_be_read_between_any_two_writes(tmp_path, monkeypatch, format):
    """Where a kill may fall: after the rows and before the header that counts them, say."""
    partial, counts = tmp_path / f"v.{format}.partial", []
    write_all = VectorWriter._write_all

    def watched(self, data):
        for part in (
            (data[:5], data[5:]) if len(data) != 128 else (data,)
        ):  # rows may be torn, a header of 128 bytes not
            write_all(self, part)
            counts.append(len(read(partial)))
            assert np.array_equal(read(partial), block(0, counts[-1]) if counts[-1] else np.empty((0, 3)))

    monkeypatch.setattr(VectorWriter, "_write_all", watched)
    write(tmp_path / f"v.{format}", 3, format)
    assert counts == [0, 0, 0, 4, 4, 4, 8, 8, 8, 12]


WRITE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from modernbert_lite.reading import OptionError
from modernbert_lite.cli.writers import VectorWriter
with VectorWriter(Path(sys.argv[1]), sys.argv[1].rpartition(".")[2]) as writer:
    first = 0
    while True:
        rows = np.repeat(np.arange(first, first + 700, dtype=np.float32)[:, None], 300, axis=1)
        writer.write([{}] * 700, rows)
        first += 700
        if first == 700:
            print("started", flush=True)
"""


@POSIX
@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
def test_after_kill_9_the_finished_rows_can_be_read(tmp_path, format):
    seen = set()
    for i in range(3):
        out = tmp_path / f"{i}.{format}"
        with start(WRITE_FOR_EVER, out) as process:
            process.stdout.readline()
            time.sleep(random.Random(i).uniform(0, 0.03))
            process.kill()
        assert not out.exists()
        partial = tmp_path / f"{i}.{format}.partial"
        if format == "jsonl":  # whole lines, and maybe a torn one
            lines = partial.read_bytes().split(b"\n")[:-1]
            rows = np.array([json.loads(line)["embedding"] for line in lines], np.float32)
        else:
            rows = read(partial)
            assert len(rows) % 700 == 0
        assert len(rows) >= 700
        assert np.array_equal(rows, block(0, len(rows), 300))
        seen.add(len(rows))
        with pytest.raises(ValueError, match="holds what an earlier run finished"):
            write(out, format=format)
        partial.unlink()
        write(out, format=format)
        assert sorted(path.name for path in tmp_path.glob(f"{i}.*")) == [out.name]
    assert seen


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b"\0" * 128,
        b"\x93NUMPY\x01\0v\0" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }".ljust(118),
    ],
    ids=["nothing", "version 0.1.0", "no row"],
)
def test_a_partial_without_rows_does_not_block_the_next_run(tmp_path, left):
    (tmp_path / "v.npy.partial").write_bytes(left + (b"half a row" if len(left) == 128 and left[0] else b""))
    write(tmp_path / "v.npy")
    assert read(tmp_path / "v.npy").shape == (8, 3)
    assert os.listdir(tmp_path) == ["v.npy"]


@pytest.mark.parametrize("left", [b"mine", b"\0" * 129, b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'shape': (10, 3), }"])
def test_a_partial_with_anything_else_is_left_alone(tmp_path, left):
    (tmp_path / "v.npy.partial").write_bytes(left)
    with pytest.raises(ValueError, match=r"v\.npy\.partial holds what an earlier run finished; move it away or delete"):
        write(tmp_path / "v.npy")
    assert (tmp_path / "v.npy.partial").read_bytes() == left
    assert os.listdir(tmp_path) == ["v.npy.partial"]


# ---- one writer ----------------------------------------------------------------------------------------------------

RACE = """
import sys, time
from pathlib import Path
import numpy as np
from modernbert_lite.reading import OptionError
from modernbert_lite.cli.writers import VectorWriter
folder, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while not (folder / "go").exists():
    pass
try:
    with VectorWriter(folder / "v.npy", "npy") as writer:
        writer.write([], np.full((5, 3), number, np.float32))
        while not (folder / "end").exists():
            time.sleep(0.01)
        writer.write([], np.full((5, 3), number, np.float32))
except ValueError as error:
    sys.exit(str(error))
"""


@POSIX
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_exactly_one_gets_the_output(tmp_path, stale):
    """Also where a process that died left its files."""
    if stale:
        (tmp_path / "v.npy.partial").touch()
        (tmp_path / "v.npy.partial.lock").write_text("modernbert-lite: process 1 on nowhere since 2000\n")
    processes = [start(RACE, tmp_path, i) for i in range(8)]
    for process in processes:
        process.stdout.readline()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "end").touch()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    (winner,) = [i for i, process in enumerate(processes) if process.returncode == 0]
    assert np.array_equal(read(tmp_path / "v.npy"), np.full((10, 3), winner, np.float32))
    who = rf"v\.npy is being written by process {processes[winner].pid} on \S+ since \d{{4}}-\d\d-\d\d [\d:]{{8}}; wait"
    for i, error in enumerate(errors):
        if i != winner:
            assert re.search(who, error), error
            assert "delete" not in error
    assert sorted(os.listdir(tmp_path)) == ["end", "go", "v.npy"]


@POSIX
def test_a_holder_that_has_not_signed_yet_is_not_taken_for_the_dead_one_before_it(tmp_path):
    import fcntl

    lock = tmp_path / "v.npy.partial.lock"
    lock.write_text("modernbert-lite: process 1 on nowhere since 2000\n")
    here = f"modernbert-lite: process {os.getpid()} on {socket.gethostname()} since 2026-01-01 00:00:00\n"
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        signs = threading.Timer(0.1, lock.write_text, [here])
        signs.start()
        with pytest.raises(ValueError, match=rf"by process {os.getpid()} on \S+ since 2026"):
            write(tmp_path / "v.npy")
        signs.join()
        lock.write_text("modernbert-lite: process 7 on another-host since 2026\n")  # a folder of many machines
        with pytest.raises(ValueError, match="by process 7 on another-host since 2026; wait"):
            write(tmp_path / "v.npy")


@POSIX
def test_a_lock_that_its_holder_deletes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking it: whoever comes next makes a new file, and would not see this lock."""
    import fcntl

    lock = fcntl.flock

    def after_its_end(number, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        os.unlink(tmp_path / "v.npy.partial.lock")
        lock(number, how)

    (tmp_path / "v.npy.partial.lock").touch()
    monkeypatch.setattr(fcntl, "flock", after_its_end)
    with VectorWriter(tmp_path / "v.npy", "npy"):
        assert "process" in (tmp_path / "v.npy.partial.lock").read_text()
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()}"):
            write(tmp_path / "v.npy")
    assert os.listdir(tmp_path) == ["v.npy"]


@POSIX
def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    with VectorWriter(tmp_path / "v.npy", "npy") as writer:
        writer.write([], block(0))
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
            write(tmp_path / "v.npy")
        os.symlink("v.npy", tmp_path / "link.npy")
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
            write(tmp_path / "link.npy")
        write(tmp_path / "other.npy")
    assert np.array_equal(read(tmp_path / "v.npy"), block(0))


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), None])
def test_without_locks_the_file_alone_is_the_lock(tmp_path, monkeypatch, error):
    """On Windows there is no fcntl; some network folders have no locks."""

    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise error

    monkeypatch.setitem(sys.modules, "fcntl", NoLocks if error else None)
    with VectorWriter(tmp_path / "v.npy", "npy") as writer:
        writer.write([], block(0))
        with pytest.raises(ValueError, match=r"written by process \d+ on .*if that process has ended, delete .*\.lock"):
            write(tmp_path / "v.npy")
    assert os.listdir(tmp_path) == ["v.npy"]
    write(tmp_path / "v.npy")
    assert read(tmp_path / "v.npy").shape == (8, 3)


# ---- what is the user's --------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("name", ["v.npy.partial", "v.npy.partial.lock"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_the_partial_is_never_written_through(tmp_path, name, dangling):
    target = tmp_path / "target"
    if not dangling:
        target.write_bytes(b"")
    (tmp_path / name).symlink_to("target")
    with pytest.raises(ValueError, match="is a link, and is not written to; move it away first"):
        write(tmp_path / "v.npy")
    assert target.exists() != dangling
    assert (tmp_path / name).is_symlink()
    assert sorted(os.listdir(tmp_path)) == sorted([name, *([] if dangling else ["target"])])


@POSIX
@pytest.mark.parametrize("name", ["v.npy.partial", "v.npy.partial.lock"])
def test_a_pipe_or_folder_in_the_place_of_the_partial_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="move it away first"):
        write(tmp_path / "v.npy")
    os.unlink(tmp_path / name)
    os.mkdir(tmp_path / name)
    with pytest.raises((ValueError, IsADirectoryError)):
        write(tmp_path / "v.npy")
    assert os.listdir(tmp_path) == [name]


def test_a_file_named_like_the_lock_is_left_alone(tmp_path):
    (tmp_path / "v.npy.partial.lock").write_text("notes of mine")
    with pytest.raises(ValueError, match="is no lock of this program; move it away first"):
        write(tmp_path / "v.npy")
    assert (tmp_path / "v.npy.partial.lock").read_text() == "notes of mine"


def test_a_file_beside_the_archive_is_not_written_over(tmp_path):
    for name in ("v.npz.partial.npz", "v.npz.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    write(tmp_path / "v.npz", format="npz")
    assert np.array_equal(read(tmp_path / "v.npz", "npz"), block(0, 8))
    assert {(tmp_path / name).read_bytes() for name in ("v.npz.partial.npz", "v.npz.tmp")} == {b"mine"}
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("format", ["npy", "npz"])
def test_an_output_that_appears_meanwhile_is_left_as_it_is(tmp_path, format, capsys):
    out = tmp_path / f"v.{format}"
    writer = VectorWriter(out, format)
    writer.write([], block(0))
    out.write_bytes(b"of another program")
    with pytest.raises(FileExistsError, match="appeared while this run wrote"), writer:
        pass
    assert out.read_bytes() == b"of another program"
    assert np.array_equal(read(tmp_path / f"v.{format}.partial"), block(0))
    assert f"4 finished rows are in {out}.partial" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == [out.name, out.name + ".partial"]


def test_an_output_that_was_there_is_replaced(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"old")
    write(tmp_path / "v.npy")
    assert read(tmp_path / "v.npy").shape == (8, 3)


@POSIX
@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
def test_a_private_output_stays_private_and_a_new_one_obeys_the_umask(tmp_path, format):
    private, new = tmp_path / f"private.{format}", tmp_path / f"new.{format}"
    private.touch(mode=0o600)
    mask = os.umask(0o027)
    try:
        write(private, format=format)
        write(new, format=format)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


@POSIX
@pytest.mark.parametrize("format", ["npy", "npz", "jsonl"])
def test_the_file_is_on_the_disk_before_its_name_and_the_folder_after_it(tmp_path, monkeypatch, format):
    done = []
    sync, replace = os.fsync, os.replace

    def synced(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        sync(number)

    def renamed(*names):
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / f"v.{format}", format=format)
    assert done == [*["file"] * (2 if format == "npz" else 1), "name", "folder"]


def test_a_folder_that_can_not_be_synced_is_no_failure(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(outputs.os, "open", refused)
    outputs.sync_folder(tmp_path)


@POSIX
def test_signals_are_as_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    write(tmp_path / "v.npy")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_empty_result_is_a_whole_file(tmp_path):
    with VectorWriter(Path(tmp_path / "v.npy"), "npy") as writer:
        writer.write([], np.empty((0, 7), np.float32))
    assert read(tmp_path / "v.npy").shape == (0, 7)


@pytest.mark.parametrize("ending", [".partial", ".partial.lock"])
def test_the_unfinished_output_of_another_run_is_no_output(tmp_path, ending):
    rows = np.ones((3, 2), np.float32)
    with VectorWriter(tmp_path / "v.npy", "npy") as writer:
        writer.write([], rows)
        with pytest.raises(OptionError, match="are the endings of unfinished outputs"):
            VectorWriter(tmp_path / f"v.npy{ending}", "npy")
    assert np.array_equal(np.load(tmp_path / "v.npy"), rows)


@pytest.mark.parametrize("format", ["npy", "npz"])
def test_a_partial_that_was_taken_away_is_a_failure_that_says_so(tmp_path, format, capsys):
    path = tmp_path / f"v.{format}"
    partial = path.with_name(path.name + ".partial")

    def write():
        with VectorWriter(path, format) as writer:
            writer.write([], np.ones((3, 2), np.float32))
            partial.unlink()
            partial.write_bytes(b"another program's")

    with pytest.raises(FileNotFoundError, match="was moved or deleted while this run wrote it"):
        write()
    assert not path.exists()
    assert partial.read_bytes() == b"another program's"
    assert "finished rows are in" not in capsys.readouterr().err
