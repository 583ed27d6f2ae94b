"""Roundings by discrete search: successive rounding for a start, coordinate descent, and kicks out of local optima.

All solve, for every row of a weight matrix at once, ``minimise (c·s − T) Ĥ (c·s − T)ᵀ`` over integer codes
``low ≤ c ≤ high``. Rows are independent. Work is done in blocks of features with lazy updates, as in GPTQ
(Frantar et al. 2023, §3.3), so that matrix products carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.wide_factor import LIFTS, WIDE, factor_in_place

Array = NDArray[np.float32]

Selection = slice | NDArray[np.intp]

_BLOCK = 32


@dataclass(frozen=True, eq=False)
class RoundingProblem:
    """One problem per row, features first so that inner loops walk contiguous memory.

    Attributes:
        gram: Ĥ, (groups, K, K), float32, symmetric with a positive diagonal.
        target: T, (groups, K, rows), float32.
        step: s, (groups, 1 or K, rows).
        low, high: bounds of the codes, (groups, 1 or K, rows).
        snap: the nearest codes where nothing bounds them. `kick` alone takes no others than whole numbers.
    """

    gram: Array
    target: Array
    step: Array
    low: Array
    high: Array
    snap: Callable[[Array], Array] = np.rint

    @classmethod
    def of(
        cls, gram: Array, target: Array, step: Array, low: Array, high: Array, snap: Callable[[Array], Array] = np.rint
    ) -> RoundingProblem:
        """From matrices in `linear_form`'s order, (groups, rows, K)."""
        return cls(gram, turn(target), turn(step), turn(low), turn(high), snap)

    def loss(self, codes: Array) -> Array:
        """Objective of each row, (groups, rows)."""
        error = codes * self.step - self.target
        return np.asarray(np.einsum("gkr,gkr->gr", self.gram @ error, error))

    @property
    def grouped(self) -> bool:
        """Whether there are several groups; selections are then of groups, else of rows."""
        return len(self.gram) > 1

    def select(self, chosen: Selection) -> RoundingProblem:
        """The problem of some groups, or of some rows where there is one group."""
        gram = self.gram[chosen] if self.grouped else self.gram
        target, step, low, high = (self.cut(a, chosen) for a in (self.target, self.step, self.low, self.high))
        return replace(self, gram=gram, target=target, step=step, low=low, high=high)

    def cut(self, array: Array, chosen: Selection) -> Array:
        """The part of a (groups, features, rows) array that belongs to a selection."""
        return array[chosen] if self.grouped else array[:, :, chosen]

    def at(self, array: Array, feature: int) -> Array:
        """Row `feature` of a step or bound that may be shared by all features, (groups, rows)."""
        return array[:, feature if array.shape[1] > 1 else 0]


def turn(matrix: NDArray[np.floating]) -> Array:
    """(groups, rows, K) ↔ (groups, K, rows), contiguous float32."""
    return np.ascontiguousarray(np.swapaxes(matrix, 1, 2), np.float32)


def coordinate_descent(problem: RoundingProblem, codes: Array, *, max_sweeps: int = 20) -> Array:
    """Move each code in turn to its optimum, the others held, until a sweep changes nothing.

    The error is a parabola in one code, so its optimum over the allowed ones is the nearest to the unconstrained one,
    clipped; no move raises the error. Rows that a sweep left alone are done and drop out of the next.

    Args:
        problem: what to minimise.
        codes: feasible start, (groups, K, rows); not modified.
        max_sweeps: upper bound.
    """
    codes = codes.copy()
    active: Selection = slice(None)
    for _ in range(max_sweeps):
        part, mine = problem.select(active), problem.cut(codes, active)
        after = _sweep(part, mine)
        changed = (after != mine).any(axis=(1, 2) if problem.grouped else (0, 1))
        if problem.grouped:
            codes[active] = after
        else:
            codes[:, :, active] = after
        if not changed.any():
            break
        active = np.flatnonzero(changed) if isinstance(active, slice) else active[changed]
    return codes


def _sweep(problem: RoundingProblem, codes: Array) -> Array:
    """One pass over all features."""
    codes = codes.copy()
    gram, step, features = problem.gram, problem.step, codes.shape[1]
    per_code = 1.0 / (np.einsum("gkk->gk", gram)[:, :, None] * step)
    # Of a feature's slope only the value at its own turn counts, so that a move updates the features after it and no
    # other: those of its block at once, the rest by one matrix product when the block is through.
    slope = gram @ (codes * step - problem.target)
    for begin in range(0, features, _BLOCK):
        end = min(begin + _BLOCK, features)
        before = codes[:, begin:end].copy()
        local = slope[:, begin:end].copy()
        for k in range(begin, end):
            best = local[:, k - begin] * per_code[:, k]
            np.subtract(codes[:, k], best, out=best)
            best = problem.snap(best)
            np.clip(best, problem.at(problem.low, k), problem.at(problem.high, k), out=best)
            moved = best - codes[:, k]
            if moved.any():
                codes[:, k] = best
                moved *= problem.at(step, k)
                local[:, k - begin + 1 :] += gram[:, k, k + 1 : end, None] * moved[:, None]
        change = codes[:, begin:end] - before
        if end < features and change.any():
            change *= step[:, begin:end] if step.shape[1] > 1 else step
            slope[:, end:] += gram[:, end:, begin:end] @ change
    return codes


def act_order(diagonal: NDArray[np.floating]) -> NDArray[np.intp]:
    """Features by falling second moment, (groups, K): large ones first, while later ones can still make up for them
    (GPTQ's act-order).

    Args:
        diagonal: of Ĥ, (groups, K).
    """
    return np.argsort(-diagonal, axis=1, kind="stable")


