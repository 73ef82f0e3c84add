"""oneDNN builds kernels for every number of rows that it meets, and keeps them: there must be few numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import modernbert_lite as ml
from modernbert_lite.ops import cpu, onednn
from modernbert_lite.ops.linear import Linear, PackedLinear, pack

NUMBERS = [1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 200, 255, 256, 257, 300, 511, 512, 513, 700, 1021]


@pytest.fixture
def seen(monkeypatch):
    """The numbers of rows that oneDNN multiplies."""
    rows: set[int] = set()
    for dtype in (torch.float32, torch.bfloat16):  # probes multiply, too: before anything is counted
        onednn.works(dtype)
    onednn.int8_works()
    multiply, multiply_int8 = onednn.multiply, onednn._int8_product

    def counted(x, *args):
        rows.add(len(x))
        return multiply(x, *args)

    def counted_int8(numbers, *args):
        rows.add(len(onednn._with_spare_rows(numbers)))
        return multiply_int8(numbers, *args)

    monkeypatch.setattr(onednn, "multiply", counted)
    monkeypatch.setattr(onednn, "_int8_product", counted_int8)
    return rows


def packed(weight: torch.Tensor, dtype: str, parts: int) -> Linear:
    if dtype != "int8" and not onednn.works(getattr(torch, dtype)):
        pytest.skip(f"no oneDNN products in {dtype} here")
    layer = Linear(weight.shape[1], len(weight), False, parts).requires_grad_(False).eval()
    layer.weight.data = weight if dtype == "int8" else weight.to(getattr(torch, dtype))
    pack(layer, narrow=torch.int8 if dtype == "int8" else None)
    return layer


def plain(layer: Linear, dtype: torch.dtype) -> Linear:
    """The same numbers in a layer of that dtype."""
    other = Linear(layer.in_features, layer.out_features, False).requires_grad_(False)
    other.weight.data = layer.weight.to(dtype)
    return other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_batches_of_all_sizes_are_multiplied_in_few_numbers_of_rows(seen, dtype):
    if dtype == "int8" and not onednn.int8_works():
        pytest.skip("no oneDNN int8 products here")
    torch.manual_seed(0)
    one, two = (packed(torch.randn(24 * n, 16) / 4, dtype, n) for n in (1, 2))
    exact = torch.float32 if dtype == "int8" else getattr(torch, dtype)

    def results(x, residual, one, two):
        return {
            "linear": one(x),
            "residual": one(x, residual),
            "gated": two.gated(x, "gelu"),
            "swapped": two.gated(x, "silu", swapped=True),
        }

    with torch.inference_mode():
        for n in NUMBERS:
            x, residual = torch.randn(n, 16).to(exact), torch.randn(n, 24)
            got = results(x, residual, one, two)
            if dtype == "int8":  # a row's numbers don't depend on the rows beside it
                alone = [results(x[i : i + 1], residual[i : i + 1], one, two) for i in range(n)]
                for name, rows in got.items():
                    error = (rows - torch.cat([row[name] for row in alone])).abs().max()
                    # torch's activations differ in the last bits by where a number stands in memory.
                    assert error <= (0 if name in ("linear", "residual") else 1e-5), (name, n)
                continue
            truth = results(x.double(), residual.double(), *(plain(layer, torch.double) for layer in (one, two)))
            usual = results(x, residual, *(plain(layer, exact) for layer in (one, two)))
            for name, rows in got.items():
                assert rows.shape == (n, 24), name
                error, its = ((y[name].double() - truth[name]).abs().max() for y in (got, usual))
                assert error <= 2 * its + 1e-6, (name, n)
    assert seen <= set(onednn._SIZES)
    assert len(onednn._SIZES) <= 30  # times five shapes of weights, half a megabyte each: under 100 MB


def test_a_network_meets_few_numbers_of_rows(seen, make_checkpoint):
    folder, reference = make_checkpoint(num_hidden_layers=2, vocab_size=60, pad_token_id=0)
    network = ml.load_model(folder, device="cpu")
    if not isinstance(network.layers[0].attn.Wqkv, PackedLinear):
        pytest.skip("packing does not pay here")
    for n in (1, 6, 59, 300, 531):
        ids = [i % 50 + 3 for i in range(n)]
        with torch.inference_mode():
            got = network(ml.pack([ids, ids[:2]]))
            expected = reference(torch.tensor([ids])).last_hidden_state[0]
        assert (got[:n] - expected).abs().max() <= 2e-5
    assert seen <= set(onednn._SIZES)


@pytest.mark.parametrize("length", [1024, 1025, 1100, 1535, 2047])
def test_long_attention_meets_few_numbers_of_keys(seen, monkeypatch, length):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, length, 16).unbind(0)
    out = torch.empty_like(q)
    cpu._chunked_attention(q, k, v, out, torch.float32)
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() <= 1e-5
    assert seen <= {128, 256, 384, 512}
