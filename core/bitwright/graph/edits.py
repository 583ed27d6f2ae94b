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


Edit = SetParams | SetBias | FoldBatchNorm | ReplaceActivation | RemoveOp | SplitSharedParam
