"""Shared by tests/models: test_config, test_config_refusals."""

from __future__ import annotations

import copy

from modernbert_lite import ModernBertConfig
from modernbert_lite.models.modernbert import FULL, SLIDING

# The keys that transformers 4.48 writes, in the smallest file that is complete.
V4 = {
    "architectures": ["ModernBertModel"],
    "model_type": "modernbert",
    "vocab_size": 1003,
    "hidden_size": 96,
    "intermediate_size": 145,
    "num_hidden_layers": 7,
    "num_attention_heads": 3,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 80000.0,
    "local_rope_theta": 20000.0,
    "local_attention": 130,
    "max_position_embeddings": 777,
    "torch_dtype": "float16",
    "transformers_version": "4.48.0",
}


# The same network as transformers 5 writes it.
V5 = {
    **{k: v for k, v in V4.items() if "rope_theta" not in k and k not in ("global_attn_every_n_layers", "torch_dtype")},
    "dtype": "float16",
    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 80000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 20000.0},
    },
    "transformers_version": "5.23.0",
}


def v4(**changes):
    return {**copy.deepcopy(V4), **changes}


def v5(**changes):
    return {**copy.deepcopy(V5), **changes}


def read(raw):
    return ModernBertConfig.from_dict(raw)


def rope(theta, **values):
    return {"rope_type": "default", "rope_theta": theta, **values}
