"""The shell commands: mostly by main() in this process; a real process where signals, pipes or imports count."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import modernbert_lite
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


def read_vectors(path_or_bytes, format):
    content = path_or_bytes if isinstance(path_or_bytes, bytes) else Path(path_or_bytes).read_bytes()
    if format == "jsonl":
        return np.array([json.loads(line)["embedding"] for line in content.decode().split("\n")[:-1]], np.float32)
    loaded = np.load(io.BytesIO(content))
    return loaded["embeddings"] if format == "npz" else loaded


def test_embed_arguments_to_jsonl(run, expected):
    result = run("embed", *TEXTS)
    assert result.status == 0
    assert [list(record) for record in result.records] == [["text", "embedding"]] * 3
    assert [record["text"] for record in result.records] == TEXTS
    # Nine digits give every float32 back.
    assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6
    assert_one_line(result.err, "'tiny'", "gte-modernbert-base", "--model")


def test_a_named_model_says_nothing(run):
    assert run("embed", "one", "--model", "tiny").err == ""


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_embed_to_a_file_and_to_stdout_are_the_same(run, tmp_path, expected, format):
    out = tmp_path / f"vectors.{format}"
    result = run("embed", *TEXTS, "--model", "tiny", "-o", out)
    assert (result.status, result.out, result.err) == (0, b"", "")
    piped = run("embed", *TEXTS, "--model", "tiny", "--format", format)
    assert np.abs(read_vectors(out, format) - expected).max() <= 1e-6
    assert np.array_equal(read_vectors(out, format), read_vectors(piped.out, format))
    assert read_vectors(out, format).dtype == np.float32
    assert os.listdir(tmp_path) == [out.name]


def test_embed_format_wins_over_the_ending(run, tmp_path):
    run("embed", "one", "--model", "tiny", "-o", tmp_path / "data.bin", "--format", "npy")
    assert np.load(tmp_path / "data.bin").shape == (1, 384)
    run("embed", "one", "--model", "tiny", "-o", tmp_path / "UPPER.NPY")
    assert np.load(tmp_path / "UPPER.NPY").shape == (1, 384)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_embed_reads_standard_input_by_lines(run, expected, ending):
    content = (ending or "\n").join(TEXTS) + ending
    for argv in ((), ("--input", "-")):
        result = run("embed", "--model", "tiny", *argv, stdin=content.encode())
        assert [record["text"] for record in result.records] == TEXTS
        assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6


def test_an_empty_line_is_an_empty_text(run):
    result = run("embed", "--model", "tiny", stdin=b"one\n\ntwo\n")
    assert [record["text"] for record in result.records] == ["one", "", "two"]


def test_a_byte_order_mark_is_no_text(run, tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [record["text"] for record in run("embed", "--model", "tiny", "-i", path).records] == ["one", "two"]


def test_other_line_separators_and_nul_are_text(run):
    result = run("embed", "--model", "tiny", stdin="a\u2028b\x0bc\x0c\0d\n".encode())
    assert [record["text"] for record in result.records] == ["a\u2028b\x0bc\x0c\0d"]


def test_embed_reads_jsonl_and_keeps_its_fields(run, tmp_path, expected):
    path = jsonl(tmp_path / "in.jsonl", [{"id": i, "body": text, "x": None} for i, text in enumerate(TEXTS)])
    result = run("embed", "--model", "tiny", "--input", path, "--field", "body")
    assert [list(record) for record in result.records] == [["id", "body", "x", "embedding"]] * 3
    assert [record["id"] for record in result.records] == [0, 1, 2]
    assert np.abs(read_vectors(result.out, "jsonl") - expected).max() <= 1e-6
    piped = run("embed", "--model", "tiny", "--input-format", "jsonl", "--field", "body", stdin=path.read_bytes())
    assert piped.out == result.out


def test_embed_of_nothing(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for format, shape in (("npy", (0, 384)), ("npz", (0, 384))):
        out = tmp_path / f"e.{format}"
        assert run("embed", "--model", "tiny", "-i", tmp_path / "empty.txt", "-o", out).status == 0
        assert read_vectors(out, format).shape == shape
    result = run("embed", "--model", "tiny", "--format", "jsonl")
    assert (result.status, result.out) == (0, b"")
    out = tmp_path / "t.npy"
    run("embed", "--model", "tiny", "-o", out, "--truncate-dim", "96")
    assert np.load(out).shape == (0, 96)


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float16", "float16", 384), ("int8", "int8", 384), ("binary", "int8", 48), ("ubinary", "uint8", 48)],
)
def test_embed_precision(run, tmp_path, precision, dtype, width):
    out = tmp_path / "v.npy"
    run("embed", *TEXTS, "--model", "tiny", "-o", out, "--precision", precision)
    vectors = np.load(out)
    assert (vectors.shape, vectors.dtype) == ((3, width), np.dtype(dtype))
    assert np.array_equal(vectors, Embedder.from_pretrained("tiny").encode(TEXTS, precision=precision))
    lines = run("embed", *TEXTS, "--model", "tiny", "--precision", precision).records
    assert np.allclose([line["embedding"] for line in lines], vectors.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("format", ["npy", "jsonl"])
def test_a_failure_before_the_range_is_known_keeps_the_rows_in_float32(
    run, tmp_path, monkeypatch, expected, precision, format
):
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 2)
    out = tmp_path / f"v.{format}"
    argv = ("embed", *TEXTS[:2], "word " * 600, "--model", "tiny", "--precision", precision, "--on-long", "error")
    result = run(*argv, "-o", out)
    assert result.status == 1
    lines = result.err.splitlines()
    assert lines[0].endswith(f"what is finished is kept in float32: {precision} needs the range of all vectors")
    assert lines[1].endswith(f"2 finished rows are in {out}.partial")
    assert len(lines) == 3
    assert "text 2 " in lines[2]
    for advice in (".finished", "`", "rows were finished"):
        assert advice not in result.err
    partial = tmp_path / f"v.{format}.partial"
    if format == "npy":
        kept = np.load(partial)
        assert kept.dtype == np.float32
    else:
        records = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
        assert [record["text"] for record in records] == TEXTS[:2]
        kept = np.array([record["embedding"] for record in records])
    assert np.abs(kept - expected[:2]).max() <= 1e-5
    result = run(*argv)
    assert (result.status, result.out) == (1, b"")


def test_one_text_has_no_range_for_int8(run, tmp_path):
    result = run("embed", "one", "--model", "tiny", "--precision", "int8", "-o", tmp_path / "v.npy")
    assert result.status == 2
    assert_one_line(result.err, "--precision int8: one text has no range to be cut by; give two or more")
    assert os.listdir(tmp_path) == []


def test_float16_that_overflows_names_the_text_of_a_later_block(run, tmp_path, monkeypatch):
    blocks = [np.zeros((2, 3), np.float32), np.array([[0, 0, 0], [0, 1e5, 0]], np.float32)]

    def stream(self, texts, **_):
        list(texts)
        return iter(blocks)

    monkeypatch.setattr(Embedder, "stream", stream)
    result = run("embed", *"abcd", "--model", "tiny", "--precision", "float16", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert result.err.splitlines()[1].endswith("embedding 3 is not finite in float16")


def test_embed_options(run, tmp_path):
    model = Embedder.from_pretrained("tiny")
    out = tmp_path / "v.npy"
    run("embed", "one", "--model", "tiny", "-o", out, "--truncate-dim", "96", "--prompt", "find: ", "--normalize")
    assert np.abs(np.load(out) - model.encode(["find: one"], truncate_dim=96)).max() <= 1e-6
    run("embed", "one two three four five", "--model", "tiny", "-o", out, "--max-seq-length", "5", "--dtype", "float32")
    assert np.abs(np.load(out) - model.encode(["one two three"])).max() <= 1e-6
    result = run("embed", "one", "--model", "tiny", "--prompt-name", "nonsense")
    assert result.status in (1, 2)
    assert_one_line(result.err, "prompt_name is 'nonsense'; this model has ['document', 'query']")


def test_over_long_texts_are_counted_in_one_line(run):
    result = run("embed", "--model", "tiny", stdin=(b"word " * 600 + b"\nshort\n") * 2)
    assert (result.status, len(result.records)) == (0, 4)
    assert_one_line(result.err, "2 of 4 texts were longer than 512 tokens and were cut")


def test_over_long_texts_may_be_an_error(run, tmp_path):
    out = tmp_path / "v.npy"
    result = run("embed", "--model", "tiny", "--on-long", "error", "-o", out, stdin=b"short\n" + b"word " * 600)
    assert result.status == 1
    assert_one_line(result.err, "text 1 is longer than 512 tokens", "truncate")
    assert os.listdir(tmp_path) == []


# ---- bad lines -----------------------------------------------------------------------------------------------------

BAD_LINES = {
    "no JSON": (b'{"text": "a"', "not valid JSON"),
    "no object": (b'["a"]', "it is no object"),
    "no field": (b'{"body": "a"}', "its 'text' is missing"),
    "no string": (b'{"text": 7}', "its 'text' is int"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_found_before_the_work_starts(run, tmp_path, monkeypatch, name):
    line, message = BAD_LINES[name]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    path.write_bytes(b'{"text": "fine"}\n' * 2_999 + line + b'\n{"text": "fine"}\n')
    out.write_bytes(b"an older result")
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run("embed", "--model", "tiny", "--input", path, "--output", out)
    assert result.status == 1
    assert_one_line(result.err, f"{path}, line 3000", message)
    assert len(result.err) < 1_000
    assert out.read_bytes() == b"an older result"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.npy"]


def test_a_bad_line_on_standard_input_is_named(run):
    result = run("embed", "--model", "tiny", stdin=b"fine\n\xff\xfe\n")
    assert result.status == 1
    assert_one_line(result.err, "standard input, line 2: not UTF-8")


def test_a_folder_as_input_is_one_line(run, tmp_path):
    result = run("embed", "--model", "tiny", "--input", tmp_path)
    assert result.status in (1, 2)
    assert_one_line(result.err)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_is_one_line(run, tmp_path):
    tmp_path.chmod(0o500)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert_one_line(result.err, "v.npy")


# ---- writes that fail ----------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("format", ["jsonl", "npy"])
def test_a_full_disk_behind_standard_output_is_one_line(format):
    with open("/dev/full", "wb") as full:
        started = process("embed", "one", "--model", "tiny", "--format", format, stdout=full)
        _, err = started.communicate(timeout=60)
    assert started.returncode == 1
    assert_one_line(err.decode(), "No space left on device")


@pytest.fixture
def quota():
    """with quota(n): no file may grow over n bytes, like a disk that fills up. Nor may the file that pytest reports to,
    if that is where its output goes: so only as long as needed."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def full(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return full


