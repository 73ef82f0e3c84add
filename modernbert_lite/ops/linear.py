"""The linear layer, whose weight may be held packed for inference: the one place where that shows in a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import reference as ops


class Linear(nn.Linear):
    """x (T, K) -> (T, M), plus the residual. parts: 2 where the weight is two matrices of one shape, one above the
    other, with an activation between their products."""

    weight: Any  # an nn.Parameter, or a cpu.PackedWeight, which passes for one

    def __init__(self, in_features: int, out_features: int, bias: bool, parts: int = 1):
        super().__init__(in_features, out_features, bias)
        self.parts = parts

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, residual)

    def pack(self, dtype: str | None = None) -> None:
        """Holds the weight as suits inference on this machine, and lets the original go; "int8": in 8 bits."""
        self.weight = ops.pack_weight(self.weight, self.parts, dtype)

    def unpack(self) -> None:
        """Holds the weight as any layer does."""
        if ops.is_packed(self.weight):
            self.weight = nn.Parameter(self.weight.dense(), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Under `to`, `half`, `cuda`: a packed weight stays packed where they change nothing of it."""
        if not ops.is_packed(self.weight):
            return super()._apply(fn, recurse)
        result = fn(torch.empty(0, dtype=self.weight.dtype))
        if (result.device, result.dtype) != (self.weight.device, self.weight.dtype):
            self.unpack()
            return super()._apply(fn, recurse)
        packed, self._parameters["weight"] = self._parameters["weight"], None
        super()._apply(fn, recurse)
        self._parameters["weight"] = packed
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            self.unpack()  # to be written over
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if ops.is_packed(self.weight):
            destination[prefix + "weight"] = self.weight.dense()
