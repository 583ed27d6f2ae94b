"""Branches of low rank beside linear ops (`edits.AddBranch`): what their ops are called, and which ops can have one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from bitwright.graph._graph import ConvAttrs, Op, OpId, OpKind, Tensor, TensorId


@dataclass(frozen=True, slots=True)
class BranchNames:
    """Ids of the ops of a branch, the same on every backend.

    Attributes:
        down: the op that makes down x.
        up: the one that makes up (down x).
        total: the sum, which computes what the op beside the branch did before.
    """

    down: OpId
    up: OpId
    total: OpId


def branch_names(op: OpId) -> BranchNames:
    """The names of an op's branch."""
    return BranchNames(f"{op}/down", f"{op}/up", f"{op}/sum")


def branch_obstacle(
    op: Op, tensors: Mapping[TensorId, Tensor], shape: tuple[int, ...] | None, ops: Container[OpId]
) -> str:
    """Why an op can't have a branch, in words; "" if it can.

    A branch is for a matrix product along the last axis, with a constant weight: its two ops are such themselves. A
    convolution of one point is one too, but over an axis that most frameworks have in the middle.

    Args:
        op: that is to have one.
        tensors: of the model.
        shape: of the op's weight, canonical; None where it has none.
        ops: names that are taken.
    """
    shown = op.native or op.type
    if op.kind in (OpKind.CONV, OpKind.CONV_TRANSPOSE):
        own = ", which are put beside no convolution, be it of one point" if _is_pointwise(op) else ""
        return f"it is a {shown}, and branches are for matrix products along the last axis{own}"
    if op.kind is not OpKind.LINEAR or shape is None or len(op.data_inputs) != 1 or len(op.outputs) != 1:
        return f"it is a {shown}, and branches are for matrix products with a constant weight"
    names = branch_names(op.id)
    if taken := [n for n in (names.down, names.up, names.total) if n in ops]:
        return f"there is an op {taken[0]!r} already"
    for tensor, width in ((op.data_inputs[0], shape[1]), (op.output, shape[0])):
        # Not `channel_axis`, which is the network's: what mixes tokens has those for features.
        known = tensors[tensor].shape
        if known and known[-1] not in (None, width):
            return f"the last axis of {tensor!r} has {known[-1]} numbers, not the {width} features of the weight"
    return ""


def _is_pointwise(op: Op) -> bool:
    return isinstance(op.attrs, ConvAttrs) and set(op.attrs.kernel) == {1}
