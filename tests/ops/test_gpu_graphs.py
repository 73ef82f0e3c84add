"""CUDA graphs that are captured for real: results, memory and streams."""

import pytest
import torch
from graph_cases import INTERPRETED, batch_of, captures, difference, small_model  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.ops import graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device and TRITON_INTERPRET=0"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replays_on_a_gpu_equal_eager(captures, dtype):
    """Every bucket that 300 random batches fall into. cuBLAS may take another kernel for a bucket's shape, so the
    results may differ in rounding: by no more than twice what the dtype differs from fp32."""
    exact = small_model(6)
    model = small_model(6).to(dtype)
    graphed = graphs.Graphed(model)
    generator = torch.Generator().manual_seed(0)
    for turn in range(200):
        count = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = torch.randint(1, 200, (count,), generator=generator).tolist()
        batch = batch_of(*lengths, seed=turn)
        truth = exact(batch)
        bound = 2 * (model(batch).float() - truth).abs().max() + 1e-6
        assert (graphed(batch).float() - truth).abs().max() <= bound
    assert captures


def test_graphs_share_their_memory_on_a_gpu(captures):
    """Thirty graphs take little more than the largest one, whose result alone has 8 MB."""
    model = small_model(6, heads=16)
    graphed = graphs.Graphed(model)
    for _ in range(2):
        graphed(batch_of(4000))
    torch.cuda.synchronize()
    one = torch.cuda.memory_reserved()
    for length in range(100, 4000, 130):
        for _ in range(2):
            graphed(batch_of(length))
    torch.cuda.synchronize()
    assert len(captures) > 10
    assert torch.cuda.memory_reserved() <= one + (64 << 20)


def test_two_streams_on_a_gpu(captures):
    """Replays of two graphs share memory; on two streams they must still not overlap."""
    model = small_model(6)
    graphed = graphs.Graphed(model)
    batches = {n: batch_of(n) for n in (100, 2000)}
    expected = {n: model(batch) for n, batch in batches.items()}
    for batch in batches.values():
        for _ in range(2):
            graphed(batch)
    torch.cuda.synchronize()
    streams = {n: torch.cuda.Stream() for n in batches}
    got = []
    for _ in range(50):
        for n, batch in batches.items():
            with torch.cuda.stream(streams[n]):
                got.append((n, graphed(batch)))
    torch.cuda.synchronize()
    for n, result in got:
        assert difference(result, expected[n]) <= 1e-3


def test_a_batch_comes_back_from_a_gpu_whole():
    """`to("cpu")` waits for what the device still does to the batch."""
    ids = torch.zeros(1 << 20, dtype=torch.int64, device="cuda")
    batch = ml.PackedBatch(
        ids, torch.tensor([0, 1 << 20], dtype=torch.int32, device="cuda"), 1 << 20, ids, (1 << 20,), 7
    )
    torch.cuda._sleep(50_000_000)
    ids.fill_(7)
    assert (batch.to("cpu").input_ids == 7).all()
