"""Where a simulation's NaN or ∞ begins: the first tensor that isn't finite although the float model's is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend._protocols import Batch, Session
from bitwright.backend._taps import Tap
from bitwright.graph import Graph, TensorId

OpenSession = Callable[[Sequence[Tap]], Session]
_TOGETHER = 32
"""Tensors that are held at once."""


class NonFiniteWarning(UserWarning):
    """A simulation gives NaN or infinity where the float model gives numbers."""


def warn_where_it_began(
    graph: Graph, outputs: Sequence[NDArray[Any]], batch: Batch, simulated: OpenSession, floating: OpenSession
) -> bool:
    """Warn if one batch's outputs of a simulation aren't finite where the float model's are, with the first tensor.

    Args:
        graph: the model.
        outputs: of the simulation, in the order of `graph.outputs`.
        batch: what they were computed from.
        simulated, floating: open sessions of the simulation and of the float model.

    Returns:
        Whether it warned.
    """
    if all(_finite(values) for values in outputs):
        return False
    began = where_it_began(graph, batch, simulated, floating)
    if began is None:
        return False
    op = graph.producer(began)
    assert op is not None
    sources = ", ".join(map(repr, op.data_inputs))
    warnings.warn(
        f"the simulation's outputs hold NaN or infinity where the float model's don't; it begins at tensor {began!r}, "
        f"which {op.id!r} ({op.type}) computes from {sources}. Their grids have no place for what it needs there (a "
        "divisor or a variance that rounds to zero, most often): give these more bits, or compute them in float "
        f"(overrides={{{op.data_inputs[-1]!r}: 'float'}})",
        NonFiniteWarning,
        stacklevel=4,
    )
    return True


def where_it_began(graph: Graph, batch: Batch, simulated: OpenSession, floating: OpenSession) -> TensorId | None:
    """The first tensor, in topological order, that isn't finite in the simulation and is in float; None if none is."""
    tensors = [t for op in graph for t in op.outputs if graph.tensors[t].is_float or graph.tensors[t].mask]
    for start in range(0, len(tensors), _TOGETHER):
        taps = [Tap(t) for t in tensors[start : start + _TOGETHER]]
        found = simulated(taps).run(batch)
        odd = [tap for tap in taps if not _finite(found[tap])]
        if odd:
            expected = floating(odd).run(batch)
            began = next((tap for tap in odd if _finite(expected[tap])), None)
            if began is not None:
                return began.tensor
    return None


def _finite(values: object) -> bool:
    array = np.asarray(values)
    return array.dtype.kind in "biuOUS" or bool(np.isfinite(np.asarray(array, np.float32)).all())
