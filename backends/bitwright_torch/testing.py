"""The kits' small reference models as PyTorch users would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.testing import models
from bitwright.testing.ports import ModelPort
from bitwright.testing.reference import ReferenceModel


def torch_model(model: ReferenceModel) -> Any:
    """A reference model as an `nn.Module` with a submodule for each op that has parameters."""

    def tensor(op: Op, role: ParamRole) -> torch.Tensor:
        return torch.from_numpy(np.array(model.params[op.params[role]], np.float32))

    def module(op: Op) -> Any:
        bias, attrs = ParamRole.BIAS in op.params, op.attrs
        made: Any
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
            case "LeakyRelu", ActivationAttrs(alpha=alpha) if alpha is not None:
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
        raise NotImplementedError(f"{op.type} isn't brought to PyTorch yet: add it in bitwright_torch/testing.py")

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


def model_port() -> ModelPort:
    """See `bitwright.testing.ports`."""
    return ModelPort(torch_model, sample=sample)


def sample(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """A batch to trace with."""
    return {k: torch.from_numpy(v) for k, v in models.batch(model, 2).items()}
