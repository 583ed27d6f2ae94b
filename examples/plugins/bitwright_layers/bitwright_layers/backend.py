"""bitwright's backend for lists of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from bitwright.backend import Batch, Tap
from bitwright.dataflow import FlowBackend, FlowModel, GraphBuilder, Layout
from bitwright.errors import ModelError
from bitwright.graph import ConvAttrs, PoolAttrs
from bitwright_layers import framework
from bitwright_layers.framework import Conv, Dense, Layer, MaxPool, Mean, Net, Relu
from bitwright_onnx.adapters import QdqExport

HWIO, TRANSPOSED = Layout().permuted(3, 2, 0, 1), Layout().permuted(1, 0)


def _outputs(*operands: Any, function: str, **options: Any) -> list[Any]:
    """A function of the framework, with its one output in a list."""
    return [getattr(framework, function)(*operands, **options)]


@dataclass(frozen=True, eq=False)
class LayersModel(FlowModel):
    """A captured net, which is called as the net is."""

    def __call__(self, x: Any) -> Any:
        """The output."""
        tap = Tap(self.graph.outputs[0])
        return LayersBackend().session(self, [tap]).run({self.graph.inputs[0]: x})[tap]


class LayersBackend(QdqExport, FlowBackend[LayersModel]):
    """Backend for `Net`."""

    name = "layers"
    model_type = LayersModel
    calls: ClassVar[Mapping[str, Any]] = {"layers": _outputs}
    file_format = ("layers", "the float net")

    def owns(self, model: object) -> bool:
        """Nets and what has been made of them."""
        return isinstance(model, Net | LayersModel)

    def adopt(self, model: object, sample: Batch | None = None) -> LayersModel:
        """Capture a net; the sample gives the input's name and shape."""
        if isinstance(model, LayersModel):
            return model
        if not isinstance(model, Net):
            raise ModelError(f"the layers backend takes a Net, got {type(model).__name__}")
        if sample is None:
            raise ModelError("a Net doesn't know the shape of its input: give a sample batch, by input name")
        ((name, x),) = sample.items()
        builder, one = GraphBuilder(), np.asarray(x, np.float32)[:1]
        value = builder.input(name, (None, *one.shape[1:]))
        for layer in model:
            if not isinstance(layer, Layer):
                raise ModelError(f"a {type(layer).__name__} is no layer that the layers backend knows")
            one = layer(one)
            (value,) = _tell(builder, layer, value, [(None, *one.shape[1:])])
        return builder.build(LayersModel, [value])


def _tell(b: GraphBuilder, layer: Layer, x: str, shape: list[Sequence[int | None]]) -> tuple[str, ...]:
    """What a layer is in ONNX's words, and what computes it."""

    def call(name: str, **options: Any) -> Any:
        return partial(_outputs, function=name, **options)

    match layer:
        case Conv(name, kernel, bias, stride, pad):
            weights = [b.param(f"{name}.kernel", kernel), b.param(f"{name}.bias", bias)]
            attrs = ConvAttrs(kernel.shape[:2], (stride,) * 2, (1, 1), ((pad, pad),) * 2)
            return b.op("Conv", [x, *weights], shape, call("conv2d", stride=stride, pad=pad), name=name, attrs=attrs,
                        layouts={1: HWIO}, channels=(3, 3))  # fmt: skip
        case Dense(name, kernel, bias):
            weights = [b.param(f"{name}.kernel", kernel), b.param(f"{name}.bias", bias)]
            return b.op("Gemm", [x, *weights], shape, call("dense"), name=name, layouts={1: TRANSPOSED})
        case Relu(name):
            return b.op("Relu", [x], shape, call("relu"), name=name)
        case MaxPool(name, size):
            attrs = PoolAttrs(window=ConvAttrs((size,) * 2, (size,) * 2, (1, 1), ((0, 0),) * 2))
            return b.op("MaxPool", [x], shape, call("max_pool", size=size), name=name, attrs=attrs, channels=(3, 3))
        case Mean(name):
            return b.op("ReduceMean", [x], shape, call("mean"), name=name, attrs=PoolAttrs((1, 2), keepdims=False))
