"""What every backend refuses alike: encodings, parameter values and biases that don't fit the model.

A backend calls these before it touches anything, so that nothing has changed where one of them raises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError, ModelError
from bitwright.graph import Graph, OpId, ParamId, moved_from
from bitwright.grids import Blockwise, Dynamic, Encoding, PerTensor
from bitwright.placement import Plan, SiteId

T = TypeVar("T")
Shape = tuple[int | None, ...]
"""Lengths of axes; None where one is free."""


# -- encodings


def on_grid(graph: Graph, plan: Plan, site: SiteId) -> bool:
    """Whether an activation's values have been rounded to its grid by the ops before it, so that no op is needed."""
    root, op = plan.root(site), graph.producer(site)
    if op is None or len(plan.tied(root)) == 1:
        return False
    sources = moved_from(op)
    return bool(sources) and all(s in plan and plan.root(s) == root for s in sources)


def check_encodings(graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding]) -> None:
    """Refuse what can't be put on a plan's sites.

    Raises:
        EncodingError: a site isn't in the plan, takes its encoding from another or stays in float; something is no
            encoding, or its scales don't fit.
    """
    for site, encoding in encodings.items():
        if site not in plan:
            raise EncodingError(f"the plan has no site {site!r}")
        if plan.root(site) != site or plan.spec(site) is None:
            raise EncodingError(f"site {site!r} has no grid of its own ({plan[site].decision})")
        check_encoding(graph, plan, site, encoding)


def check_encoding(graph: Graph, plan: Plan, site: SiteId, encoding: Encoding) -> None:
    """Refuse an encoding that doesn't fit a site, or one of the sites that would share it.

    Args:
        graph: the model.
        plan: its sites.
        site: of the plan.
        encoding: to be installed there.

    Raises:
        EncodingError: it is not an encoding, or its scales don't fit.
    """
    if not isinstance(encoding, Encoding):
        raise EncodingError(f"site {site!r}: an Encoding is needed, got a {type(encoding).__name__}")
    if isinstance(encoding.granularity, PerTensor):
        return
    if isinstance(encoding.granularity, Dynamic):
        if site in graph.params or len(plan.tied(plan.root(site))) > 1:
            raise EncodingError(
                f"{site!r}: a range at run time is one tensor's own: parameters, and tensors that share a grid, take "
                "numbers"
            )
        return
    for shared in dict.fromkeys((site, *plan.tied(plan.root(site)))):
        param, tensor = graph.params.get(shared), graph.tensors.get(shared)
        if param is not None:
            check_fits(shared, encoding, param.shape)
        elif tensor is not None and (shared == site or not on_grid(graph, plan, shared)):
            # Where values arrive on the grid nothing is rounded, so that no axis has to carry the scales.
            if isinstance(encoding.granularity, Blockwise):
                raise EncodingError(f"{shared!r}: activations take one scale, or one for each channel; no blocks")
            check_fits(shared, encoding, tensor.shape)


def check_fits(site: SiteId, encoding: Encoding, shape: Shape | None) -> None:
    """Refuse scales that don't fit a tensor. Axes of known length are compared, whatever else is free.

    Args:
        site: for the message.
        encoding: to be installed.
        shape: of the tensor, canonical; None where the rank is unknown. Free dimensions fit anything.

    Raises:
        EncodingError: they don't fit.
    """
    layout, found = encoding.granularity, encoding.scale.shape
    if isinstance(layout, PerTensor | Dynamic):
        return
    if shape is None:
        raise EncodingError(f"{site!r} has no known rank, so only one scale for the whole tensor can be set")
    axes = (layout.axis, layout.block_axis) if isinstance(layout, Blockwise) else (layout.axis,)
    along = f"along axis {', '.join(map(str, axes))}"
    whose = f"a tensor of shape [{', '.join('?' if n is None else str(n) for n in shape)}]"
    way_out = "give one scale for each channel (and block), or one for the whole tensor"
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise EncodingError(f"{site!r}: scales {along} of {whose}, which has no such axis; {way_out}")
    takes = [shape[a] for a in axes]
    if isinstance(layout, Blockwise):
        size, length = layout.block_size, shape[layout.block_axis]
        if layout.axis % len(shape) == layout.block_axis % len(shape):
            raise EncodingError(f"{site!r}: channels and blocks both {along} of {whose}; blocks lie along another axis")
        if size < 1 or (length or 0) % size:
            raise EncodingError(
                f"{site!r}: blocks of {size} along axis {layout.block_axis} of {whose}, which they don't divide; "
                f"choose a block size that divides {'the axis' if length is None else length}"
            )
        takes[1] = None if length is None else length // size
    if any(n not in (None, m) for n, m in zip(takes, found, strict=True)):
        told, expected = (" × ".join("any number" if n is None else str(n) for n in ns) for ns in (found, takes))
        raise EncodingError(f"{site!r}: {told} scales {along} of {whose}, which takes {expected}; {way_out}")


