"""What sessions of every backend have in common: how batches are fed, and what is made of the tensors tapped.

The rule for numbers is `fed`'s: what can be converted without changing a value, beyond rounding a float, is
converted; all else is refused. It holds for model inputs and for tensors fed to a segment, for float models,
simulations and integer runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from bitwright.backend._conversion import fed
from bitwright.backend._protocols import Batch
from bitwright.backend._taps import Tap, thinned_places
from bitwright.errors import InputError, ModelError
from bitwright.files import Array
from bitwright.graph import TensorId

N = TypeVar("N")
V = TypeVar("V")
Tensor = Any
"""A tensor of whichever framework the namespace belongs to."""


# -- feeds


def given(batch: Mapping[str, V], name: TensorId) -> V:
    """What a batch holds for an input.

    Raises:
        InputError: nothing.
    """
    try:
        return batch[name]
    except KeyError:
        held = ", ".join(batch) or "nothing"
        raise InputError(f"the batch has no array for input {name!r}; it holds {held}") from None


def check_shape(name: TensorId, found: Sequence[int], expected: Sequence[int | None] | None) -> None:
    """Refuse an array of another rank, or another length of an axis that isn't free.

    Args:
        name: of the input, for the message.
        found: the array's shape.
        expected: lengths of axes, None where one is free; None fits any shape.

    Raises:
        InputError: it doesn't fit.
    """
    if expected is None:
        return
    if len(found) != len(expected) or any(n not in (None, m) for n, m in zip(expected, found, strict=True)):
        shown = ", ".join("?" if n is None else str(n) for n in expected)
        raise InputError(f"input {name!r} takes shape [{shown}] (?: free), the batch holds {list(found)}")


def feed(batch: Batch, name: TensorId, dtype: str, shape: Sequence[int | None] | None = None) -> Array:
    """The array of one input, in the type that the model takes.

    Args:
        batch: arrays by name.
        name: of the input, or of a tensor that a segment is fed.
        dtype: numpy's name of the type, see `fed`.
        shape: see `check_shape`.

    Raises:
        InputError: it is missing, has another shape, isn't numeric, or holds numbers that the type can't.
    """
    array = fed(given(batch, name), dtype, name)
    check_shape(name, array.shape, shape)
    return array


# -- what is computed from what


def require_tensors(names: Iterable[TensorId], known: Container[TensorId]) -> None:
    """Refuse taps and feeds that the model doesn't have.

    Raises:
        ModelError: one is unknown.
    """
    for name in names:
        if name not in known:
            raise ModelError(f"the model has no tensor {name!r}")


def not_computable(wanted: Iterable[TensorId], feeds: Iterable[TensorId], missing: Iterable[TensorId]) -> ModelError:
    """That taps depend on more than the feeds of a segment."""
    taps, fed, inputs = (", ".join(map(repr, dict.fromkeys(names)))[:300] for names in (wanted, feeds, missing))
    return ModelError(f"{taps} can't be computed from {fed or 'nothing'} alone: input {inputs} is needed too")


def between(
    nodes: Sequence[N],
    reads: Callable[[N], Iterable[TensorId]],
    writes: Callable[[N], Iterable[TensorId]],
    wanted: Iterable[TensorId],
    sources: Container[TensorId],
) -> tuple[tuple[N, ...], frozenset[TensorId]]:
    """The nodes that compute some tensors from others.

    Args:
        nodes: in topological order.
        reads, writes: tensors of a node.
        wanted: to be computed.
        sources: that are given; what lies before them isn't needed for them.

    Returns:
        Those nodes, in order, and the tensors that no node of the model writes and no source gives.
    """
    needed = {t for t in wanted if t not in sources}
    kept: list[N] = []
    for node in reversed(nodes):
        made = needed.intersection(writes(node))
        if made:
            kept.append(node)
            needed -= made
            needed.update(t for t in reads(node) if t not in sources)
    return tuple(reversed(kept)), frozenset(needed)


# -- taps


class TapNamespace(Protocol):
    """What taps need of a framework. Shapes have None where a length isn't known while a graph is built."""

    def shape(self, x: Tensor, /) -> tuple[int | None, ...] | None:
        """The shape as far as it is known; None where not even the rank is."""

    def extremes(self, x: Tensor, axes: tuple[int, ...] | None, /) -> tuple[Tensor, Tensor]:
        """The minimum and maximum over these axes, which go; over all for None."""

    def highest(self, x: Tensor, axes: tuple[int, ...] | None, /) -> Tensor:
        """The maximum alone."""

    def pair(self, low: Tensor, high: Tensor, /) -> Tensor:
        """Both stacked along a new first axis, float32."""

    def zeros_like(self, x: Tensor, /) -> Tensor:
        """Zeros of its shape and type."""

    def by_sample(self, x: Tensor, /) -> Tensor:
        """Each sample flattened: (samples, size)."""

    def second(self, x: Tensor, axis: int, /) -> Tensor:
        """An axis moved to place 1."""

    def every(self, x: Tensor, step: int, /) -> Tensor:
        """Every `step`-th column of (samples, size)."""

    def take(self, x: Tensor, places: Array, /) -> Tensor:
        """These columns of (samples, size)."""


def handed_out(ns: TapNamespace, x: Tensor, tap: Tap, *, never_negative: bool = False) -> Tensor:
    """What a tap makes of its tensor, on the device: `statistics.base.reduced` in a framework.

    Args:
        ns: the framework's functions.
        x: the whole tensor.
        tap: what is asked of it.
        never_negative: its op keeps it from being so (`op_types.never_negative`): a minimum need not be computed.

    Raises:
        ModelError: channels are asked for of a tensor whose rank isn't known.
    """
    shape = ns.shape(x)
    if shape is None and tap.axis is not None and (tap.reduce == "minmax" or tap.step > 1):
        raise ModelError(f"tensor {tap.tensor!r} has no known rank; its channels can't be told apart")
    if tap.reduce == "minmax":
        axes = None
        if tap.axis is not None and shape is not None:
            axes = tuple(i for i in range(len(shape)) if i != tap.axis % len(shape))
        if never_negative:
            high = ns.highest(x, axes)
            return ns.pair(ns.zeros_like(high), high)
        return ns.pair(*ns.extremes(x, axes))
    if tap.step == 1:
        return x
    known = tuple(n for n in shape[1:] if n is not None) if shape is not None else ()
    if shape is not None and len(known) == len(shape) - 1:
        places = thinned_places(known, tap.step, tap.axis)
        return ns.every(ns.by_sample(x), tap.step) if places is None else ns.take(ns.by_sample(x), places)
    if tap.axis not in (None, 0, 1):
        x = ns.second(x, tap.axis)
    return ns.every(ns.by_sample(x), tap.step)
