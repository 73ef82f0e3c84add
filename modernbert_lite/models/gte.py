"""GTE v1.5 (arXiv 2407.19669; Alibaba's "NewModel"): the forward pass, top-down, in the letters of model.py.

Attributes are the names in Alibaba's checkpoints; names.py knows the others. Beside ModernBERT: norms come after the
residual's addition, there are biases, all layers are global, and the MLP activates the second half.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import PackedBatch, check_batch
from ..ops import reference as ops
from ..ops.linear import Linear
from .fields import GteConfig
from .modernbert import LayerNorm, attend


class Gte(nn.Module):
    """The encoder: packed token ids in, one vector a token out."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """(T, C), in the weights' dtype; or, of the tokens `rows` (B,), row b in sequence b, (B, C): the last layer
        then computes no more than they need. Raises ValueError for ids outside the tables."""
        check_batch(batch, self.config, rows)
        config = self.config
        rotary = config.position_embedding_type == "rope"
        turn = ops.rotation(config.rope, config.head_dim, batch) if rotary else None
        scale = None
        if config.logn_attention_scale:
            scale = ops.logn_scale(batch, config.max_position_embeddings, config.logn_attention_clip1)

        x = self.embeddings(batch)  # (T, C)
        *lower, last = self.encoder.layer
        for layer in lower:
            x = layer(x, batch, turn, scale)
        return last(x, batch, turn, scale, rows)


class Embeddings(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = _table(config.vocab_size, C)
        self.token_type_embeddings = _table(config.type_vocab_size, C) if config.type_vocab_size else None
        absolute = config.position_embedding_type == "absolute"
        self.position_embeddings = _table(config.max_position_embeddings, C) if absolute else None
        self.LayerNorm = LayerNorm(C, config.layer_norm_eps, bias=True)

    def forward(self, batch: PackedBatch) -> Tensor:
        # The table may be narrower than the rest: it stays as the checkpoint stores it, mapped from the file.
        x = self.word_embeddings(batch.input_ids).to(self.LayerNorm.weight.dtype)
        types = self.token_type_embeddings
        if types is not None:
            # One row stands for every token, whatever the tokenizer says of pairs.
            ids = batch.token_type_ids if types.num_embeddings > 1 else None
            x = x + (types.weight[0] if ids is None else types(ids))
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(batch.position_ids)
        return self.LayerNorm(x)


class Encoder(nn.Module):
    def __init__(self, config: GteConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Post-norm: attention, then a gated MLP, each added to its input, and the sum normalised."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.attention = Attention(config)
        self.attn_ln = PostNorm(config)
        self.mlp = MLP(config)
        self.mlp_ln = PostNorm(config)

    def forward(
        self,
        x: Tensor,
        batch: PackedBatch,
        turn: ops.Rotation | None,
        scale: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        attention, mlp = self.attention, self.mlp
        out = attend(x, attention.qkv_proj, attention.heads, batch, turn, rows=rows, q_scale=scale)
        x = self.attn_ln(attention.o_proj, out, x if rows is None else x[rows])
        return self.mlp_ln(mlp.down_proj, mlp(x), x)


class Attention(nn.Module):
    """The projections: what is between them is `model.attend`."""

    def __init__(self, config: GteConfig):
        super().__init__()
        C, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.heads = config.num_attention_heads
        self.qkv_proj = Linear(C, 3 * width, bias=True)
        self.o_proj = Linear(width, C, bias=True)


class MLP(nn.Module):
    """GeGLU the other way round: up_gate_proj's second half is activated, its first half is the factor."""

    def __init__(self, config: GteConfig):
        super().__init__()
        C, N = config.hidden_size, config.intermediate_size
        self.act = config.hidden_act
        self.up_gate_proj = Linear(C, 2 * N, bias=False, parts=2)
        self.down_proj = Linear(N, C, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_linear(x, self.up_gate_proj.weight, None, self.act, swapped=True)  # (T, N)


class PostNorm(nn.Module):
    """norm(projection(x) + residual), a LayerNorm or an RMSNorm."""

    def __init__(self, config: GteConfig):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        rms = config.layer_norm_type == "rms_norm"
        self.bias = None if rms else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, projection: Linear, x: Tensor, residual: Tensor) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(projection(x, residual), self.weight, self.eps)
        norm = self.weight, self.bias, self.eps
        return ops.linear_layer_norm(x, projection.weight, projection.bias, residual, norm)


def _table(rows: int, width: int) -> nn.Embedding:
    # Zeros, to be loaded over: drawing random numbers on the meta device imports torch's compiler, 1.4 s.
    return nn.Embedding(rows, width, _weight=torch.zeros(rows, width))
