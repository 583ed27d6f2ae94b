"""The backends that are there, and small reference models brought onto each: techniques are tested on all of them.

`BACKENDS` maps a name to a `Port`. A backend whose framework isn't installed is left out. To add one, write a function
that builds its native model from a `ReferenceModel` (and one for batches, if it lays out or names inputs otherwise) and
add it to `_PORTS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import channels_last
import numpy as np

from bitwright import registry
from bitwright.backend import Backend
from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.testing import models
from bitwright.testing.reference import ReferenceBackend, ReferenceModel


@dataclass(frozen=True)
class Port:
    """One backend.

    Attributes:
        name: its name.
        backend: makes it.
        native: a reference model as what the user of the framework would hold, for `QuantSim`.
        batch: a reference model's batch as that takes it.
    """

    name: str
    backend: Callable[[], Backend[Any]]
    native: Callable[[ReferenceModel], Any]
    batch: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def port(self, model: ReferenceModel) -> Any:
        """In the backend's own form."""
        return _ported(self, model)

    def sim(self, model: ReferenceModel, **options: Any) -> Any:
        """A `QuantSim` of it."""
        from bitwright.simulation import QuantSim

        return QuantSim(self.native(model), self.sample(model), **options)

    def sample(self, model: ReferenceModel) -> Any:
        """One batch, where the framework traces with it."""
        if self.name != "torch":
            return None
        import torch

        return {k: torch.from_numpy(v) for k, v in models.batch(model, 2).items()}


@cache
def _ported(port: Port, model: ReferenceModel) -> Any:
    return port.backend().adopt(port.native(model), port.sample(model))


# -- ONNX


def _pads(attrs: ConvAttrs) -> list[int]:
    return [p[0] for p in attrs.pads] + [p[1] for p in attrs.pads]


def _window(attrs: ConvAttrs) -> dict[str, Any]:
    return {"kernel_shape": list(attrs.kernel), "strides": list(attrs.strides), "pads": _pads(attrs)}


def _onnx_attributes(op: Op) -> dict[str, Any]:
    match op.attrs:
        case ConvAttrs() as a:
            found = {**_window(a), "dilations": list(a.dilations), "group": a.groups}
            return found | ({"output_padding": list(a.output_padding)} if a.output_padding else {})
        case PoolAttrs(window=ConvAttrs() as w):
            return _window(w)
        case BatchNormAttrs(epsilon=epsilon):
            return {"epsilon": epsilon}
        case AxisAttrs(axis=axis):
            return {"axis": axis}
        case ActivationAttrs(alpha=alpha) if alpha is not None:
            return {"alpha": alpha}
    return {"transB": 1} if op.kind is OpKind.LINEAR and op.type == "Gemm" else {}


_ORDER = (ParamRole.WEIGHT, ParamRole.GAMMA, ParamRole.BIAS, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR,
          ParamRole.SLOPE, ParamRole.CONSTANT)  # fmt: skip


