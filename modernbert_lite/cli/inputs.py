"""Texts for the shell, from txt, jsonl, csv, tsv and json: records that have the text under a field's name."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from ..reading import INPUT_FORMATS, OptionError, shown

Record = dict[str, Any]

_BY_ENDING = {"jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "tsv": "tsv", "tab": "tsv", "json": "json"}
# Endings of files that don't have a text per line. A file with any other ending is read as plain text.
_NO_TEXTS = frozenset(
    """
    gz bz2 xz zst lz4 br zip tar tgz 7z rar
    parquet arrow feather orc avro xlsx xls xlsb ods db sqlite sqlite3 duckdb h5 hdf5 mat rds
    npy npz pt pth ckpt onnx gguf safetensors bin pkl pickle joblib
    pdf ps docx doc odt rtf pptx ppt odp epub mobi html htm xhtml xml yaml yml toml ipynb geojson jsonc json5 eml mbox
    png jpg jpeg gif webp tif tiff bmp ico svg mp3 wav ogg flac m4a mp4 mkv avi mov webm exe dll so o a pyc whl jar
    """.split()  # noqa: SIM905  a list of one word a line would hide them
)
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_DEEPEST = 100  # levels of a record: far fewer than what makes Python's JSON give up, in either direction
_LONGEST_CELL = 1 << 27


def format_of(name: str, given: str | None) -> str:
    """The format of a file: `given`, else by the ending of its name. Raises OptionError for an ending of files that
    don't have a text per line."""
    ending = Path(name).suffix[1:].lower()
    if given is not None:
        return given
    if ending in _NO_TEXTS:
        raise OptionError(
            f"--input {name}: its ending names no format that is read ({', '.join(INPUT_FORMATS)}); convert or unpack "
            "it, or add --input-format if it is one of them"
        )
    return _BY_ENDING.get(ending, "txt")


def records(file: IO[bytes], format: str, field: str, name: str) -> Iterator[Record]:
    """The records of a file or of standard input. They are read lazily, except json. name: for messages.

    txt: a text per line, under "text". jsonl: an object per line. csv, tsv: a header, then a record per row, quoted as
    spreadsheets do it. json: one array of objects or of strings, read whole. Each record has a string under `field`.

    Raises ValueError, naming the line or item, for malformed input; OptionError for a field that the format doesn't
    have.
    """
    if format == "txt" and field != "text":
        raise OptionError(f"--field {field} needs jsonl input (or csv, tsv, json); {name} is read as plain text")
    return {"txt": _txt, "jsonl": _jsonl, "csv": _csv, "tsv": _tsv, "json": _json}[format](file, field, name)


def _txt(file: IO[bytes], field: str, name: str) -> Iterator[Record]:
    for _, line in _lines(file, name):
        yield {field: line.rstrip("\r\n")}


def _jsonl(file: IO[bytes], field: str, name: str) -> Iterator[Record]:
    for number, line in _lines(file, name):
        if line.strip():
            where = f"{name}, line {number}"
            yield _checked(_parsed(line, where), field, where)


def _json(file: IO[bytes], field: str, name: str) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(file, name))
    try:
        items = _parsed(text, name)
    except ValueError as error:
        if "Extra data" in str(error):
            raise ValueError(f"{error}; if it holds an object a line, add --input-format jsonl") from None
        raise
    if not isinstance(items, list):
        raise ValueError(f"{name} holds a JSON {type(items).__name__}; an array of objects or of strings is needed")
    for i, item in enumerate(items):
        where = f"{name}, item {i}"
        yield _checked({field: item} if isinstance(item, str) and field == "text" else item, field, where)


def _csv(file: IO[bytes], field: str, name: str, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)  # Python's own limit, for the whole process, is 131,072
    rows = csv.reader((line for _, line in _lines(file, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    first = 1  # a row's line: a quoted cell may hold line breaks
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {first}: {error}") from None
        where, first = f"{name}, line {first}", rows.line_num + 1
        if row is None:
            break
        if not row:  # an empty line
            continue
        if header is None:
            header = row
            if header.count(field) != 1:
                many = "no" if field not in header else "more than one"
                raise ValueError(f"{where}: the header has {many} column {shown(field)}: {shown(header)} (see --field)")
            if len({*header}) != len(header):
                raise ValueError(f"{where}: two columns of the header have the same name: {shown(header)}")
            continue
        if len(row) != len(header):
            raise ValueError(f"{where}: it has {len(row)} cells, and the header has {len(header)}")
        yield _checked(dict(zip(header, row, strict=True)), field, where)
    if header is None:
        raise ValueError(f"{name} is empty; a first line with the columns' names is needed")


def _tsv(file: IO[bytes], field: str, name: str) -> Iterator[Record]:
    return _csv(file, field, name, "\t")


# ---- lines ----


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yields (number, line with its end) for each line, which must be UTF-8."""
    for number, raw in enumerate(iter(lambda: file.readline(_LONGEST_CELL), b""), 1):
        if len(raw) == _LONGEST_CELL:
            raise ValueError(f"{name}, line {number}: it has more than {_LONGEST_CELL >> 20} MiB; break it into lines")
        if number == 1:
            for mark, encoding in _MARKS.items():
                if raw.startswith(mark):
                    _refuse_encoding(name, f"starts with the mark of {encoding}", encoding)
        if b"\0" in raw and (unmarked := _unmarked(raw, number)):
            _refuse_encoding(f"{name}, line {number}", "looks like UTF-16: every second byte is 0", unmarked)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _unmarked(raw: bytes, number: int) -> str | None:
    """The byte order of UTF-16 without a mark, if a line of Latin letters shows it. (Such a line is valid UTF-8, too,
    with a NUL beside every letter.)"""
    if len(raw) >= 4 and not raw[1::2].strip(b"\0"):
        return "UTF-16LE"
    if len(raw) >= 4 and not raw[0::2].strip(b"\0"):
        return "UTF-16BE" if number == 1 else "UTF-16LE"  # a line's first byte may belong to the line break before it
    return None


def _refuse_encoding(where: str, what: str, encoding: str) -> NoReturn:
    raise ValueError(f"{where} {what}; only UTF-8 is read: convert it, as by iconv -f {encoding} -t UTF-8 FILE > NEW")


# ---- JSON ----


def _parsed(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record: Record = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"the key {shown(key)} comes twice")
        record[key] = value
    return record


def _finite(text: str) -> float:
    """Python's JSON reads 1e999 as infinity, and writes that as Infinity, which is no JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON value; write null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_number)


def _checked(record: Any, field: str, where: str) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: it is no object; an object with a string in {shown(field)} is needed (see --field)")
    text = record.get(field)
    if not isinstance(text, str):
        got = type(text).__name__ if field in record else "missing"
        raise ValueError(
            f"{where}: its {shown(field)} is {got}; an object with a string in {shown(field)} is needed (see --field)"
        )
    if _is_deep(record):
        raise ValueError(f"{where}: it is nested more than {_DEEPEST} levels deep")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: its {shown(field)} holds half of a surrogate pair, which is no text") from None
    return record


def _is_deep(record: Record) -> bool:
    level: list[Any] = [record]
    for _ in range(_DEEPEST):
        children = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in children if isinstance(value, (dict, list))]
        if not level:
            return False
    return True
