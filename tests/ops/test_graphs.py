"""CUDA graphs: buckets, padding and replay. Without a GPU a capture is stood in for by one that runs the same function
on the same static batch again, with Triton's kernels interpreted. test_gpu_graphs.py captures for real."""

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from graph_cases import DEVICE, batch_of, captures, difference, small_model  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import modernbert_lite as ml
from modernbert_lite.models.gte import Gte
from modernbert_lite.ops import graphs, linear, pooling
from modernbert_lite.ops.rope import Rope


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 8, 33, 64, 100])
def test_buckets_hold_their_batch_and_waste_little(sequences):
    for tokens in [*range(sequences, 4200, 7), *range(4200, graphs.MAX_TOKENS, 331)]:
        wide, several = graphs.bucket_of(tokens, sequences)
        assert several >= sequences
        assert several & (several - 1) == 0
        assert wide >= tokens + (several > sequences)
        assert wide > several
        assert wide <= max(32, tokens * 1.25 + 8, (several + 1) * 1.25 + 8)
        assert wide <= max(tokens, several) + 513, "large batches are padded little"
        assert graphs.bucket_of(wide, several) == (wide, several)


@pytest.mark.parametrize(("tokens", "most"), [(4096, 40), (graphs.MAX_TOKENS, graphs.MAX_GRAPHS)])
def test_there_are_few_buckets(tokens, most):
    assert len({graphs.bucket_of(n, 1) for n in range(1, tokens + 1)}) <= most


@pytest.mark.parametrize("lengths", [(20,), (1,), (3, 30), (64, 1, 2), (65, 3), (130, 5, 9), (5,) * 12])
def test_a_replay_equals_the_eager_result(captures, lengths):
    model = small_model()
    graphed = graphs.Graphed(model)
    eager = [model(batch_of(*lengths, seed=seed)) for seed in range(4)]
    with torch.inference_mode():
        got = [graphed(batch_of(*lengths, seed=seed)) for seed in range(4)]
    assert len(captures) == 1
    for a, b in zip(got, eager, strict=True):
        assert difference(a, b) <= 1e-5
    assert difference(eager[0], eager[1]) > 1e-2


class Writes(TorchDispatchMode):  # counts the operations that write to a tensor's memory
    def __init__(self, tensor):
        super().__init__()
        self.memory, self.count = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.is_mutable and args[0].untyped_storage().data_ptr() == self.memory
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(20,), (130, 5, 9)])
def test_one_copy_fills_all_index_tensors(captures, lengths):
    graphed = graphs.Graphed(small_model())
    _ = [graphed(batch_of(*lengths)) for _ in range(2)]
    (graph,) = graphed._graphs.values()
    with Writes(graph.buffer) as writes:
        graph._fill(batch_of(*lengths, seed=3))
    assert writes.count == 1
    assert torch.equal(graph.batch.input_ids[: sum(lengths)], batch_of(*lengths, seed=3).input_ids)


def test_batches_of_one_bucket_leave_nothing_behind(captures):
    """More tokens, fewer, more sequences, fewer: what an earlier batch left in the static tensors never counts."""
    model = small_model(2)
    graphed = graphs.Graphed(model)
    order = [(60, 60, 7), (110,), (30, 30, 30, 30), (97, 8, 7, 2), (100, 3, 1), (113,)]
    for turn in range(3):
        for lengths in order:
            batch = batch_of(*lengths, seed=turn)
            assert difference(graphed(batch), model(batch)) <= 1e-5, (turn, lengths)
    assert 1 <= len(captures) <= len(order)


def test_a_row_a_sequence(captures):
    model = small_model()
    graphed = graphs.Graphed(model, lambda batch, mode: model(batch, pooling.rows(batch, [mode])))
    for mode in ("cls", "lasttoken"):
        for seed in range(3):
            batch = batch_of(7, 70, 2, seed=seed)
            expected = model(batch)[pooling.rows(batch, [mode])]
            assert difference(graphed(batch, mode), expected) <= 1e-5
    assert len(captures) == 2  # one for each argument


# Positions for every text, though not for the bucket that a text is put in.
BY_LENGTH = Rope(10_000.0, "dynamic", 2.0, original_max_position_embeddings=16)
ABSOLUTE = {"position_embedding_type": "absolute", "max_position_embeddings": 72}


