"""ModernBERT (arXiv 2412.13663): the forward pass, top-down.

Letters: T tokens in the batch, C hidden_size, H heads, D head_dim, N intermediate_size, V vocab_size, L layers.
Attributes are the checkpoint's own names, so that loading renames nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..ops import reference as ops
from ..ops.linear import Linear
from .fields import FULL, ModernBertConfig


class ModernBert(nn.Module):
    """The encoder: packed token ids in, one vector a token out."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = _norm(config)

    def forward(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """(T, C), in the weights' dtype; or, of the tokens `rows` (B,), row b in sequence b, (B, C): the last layer
        then computes no more than they need. Raises ValueError for ids outside the vocabulary."""
        check_batch(batch, self.config, rows)
        config = self.config
        full = ops.rotation(config.full_rope, config.head_dim, batch)
        sliding = ops.rotation(config.sliding_rope, config.head_dim, batch)

        x = self.embeddings(batch.input_ids)  # (T, C)
        *lower, last = zip(self.layers, config.layer_types, strict=True)
        for layer, kind in lower:
            x = layer(x, batch, full if kind == FULL else sliding)
        layer, kind = last
        if kind == FULL:
            x = layer(x, batch, full, rows)
        else:
            x = layer(x, batch, sliding)
            x = x if rows is None else x[rows]
        return self.final_norm(x)


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # Zeros, to be loaded over: drawing random numbers on the meta device imports torch's compiler, 1.4 s.
        V, C = config.vocab_size, config.hidden_size
        self.tok_embeddings = nn.Embedding(V, C, _weight=torch.zeros(V, C))
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        # The table may be narrower than the rest: it stays as the checkpoint stores it, mapped from the file.
        return self.norm(self.tok_embeddings(input_ids).to(self.norm.weight.dtype))


class Layer(nn.Module):
    """Pre-norm: attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        # The embeddings were normalised already, so layer 0 has no attn_norm (and the checkpoint no weight for it).
        self.attn_norm = nn.Identity() if index == 0 else _norm(config)
        self.attn = Attention(config, index)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, batch: PackedBatch, turn: ops.Rotation, rows: Tensor | None = None) -> Tensor:
        # The residual is added inside Wo, because fast backends fuse it: x + attn(..), x + mlp(..).
        normed = self.attn_norm(x)
        x = self.attn(normed, batch, turn, x if rows is None else x[rows], rows)
        return self.mlp(self.mlp_norm(x), residual=x)


class Attention(nn.Module):
    """Over the whole sequence, or a window of `local_attention // 2` tokens on each side, as `layer_types` says."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.window_size = config.window_size(index)
        self.Wqkv = Linear(C, 3 * C, bias=config.attention_bias)
        self.Wo = Linear(C, C, bias=config.attention_bias)

    def forward(
        self, x: Tensor, batch: PackedBatch, turn: ops.Rotation, residual: Tensor, rows: Tensor | None
    ) -> Tensor:
        return self.Wo(attend(x, self.Wqkv, self.heads, batch, turn, self.window_size, rows), residual)


def attend(
    x: Tensor,
    Wqkv: Linear,
    heads: int,
    batch: PackedBatch,
    turn: ops.Rotation | None,
    window_size: tuple[int, int] = (-1, -1),
    rows: Tensor | None = None,
    q_scale: Tensor | None = None,
) -> Tensor:
    """x (T, C) -> (T, heads * D) before the output projection; of the tokens `rows` alone, (B, heads * D), without a
    window. q_scale (T, 1, 1) multiplies the queries."""
    if rows is None:
        qkv = Wqkv(x).unflatten(1, (3, heads, -1))  # (T, 3, H, D)
        qkv = qkv if turn is None else ops.rope_(qkv, *turn)
        if q_scale is not None:
            qkv[:, 0] *= q_scale
        return ops.attention(qkv, batch, window_size, Wqkv.weight).flatten(1)
    # One token of each sequence asks, all of them answer.
    width = len(Wqkv.weight) // 3  # H * D, mostly C
    q = ops.linear_part(x[rows], Wqkv.weight, Wqkv.bias, slice(0, width)).unflatten(1, (1, heads, -1))  # (B, 1, H, D)
    kv = ops.linear_part(x, Wqkv.weight, Wqkv.bias, slice(width, None)).unflatten(1, (2, heads, -1))  # (T, 2, H, D)
    if turn is not None:
        q, kv = ops.rope_(q, *ops.rotation_at(turn, rows)), ops.rope_(kv, *turn)
    q = q[:, 0] if q_scale is None else q[:, 0] * q_scale[rows].to(q.dtype)
    return ops.row_attention(q, kv, batch).to(x.dtype).flatten(1)


class MLP(nn.Module):
    """GeGLU (arXiv 2002.05202): Wi's first half is activated, its second half is the gate."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        C, N = config.hidden_size, config.intermediate_size
        self.act = config.hidden_activation
        self.Wi = Linear(C, 2 * N, bias=config.mlp_bias, parts=2)
        self.Wo = Linear(N, C, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = ops.gated_linear(x, self.Wi.weight, self.Wi.bias, self.act)  # (T, N)
        return self.Wo(hidden, residual)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)