def readable_rows(path: Path, format: str) -> np.ndarray:
    return read_vectors(path, "npy" if format == "npz" else format)


@pytest.fixture
def small_windows(monkeypatch):
    """4 texts are read, embedded and written at a time."""
    monkeypatch.setattr("modernbert_lite.pipeline.feed._WINDOW_TEXTS", 4)


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_a_disk_that_fills_up_loses_nothing(run, tmp_path, quota, small_windows, format):
    """The old file stays, what is finished is kept as a valid file, the shell says so."""
    out, partial = tmp_path / f"v.{format}", tmp_path / f"v.{format}.partial"
    out.write_bytes(b"an older result")
    texts = [f"text {i}" for i in range(100)]
    with quota(50 * (4_800 if format == "jsonl" else 1_536)):
        result = run("embed", "--model", "tiny", "-o", out, stdin="\n".join(texts).encode())
    assert result.status == 1
    kept = readable_rows(partial, format)
    assert 4 <= len(kept) < 100
    assert np.abs(kept - Embedder.from_pretrained("tiny").encode(texts[: len(kept)])).max() <= 1e-5
    assert out.read_bytes() == b"an older result"
    assert sorted(os.listdir(tmp_path)) == [out.name, partial.name]
    lines = result.err.splitlines()
    assert lines[0] == f"modernbert-lite: {len(kept)} finished rows are in {partial}"
    assert re.search("File too large|No space left", lines[1])
    assert len(lines) == 2


