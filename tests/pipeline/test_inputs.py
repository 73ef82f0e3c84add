"""What users give for texts, pairs, numbers and options: taken, checked before any work, or refused by name."""

import array
import collections
import itertools
import types
import warnings

import numpy as np
import pytest
import torch

from modernbert_lite import (
    Embedder,
    FillMask,
    LateInteraction,
    OptionError,
    Reranker,
)
from modernbert_lite.batch import pack
from modernbert_lite.late_interaction import maxsim
from modernbert_lite.pipeline.inputs import keeping
from modernbert_lite.pipeline.vectors import quantize_embeddings

TEXTS = ["a river", "two stones", "東京 naïve", "", "green house"]
MASKED = [f"{text} [MASK]" for text in TEXTS]


@pytest.fixture(scope="module")
def models(small_folders):
    return {
        "dense": Embedder.from_pretrained("tiny", device="cpu"),
        "reranker": Reranker.from_pretrained(small_folders["reranker"], device="cpu"),
        "masked": FillMask.from_pretrained(small_folders["masked"], device="cpu"),
        "late": LateInteraction.from_pretrained(small_folders["late"], device="cpu"),
    }


@pytest.fixture
def tiny(models):
    return models["dense"]


def ways(models):
    """name -> (model, call(texts)): everywhere texts or documents are taken."""
    dense, reranker, masked, late = models.values()
    return {
        "encode": (dense, dense.encode),
        "encode_query": (dense, dense.encode_query),
        "stream": (dense, lambda texts: list(dense.stream(texts))),
        "rank": (reranker, lambda texts: reranker.rank("q", texts)),
        "predict": (masked, masked.predict),
        "encode_queries": (late, late.encode_queries),
        "encode_documents": (late, late.encode_documents),
    }


WAYS = ("encode", "encode_query", "stream", "rank", "predict", "encode_queries", "encode_documents")


@pytest.fixture
def called(models, monkeypatch):
    """Which batches were computed, by any of the models."""
    made = []
    for model in models.values():
        network = model.forward
        monkeypatch.setattr(model, "forward", lambda *a, network=network: made.append(1) or network(*a))
    return made


# ---- as many rows as there were texts --------------------------------------------------------------------------------


class Source:
    """As a loader or a filtered data set: its length is what it was told."""

    def __init__(self, told):
        self.told = told

    def __len__(self):
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    def __iter__(self):
        return iter(MASKED)


@pytest.mark.parametrize("told", [0, 2, 5, 9, -1, 10**12, 2**70, 1.5, None, RuntimeError("unknown")], ids=repr)
def test_a_length_that_lies_changes_no_row(models, told):
    expected = models["dense"].encode(MASKED)
    vectors = models["dense"].encode(Source(told))
    assert vectors.shape == (5, 384)
    assert np.array_equal(vectors, expected)
    assert vectors.base is None  # no rows of memory behind them
    assert len(models["masked"].predict(Source(told))) == 5
    assert len(models["late"].encode_documents(Source(told))) == 5
    assert models["reranker"].rank("q", Source(told)) == models["reranker"].rank("q", MASKED)


def test_a_list_whose_length_lies_changes_no_row(tiny):
    class Liar(list):
        def __len__(self):
            return 9

    assert np.array_equal(tiny.encode(Liar(TEXTS)), tiny.encode(TEXTS))


# ---- refused by name -------------------------------------------------------------------------------------------------


def table(name):
    if name == "DataFrame":
        return pytest.importorskip("pandas").DataFrame({"title": TEXTS, "text": TEXTS})
    if name in ("Table", "RecordBatch"):
        return getattr(pytest.importorskip("pyarrow"), name).from_pydict({"text": TEXTS})
    return type(name, (), {"column_names": ["text"], "__iter__": lambda self: iter(["text"])})()


