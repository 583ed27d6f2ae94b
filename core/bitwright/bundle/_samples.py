"""The few samples that an export carries: the first of the calibration data, or made up where there were none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, Tap
from bitwright.data import Dataset, InputSpecs, first_samples
from bitwright.errors import BitwrightError
from bitwright.graph import Graph, OpKind
from bitwright.grids import Encoding

SAMPLES = 4
"""Reference samples of an export unless it is asked for another number."""
KEPT_BYTES = 32 * 2**20
"""Bytes of inputs that are kept at most; one sample (or one fixed batch) is kept whatever its size."""
SIZES = (16, 32, 64, 8, 128, 224, 4, 1, 2, 256, 512)
"""What is tried for dimensions that a model leaves free, in this order, until it runs."""


@dataclass(frozen=True)
class Samples:
    """Model inputs by name, one batch.

    Attributes:
        inputs: arrays as the model takes them.
        synthetic: made up from the inputs' grids, for lack of data.
        whole: the model fixes the size of the batch.
    """

    inputs: Batch
    synthetic: bool = False
    whole: bool = False

    def first(self, count: int) -> Samples:
        """At most so many of the samples; all where their axis isn't known or the batch is fixed."""
        return self if self.whole else replace(self, inputs=first_samples(self.inputs, count))


def kept(batch: Batch, specs: InputSpecs, count: int = SAMPLES) -> Samples:
    """Copies of the first samples of a batch, within `KEPT_BYTES`; a batch whose size the model fixes is kept whole."""
    fixed = is_fixed(specs)
    batch = {name: np.asarray(values) for name, values in batch.items()}
    size = sum(v.nbytes for v in batch.values())
    if not fixed:
        part = first_samples(batch, count)
        held = sum(v.nbytes for v in part.values())
        while count > 1 and held > KEPT_BYTES:
            count -= 1
            part = first_samples(batch, count)
            held = sum(v.nbytes for v in part.values())
        if held < size:
            return Samples({name: values.copy() for name, values in part.items()})
    return Samples({name: np.array(values) for name, values in batch.items()}, whole=fixed)


def is_fixed(specs: InputSpecs) -> bool:
    """Whether batches must be taken whole: an input fixes their size, or has no axis of samples."""
    return any(not shape or shape[0] is not None for shape, _ in specs.values())


class Remembering:
    """A dataset that hands out another's batches, and keeps the first samples that go by.

    Attributes:
        seen: them; None until the first batch came.
    """

    def __init__(self, data: Dataset, specs: InputSpecs) -> None:
        self._data, self._specs = data, specs
        self.seen: Samples | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            if self.seen is None:
                self.seen = kept(batch, self._specs)
            yield batch

    @property
    def samples(self) -> int | None:
        """As many as the dataset itself has."""
        return self._data.samples

    def fingerprint(self) -> str:
        """The dataset's own."""
        return self._data.fingerprint()

    def taken(self) -> Samples | None:
        """What went by; where nothing did (a stored result was used), the first batch is fetched."""
        if self.seen is None:
            first = next(iter(self._data), None)
            self.seen = None if first is None else kept(first, self._specs)
        return self.seen


def synthetic(
    backend: Backend[Any], model: Any, graph: Graph, table: Mapping[str, Encoding], count: int = SAMPLES
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
    if encoding is not None and encoding.float_format is None:
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
