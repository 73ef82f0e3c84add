"""A card never waits for the host between two batches: results are copied as soon as they are made, and read when the
next batch is on its way. A stand-in for a card records the order of calls, here on the CPU."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import modernbert_lite as ml
from modernbert_lite import batch as batches
from modernbert_lite import fill_mask, late_interaction
from modernbert_lite.checkpoint.sparse import Splade
from modernbert_lite.ops import pooling
from modernbert_lite.pipeline import feed, sparse

TEXTS = [f"{'river stone quick ' * (i % 5)} {i} green house [MASK]" for i in range(40)]
DRAINS = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "unique"}


class Card(torch.Tensor):
    """A tensor on the stand-in's card: reading its numbers would wait for all work of the card."""

    events: list = []  # noqa: RUF012  of the test at hand

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in DRAINS:
            cls.events.append(("drain", func.__name__))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def card(monkeypatch):
    """The order of calls: ("launch", n), ("copy", n), ("wait", n) of the n-th batch, and ("drain", what)."""
    Card.events = events = []
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    launched = [0]

    def to_host(x):
        n = launched[0]
        events.append(("copy", n))

        def wait():
            events.append(("wait", n))
            return x.as_subclass(torch.Tensor)

        return wait

    def nonzero(host):
        return sparse._nonzero(host())

    monkeypatch.setattr(batches, "to_device", lambda x, device: x.as_subclass(Card))
    monkeypatch.setattr(fill_mask, "to_device", lambda x, device: x.as_subclass(Card))
    monkeypatch.setattr(pooling, "to_device", lambda x, device: x.as_subclass(Card))
    monkeypatch.setattr(ml.PackedBatch, "on_host", property(lambda self: self._host or self))
    monkeypatch.setattr(feed, "looks_ahead", lambda device: True)
    monkeypatch.setattr(feed, "_WINDOW_TEXTS", 16)  # more than one window
    monkeypatch.setattr(sparse, "_nonzero_later", lambda pooled: partial(nonzero, to_host(pooled)))
    for module in (feed, fill_mask, late_interaction):
        monkeypatch.setattr(module, "to_host", to_host)

    def watch(model):
        def launch(*_):
            launched[0] += 1
            events.append(("launch", launched[0]))

        model.encoder.register_forward_pre_hook(launch)
        model.batch_tokens = 40
        return events

    return watch


def assert_never_dry(events):
    """Each batch is waited for when the next one is launched: by what was copied for it alone."""
    assert not [event for event in events if event[0] == "drain"]
    last = max(n for what, n in events if what == "launch")
    assert last > 8
    for n in range(1, last + 1):
        at = {what: [i for i, event in enumerate(events) if event == (what, n)] for what in ("launch", "copy", "wait")}
        assert at["launch"][0] < min(at["copy"]) <= max(at["copy"]) < min(at["wait"])
        if n < last:
            following = events.index(("launch", n + 1))
            assert max(at["copy"]) < following < min(at["wait"]), n


CALLS = {
    "encode": ("dense", lambda model: model.encode(TEXTS)),
    "token_embeddings": ("dense", lambda model: np.concatenate(model.encode(TEXTS, output_value="token_embeddings"))),
    "everything": (
        "dense",
        lambda model: np.stack([x["sentence_embedding"] for x in model.encode(TEXTS, output_value=None)]),
    ),
    "rerank": ("reranker", lambda model: model.predict([(text, "stone") for text in TEXTS])),
    "fill": ("masked", lambda model: np.array([[p["score"] for p in m[0]] for m in model.predict(TEXTS)])),
    "queries": ("late", lambda model: np.concatenate(model.encode_queries([f"stone {i}" for i in range(40)]))),
    "documents": ("late", lambda model: np.concatenate(model.encode_documents(TEXTS))),
}
CLASSES = {"dense": ml.Embedder, "reranker": ml.Reranker, "masked": ml.FillMask, "late": ml.LateInteraction}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_read_one_batch_behind_on_every_class(small_folders, card, monkeypatch, name):
    kind, call = CALLS[name]
    model = CLASSES[kind].from_pretrained(small_folders[kind], device="cpu")
    with monkeypatch.context() as plain:
        plain.setattr(batches, "to_device", lambda x, device: x)
        plain.setattr(fill_mask, "to_device", lambda x, device: x)
        expected = call(model)
    Card.events.clear()
    events = card(model)
    got = call(model)
    assert_never_dry(events)
    assert np.abs(got - expected).max() <= 1e-5


def test_classifiers_and_sparse_encoders_too(make_checkpoint, card):
    folder, _ = make_checkpoint("ModernBertForTokenClassification", num_hidden_layers=1, num_labels=3)
    model = ml.TokenClassifier.from_pretrained(folder, device="cpu")
    assert len(model.predict(TEXTS)) == len(TEXTS)
    events = card(model)
    Card.events.clear()
    model.predict(TEXTS)
    assert_never_dry(events)
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_hidden_layers=1, num_labels=3)
    model = ml.Classifier.from_pretrained(folder, device="cpu")
    events = card(model)
    Card.events.clear()
    model.predict(TEXTS)
    assert_never_dry([(what, n - min(m for w, m in events if w == "launch") + 1) for what, n in events])


def test_a_prompt_that_is_not_pooled_too(small_folders, card):
    model = ml.Embedder.from_pretrained(small_folders["dense"], device="cpu")
    model.pooling = replace(model.pooling, include_prompt=False)
    expected = model.encode(TEXTS, prompt="stone river ")
    assert np.abs(expected - model.encode(TEXTS)).max() > 1e-3
    events = card(model)
    Card.events.clear()
    assert np.abs(model.encode(TEXTS, prompt="stone river ") - expected).max() <= 1e-5
    assert_never_dry(events)


def test_weights_of_the_vocabulary_too(small_folders, card):
    model = ml.FillMask.from_pretrained(small_folders["masked"], device="cpu")
    road = Splade("max", "relu")
    compute = partial(sparse.splade_weights, model.network, lambda batch, _: model.encoder(batch), road)
    expected = [row for rows in model.run(TEXTS, compute, False, None) for row in rows]
    events = card(model)
    Card.events.clear()
    got = [row for rows in model.run(TEXTS, compute, False, None) for row in rows]
    assert_never_dry(events)
    assert all(torch.equal(a[0], b[0]) and torch.allclose(a[1], b[1]) for a, b in zip(got, expected, strict=True))


def test_what_was_finished_comes_before_an_error_of_the_next_window(small_folders, card):
    model = ml.Embedder.from_pretrained(small_folders["dense"], device="cpu")
    card(model)

    def texts():
        yield from TEXTS[:20]
        raise OSError("the source is gone")

    stream = model.stream(texts())
    assert len(next(stream)) == 16
    with pytest.raises(OSError, match="the source is gone"):
        next(stream)


def test_a_slow_source_s_results_come_at_once_on_a_cpu(small_folders, monkeypatch):
    monkeypatch.setattr(feed, "_WINDOW_TEXTS", 4)
    model = ml.Embedder.from_pretrained(small_folders["dense"], device="cpu")
    read = []
    stream = model.stream(read.append(text) or text for text in TEXTS)
    assert len(next(stream)) == 4
    assert len(read) == 4
