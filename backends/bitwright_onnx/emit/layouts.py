"""Ops that ONNX has with channels on axis 1 alone, wherever the graph has them: between two Transposes."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.graph import Op, TensorId
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


def layout_of(sheet: Sheet, op: Op, tensor: TensorId | None = None) -> Layout:
    """The layout of an op, as its first input (or `tensor`) tells it; channels on axis 1 where nothing does.

    Raises:
        NotEmittable: the rank isn't known.
    """
    told = tensor or op.data_inputs[0]
    axis = sheet.graph.tensors[told].channel_axis
    return Layout(sheet, op, 1 if axis is None else axis, sheet.rank(op, told))
