"""What ops takes where Triton runs, and the whole model on it: in the interpreter anywhere, and on a GPU (marker gpu)
against transformers."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import modernbert_lite as ml
from modernbert_lite.models.gte import Gte
from modernbert_lite.ops import choose, gpu, pooling
from modernbert_lite.ops import reference as ops
from modernbert_lite.ops.choose import OPS, backend_for

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device and TRITON_INTERPRET=0")

from modernbert_lite.kernels import attention, geglu, layer_norm, rope  # noqa: E402
from modernbert_lite.kernels import pooling as pooling_kernel  # noqa: E402


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


def texts_batch(*lengths: int, seed: int = 0) -> ml.PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return ml.pack([torch.randint(5, 50_000, (n,), generator=generator) for n in lengths], DEVICE)


# ---- the choice ----------------------------------------------------------------------------------------------------


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


def half(dtype: str) -> str:
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bfloat16")
    return dtype


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_base_shape_against_transformers(make_checkpoint, dtype):
    """ModernBERT-base's shape, random weights: hidden states by the 2x rule, mean vectors to a cosine of 0.999."""
    half(dtype)
    folder, reference = make_checkpoint(
        hidden_size=768, intermediate_size=1152, num_attention_heads=12, num_hidden_layers=22, initializer_range=0.02
    )
    model, reference = ml.load_model(folder, device=DEVICE, dtype=dtype), reference.to(DEVICE)
    batches = [
        texts_batch(*lengths)
        for lengths in ((512,) * 8, (2048,), (8192,), (1, 2, 63, 64, 65, 129, 700, 20, 333), (20,) * 100)
    ]

    def theirs(batch):
        parts = batch.input_ids.split(list(batch.seqlens))
        return torch.cat([reference(ids[None]).last_hidden_state[0] for ids in parts]).float()

    with torch.inference_mode():
        truths = [theirs(batch) for batch in batches]
        for parameter in reference.parameters():  # not .to(dtype), which would round RoPE's frequencies, too
            parameter.data = parameter.data.to(getattr(torch, dtype))
        for batch, truth in zip(batches, truths, strict=True):
            got = model(batch).float()
            if dtype == "float32":
                assert (got - truth).abs().max() <= 1e-4 * truth.abs().max(), batch.seqlens
            else:
                assert (got - truth).abs().max() <= 2 * (theirs(batch) - truth).abs().max() + 1e-6, batch.seqlens
            cosine = torch.cosine_similarity(pooling.mean(got, batch), pooling.mean(truth, batch))
            assert cosine.min() >= 0.999, batch.seqlens


@pytest.mark.gpu
@on_a_gpu
def test_the_embedder_on_a_gpu_equals_the_cpu():
    """Real weights, real text, one by one and together, with graphs and without."""
    texts = [f"Sentence number {i}, of {'some ' * (i % 40)}length." for i in range(300)]
    exact = ml.Embedder.from_pretrained("tiny", device="cpu", dtype="float32").encode(texts)
    for options in ({}, {"cuda_graphs": False}, {"dtype": "float32"}):
        model = ml.Embedder.from_pretrained("tiny", device="cuda", **options)
        together = model.encode(texts)
        alone = np.stack([model.encode(text) for text in texts[:20]])
        assert np.sum(together * exact, 1).min() >= 0.999
        assert np.sum(alone * exact[:20], 1).min() >= 0.999


@pytest.mark.gpu
@on_a_gpu
def test_ten_thousand_random_batches_without_a_nan():
    torch.manual_seed(0)
    config = ml.ModernBertConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=2,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
    )
    from modernbert_lite.models.modernbert import ModernBert

    model = ModernBert(config).to("cuda", ops_dtype()).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graphed = ml.Graphed(model)
    generator = torch.Generator().manual_seed(1)
    bad = torch.zeros((), device="cuda")
    with torch.inference_mode():
        for _ in range(10_000):
            count = int(torch.randint(1, 12, (1,), generator=generator))
            lengths = torch.randint(0, 160, (count,), generator=generator).tolist()
            batch = ml.pack([torch.randint(0, 1000, (n,), generator=generator) for n in lengths], "cuda")
            bad += (~torch.isfinite(graphed(batch))).sum()
    assert int(bad) == 0


def ops_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@pytest.mark.gpu
@on_a_gpu
def test_peak_memory_is_weights_and_one_layer_pair(make_checkpoint):
    """No more than the weights and 1.2x what is alive at once in the widest layer: the residual stream, its norm, the
    projection (T, 2N) and its product (T, N), or q, k, v and the attention's result."""
    folder, _ = make_checkpoint(
        hidden_size=768, intermediate_size=1152, num_attention_heads=12, num_hidden_layers=6, initializer_range=0.02
    )
    model = ml.load_model(folder, device="cuda", dtype=ops_dtype())
    batch = texts_batch(*(512,) * 32)
    with torch.inference_mode():
        model(batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(batch)
        torch.cuda.synchronize()
    T, C, N = len(batch.input_ids), 768, 1152
    one_pair = 2 * T * (2 * C + 3 * C + C + 3 * N)
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * one_pair


@pytest.mark.gpu
@on_a_gpu
def test_training_equals_fp32_reference_gradients(make_checkpoint, monkeypatch):
    """bf16 gradients through varlen_attn and the kernels, as good as the reference's in bf16."""
    if not gpu.torch_has_varlen_attn():
        pytest.skip("this torch has no varlen_attn with windows")
    folder, _ = make_checkpoint(num_hidden_layers=3, initializer_range=0.02)

    def gradients(name, dtype):
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", name)
        model = ml.load_model(folder, device="cuda", dtype=dtype).requires_grad_(True)
        model(texts_batch(3, 40, 200)).float().square().mean().backward()
        return {key: parameter.grad.float() for key, parameter in model.named_parameters()}

    truth, plain, got = gradients("torch", "float32"), gradients("torch", "bfloat16"), gradients("auto", "bfloat16")
    for key, expected in truth.items():
        bound = 2 * (plain[key] - expected).norm() + 1e-3 * expected.norm() + 1e-6
        assert (got[key] - expected).norm() <= bound, key


@pytest.mark.gpu
@on_a_gpu
def test_a_model_on_the_second_card(monkeypatch):
    """Triton launches on the current device, which is the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    texts = ["one", "two words", "a third text"] * 3
    expected = ml.Embedder.from_pretrained("tiny", device="cuda:0").encode(texts)
    model = ml.Embedder.from_pretrained("tiny", device="cuda:1")
    for _ in range(3):
        assert np.allclose(model.encode(texts), expected, atol=1e-3)
    assert torch.cuda.current_device() == 0
