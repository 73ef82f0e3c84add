"""The linear layer, and the two forms in which inference on a CPU holds its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn
from .choose import backend_for, wanted
from .reference import ACTIVATIONS, geglu, layer_norm, linear
from .tracing import wants_gradient


class Linear(nn.Linear):
    """x (T, K) -> (T, M). A layer asks its projection for what it needs (`part`, `gated`, `normed`), because packed
    weights do some of these in one step.

    parts: 2 if the weight is two matrices of one shape, one above the other, with an activation between their products.
    """

    coarse = False  # whether the weight has 8 bits

    def __init__(self, in_features: int, out_features: int, bias: bool, parts: int = 1):
        super().__init__(in_features, out_features, bias)
        self.parts = parts

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With a residual (T, M): the sum. The caller must not use the residual again."""
        return linear(x, self.weight, self.bias, residual)

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """Some columns of the result: x @ weight[rows]^T + bias[rows]."""
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def gated(self, x: Tensor, act: str, swapped: bool = False) -> Tensor:
        """`reference.geglu` of the result, (T, M / 2)."""
        return geglu(self(x), act, swapped)

    def normed(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """`reference.layer_norm` of the result plus a residual (T, M). The caller must not use the residual again."""
        return layer_norm(self(x), weight, bias, eps, residual)


class PackedLinear(Linear):
    """A frozen Linear for inference on a CPU, which holds its weight in oneDNN's layout only. `pack` makes it.

    The weight is no parameter: `weight` returns its numbers as a new plain tensor. The state_dict is that of a Linear,
    and a pickle holds a Linear. Moved to another device or dtype, or after `unpack`, it is a Linear again. A deepcopy
    is packed. Gradients reach x and the bias, never the weight: `requires_grad_` is a TypeError.
    """

    _packed: Any  # of onednn.pack, or onednn.quantize; nothing writes to it

    @property
    def dtype(self) -> torch.dtype:
        return self._packed[0].dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(M, K), made for each call."""
        return torch.cat([part.to_dense() for part in self._packed])

    def _fits(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether oneDNN computes the product: in inference, unless another backend is asked for."""
        if wanted() not in ("auto", "onednn"):
            return False
        if torch.compiler.is_compiling():  # without fullgraph=True torch then runs this layer uncompiled
            raise RuntimeError("packed weights can't be compiled: load the network with packed=False")
        tracked = wants_gradient(x, self.bias, *others) or torch.autograd.forward_ad._current_level >= 0
        return x.dtype == self.dtype and x.dim() == 2 and len(x) > 0 and not tracked

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._fits(x, residual):
            return linear(x, self.weight, self.bias, residual)
        return onednn.linear(x, self._packed, self.bias, residual)

    def part(self, x: Tensor, rows: slice) -> Tensor:
        return self(x)[:, rows]  # a packed weight can't be cut

    def gated(self, x: Tensor, act: str, swapped: bool = False) -> Tensor:
        if len(self._packed) != 2 or not self._fits(x):
            return super().gated(x, act, swapped)
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        (activated, gate), biases = (halves[:: -1 if swapped else 1] for halves in (self._packed, biases))
        return onednn.gated(x, activated, gate, biases, act, ACTIVATIONS[act])

    def normed(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return layer_norm(self(x, residual), weight, bias, eps)  # the sum is kept in fp32

    def unpack(self) -> None:
        """Becomes a Linear."""
        weight = self.weight
        del self._packed
        self.__class__ = Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Called by `to`, `half` and `cuda`. It stays packed if they don't change the weight's device or dtype."""
        result = fn(torch.empty(0, dtype=self.dtype))
        if (result.device.type, result.dtype) != ("cpu", self.dtype):
            self.unpack()
        return Linear._apply(self, fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> PackedLinear:
        if requires_grad:
            refuse_training()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            self.unpack()  # to be written over
        else:
            args[2].append(prefix + "weight")  # of the missing ones
        Linear._load_from_state_dict(self, state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        import copy

        other = type(self).__new__(type(self))
        memo[id(self)] = other
        packed = {"_packed": self._packed}  # nothing can write to what they share
        other.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_packed"}, memo) | packed)
        return other

    def __reduce__(self) -> Any:
        return _plain, (self.in_features, self.out_features, self.parts, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {str(self.dtype).removeprefix('torch.')}"


class Int8Linear(PackedLinear):
    """A PackedLinear in 8 bits. Each row of the weight has whole numbers from -127 to 127, and a scale. x is fp32."""

    coarse = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(M, K), made for each call."""
        return self._packed.dense()

    def _fits(self, x: Tensor, *others: Tensor | None) -> bool:
        return super()._fits(x, *others) and self._packed.numbers.is_mkldnn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._fits(x, residual):
            return linear(x, self.weight, self.bias, residual)
        return onednn.linear_int8(x, self._packed, self.bias, residual)

    def gated(self, x: Tensor, act: str, swapped: bool = False) -> Tensor:
        if not self._fits(x):
            return geglu(self(x), act, swapped)
        return onednn.gated_int8(x, self._packed, self.bias, ACTIVATIONS[act], swapped)


def pack(layer: Linear, weight: Tensor | None = None, int8: bool = False) -> None:
    """Holds a layer's weight (or `weight` in its place) in the form that suits inference on this CPU, and frees the
    original. That is oneDNN's layout where it pays, and with int8=True 8 bits on any CPU."""
    weight = layer.weight if weight is None else weight
    if not int8 and not packs(weight.device, weight.dtype):
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return
    packed = onednn.quantize(weight) if int8 else onednn.pack(weight, layer.parts)
    del layer.weight
    layer.__class__ = Int8Linear if int8 else PackedLinear
    layer._packed = packed  # type: ignore[assignment]


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pack` packs a weight of this device and dtype."""
    return backend_for("linear", device, dtype) == "onednn"


def _plain(in_features: int, out_features: int, parts: int, weight: Tensor, bias: Tensor | None) -> Linear:
    with torch.device("meta"):
        layer = Linear(in_features, out_features, bias is not None, parts)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias  # type: ignore[assignment]
    return layer.eval()


def refuse_training() -> None:
    raise TypeError("this network's weights are packed for inference: they can't be trained; load it with packed=False")
