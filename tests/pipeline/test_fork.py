"""A process that was forked after a model was loaded computes, with one thread."""

import os
import subprocess
import sys
import threading

import pytest

from modernbert_lite.ops import threads, tracing
from modernbert_lite.reading import OptionError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

HEAD = """
import os, signal, sys
import numpy as np
from modernbert_lite import Embedder, load_model
TEXTS = ["a river and a stone " * 9, "two", "", "green house"] * 4
def wait(child):
    print(os.waitpid(child, 0)[1], flush=True)
def ends():
    signal.alarm(60)  # a child that waits for threads that it doesn't have
"""
WORKS = {
    "loaded": """
model = Embedder.from_pretrained("tiny", device="cpu")
child = os.fork()
if not child:
    ends(); vectors = model.encode(TEXTS); np.save(sys.argv[1], vectors); os._exit(0)
wait(child)
print(np.abs(np.load(sys.argv[1]) - model.encode(TEXTS)).max() <= 1e-5)
""",
    "loads again": """
model = Embedder.from_pretrained("tiny", device="cpu")
model.encode(TEXTS)
child = os.fork()
if not child:
    ends(); os.environ["MODERNBERT_LITE_THREADS"] = "2"
    other = Embedder.from_pretrained("tiny", device="cpu", threads=None)
    np.save(sys.argv[1], model.encode(TEXTS) + 0 * other.encode(TEXTS)); os._exit(0)
wait(child)
print(np.abs(np.load(sys.argv[1]) - model.encode(TEXTS)).max() <= 1e-5)
""",
    "network alone": """
from modernbert_lite import pack
network = load_model("tiny", device="cpu")
child = os.fork()
if not child:
    ends(); network(pack([[5, 6, 7] * 30] * 8)); os._exit(0)
wait(child)
print(True)
""",
    "pool": """
import multiprocessing
model = Embedder.from_pretrained("tiny", device="cpu")
expected = model.encode(TEXTS)
signal.alarm(60)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(0, flush=True)
    print(all(np.abs(vectors - expected).max() <= 1e-5 for vectors in pool.map(model.encode, [TEXTS] * 3)))
""",
    "futures": """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
model = Embedder.from_pretrained("tiny", device="cpu")
expected = model.encode(TEXTS)
signal.alarm(60)
def work(_):
    return model.encode(TEXTS)
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    print(0, flush=True)
    print(all(np.abs(vectors - expected).max() <= 1e-5 for vectors in pool.map(work, range(3))))
""",
}


@pytest.mark.parametrize(
    ("name", "parallel"),
    [("loaded", None), ("loads again", "true"), ("network alone", None), ("pool", None), ("futures", None)],
)
def test_a_forked_child_computes(name, parallel, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "RAYON_", "TOKENIZERS_", "MODERNBERT"))}
    if parallel:
        clean["TOKENIZERS_PARALLELISM"] = parallel
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HEAD + WORKS[name], str(tmp_path / "vectors.npy")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    )
    assert done.stdout == "0\nTrue\n", done.stderr[-1_000:]


def test_a_lock_that_another_thread_held_is_new_in_the_child(monkeypatch):
    monkeypatch.setattr(threads, "_forked", False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    held, release = threading.Event(), threading.Event()

    def hold():
        with tracing._making:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    monkeypatch.setattr(tracing, "_making", tracing._making)  # put back afterwards
    thread.start()
    held.wait(20)
    threads._after_fork()
    assert tracing._making.acquire(blocking=False)
    release.set()
    thread.join()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_in_a_forked_process_more_threads_are_refused_and_never_set_back(monkeypatch):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(threads, "_quotas", lambda _: [4])
    monkeypatch.setattr(threads, "_forked", True)
    monkeypatch.setenv("MODERNBERT_LITE_THREADS", "3")
    threads.set_threads(None)
    assert torch.get_num_threads() == 1
    threads.set_threads(1)
    with pytest.raises(OptionError, match="threads is 2; a process that was forked after a model was loaded computes"):
        threads.set_threads(2)
