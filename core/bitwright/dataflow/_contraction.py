"""Sums of products over some axes of two tensors (tensordot, einsum, XLA's dot_general), as matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._nodes import ValueId

Axes = tuple[int, ...]


class Telling(Protocol):
    """What is needed of a `GraphBuilder`."""

    @property
    def op(self) -> Callable[..., tuple[ValueId, ...]]:
        """Tells it of a call."""

    def known(self, value: ValueId, /) -> Any:
        """What a value holds, if it depends on no input."""

    def shape(self, value: ValueId, /) -> tuple[int | None, ...]:
        """A value's shape."""


def contracted(
    b: Telling, left: ValueId, right: ValueId, contract: tuple[Axes, Axes], batch: tuple[Axes, Axes],
    function: Callable[..., Sequence[Any]], told: dict[str, Any],
) -> ValueId:  # fmt: skip
    """See `GraphBuilder.contraction`."""
    shapes = b.shape(left), b.shape(right)
    free = [tuple(i for i in range(len(s)) if i not in (*c, *n))
            for s, c, n in zip(shapes, contract, batch, strict=True)]  # fmt: skip
    last = tuple(range(len(shapes[0]) - len(contract[0]), len(shapes[0])))
    result = [shapes[0][i] for i in batch[0]] + [s[i] for s, f in zip(shapes, free, strict=True) for i in f]
    weight = b.known(right) is not None and b.known(left) is None and not batch[0]
    if weight and contract[0] == last:
        if len(shapes[1]) == 2 and len(last) == 1:
            layout = Layout().permuted(1, 0) if contract[1] == (0,) else Layout()
            return b.op("MatMul", [left, right], [result], function, layouts={1: layout}, **told)[0]
        return _with_matrix(b, left, right, contract[1], free[1], result, told)
    if len(free[0]) == len(free[1]) == len(last) == 1 and not weight:
        x = _turned(b, left, (*batch[0], *free[0], *contract[0]))
        y = _turned(b, right, (*batch[1], *contract[1], *free[1]))
        return b.op("MatMul", [x, y], [result], lambda x, y: [x @ y], **told)[0]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names: list[dict[int, str]] = [{}, {}]
    for i, j in (*zip(*batch, strict=True), *zip(*contract, strict=True)):
        names[0][i] = names[1][j] = next(letters)
    for held, axes in zip(names, free, strict=True):
        held.update({i: next(letters) for i in axes})
    x, y = ("".join(held[i] for i in range(len(s))) for held, s in zip(names, shapes, strict=True))
    z = "".join([names[0][i] for i in batch[0]] + [n[i] for n, f in zip(names, free, strict=True) for i in f])
    attributes = {"equation": f"{x},{y}->{z}"}
    return b.op("Einsum", [left, right], [result], function, attributes=attributes, **told)[0]


def _with_matrix(
    b: Telling,
    x: ValueId,
    weight: ValueId,
    inner: Axes,
    outer: Axes,
    result: Sequence[int | None],
    told: dict[str, Any],
) -> ValueId:
    """A product with a weight of more than two axes: both as matrices, and the result cut up again."""
    shape = b.shape(weight)
    order, moved = (*inner, *outer), tuple(shape[i] or 1 for i in (*inner, *outer))
    rows, width = (math.prod(shape[i] or 1 for i in axes) for axes in (inner, outer))
    layout = Layout().permuted(*order).reshaped(moved, (rows, width))
    if len(inner) > 1:
        x = _reshaped(b, x, (*b.shape(x)[: -len(inner)], rows))
    (y,) = b.op("MatMul", [x, weight], [(*b.shape(x)[:-1], width)], lambda x, w: [x @ layout.canonical(w)],
                layouts={1: layout.permuted(1, 0)}, **told)  # fmt: skip
    return y if len(outer) == 1 else _reshaped(b, y, result)


def _reshaped(b: Telling, x: ValueId, shape: Sequence[int | None]) -> ValueId:
    target = tuple(-1 if n is None else n for n in shape)
    return b.op("Reshape", [x], [shape], lambda x: [x.reshape(target)])[0]


def _turned(b: Telling, x: ValueId, perm: Axes) -> ValueId:
    if perm == tuple(range(len(perm))):
        return x
    shape = [b.shape(x)[i] for i in perm]
    return b.op("Transpose", [x], [shape], lambda x: [x.transpose(perm)], attributes={"perm": perm})[0]
