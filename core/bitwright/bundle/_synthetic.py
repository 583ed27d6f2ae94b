"""Made-up inputs of a model, for exports that there were no calibration data for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Tap
from bitwright.data import SAMPLES, Samples, is_fixed
from bitwright.errors import BitwrightError
from bitwright.graph import Graph, OpKind
from bitwright.grids import Encoding

SIZES = (16, 32, 64, 8, 128, 224, 4, 1, 2, 256, 512)
"""What is tried for dimensions that a model leaves free, in this order, until it runs."""


def synthetic(
    backend: Backend[Any], model: object, graph: Graph, table: Mapping[str, Encoding], count: int = SAMPLES
) -> Samples | None:
    """Made-up inputs that the model runs on: spread over the inputs' grids, or normal; None if no size fits.

    Args:
        backend, model, graph: the model.
        table: encodings; those of inputs bound their values.
        count: samples, where the batch is free.
    """
    specs = backend.input_specs(model)
    if any(not isinstance(shape, tuple) for shape, _ in specs.values()):
        return None
    try:
        session = backend.session(model, [Tap(t) for t in graph.outputs])
    except BitwrightError:
        return None
    free = any(None in shape[1:] for shape, _ in specs.values())
    for size in SIZES if free else SIZES[:1]:
        rng = np.random.default_rng(0)
        inputs = {
            n: _made(graph, n, shape, dtype, table.get(n), size, count, rng) for n, (shape, dtype) in specs.items()
        }
        try:
            session.run(inputs)
        except BitwrightError:
            continue
        return Samples(inputs, synthetic=True, whole=is_fixed(specs))
    return None


def _made(
    graph: Graph,
    name: str,
    shape: tuple[int | None, ...],
    dtype: str,
    encoding: Encoding | None,
    size: int,
    count: int,
    rng: np.random.Generator,
) -> NDArray[Any]:
    whole = [(count if axis == 0 else size) if n is None else n for axis, n in enumerate(shape)]
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(np.float32)
    rows = _rows(graph, name)
    if rows:
        return np.asarray(rng.integers(0, rows, whole), kind)
    if kind.kind == "b":
        return np.ones(whole, kind)
    if kind.kind in "iu":
        return np.asarray(rng.integers(0, 2, whole), kind)
    if encoding is not None and encoding.is_fixed:
        low, high = float(encoding.minimum.min()), float(encoding.maximum.max())
        # Between the extremes and the middle, as data are: most values near zero or the centre, some at the ends.
        spread = rng.beta(2.0, 2.0, whole)
        return np.asarray(low + (high - low) * spread, kind)
    return np.asarray(rng.standard_normal(whole), kind)


def _rows(graph: Graph, name: str) -> int | None:
    """Rows of the smallest table that an input indexes, followed through ops that move it; None if it indexes none."""
    found: list[int] = []
    stack, seen = [name], {name}
    while stack:
        for op in graph.consumers(stack.pop()):
            if op.kind is OpKind.EMBEDDING and op.weight is not None:
                found.append(graph.params[op.weight].shape[0])
            elif op.kind in (OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.IDENTITY, OpKind.OPAQUE):
                stack += [t for t in op.outputs if t not in seen]
                seen.update(op.outputs)
    return min(found, default=None)
