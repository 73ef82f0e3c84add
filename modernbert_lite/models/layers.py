"""What the families' networks share: norms, tables, attention between its projections, the last layer of
classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import PackedBatch
from ..ops import reference as ops
from ..ops.linear import Linear, PackedLinear
from ..ops.rope import Turn
from ..reading import CheckpointError
from .fields import Config


class Network(nn.Module):
    """An encoder, or a head on an encoder (which is then `model`). It is called with a PackedBatch. `requires_grad_`
    raises TypeError if the weights are packed for inference."""

    def requires_grad_(self, requires_grad: bool = True) -> Network:
        for module in [m for m in self.modules() if isinstance(m, PackedLinear)]:
            module.requires_grad_(requires_grad)  # raises
        super().requires_grad_(requires_grad)
        return self


class MaskedLanguageModel(Network):
    """A head that gives logits. The encoder is `model`."""

    model: nn.Module

    def forward(self, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        """Logits (T, V). With `positions` (M,), the logits of only those tokens, (M, V): V is large, and [MASK]s are
        few."""
        x = self.model(batch)
        return self.logits(x if positions is None else x[positions])

    def logits(self, x: Tensor) -> Tensor:
        """The encoder's vectors (M, C) -> (M, V)."""
        raise NotImplementedError


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def table(rows: int, width: int) -> nn.Embedding:
    """A table of zeros, which loading writes over. Random numbers on the meta device would import torch's compiler: 1.4
    s."""
    return nn.Embedding(rows, width, _weight=torch.zeros(rows, width))


def attend(
    x: Tensor,
    Wqkv: Linear,
    heads: int,
    batch: PackedBatch,
    turn: Turn | None,
    window_size: tuple[int, int] = (-1, -1),
    rows: Tensor | None = None,
) -> Tensor:
    """Attention up to the output projection: x (T, C) -> (T, H * D). Wqkv projects to the heads of q, then of k, then
    of v; `heads` is H. With `rows` (B,), the index of one token per sequence, only those tokens are queries, and see
    their whole sequence: (B, H * D)."""
    if rows is None:
        qkv = Wqkv(x).unflatten(1, (3 * heads, -1))  # (T, 3 H, D)
        return ops.attention(qkv, heads, batch, window_size, turn, Wqkv.coarse).flatten(1)
    width = Wqkv.out_features // 3  # H * D, mostly C
    q = Wqkv.part(x[rows], slice(0, width)).unflatten(1, (heads, -1))  # (B, H, D)
    kv = Wqkv.part(x, slice(width, None)).unflatten(1, (2 * heads, -1))  # (T, 2 H, D)
    return ops.row_attention(q, kv, rows, batch, turn).flatten(1)


def classifier(config: Config) -> nn.Linear:
    """(.., C) -> (.., labels). Raises CheckpointError for a config without labels."""
    if not config.labels:
        raise CheckpointError(f"num_labels is 0; a {config.architecture} must have at least 1")
    return nn.Linear(config.hidden_size, len(config.labels))
