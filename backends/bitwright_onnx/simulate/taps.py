"""What a tap makes of its tensor inside of a graph, so that little of it leaves: extremes, or some of its values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Tap, thinned_places
from bitwright.graph import never_negative
from bitwright_onnx.graph.subgraph import values_of


class TapOps:
    """Puts the ops of taps at the end of a part, which it owns; constants that several of them read are in it once."""

    def __init__(self, part: ir.Model) -> None:
        self._graph = part.graph
        self._opset = part.graph.opset_imports.get("", 13)
        self._taken = set(values_of(part.graph))
        self._constants: dict[object, ir.Value] = {}

    def made(self, value: ir.Value, tap: Tap) -> list[ir.Value]:
        """Values to fetch for a tap: the tensor itself, thinned, or its minimum and maximum.

        The tensor itself where its rank or size would have to be known and isn't; of one that can't be negative by its
        op, the maxima alone, of channels or of more.
        """
        if tap.reduce == "none":
            return [self._as_it_is(value) if tap.step == 1 else self._thinned(value, tap)]
        if tap.axis is not None and value.shape is None:
            return [value]
        if _never_negative(value) and value.shape is not None and len(value.shape) == 4 and tap.axis in (None, 1):
            # Unlike ReduceMax, this op reads the blocked layout that ONNX Runtime's convolutions write.
            pooled = self._append("GlobalMaxPool", [value], f"{value.name}/GlobalMaxPool")
            # ONNX Runtime makes pools and ways out of its layout anew; what follows keeps its place among the nodes.
            return [self._append("Flatten", [pooled], f"{value.name}/Maxima")]
        return self._extremes(value, tap)

    def _as_it_is(self, value: ir.Value) -> ir.Value:
        """A tensor that convolutions may have made, behind a node that changes nothing and keeps its place."""
        if value.shape is None or len(value.shape) != 4:
            return value
        return self._append("Reshape", [value, self._constant([0] * 4)], f"{value.name}/Whole")

    def _extremes(self, value: ir.Value, tap: Tap) -> list[ir.Value]:
        source = value
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            # ONNX Runtime reduces these types on some builds only.
            source = self._append("Cast", [value], f"{value.name}/Cast", to=int(ir.DataType.FLOAT))
        operands: list[ir.Value] = [source]
        attributes: dict[str, Any] = {"keepdims": 0}
        if tap.axis is not None:
            assert value.shape is not None
            axes = [i for i in range(len(value.shape)) if i != tap.axis % len(value.shape)]
            if self._opset >= 18:
                operands.append(self._constant(axes))
            else:
                attributes["axes"] = axes
        suffix = "" if tap.axis is None else f".{tap.axis}"
        return [
            self._append(op, operands, f"{value.name}/{op}{suffix}", **attributes) for op in ("ReduceMin", "ReduceMax")
        ]

    def _thinned(self, value: ir.Value, tap: Tap) -> ir.Value:
        """As the core's `thinned`."""
        sizes = [] if value.shape is None else [d for d in list(value.shape)[1:] if isinstance(d, int)]
        places = None
        if tap.axis not in (None, 0, 1):
            if value.shape is None or len(sizes) + 1 < len(value.shape):
                return value
            places = thinned_places(tuple(sizes), tap.step, tap.axis)
        flat = self._append("Reshape", [value, self._constant([0, -1])], f"{value.name}/Flat")
        if places is not None:
            return self._append("Gather", [flat, self._constant(places)], f"{value.name}/Thinned", axis=1)
        # Every step-th value, of all that there are along axis 1.
        ends = [self._constant([n]) for n in (0, np.iinfo(np.int64).max, 1, tap.step)]
        return self._append("Slice", [flat, *ends], f"{value.name}/Thinned")

    def picked(self, value: ir.Value, tap: Tap) -> tuple[list[ir.Value], ir.Value] | None:
        """The value to fetch for a tap with places, and an input that says which sample is the first.

        None where the tensor's axes aren't known, or channels lie in the midst of them.
        """
        assert tap.places is not None
        shape = None if value.shape is None else list(value.shape)
        if shape is None or len(shape) < 2 or self._opset < 13:
            return None
        sizes = [d for d in shape[1:] if isinstance(d, int)]
        axis = 1 if tap.axis is None else tap.axis % len(shape)
        if len(sizes) + 1 < len(shape) or axis not in (1, len(shape) - 1):
            return None
        first = ir.Value(
            name=self._free(f"{value.name}/First"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])
        )
        self._graph.inputs.append(first)
        table, last = tap.places.table, axis == len(shape) - 1 and axis != 1
        positions = math.prod(sizes) // sizes[axis - 1]
        laid = [0, positions, sizes[-1]] if last else [0, sizes[0], positions]
        flat = self._append("Reshape", [value, self._constant(laid)], f"{value.name}/Places")
        dims = self._append("Shape", [flat], f"{value.name}/Shape")
        zero, one, turns = (self._scalar(n) for n in (0, 1, len(table)))
        samples = self._append("Gather", [dims, zero], f"{value.name}/Samples", axis=0)
        place = self._append("Range", [zero, samples, one], f"{value.name}/Range")
        place = self._append("Add", [place, first], f"{value.name}/Number")
        turn = self._append("Mod", [place, turns], f"{value.name}/Turn")
        rows = self._array((tap.places, last), (table[:, :, None] if last else table[:, None]).astype(np.int64))
        index = self._append("Gather", [rows, turn], f"{value.name}/Rows", axis=0)
        if last:
            found = self._append("GatherND", [flat, index], f"{value.name}/Picked", batch_dims=1)
            return [self._append("Transpose", [found], f"{value.name}/Channels", perm=[0, 2, 1])], first
        index = self._append("Expand", [index, self._constant([1, sizes[0], 1])], f"{value.name}/Index")
        # In a third of the time that Gather takes.
        return [self._append("GatherElements", [flat, index], f"{value.name}/Picked", axis=2)], first

    def channels(self, value: ir.Value, tap: Tap) -> int:
        """Of a tensor that is `picked`."""
        assert value.shape is not None
        length = value.shape[1 if tap.axis is None else tap.axis]
        assert isinstance(length, int)
        return length

    def _scalar(self, number: int) -> ir.Value:
        return self._array(number, np.array(number, np.int64))

    def _constant(self, numbers: list[int] | NDArray[np.int64]) -> ir.Value:
        return self._array(tuple(map(int, numbers)), np.asarray(numbers, np.int64))

    def _array(self, key: object, array: NDArray[Any]) -> ir.Value:
        if key not in self._constants:
            name = self._free(f"taps/{len(self._constants)}")
            made = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
            self._graph.register_initializer(made)
            self._constants[key] = made
        return self._constants[key]

    def _append(self, op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.name = node.outputs[0].name = self._free(name)
        self._graph.append(node)
        return node.outputs[0]

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _never_negative(value: ir.Value) -> bool:
    """Whether the op that makes a value can't make it negative."""
    node = value.producer()
    if node is None or value.dtype not in (None, ir.DataType.FLOAT):
        return False
    if node.op_type == "Clip" and len(node.inputs) > 1 and node.inputs[1] is not None:
        low = node.inputs[1].const_value
        return low is not None and never_negative("Clip", float(low.numpy().reshape(-1)[0]))
    return never_negative(node.op_type)
