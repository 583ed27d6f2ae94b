"""A small framework: a model is a list of layers; tensors are (samples, height, width, channels), kernels
(height, width, in, out) and (in, out)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]


def conv2d(x: Array, kernel: Array, bias: Array, *, stride: int, pad: int) -> Array:
    """A convolution with a bias."""
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.tensordot(windows, kernel, axes=((4, 5, 3), (0, 1, 2))) + bias


def dense(x: Array, kernel: Array, bias: Array) -> Array:
    """A matrix product with a bias."""
    return x @ kernel + bias


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


def max_pool(x: Array, *, size: int) -> Array:
    """The largest of each window of size × size; windows don't overlap."""
    windows = sliding_window_view(x, (size, size), axis=(1, 2))[:, ::size, ::size]
    return np.asarray(windows.max((4, 5)))


def mean(x: Array) -> Array:
    """Over height and width."""
    return np.asarray(x.mean((1, 2), dtype=np.float32))


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution."""

    name: str
    kernel: Array
    bias: Array
    stride: int = 1
    pad: int = 0

    def __call__(self, x: Array) -> Array:
        """Compute it."""
        return conv2d(x, self.kernel, self.bias, stride=self.stride, pad=self.pad)


@dataclass(frozen=True, eq=False)
class Dense:
    """A fully connected layer."""

    name: str
    kernel: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Compute it."""
        return dense(x, self.kernel, self.bias)


@dataclass(frozen=True)
class Relu:
    """A rectifier."""

    name: str

    def __call__(self, x: Array) -> Array:
        """Compute it."""
        return relu(x)


@dataclass(frozen=True)
class MaxPool:
    """Max pooling."""

    name: str
    size: int = 2

    def __call__(self, x: Array) -> Array:
        """Compute it."""
        return max_pool(x, size=self.size)


@dataclass(frozen=True)
class Mean:
    """Global pooling."""

    name: str

    def __call__(self, x: Array) -> Array:
        """Compute it."""
        return mean(x)


Layer = Conv | Dense | Relu | MaxPool | Mean


class Net(list[Layer]):
    """A model."""

    def __call__(self, x: Array) -> Array:
        """All layers, one after the other."""
        for layer in self:
            x = layer(x)
        return x
