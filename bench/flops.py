"""The arithmetic of a forward pass."""

from __future__ import annotations

import modernbert_lite as ml


def visible_keys(length: int, window_size: tuple[int, int]) -> int:
    """Keys that the queries of one sequence see, summed: (left, right) inclusive, -1 unlimited."""

    def side(window: int) -> int:  # sum of min(i, window) for i in 0 .. length - 1
        if window < 0 or window >= length:
            return length * (length - 1) // 2
        return window * (window + 1) // 2 + (length - 1 - window) * window

    return length + side(window_size[0]) + side(window_size[1])


def model_flops(config: ml.ModernBertConfig | ml.GteConfig, lengths: list[int]) -> int:
    """Of one forward pass: the linear layers on every token, the attention of each query with the keys it sees."""
    C, N = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * C * C + 3 * N * C) * config.num_hidden_layers * sum(lengths)
    windows = [(-1, -1)] * config.num_hidden_layers  # GTE's
    if isinstance(config, ml.ModernBertConfig):
        windows = [config.window_size(i) for i in range(config.num_hidden_layers)]
    counts = {length: lengths.count(length) for length in set(lengths)}
    keys = sum(count * visible_keys(n, w) * windows.count(w) for n, count in counts.items() for w in set(windows))
    return linear + 4 * C * keys  # q k^T and the sum of v, 2 FLOPs a channel each


def memory_limit(config: ml.ModernBertConfig, tokens: int, itemsize: int, weights: int) -> int:
    """Bytes: the weights and 1.2 x what one attention block and one MLP block write, each tensor counted once: norm C,
    qkv 3C, attention C, Wo C, residual C; norm C, Wi 2N, GeGLU N, Wo C, residual C."""
    return weights + int(1.2 * tokens * (9 * config.hidden_size + 3 * config.intermediate_size) * itemsize)
