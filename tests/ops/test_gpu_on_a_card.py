"""Networks on a card: parity, memory, training, many batches."""

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, INTERPRETED, half, on_a_gpu, texts_batch

import modernbert_lite as ml
from modernbert_lite.ops import gpu, pooling

pytest.importorskip("triton")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_base_shape_against_transformers(make_checkpoint, dtype):
    """ModernBERT-base's shape, random weights: hidden states and mean vectors by the 2x rule."""
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
            got, rough = model(batch).float(), theirs(batch)
            bound = 1e-4 * truth.abs().max() if dtype == "float32" else 2 * (rough - truth).abs().max() + 1e-6
            assert (got - truth).abs().max() <= bound, batch.seqlens
            # The mean of a long random text is small beside the rounding of its tokens: 0.998 in bf16 at 2,048.
            assert distance(got, truth, batch) <= 2 * distance(rough, truth, batch) + 1e-6, batch.seqlens


def distance(a, b, batch):
    """1 - the least cosine of the mean vectors."""
    return 1 - torch.cosine_similarity(pooling.mean(a, batch).double(), pooling.mean(b, batch).double()).min()


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
