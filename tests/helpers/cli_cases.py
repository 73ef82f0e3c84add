"""Shared by several files of tests/cli:

test_usage, test_embed, test_bad_lines, test_failing_writes, test_interruptions, test_other_commands.
"""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli

TEXTS = ["A man plays the guitar.", "Stocks fell on Monday.", "Someone plays an instrument: naïve Ж猫."]


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals, pipes and limits")


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    @property
    def text(self):
        return self.out.decode()

    @property
    def records(self):
        return [json.loads(line) for line in self.text.split("\n")[:-1]]


@pytest.fixture
def run(monkeypatch, capfdbinary):
    """run("embed", "text", stdin=b"...") -> Result."""

    def call(*argv, stdin=b""):
        capfdbinary.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                status = cli.main([str(part) for part in argv])
            except SystemExit as error:
                status = error.code
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return Result(status, out, err.decode())

    return call


@pytest.fixture(scope="module")
def expected():
    return Embedder.from_pretrained("tiny").encode(TEXTS)


def process(*argv, code=None, **options):
    """A real one."""
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "modernbert_lite"]
    return subprocess.Popen(
        [*start, *map(str, argv)],
        stdin=options.pop("stdin", subprocess.PIPE),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        **options,
    )


def assert_one_line(err: str, *parts: str) -> None:
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("modernbert-lite: ")
    for part in parts:
        assert part in err


def jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# ---- help and usage ------------------------------------------------------------------------------------------------


def read_vectors(path_or_bytes, format):
    content = path_or_bytes if isinstance(path_or_bytes, bytes) else Path(path_or_bytes).read_bytes()
    if format == "jsonl":
        return np.array([json.loads(line)["embedding"] for line in content.decode().split("\n")[:-1]], np.float32)
    loaded = np.load(io.BytesIO(content))
    return loaded["embeddings"] if format == "npz" else loaded


def readable_rows(path: Path, format: str) -> np.ndarray:
    return read_vectors(path, "npy" if format == "npz" else format)