WRONG = {
    **{name: name for name in ("DataFrame", "Table", "RecordBatch", "Dataset")},
    "dict": {"text": TEXTS},
    "mappingproxy": types.MappingProxyType({"text": TEXTS}),
    "set": set(TEXTS),
    "frozenset": frozenset(TEXTS),
    "bytes": b"text",
    "bytearray": bytearray(b"text"),
    "int": 3,
    "NoneType": None,
    "ndarray": np.array("text"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_list_of_texts_is_refused_by_its_type(models, called, way, name):
    _, call = ways(models)[way]
    value = table(name) if WRONG[name] == name else WRONG[name]
    with pytest.raises(TypeError, match=f"is {name}; it must be"):
        call(value)
    assert not called


@pytest.mark.parametrize("way", WAYS)
def test_an_array_of_two_dimensions_is_no_list_of_texts(models, called, way):
    with pytest.raises(TypeError, match=r"is ndarray; .*no array of 2 dimensions"):
        ways(models)[way][1](np.array([MASKED, MASKED]))
    assert not called


def test_a_set_is_told_of_its_order_and_a_table_of_its_columns(tiny):
    with pytest.raises(TypeError, match="an order, which a set doesn't have"):
        tiny.encode(set(TEXTS))
    with pytest.raises(TypeError, match="one column of this table"):
        tiny.encode(table("Dataset"))
    with pytest.raises(TypeError, match="no mapping, of which only the keys"):
        tiny.encode({"a": 1})


def test_a_query_that_is_no_string_and_tables_for_pairs_are_refused(models, called):
    with pytest.raises(TypeError, match=r"query is list \(\['q'\]\); it must be a str"):
        models["reranker"].rank(["q"], ["a"])
    with pytest.raises(TypeError, match="pairs is DataFrame; it must be two strings, or an iterable of such pairs"):
        models["reranker"].predict(table("DataFrame"))
    with pytest.raises(TypeError, match="pairs is dict"):
        models["reranker"].predict({"a": "b"})
    with pytest.raises(TypeError, match=r"pair 0 is set"):
        models["reranker"].predict([{"a", "b"}])
    assert not called


# ---- taken -----------------------------------------------------------------------------------------------------------


def kinds(texts):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    yield from (tuple(texts), collections.deque(texts), collections.UserList(texts), dict.fromkeys(texts).keys())
    yield from (np.array(texts), np.array(texts, object), pandas.Index(texts))
    yield from (
        pandas.Series(texts),
        pandas.Series(texts, index=["columns", *"abcd"]),
        pandas.Series(texts, dtype="category"),
    )
    yield from (
        pyarrow.array(texts),
        pyarrow.chunked_array([texts[:2], texts[2:]]),
        pyarrow.array(texts).dictionary_encode(),
    )
    yield from (iter(texts), map(str, texts))


@pytest.mark.parametrize("way", WAYS)
def test_columns_arrays_and_sequences_of_strings_are_taken(models, way):
    _, call = ways(models)[way]
    expected = call(MASKED)
    for texts in kinds(MASKED):
        got = call(texts)
        if way in ("rank", "predict"):
            assert got == expected
        else:
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_pairs_may_be_rows_of_arrays(models):
    pairs = [("a river", "two stones"), ("green", "house é"), ("x", "")]
    expected = models["reranker"].predict(pairs)
    objects = np.empty(3, object)
    objects[:] = pairs
    for given in (np.array(pairs), np.array(pairs, object), objects, [list(p) for p in pairs], list(np.array(pairs))):
        assert np.array_equal(models["reranker"].predict(given), expected)
    # One pair alone: MKL, which multiplies on some CPUs, may round its last bit otherwise than among others.
    assert models["reranker"].predict(np.array(pairs[0])) == pytest.approx(expected[0], abs=1e-6)
    assert np.array_equal(models["reranker"].predict(zip(*zip(*pairs, strict=True), strict=True)), expected)


# ---- checked before any work -----------------------------------------------------------------------------------------

BAD = {
    "nan": (float("nan"), TypeError, r"text 4200 is float \(nan\); each text must be a str"),
    "none": (None, TypeError, "text 4200 is NoneType"),
    "surrogate": ("half \ud83d [MASK]", ValueError, "text 4200 is not valid Unicode"),
    "bytes": (b"text", TypeError, "text 4200 is bytes"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_item_anywhere_is_found_before_any_batch(models, called, way, name):
    bad, error, message = BAD[name]
    column = ["[MASK]"] * 4_200 + [bad]
    forms = [column, tuple(column), np.array(column, object), collections.deque(column)]
    if name != "surrogate":  # pandas checks those itself
        forms.append(pytest.importorskip("pandas").Series(column, dtype=object))
    for form in forms:
        with pytest.raises(error, match=message) as caught:
            ways(models)[way][1](form)
        assert "finished" not in str(caught.value)
    assert not called


def test_a_bad_pair_anywhere_is_found_before_any_batch(models, called):
    for bad, message in (
        (("a",), "pair 4200 is tuple"),
        (("a", None), "text 4200 is NoneType"),
        (("a", "\udc00"), "4200 is not"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            models["reranker"].predict([("a", "b")] * 4_200 + [bad])
    assert not called


def test_a_masked_text_without_its_mask_is_found_before_any_batch(models, called):
    with pytest.raises(ValueError, match=r"text 4200 has no \[MASK\]"):
        models["masked"].predict(np.array(["[MASK]"] * 4_200 + ["none"]))
    assert not called


def test_one_use_iterables_are_read_once(tiny):
    class Once:
        """Has a length, but gives its items only once."""

        def __init__(self):
            self.items = iter(TEXTS)

        def __len__(self):
            return 5

        def __iter__(self):
            return self.items

    assert np.array_equal(tiny.encode(Once()), tiny.encode(TEXTS))


@pytest.mark.parametrize("bad", [None, "half \ud83d"])
def test_an_iterable_s_bad_item_costs_nothing_that_was_finished(models, monkeypatch, bad):
    from modernbert_lite.pipeline import feed as pipeline

    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 3)
    texts = [*MASKED, *MASKED]
    source = lambda: iter([*texts[:8], bad, *texts[8:]])  # noqa: E731
    for way, (_, call) in ways(models).items():
        if way in ("stream", "rank"):  # the one has given its blocks; the other reads all documents first
            continue
        with pytest.raises(
            (TypeError, ValueError), match=r"text 8 .*\(6 rows were finished: this error has them"
        ) as caught:
            call(source())
        finished, expected = caught.value.finished, call(texts[:6])
        assert len(finished) == 6
        if way == "predict":
            assert finished == expected
        else:
            assert all(np.abs(a - b).max() <= 1e-5 for a, b in zip(finished, expected, strict=True))
        assert ("`stream` gives rows as they are ready" in str(caught.value)) == (way in ("encode", "encode_query"))


def test_scores_that_were_finished_are_kept_as_they_would_be_given(models, monkeypatch):
    from modernbert_lite.pipeline import feed as pipeline

    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 2)
    pairs = [("q", text) for text in TEXTS]
    with pytest.raises(TypeError, match=r"pair 5 is int \(7\); .* \(4 rows were finished") as caught:
        models["reranker"].predict(iter([*pairs, 7]))
    assert np.abs(caught.value.finished - models["reranker"].predict(pairs[:4])).max() <= 1e-5
    assert caught.value.finished.dtype == np.float32


@pytest.mark.parametrize("ahead", [False, True], ids=["as on a CPU", "as on a card"])
@pytest.mark.parametrize(
    "error", [OSError("the disk is gone"), KeyboardInterrupt("stop"), SystemExit("stop"), KeyError("row")]
)
def test_an_iterable_s_own_error_comes_as_it_is_with_what_was_finished(tiny, monkeypatch, error, ahead):
    from modernbert_lite.pipeline import feed as pipeline

    monkeypatch.setattr(pipeline, "looks_ahead", lambda device: ahead)
    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 2)

    def source():
        yield from TEXTS
        raise error

    with pytest.raises(type(error)) as caught:
        tiny.encode(source())
    assert caught.value is error
    assert error.args[0] in ("the disk is gone", "stop", "row")
    assert np.abs(error.finished - tiny.encode(TEXTS[:4])).max() <= 1e-5


def test_rows_that_can_t_be_had_leave_the_error_as_it_is():
    def no_rows():
        raise ValueError("no rows")

    with pytest.raises(MemoryError, match=r"^full$") as caught, keeping(no_rows, iter(TEXTS)):
        raise MemoryError("full")
    assert not hasattr(caught.value, "finished")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_numpy_s_integers_are_integers(models, small_folders):
    tiny, reranker, masked, late = models.values()
    two = [np.int64(2), np.int32(2), np.uint8(2), np.array(2)]
    for n in two:
        assert tiny.encode("a", truncate_dim=n).shape == (2,)
        assert len(reranker.rank("q", TEXTS, top_k=n)) == 2
        assert len(masked.predict("[MASK]", top_k=n)[0]) == 2
    options = {"max_seq_length": np.int64(20), "batch_tokens": np.int32(100), "threads": np.int16(1)}
    model = Embedder.from_pretrained("tiny", device="cpu", truncate_dim=np.uint16(9), **options)
    assert [type(n) for n in (model.max_seq_length, model.batch_tokens, model.truncate_dim)] == [int] * 3
    assert repr(model) == "Embedder(ModernBertModel, 20 tokens, cpu)"
    late = LateInteraction.from_pretrained(small_folders["late"], device="cpu", query_length=np.int64(9))
    assert late.query_length == 9


@pytest.mark.parametrize("bad", [True, np.True_, 2.0, "2", [2], np.float32(2)], ids=repr)
def test_no_other_number_is_one(models, small_folders, called, bad):
    tiny, reranker, masked, _ = models.values()
    for name in ("max_seq_length", "batch_tokens", "truncate_dim", "threads"):
        with pytest.raises(OptionError, match=f"{name} is .*; it must be .*whole number"):
            Embedder.from_pretrained("tiny", device="cpu", **{name: bad})
    with pytest.raises(OptionError, match=r"query_length is .* whole number"):
        LateInteraction.from_pretrained(small_folders["late"], device="cpu", query_length=bad)
    with pytest.raises(OptionError, match=r"truncate_dim is .* whole number"):
        tiny.encode("a", truncate_dim=bad)
    for top_k in (bad, 0, -1):
        with pytest.raises(OptionError, match="top_k is "):
            reranker.rank("q", TEXTS, top_k=top_k)
        with pytest.raises(OptionError, match="top_k is "):
            masked.predict("[MASK]", top_k=top_k)
    assert not called


FORMS = {
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "float64": lambda a: a.astype(np.float64),
    "strided": lambda a: np.repeat(a, 2, 0)[::2],
    "lists": lambda a: a.tolist(),
    "arrays in a list": list,
    "a tensor with a gradient": lambda a: torch.tensor(a, requires_grad=True) * 1,
    "tensors in a list": lambda a: list(torch.tensor(a)),
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_any_make_are_read(tiny, form):
    vectors = tiny.encode(TEXTS)
    given = FORMS[form](vectors)
    assert np.array_equal(tiny.similarity(given, given), tiny.similarity(vectors, vectors))
    assert np.array_equal(maxsim([given], [vectors, given]), maxsim([vectors], [vectors, vectors]))
    for precision in ("float32", "float16", "int8", "ubinary"):
        got = quantize_embeddings(given, precision)
        assert np.array_equal(got, quantize_embeddings(vectors, precision))
        assert got.dtype.isnative


def test_similarity_of_nothing_has_the_shape_of_nothing(tiny):
    vectors = tiny.encode(TEXTS)
    for empty in ([], (), np.empty(0), np.empty((0, 384), np.float32), torch.empty(0), tiny.encode([])):
        assert tiny.similarity(empty, vectors).shape == (0, 5)
        assert tiny.similarity(vectors, empty).shape == (5, 0)
        assert tiny.similarity([], empty).shape == (0, 0)
        assert tiny.similarity(empty, vectors[0]).shape == (0, 1)
    assert tiny.similarity([], []).dtype == np.float32
    assert maxsim([], []).shape == (0, 0)


def test_similarity_refuses_what_is_no_matrix(tiny):
    with pytest.raises(ValueError, match=r"embeddings have shape \(1, 5, 384\)"):
        tiny.similarity(tiny.encode(TEXTS)[None], tiny.encode(TEXTS))
    with pytest.raises(ValueError, match="embeddings can't be read as numbers, in rows of one length"):
        tiny.similarity([[1.0, 2.0], [1.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="embeddings can't be read as numbers"):
        tiny.similarity(["a", "b"], ["c"])


def test_ids_may_be_arrays_of_any_make():
    expected = pack([[3, 70, 0], [], [9]])
    rows = ([3, 70, 0], [], [9])
    makes = {
        f"{order}{kind}": np.dtype(order + kind)
        for order, kind in itertools.product("<>", ("i2", "i4", "i8", "u2", "u4", "u8"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in makes.values():
            batch = pack([np.frombuffer(np.array(row, dtype).tobytes(), dtype) for row in rows])
            assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(pack([array.array("i", row) for row in rows]).input_ids, expected.input_ids)
    with pytest.raises(ValueError, match=r"sequence 0 .*whole numbers"):
        pack([np.array([1.5])])
    with pytest.raises(ValueError, match="sequence 1 holds the token id -3"):
        pack([np.array([1]), np.array([-3], ">i4")])


# ---- keywords of other libraries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batch_size", "batch size is counted in tokens here"),
        ("convert_to_tensor", "results are numpy arrays here"),
        ("convert_to_numpy", "leave it out, results are numpy arrays"),
        ("device", "it is an option of from_pretrained here"),
        ("activation_fct", "it is activation_fn here"),
        ("num_workers", "one process computes here"),
    ],
)
def test_keywords_of_other_libraries_are_answered_with_ours(models, called, name, hint):
    tiny, reranker, masked, late = models.values()
    for where, call in {
        "Embedder.encode": lambda **k: tiny.encode("a", **k),
        "Embedder.stream": lambda **k: tiny.stream(["a"], **k),
        "Embedder.encode_sparse": lambda **k: tiny.encode_sparse(["a"], **k),
        "Reranker.predict": lambda **k: reranker.predict([("a", "b")], **k),
        "Reranker.rank": lambda **k: reranker.rank("a", ["b"], **k),
        "FillMask.predict": lambda **k: masked.predict("[MASK]", **k),
        "LateInteraction.encode_queries": lambda **k: late.encode_queries("a", **k),
        "LateInteraction.encode_documents": lambda **k: late.encode_document("a", **k),
    }.items():
        with pytest.raises(TypeError, match=f"^{where} has no option '{name}': {hint}"):
            call(**{name: 1})
    with pytest.raises(TypeError, match=r"^Embedder.encode has no option 'batch_size'"):
        tiny.encode_query("a", batch_size=3)
    with pytest.raises(TypeError, match=r"^Embedder.encode has no option 'promt'$"):
        tiny.encode("a", promt="b")
    assert not called
