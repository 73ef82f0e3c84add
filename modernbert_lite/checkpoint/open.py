"""From a model's name to its network, on a device and in a dtype."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..models.fields import Config
from ..models.registry import network_class, read_config, use
from ..ops.linear import FLOAT8, has_float8
from ..ops.threads import set_threads
from ..reading import DTYPES, CheckpointError, OptionError, warn
from .folder import Folder
from .hub import find_checkpoint
from .sentence import length_limit, read_sentence_config
from .weights import load_weights


class Checkpoint:
    """A folder, and what its config files say."""

    def __init__(self, files: Folder):
        files.refuse_adapter()
        self.files = files
        self.root, self.folder = files.root, files.network  # of modules.json; of the network's files, mostly the same
        self.sentence = read_sentence_config(files)
        self.config = read_config(self.folder, self.sentence.settings.config, read=files.json)

    @classmethod
    def find(cls, name: Any, **hub: Any) -> Checkpoint:
        """hub: revision, token, local_files_only. CheckpointError for a checkpoint that is missing, damaged or
        unsupported."""
        return cls(find_checkpoint(name, **hub))

    @property
    def max_length(self) -> int:
        """The most tokens of a text, by the checkpoint's files."""
        return length_limit(self.files, self.folder, self.sentence, self.config.max_position_embeddings)

    def load(
        self, network: type[nn.Module], device: str | torch.device | None, dtype: str | torch.dtype | None
    ) -> nn.Module:
        """The network with the checkpoint's weights, as from `load_model`."""
        return _load(self.files, self.config, network, device, dtype)

    @property
    def use(self) -> str:
        """The class that opens the checkpoint: "Embedder", "FillMask", "LateInteraction", "TokenClassifier", "Reranker"
        or "load_model". For a sequence classifier two classes, the likelier one first: "Reranker or Classifier" if it
        has one label, or if sentence-transformers' CrossEncoder wrote the files; else "Classifier or Reranker"."""
        if self.sentence.late is not None:
            return "LateInteraction"
        if self.sentence.scores:
            return "Reranker"
        if self.sentence.sparse is not None:
            return "Embedder"
        if self.sentence.pooling:
            return "Embedder"
        name = use(self.config.architecture)
        if name == "TokenClassifier" and self.sparse:
            return "Embedder"
        if name != "Classifier":
            return name
        scores = len(self.config.labels) == 1 or self.sentence.activation_fn or self.config.activation_fn
        return "Reranker or Classifier" if scores else "Classifier or Reranker"

    def architecture(self, end: str) -> str:
        """The name of the network's class. If config.json names none: the class with this end, if the file has the
        tensors of such a head; else the encoder."""
        name = self.config.architecture
        if self.config.names_architecture:
            return name
        classifier = self.files.stores("classifier.weight")
        masked = not classifier and any(self.files.stores(f"{head}.dense.weight") for head in ("head", "lm_head"))
        return name.removesuffix("Model") + end if (masked if end == "ForMaskedLM" else classifier) else name

    @property
    def sparse(self) -> bool:
        """Whether there is a sparse weight per token: the config must say so, and the file must have the tensors."""
        return self.config.sparse and self.files.stores("classifier.weight")

    def refuse(self, wanted: str) -> CheckpointError:
        """The error that the checkpoint is no `wanted`. It names the class to use."""
        return CheckpointError(f"{self.root} holds a {self.config.architecture}, no {wanted}: use {self.use} for it")


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    packed: bool = True,
) -> nn.Module:
    """The bare network that `architectures` names (without a name, the encoder), in eval mode, with frozen weights.

    path_or_id: a folder with config.json and safetensors; a hub id such as "answerdotai/ModernBERT-base", for which no
    request is made if the cache has the model; or "tiny", the bundled model.

    device: default CUDA if there is one, else the CPU. dtype: default float32 on the CPU, bfloat16 on CUDA (float16 if
    the card has no bfloat16). A CPU without products of 16 bits by 16 only holds linear weights in 16 bits; it computes
    in float32, and so are the results. "int8", on the CPU only, holds the layers' weights in 8 bits with a scale per
    row, and the rest in float32. "float8", on NVIDIA's cards from Ada and Hopper on, holds the weights of the two wide
    products of each layer in 8-bit floats (e4m3) with a scale per row, and the rest in bfloat16 (docs/gpu.md; slow on a
    CPU).

    packed: on the CPU, linear weights are held only in the layout that the CPU's matrix products use
    (ops.linear.PackedLinear), and the embedding table as the file stores it. False keeps plain tensors of one dtype,
    for torch.compile, torch.export or an optimizer (after `requires_grad_(True)`); 8 bits are always packed.

    Raises CheckpointError for a checkpoint that is missing, damaged or unsupported.
    """
    set_threads(None)
    files = find_checkpoint(path_or_id, revision=revision, token=token, local_files_only=local_files_only)
    files.refuse_adapter()
    config = read_config(files.network, read=files.json)
    return _load(files, config, network_class(config.architecture), device, dtype, packed)


def _load(
    files: Folder,
    config: Config,
    network: type[nn.Module],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    packed: bool = True,
) -> nn.Module:
    picked = pick_device(device)
    return load_weights(network, config, files, device=picked, dtype=pick_dtype(dtype, picked), packed=packed)


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`; by default CUDA if there is one, else the CPU. Raises OptionError for a device that isn't there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise OptionError(f"device {str(device)!r} can't be used: {why}") from None
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`; by default what suits the device. Raises OptionError for an unknown dtype, and for one that the device
    doesn't have: int8 is for the CPU only."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    known = {name: FLOAT8 if name == "float8" else getattr(torch, name) for name in DTYPES}
    picked = known.get(dtype) if isinstance(dtype, str) else dtype
    if picked is None or picked not in known.values():
        raise OptionError(f"dtype is {dtype!r}; it must be one of {', '.join(known)}")
    if picked == torch.int8 and device.type != "cpu":
        raise OptionError(f"dtype 'int8' is for the CPU, and the device is {str(device)!r}: use bfloat16 or float16")
    if picked == FLOAT8 and device.type == "cpu":
        warn("dtype 'float8' is slow on a CPU: it is there to see what a card's numbers lose; int8 is fast")
    elif picked == FLOAT8 and not has_float8(device):
        raise OptionError("dtype 'float8' needs an NVIDIA card from Ada or Hopper on: use bfloat16 or float16")
    return picked
