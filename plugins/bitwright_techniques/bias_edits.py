"""How a technique hands over new biases: values where an op has its own, edits where it has none or shares one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Edit, Graph, OpId, ParamId, ParamRole, SetBias, SplitSharedParam


def bias_changes(
    graph: Graph, biases: Mapping[OpId, NDArray[np.floating]]
) -> tuple[dict[ParamId, NDArray[np.float32]], list[Edit]]:
    """New biases (out,) by op → (`Outcome.params`, `Outcome.edits`)."""
    params: dict[ParamId, NDArray[np.float32]] = {}
    edits: list[Edit] = []
    for id, value in biases.items():
        current = graph.op(id).params.get(ParamRole.BIAS)
        if current is not None and len(graph.users(current)) == 1:
            params[current] = value.astype(np.float32)
            continue
        if current is not None:
            edits.append(SplitSharedParam(id, current))
        edits.append(SetBias(id, value.astype(np.float32)))
    return params, edits
