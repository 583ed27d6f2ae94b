"""Write a small reference model op by op; names, shapes and seeded parameters are kept along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import (
    ActivationAttrs,
    Attrs,
    AxisAttrs,
    BatchNormAttrs,
    Call,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    Param,
    ParamRole,
    PoolAttrs,
    Tensor,
    TensorId,
)
from bitwright.testing.kernels import conv_spatial
from bitwright.testing.reference import ReferenceModel

Array = NDArray[Any]
Shape = tuple[int | None, ...]
_ELEMENTWISE = {"Add": OpKind.ADD, "Mul": OpKind.MUL}


class Builder:
    """Collects ops; each method adds one and returns its output tensor. Activations are (samples, channels, …).

    Args:
        seed: of the generator that draws parameters which aren't given.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self._ops: list[Op] = []
        self._tensors: dict[TensorId, Tensor] = {}
        self._values: dict[str, Array] = {}
        self._perms: dict[str, tuple[int, ...]] = {}
        self._inputs: list[TensorId] = []

    def input(self, name: str, *shape: int, dtype: str = "float32", channel_axis: int | None = 1) -> TensorId:
        """A model input; `shape` without the sample axis."""
        self._inputs.append(name)
        self._tensors[name] = Tensor(name, (None, *shape), dtype, channel_axis if shape else None)
        return name

    def conv(
        self,
        name: str,
        x: TensorId,
        out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int = 0,
        weight: Array | None = None,
        bias: Array | bool = True,
    ) -> TensorId:
        """A (transposed) convolution over all spatial axes of x, of equal size along each."""
        shape = self.shape(x)
        dims = len(shape) - 2
        channels = shape[1] or 1
        attrs = ConvAttrs(
            (kernel,) * dims,
            (stride,) * dims,
            (dilation,) * dims,
            ((pad, pad),) * dims,
            groups,
            (output_padding,) * dims if transposed else (),
        )
        sizes = (channels, out // groups) if transposed else (out, channels // groups)
        weight = self._normal((*sizes, *attrs.kernel), channels // groups * kernel**dims) if weight is None else weight
        kind = OpKind.CONV_TRANSPOSE if transposed else OpKind.CONV
        op_type = "ConvTranspose" if transposed else "Conv"
        probe = Op(name, kind, op_type, (x,), (name,), attrs=attrs)
        spatial = conv_spatial(probe, tuple(n or 1 for n in shape[2:]))
        params = self._weights(name, weight, bias, out)
        return self.op(name, kind, op_type, (x,), (None, out, *spatial), params=params, attrs=attrs)

    def linear(
        self, name: str, x: TensorId, out: int, *, weight: Array | None = None, bias: Array | bool = True
    ) -> TensorId:
        """A linear op on the last axis."""
        shape = self.shape(x)
        features = shape[-1] or 1
        weight = self._normal((out, features), features) if weight is None else weight
        params = self._weights(name, weight, bias, out)
        return self.op(name, OpKind.LINEAR, "Gemm", (x,), (*shape[:-1], out), params=params)

    def batch_norm(
        self,
        name: str,
        x: TensorId,
        *,
        gamma: Array | None = None,
        beta: Array | None = None,
        mean: Array | None = None,
        var: Array | None = None,
        epsilon: float = 1e-5,
    ) -> TensorId:
        """Batch normalization over axis 1."""
        channels = self.shape(x)[1] or 1
        values = {
            ParamRole.GAMMA: self.rng.uniform(0.5, 2.0, channels) if gamma is None else gamma,
            ParamRole.BETA: self.rng.normal(0, 0.5, channels) if beta is None else beta,
            ParamRole.MEAN: self.rng.normal(0, 0.5, channels) if mean is None else mean,
            ParamRole.VAR: self.rng.uniform(0.5, 2.0, channels) if var is None else var,
        }
        params = {role: self.param(f"{name}.{role.value}", value) for role, value in values.items()}
        attrs = BatchNormAttrs(epsilon)
        return self.op(name, OpKind.BATCH_NORM, "BatchNormalization", (x,), self.shape(x), params=params, attrs=attrs)

    def layer_norm(self, name: str, x: TensorId) -> TensorId:
        """Layer normalization over the last axis, ε = 1e-5."""
        features = self.shape(x)[-1] or 1
        values = {
            ParamRole.GAMMA: self.rng.uniform(0.5, 2.0, features),
            ParamRole.BETA: self.rng.normal(0, 0.5, features),
        }
        params = {role: self.param(f"{name}.{role.value}", value) for role, value in values.items()}
        return self.op(name, OpKind.LAYER_NORM, "LayerNormalization", (x,), self.shape(x), params=params,
                       attrs=AxisAttrs(-1), call=Call({"axis": -1, "epsilon": 1e-5}))  # fmt: skip

    def masked(self, x: TensorId) -> TensorId:
        """Say that a tensor is a mask, or masked."""
        self._tensors[x] = replace(self._tensors[x], mask=True)
        return x

    def relu(self, name: str, x: TensorId) -> TensorId:
        """max(x, 0)."""
        return self.op(name, OpKind.RELU, "Relu", (x,), self.shape(x))

    def clip(self, name: str, x: TensorId, low: float = 0.0, high: float = 6.0) -> TensorId:
        """ReLU6 and the like."""
        return self.op(name, OpKind.CLIPPED_RELU, "Clip", (x,), self.shape(x), attrs=ActivationAttrs(low, high))

    def prelu(self, name: str, x: TensorId, slope: Array | float = 0.1) -> TensorId:
        """PReLU with a slope for each channel, or leaky ReLU with one number."""
        if isinstance(slope, float):
            attrs = ActivationAttrs(alpha=slope)
            return self.op(name, OpKind.PRELU, "LeakyRelu", (x,), self.shape(x), attrs=attrs)
        params = {ParamRole.SLOPE: self.param(f"{name}.slope", slope)}
        return self.op(name, OpKind.PRELU, "PRelu", (x,), self.shape(x), params=params)

    def activation(self, name: str, x: TensorId, type: str) -> TensorId:
        """Sigmoid, Tanh, HardSwish, …."""
        return self.op(name, OpKind.ACTIVATION, type, (x,), self.shape(x))

    def softmax(self, name: str, x: TensorId, axis: int = -1) -> TensorId:
        """Softmax."""
        return self.op(name, OpKind.SOFTMAX, "Softmax", (x,), self.shape(x), attrs=AxisAttrs(axis))

    def binary(self, name: str, type: str, a: TensorId, b: TensorId | Array) -> TensorId:
        """Add, Sub, Mul, Div, Max or Min of two activations, or of one and a constant."""
        kind = _ELEMENTWISE.get(type, OpKind.ELEMENTWISE)
        if isinstance(b, str):
            return self.op(name, kind, type, (a, b), self.shape(a))
        params = {ParamRole.CONSTANT: self.param(f"{name}.constant", b)}
        return self.op(name, kind, type, (a,), self.shape(a), params=params)

    def matmul(self, name: str, a: TensorId, b: TensorId) -> TensorId:
        """Product of two activations."""
        shape = (*self.shape(a)[:-1], self.shape(b)[-1])
        return self.op(name, OpKind.MATMUL, "MatMul", (a, b), shape)

    def concat(self, name: str, inputs: Sequence[TensorId], axis: int = 1) -> TensorId:
        """Concatenation."""
        shape = list(self.shape(inputs[0]))
        shape[axis] = sum(self.shape(t)[axis] or 0 for t in inputs)
        return self.op(name, OpKind.CONCAT, "Concat", tuple(inputs), tuple(shape), attrs=AxisAttrs(axis))

    def pool(
        self, name: str, x: TensorId, kernel: int, *, stride: int = 1, pad: int = 0, type: str = "Max"
    ) -> TensorId:
        """Max or average pooling, `type` "Max" or "Average"."""
        shape = self.shape(x)
        dims = len(shape) - 2
        window = ConvAttrs((kernel,) * dims, (stride,) * dims, (1,) * dims, ((pad, pad),) * dims)
        probe = Op(name, OpKind.CONV, "Conv", (x,), (name,), attrs=window)
        spatial = conv_spatial(probe, tuple(n or 1 for n in shape[2:]))
        kind = OpKind.MAX_POOL if type == "Max" else OpKind.AVERAGE_POOL
        return self.op(name, kind, f"{type}Pool", (x,), (*shape[:2], *spatial), attrs=PoolAttrs(window=window))

    def global_pool(self, name: str, x: TensorId, *, keepdims: bool = True) -> TensorId:
        """Mean over all spatial axes."""
        shape = self.shape(x)
        axes = tuple(range(2, len(shape)))
        reduced = (*shape[:2], *((1,) * len(axes) if keepdims else ()))
        attrs = PoolAttrs(axes=axes, keepdims=keepdims)
        op_type = "GlobalAveragePool" if keepdims else "ReduceMean"
        return self.op(name, OpKind.AVERAGE_POOL, op_type, (x,), reduced, attrs=attrs)

    def reshape(self, name: str, x: TensorId, *shape: int) -> TensorId:
        """To `shape`, without the sample axis."""
        return self.op(name, OpKind.RESHAPE, "Reshape", (x,), (None, *shape))

    def flatten(self, name: str, x: TensorId) -> TensorId:
        """(samples, the rest)."""
        features = int(np.prod([n or 1 for n in self.shape(x)[1:]]))
        return self.op(name, OpKind.RESHAPE, "Flatten", (x,), (None, features))

    def transpose(self, name: str, x: TensorId, *perm: int) -> TensorId:
        """Reorder axes."""
        self._perms[name] = perm
        shape, call = self.shape(x), Call({"perm": perm})
        return self.op(name, OpKind.TRANSPOSE, "Transpose", (x,), tuple(shape[i] for i in perm), call=call)

    def identity(self, name: str, x: TensorId) -> TensorId:
        """Pass through."""
        return self.op(name, OpKind.IDENTITY, "Identity", (x,), self.shape(x))

    def opaque(self, name: str, x: TensorId, type: str = "Tanh") -> TensorId:
        """An op that the canonical vocabulary doesn't name."""
        return self.op(name, OpKind.OPAQUE, type, (x,), self.shape(x))

    def op(
        self,
        name: str,
        kind: OpKind,
        type: str,
        inputs: tuple[TensorId, ...],
        shape: Shape,
        *,
        params: Mapping[ParamRole, str] | None = None,
        attrs: Attrs | None = None,
        call: Call | None = None,
    ) -> TensorId:
        """Any op with one output of `shape`."""
        output = f"{name}.output"
        source = self._tensors[inputs[0]]
        same_rank = len(source.shape or ()) == len(shape)
        axis = len(shape) - 1 if kind in (OpKind.LINEAR, OpKind.EMBEDDING) else source.channel_axis if same_rank else 1
        if kind is OpKind.TRANSPOSE and axis is not None:
            axis = self._perms[name].index(axis % len(shape))
        self._tensors[output] = Tensor(output, shape, channel_axis=axis)
        self._ops.append(Op(name, kind, type, inputs, (output,), dict(params or {}), attrs, native=type, call=call))
        return output

    def param(self, name: str, value: Array) -> str:
        """Register a parameter; the same name again means that it is shared."""
        self._values[name] = np.array(value, np.float32)
        return name

    def shape(self, tensor: TensorId) -> Shape:
        """A tensor's shape."""
        return self._tensors[tensor].shape or ()

    def build(self, *outputs: TensorId) -> ReferenceModel:
        """The model with these outputs."""
        params = {p: Param(p, v.shape) for p, v in self._values.items()}
        graph = Graph(self._ops, self._tensors, params, self._inputs, outputs)
        return ReferenceModel(graph, dict(self._values), dict(self._perms))

    def _normal(self, shape: tuple[int, ...], fan_in: int) -> Array:
        return self.rng.normal(0, np.sqrt(2 / fan_in), shape)

    def _weights(self, name: str, weight: Array, bias: Array | bool, out: int) -> dict[ParamRole, str]:
        params = {ParamRole.WEIGHT: self.param(f"{name}.weight", weight)}
        if bias is not False:
            value = self.rng.normal(0, 0.1, out) if bias is True else np.asarray(bias)
            params[ParamRole.BIAS] = self.param(f"{name}.bias", value)
        return params
