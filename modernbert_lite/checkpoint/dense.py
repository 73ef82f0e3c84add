"""Modules of sentence-transformers that compute on vectors, after the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.pooling import normalize
from ..reading import CheckpointError, Reader, shown
from .folder import Folder
from .weights import load_dense

# Classes of torch.nn that are one function: nothing learned, nothing random, nothing to be given.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": nn.Identity(),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "ReLU": nn.ReLU(),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    **{
        name: getattr(nn, name)()
        for name in (
            *("CELU", "ELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish"),
            *("ReLU6", "SELU", "Softplus", "Softshrink", "Softsign", "Tanhshrink"),
        )
    },
}
_ACTIVATION_PLACES = ("torch.nn", "torch.nn.modules", "torch.nn.modules.activation", "torch.nn.modules.linear")


def score_activation(name: object, error: type[ValueError] = CheckpointError) -> Callable[[Tensor], Tensor]:
    """The activation with this name. A file names a class of torch ("torch.nn.modules.activation.Sigmoid"). A user may
    also give only the last part, in upper or lower case ("sigmoid"). Raises `error` for an unknown name.

    A name in a file that doesn't begin with "torch." is no class: sentence-transformers warns, and takes its default.
    """
    text = "Identity" if name is None else name if isinstance(name, str) else ""
    place, _, last = text.rpartition(".")
    known = _ACTIVATIONS
    if not place and (error is not CheckpointError or name is None):
        known, last = {key.lower(): function for key, function in _ACTIVATIONS.items()}, last.lower()
    elif place not in _ACTIVATION_PLACES:
        known = {}
    if last not in known:
        raise error(
            f"activation function {shown(name)} is not supported; known: {', '.join(_ACTIVATIONS)}"
            + (", of torch.nn, as in 'torch.nn.ReLU'" if error is CheckpointError else "")
        )
    return known[last]


class Dense:
    """A linear layer on vectors of sentences or of tokens: (B, in) -> (B, out), fp32."""

    def __init__(self, files: Folder, folder: Path, device: torch.device):
        config = files.json(folder / "config.json")
        # sentence-transformers' default, where the key is absent, is Tanh.
        name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        try:
            self.activation = score_activation(name)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        sizes = config.get("in_features"), config.get("out_features")
        self.residual = bool(config.get("use_residual"))
        expected: dict[str, tuple[Any, ...]] = {"linear.weight": (sizes[1], sizes[0])}
        if config.get("bias", True):
            expected["linear.bias"] = (sizes[1],)
        if self.residual and sizes[0] != sizes[1]:
            expected["residual.weight"] = (sizes[1], sizes[0])
        self.tensors = load_dense(files, folder, expected, device)

        self.in_features, self.out_features = int(sizes[0]), int(sizes[1])

    def __call__(self, x: Tensor) -> Tensor:
        y = self.activation(nn.functional.linear(x, self.tensors["linear.weight"], self.tensors.get("linear.bias")))
        if not self.residual:
            return y
        through = self.tensors.get("residual.weight")
        return y + (x if through is None else nn.functional.linear(x, through))


class Norm:
    """A LayerNorm on vectors of sentences: (B, C) -> (B, C), fp32. Cross-encoders such as ettin-reranker have it."""

    def __init__(self, files: Folder, folder: Path, device: torch.device):
        self.in_features = self.out_features = width = Reader(files.json(folder / "config.json")).whole("dimension", 1)
        self.tensors = load_dense(files, folder, {"norm.weight": (width,), "norm.bias": (width,)}, device)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.tensors["norm.weight"], self.tensors["norm.bias"])


class Unit:
    """A Normalize module that stands before other modules: (B, C) -> (B, C), rows of unit length."""

    def __init__(self, width: int):
        self.in_features = self.out_features = width

    def __call__(self, x: Tensor) -> Tensor:
        return normalize(x)


def on_vectors(
    files: Folder, modules: Iterable[tuple[str, str]], width: int, device: torch.device
) -> list[Dense | Norm | Unit]:
    """The modules that change vectors of `width` numbers. Raises CheckpointError for one that takes another width."""
    made: list[Dense | Norm | Unit] = []
    for kind, path in modules:
        if kind == "Normalize":
            made.append(Unit(width))
        else:
            made.append((Norm if kind == "LayerNorm" else Dense)(files, files.root / path, device))
        if made[-1].in_features != width:
            raise CheckpointError(f"{path}: in_features is {made[-1].in_features}; it gets {width}")
        width = made[-1].out_features
    return made


def finish(x: Tensor, dense: Sequence[Dense | Norm | Unit], unit: bool, truncate_dim: int | None) -> Tensor:
    """Pooled vectors (B, C) -> what the user gets: Dense layers, then cutting to truncate_dim, then normalising."""
    for layer in dense:
        x = layer(x)
    x = x[:, :truncate_dim]
    return normalize(x) if unit else x