def onnx_model(model: ReferenceModel) -> Any:
    """As a `ModelProto`."""
    from onnx import TensorProto, helper, numpy_helper

    graph, nodes = model.graph, []
    constants = {p: np.asarray(v, np.float32) for p, v in model.params.items()}
    for op in graph.ops:
        inputs = [*op.data_inputs, *(op.params[r] for r in _ORDER if r in op.params)]
        if isinstance(op.attrs, ActivationAttrs) and op.type == "Clip":
            for bound, value in (("low", op.attrs.minimum), ("high", op.attrs.maximum)):
                constants[f"{op.id}.{bound}"] = np.asarray(value, np.float32)
                inputs.append(f"{op.id}.{bound}")
        nodes.append(helper.make_node(op.type, inputs, list(op.outputs), name=op.id, **_onnx_attributes(op)))

    def info(t: str) -> Any:
        shape = [n if n is not None else "N" for n in graph.tensors[t].shape or ()]
        return helper.make_tensor_value_info(t, TensorProto.FLOAT, shape)

    whole = helper.make_graph(
        nodes, "reference", [info(t) for t in graph.inputs], [info(t) for t in graph.outputs],
        [numpy_helper.from_array(v, p) for p, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


# -- PyTorch


def torch_model(model: ReferenceModel) -> Any:
    """As an `nn.Module` with a submodule for each op that has parameters."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    def tensor(op: Op, role: ParamRole) -> torch.Tensor:
        return torch.from_numpy(np.array(model.params[op.params[role]], np.float32))

    def module(op: Op) -> Any:
        bias, attrs = ParamRole.BIAS in op.params, op.attrs
        if op.kind in (OpKind.CONV, OpKind.CONV_TRANSPOSE):
            assert isinstance(attrs, ConvAttrs)
            shape, n = tensor(op, ParamRole.WEIGHT).shape, len(attrs.kernel)
            kind = getattr(nn, f"Conv{'Transpose' if op.kind is OpKind.CONV_TRANSPOSE else ''}{n}d")
            channels = (
                (shape[0], shape[1] * attrs.groups)
                if op.kind is OpKind.CONV_TRANSPOSE
                else (shape[1] * attrs.groups, shape[0])
            )
            extra = {"output_padding": attrs.output_padding} if attrs.output_padding else {}
            made = kind(
                *channels, attrs.kernel, attrs.strides, tuple(p[0] for p in attrs.pads),
                dilation=attrs.dilations, groups=attrs.groups, bias=bias, **extra,
            )  # fmt: skip
        elif op.kind is OpKind.LINEAR:
            shape = tensor(op, ParamRole.WEIGHT).shape
            made = nn.Linear(shape[1], shape[0], bias=bias)
        elif op.kind is OpKind.BATCH_NORM:
            assert isinstance(attrs, BatchNormAttrs)
            made = nn.BatchNorm2d(len(tensor(op, ParamRole.GAMMA)), eps=attrs.epsilon)
            made.running_mean.copy_(tensor(op, ParamRole.MEAN))
            made.running_var.copy_(tensor(op, ParamRole.VAR))
        else:
            return None
        with torch.no_grad():
            made.weight.copy_(tensor(op, ParamRole.GAMMA if op.kind is OpKind.BATCH_NORM else ParamRole.WEIGHT))
            if op.kind is OpKind.BATCH_NORM:
                made.bias.copy_(tensor(op, ParamRole.BETA))
            elif bias:
                made.bias.copy_(tensor(op, ParamRole.BIAS))
        return made

    def function(op: Op) -> Any:
        match op.type, op.attrs:
            case "Relu", _:
                return F.relu
            case "Clip", ActivationAttrs(minimum=0.0, maximum=6.0):
                return F.relu6
            case "Clip", ActivationAttrs(minimum=low, maximum=high):
                return lambda x: torch.clamp(x, low, high)
            case "LeakyRelu", ActivationAttrs(alpha=alpha):
                return lambda x: F.leaky_relu(x, alpha)
            case "MaxPool", PoolAttrs(window=ConvAttrs() as w):
                return lambda x: F.max_pool2d(x, w.kernel, w.strides, tuple(p[0] for p in w.pads))
            case "GlobalAveragePool", _:
                return lambda x: F.adaptive_avg_pool2d(x, 1)
            case "Flatten", _:
                return lambda x: torch.flatten(x, 1)
            case "Concat", AxisAttrs(axis=axis):
                return lambda *xs: torch.cat(xs, axis)
            case "Softmax", AxisAttrs(axis=axis):
                return lambda x: torch.softmax(x, axis)
            case "Add", _:
                return lambda a, b: a + b
            case "Mul", _:
                return lambda a, b: a * b
            case "Sigmoid", _:
                return torch.sigmoid
        raise NotImplementedError(f"{op.type} isn't brought to PyTorch yet: add it in tests/techniques/backends.py")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for op in model.graph.ops:
                made = module(op)
                if made is not None:
                    self.add_module(op.id, made)

        def forward(self, x: torch.Tensor) -> Any:
            values = {model.graph.inputs[0]: x}
            for op in model.graph.ops:
                call = getattr(self, op.id) if hasattr(self, op.id) else function(op)
                values[op.output] = call(*(values[t] for t in op.data_inputs))
            found = tuple(values[t] for t in model.graph.outputs)
            return found[0] if len(found) == 1 else found

    return Network().eval()


_PORTS = (
    Port("reference", ReferenceBackend, lambda model: model),
    Port("onnx", lambda: registry.backend("onnx"), onnx_model),
    Port("torch", lambda: registry.backend("torch"), torch_model),
    Port("keras", lambda: registry.backend("keras"), channels_last.keras_model, channels_last.images),
    Port(
        "tensorflow",
        lambda: registry.backend("tensorflow"),
        channels_last.tensorflow_model,
        lambda batch: {f"{k}:0": v for k, v in channels_last.images(batch).items()},
    ),
)
_MODULES = {
    "onnx": ("onnx", "onnx_ir", "onnxruntime"),
    "torch": ("torch",),
    "keras": ("keras", "tensorflow"),
    "tensorflow": ("tensorflow",),
}

BACKENDS = {
    port.name: port
    for port in _PORTS
    if all(importlib.util.find_spec(module) is not None for module in _MODULES.get(port.name, ()))
}
"""By name; the reference backend first."""
FRAMEWORKS = {name: port for name, port in BACKENDS.items() if name != "reference"}
"""Those of real frameworks, which `QuantSim` opens."""
