"""Each operation against its formula, in fp64 where rounding counts, on every backend that this machine has."""

import time

import pytest
import torch
from ops_cases import FAST, on, packed, randn  # noqa: F401

import modernbert_lite as ml
from modernbert_lite.ops import choose, onednn
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.choose import OPS, backend


def test_an_unknown_backend_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MODERNBERT_LITE_BACKEND is 'cuda'; it must be one of auto, torch, triton, o"):
        backend("linear", torch.zeros(1))


@pytest.mark.parametrize("op", OPS)
def test_torch_is_torch_for_every_op(monkeypatch, op):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    assert backend(op, torch.zeros(1)) == "torch"


def test_a_backend_is_taken_only_where_the_op_has_it(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    assert {op: backend(op, torch.zeros(1)) for op in OPS} == {
        "linear": "torch",
        "layer_norm": "triton",
        "rope": "triton",
        "attention": "triton",
        "geglu": "triton",
        "mean_pool": "triton",
    }
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "onednn")
    chosen = {op: backend(op, torch.zeros(1)) for op in OPS}
    assert chosen["linear"] == chosen["attention"] == "onednn"
    assert chosen["layer_norm"] == chosen["rope"] == chosen["geglu"] == "torch"


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_reference_for_other_dtypes_and_devices(op):
    assert backend(op, torch.zeros(1, dtype=torch.float64)) == "torch"
    assert backend(op, torch.zeros(1, dtype=torch.int64)) == "torch"
    assert backend(op, torch.zeros(1, device="meta")) == "torch"


@pytest.mark.parametrize("faster", [True, False])
def test_auto_multiplies_by_onednn_where_that_is_faster(monkeypatch, faster):
    monkeypatch.setattr(onednn, "pays", lambda dtype: faster)
    assert backend("linear", torch.zeros(1)) == ("onednn" if faster else "torch")
    assert backend("attention", torch.zeros(1)) == "onednn"


# ---- attention -----------------------------------------------------------------------------------------------------


def recording(seen: list[str]) -> dict[str, object]:
    """Twins that note their calls; those of linear decline."""

    def twin(name: str):
        def call(*args, **kwargs):
            seen.append(name)
            return None if name == "linear" else getattr(ops, name).reference(*args, **kwargs)

        return call

    return {name: twin(name) for name in ("linear", "layer_norm", "rope", "attention", "row_attention", "geglu")}


@pytest.mark.parametrize("name", [*FAST, "triton"])
def test_using_puts_twins_before_all_others(on, name, make_checkpoint):
    on(name)
    folder, _ = make_checkpoint(num_hidden_layers=2)
    network, batch, seen = ml.load_model(folder, device="cpu", packed=False), ml.pack([[5, 6, 7], [8, 9]]), []
    with torch.inference_mode():
        expected = network(batch)
        with choose.using(recording(seen)):
            got = network(batch)
    assert (got - expected).abs().max() <= 2e-5
    layer = ["layer_norm", "linear", "attention", "rope", "linear", "layer_norm", "linear", "geglu", "linear"]
    assert seen == ["layer_norm", *layer[1:], *layer, "layer_norm"]
    network(batch)
    assert len(seen) == 2 + 2 * len(layer) - 1  # outside of the block they are not asked


def test_using_ends_with_its_block_whatever_happens():
    def failing(*_):
        raise RuntimeError("no")

    mark = torch.full((3,), 7.0)
    with pytest.raises(RuntimeError, match="no"), choose.using({"mean_pool": failing}):
        ops.mean_pool(randn(3, 4), packed([3]))
    with choose.using({"mean_pool": failing}), choose.using({"mean_pool": lambda *_: mark}):
        assert ops.mean_pool(randn(3, 4), packed([3])) is mark  # the innermost
    assert ops.mean_pool(randn(3, 4), packed([3])).shape == (1, 4)


def test_a_choice_costs_little():
    """A call of an operation beside a call of its plain function: the least of many, since other work disturbs."""
    x, weight = randn(1, 8), torch.ones(8)
    times = {}
    with torch.inference_mode():
        for _ in range(30):
            for f in (ops.layer_norm, ops.layer_norm.reference):
                start = time.perf_counter()
                for _ in range(200):
                    f(x, weight, None, 1e-5)
                times[f] = min(times.get(f, 1.0), (time.perf_counter() - start) / 200)
    assert times[ops.layer_norm] - times[ops.layer_norm.reference] < 20e-6


# ---- RoPE ----------------------------------------------------------------------------------------------------------
