"""Vectors to jsonl, npy or npz. They are written as they come, to a temporary file that is renamed at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import IO, Any

import numpy as np

from ..reading import OUTPUT_FORMATS, one_of
from .console import held
from .outputs import Output

_NPY_HEADER_BYTES = 128
_NPY_MAGIC = b"\x93NUMPY\x01\x00"


class VectorWriter:
    """Writes blocks of rows; `path` None is stdout. A file appears under its name only when it is whole. Until then,
    and after a failure, what is finished lies in NAME.partial, as valid jsonl or npy (npy for npz, too).

    NAME.partial can be read at any moment, also after the process was killed (SIGKILL). The npy header counts the rows
    before it was written, and whatever follows them is ignored. In jsonl the last line may be torn.
    """

    def __init__(self, path: Path | None, format: str):
        self.format = one_of("format", format, OUTPUT_FORMATS)
        self.rows, self._end = 0, 0
        self._row_shape, self._dtype = (0,), np.dtype(np.float32)
        self._output = None if path is None else Output(path, _no_rows)
        if self._output is not None:
            self._file: IO[bytes] = self._output.file
        elif format == "jsonl":
            self._file = sys.stdout.buffer
        else:  # a header holds the number of rows, known at the end: a pipe can't be written to backwards
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  as long as the writer

    def write(self, records: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """records: what jsonl puts before each "embedding". vectors: (n, C), finite (their maker checks that)."""
        if self.format == "jsonl":
            data = b"".join(_json_line(r, v) for r, v in zip(records, vectors, strict=True))
        else:
            data = np.ascontiguousarray(vectors).tobytes()
            if not self._end:
                self._row_shape, self._dtype = vectors.shape[1:], vectors.dtype
                self._write_header(0)
                self._end = _NPY_HEADER_BYTES
        self._write_all(data)
        with held():
            rows, end = self.rows + len(vectors), self._end + len(data)
            if self.format != "jsonl":
                self._write_header(rows)
                self._file.seek(end)
            self.rows, self._end = rows, end

    def _write_header(self, rows: int) -> None:
        """Version 1.0 of the npy format, padded to a fixed size so that it can be written again."""
        shape = (rows, *self._row_shape)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        size = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
        self._file.seek(0)
        self._write_all(_NPY_MAGIC + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n")

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._output is not None:
                self._file.truncate(self._end)  # no torn row
            if kind is None:
                self._finish()
        finally:
            if self._output is not None and not self._output.finished:
                self._output.keep(self.rows)

    def _finish(self) -> None:
        if self.format != "jsonl" and not self._end:
            self._write_header(0)
        if self._output is not None:
            self._finish_file(self._output)
            return
        to = sys.stdout.buffer
        if self.format == "npz":  # without `seek` and `tell`: where a file is appended to, they would mislead zipfile
            self._zip(SimpleNamespace(write=to.write, flush=to.flush))
        elif self.format == "npy":
            self._file.seek(0)
            shutil.copyfileobj(self._file, to)
        to.flush()

    def _finish_file(self, output: Output) -> None:
        os.fsync(self._file.fileno())
        if self.format != "npz":
            self._file.close()
            output.finish(output.partial)
            return
        number, name = tempfile.mkstemp(prefix=output.path.name + ".", suffix=".tmp", dir=output.path.parent)
        try:
            with os.fdopen(number, "wb") as file:
                self._zip(file)
                shutil.copymode(output.partial, name)
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            output.finish(Path(name))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    def _zip(self, file: Any) -> None:
        """Writes the npy in self._file as "embeddings" of an npz, uncompressed, because vectors don't compress."""
        self._file.seek(0)
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open("embeddings.npy", "w", force_zip64=True) as entry,
        ):
            shutil.copyfileobj(self._file, entry)


def _no_rows(start: bytes) -> bool:
    """Whether this is the start of a NAME.partial in which no row was finished."""
    unwritten = b"\0" * _NPY_HEADER_BYTES  # of version 0.1.0
    return start in (b"", unwritten) or (start.startswith(_NPY_MAGIC) and b"'shape': (0," in start[:_NPY_HEADER_BYTES])


def _json_line(record: dict[str, Any], vector: np.ndarray) -> bytes:
    record = {key: value for key, value in record.items() if key != "embedding"}
    start = json.dumps(record, ensure_ascii=False, allow_nan=False)
    if not start.isascii():
        try:
            start.encode()
        except UnicodeEncodeError:  # half of a surrogate pair in another field
            start = json.dumps(record)
    digits = "%d" if vector.dtype.kind in "iu" else "%.9g"  # nine digits give a float32 back exactly
    values = ", ".join(map(digits.__mod__, vector.tolist()))
    comma = ", " if record else ""
    return f'{start[:-1]}{comma}"embedding": [{values}]}}\n'.encode()
