"""Vectors to jsonl, npy or npz: as they come, into a temporary file that is renamed at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

FORMATS = ("jsonl", "npy", "npz")
_NPY_HEADER_BYTES = 128


class VectorWriter:
    """Writes blocks of rows; `path` None is stdout. A file appears under its name only when it is whole: until then,
    and after a failure, what is finished lies in NAME.partial, as valid jsonl or npy (for npz, too)."""

    def __init__(self, path: Path | None, format: str):
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
        self.path, self.format = None if path is None else path.resolve(), format
        self.rows, self._end = 0, 0 if format == "jsonl" else _NPY_HEADER_BYTES
        self._row_shape, self._dtype = (0,), np.dtype(np.float32)
        self._file = self._open()
        if format != "jsonl":
            self._write_all(b"\0" * _NPY_HEADER_BYTES)

    def _open(self) -> IO[bytes]:
        # Unbuffered, so that what is counted as written is written, and a full disk is met where it can be handled.
        if self.path is not None:
            self.partial = self.path.with_name(self.path.name + ".partial")
            if self.partial.exists():
                raise ValueError(f"{self.partial} holds what an earlier run finished; move it away or delete it first")
            file = self.partial.open("wb", buffering=0)
            if self.path.exists():  # a private file stays private
                shutil.copymode(self.path, self.partial)
            return file
        if self.format == "jsonl":
            return sys.stdout.buffer
        # A header holds the number of rows, known at the end: a pipe can't be written to backwards.
        return tempfile.TemporaryFile(buffering=0)

    def write(self, records: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """records: what jsonl puts before each "embedding"; vectors (n, C)."""
        if self.format == "jsonl":
            data = b"".join(_json_line(r, v) for r, v in zip(records, vectors, strict=True))
        else:
            data = np.ascontiguousarray(vectors).tobytes()
        self._row_shape, self._dtype = vectors.shape[1:], vectors.dtype
        self._write_all(data)
        self.rows, self._end = self.rows + len(vectors), self._end + len(data)

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
            if self._file is not sys.stdout.buffer:
                self._file.truncate(self._end)  # no torn row
                if self.format != "jsonl":
                    self._file.seek(0)
                    self._write_all(self._npy_header())
            if kind is None:
                self._finish()
        except BaseException:
            self._keep()
            raise
        if kind is not None:
            self._keep()

    def _keep(self) -> None:
        """After a failure: says where the finished rows are."""
        if self.path is None:
            return
        self._file.close()
        if self.rows:
            print(f"modernbert-lite: {self.rows} finished rows are in {self.partial}", file=sys.stderr)
        else:
            self.partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.path is None:
            if self.format != "jsonl":
                self._file.seek(0)
                with tempfile.TemporaryFile() as packed:
                    shutil.copyfileobj(self._zip(packed) if self.format == "npz" else self._file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        os.fsync(self._file.fileno())
        self._file.close()
        if self.format != "npz":
            os.replace(self.partial, self.path)
            return
        zipped = self.partial.with_name(self.partial.name + ".npz")
        try:
            with self.partial.open("rb") as self._file, zipped.open("wb") as file:
                self._zip(file)
            os.replace(zipped, self.path)
        except BaseException:
            zipped.unlink(missing_ok=True)
            raise
        self.partial.unlink()

    def _zip(self, file: IO[bytes]) -> IO[bytes]:
        """The npy in self._file as "embeddings" of an npz, uncompressed (vectors don't compress)."""
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open("embeddings.npy", "w", force_zip64=True) as entry,
        ):
            shutil.copyfileobj(self._file, entry)
        file.seek(0)
        return file

    def _npy_header(self) -> bytes:
        """Version 1.0 of the npy format, padded to a fixed size so that it can be written last."""
        shape = (self.rows, *self._row_shape)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        size = _NPY_HEADER_BYTES - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n"


def _json_line(record: dict[str, Any], vector: np.ndarray) -> bytes:
    record = {key: value for key, value in record.items() if key != "embedding"}
    start = json.dumps(record, ensure_ascii=False)
    if not start.isascii():
        try:
            start.encode()
        except UnicodeEncodeError:  # half of a surrogate pair in another field
            start = json.dumps(record)
    digits = "%d" if vector.dtype.kind in "iu" else "%.9g"  # nine digits give a float32 back exactly
    values = ", ".join(map(digits.__mod__, vector.tolist()))
    comma = ", " if record else ""
    return f'{start[:-1]}{comma}"embedding": [{values}]}}\n'.encode()
