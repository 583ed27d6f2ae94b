"""How a framework lays out a parameter: the way from its array to the canonical one, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Array = Any
"""An array with numpy's `reshape`, `transpose` and slices: of numpy, or of a framework while it compiles."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Steps from the native array to the canonical one; none where both are the same.

    A kernel stored (kernel…, in, out) is `Layout().permuted(3, 2, 0, 1)`; one of a transposed convolution that the
    framework applies flipped `Layout().permuted(2, 3, 0, 1).flipped(2, 3)`; a vector kept as (1, 1, channels)
    `Layout().reshaped((1, 1, 8), (8,))`.

    Attributes:
        steps: ("permute", order), ("flip", axes) or ("reshape", before, after), in order.
    """

    steps: tuple[tuple[Any, ...], ...] = ()

    def permuted(self, *order: int) -> Layout:
        """Then axes are put in this order, as numpy's transpose does."""
        before = self.steps
        if before and before[-1][0] == "permute":
            before, order = before[:-1], tuple(self.steps[-1][1][i] for i in order)
        return Layout(before if order == tuple(range(len(order))) else (*before, ("permute", order)))

    def flipped(self, *axes: int) -> Layout:
        """Then these axes are reversed."""
        return Layout((*self.steps, ("flip", axes))) if axes else self

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> Layout:
        """Then an array of one shape is given another."""
        steps, first, last = self.steps, tuple(before), tuple(after)
        if steps and steps[-1][0] == "reshape":
            steps, first = steps[:-1], steps[-1][1]
        return Layout(steps if first == last else (*steps, ("reshape", first, last)))

    def then(self, other: Layout) -> Layout:
        """These steps, and another layout's after them."""
        found = self
        for name, *arguments in other.steps:
            if name == "reshape":
                found = found.reshaped(*arguments)
            else:
                found = found.permuted(*arguments[0]) if name == "permute" else found.flipped(*arguments[0])
        return found

    def canonical(self, native: Array) -> Array:
        """The canonical array of a native one."""
        for name, *arguments in self.steps:
            if name == "permute":
                native = native.transpose(arguments[0])
            elif name == "flip":
                native = _flip(native, arguments[0])
            else:
                native = native.reshape(arguments[1])
        return native

    def native(self, canonical: Array) -> Array:
        """The native array of a canonical one."""
        for name, *arguments in reversed(self.steps):
            if name == "permute":
                order = arguments[0]
                canonical = canonical.transpose(tuple(order.index(i) for i in range(len(order))))
            elif name == "flip":
                canonical = _flip(canonical, arguments[0])
            else:
                canonical = canonical.reshape(arguments[0])
        return canonical

    @property
    def order(self) -> tuple[int, ...] | None:
        """`Param.layout`: the native axis of each canonical one; None where it is the same, or more than an order."""
        if len(self.steps) != 1 or self.steps[0][0] != "permute":
            return None
        order: tuple[int, ...] = self.steps[0][1]
        return order


def _flip(x: Array, axes: Sequence[int]) -> Array:
    return x[tuple(slice(None, None, -1 if i in axes else None) for i in range(x.ndim))]
