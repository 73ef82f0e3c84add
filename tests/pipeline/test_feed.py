"""Texts -> windows -> pieces -> batches: tokenizing beside computing, who reads the texts, and that no thread stays."""

import itertools
import threading
import time

import numpy as np
import pytest
from tqdm import tqdm

from modernbert_lite import Embedder
from modernbert_lite.batch import CPU_BATCH_TOKENS
from modernbert_lite.pipeline import feed as pipeline

WORDS = ["river", "stone", "quick", "green", "house", "never", "apple", "walk", "under", "seven", "music"]
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(i * 5 % 13)) for i in range(60)]
WAIT = 20.0  # seconds for what takes milliseconds: only a failing test waits


@pytest.fixture
def model():
    return Embedder.from_pretrained("tiny", device="cpu", dtype="float32")


@pytest.fixture
def small(monkeypatch):
    """Windows of 20 texts, in pieces of some 200 characters."""
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 20)
    monkeypatch.setattr(pipeline, "_PIECE_CHARACTERS", 200)


@pytest.fixture
def count(monkeypatch):
    """How many threads there are now that the test did not begin with."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # the progress bar's own thread stays
    before = set(threading.enumerate())
    return lambda: len(set(threading.enumerate()) - before)


def watch(monkeypatch, model, before=lambda texts: None):
    """Calls `before` with the texts of every call of the tokenizer; gives the threads that called it."""
    encode, callers = model.tokenizer.encode_typed, []

    def watched(texts, *rest):
        callers.append(threading.current_thread())
        before(texts)
        return encode(texts, *rest)

    monkeypatch.setattr(model.tokenizer, "encode_typed", watched)
    return callers


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_pieces_and_windows_change_nothing(model, small, batch_tokens):
    expected = np.stack([model.encode(text) for text in TEXTS])
    model.batch_tokens = batch_tokens
    assert np.abs(model.encode(TEXTS) - expected).max() <= 1e-5


def test_batches_are_full_across_pieces_and_long_texts_come_first(model, small, monkeypatch):
    """What a piece leaves over shares a batch with the next one."""
    model.batch_tokens, seen, network = 60, [], model.forward
    monkeypatch.setattr(model, "forward", lambda batch, *rest: seen.append(batch.seqlens) or network(batch, *rest))
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 1_000)
    assert len(pipeline._pieces(TEXTS)) >= 5
    model.encode(TEXTS)
    assert sorted(n for lengths in seen for n in lengths) == sorted(map(len, model.tokenizer.encode(TEXTS)[0]))
    assert all(sum(lengths) <= 60 for lengths in seen)
    for lengths, after in itertools.pairwise(seen):
        assert sum(lengths) + max(after) > 60 - 6  # a piece that comes later may be a few tokens longer
        assert max(lengths) + 6 >= max(after)


def test_by_default_the_device_says_how_many_tokens_a_batch_has(model):
    assert model.batch_tokens == CPU_BATCH_TOKENS
    assert Embedder.from_pretrained("tiny", device="cpu", batch_tokens=77).batch_tokens == 77


@pytest.mark.parametrize("size", [1, 200, 10_000])
def test_pieces_hold_every_text_once_longest_first(monkeypatch, size):
    monkeypatch.setattr(pipeline, "_PIECE_CHARACTERS", size)
    texts = [*TEXTS, ("a pair " * 9, "of texts")]
    pieces = pipeline._pieces(texts)
    order = [i for piece in pieces for i in piece]
    lengths = [len(t) if isinstance(t, str) else len("".join(t)) for t in texts]
    assert sorted(order) == list(range(len(texts)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for piece in pieces:
        assert piece
        assert sum(lengths[i] for i in piece[:-1]) < size
    for piece in pieces[:-1]:
        assert sum(lengths[i] for i in piece) >= size


# ---- beside computing ------------------------------------------------------------------------------------------------


def test_the_next_piece_is_tokenized_while_one_is_computed(model, small, monkeypatch):
    """The first batch waits until the tokenizer is at work on what comes after its own piece."""
    texts = TEXTS[:20]
    pieces = pipeline._pieces(texts)
    assert len(pieces) >= 3
    started, network, alone = threading.Event(), model.forward, []
    first = [texts[i] for i in pieces[0]]
    callers = watch(monkeypatch, model, lambda texts: texts != first and started.set())

    def forward(batch, *rest):
        alone.append(not started.wait(WAIT))
        return network(batch, *rest)

    monkeypatch.setattr(model, "forward", forward)
    model.batch_tokens = 8  # so that the first piece alone gives batches
    model.encode(texts)
    assert not any(alone)
    assert len(callers) == len(pieces)
    assert threading.current_thread() not in callers[1:]  # nothing could go on beside the first piece


@pytest.mark.parametrize(("ahead", "on_a_card"), [(1, False), (pipeline._GPU_PIECES_AHEAD, True)])
def test_a_card_has_several_pieces_ahead_and_a_cpu_one(model, small, monkeypatch, ahead, on_a_card):
    """When the first batch is computed, its own piece and as many more have been handed to the tokenizer, no more."""
    monkeypatch.setattr(pipeline, "looks_ahead", lambda device: on_a_card)
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", len(TEXTS))
    pieces = pipeline._pieces(TEXTS)
    assert len(pieces) > ahead + 2
    assert len(pieces[0]) > 1  # so that it alone gives a batch
    network, done = model.forward, []
    callers = watch(monkeypatch, model)

    def forward(batch, *rest):
        if not done:
            deadline = time.monotonic() + WAIT
            while len(callers) < ahead + 1 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)  # for one too many
            done.append(len(callers))
        return network(batch, *rest)

    monkeypatch.setattr(model, "forward", forward)
    model.batch_tokens = 1
    model.encode(TEXTS)
    assert done == [ahead + 1]
    assert len(callers) == len(pieces)


def test_a_small_input_needs_no_other_thread(model, monkeypatch):
    callers = watch(monkeypatch, model)
    model.encode(TEXTS[:20])
    assert callers == [threading.current_thread()]


def test_texts_are_read_in_the_caller_s_thread_and_no_further_than_needed(model, small):
    readers, read = set(), 0

    def texts():
        nonlocal read
        for text in TEXTS:
            readers.add(threading.current_thread())
            read += 1
            yield text

    for blocks, block in enumerate(model.stream(texts()), 1):
        assert len(block) == 20
        assert read == blocks * 20  # so a source that waits keeps nothing back that is finished
    assert readers == {threading.current_thread()}


# ---- failures ------------------------------------------------------------------------------------------------------


def test_finished_windows_come_before_the_error(model, small, count):
    def texts():
        yield from TEXTS[:50]
        raise OSError("the disk is gone")

    stream = model.stream(texts())
    assert [len(next(stream)), len(next(stream))] == [20, 20]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert count() == 0


def test_the_first_bad_text_is_named_whichever_piece_it_is_in(model, small, count):
    texts = [*TEXTS[:20], "short \ud800", *TEXTS[21:29], "long " * 30 + "\udfff", *TEXTS[30:]]
    stream = model.stream(iter(texts))
    assert len(next(stream)) == 20
    with pytest.raises(ValueError, match="text 20 is not valid Unicode"):
        next(stream)
    assert count() == 0


def test_the_first_long_text_is_named_whichever_piece_it_is_in(small, count):
    model = Embedder.from_pretrained("tiny", max_seq_length=40, on_long="error")
    texts = [*TEXTS[:25], "ten " * 45, *TEXTS[26:30], "word " * 200, *TEXTS[31:]]
    with pytest.raises(ValueError, match="text 25 is longer than 40 tokens"):
        model.encode(texts)
    assert count() == 0


def test_cut_texts_of_all_pieces_are_counted(small):
    model = Embedder.from_pretrained("tiny", max_seq_length=9, batch_tokens=20)
    cut = sum(len(text.split()) > 7 for text in TEXTS)
    assert 0 < cut < 60
    with pytest.warns(UserWarning, match=f"^{cut} of 60 texts were longer than 9 tokens and were cut"):
        model.encode(TEXTS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 3])
def test_a_failure_while_computing_leaves_no_thread(model, small, monkeypatch, count, error, call):
    network, calls, threads = model.forward, 0, []

    def forward(batch, *rest):
        nonlocal calls
        calls += 1
        threads.append(count())
        if calls == call:
            raise error("stop")
        return network(batch, *rest)

    monkeypatch.setattr(model, "forward", forward)
    model.batch_tokens = 8  # so that the first piece alone gives batches, while the thread is at the others
    with pytest.raises(error) as caught:  # held, with its frames: they must not be what ends the thread
        model.encode(TEXTS)
    assert caught.value.args == ("stop",)
    assert threads[0] == 1
    assert count() == 0


def test_a_failure_while_results_are_taken_leaves_no_thread(model, small, monkeypatch, count):
    rows = iter(range(1_000))

    class Bar:
        def update(self, _):
            if next(rows) == 1:
                assert count() == 1
                raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(pipeline, "_progress", lambda *_: Bar())
    model.batch_tokens = 8
    with pytest.raises(KeyboardInterrupt) as caught:
        model.encode(TEXTS)
    assert caught.tb  # held
    assert count() == 0


def test_no_thread_is_there_between_blocks(model, small, count):
    stream = model.stream(TEXTS)
    next(stream)
    assert count() == 0
    next(stream)
    stream.close()
    assert count() == 0


def test_threads_of_the_caller_may_share_a_model(model, small):
    expected, results = model.encode(TEXTS), {}

    def work(n):
        results[n] = model.encode(TEXTS)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.abs(results[n] - expected).max() <= 1e-5 for n in range(4))
