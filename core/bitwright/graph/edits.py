"""The closed set of graph edits. Each is a small frozen record; `Backend.edit` applies a sequence of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.graph._graph import OpId, ParamId


@dataclass(frozen=True, eq=False)
class SetParams:
    """Replace parameter values (canonical layout; shapes must stay)."""

    values: Mapping[ParamId, NDArray[np.floating]]


@dataclass(frozen=True, eq=False)
class SetBias:
    """Give an op this bias (out,), creating it where the op has none."""

    op: OpId
    value: NDArray[np.floating]


@dataclass(frozen=True)
class FoldBatchNorm:
    """Drop a batch norm that the neighbouring linear op `into` has absorbed.

    The backend only rewires: `into` comes to produce the batch norm's output tensor (backward fold), or to
    read the batch norm's input tensor (forward fold). The arithmetic arrives as SetParams and SetBias.
    """

    batch_norm: OpId
    into: OpId


@dataclass(frozen=True)
class ReplaceActivation:
    """Turn an activation into another, one of `ACTIVATION_TYPES`: "Relu" drops a ReLU6's bound."""

    op: OpId
    type: str


@dataclass(frozen=True)
class RemoveOp:
    """Remove an op that passes its one input through; readers of its output read its input (or, where the output
    is a model output, the producer takes over the output's name)."""

    op: OpId


@dataclass(frozen=True)
class SplitSharedParam:
    """Give `op` a copy of its own of a parameter that several ops share."""

    op: OpId
    param: ParamId


@dataclass(frozen=True, eq=False)
class AddBranch:
    """Put a branch of low rank beside a linear op: y = W x + b becomes y = W x + b + up (down x).

    The op keeps its name, weight and bias, and comes to compute a tensor of its own; the sum takes over the output's
    name. The new ops are called as `branch_names` says, and each has its matrix as a parameter.

    Attributes:
        op: of kind LINEAR, with a constant weight (out, in) and its features on the last axis (`branch_obstacle`).
        down: (rank, in).
        up: (out, rank).
    """

    op: OpId
    down: NDArray[np.floating]
    up: NDArray[np.floating]


Edit = SetParams | SetBias | FoldBatchNorm | ReplaceActivation | RemoveOp | SplitSharedParam | AddBranch
