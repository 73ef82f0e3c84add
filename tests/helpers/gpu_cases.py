"""Shared by tests/ops: test_gpu, test_gpu_networks, test_gpu_on_a_card."""

import os

import pytest
import torch

import modernbert_lite as ml

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cpu" if INTERPRETED else "cuda"


on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device and TRITON_INTERPRET=0")


def texts_batch(*lengths: int, seed: int = 0) -> ml.PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return ml.pack([torch.randint(5, 50_000, (n,), generator=generator) for n in lengths], DEVICE)


# ---- the choice ----------------------------------------------------------------------------------------------------


def half(dtype: str) -> str:
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bfloat16")
    return dtype
