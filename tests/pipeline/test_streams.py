"""stderr may be missing, closed, full or anything at all, warnings may be errors, threads may go on after the main
one: what was asked for is given."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli
from modernbert_lite.pipeline import feed as pipeline

TEXTS = ["a river", "two stones", "", "word " * 30]


@pytest.fixture
def model():
    return Embedder.from_pretrained("tiny", device="cpu")


class Bare:
    """Only a write, as a logger's."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Raising(Bare):
    def isatty(self):
        return True

    def write(self, text):
        raise OSError(28, "No space left on device")

    flush = fileno = write


class Odd(Bare):
    def isatty(self):
        raise RuntimeError("no terminal here")

    def write(self, text):
        raise RuntimeError("no text here")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"None": lambda: None, "closed": closed, "full": Raising, "no isatty": Bare, "odd": Odd}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("show", [None, True, False])
def test_encode_gives_its_vectors_whatever_stderr_is(model, monkeypatch, name, show):
    expected = model.encode(TEXTS)
    model.max_seq_length = 20
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        # Not pytest's, which only keeps them. Python's own is silent for None and OSError, but not for what is closed.
        patch.setattr(warnings, "showwarning", lambda message, *_: sys.stderr.write(str(message)))
        patch.setattr(sys, "stderr", STREAMS[name]())
        vectors = model.encode(TEXTS, show_progress_bar=show)
    assert np.abs(vectors[:3] - expected[:3]).max() <= 1e-5
    assert vectors.shape == (4, 384)


@pytest.mark.parametrize("name", STREAMS)
def test_the_note_about_the_bundled_model_is_lost_at_worst(monkeypatch, capsys, name):
    stream = STREAMS[name]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert Embedder.from_pretrained(device="cpu").dimension == 384
    assert capsys.readouterr().out == ""
    if name == "no isatty":
        assert stream.text.startswith("modernbert-lite: using the bundled model 'tiny'")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stderr_loses_no_vector(tmp_path):
    program = """
import sys
from modernbert_lite import Embedder
model = Embedder.from_pretrained(device="cpu", max_seq_length=9)
print(model.encode(["word " * 30, "a"], show_progress_bar=True).shape)
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, timeout=60)
    assert done.stdout.decode() == "(2, 384)\n"


def test_without_a_bar_there_is_no_thread_of_one(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # so that it can't be imported
    before = set(threading.enumerate())
    assert model.encode(["a"]).shape == (1, 384)
    assert set(threading.enumerate()) == before


# ---- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"category": UserWarning}, {"category": Warning}])
def test_a_warning_that_is_an_error_comes_before_the_work(model, monkeypatch, how):
    calls, network = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a: calls.append(1) or network(*a))
    model.max_seq_length = 9
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error", **how)
        with pytest.raises(UserWarning, match=r"^1 of 4 texts were longer than 9 tokens and were cut") as caught:
            model.encode(TEXTS)
    assert not calls
    assert len(caught.value.finished) == 0


def test_what_was_finished_before_it_is_kept(model, monkeypatch):
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 3)
    expected = model.encode(TEXTS[:3])
    model.max_seq_length = 9
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* were longer than 9 tokens", UserWarning, __name__.replace(".", r"\."))
        with pytest.raises(UserWarning, match="1 of 4 texts were longer") as caught:
            model.encode(TEXTS)
    assert np.array_equal(caught.value.finished, expected)


@pytest.mark.parametrize("action", ["ignore", "always"])
def test_the_first_filter_that_fits_counts(model, action):
    model.max_seq_length = 9
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        warnings.filterwarnings(action, ".* were cut", UserWarning)
        assert model.encode(TEXTS).shape == (4, 384)
    assert [str(w.message) for w in seen] == ["1 of 4 texts were longer than 9 tokens and were cut"] * (
        action == "always"
    )


# ---- threads ---------------------------------------------------------------------------------------------------------

LATE = """
import atexit, sys, threading, time
from modernbert_lite import Embedder
model = Embedder.from_pretrained("tiny", device="cpu", max_seq_length=9)
small, large = ["a text"] * 3, ["text number %d " % i * 60 for i in range(120)]
def work():
    time.sleep(0.3)
    for texts in (small, large):
        print(model.encode(texts).shape, flush=True)
if sys.argv[1] == "thread":
    threading.Thread(target=work).start()
else:
    atexit.register(work)
"""


@pytest.mark.parametrize("how", ["thread", "atexit"])
def test_work_goes_on_after_the_main_thread_has_ended(how):
    command = [sys.executable, "-W", "error", "-W", "ignore::UserWarning", "-c", LATE, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ("(3, 384)\n(120, 384)\n", "")


def test_where_no_thread_can_be_started_none_is_needed(model, monkeypatch):
    monkeypatch.setattr(pipeline, "_PIECE_CHARACTERS", 10)
    expected = model.encode(TEXTS)

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert np.abs(model.encode(TEXTS) - expected).max() <= 1e-5


def test_a_warning_from_within_points_at_the_caller(model):
    """Also where frames of torch lie between."""
    from modernbert_lite.reading import warn

    model.network.register_forward_hook(lambda *_: warn("from a hook"))
    with pytest.warns(UserWarning, match="from a hook") as seen:
        model.encode("a")
    assert seen[0].filename == __file__


@pytest.mark.parametrize("name", STREAMS)
def test_a_warning_at_loading_is_told_or_lost_and_nothing_else(small_folders, monkeypatch, tmp_path, name):
    """The warning of config.json's old key, which a file of transformers 4 may have."""
    folder = shutil.copytree(small_folders["dense"], tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", lambda message, *_: sys.stderr.write(str(message)))
        patch.setattr(sys, "stderr", STREAMS[name]())
        assert Embedder.from_pretrained(folder, device="cpu").encode(["a"]).shape == (1, 7)


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in ("closed",)])
def test_the_shell_s_status_is_right_whatever_stderr_is(monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    to = tmp_path / "vectors.npy"
    assert cli.main(["embed", "a text", "--output", str(to)]) == 0
    assert np.load(to).shape == (1, 384)
