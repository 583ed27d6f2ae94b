"""Ops that ONNX has with channels on axis 1 alone, wherever the graph has them: between two Transposes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from bitwright.graph import Op
from bitwright_onnx.emit.sheet import Sheet


class Layout:
    """Where the channels of one op's tensors lie.

    Args:
        sheet: what is written to.
        op: the op.
        axis: the channels' axis, from the front or the back.
        rank: of its tensors.
    """

    def __init__(self, sheet: Sheet, op: Op, axis: int, rank: int) -> None:
        self._sheet, self._op = sheet, op
        self.rank, self.axis = rank, axis % rank if rank else 0
        self.order = (0, self.axis, *(i for i in range(1, rank) if i != self.axis)) if rank > 1 else (0,)
        """Own axis of each axis in ONNX's layout."""

    @property
    def native(self) -> bool:
        """Whether the op's tensors lie as ONNX wants them."""
        return self.order == tuple(range(len(self.order)))

    def to_onnx(self, value: ir.Value) -> ir.Value:
        """A value with its channels on axis 1."""
        return self._sheet.transpose(self._op, value, self.order)

    def back(self, value: ir.Value) -> ir.Value:
        """The other way round."""
        return self._sheet.transpose(self._op, value, [self.order.index(i) for i in range(len(self.order))])


def layout_of(sheet: Sheet, op: Op) -> Layout:
    """The layout of an op, as its call (`channel_axis`) or its first input tells it; else channels are on axis 1.

    Raises:
        NotEmittable: the rank isn't known.
    """
    source = op.data_inputs[0]
    told = op.call.attributes.get("channel_axis") if op.call is not None else None
    axis = told if isinstance(told, int) else sheet.graph.tensors[source].channel_axis
    return Layout(sheet, op, 1 if axis is None else axis, sheet.rank(op, source))


def attributes_of(op: Op) -> dict[str, Any]:
    """What the op's call says as attributes of ONNX's."""
    return {} if op.call is None else {k: v for k, v in op.call.attributes.items() if k != "channel_axis"}
