"""Small random checkpoints of real shape, and no network."""

from __future__ import annotations

import os

# Before anything imports triton, torch or huggingface_hub: kernels run in Triton's interpreter, nothing is downloaded.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
# One thread: the models here are small, and threads that wait for a shared core make the suite many times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import copy
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_files import write_sentence_files

HELPERS = Path(__file__).parent / "helpers"  # on sys.path: pyproject.toml
pytest.register_assert_rewrite(*(path.stem for path in HELPERS.glob("*_cases.py")))

DATA = Path(__file__).parent / "data"
REAL_TOKENIZER = DATA / "modernbert-tokenizer"
TINY = Path(__file__).parents[1] / "modernbert_lite" / "tiny"

# Small, but nothing is square by accident: 5 layers (two global), 3 heads of 32, a GLU of odd width.
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "vocab_size": 50368,
    # Wide weights: attention that is sharp, hidden states that differ, so that a mistake shows.
    "initializer_range": 0.1,
    "initializer_cutoff_factor": 3.0,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine's own addresses can be reached."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def auto_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODERNBERT_LITE_BACKEND", raising=False)


def randomize(model: Any, seed: int = 0) -> Any:
    """Norms away from 1 and biases away from 0, so that one that is left out shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * 0.2)
    return model.eval()


# What make_checkpoint has made: a folder and the model in it, of the last few configs.
_MADE: dict[str, tuple[Path, Any]] = {}
_KEPT = 12


def write_short_tokenizer(folder: Path) -> None:
    """The real tokenizer with the first of its merges only: the same ids for what they make, and read in a tenth of
    the time, by every library."""
    for path in REAL_TOKENIZER.iterdir():
        if path.name not in ("config.json", "tokenizer.json"):
            shutil.copy(path, folder)
    raw = json.loads((REAL_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    model = raw["model"]
    model["merges"] = model["merges"][:4_000]
    made = {"".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]}
    added = {token["content"] for token in raw["added_tokens"]}
    model["vocab"] = {t: i for t, i in model["vocab"].items() if len(t) == 1 or t in made or t in added}
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def make_checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """make("ModernBertForMaskedLM", hidden_size=...) -> (folder, the transformers model saved in it).

    Fixed random weights, transformers' own save_pretrained, the ModernBERT tokenizer beside them, shortened unless
    whole_tokenizer. attn: "eager" or "sdpa". name: of the folder, for more than one in a test.
    """

    def make(
        architecture: str = "ModernBertModel",
        *,
        attn: str = "sdpa",
        name: str = "checkpoint",
        seed: int = 0,
        whole_tokenizer: bool = False,
        **config: Any,
    ) -> tuple[Path, Any]:
        import torch
        import transformers

        key = repr((architecture, attn, seed, whole_tokenizer, sorted(config.items())))
        if key not in _MADE:
            torch.manual_seed(seed)
            hf_config = transformers.ModernBertConfig(**{**SMALL, **config}, attn_implementation=attn)
            model = randomize(getattr(transformers, architecture)(hf_config), seed)
            source = tmp_path_factory.mktemp("made")
            model.save_pretrained(source)
            if whole_tokenizer:
                shutil.copytree(REAL_TOKENIZER, source, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
            else:
                write_short_tokenizer(source)
            _MADE[key] = source, model
            if len(_MADE) > _KEPT:
                shutil.rmtree(_MADE.pop(next(iter(_MADE)))[0])
        source, model = _MADE[key] = _MADE.pop(key)  # the last one that was asked for
        # Copies: a test may damage the files, or change the model.
        return Path(shutil.copytree(source, tmp_path / name, dirs_exist_ok=True)), copy.deepcopy(model)

    return make


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make("ModernBertModel", ends=True, **config) -> a folder of its own, cheap to open in any library: 2 layers of
    width 32 with fixed random weights, and the bundled model's tokenizer without its normalizer (it keeps case).

    ends: whether the tokenizer's template puts [SEP] behind a text.
    """
    sources: dict[str, Path] = {}

    def make(architecture: str = "ModernBertModel", *, ends: bool = True, **config: Any) -> Path:
        import torch
        import transformers

        key = repr((architecture, ends, config))
        if key not in sources:
            source = sources[key] = tmp_path_factory.mktemp("source")
            torch.manual_seed(0)
            small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
            ids = {"vocab_size": 16384, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 3, "local_attention": 16}
            wide = {"initializer_range": 0.2, "initializer_cutoff_factor": 3.0}
            hf_config = transformers.ModernBertConfig(**{**small, **ids, **wide, **config})
            randomize(getattr(transformers, architecture)(hf_config)).save_pretrained(source)
            for path in TINY.glob("*token*"):
                shutil.copy(path, source)
            raw = json.loads((source / "tokenizer.json").read_text())
            raw["normalizer"] = None
            for kind in () if ends else ("single", "pair"):
                parts = raw["post_processor"][kind]
                raw["post_processor"][kind] = [p for p in parts if p.get("SpecialToken", {}).get("id") != "[SEP]"]
            (source / "tokenizer.json").write_text(json.dumps(raw))
        return Path(shutil.copytree(sources[key], tmp_path_factory.mktemp("small") / "model"))

    return make


@pytest.fixture(scope="session")
def cases() -> Any:
    """helpers/config_cases.py."""
    import config_cases

    return config_cases


@pytest.fixture(scope="session")
def small_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks of one layer: "dense" (an encoder whose mean goes through a Dense), "reranker", "masked", "late"."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folders: dict[str, Path] = {}
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, architecture, config in (
        ("dense", "ModernBertModel", {}),
        ("reranker", "ModernBertForSequenceClassification", {"num_labels": 1}),
        ("masked", "ModernBertForMaskedLM", {}),
        ("late", "ModernBertModel", {}),
    ):
        torch.manual_seed(0)
        folders[name] = folder = tmp_path_factory.mktemp("small") / name
        model = getattr(transformers, architecture)(transformers.ModernBertConfig(**{**SMALL, **small, **config}))
        randomize(model).save_pretrained(folder)
        for path in REAL_TOKENIZER.iterdir():
            if path.name != "config.json":
                shutil.copy(path, folder)
    write_sentence_files(folders["dense"], pooling={"pooling_mode_mean_tokens": True})
    modules = json.loads((folders["dense"] / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folders["dense"] / "modules.json").write_text(json.dumps(modules))
    (folders["dense"] / "2_Dense").mkdir()
    tanh = "torch.nn.modules.activation.Tanh"
    (folders["dense"] / "2_Dense" / "config.json").write_text(
        json.dumps({"in_features": 32, "out_features": 7, "bias": False, "activation_function": tanh})
    )
    save_file({"linear.weight": torch.randn(7, 32) * 0.1}, folders["dense"] / "2_Dense" / "model.safetensors")
    late = {"model_type": "ColBERT", "query_prefix": "", "document_prefix": "", "query_length": 16}
    (folders["late"] / "config_sentence_transformers.json").write_text(json.dumps({**late, "document_length": 40}))
    return folders
