"""Roundings by continuous relaxation: AdaRound's own optimizer, with analytic gradients in moments.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", §3.4: each rounding h ∈ [0, 1] is
a stretched sigmoid of a variable V, and a regularizer λ Σ (1 − |2h − 1|^β) drives it to 0 or 1 as β falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid (eq. 23): wider than [0, 1], so that its gradient doesn't vanish at 0 and 1."""


@dataclass(frozen=True)
class Relaxation:
    """Hyperparameters of the descent; those of the paper, with fewer and longer steps: they see all data at once.

    Attributes:
        iterations: steps of Adam.
        learning_rate: of Adam.
        beta: β at the end of the warm start and at the end.
        warm_start: share of the iterations before the regularizer sets in.
    """

    iterations: int = 1500
    learning_rate: float = 3e-2
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2

    def beta_at(self, iteration: int) -> float | None:
        """β of an iteration, cosine-annealed; None during the warm start."""
        begin = self.warm_start * self.iterations
        if iteration < begin:
            return None
        t = (iteration - begin) / max(self.iterations - begin, 1)
        first, last = self.beta
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * t))


def rectified_sigmoid(v: Array) -> Array:
    """h(V) = clip(σ(V)(ζ − γ) + γ, 0, 1)."""
    return np.asarray(np.clip((ZETA - GAMMA) / (1 + np.exp(-v)) + GAMMA, 0, 1))


def initial(fraction: Array) -> Array:
    """V at which h equals the fraction of a step that lies below the weight."""
    return np.asarray(-np.log((ZETA - GAMMA) / (np.clip(fraction, 0, 1) - GAMMA) - 1), np.float32)


@dataclass(frozen=True, eq=False)
class RelaxedRounding:
    """The relaxed problem of one layer: ``L(V) = (ŵ − T) Ĥ (ŵ − T)ᵀ / norm + λ Σ (1 − |2h − 1|^β)`` for each row.

    ŵ = s (low + h(V) (high − low)); the regularizer runs over free roundings, those with high > low.

    Attributes:
        gram: Ĥ, (groups, K, K).
        target: T, (groups, rows, K).
        step: s, (groups, rows, 1 or K).
        low, high: the two codes of each weight, (groups, rows, K).
        regularization: λ.
    """

    gram: Array
    target: Array
    step: Array
    low: Array
    high: Array
    regularization: float

    @cached_property
    def gap(self) -> Array:
        """1 where there is a choice, else 0."""
        return self.high - self.low

    @cached_property
    def norm(self) -> Array:
        """Mean of s²·Ĥ_kk over a row, (groups, rows, 1): equal curvature in every row lets one λ serve all layers."""
        diagonal = np.einsum("gkk->gk", self.gram)[:, None, :]
        steps = np.broadcast_to(self.step, self.target.shape)
        return np.asarray(np.mean(diagonal * steps**2, axis=2, keepdims=True))

    def loss(self, v: Array, beta: float | None) -> Array:
        """L of each row, (groups, rows); β None leaves the regularizer out."""
        h = rectified_sigmoid(v)
        error = self.step * (self.low + h * self.gap) - self.target
        loss = np.einsum("grk,grk->gr", error @ self.gram, error) / self.norm[..., 0]
        if beta is not None:
            loss = loss + self.regularization * ((1 - np.abs(2 * h - 1) ** beta) * self.gap).sum(axis=2)
        return np.asarray(loss)

    def gradient(self, v: Array, beta: float | None) -> Array:
        """dL/dV, (groups, rows, K)."""
        sigma = 1 / (1 + np.exp(-v))
        h = np.clip(sigma * (ZETA - GAMMA) + GAMMA, 0, 1)
        error = h * self.gap
        error += self.low
        error *= self.step
        error -= self.target
        slope = error @ self.gram
        slope *= self.step * (2 / self.norm)
        if beta is not None:
            side = 2 * h - 1
            # |2h − 1| below 0.05 contributes nothing visible, but would end in slow denormal numbers.
            size = np.maximum(np.abs(side), 0.05) ** (beta - 1)
            slope -= (2 * beta * self.regularization) * np.copysign(size, side)
        slope *= self.gap
        slope *= sigma * (1 - sigma) * ((ZETA - GAMMA) * ((h > 0) & (h < 1)))
        return np.asarray(slope)


def relax(problem: RelaxedRounding, weight: Array, schedule: Relaxation) -> tuple[Array, float]:
    """Choose the code below or above each weight by Adam on V.

    Args:
        problem: the layer.
        weight: W, (groups, rows, K), whose position between its two codes is where h starts.
        schedule: hyperparameters.

    Returns:
        codes (groups, rows, K), and the share of free roundings that had settled (h within 0.01 of 0 or 1) before
        they were made hard.
    """
    v = initial(weight / problem.step - problem.low)
    first, second = np.zeros_like(v), np.zeros_like(v)
    decay = (0.9, 0.999)
    for i in range(schedule.iterations):
        slope = problem.gradient(v, schedule.beta_at(i))
        first *= decay[0]
        first += (1 - decay[0]) * slope
        second *= decay[1]
        second += (1 - decay[1]) * slope**2
        rate = schedule.learning_rate * np.sqrt(1 - decay[1] ** (i + 1)) / (1 - decay[0] ** (i + 1))
        v -= np.float32(rate) * first / (np.sqrt(second) + np.float32(1e-8))
        if i % 100 == 99:
            # The momentum of settled roundings decays into denormal numbers, which are slow.
            first[np.abs(first) < 1e-20] = 0
    h = rectified_sigmoid(v)
    free = problem.gap > 0
    settled = float(np.mean(np.minimum(h, 1 - h)[free] < 0.01)) if free.any() else 1.0
    return problem.low + np.where(v >= 0, problem.gap, 0).astype(np.float32), settled
