"""What `modernbert-lite info` says about a checkpoint, and `doctor` about this machine."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import sysconfig
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from .. import __version__
from ..checkpoint.folder import open_safetensors
from ..checkpoint.open import Checkpoint, pick_device, pick_dtype
from ..checkpoint.sentence import Late
from ..checkpoint.sparse import SparseConfig, Splade, Static
from ..ops.choose import OPS, backend
from ..ops.linear import HalfLinear, Int8Linear, Linear, PackedLinear, narrower, pack
from ..ops.threads import available, set_threads
from ..reading import DTYPES, printable

_FORMS = {Linear: "torch", PackedLinear: "oneDNN", HalfLinear: "16-bit weights, float32 sums", Int8Linear: "8 bits"}
_SELF_CHECK_TEXTS = ["A man is playing a guitar.", "Someone plays an instrument.", "Stocks fell on Monday."]


def describe(path_or_id: str, **hub: Any) -> dict[str, Any]:
    """Facts about a checkpoint, from its configs and the headers of its safetensors. No weight is read."""
    checkpoint = Checkpoint.find(path_or_id, **hub)
    root, config, sentence = checkpoint.root, checkpoint.config, checkpoint.sentence
    stored = Counter[str]()
    for path in checkpoint.files.weight_files(checkpoint.folder):
        file = open_safetensors(path)
        for key in file.keys():  # noqa: SIM118  not a dict
            part = file.get_slice(key)
            stored[part.get_dtype()] += int(np.prod(part.get_shape()))
    pooling = sentence.pooling
    wide = sum(config.window_size(layer) == (-1, -1) for layer in range(config.num_hidden_layers))
    return {
        "folder": str(checkpoint.root),
        "architecture": config.architecture + ("" if config.names_architecture else " (config.json names none)"),
        "use": checkpoint.use + _calls(checkpoint),
        "parameters": sum(stored.values()),
        "stored as": ", ".join(stored),
        "hidden size": config.hidden_size,
        "layers": f"{config.num_hidden_layers} ({wide} global)",
        "heads": f"{config.num_attention_heads} x {config.head_dim}",
        "intermediate size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        **config.facts(),
        "max length": checkpoint.max_length,
        "pooling": "+".join(pooling.modes) if pooling else "none said",
        "dense": len(sentence.dense),
        "normalizes": sentence.normalize,
        "prompts": dict(sentence.prompts or {}),
        "similarity": sentence.similarity_fn_name,
        "labels": list(config.labels) if "Classification" in config.architecture else [],
        **({} if sentence.late is None else _of_late(sentence.late)),
        **({} if sentence.sparse is None else _of_sparse(sentence.sparse)),
        "files": _files(root),
    }


def _files(root: Path) -> dict[str, int]:
    """Sizes in bytes, by path. What can't be looked at is left out, such as a link to nothing."""
    sizes = {}
    for path in sorted(root.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file():
                sizes[printable(path.relative_to(root).as_posix(), 200)] = path.stat().st_size
    return sizes


def _calls(checkpoint: Checkpoint) -> str:
    if checkpoint.sentence.sparse is not None:
        return " (encode_sparse)"
    return " (encode, encode_sparse)" if checkpoint.sparse else ""


def _of_sparse(sparse: SparseConfig) -> dict[str, Any]:
    def shown(road: Splade | Static | None) -> str:
        if isinstance(road, Static):
            return "stored weights, without the network"
        return "none" if road is None else f"{road.strategy} of {road.activation}"

    return {
        "weights of queries": shown(sparse.query),
        "weights of documents": shown(sparse.document),
        "weights kept": sparse.max_active_dims or "all above 0",
    }


def _of_late(late: Late) -> dict[str, Any]:
    return {
        "query length": late.query_length or "as any text",
        "document length": late.document_length or "as any text",
        "query expansion": f"to {late.padded_length} tokens" if late.padded_length else "none",
        "expansion is attended to": late.attends,
        "skip list": list(late.skiplist_words),
    }


def machine() -> dict[str, Any]:
    """Versions, devices, threads, and the backend that each operation takes here."""
    set_threads(None)
    device = pick_device(None)
    facts: dict[str, Any] = {
        "modernbert-lite": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for package in ("torch", "triton", "safetensors", "tokenizers", "huggingface-hub", "numpy"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts["dtype"] = str(pick_dtype(None, device)).removeprefix("torch.")
    x = torch.empty(1, dtype=pick_dtype(None, device), device=device)
    facts |= {f"backend of {op}": backend(op, x) for op in OPS}
    facts |= {f"{name} on this CPU": _speed(name) for name in DTYPES if name != "float8" and device.type == "cpu"}
    facts["MODERNBERT_LITE_BACKEND"] = os.environ.get("MODERNBERT_LITE_BACKEND", "not set (auto)")
    facts["C compiler for Triton"] = _compiler()
    facts["threads"] = f"{torch.get_num_threads()} of {available()} processors"
    facts["CPU capability"] = torch.backends.cpu.get_cpu_capability()
    facts["hub offline"] = os.environ.get("HF_HUB_OFFLINE", "not set")
    return facts


@torch.inference_mode()
def _speed(name: str) -> str:
    """What a layer in this dtype does, and how fast: with 128 rows, within a quarter of a second."""
    dtype, layer = getattr(torch, name), Linear(768, 2304, False).requires_grad_(False)
    narrow = narrower(layer.weight.device, dtype)
    pack(layer.to(torch.float32 if narrow else dtype), narrow=narrow)
    x, best, end = torch.ones(128, 768, dtype=layer.weight.dtype), math.inf, time.perf_counter() + 0.25
    while (start := time.perf_counter()) < end:
        layer(x)
        best = min(best, time.perf_counter() - start)
    slow = isinstance(layer, HalfLinear) and not layer._packed.fast
    speed = 2 * 128 * 768 * 2304 / best / 1e9
    return f"{_FORMS[type(layer)]}{', converted for each product' * slow}: {speed:.0f} GFLOP/s"


def _compiler() -> str:
    """Triton builds its launchers with a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return "none found (gcc, clang, cc, or name one in CC)"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return compiler if headers.is_file() else f"{compiler}, but {headers} is missing"


def self_check() -> str:
    """Embeds three texts with the bundled model, on this machine's backends and on the reference. Raises RuntimeError
    if they differ, or if the vectors make no sense."""
    from ..embedder import Embedder

    start = time.perf_counter()
    model = Embedder.from_pretrained("tiny")
    loaded = time.perf_counter()
    vectors = model.encode(_SELF_CHECK_TEXTS)
    words = model.encode([_SELF_CHECK_TEXTS[0] * 50] * 4)
    done = time.perf_counter()
    with mock.patch.dict(os.environ, MODERNBERT_LITE_BACKEND="torch"):
        reference = Embedder.from_pretrained("tiny", device="cpu", dtype="float32").encode(_SELF_CHECK_TEXTS)
    cosine = float(np.min(np.sum(vectors * reference, axis=1)))
    near, far = model.similarity(vectors[0], vectors[1:])[0]
    if not (cosine > 0.999 and near > far + 0.2 and np.isfinite(words).all()):
        raise RuntimeError(
            f"self-check failed: cosine {cosine:.6f} to the reference (at least 0.999 is right), similarity {near:.3f} "
            f"of like texts and {far:.3f} of unlike ones. Try MODERNBERT_LITE_BACKEND=torch, and report this table"
        )
    times = f"loaded in {loaded - start:.2f} s, embedded in {done - loaded:.2f} s"
    return f"self-check passed: cosine {cosine:.6f} to the reference; {times}"
