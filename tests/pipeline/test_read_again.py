"""What gives other items when it is read again, and numbers that float32 can't hold."""

import collections

import numpy as np
import pytest

from modernbert_lite import Embedder, LateInteraction, Reranker

TEXTS = ["a river", "two stones", "東京 naïve", "", "green house"]


@pytest.fixture(scope="module")
def tiny():
    return Embedder.from_pretrained("tiny", device="cpu")


class Once(collections.abc.Sequence):
    """Its items come once."""

    def __init__(self):
        self.items = iter(TEXTS)

    def __iter__(self):
        return self.items

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return TEXTS[i]


class Drawn(Once):
    """Its items change."""

    def __iter__(self):
        self.items, items = ["a", None], getattr(self.items, "copy", TEXTS.copy)()
        return iter(items)


def test_rows_that_are_missing_the_second_time_are_an_error(tiny, small_folders):
    reranker = Reranker.from_pretrained(small_folders["reranker"], device="cpu")
    late = LateInteraction.from_pretrained(small_folders["late"], device="cpu")
    message = "Once gave 5 items when it was checked, and 0 after that; give a list"
    for call in (tiny.encode, tiny.encode_query, tiny.token_ids, late.encode_queries, late.encode_documents):
        with pytest.raises(ValueError, match=message):
            call(Once())
    for ours in (lambda texts: list(tiny.stream(texts)), lambda texts: reranker.rank("q", texts)):
        with pytest.raises(ValueError, match=message):
            ours(Once())
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        tiny.encode(Drawn())


def test_complex_numbers_and_numbers_too_large_are_refused(tiny):
    with pytest.raises(TypeError, match="they are complex"):
        tiny.similarity([[1 + 2j]], [[1.0]])
    for large in (np.array([[1e300]]), [[1e300]]):
        with pytest.raises(ValueError, match="some are too large for float32"):
            tiny.similarity(large, large)


def test_a_model_s_name_of_another_type_is_refused():
    with pytest.raises(TypeError, match="the model is 5; it must be a folder, a hub id, or 'tiny'"):
        Embedder.from_pretrained(5)
