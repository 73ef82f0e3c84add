"""The process around a command: its lines on stderr, standard streams that are closed or full, signals."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ..reading import printable

LONGEST = 900  # characters of a line
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


def say(message: object) -> None:
    """Writes one bounded line to stderr, without characters that a terminal would take as a command."""
    print("modernbert-lite: " + printable(" ".join(str(message).split()), LONGEST), file=sys.stderr)


# ---- signals ----


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end. It is a subclass of KeyboardInterrupt, so `except Exception` lets it pass."""

    def __init__(self, number: int):
        super().__init__(_WORDS[signal.Signals(number).name])
        self.status = 128 + number  # what a shell reports of a process that the signal ended


class _Signals:
    holding = False
    arrived: int | None = None

    def arrive(self, number: int, _: object) -> None:
        self.arrived = self.arrived or number
        self.check()

    def check(self) -> None:
        if self.arrived is not None and not self.holding:
            raise Stopped(self.arrived)


_signals = _Signals()


@contextmanager
def stoppable() -> Iterator[None]:
    """In this block Ctrl-C, SIGTERM and SIGHUP raise Stopped. A signal that is ignored (by nohup, or for a shell's
    background job) stays ignored, and a signal that the surrounding program handles keeps its handler."""
    kept: dict[int, Any] = {}
    _signals.holding, _signals.arrived = False, None
    try:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
            for number in (getattr(signal, name) for name in _WORDS if hasattr(signal, name)):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    kept[number] = signal.signal(number, _signals.arrive)
        yield
    finally:
        _signals.holding = True
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """A signal that arrives in this block is raised after the block, so that its steps are done as a whole."""
    before, _signals.holding = _signals.holding, True
    try:
        yield
    finally:
        _signals.holding = before
    _signals.check()


def check_signals() -> None:
    """Raises Stopped again if it was lost: C code may drop it, or turn it into an ImportError."""
    _signals.check()


def hold() -> None:
    """From now on signals wait: the command is ending already."""
    _signals.holding = True


def end_quietly() -> None:
    """For the last moments of the process: Ctrl-C ends it at once, without a traceback from Python's shutdown."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- standard streams ----


class _Stderr:
    """A standard error that never fails: what can't be written is dropped."""

    def __init__(self, stream: TextIO | None):
        # With a closed stderr sys.stderr is None, and print(file=None) writes to standard output.
        self._stream: Any = io.StringIO() if stream is None else stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except Exception:  # noqa: BLE001  it may be anybody's logger
            self._silence()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except Exception:  # noqa: BLE001  as in `write`; some have no flush at all
            self._silence()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except Exception:  # noqa: BLE001  as in `write`
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self) -> None:
        silence(self._stream)
        self._stream = io.StringIO()


def silence(stream: Any) -> None:
    """Sends what waits in a stream that can't be written to nowhere. Otherwise Python fails over it at its end."""
    with suppress(Exception):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


@contextmanager
def quiet_streams() -> Iterator[None]:
    """In this block stderr never fails, a warning is a line on stderr and never an error, and a character that standard
    output can't show is escaped."""
    for number in range(3):  # else the output file might become number 2, and libraries' messages lie among its vectors
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    before, sys.stderr = sys.stderr, cast(TextIO, _Stderr(sys.stderr))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(message)
            if any(rule[0] == "error" for rule in warnings.filters):  # PYTHONWARNINGS=error would cost the result
                warnings.simplefilter("default")
            yield
    finally:
        sys.stderr.flush()
        sys.stderr = before


def check_stdout() -> None:
    """Raises OSError if standard output is closed or full, so that this is found before the work."""
    if sys.stdout is None:
        raise OSError("standard output is closed; send it to a file or a program")
    with suppress(AttributeError, ValueError):  # no file behind it
        number = sys.stdout.fileno()
        try:
            if os.name == "posix":  # elsewhere nothing, written to a pipe, may be taken for its end
                os.write(number, b"")
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


def table(header: list[str], rows: list[list[str]]) -> None:
    """Prints rows under their header. Each column is as wide as its widest cell."""
    rows = [[printable(cell, LONGEST) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
