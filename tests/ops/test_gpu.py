"""What ops takes where Triton runs, and the whole model on it: in the interpreter anywhere, and on a GPU (marker gpu)
against transformers."""

import json
from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, INTERPRETED, half, on_a_gpu, texts_batch
from safetensors.torch import save_file

import modernbert_lite as ml
from modernbert_lite.kernels import attention, geglu, layer_norm, rope
from modernbert_lite.kernels import pooling as pooling_kernel
from modernbert_lite.models.gte import Gte
from modernbert_lite.ops import choose, gpu, pooling
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.choose import OPS, backend_for

pytest.importorskip("triton")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched, in order; Triton is asked for."""
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    device = torch.device(DEVICE) if INTERPRETED else torch.device("cuda", 0)
    assert gpu.works(device)  # these have their own launches, once
    assert gpu.attention_works(device, torch.float32, 32)
    names: list[str] = []

    def counted(launch):
        def call(*args, **kwargs):
            names.append(launch.__name__)
            return launch(*args, **kwargs)

        return call

    for module, name in (
        (attention, "attention"),
        (attention, "row_attention"),
        (geglu, "geglu"),
        (layer_norm, "layer_norm"),
        (rope, "rope_"),
        (pooling_kernel, "pool"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return names


def device_with(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "units"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_attention_is_left_to_torch_before_ampere(monkeypatch, capability, units):
    """Triton compiles for V100 and T4, but not to their matrix units: products would be done a number at a time."""
    assert gpu.has_matrix_units(device_with(monkeypatch, capability)) is units


def test_amd_takes_the_kernels(monkeypatch):
    device = device_with(monkeypatch, (7, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu.has_matrix_units(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_dtypes_take_the_reference(monkeypatch, dtype):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
    assert {choose.backend(op, torch.zeros(1, dtype=dtype, device=DEVICE)) for op in OPS} == {"torch"}


def test_auto_on_a_cuda_device_is_triton_for_every_op_that_has_it(monkeypatch):
    monkeypatch.setattr(gpu, "works", lambda device: device.type == "cuda")
    chosen = {op: backend_for(op, torch.device("cuda", 0), torch.bfloat16) for op in OPS}
    assert chosen.pop("linear") == "torch"
    assert set(chosen.values()) == {"triton"}
    monkeypatch.setattr(gpu, "works", lambda device: False)
    assert {backend_for(op, torch.device("cuda", 0), torch.bfloat16) for op in OPS} == {"torch"}


def test_every_layer_takes_the_kernels(make_checkpoint, launches):
    folder, _ = make_checkpoint(num_hidden_layers=4)
    model = ml.load_model(folder, device=DEVICE, dtype="float32")
    model(texts_batch(5, 70))
    layer = ["layer_norm", "rope_", "attention", "layer_norm", "geglu"]
    assert launches == ["layer_norm", *layer[1:], *layer, *layer, *layer, "layer_norm"]
    launches.clear()
    batch = texts_batch(5, 70)
    model(batch, pooling.rows(batch, ["cls"]))
    last = ["layer_norm", "rope_", "rope_", "row_attention", "layer_norm", "geglu"]
    assert launches == ["layer_norm", *layer[1:], *layer, *layer, *last, "layer_norm"]


def small_gte(folder, **config) -> ml.GteConfig:
    """A GTE checkpoint of random weights, in Alibaba's names."""
    sizes = {"vocab_size": 50_368, "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 144}
    config = {"num_hidden_layers": 2, **sizes, **config}
    raw = {"model_type": "new", "architectures": ["NewModel"], "rope_theta": 20_000, **config}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**raw, "rope_scaling": {"type": "ntk", "factor": 8.0}}))
    network = Gte(ml.read_config(folder))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        norm = name.endswith(("ln.weight", "Norm.weight"))
        mean, std = (1.0, 0.2) if norm else (0.0, 0.5 * parameter.shape[-1] ** -0.5)
        parameter.data.normal_(mean, std, generator=generator)
    save_file({name: p.data for name, p in network.named_parameters()}, folder / "model.safetensors")
    return network.config


