"""How a parameter lies in its variable, and how its op sees it in canonical layout: transpositions and reshapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitwright_tensorflow.graph.model import Array

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transposed:
    """Axis i comes from axis `order[i]`."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Reshaped:
    """The same values in another shape."""

    shape: Shape


Step = Transposed | Reshaped


@dataclass(frozen=True)
class Layout:
    """Steps from the variable's own (native) layout to the canonical one.

    Attributes:
        native: shape of the variable or constant.
        steps: carried out in order.
    """

    native: Shape
    steps: tuple[Step, ...] = ()

    @property
    def shapes(self) -> list[Shape]:
        """Shape before the first step, and after each."""
        shapes = [self.native]
        for step in self.steps:
            last = shapes[-1]
            shapes.append(tuple(last[i] for i in step.order) if isinstance(step, Transposed) else step.shape)
        return shapes

    @property
    def shape(self) -> Shape:
        """Canonical shape."""
        return self.shapes[-1]

    @property
    def layout(self) -> tuple[int, ...] | None:
        """The native axis of each canonical axis; None where axes are split, joined, dropped or added."""
        axes: list[int | None] = list(range(len(self.native)))
        for step, before, after in zip(self.steps, self.shapes, self.shapes[1:], strict=False):
            if isinstance(step, Transposed):
                axes = [axes[i] for i in step.order]
            else:
                moved = _realigned(axes, before, after)
                if moved is None:
                    return None
                axes = moved
        known = [a for a in axes if a is not None]
        return tuple(known) if sorted(known) == list(range(len(self.native))) and len(axes) == len(known) else None

    def then(self, *steps: Step) -> Layout:
        """The form with further steps; those that change nothing are left out."""
        form = self
        for step in steps:
            kept = form.steps
            if isinstance(step, Reshaped) and kept and isinstance(kept[-1], Reshaped):
                kept = kept[:-1]
            form = Layout(form.native, kept)
            same = step.shape == form.shape if isinstance(step, Reshaped) else list(step.order) == sorted(step.order)
            form = form if same else Layout(form.native, (*kept, step))
        return form

    def canonical(self, array: Array) -> Array:
        """Native values in canonical layout."""
        for step in self.steps:
            array = array.transpose(step.order) if isinstance(step, Transposed) else array.reshape(step.shape)
        return array

    def to_native(self, array: Array) -> Array:
        """Canonical values in native layout."""
        for step, before in zip(reversed(self.steps), reversed(self.shapes[:-1]), strict=True):
            array = array.transpose(np.argsort(step.order)) if isinstance(step, Transposed) else array.reshape(before)
        return np.asarray(array, order="C")


def _realigned(axes: list[int | None], before: Shape, after: Shape) -> list[int | None] | None:
    """Labels of the axes after a reshape that only adds and drops axes of length 1."""
    wide = [(label, size) for label, size in zip(axes, before, strict=True) if size != 1]
    if [size for _, size in wide] != [size for size in after if size != 1] or math.prod(before) != math.prod(after):
        return None
    ones = iter([label for label, size in zip(axes, before, strict=True) if size == 1])
    rest = iter([label for label, _ in wide])
    return [next(rest) if size != 1 else next(ones, None) for size in after]
