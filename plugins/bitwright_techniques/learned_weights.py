"""A weight whose roundings and scales are learned from the gradient to its rounded value.

Roundings are relaxed as AdaRound does (`rounding_relaxation`): ŵ = s · (low + h(v) · gap), with low and high the codes
beside the float weight at the scales that learning starts from, gap their difference. Scales are s = s₀ · exp(θ), and
learned at held codes, so that both gradients are exact: dŵ/dv = s · gap · h′(v), dŵ/dθ = ŵ. Where only scales are
learned, each step rounds to nearest, and the gradient passes straight through (LSQ, `grids.fake_quantize_vjp`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.grids import NUMPY, Encoding, Groups, fake_quantize, fake_quantize_vjp, fit_pairs, two_level
from bitwright_techniques.rounding_relaxation import GAMMA, ZETA, initial, rectified_sigmoid

Array = NDArray[np.float32]


@dataclass(eq=False)
class Adam:
    """One array's descent (Kingma & Ba 2015)."""

    rate: float
    first: Array | None = None
    second: Array | None = None
    steps: int = 0

    def change(self, gradient: Array) -> Array:
        """What to subtract."""
        if self.first is None or self.second is None:
            self.first, self.second = np.zeros_like(gradient), np.zeros_like(gradient)
        self.steps += 1
        self.first += np.float32(0.1) * (gradient - self.first)
        self.second += np.float32(0.001) * (np.square(gradient) - self.second)
        # The momentum of settled roundings decays into denormal numbers, which are slow.
        self.first[np.abs(self.first) < 1e-20] = 0
        rate = np.float32(self.rate * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps))
        return np.asarray(rate * self.first / (np.sqrt(self.second) + np.float32(1e-12)), np.float32)


@dataclass(frozen=True)
class Learning:
    """What is learned of a weight, and how fast.

    Attributes:
        rounding, scales: what.
        rate, scale_rate: of Adam, on v and on θ.
    """

    rounding: bool
    scales: bool
    rate: float
    scale_rate: float


@dataclass(eq=False)
class LearnedWeight:
    """One weight on an integer grid.

    Attributes:
        weight: float values, canonical layout.
        start: the encoding that learning starts from.
        how: see `Learning`; the scales of a frozen encoding stay.
    """

    weight: Array
    start: Encoding
    how: Learning
    logs: Array = field(init=False)
    """θ, of the scale's shape."""

    def __post_init__(self) -> None:
        grid, groups = self.start.grid, Groups.of(self.weight.shape, self.start.granularity)
        self._groups, self._zero = groups, self.start.zero_point.astype(np.float32)
        self.logs = np.zeros(self.start.scale.shape, np.float32)
        zero = groups.broadcast(NUMPY, self._zero)
        codes = groups.cut(NUMPY, self.weight) / groups.broadcast(NUMPY, self.start.scale)
        self._low = np.asarray(np.clip(np.floor(codes), grid.qmin - zero, grid.qmax - zero), np.float32)
        self._gap = np.asarray(np.clip(np.ceil(codes), grid.qmin - zero, grid.qmax - zero) - self._low, np.float32)
        self._v = initial(codes - self._low)
        self._of_v, self._of_logs = Adam(self.how.rate), Adam(self.how.scale_rate)

    def encoding(self) -> Encoding:
        """The grid as it is now: two-level scales are products, typed ones of their type."""
        if not self.logs.any():
            return self.start
        return two_level(self.start.with_(scale=self.start.scale * np.exp(self.logs), block_scale=None))

    def relaxed(self) -> Array:
        """ŵ while it is learned: between two codes where roundings are."""
        if not self.how.rounding:
            return self.rounded()
        return self._of_codes(self._low + rectified_sigmoid(self._v) * self._gap)

    def rounded(self) -> Array:
        """ŵ on the grid."""
        if self.how.rounding:
            return self._of_codes(self._low + np.where(self._v >= 0, self._gap, 0))
        scale = self.encoding().scale
        found = fake_quantize(NUMPY, self.weight, scale, self._zero, self.start.grid, self._groups)
        return np.asarray(found, np.float32)

    @property
    def nearest(self) -> Array:
        """The weight rounded to nearest on the grid that came in."""
        return self.start.fake_quantize(self.weight)

    def settled(self) -> tuple[int, int]:
        """How many free roundings are within 0.01 of a code, and how many there are."""
        h, free = rectified_sigmoid(self._v), self._gap > 0
        return int((np.minimum(h, 1 - h)[free] < 0.01).sum()), int(free.sum())

    def _of_codes(self, codes: Array) -> Array:
        step = self._groups.broadcast(NUMPY, self.encoding().scale)
        return np.asarray(self._groups.joined(NUMPY, codes * step), np.float32)

    def descend(self, gradient: Array, beta: float | None, regularization: float) -> None:
        """One step.

        Args:
            gradient: of the loss to ŵ (`relaxed`).
            beta: of the regularizer λ · mean(1 − |2h − 1|^β), which drives roundings to a code; None leaves it out.
            regularization: λ.
        """
        groups, scale = self._groups, self.encoding().scale
        if not self.how.rounding:
            found = fake_quantize_vjp(NUMPY, gradient, self.weight, scale, self._zero, self.start.grid, groups)
            assert found.scale is not None
            self.logs -= self._of_logs.change(np.asarray(found.scale * scale, np.float32))
            return
        sigma = 1 / (1 + np.exp(-self._v))
        h = np.clip(sigma * (ZETA - GAMMA) + GAMMA, 0, 1)
        cotangent = groups.cut(NUMPY, gradient)
        step = groups.broadcast(NUMPY, scale)
        slope = cotangent * step
        if beta is not None:
            side = 2 * h - 1
            # |2h − 1| below 0.05 contributes nothing visible, but would end in slow denormal numbers.
            size = np.maximum(np.abs(side), 0.05) ** (beta - 1)
            slope = slope - np.float32(2 * beta * regularization / h.size) * np.copysign(size, side)
        slope = slope * self._gap * sigma * (1 - sigma) * ((ZETA - GAMMA) * ((h > 0) & (h < 1)))
        if self.how.scales and not self.start.frozen:
            value = (self._low + h * self._gap) * step
            self.logs -= self._of_logs.change(np.asarray(groups.reduce(NUMPY, cotangent * value), np.float32))
        self._v -= self._of_v.change(np.asarray(slope, np.float32))

    def result(self, source: str) -> tuple[Array, Encoding]:
        """Weight and encoding to hand back: on its grid and frozen where roundings were learned, else the float weight
        and scales that are kept."""
        found = self.encoding()
        if not self.how.rounding:
            return self.weight, fit_pairs(found.with_(kept=True, source=source), self.weight)
        return self.rounded(), found.with_(frozen=True, source=source)
