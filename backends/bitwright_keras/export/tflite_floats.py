"""Conversions between grids that the converter left out: to float, and from one grid to another.

It gives every weight integers of its own, whatever it was told: as an int8 operator where its neighbours are int8, or
as a hybrid one, which rounds its float input on the fly. And operators that only copy codes it lets read one grid and
write another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright_keras.export.tflite_file import FLOAT32, INT8, INT32, TfliteFile

QUANTIZE, DEQUANTIZE = 114, 6
COPYING: Mapping[str, int] = {
    # operators whose int8 kernels copy codes as they are, and which of their inputs has them
    "GATHER": 0, "GATHER_ND": 0, "RESHAPE": 0, "SQUEEZE": 0, "EXPAND_DIMS": 0, "TRANSPOSE": 0, "SLICE": 0,
    "STRIDED_SLICE": 0, "SPLIT": 1, "SPLIT_V": 0, "UNPACK": 0, "TILE": 0, "BROADCAST_TO": 0, "REVERSE_V2": 0,
    "SPACE_TO_DEPTH": 0, "DEPTH_TO_SPACE": 0,
}  # fmt: skip


def in_float(
    file: TfliteFile, operator: Any, places: tuple[int, int, int], weight: NDArray[np.float32], bias: Any
) -> None:
    """Make a linear operator compute in float; where its neighbours are int8, between DEQUANTIZE and QUANTIZE.

    Args:
        file: changed in place.
        operator: of the file.
        places: which of its inputs are data, weight and bias.
        weight: float values in the tensor's layout.
        bias: float values; None keeps what the file has.
    """
    x, w, b = places
    inputs = [int(i) for i in operator.inputs]
    inputs[w] = _constant(file, inputs[w], weight)
    if len(inputs) > b and inputs[b] >= 0 and file.tensors[inputs[b]].type == INT32:
        codes, grid = file.constant(inputs[b]), file.grid(inputs[b])
        assert codes is not None and grid is not None
        real = codes * grid.scale.astype(np.float64) if bias is None else bias
        inputs[b] = _constant(file, inputs[b], np.asarray(real, np.float32))
    position = next(i for i, o in enumerate(file.graph.operators) if o is operator)
    if file.tensors[inputs[x]].type == INT8:
        source, inputs[x] = inputs[x], _twin(file, inputs[x])
        file.graph.operators.insert(position, _conversion(file, DEQUANTIZE, source, inputs[x]))
        position += 1
    operator.inputs = inputs
    result = int(operator.outputs[0])
    if file.tensors[result].type == INT8:
        operator.outputs = [_twin(file, result)]
        file.graph.operators.insert(position + 1, _conversion(file, QUANTIZE, int(operator.outputs[0]), result))


def requantized(file: TfliteFile) -> None:
    """Put a QUANTIZE behind each operator that copies codes of one grid into a tensor of another, in place.

    An embedding's rows lie on its table's grid, and what reads them expects that of the embedding's output.
    """
    for kind, operator in list(file.operators()):
        if kind not in COPYING:
            continue
        source = int(operator.inputs[COPYING[kind]])
        outputs = [int(t) for t in operator.outputs]
        for place, target in enumerate(outputs):
            ours, theirs = file.grid(source), file.grid(target)
            types = {file.tensors[t].type for t in (source, target)}
            if ours is None or theirs is None or types != {INT8} or len(ours.scale) != 1 or ours.same(theirs):
                continue
            outputs[place] = _twin(file, target, "_copied")
            made = file.tensors[outputs[place]]
            made.type, made.quantization = INT8, copy.copy(file.tensors[target].quantization)
            file.set_grid(outputs[place], ours.scale, ours.zero_point)
            position = next(i for i, o in enumerate(file.graph.operators) if o is operator)
            file.graph.operators.insert(position + 1, _conversion(file, QUANTIZE, outputs[place], target))
        operator.outputs = outputs


def _twin(file: TfliteFile, index: int, suffix: str = "_float") -> int:
    """A float tensor of another's shape."""
    old = file.graph.tensors[index]
    made = type(old)()
    made.shape, made.shapeSignature, made.hasRank = old.shape, old.shapeSignature, old.hasRank
    made.type, made.buffer, made.name = FLOAT32, 0, old.name + suffix.encode()
    file.graph.tensors.append(made)
    return len(file.graph.tensors) - 1


def _constant(file: TfliteFile, index: int, values: NDArray[np.float32]) -> int:
    """A float constant of another's shape."""
    made = _twin(file, index)
    file.model.buffers.append(type(file.model.buffers[0])())
    file.graph.tensors[made].buffer = len(file.model.buffers) - 1
    file.set_constant(made, values.reshape(file.shape(index)))
    return made


def _conversion(file: TfliteFile, kind: int, source: int, target: int) -> Any:
    """A QUANTIZE or DEQUANTIZE operator."""
    codes = file.model.operatorCodes
    index = next((i for i, c in enumerate(codes) if max(c.builtinCode, c.deprecatedBuiltinCode) == kind), None)
    if index is None:
        code = type(codes[0])()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = 1 if kind == QUANTIZE else 2
        codes.append(code)
        index = len(codes) - 1
    made = type(file.graph.operators[0])()
    made.opcodeIndex, made.inputs, made.outputs = index, [source], [target]
    return made