def test_a_disk_that_fills_up_while_the_npz_is_made_loses_nothing(run, tmp_path, quota, small_windows):
    out, partial = tmp_path / "v.npz", tmp_path / "v.npz.partial"
    out.write_bytes(b"an older result")
    with quota(128 + 8 * 1_536 + 50):  # all vectors fit, and the archive's own bytes don't
        result = run("embed", "--model", "tiny", "-o", out, stdin=b"text\n" * 8)
    assert result.status == 1
    assert "Traceback" not in result.err
    assert out.read_bytes() == b"an older result"
    assert readable_rows(partial, "npz").shape == (8, 384)
    assert sorted(os.listdir(tmp_path)) == [out.name, partial.name]


@pytest.mark.parametrize("format", ["jsonl", "npy"])
def test_an_interruption_inside_a_block_leaves_no_torn_row(run, tmp_path, monkeypatch, small_windows, format):
    from modernbert_lite.cli import writers

    written = 0
    line, rows = writers._json_line, np.ascontiguousarray

    def interrupted(function, after):
        def call(*args):
            nonlocal written
            written += 1
            if written > after:
                raise KeyboardInterrupt
            return function(*args)

        return call

    monkeypatch.setattr(writers, "_json_line", interrupted(line, 6))
    monkeypatch.setattr(writers.np, "ascontiguousarray", interrupted(rows, 1))
    out = tmp_path / f"v.{format}"
    result = run("embed", "--model", "tiny", "-o", out, stdin=b"text\n" * 12)
    assert result.status == 130
    kept = readable_rows(tmp_path / f"v.{format}.partial", format)
    assert 4 <= len(kept) <= 6
    assert result.err.splitlines()[0] == f"modernbert-lite: {len(kept)} finished rows are in {out}.partial"


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_a_failure_in_the_middle_keeps_what_is_finished(run, tmp_path, small_windows, format):
    out = tmp_path / f"v.{format}"
    out.write_bytes(b"an older result")
    stdin = b"".join(b"text %d\n" % i for i in range(9)) + b"\xff\n"
    result = run("embed", "--model", "tiny", "-o", out, stdin=stdin)
    assert result.status == 1
    lines = result.err.splitlines()
    assert lines[0] == f"modernbert-lite: 8 finished rows are in {out}.partial"
    assert "line 10: not UTF-8" in lines[1]
    assert out.read_bytes() == b"an older result"
    assert len(readable_rows(tmp_path / f"v.{format}.partial", format)) == 8


