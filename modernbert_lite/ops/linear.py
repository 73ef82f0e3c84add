"""The linear layer, and the forms in which inference holds its weight: two on a CPU, one on a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import half, onednn
from .choose import BACKENDS, backend_for, wanted
from .reference import ACTIVATIONS, geglu, layer_norm, linear, to_float8
from .tracing import wants_gradient

FLOAT8 = torch.float8_e4m3fn


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

    _packed: Any  # of onednn.pack, Int8, Half or Float8; nothing writes to it
    _backends: tuple[str, ...] = ("auto", "onednn")

    @property
    def dtype(self) -> torch.dtype:
        return self._packed[0].dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(M, K), made for each call."""
        return torch.cat([part.to_dense() for part in self._packed])

    def _fits(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether oneDNN computes the product: in inference, unless another backend is asked for."""
        if wanted() not in self._backends:
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
        before = torch.empty(0, dtype=self.dtype, device=getattr(self._packed[0], "device", "cpu"))
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            self.unpack()
        return Linear._apply(self, fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> PackedLinear:
        if requires_grad:
            what = "this network's weights are packed for inference: they can't be trained"
            raise TypeError(f"{what}; load it with packed=False")
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


class HalfLinear(PackedLinear):
    """A PackedLinear whose weight has fewer bits than x, which is fp32: 16, on a CPU without products of 16 bits."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self._packed, "dtype", torch.float32)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._packed.dense()

    def _fits(self, x: Tensor, *others: Tensor | None) -> bool:
        return super()._fits(x, *others) and self._packed.fast

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._fits(x, residual):
            return linear(x, self.weight, self.bias, residual)
        return self._packed.linear(x, self.bias, residual)

    def gated(self, x: Tensor, act: str, swapped: bool = False) -> Tensor:
        if not self._fits(x):
            return geglu(self(x), act, swapped)
        return self._packed.gated(x, self.bias, ACTIVATIONS[act], swapped)


class Int8Linear(HalfLinear):
    """The same in 8 bits. Each row of the weight has whole numbers from -127 to 127, and a scale."""

    coarse = True


class Float8(NamedTuple):
    """A weight (M, K) in 8-bit floats, and the dtype of the rows that it is multiplied with."""

    numbers: Tensor  # (M, K) float8_e4m3fn
    scale: Tensor  # (M, 1) fp32
    dtype: torch.dtype
    fast: bool = True

    def dense(self) -> Tensor:
        return (self.numbers.float() * self.scale).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        y = (_scaled if x.is_cuda else _scaled_in_fp32)(*to_float8(x), self.numbers.t(), self.scale.t(), bias, x.dtype)
        return y if residual is None else residual + y


class Float8Linear(HalfLinear):
    """The same in 8-bit floats, with a scale per row of weight and x, for a card. A CPU takes it slowly, as a trial."""

    _backends = BACKENDS
    gated, normed = Linear.gated, Linear.normed

    def part(self, x: Tensor, rows: slice) -> Tensor:
        if not self._fits(x):
            return super().part(x, rows)
        weight = Float8(self._packed.numbers[rows], self._packed.scale[rows], self.dtype)
        return weight.linear(x, None if self.bias is None else self.bias[rows])


def _scaled(x: Tensor, of_x: Tensor, y: Tensor, of_y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (T, K) and y (K, M) float8, their scales (T, 1) and (1, M) -> the product (T, M)."""
    return torch._scaled_mm(x, y, of_x, of_y, bias, out_dtype=dtype)


def _scaled_in_fp32(x: Tensor, of_x: Tensor, y: Tensor, of_y: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
    product = x.float() @ y.float() * of_x * of_y
    return (product if bias is None else product + bias).to(dtype)


def pack(layer: Linear, weight: Tensor | None = None, narrow: torch.dtype | None = None) -> None:
    """Holds a layer's weight (or `weight` in its place) in the form that suits inference, and frees the original. That
    is oneDNN's layout on a CPU where it pays; or the narrower dtype that `narrower` gives."""
    weight = layer.weight if weight is None else weight
    if narrow is None and not packs(weight.device, weight.dtype):
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return
    packed: Any
    if narrow == FLOAT8:
        packed, layer.__class__ = Float8(*to_float8(weight.detach()), weight.dtype), Float8Linear
    elif narrow == torch.int8:
        packed, layer.__class__ = onednn.quantize(weight), Int8Linear
    elif narrow:
        packed, layer.__class__ = half.pack(weight), HalfLinear
    else:
        packed, layer.__class__ = onednn.pack(weight, layer.parts), PackedLinear
    del layer.weight
    layer._packed = packed


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pack` packs a weight of this device and dtype."""
    return backend_for("linear", device, dtype) == "onednn"


def narrower(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """`dtype`, if inference only holds weights in it and computes in another one: 8 bits; and 16 bits on a CPU that has
    no fast products of them, unless plain torch is asked for."""
    if dtype in (torch.int8, FLOAT8):
        return dtype
    slow = device.type == "cpu" and dtype != torch.float32 and not onednn.supported(dtype)
    return dtype if slow and wanted() in HalfLinear._backends else None


def has_float8(device: torch.device) -> bool:
    """Whether the card multiplies 8-bit floats: NVIDIA's from Ada and Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _plain(in_features: int, out_features: int, parts: int, weight: Tensor, bias: Tensor | None) -> Linear:
    with torch.device("meta"):
        layer = Linear(in_features, out_features, bias is not None, parts)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias  # type: ignore[assignment]
    return layer.eval()
