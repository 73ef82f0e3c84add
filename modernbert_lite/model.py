"""ModernBERT (arXiv 2412.13663): the forward pass, top-down.

Letters: T tokens in the batch, C hidden_size, H heads, D head_dim, N intermediate_size, V vocab_size, L layers.
Attributes are the checkpoint's own names, so that loading renames nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .batch import PackedBatch
from .config import FULL, ModernBertConfig
from .linear import Linear


class ModernBert(nn.Module):
    """The encoder: packed token ids in, one vector a token out."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(config)

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


def check_batch(batch: PackedBatch, config: ModernBertConfig, rows: Tensor | None = None) -> None:
    """Raises TypeError for what is no batch, ValueError for ids outside the vocabulary or not a row a sequence."""
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"the network takes a PackedBatch, not {type(batch).__name__}: see pack and from_padded")
    if batch.max_id >= config.vocab_size:
        raise ValueError(
            f"token id {batch.max_id} is outside the vocabulary (ids 0 to {config.vocab_size - 1}); "
            "was the text tokenized for another model?"
        )
    if rows is not None and rows.shape != (batch.cu_seqlens.shape[0] - 1,):
        raise ValueError(f"rows is {tuple(rows.shape)}; it must be ({batch.cu_seqlens.shape[0] - 1},): one a sequence")


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # Zeros, to be loaded over: drawing random numbers on the meta device imports torch's compiler, 1.4 s.
        V, C = config.vocab_size, config.hidden_size
        self.tok_embeddings = nn.Embedding(V, C, _weight=torch.zeros(V, C))
        self.norm = LayerNorm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        # The table may be narrower than the rest: it stays as the checkpoint stores it, mapped from the file.
        return self.norm(self.tok_embeddings(input_ids).to(self.norm.weight.dtype))


class Layer(nn.Module):
    """Pre-norm: attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        # The embeddings were normalised already, so layer 0 has no attn_norm (and the checkpoint no weight for it).
        self.attn_norm = nn.Identity() if index == 0 else LayerNorm(config)
        self.attn = Attention(config, index)
        self.mlp_norm = LayerNorm(config)
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
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window_size = config.window_size(index)
        self.Wqkv = Linear(C, 3 * C, bias=config.attention_bias)
        self.Wo = Linear(C, C, bias=config.attention_bias)

    def forward(
        self, x: Tensor, batch: PackedBatch, turn: ops.Rotation, residual: Tensor, rows: Tensor | None
    ) -> Tensor:
        if rows is None:
            qkv = self.Wqkv(x).view(-1, 3, self.heads, self.head_dim)  # (T, 3, H, D)
            qkv = ops.rope_(qkv, *turn)
            out = ops.attention(qkv, batch, self.window_size, self.Wqkv.weight)  # (T, H, D)
        else:  # one token of each sequence asks, all of them answer
            C = len(self.Wqkv.weight) // 3
            q = ops.linear_part(x[rows], self.Wqkv.weight, self.Wqkv.bias, slice(0, C))
            kv = ops.linear_part(x, self.Wqkv.weight, self.Wqkv.bias, slice(C, None))
            q = ops.rope_(q.view(-1, 1, self.heads, self.head_dim), *ops.rotation_at(turn, rows))  # (B, 1, H, D)
            kv = ops.rope_(kv.view(-1, 2, self.heads, self.head_dim), *turn)  # (T, 2, H, D)
            out = ops.row_attention(q[:, 0], kv, batch).to(x.dtype)  # (B, H, D)
        return self.Wo(out.flatten(1), residual)


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
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
