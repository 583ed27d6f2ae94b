"""Reads back which tensors of a QDQ model pass through quantize/dequantize pairs, and on which scales."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError

Scales = NDArray[np.float32]


def pairs_of(path: Path) -> dict[str, list[Scales]]:
    """Tensor → the scales of each pair that it passes through, in its native layout.

    A stored integer tensor that is dequantized counts as a pair: it was quantized when the file was written.

    Raises:
        ModelError: the file can't be read, or a scale isn't constant.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"can't read {str(path)!r}: {error}") from error
    kept = {str(value.name) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    found: dict[str, list[Scales]] = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            found.setdefault(_name(node, kept), []).append(_scales(node, path))
    return found


def _name(dequantize: ir.Node, kept: Collection[str]) -> str:
    """The quantized tensor's name; what keeps its own name beside the pair is read under another."""
    value = dequantize.outputs[0]
    # In float16 models the writer casts back from float32, as a part of the pair.
    while len(users := [user for user, _ in value.uses()]) == 1 and _is_written(users[0]):
        value = users[0].outputs[0]
    name = str(value.name)
    own = name.removesuffix("_dequantized")
    return own if own in kept else name


def _is_written(node: ir.Node) -> bool:
    return node.op_type == "Cast" and ("_qdq/" in str(node.name) or "_dq/" in str(node.name))


def _scales(node: ir.Node, path: Path) -> Scales:
    scale = node.inputs[1]
    if scale is None or scale.const_value is None:
        raise ModelError(f"{path.name}: the scale of {node.name!r} isn't constant")
    return np.asarray(scale.const_value.numpy(), np.float32)