def factor(gram: NDArray[np.floating], order: NDArray[np.intp] | None = None) -> tuple[NDArray[np.intp], Array]:
    """Upper factor U of the inverse Ĥ in an order of its features, for `successive_rounding`.

    Ĥ[order][:, order]⁻¹ = Uᵀ U.

    Args:
        gram: Ĥ, (groups, K, K).
        order: (groups, K); None for `act_order`.

    Returns:
        order (groups, K) and U (groups, K, K).

    Raises:
        LinAlgError: a matrix isn't finite, or far from positive definite.
    """
    if order is None:
        order = act_order(np.einsum("gkk->gk", gram))
    if order.shape[1] > WIDE:
        return order, np.stack([factor_in_place(g, o) for g, o in zip(gram, order, strict=True)])
    lead = np.arange(len(gram))[:, None, None]
    sorted_gram = gram[lead, order[:, :, None], order[:, None, :]].astype(np.float64)
    # With Ĥ = R Rᵀ, R upper (a Cholesky factor from the last feature up), U = R⁻¹: no inverse is squared.
    reverse = _cholesky(sorted_gram[:, ::-1, ::-1])[:, ::-1, ::-1]
    return order, _inverse(reverse).astype(np.float32)


def _inverse(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of upper triangular matrices, (groups, K, K), by halves: K³/3 operations, nearly all in matrix products."""
    half = upper.shape[1] // 2
    if half < _BLOCK:
        return np.asarray(np.linalg.inv(upper), np.float64)
    result = np.zeros_like(upper)
    result[:, :half, :half] = first = _inverse(upper[:, :half, :half])
    result[:, half:, half:] = last = _inverse(upper[:, half:, half:])
    result[:, :half, half:] = -first @ (upper[:, :half, half:] @ last)
    return result


def _cholesky(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Cholesky factor, (groups, K, K); what rounding has taken below zero is lifted by as little as it takes.

    Raises:
        LinAlgError: a matrix isn't finite, or far from positive definite.
    """
    trace = np.einsum("gkk->g", gram)[:, None, None]
    for lift in (0.0, *LIFTS):
        try:
            return np.linalg.cholesky(gram + lift * trace * np.eye(gram.shape[1]) if lift else gram)
        except np.linalg.LinAlgError:
            if lift == LIFTS[-1] or not np.isfinite(trace).all():
                raise
    raise AssertionError("unreachable")


def successive_rounding(
    problem: RoundingProblem, order: NDArray[np.intp], upper: Array, *, block: int = _BLOCK
) -> Array:
    """Round feature after feature, spreading each error over those still free (GPTQ; Babai's nearest plane).

    Args:
        problem: what to minimise.
        order, upper: from `factor(problem.gram)`.
        block: features between two updates of all that follow (lazy updates: the same result, in fewer passes).

    Returns:
        Feasible codes, (groups, K, rows).
    """
    lead = np.arange(len(order))[:, None]

    def sort(array: Array) -> Array:
        return array if array.shape[1] == 1 else array[lead, order]

    free, step = sort(problem.target), sort(problem.step)
    low, high = sort(problem.low), sort(problem.high)
    codes, features = np.empty_like(free), free.shape[1]
    # Row k of U over its diagonal is minus what the features after k take over of a unit of k's error: the minimum of
    # the loss over all that is still free.
    pivot = np.einsum("gkk->gk", upper)
    for begin in range(0, features, block):
        end = min(begin + block, features)
        spill = np.empty_like(free[:, begin:end])
        for k in range(begin, end):
            s = problem.at(step, k)
            code = problem.snap(free[:, k] / s)
            np.clip(code, problem.at(low, k), problem.at(high, k), out=code)
            codes[:, k] = code
            spill[:, k - begin] = (free[:, k] - code * s) / pivot[:, k, None]
            free[:, k + 1 : end] -= upper[:, k, k + 1 : end, None] * spill[:, None, k - begin]
        free[:, end:] -= np.swapaxes(upper[:, begin:end, end:], 1, 2) @ spill
    result = np.empty_like(codes)
    result[lead, order] = codes
    return result


def kick(problem: RoundingProblem, codes: Array, rng: np.random.Generator, *, kicks: int, share: float = 0.02) -> Array:
    """Iterated local search: move a few random codes of every row, descend again, keep what improved.

    Args:
        problem: what to minimise.
        codes: a local optimum, (groups, K, rows).
        rng: source of the moves.
        kicks: number of tries.
        share: share of a row's codes that a kick moves, at least two of them.

    Returns:
        Codes whose loss is, row by row, no greater.
    """
    # A descent ends where no single code gains; at two changed codes or more, it may end elsewhere. Kicks are tried on
    # all rows at once, since each row keeps or drops its own.
    best, loss = codes, problem.loss(codes)
    rate = max(share, 2 / codes.shape[1])
    for _ in range(kicks):
        jump = rng.random(codes.shape, np.float32)
        direction = np.where(jump < rate / 2, 1, -1) * (jump < rate)
        # A code at one of its two bounds can only move to the other side.
        moved = best + direction
        moved = np.where((moved > problem.high) | (moved < problem.low), best - direction, moved).astype(np.float32)
        trial = coordinate_descent(problem, np.clip(moved, problem.low, problem.high), max_sweeps=4)
        trial_loss = problem.loss(trial)
        better = trial_loss < loss
        best = np.where(better[:, None], trial, best)
        loss = np.where(better, trial_loss, loss)
    return best