def test_what_an_earlier_run_finished_is_not_written_over(run, tmp_path):
    (tmp_path / "v.npy.partial").write_bytes(b"of an earlier run")
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 1
    assert "v.npy.partial holds what an earlier run finished" in result.err
    assert (tmp_path / "v.npy.partial").read_bytes() == b"of an earlier run"


@POSIX
def test_output_follows_a_link_and_spares_what_is_no_file(run, tmp_path):
    (tmp_path / "real.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("real.npy")
    assert run("embed", "one", "--model", "tiny", "-o", tmp_path / "link.npy").status == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "real.npy").shape == (1, 384)
    os.mkfifo(tmp_path / "pipe.npy")
    assert run("embed", "one", "--model", "tiny", "-o", tmp_path / "pipe.npy").status == 2
    assert (tmp_path / "pipe.npy").is_fifo()


def test_records_keep_their_other_fields_whatever_they_hold(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "ok", "note": "\\ud800", "embedding": [1]}\n')
    assert run("embed", "--model", "tiny", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").status == 0
    line = (tmp_path / "out.jsonl").read_text()
    assert line.count('"embedding"') == 1
    assert json.loads(line)["note"] == "\ud800"


def test_options_that_the_model_does_not_have_are_bad_usage(run):
    for option in (["--truncate-dim", "5000"], ["--prompt-name", "nope"], ["--device", "banana"]):
        assert run("embed", "one", "--model", "tiny", *option).status == 2


def test_a_terminal_s_commands_are_shown_not_obeyed(run):
    result = run("rerank", "q", "evil \x1b]0;title\x07 text")
    assert b"\x1b" not in result.out
    assert b"\\x1b]0;title\\x07" in result.out


# ---- Ctrl-C and pipes ----------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("format", ["npy", "jsonl"])
def test_ctrl_c_keeps_finished_rows(tmp_path, format):
    out, partial = tmp_path / f"v.{format}", tmp_path / f"v.{format}.partial"
    # Its own handler of SIGINT, which is ignored where the tests run in a shell's background.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from modernbert_lite import cli; from modernbert_lite.pipeline import feed\n"
    code += "feed._WINDOW_TEXTS = 64; sys.exit(cli.main())"
    with process("embed", "--model", "tiny", "-o", out, code=code) as started:
        # One whole window, and a beginning of the next, whose end never comes.
        started.stdin.write(b"".join(b"text %d\n" % i for i in range(64 + 10)))
        started.stdin.flush()
        size, deadline = 0, time.monotonic() + 60
        while time.monotonic() < deadline and not size:  # until the first window is written
            time.sleep(0.1)
            size = partial.stat().st_size // 65_536 if partial.exists() else 0
        time.sleep(1.0)
        started.send_signal(signal.SIGINT)
        err = started.stderr.read().decode()
    assert started.returncode == 130
    assert err.splitlines() == [
        f"modernbert-lite: 64 finished rows are in {partial}",
        "modernbert-lite: interrupted",
    ]
    assert readable_rows(partial, format).shape == (64, 384)
    assert os.listdir(tmp_path) == [partial.name]


def test_ctrl_c_before_anything_is_finished_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Embedder, "stream", interrupted)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 130
    assert_one_line(result.err, "interrupted")
    assert os.listdir(tmp_path) == []


