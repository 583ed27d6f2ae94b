"""What ports to frameworks with channels last share: layouts of images and kernels, and padding by words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ConvAttrs, Op, OpKind, ParamRole
from bitwright.testing.reference import ReferenceModel

Array = NDArray[Any]


def images(batch: Mapping[str, Array]) -> dict[str, Array]:
    """A reference model's batch, images channels last."""
    return {k: np.ascontiguousarray(np.moveaxis(v, 1, -1)) for k, v in batch.items()}


def padding(window: ConvAttrs, sizes: tuple[int, ...]) -> str:
    """ "valid" or "same", for inputs of these sizes."""
    if not any(any(p) for p in window.pads):
        return "valid"
    same = []
    for n, k, s, d in zip(sizes, window.kernel, window.strides, window.dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        same.append((total // 2, total - total // 2))
    if tuple(same) != window.pads:
        raise NotImplementedError(f"padding by {window.pads} is neither 'valid' nor 'same'")
    return "same"


def transposed_padding(window: ConvAttrs) -> str:
    """The same of a transposed convolution."""
    cut = [(k - s) // 2 for k, s in zip(window.kernel, window.strides, strict=True)]
    if window.groups == 1 and not any(window.output_padding):
        if not any(any(p) for p in window.pads):
            return "valid"
        if all(p == (c, c) for p, c in zip(window.pads, cut, strict=True)):
            return "same"
    raise NotImplementedError("grouped transposed convolutions and output padding: Keras and TensorFlow have none")


def is_depthwise(op: Op, weight: Array) -> bool:
    """One input channel a group."""
    return isinstance(op.attrs, ConvAttrs) and op.attrs.groups > 1 and weight.shape[1] == 1


def kernel(model: ReferenceModel, op: Op) -> Array:
    """A linear op's weight in the frameworks' layout."""
    weight = np.asarray(model.params[op.params[ParamRole.WEIGHT]], np.float32)
    if op.kind is OpKind.LINEAR:
        before = model.graph.producer(op.data_inputs[0])
        if before is not None and before.type == "Flatten":  # its features come in the order of the axes
            shape = model.graph.tensors[before.data_inputs[0]].shape or ()
            weight = np.moveaxis(weight.reshape(-1, *(n or 1 for n in shape[1:])), 1, -1).reshape(weight.shape)
        return np.ascontiguousarray(weight.T)
    if is_depthwise(op, weight):
        assert isinstance(op.attrs, ConvAttrs)
        groups = op.attrs.groups
        return np.ascontiguousarray(weight.reshape(groups, -1, *weight.shape[2:]).transpose(2, 3, 0, 1))
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def value(model: ReferenceModel, op: Op, role: ParamRole) -> Array | None:
    """A vector of an op."""
    return np.asarray(model.params[op.params[role]], np.float32) if role in op.params else None


def sizes(model: ReferenceModel, op: Op) -> tuple[int, ...]:
    """Spatial sizes of an op's input."""
    return tuple(n or 1 for n in (model.graph.tensors[op.data_inputs[0]].shape or ())[2:])


def image_shape(model: ReferenceModel) -> tuple[int, ...]:
    """Height, width, channels of the input."""
    channels, *sizes = (n or 1 for n in (model.graph.tensors[model.graph.inputs[0]].shape or ())[1:])
    return (*sizes, channels)
