"""Arguments of aten ops → the canonical attributes of an op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, OpKind, PoolAttrs, clipping
from bitwright_torch.graph.model import info
from bitwright_torch.graph.optable import CLIPS


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name of an aten op, defaults filled in; by position ("0", "1", …) of a Python function."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    given: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            given[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        else:
            given[argument.name] = argument.default_value if argument.has_default_value() else None
    return given


NEUTRAL: Mapping[str, int] = {"mul": 1, "multiply": 1, "div": 1, "divide": 1, "true_divide": 1,
                              "add": 0, "sub": 0, "subtract": 0}  # fmt: skip
"""Second operands that change nothing."""


def changes_nothing(node: fx.Node, name: str) -> bool:
    """Whether an op hands its operand on as it is: x · 1, x / 1, x + 0, x − 0, a concatenation of one tensor.

    Exporters leave such ops out, so that what they compute has the operand's own tensor, and its grid.
    """
    given = arguments(node)
    source, other = given.get("self"), given.get("other")
    if name in ("cat", "concat", "concatenate"):
        tensors = given.get("tensors")
        source = tensors[0] if isinstance(tensors, list | tuple) and len(tensors) == 1 else None
    elif isinstance(other, bool) or not isinstance(other, int | float) or other != NEUTRAL.get(name):
        return False
    if not isinstance(source, fx.Node) or given.get("rounding_mode"):
        return False
    return info(source).shape is not None and (info(source).shape, info(source).dtype) == (
        info(node).shape,
        info(node).dtype,
    )


def rank(node: Any) -> int | None:
    """Number of dimensions of what a node computes."""
    shape = info(node).shape if isinstance(node, fx.Node) else None
    return None if shape is None else len(shape)


def spatial(value: Any, count: int, default: int) -> tuple[int, ...] | None:
    """A size for each spatial axis from what aten accepts: one for all, a list, nothing; None if one is computed."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return (default,) * count
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, int) for v in values):
        return None
    return tuple(values * count if len(values) == 1 else values)


def convolution(node: fx.Node, kernel: tuple[int, ...]) -> ConvAttrs | None:
    """Geometry of a (transposed) convolution; None where a size is computed.

    padding="same" gives ⌊(k − 1)·d / 2⌋ before and the rest behind (torch.nn.Conv2d).
    """
    given, count = arguments(node), len(kernel)
    strides, dilations = spatial(given["stride"], count, 1), spatial(given["dilation"], count, 1)
    groups = given["groups"]
    if strides is None or dilations is None or not isinstance(groups, int):
        return None
    extra = spatial(given.get("output_padding"), count, 0) or ()
    padding = given["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in totals)
    else:
        both = spatial(padding, count, 0)
        if both is None:
            return None
        pads = tuple((p, p) for p in both)
    return ConvAttrs(kernel, strides, dilations, pads, groups, extra if any(extra) else ())


def batch_norm(node: fx.Node) -> BatchNormAttrs:
    """Of `modes.batch_norm`."""
    # In float32, as the exported artefact holds it: folding then gives the same bits on both sides.
    return BatchNormAttrs(float(np.float32(node.args[8])), 1)  # type: ignore[arg-type]


def clip(node: fx.Node, name: str) -> tuple[OpKind, str, ActivationAttrs]:
    """See `bitwright.graph.clipping`; a computed bound makes an activation."""
    given = arguments(node)
    low, high = CLIPS[name]
    low, high = given.get("min_val", given.get("min", low)), given.get("max_val", given.get("max", high))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return OpKind.ACTIVATION, "Clip", ActivationAttrs()
    return clipping(low, high)


def pool(node: fx.Node, name: str) -> tuple[str, PoolAttrs]:
    """ONNX type and attributes of an averaging op."""
    given, dims = arguments(node), rank(node.args[0]) or 0
    if name == "mean":
        axes = given.get("dim")
        chosen = range(dims) if axes is None or axes == [] else axes if isinstance(axes, list | tuple) else [axes]
        return "ReduceMean", PoolAttrs(tuple(int(a) % dims for a in chosen), keepdims=bool(given.get("keepdim")))
    count = int(name[-2])
    if name.startswith("adaptive"):
        wanted = spatial(given["output_size"], count, 1)
        if wanted == (1,) * count:
            return "GlobalAveragePool", PoolAttrs(tuple(range(dims - count, dims)))
        return "AveragePool", PoolAttrs()
    kernel = spatial(given["kernel_size"], count, 1) or ()
    strides = spatial(given["stride"] or list(kernel), count, 1)
    padding = spatial(given["padding"], count, 0)
    inside = bool(given.get("count_include_pad", True))
    if strides is None or padding is None or given.get("ceil_mode") or given.get("divisor_override"):
        return "AveragePool", PoolAttrs(count_include_pad=inside)
    window = ConvAttrs(kernel, strides, (1,) * count, tuple((p, p) for p in padding))
    return "AveragePool", PoolAttrs(window=window, count_include_pad=inside)


def axis(node: fx.Node, kind: OpKind, name: str) -> AxisAttrs | None:
    """The axis of a concat, split, softmax or layer norm, counted from the front."""
    given = arguments(node)
    if name == "attention_softmax":
        number, dims = -1, rank(node)
    elif kind is OpKind.LAYER_NORM:
        shape = given["normalized_shape"]
        dims = rank(node)
        number = -len(shape) if isinstance(shape, list | tuple) else -1
    elif kind is OpKind.CONCAT:
        parts = given.get("tensors") or [None]
        number, dims = given.get("dim", 0), rank(parts[0])
        if name == "stack" and dims is not None:
            dims += 1
    else:
        number, dims = given.get("dim", 0), rank(node.args[0])
    if not isinstance(number, int):
        return None
    return AxisAttrs(number % dims if dims else number)


def permutation(node: fx.Node, name: str) -> tuple[int, ...] | None:
    """Input axis of each output axis of a transposing op; None where it can't be told."""
    given, dims = arguments(node), rank(node)
    if dims is None:
        return None
    order = list(range(dims))
    if name == "permute":
        return tuple(int(i) % dims for i in given["dims"])
    if name in ("transpose", "swapaxes"):
        values: Mapping[str, Any] = given
        a, b = (values.get("dim0", values.get("axis0")), values.get("dim1", values.get("axis1")))
        if isinstance(a, int) and isinstance(b, int):
            order[a % dims], order[b % dims] = order[b % dims], order[a % dims]
            return tuple(order)
    if name in ("t", "numpy_T"):
        return tuple(reversed(order))
    return None