@POSIX
def test_ctrl_c_while_the_model_loads_is_one_line(run, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modernbert_lite.checkpoint.open.load_weights", interrupted)
    result = run("embed", "one", "--model", "tiny", "-o", tmp_path / "v.npy")
    assert result.status == 130
    assert_one_line(result.err, "interrupted")


@POSIX
def test_a_closed_pipe_is_quiet(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("text\n" * 300)
    with process("embed", "--model", "tiny", "-i", path, stdin=subprocess.DEVNULL) as started:
        started.stdout.readline()
        started.stdout.close()  # as `| head -1` does
        err = started.stderr.read().decode()
    assert started.returncode in (0, 1)
    assert err == ""


@POSIX
def test_a_whole_pipeline_in_the_shell():
    command = f'printf "one\\ntwo\\n" | {sys.executable} -m modernbert_lite embed --model tiny --format npy | cat'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert done.stderr == b""
    assert np.load(io.BytesIO(done.stdout)).shape == (2, 384)


@pytest.mark.parametrize("format", ["table", "jsonl"])
def test_text_that_the_terminal_can_not_show_is_no_failure(run, monkeypatch, format):
    """Hours of work must not end in a UnicodeEncodeError of print (Windows, PYTHONIOENCODING, LC_ALL=POSIX)."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    result = run("rerank", "music", "Ж猫 and naïve", "--format", format)
    assert result.status == 0, result.err
    assert b"and na" in narrow.buffer.getvalue()


# ---- rerank, fill-mask, info, doctor -------------------------------------------------------------------------------


def test_rerank_without_a_model_ranks_by_cosine_and_says_so(run):
    result = run("rerank", "someone plays music", *TEXTS)
    assert result.status == 0
    header, *rows = result.text.splitlines()
    assert header.split() == ["rank", "score", "document", "text"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    scores = [float(row.split()[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[2].split()[2] == "1"  # the stocks
    assert "'tiny'" in result.err
    assert "cosine" in result.err
    model = Embedder.from_pretrained("tiny")
    expected = model.similarity(model.encode("someone plays music"), model.encode(TEXTS))[0]
    assert scores == [round(float(s), 4) for s in sorted(expected, reverse=True)]


def test_rerank_to_jsonl(run, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"body": text} for text in TEXTS])
    result = run("rerank", "music", "-i", path, "--field", "body", "--format", "jsonl", "--top-k", "2")
    assert [set(record) for record in result.records] == [{"corpus_id", "score", "text"}] * 2
    assert all(TEXTS[r["corpus_id"]] == r["text"] for r in result.records)
    assert run("rerank", "music", "--format", "jsonl", stdin=b"").out == b""


def test_rerank_reads_documents_from_standard_input(run):
    result = run("rerank", "music", "--format", "jsonl", stdin="\n".join(TEXTS).encode())
    assert sorted(r["corpus_id"] for r in result.records) == [0, 1, 2]


def test_rerank_shows_long_documents_on_one_line(run):
    result = run("rerank", "music", "line one\nline two\t" + "x" * 500, "short")
    assert len(result.text.splitlines()) == 3
    assert max(map(len, result.text.splitlines())) < 150


def test_rerank_with_a_reranker_is_a_cross_encoder(run, make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_labels=1, num_hidden_layers=2)
    result = run("rerank", "music", *TEXTS, "--model", folder, "--format", "jsonl")
    expected = modernbert_lite.Reranker.from_pretrained(folder).rank("music", TEXTS, return_documents=True)
    assert [r["corpus_id"] for r in result.records] == [r["corpus_id"] for r in expected]
    assert [r["score"] for r in result.records] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert result.err == ""
    refused = run("embed", "a", "--model", folder)
    assert refused.status == 1
    assert_one_line(refused.err, "use Reranker")


def test_rerank_refuses_an_embedder_by_name(run):
    result = run("rerank", "music", "a", "--model", "tiny")
    assert result.status == 1
    assert_one_line(result.err, "use Embedder")


def test_fill_mask(run, make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", num_hidden_layers=2)
    texts = ["The [MASK] is here.", "[MASK] and [MASK]"]
    result = run("fill-mask", *texts, "--model", folder, "--top-k", "3", "--format", "jsonl")
    expected = modernbert_lite.FillMask.from_pretrained(folder).predict(texts, top_k=3)
    assert [record["text"] for record in result.records] == texts
    for record, masks in zip(result.records, expected, strict=True):
        assert [[t["token_id"] for t in m] for m in record["masks"]] == [[t["token_id"] for t in m] for m in masks]
    table = run("fill-mask", *texts, "--model", folder, "--top-k", "3").text.splitlines()
    assert table[0].split() == ["text", "mask", "token", "probability"]
    assert [row.split()[:2] for row in table[1:]] == [["0", "0"]] * 3 + [["1", "0"]] * 3 + [["1", "1"]] * 3
    missing = run("fill-mask", "no mask", "--model", folder)
    assert missing.status == 1
    assert_one_line(missing.err, "text 0 has no [MASK]")


def test_info(run):
    facts = json.loads(run("info", "--json").text)
    assert facts["architecture"] == "ModernBertModel"
    assert facts["use"] == "Embedder"
    assert facts["hidden size"] == 384
    assert facts["vocabulary"] == 16384
    assert facts["layers"] == "4 (2 global)"
    assert facts["local window"] == "128 (64 on each side)"
    assert facts["pooling"] == "mean"
    assert facts["normalizes"] is True
    assert facts["max length"] == 512
    assert facts["prompts"] == {"query": "", "document": ""}
    size = (Path(modernbert_lite.__file__).parent / "tiny" / "model.safetensors").stat().st_size
    assert facts["files"]["model.safetensors"] == size
    assert "1_Pooling/config.json" in facts["files"]
    bits = {"F32": 4, "F16": 2, "BF16": 2}[facts["stored as"]]
    assert 0 < size - bits * facts["parameters"] < 20_000
    table = run("info", "tiny").text
    for key in facts:
        assert re.search(rf"^{re.escape(key)}  ", table, re.MULTILINE)


def test_info_of_a_classifier(run, make_checkpoint):
    folder, model = make_checkpoint(
        "ModernBertForSequenceClassification",
        num_hidden_layers=1,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    facts = json.loads(run("info", folder, "--json").text)
    assert (facts["use"], facts["labels"], facts["pooling"]) == ("Classifier or Reranker", ["no", "yes"], "none said")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_doctor(run):
    start = time.perf_counter()
    result = run("doctor")
    assert result.status == 0
    assert time.perf_counter() - start < 15
    for what in ("torch", "device", "backend of linear", "backend of attention", "C compiler for Triton", "threads"):
        assert re.search(rf"^{what} +\S", result.text, re.MULTILINE), what
    assert "self-check passed" in result.text


def test_doctor_fails_when_the_numbers_are_wrong(run, monkeypatch):
    right = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, *a, **k: right(self, *a, **k)[:, ::-1] * -1 + 0.3)
    result = run("doctor")
    assert result.status == 1
    assert_one_line(result.err, "self-check failed")


def test_doctor_names_an_unknown_backend(run, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "cuda")
    result = run("doctor")
    assert result.status == 2
    assert_one_line(result.err, "MODERNBERT_LITE_BACKEND is 'cuda'")
