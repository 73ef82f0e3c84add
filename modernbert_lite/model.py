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

RopeTable = tuple[Tensor, Tensor]


class ModernBert(nn.Module):
    """The encoder: packed token ids in, one vector a token out."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(config)

    def forward(self, batch: PackedBatch) -> Tensor:
        """(T, C), in the weights' dtype. Raises ValueError for ids outside the vocabulary."""
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"the network takes a PackedBatch, not {type(batch).__name__}: see pack and from_padded")
        if batch.max_id >= self.config.vocab_size:
            raise ValueError(
                f"token id {batch.max_id} is outside the vocabulary (ids 0 to {self.config.vocab_size - 1}); "
                "was the text tokenized for another model?"
            )
        config = self.config
        full = ops.rope_table(config.full_rope, config.head_dim, batch.position_ids)
        sliding = ops.rope_table(config.sliding_rope, config.head_dim, batch.position_ids)

        x = self.embeddings(batch.input_ids)  # (T, C)
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            x = layer(x, batch, full if kind == FULL else sliding)
        return self.final_norm(x)


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        # Zeros, to be loaded over: drawing random numbers on the meta device imports torch's compiler, 1.4 s.
        V, C = config.vocab_size, config.hidden_size
        self.tok_embeddings = nn.Embedding(V, C, _weight=torch.zeros(V, C))
        self.norm = LayerNorm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(input_ids))


class Layer(nn.Module):
    """Pre-norm: attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        # The embeddings were normalised already, so layer 0 has no attn_norm (and the checkpoint no weight for it).
        self.attn_norm = nn.Identity() if index == 0 else LayerNorm(config)
        self.attn = Attention(config, index)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, batch: PackedBatch, rope: RopeTable) -> Tensor:
        # The residual is added inside Wo, because fast backends fuse it: x + attn(..), x + mlp(..).
        x = self.attn(self.attn_norm(x), batch, rope, residual=x)
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

    def forward(self, x: Tensor, batch: PackedBatch, rope: RopeTable, residual: Tensor) -> Tensor:
        qkv = self.Wqkv(x).view(-1, 3, self.heads, self.head_dim)  # (T, 3, H, D)
        qkv = ops.rope_(qkv, *rope)
        out = ops.attention(qkv, batch, self.window_size)  # (T, H, D)
        return self.Wo(out.flatten(1), residual)


class MLP(nn.Module):
    """GeGLU (arXiv 2002.05202): Wi's first half is activated, its second half is the gate."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        C, N = config.hidden_size, config.intermediate_size
        self.act = config.hidden_activation
        self.Wi = Linear(C, 2 * N, bias=config.mlp_bias)
        self.Wo = Linear(N, C, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = ops.gated_linear(x, self.Wi.weight, self.Wi.bias, self.act)  # (T, N)
        return self.Wo(hidden, residual)


class Linear(nn.Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, residual)


class LayerNorm(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