def test_every_gte_layer_takes_the_kernels(tmp_path, launches):
    small_gte(tmp_path / "gte")
    model = ml.load_model(tmp_path / "gte", device=DEVICE, dtype="float32")
    batch = texts_batch(5, 70)
    model(batch)
    assert launches == ["layer_norm", *["rope_", "attention", "layer_norm", "geglu", "layer_norm"] * 2]
    launches.clear()
    model(batch, pooling.rows(batch, ["cls"]))
    assert launches[6:] == ["rope_", "rope_", "row_attention", "layer_norm", "geglu", "layer_norm"]


def test_gte_on_the_kernels_gives_what_the_reference_gives(tmp_path, monkeypatch):
    small_gte(tmp_path / "gte", type_vocab_size=2)
    model = ml.load_model(tmp_path / "gte", device=DEVICE, dtype="float32", packed=False)
    batch = texts_batch(5, 70, 1, 130)
    batch = replace(batch, token_type_ids=batch.position_ids.ge(3).long(), max_type=1)
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
        with torch.inference_mode():
            results[backend] = model(batch), model(batch, pooling.rows(batch, ["cls"]))
    for got, expected in zip(results["triton"], results["torch"], strict=True):
        assert (got - expected).abs().max() <= 2e-5 * max(1, expected.abs().max())


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gte_base_shape_on_a_gpu_by_the_2x_rule(tmp_path, monkeypatch, dtype):
    """Against its own reference in fp32; plain torch in the dtype is what its error may be twice of."""
    half(dtype)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    small_gte(tmp_path / "gte", type_vocab_size=2, **sizes)
    exact, model = (ml.load_model(tmp_path / "gte", device=DEVICE, dtype=d) for d in ("float32", dtype))
    for lengths in ((512,) * 8, (8192,), (1, 2, 63, 64, 65, 129, 700, 20, 333)):
        batch = texts_batch(*lengths)
        with torch.inference_mode():
            monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
            truth, plain = exact(batch), model(batch).float()
            monkeypatch.delenv("MODERNBERT_LITE_BACKEND")
            got = model(batch).float()
        error, allowed = (got - truth).abs().max(), (plain - truth).abs().max()
        assert error <= (1e-4 * truth.abs().max() if dtype == "float32" else 2 * allowed + 1e-6), lengths
        cosine = torch.cosine_similarity(pooling.mean(got, batch), pooling.mean(truth, batch))
        assert cosine.min() >= 0.999, lengths


def test_an_activation_without_a_kernel_takes_the_reference(launches):
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(10, 8, device=DEVICE)
    activated, gate = (x @ weight.T).chunk(2, -1)
    assert torch.allclose(ops.geglu(ops.linear(x, weight), "relu"), activated.relu() * gate, atol=1e-5)
    assert launches == []


@pytest.mark.parametrize("head_dim", [8, 48])
def test_head_dims_without_a_kernel_take_the_reference(launches, head_dim):
    batch = texts_batch(3, 9)
    qkv, rows = torch.randn(12, 6, head_dim, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    out = ops.attention(qkv, 2, batch, (2, 2))
    got = ops.row_attention(qkv[rows, :2], qkv[:, 2:], rows, batch)
    assert torch.allclose(got, ops.attention(qkv, 2, batch)[rows], atol=1e-5)
    assert torch.isfinite(out).all()
    assert "attention" not in launches
    assert "row_attention" not in launches


def test_a_gradient_takes_operators_that_have_one(launches):
    """Attention in fp32 and LayerNorm: torch's own; RoPE and GeGLU: the kernels'."""
    batch, rotation = texts_batch(3, 9), (torch.rand(16, 16, device=DEVICE), torch.rand(16, 16, device=DEVICE))
    qkv = torch.randn(12, 6, 32, device=DEVICE, requires_grad=True)
    turned = ops.rope(qkv, 4, (*rotation, batch.position_ids))
    assert turned is not qkv
    out = ops.attention(turned, 2, batch, (2, 2)).flatten(1)
    weight = torch.randn(2 * 24, 64, device=DEVICE, requires_grad=True)
    y = ops.geglu(ops.linear(ops.layer_norm(out, torch.ones(64, device=DEVICE), None, 1e-5), weight), "gelu")
    y.sum().backward()
    assert "attention" not in launches
    assert "layer_norm" not in launches
    assert {"rope_", "geglu"} <= set(launches)
    assert qkv.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


# ---- the whole model -----------------------------------------------------------------------------------------------
