"""Embedder: texts of any kind, order and number in, vectors in the caller's order out; and what is refused."""

import itertools
import threading
import time

import numpy as np
import pytest
from embedder_cases import WORDS, assert_same, text, tiny  # noqa: F401

from modernbert_lite import Embedder


def test_vectors_come_in_the_callers_order_whatever_the_batch(tiny):
    texts = [text(i, n) for i, n in enumerate([3, 200, 1, 70, 70, 0, 12, 130, 2, 64, 33])]
    alone = np.stack([tiny.encode(t) for t in texts])
    assert_same(tiny.encode(texts), alone)
    assert_same(tiny.encode(texts[::-1]), alone[::-1])
    assert_same(tiny.encode(texts * 3), np.concatenate([alone] * 3))
    for batch_tokens in (1, 100, 1 << 20):
        other = Embedder.from_pretrained("tiny", batch_tokens=batch_tokens)
        assert_same(other.encode(texts), alone)


def test_vectors_are_fp32_and_of_unit_length_where_the_repository_says_so(tiny):
    vectors = tiny.encode(["one", "two words"])
    assert (vectors.dtype, vectors.shape, tiny.dimension) == (np.float32, (2, 384), 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_one_string_gives_one_vector(tiny):
    vector = tiny.encode("one")
    assert vector.shape == (384,)
    assert_same(vector[None], tiny.encode(["one"]))


def test_nothing_gives_an_empty_array_of_the_right_width(tiny):
    for nothing in ([], (), iter([])):
        assert tiny.encode(nothing).shape == (0, 384)
    assert tiny.encode([]).dtype == np.float32
    assert tiny.encode([], truncate_dim=96).shape == (0, 96)
    assert tiny.encode([], precision="float16").dtype == np.float16
    assert tiny.encode([], precision="ubinary").shape == (0, 48)
    assert tiny.encode([], precision="int8").shape == (0, 384)
    assert list(tiny.stream([])) == []


def test_an_empty_string_is_embedded(tiny):
    vectors = tiny.encode(["", "word", ""])
    assert np.isfinite(vectors).all()
    assert_same(vectors[0], vectors[2])
    assert_same(vectors[:1], tiny.encode([""]))


@pytest.mark.parametrize("kind", [tuple, iter, lambda t: (x for x in t), lambda t: dict.fromkeys(t).keys(), np.array])
def test_any_iterable_of_strings_is_taken(tiny, kind):
    texts = ["first", "second of them", "third"]
    assert_same(tiny.encode(kind(texts)), tiny.encode(texts))


def test_a_generator_is_read_lazily(tiny):
    read = 0

    def endless():
        nonlocal read
        for i in itertools.count():
            read += 1
            yield WORDS[i % len(WORDS)]

    blocks = tiny.stream(endless())
    assert read == 0
    first = next(blocks)
    assert read == len(first) <= 4_096
    second = next(blocks)
    assert read == len(first) + len(second) <= 2 * 4_096
    assert_same(first[: len(WORDS)], tiny.encode(WORDS))


@pytest.mark.filterwarnings("ignore:. of 6 texts were longer than 8 tokens")
def test_long_texts_are_read_by_characters_not_by_number():
    model = Embedder.from_pretrained("tiny", max_seq_length=8)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "word " * 40_000

    blocks = model.stream(endless())
    next(blocks)
    assert read <= 6  # 1 MiB in texts of 200 kB
    blocks.close()


def test_encode_takes_a_generator_of_more_than_one_window(tiny):
    count = 4_096 + 5
    vectors = tiny.encode(WORDS[i % len(WORDS)] for i in range(count))
    assert_same(vectors, np.resize(tiny.encode(WORDS), (count, 384)))


def test_threads_may_share_one_embedder(tiny):
    texts = [[text(i + n, 1 + (i * n) % 40) for i in range(20)] for n in range(4)]
    expected = [tiny.encode(t) for t in texts]
    results: dict[int, np.ndarray] = {}

    def work(n: int) -> None:
        for _ in range(3):
            results[n] = tiny.encode(texts[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert_same(results[n], expected[n])


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind"), [(None, "NoneType"), (7, "int"), (b"bytes", "bytes"), (["list"], "list"), (("a", "b"), "tuple")]
)
def test_an_item_that_is_no_string_is_named(tiny, bad, kind):
    with pytest.raises(TypeError, match=f"text 2 is {kind} .*each text must be a str"):
        tiny.encode(["fine", "fine", bad, "fine"])


@pytest.mark.parametrize("bad", [None, 7, 3.5])
def test_what_is_no_iterable_is_a_type_error(tiny, bad):
    with pytest.raises(TypeError):
        tiny.encode(bad)


def test_a_lone_surrogate_is_named_by_its_place_in_the_whole_input(tiny):
    with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
        tiny.encode(["fine", "broken \ud83d"])
    texts = itertools.chain(itertools.repeat("a", 4_100), ["\udc00"])
    with pytest.raises(ValueError, match="text 4100 is not valid Unicode"):
        tiny.encode(texts)


def test_over_long_texts_are_cut_counted_and_warned_of_once(tiny):
    texts = [text(i, 900) if i % 3 == 0 else "short" for i in range(10)]
    with pytest.warns(UserWarning, match="4 of 10 texts were longer than 512 tokens and were cut") as caught:
        vectors = tiny.encode(texts)
    assert len(caught) == 1
    assert np.isfinite(vectors).all()


def test_the_count_goes_over_all_windows():
    model = Embedder.from_pretrained("tiny", max_seq_length=6)
    texts = ["one two three four five six seven" if i % 1000 == 0 else "a" for i in range(5_000)]
    with pytest.warns(UserWarning, match="5 of 5000 texts were longer than 6 tokens") as caught:
        model.encode(texts)
    assert len(caught) == 1


def test_a_cut_text_is_its_beginning():
    model = Embedder.from_pretrained("tiny", max_seq_length=6)
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        cut = model.encode("one two three four five six seven")
    assert_same(cut, model.encode("one two three four"))


def test_over_long_texts_may_be_an_error():
    model = Embedder.from_pretrained("tiny", on_long="error")
    with pytest.raises(ValueError, match="text 2 is longer than 512 tokens, and on_long is 'error'"):
        model.encode(["short", "short", text(0, 900), "short"])
    assert model.encode(["short"]).shape == (1, 384)


def test_a_text_of_ten_megabytes_works_in_seconds(tiny):
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        vectors = tiny.encode(["a great deal of text, " * 460_000, "short"])
    assert time.perf_counter() - start < 5
    assert np.isfinite(vectors).all()


def test_nul_bytes_are_text(tiny):
    with_nul, without = tiny.encode(["a\0b", "ab"])
    assert np.isfinite(with_nul).all()
    assert np.abs(with_nul - without).max() > 1e-3


def test_ids_outside_the_vocabulary_are_refused(make_checkpoint):
    folder, _ = make_checkpoint(vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="not an embedding model"):
        model = Embedder.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary \(ids 0 to 999\)"):
        model.encode("some text")


# ---- options -------------------------------------------------------------------------------------------------------
