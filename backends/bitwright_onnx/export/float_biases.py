"""Float biases that ONNX Runtime would turn into integers too large for int32, out of its reach.

Between integer operands a default session quantizes the float bias of a Gemm or convolution itself, to int32 at
s_input·s_weight, and does so also where the bias doesn't fit: 16-bit grids, and 8-bit ones of tiny weights, make of 1.0
another number without a word. An Add of its own behind the op isn't touched. (Biases with a grid of their own aren't
float in the file; their weights' scales leave room for them.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.calibration import fits_accumulator
from bitwright_onnx.graph.tensors import tensor_array


def split_large_biases(
    model: ir.Model, initializer: Callable[[str, NDArray[Any]], ir.Value], fresh: Callable[[str], str]
) -> None:
    """Add each such bias behind its op.

    Args:
        model: a QDQ model; changed.
        initializer: makes one of a name and an array.
        fresh: makes a name one that the model doesn't have.
    """
    for node in list(model.graph):
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2 else None
        if node.domain or bias is None or bias.const_value is None or node.attributes.get_float("beta", 1.0) != 1.0:
            continue
        source, weight = _scale(node.inputs[0]), _scale(node.inputs[1])
        values = np.asarray(tensor_array(bias.const_value))
        if source is None or weight is None or fits_accumulator(values, source, weight):
            continue
        if node.op_type != "Gemm":
            rank = len(node.inputs[1].shape or ()) if node.inputs[1] is not None else 0
            bias = initializer(f"{bias.name}_added", values.reshape(-1, *[1] * (rank - 2)))
        _behind(model.graph, node, bias, fresh)


def _scale(value: ir.Value | None) -> NDArray[Any] | None:
    """The stored scales of what a DequantizeLinear gives."""
    made = value.producer() if value is not None else None
    scale = made.inputs[1] if made is not None and made.op_type == "DequantizeLinear" else None
    return None if scale is None or scale.const_value is None else scale.const_value.numpy()


def _behind(graph: ir.Graph, node: ir.Node, bias: ir.Value, fresh: Callable[[str], str]) -> None:
    product = node.outputs[0]
    add = ir.node("Add", [product, bias], name=fresh(f"{node.name}_bias"))
    total = add.outputs[0]
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    node.replace_input_with(2, None)
    total.name, total.type, total.shape = product.name, product.type, product.shape
    product.name = fresh(f"{product.name}_without_bias")
    graph.insert_after(node, add)
