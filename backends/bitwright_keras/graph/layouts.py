"""How Keras's variables lie in the canonical layouts: the one table at the door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import OpKind, ParamRole

ROLES = {
    "kernel": ParamRole.WEIGHT,
    "bias": ParamRole.BIAS,
    "gamma": ParamRole.GAMMA,
    "scale": ParamRole.GAMMA,
    "beta": ParamRole.BETA,
    "moving_mean": ParamRole.MEAN,
    "moving_variance": ParamRole.VAR,
    "embeddings": ParamRole.WEIGHT,
    "alpha": ParamRole.SLOPE,
}
"""Role by name of a layer's variable."""


@dataclass(frozen=True)
class Layout:
    """A native array and its canonical form: axes reordered, then (for depthwise kernels with a multiplier) merged.

    Attributes:
        native: shape of the variable.
        order: native axis of each canonical axis.
        shape: canonical.
    """

    native: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def canonical(self, value: NDArray[Any]) -> NDArray[Any]:
        """Native → canonical."""
        return np.transpose(value, self.order).reshape(self.shape)

    def to_native(self, value: NDArray[Any]) -> NDArray[Any]:
        """Canonical → native."""
        split = np.reshape(value, tuple(self.native[i] for i in self.order))
        return np.asarray(np.transpose(split, np.argsort(self.order)), order="C")

    def spread(self, value: NDArray[Any]) -> NDArray[Any]:
        """An array that broadcasts against the canonical form → one that does so against the native form."""
        if np.ndim(value) == 0:
            return np.asarray(value)
        split: list[int] = []
        for size, axis, whole in zip(value.shape, self.order, self.shape, strict=True):
            inner = self.native[axis]
            if size not in (1, whole):
                raise ValueError(f"{value.shape} doesn't broadcast against {self.shape}")
            split.append(inner if size == whole else 1)
        if self.shape[0] != self.native[self.order[0]] and value.shape[0] == self.shape[0]:
            split[1] = self.native[self.order[1]]  # (channels · multiplier, 1, …) → (channels, multiplier, …)
        return np.ascontiguousarray(np.transpose(value.reshape(split), np.argsort(self.order)))

    @property
    def merges(self) -> bool:
        """Whether axes are merged, so that no native axis is the canonical one."""
        return tuple(self.native[i] for i in self.order) != self.shape


def layout_of(kind: OpKind, role: ParamRole, native: tuple[int, ...], *, depthwise: bool = False) -> Layout:
    """The layout of a variable in its role.

    Kernels are (*kernel, in/groups, out); of a transposed convolution (*kernel, out, in); of a depthwise one
    (*kernel, channels, multiplier); of a dense layer (in, out).
    """
    rank = len(native)
    plain = Layout(native, tuple(range(rank)), native)
    if role is not ParamRole.WEIGHT:
        return plain
    spatial = tuple(range(rank - 2))
    if kind is OpKind.LINEAR:
        order: tuple[int, ...] = (1, 0)
    elif kind in (OpKind.CONV, OpKind.CONV_TRANSPOSE):
        order = (rank - 2, rank - 1, *spatial) if depthwise else (rank - 1, rank - 2, *spatial)
    else:
        return plain
    made = Layout(native, order, tuple(native[i] for i in order))
    if depthwise:
        made = replace(made, shape=(native[rank - 2] * native[rank - 1], 1, *native[: rank - 2]))
    return made