def small_gte(**config) -> Gte:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1}
    model = Gte(ml.GteConfig(num_hidden_layers=2, **sizes, **config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(DEVICE).eval().requires_grad_(False)


@pytest.mark.parametrize("config", [{"type_vocab_size": 2}, {"type_vocab_size": 0}, {"rope": BY_LENGTH}, ABSOLUTE])
def test_a_gte_replay_equals_the_eager_result_with_token_types_and_without(captures, config):
    model = small_gte(**config)
    graphed = graphs.Graphed(model, lambda batch, mode: model(batch, pooling.rows(batch, [mode])))
    for seed in range(3):
        batch = batch_of(7, 70, 3, 5, 20, seed=seed)  # 16 sequences in its bucket
        types = batch.input_ids.remainder(2) if config.get("type_vocab_size") == 2 else None
        typed = replace(batch, token_type_ids=types, max_type=1)
        for given in (batch, typed):
            assert difference(graphed(given, "cls"), model(given)[pooling.rows(given, ["cls"])]) <= 1e-5
    assert len(captures) == (2 if config.get("type_vocab_size") else 1)


def test_hidden_keys_are_no_matter_of_graphs(captures):
    model = small_model(2)
    graphed = graphs.Graphed(model)
    batch = replace(batch_of(30, 20), key_seqlens=(10, 20))
    for _ in range(3):
        assert difference(graphed(batch), model(batch)) <= 1e-5
    assert captures == []
    assert difference(model(batch), model(batch_of(30, 20))) > 1e-2


def test_the_added_sequences_have_a_first_token_where_the_tokens_fill_their_bucket(captures):
    """Without it the row of an added sequence lies behind the last token: on a GPU that ends the process."""
    model = small_model(1)
    graphed = graphs.Graphed(model, lambda batch, mode: model(batch, pooling.rows(batch, [mode])))
    for lengths in ((20, 20, 24), (30, 1, 1), (64, 8, 4, 2, 2)):
        for _ in range(2):
            batch = batch_of(*lengths)
            assert difference(graphed(batch, "cls"), model(batch)[pooling.rows(batch, ["cls"])]) <= 1e-5
    assert len(captures) == 3


def test_the_first_batch_of_a_bucket_is_not_captured(captures):
    graphed = graphs.Graphed(small_model())
    graphed(batch_of(20))
    graphed(batch_of(300))
    assert captures == []
    graphed(batch_of(21))
    assert len(captures) == 1


def test_results_are_copies(captures):
    graphed = graphs.Graphed(small_model())
    first, second, third = (graphed(batch_of(20, seed=seed)) for seed in range(3))
    kept = second.clone()
    graphed(batch_of(20, seed=9))
    assert torch.equal(second, kept)
    third.zero_()
    assert difference(graphed(batch_of(20, seed=0)), first) <= 1e-5


def test_no_more_graphs_than_allowed(captures):
    """When there would be more all go, and then a bucket must come four times, then eight: no endless capturing."""
    model = small_model(1)
    graphed = graphs.Graphed(model, max_graphs=2)
    for turn in range(30):
        for length in (20, 40, 60):
            assert difference(graphed(batch_of(length, seed=turn)), model(batch_of(length, seed=turn))) <= 1e-5
            assert len(graphed._graphs) <= 2
    assert 2 < len(captures) <= 10


def test_the_graphs_of_a_network_share_what_they_run_on(captures):
    graphed = graphs.Graphed(small_model(1))
    for length in (20, 40, 60):
        for _ in range(2):
            graphed(batch_of(length))
    assert len(captures) == 3
    assert len(set(map(id, captures))) == 1


def test_large_batches_run_as_they_are(captures):
    graphed = graphs.Graphed(small_model(1), max_tokens=50)
    for _ in range(3):
        graphed(batch_of(51))
    assert captures == []


def test_weights_may_change(captures):
    model = small_model(1)
    graphed = graphs.Graphed(model)
    batch = batch_of(20)
    for _ in range(2):
        before = graphed(batch)
    model.layers[0].mlp.Wo.weight.mul_(2.0)  # in place: the graph reads the same memory
    assert difference(graphed(batch), model(batch)) <= 1e-5
    assert difference(graphed(batch), before) > 1e-2
    assert len(captures) == 1
    model.final_norm.weight = torch.nn.Parameter(model.final_norm.weight * 3.0, requires_grad=False)
    for _ in range(2):
        assert difference(graphed(batch), model(batch)) <= 1e-5
    assert len(captures) == 2
    model.double().float()  # other memory, same values
    for _ in range(2):
        assert difference(graphed(batch), model(batch)) <= 1e-5
    assert len(captures) >= 2


def test_packed_weights_may_be_unpacked(captures):
    """The graph would read memory that nobody holds any more."""
    model = small_model(1)
    packed = model.layers[0].mlp.Wi
    linear.pack(packed, narrow=linear.FLOAT8)
    graphed = graphs.Graphed(model)
    for _ in range(3):
        graphed(batch_of(20))
    assert len(captures) == 1
    packed.unpack()
    packed.weight.mul_(2.0)
    for _ in range(2):
        assert difference(graphed(batch_of(20)), model(batch_of(20))) <= 1e-5
    assert len(captures) == 2


def test_a_replay_walks_over_no_weights_and_other_modules_drop_no_graph(captures, monkeypatch):
    graphed = graphs.Graphed(small_model(1))
    with torch.inference_mode():
        for _ in range(3):
            graphed(batch_of(20))
        walks, tensors = [], graphs.Graphed._tensors
        monkeypatch.setattr(graphs.Graphed, "_tensors", lambda self: walks.append(1) or tensors(self))
        graphed(batch_of(20))
        assert not walks
        torch.nn.Linear(2, 2)  # somebody's parameters: one look, and the graph stays
        for _ in range(2):
            graphed(batch_of(20))
    assert len(walks) == 1
    assert len(captures) == 1


def test_a_batch_that_the_network_refuses_is_refused_by_a_graph_too(captures):
    graphed = graphs.Graphed(small_model(1))
    for _ in range(2):
        graphed(batch_of(20))
    for _ in range(3):
        with pytest.raises(ValueError, match="token id 200 is outside the vocabulary"):
            graphed(ml.pack([[5] * 19 + [200]], DEVICE))
        with pytest.raises(TypeError, match="takes a PackedBatch"):
            graphed(torch.zeros(20))


def test_empty_sequences_and_batches_are_left_to_the_network(captures):
    model = small_model(1)
    graphed = graphs.Graphed(model)
    for _ in range(3):
        assert graphed(ml.pack([], DEVICE)).shape == (0, 32)
        assert difference(graphed(batch_of(3, 0, 5)), model(batch_of(3, 0, 5))) <= 1e-5
    assert captures == []


def test_off_by_the_switch(captures, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_CUDA_GRAPHS", "0")
    graphed = graphs.Graphed(small_model(1))
    for _ in range(3):
        graphed(batch_of(20))
    assert captures == []


def test_never_with_a_backend_that_asks_the_host(captures, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    graphed = graphs.Graphed(small_model(1))
    for _ in range(3):
        graphed(batch_of(20))
    assert captures == []


def test_never_where_a_gradient_is_asked_for(captures):
    model = small_model(1).requires_grad_(True)
    graphed = graphs.Graphed(model)
    for _ in range(3):
        assert graphed(batch_of(20)).requires_grad
    assert captures == []
    with torch.no_grad():
        for _ in range(2):
            graphed(batch_of(20))
    assert len(captures) == 1


def test_a_capture_that_fails_is_told_once_and_done_without(monkeypatch, captures):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs._Device, "capture", fail)
    model = small_model(1)
    graphed = graphs.Graphed(model)
    graphed(batch_of(20))
    with pytest.warns(UserWarning, match="no CUDA graphs here .*not permitted.*going on without"):
        assert difference(graphed(batch_of(20)), model(batch_of(20))) <= 1e-5
    graphed(batch_of(20))
    assert pickle.loads(pickle.dumps(graphed))._failed is False


def test_nothing_refers_to_an_embedder_that_was_dropped():
    """Its weights go at once, without waiting for the garbage collector."""
    model = ml.Embedder.from_pretrained("tiny", device=DEVICE)
    model.encode("x")
    gone = weakref.ref(model.network)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_threads_take_turns(captures):
    model = small_model(1)
    graphed = graphs.Graphed(model)
    expected = {n: model(batch_of(n)) for n in (18, 20, 22, 25)}
    for _ in range(2):  # captured here: the interpreter itself is for one thread
        graphed(batch_of(19))
    wrong: list[object] = []

    def work(n):
        try:
            for _ in range(8):
                if difference(graphed(batch_of(n)), expected[n]) > 1e-5:
                    wrong.append(n)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_embedder_gives_the_same_with_and_without(captures):
    with_graphs = ml.Embedder.from_pretrained("tiny", device=DEVICE, dtype="float32")
    without = ml.Embedder.from_pretrained("tiny", device=DEVICE, dtype="float32", cuda_graphs=False)
    for text in ("one", "two words", "a third text"):
        assert abs(with_graphs.encode(text) - without.encode(text)).max() <= 1e-5
    assert len(captures) == 1


def test_copies_and_pickles_begin_without_graphs(captures):
    model = ml.Embedder.from_pretrained("tiny", device=DEVICE, dtype="float32")
    expected = [model.encode("one") for _ in range(2)][1]
    assert len(captures) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward._graphs == {}
        assert other.forward.network is other.network
        for _ in range(2):
            assert abs(other.encode("one") - expected).max() <= 1e-6
    assert len(captures) == 3


def test_a_batch_on_another_device_is_left_to_the_network(captures, monkeypatch):
    model, batch, left = small_model(1), batch_of(20).to("meta"), []
    monkeypatch.setattr(model, "forward", lambda *arguments: left.append(arguments))
    graphed = graphs.Graphed(model)
    for _ in range(3):
        graphed(batch)
    assert left == [(batch,)] * 3
    assert captures == []
