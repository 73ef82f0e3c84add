"""Small networks and batches for graphs, and a stand-in for what captures on a card."""

import os

import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.models.modernbert import ModernBert
from modernbert_lite.ops import gpu, graphs

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


class StandIn:
    """graphs._Device without a GPU: a replay runs the function on the static batch again."""

    def __init__(self, device):
        self.device = device

    def wait(self):
        pass

    leave = synchronize = wait

    def capture(self, run):
        output = run()
        return lambda: output.copy_(run()), output


@pytest.fixture
def captures(monkeypatch):
    """Counts captures; on the CPU it also replaces them."""
    made = []
    if INTERPRETED:
        monkeypatch.setattr(graphs, "_Device", StandIn)
    real = graphs._Device.capture

    def capture(self, run):
        made.append(self)
        return real(self, run)

    monkeypatch.setattr(graphs._Device, "capture", capture)
    if INTERPRETED:
        monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
        monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "triton")
        # Padding is a matter of attention's tiles alone: the other kernels would only cost the interpreter's time.
        kept = {name: gpu.TWINS[name] for name in ("attention", "row_attention")}
        monkeypatch.setattr(gpu, "TWINS", kept)
        monkeypatch.setattr(gpu, "TRITON", tuple(kept))
    return made


def small_model(layers: int = 3, seed: int = 0, heads: int = 1) -> ModernBert:
    torch.manual_seed(seed)
    config = ml.ModernBertConfig(
        vocab_size=200,
        hidden_size=32 * heads,
        intermediate_size=48,
        num_attention_heads=heads,
        layer_types=tuple("full_attention" if i % 2 == 0 else "sliding_attention" for i in range(layers)),
    )
    model = ModernBert(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(DEVICE).eval().requires_grad_(False)


def batch_of(*lengths: int, seed: int = 0) -> ml.PackedBatch:
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return ml.pack([torch.randint(0, 200, (n,), generator=generator) for n in lengths], DEVICE)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).abs().max())
