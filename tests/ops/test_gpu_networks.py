"""Whole networks on Triton's kernels: interpreted on small shapes, or on a card."""

import os
import subprocess
import sys

import pytest
import torch
from gpu_cases import DEVICE, INTERPRETED, texts_batch

import modernbert_lite as ml
from modernbert_lite.kernels import attention, geglu, layer_norm
from modernbert_lite.kernels import pooling as pooling_kernel
from modernbert_lite.ops import choose, pooling
from modernbert_lite.ops.choose import OPS

pytest.importorskip("triton")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_activation": "silu", "attention_bias": True, "mlp_bias": True, "norm_bias": True},
        {"num_attention_heads": 1, "hidden_size": 64, "local_attention": 32},
    ],
    ids=["plain", "biases", "one head"],
)
def test_the_kernels_give_what_the_reference_gives(make_checkpoint, monkeypatch, config):
    folder, _ = make_checkpoint(**{"num_hidden_layers": 2, "num_attention_heads": 3, **config})
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    lengths = (1, 63, 65)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    expected = model(texts_batch(*lengths))
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    batch = texts_batch(*lengths)
    assert (model(batch) - expected).abs().max() <= 2e-5
    for mode in ("cls", "lasttoken"):
        rows = pooling.rows(batch, [mode])
        assert (model(batch, rows) - expected[rows]).abs().max() <= 2e-5


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_those_of_the_whole(make_checkpoint, monkeypatch, backend, bias):
    """The last layer is global here, so that it computes nothing else; first tokens, last ones, and any."""
    folder, _ = make_checkpoint(num_hidden_layers=4, attention_bias=bias, mlp_bias=bias)
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    assert model.config.layer_types[-1] == "full_attention"
    batch = texts_batch(1, 9, 9, 30)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    whole = model(batch)
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    for rows in ([0, 1, 10, 19], [0, 9, 18, 48], [0, 5, 12, 30]):
        rows = torch.tensor(rows, device=DEVICE)
        assert (model(batch, rows) - whole[rows]).abs().max() <= 2e-5


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_rows_of_an_empty_sequence_are_refused(make_checkpoint, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    folder, _ = make_checkpoint(num_hidden_layers=1)
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        model(texts_batch(3, 0, 5), torch.tensor([0, 3, 3], device=DEVICE))


def test_gradients_equal_the_reference(make_checkpoint, monkeypatch):
    folder, _ = make_checkpoint(num_hidden_layers=2)
    gradients = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", name)
        model = ml.load_model(folder, device=DEVICE, dtype="float32", packed=False).requires_grad_(True)
        model(texts_batch(3, 40)).square().mean().backward()
        gradients[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, expected in gradients["torch"].items():
        assert (gradients["triton"][key] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8, key


def test_compiling_and_exporting_passes_through(make_checkpoint, monkeypatch):
    """One graph, no break, and no new one for every batch."""
    import torch._dynamo.testing

    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    folder, _ = make_checkpoint(num_hidden_layers=2)
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in ((3, 30), (4, 30, 2), (5, 6), (9, 3, 20, 11), (40, 2)):
            batch = texts_batch(*lengths)
            assert (compiled(batch) - model(batch)).abs().max() <= 1e-5
    assert counter.frame_count <= 3

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, cu_seqlens, position_ids):
            return self.model(ml.PackedBatch(input_ids, cu_seqlens, 8192, position_ids, (), 0))

    def arguments(batch):
        return batch.input_ids, batch.cu_seqlens, batch.position_ids

    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=3)
    program = torch.export.export(
        Encoder(), arguments(texts_batch(3, 30, 9)), dynamic_shapes=({0: T}, {0: B}, {0: T}), strict=False
    ).module()
    for lengths in ((3, 30, 9), (5, 6), (9, 3, 20, 11)):
        batch = texts_batch(*lengths)
        assert (program(*arguments(batch)) - model(batch)).abs().max() <= 1e-5


def test_rows_must_be_one_a_sequence(make_checkpoint):
    folder, _ = make_checkpoint(num_hidden_layers=1)
    model, batch = ml.load_model(folder, device=DEVICE, dtype="float32"), texts_batch(3, 5)
    for rows in ([0], [0, 3, 4], [[0, 3]]):
        with pytest.raises(ValueError, match=r"rows is \(.*; it must be \(2,\): one a sequence"):
            model(batch, torch.tensor(rows, device=DEVICE))


def test_the_kernels_own_functions_refuse_what_wants_a_gradient():
    x, weight = torch.randn(5, 32, device=DEVICE, requires_grad=True), torch.ones(32, device=DEVICE)
    ends = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(5, 3, 1, 32, device=DEVICE, requires_grad=True)
    for call in (
        lambda: geglu.geglu(x, x),
        lambda: layer_norm.layer_norm(x, weight),
        lambda: layer_norm.layer_norm(x.detach(), weight.clone().requires_grad_()),
        lambda: layer_norm.add_layer_norm(x.detach(), x, weight),
        lambda: pooling_kernel.pool(x, ends),
        lambda: attention.attention(qkv, ends),
        lambda: attention.row_attention(qkv[:1, 0], qkv[:, 1:], ends),
    ):
        with pytest.raises(ValueError, match="requires a gradient"):
            call()
        with torch.no_grad():
            call()


def test_asking_for_triton_without_a_gpu_is_answered_once(monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose._warn_of_no_gpu.cache_clear()
    with pytest.warns(UserWarning, match="its kernels need a GPU.*on 'cpu'; using torch.*TRITON_INTERPRET=1") as seen:
        assert {choose.backend(op, torch.zeros(1)) for op in OPS} == {"torch"}
    assert len(seen) == 1


@pytest.mark.slow
def test_exporting_first_decides_nothing_for_later(make_checkpoint, tmp_path):
    """What a probe finds under a tracer's tensors without values would stay for good."""
    folder, _ = make_checkpoint(num_hidden_layers=1)
    program = f"""
import torch, modernbert_lite as ml
from modernbert_lite.ops import choose
from modernbert_lite.ops.choose import OPS
model = ml.load_model({str(folder)!r}, device={DEVICE!r}, dtype="float32", packed=False)
class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, input_ids, cu_seqlens, position_ids):
        return self.model(ml.PackedBatch(input_ids, cu_seqlens, 8192, position_ids, LENGTHS, 0))
batch = ml.pack([[5, 6, 7], [8] * 9], {DEVICE!r})
LENGTHS = () if TRITON else batch.seqlens
torch.export.export(Encoder(), (batch.input_ids, batch.cu_seqlens, batch.position_ids), strict=False)
x = batch.input_ids.float()
print([choose.backend(op, x) for op in OPS])
"""
    found = {}
    for name in ("triton", "auto") if INTERPRETED else ("triton",):
        env = {**os.environ, "MODERNBERT_LITE_BACKEND": name, "PYTHONWARNINGS": "error::UserWarning"}
        code = program.replace("TRITON", str(name == "triton"))
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout
    assert found["triton"].count("triton") == len(OPS) - 1
    if INTERPRETED:
        expected = [choose.backend(op, torch.zeros(1)) for op in OPS]
        assert found["auto"].strip() == str(expected)


def test_nothing_compiles_by_itself(make_checkpoint, monkeypatch):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("torch.compile was called"))
    folder, _ = make_checkpoint(num_hidden_layers=1)
    ml.load_model(folder, device=DEVICE, dtype="float32")(texts_batch(3))


# ---- on a GPU ------------------------------------------------------------------------------------------------------
