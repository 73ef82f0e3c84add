"""Shared by tests/ops: test_packed_linear, test_packed_networks, test_int8, test_onednn."""

import pytest
import torch

from modernbert_lite.ops import onednn
from modernbert_lite.ops.linear import Linear, PackedLinear, pack

FP32 = torch.float32


SIZES = [(1, 8), (5, 7), (12, 16), (64, 33), (130, 96)]  # (M, K)


TOKENS = [1, 2, 31, 65, 513]


ONEDNN = onednn.works(FP32)


needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN linear")


BF16 = onednn.works(torch.bfloat16)


SMALL_VOCAB = {
    "vocab_size": 500,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(5, 400, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.fixture
def forced(monkeypatch):
    """oneDNN wherever it works, whether or not it pays on this machine."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")


@pytest.fixture
def unprobed():
    """Lets the probes run again, in the test and after it."""
    probes = onednn.works, onednn.int8_works, onednn.pays, onednn.gain
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def within_twice(got, plain, truth):
    error, allowed = ((x.double() - truth).abs().max().item() for x in (got, plain))
    return error <= (2e-5 if got.dtype == plain.dtype == FP32 else 2 * allowed + 1e-6)


def is_packed(network) -> bool:
    return any(isinstance(module, PackedLinear) for module in network.modules())


def layer_of(weight, bias=None, parts=1, int8=False) -> Linear:
    """A layer of that weight (M, K), as inference holds it."""
    layer = Linear(weight.shape[1], len(weight), bias is not None, parts).requires_grad_(False).eval()
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    pack(layer, narrow=torch.int8 if int8 else None)
    return layer


# ---- products with packed weights ----------------------------------------------------------------------------------


@pytest.fixture
def layer(forced):
    if not ONEDNN:
        pytest.skip("this torch has no oneDNN linear")
    weight = randn(12, 16)
    layer = layer_of(weight, randn(12), parts=2)
    assert type(layer) is PackedLinear
    return layer, weight


@pytest.fixture(params=["packed", "dense"])
def int8(request, monkeypatch, unprobed):
    """With oneDNN's product of 8-bit numbers, and without it."""
    if request.param == "packed":
        if not onednn.int8_works():
            pytest.skip("this torch has no int8 linear")
    else:
        monkeypatch.setattr(onednn, "int8_works", lambda: False)
    return request.param