# -- parameters


def known_param(known: Mapping[ParamId, T], id: ParamId) -> T:
    """What a backend holds for a parameter.

    Raises:
        ModelError: the model has no such parameter.
    """
    try:
        return known[id]
    except KeyError:
        raise no_param(id) from None


def no_param(id: ParamId) -> ModelError:
    """That a name is not a float parameter of the model."""
    return ModelError(f"the model has no parameter {id!r}")


def require_params(known: Collection[ParamId], ids: Collection[ParamId]) -> None:
    """Refuse names of no parameters.

    Raises:
        ModelError: one is unknown.
    """
    for id in ids:
        if id not in known:
            raise no_param(id)


def checked_param(id: ParamId, value: object, shape: tuple[int, ...]) -> NDArray[Any]:
    """A new value of a parameter, in canonical layout.

    Args:
        id: of the parameter, for messages.
        value: to be set.
        shape: the parameter's, canonical.

    Raises:
        ModelError: the shape differs, or a value isn't finite.
    """
    array = np.asarray(value)
    if array.shape != shape:
        raise ModelError(f"parameter {id!r} has shape {shape}, the new value {array.shape}")
    _check_finite(f"value of parameter {id!r}", array)
    return array


def checked_params(
    shapes: Mapping[ParamId, tuple[int, ...]], values: Mapping[ParamId, object]
) -> dict[ParamId, NDArray[Any]]:
    """New values of parameters, in canonical layout: all are checked before the first is used.

    Args:
        shapes: of the model's parameters.
        values: to be set.

    Raises:
        ModelError: an id names no parameter, a shape differs, or a value isn't finite.
    """
    return {id: checked_param(id, value, known_param(shapes, id)) for id, value in values.items()}


def checked_bias(op: OpId, value: object, width: int) -> NDArray[Any]:
    """A new bias of a linear op.

    Args:
        op: for messages.
        value: to be set.
        width: the op's number of outputs.

    Raises:
        ModelError: there isn't one value for each output, or one isn't finite.
    """
    array = np.asarray(value)
    if array.shape != (width,):
        raise ModelError(f"the bias of {op!r} has shape ({width},), the new one {array.shape}")
    _check_finite(f"bias of {op!r}", array)
    return array


def checked_branch(
    op: OpId, down: object, up: object, shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two matrices of a branch beside a linear op.

    Args:
        op: for messages.
        down, up: to be put in.
        shape: of the op's weight, (out, in).

    Raises:
        ModelError: their shapes aren't (rank, in) and (out, rank), or a value isn't finite.
    """
    inner, outer = np.asarray(down), np.asarray(up)
    rank = len(inner) if inner.ndim else 0
    if not rank or inner.shape != (rank, shape[1]) or outer.shape != (shape[0], rank):
        raise ModelError(
            f"a branch of {op!r} has matrices of shape (rank, {shape[1]}) and ({shape[0]}, rank), the new one "
            f"{inner.shape} and {outer.shape}"
        )
    for array in (inner, outer):
        _check_finite(f"branch of {op!r}", array)
    return inner.astype(np.float32), outer.astype(np.float32)


def _check_finite(what: str, array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise ModelError(f"the new {what} holds NaN or infinity; nothing was changed")
