"""The output file of one process: NAME.partial, locked, until it is whole."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..reading import OptionError
from .console import held, say

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_OLD = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_MARK = b"modernbert-lite: "
_OURS = (".partial", ".partial.lock")


class Output:
    """Claims `path`. Rows go to `file`, which is NAME.partial, unbuffered. `finish` gives it its name; `keep` leaves it
    where it is. empty(start of an old NAME.partial): whether no row is in it.

    One process at a time has an output. It holds a lock on NAME.partial.lock. The lock ends with the process, in
    whatever way it ends, so files of a dead process are in nobody's way. Where there are no such locks (Windows, some
    network folders), the lock file itself is the lock: after a process has died, somebody must delete it, and the
    message says so.

    Raises ValueError if another process writes the output, or if NAME.partial holds rows, is a link or is no regular
    file.
    """

    def __init__(self, path: Path, empty: Callable[[bytes], bool]):
        self.path = path.resolve()  # a link is followed, and stays
        if self.path.name.endswith(_OURS):
            raise OptionError(
                f"{path}: {' and '.join(_OURS)} are the endings of unfinished outputs; choose another name"
            )
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.finished = False
        self._lock = _Lock(self.path)
        try:
            self.replaces = self.path.exists()
            self.file = self._create(empty)
        except BaseException:
            self._lock.release()
            raise

    def _create(self, empty: Callable[[bytes], bool]) -> IO[bytes]:
        try:
            number = os.open(self.partial, _NEW, 0o666)
        except FileExistsError:
            if self.partial.is_symlink() or not self.partial.is_file():
                what = "is a link" if self.partial.is_symlink() else "is no regular file"
                raise ValueError(f"{self.partial} {what}, and is not written to; move it away first") from None
            with self.partial.open("rb") as old:
                if not empty(old.read(256)):
                    raise ValueError(
                        f"{self.partial} holds what an earlier run finished; move it away or delete it first"
                    ) from None
            self.partial.unlink()
            number = os.open(self.partial, _NEW, 0o666)
        self._stat = os.fstat(number)
        # Unbuffered, so that what is counted as written is written, and a full disk is met where it can be handled.
        file = os.fdopen(number, "r+b", buffering=0)
        if self.replaces:  # a private file stays private
            shutil.copymode(self.path, self.partial)
        return file

    def finish(self, whole: Path) -> None:
        """Makes `whole` the output. It is closed and on the disk: NAME.partial, or an archive made from it, beside it.

        Raises FileExistsError if the output has appeared since the start: another program's file is not written over.
        """
        with held():
            if not self.replaces and os.path.lexists(self.path):
                raise FileExistsError(f"{self.path} appeared while this run wrote {self.partial}; it is left as it is")
            if not self._is_there():
                raise FileNotFoundError(
                    f"{self.partial} was moved or deleted while this run wrote it; its rows went with it"
                )
            os.replace(whole, self.path)
            self.finished = True
            self.partial.unlink(missing_ok=True)  # an archive was made of it
            sync_folder(self.path.parent)
            self._lock.release()

    def keep(self, rows: int) -> None:
        """After a failure: says where the finished rows are. If there are none, it leaves no file."""
        with held():
            if rows:
                with suppress(OSError, ValueError):  # ValueError: it is closed already
                    os.fsync(self.file.fileno())
                if self._is_there():
                    say(f"{rows} finished rows are in {self.partial}")
            self.file.close()
            if not rows and self._is_there():
                self.partial.unlink(missing_ok=True)
            self._lock.release()

    def _is_there(self) -> bool:
        """Whether NAME.partial is still the file that was made here. Somebody may have moved it away."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._stat, os.stat(self.partial, follow_symlinks=False))
        return False


def sync_folder(folder: Path) -> None:
    """Makes a new name survive a power failure, if the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class _Lock:
    """The right to write an output, and a file that says who has it."""

    def __init__(self, output: Path):
        self._output, self._path = output, output.with_name(output.name + ".partial.lock")
        while True:
            self._number, created = self._open()
            try:
                if self._locked(created):
                    self._sign()
                    return
            except BaseException:
                os.close(self._number)
                raise
            os.close(self._number)

    def _open(self) -> tuple[int, bool]:
        while True:
            try:
                return os.open(self._path, _NEW, 0o666), True
            except FileExistsError:
                if self._path.is_symlink():
                    raise ValueError(f"{self._path} is a link, and is not written to; move it away first") from None
            with suppress(FileNotFoundError):
                return os.open(self._path, _OLD), False

    def _locked(self, created: bool) -> bool:
        """Whether the lock is held now. False: its last holder deleted the file after it was opened here. Raises
        ValueError if another process has the lock."""
        hint = "wait for it, or choose another --output"
        try:
            import fcntl

            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                return os.path.samestat(os.fstat(self._number), os.stat(self._path, follow_symlinks=False))
            return False
        except BlockingIOError:
            pass
        except (ImportError, OSError):  # Windows; a folder without locks
            if created:
                return True
            hint += f" (if that process has ended, delete {self._path})"
        raise ValueError(f"{self._output} is being written by {self._holder()}; {hint}") from None

    def _holder(self) -> str:
        for _ in range(20):  # it signs just after it has the lock; until then, a dead holder's name may stand there
            os.lseek(self._number, 0, os.SEEK_SET)
            signed = os.read(self._number, 300).removeprefix(_MARK)
            found = re.match(rb"process (\d+) on (\S+) since ", signed)
            with suppress(OSError, OverflowError, AttributeError):  # it is dead; Windows doesn't tell
                if found and found[2] == socket.gethostname().encode() and os.getpgid(int(found[1])):
                    break
            time.sleep(0.02)
        return signed.decode(errors="replace").strip() or "another process"

    def _sign(self) -> None:
        signed = os.read(self._number, 300) if stat.S_ISREG(os.fstat(self._number).st_mode) else b"?"
        if signed and not signed.startswith(_MARK):
            raise ValueError(f"{self._path} is no lock of this program; move it away first")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(self._number, 0)
            os.lseek(self._number, 0, os.SEEK_SET)
            os.write(self._number, _MARK + f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        except OSError:  # a full disk
            self._path.unlink()
            raise

    def release(self) -> None:
        """Deletes the file while it is locked. A process that has opened it before sees that it is gone, and makes a
        new one."""
        if os.name == "nt":  # there an open file can't be deleted
            os.close(self._number)
        with suppress(OSError):
            self._path.unlink()
        if os.name != "nt":
            os.close(self._number)
