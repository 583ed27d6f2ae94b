"""Roundings by discrete search: successive rounding for a start, coordinate descent, and kicks out of local optima.

All solve, for every row of a weight matrix at once, ``minimise (c·s − T) Ĥ (c·s − T)ᵀ`` over integer codes
``low ≤ c ≤ high``. Rows are independent. Work is done in blocks of features with lazy updates, as in GPTQ
(Frantar et al. 2023, §3.3), so that matrix products carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.wide_factor import LIFTS, WIDE, factor_in_place

Array = NDArray[np.float32]

Index = NDArray[np.intp]
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

    def run(self, features: slice) -> RoundingProblem:
        """The problem of a run of features, as far as it is its own."""
        target, step, low, high = (
            a[:, features] if a.shape[1] > 1 else a for a in (self.target, self.step, self.low, self.high)
        )
        return replace(self, gram=self.gram[:, features, features], target=target, step=step, low=low, high=high)

    def at(self, array: Array, feature: int) -> Array:
        """Row `feature` of a step or bound that may be shared by all features, (groups, rows)."""
        return array[:, feature if array.shape[1] > 1 else 0]


@dataclass(frozen=True, eq=False)
class Settled:
    """Codes of a weight that have been chosen, features first, and what is known of them.

    Attributes:
        turned: (groups, K, rows).
        error: c·s − T, shaped likewise.
        loss: output error of each row, (groups, rows).
    """

    turned: Array
    error: Array | None = None
    loss: NDArray[np.float64] | None = None

    @cached_property
    def codes(self) -> Array:
        """In `linear_form`'s order, (groups, rows, K)."""
        return turn(self.turned)


def least_of(count: int, owners: int, cost: Callable[[Index, NDArray[np.bool_]], NDArray[np.float64]]) -> Index:
    """For each owner the candidate of least cost, (owners,), its cost taken for one valley; the first on ties.

    Every other one is tried from the first on, until the cost doesn't fall, and then the one between the best and the
    better of its neighbours.

    Args:
        count: candidates of each.
        owners: how many.
        cost: what candidates cost, (owners,), one for each owner; asked about some owners, the others' don't matter.
    """
    best, falling = np.zeros(owners, np.intp), np.ones(owners, bool)
    least, before, after = np.full(owners, np.inf), np.full(owners, np.inf), np.full(owners, -np.inf)
    for candidate in range(0, count, 2):
        found = cost(np.full(owners, candidate), falling)
        lower = falling & (found < least)
        after[falling & ~lower] = found[falling & ~lower]
        before[lower], least[lower], best[lower] = least[lower], found[lower], candidate
        falling = lower
        if not falling.any():
            break
    near = np.maximum(best + np.where((after < before) & (best < count - 1), 1, -1), 0)
    found = cost(near, np.ones(owners, bool))
    return np.where((found < least) | ((found == least) & (near < best)), near, best)


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
    moved = codes * problem.step
    moved -= problem.target
    slope = problem.gram @ moved
    for run in runs(codes.shape[1], _BLOCK):
        before = slice(run.start)
        now = slope[:, run]
        if run.start:
            now += problem.gram[:, run, before] @ moved[:, before]
        moved[:, run] = descend(problem.run(run), codes[:, run], now)
    return codes


def runs(features: int, width: int) -> list[slice]:
    """Features in runs of a width; the last may be shorter."""
    return [slice(begin, min(begin + width, features)) for begin in range(0, features, width)]


def descend(problem: RoundingProblem, codes: Array, slope: Array) -> Array:
    """Move the codes of a run of features to their optima, in place, one after another.

    Of a feature's slope only the value at its own turn counts: a move reaches those after it in the run when theirs
    comes, and the features after the run through what is returned.

    Args:
        problem: of the run.
        codes: (groups, n, rows); written.
        slope: Ĥ (c·s − T) of the run's features, (groups, n, rows).

    Returns:
        What the values have moved by, (groups, n, rows).
    """
    gram, step = problem.gram, problem.step
    per_code = 1.0 / (np.einsum("gkk->gk", gram)[:, :, None] * step)
    moved = np.empty_like(slope)
    for k in range(slope.shape[1]):
        now = slope[:, k]
        if k:
            now = now + _product(gram[:, k, :k], moved[:, :k])
        code = now * per_code[:, k]
        np.subtract(codes[:, k], code, out=code)
        code = clipped(problem.snap(code), problem.at(problem.low, k), problem.at(problem.high, k))
        np.subtract(code, codes[:, k], out=moved[:, k])
        moved[:, k] *= problem.at(step, k)
        codes[:, k] = code
    return moved


def clipped(codes: Array, low: Array, high: Array) -> Array:
    """Codes between bounds, in place (np.clip takes twice as long on a row)."""
    return np.minimum(np.maximum(codes, low, out=codes), high, out=codes)


def _product(row: Array, matrix: Array) -> Array:
    """(groups, n) · (groups, n, rows) → (groups, rows)."""
    return np.asarray(np.matmul(row[:, None], matrix)[:, 0])


def act_order(diagonal: NDArray[np.floating]) -> NDArray[np.intp]:
    """Features by falling second moment, (groups, K): large ones first, while later ones can still make up for them
    (GPTQ's act-order).

    Args:
        diagonal: of Ĥ, (groups, K).
    """
    return np.argsort(-diagonal, axis=1, kind="stable")


def factor(gram: NDArray[np.floating], order: NDArray[np.intp] | None = None) -> tuple[NDArray[np.intp], Array]:
    """Triangular factor of Ĥ in an order of its features, for `successive_rounding`.

    Ĥ[order][:, order] = R Rᵀ. GPTQ is written with the factor of Ĥ⁻¹, which is the inverse of R: with R itself nothing
    has to be inverted.

    Args:
        gram: Ĥ, (groups, K, K).
        order: (groups, K); None for `act_order`.

    Returns:
        order (groups, K) and R, upper, (groups, K, K).

    Raises:
        LinAlgError: a matrix isn't finite, or far from positive definite.
    """
    if order is None:
        order = act_order(np.einsum("gkk->gk", gram))
    if order.shape[1] > WIDE:
        return order, np.stack([factor_in_place(g, o) for g, o in zip(gram, order, strict=True)])
    # A Cholesky factor from the last feature up.
    backwards = np.stack([g.take(o, 0).take(o, 1) for g, o in zip(gram, order[:, ::-1], strict=True)])
    return order, np.ascontiguousarray(_cholesky(backwards.astype(np.float64)).astype(np.float32)[:, ::-1, ::-1])


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

    target, step = sort(problem.target), sort(problem.step)
    low, high = sort(problem.low), sort(problem.high)
    posed = replace(problem, target=target, step=step, low=low, high=high)
    codes, error = np.empty_like(target), np.empty_like(target)
    for run in runs(target.shape[1], block):
        codes[:, run], error[:, run] = settle(posed.run(run), upper[:, run, run], carried(upper, run, error))
    result = np.empty_like(codes)
    result[lead, order] = codes
    return result


def carried(upper: Array, run: slice, error: Array) -> Array:
    """Of a run of features, Rᵀ e as far as the features before it make it, (groups, n, rows)."""
    before = slice(run.start)
    return np.asarray(np.swapaxes(upper[:, before, run], 1, 2) @ error[:, before])


def settle(problem: RoundingProblem, upper: Array, so_far: Array) -> tuple[Array, Array]:
    """Round a run of features successively.

    With e = c·s − T the objective is ‖Rᵀ e‖², whose k-th part is decided by feature k once those before it are
    settled: it is least at T_k − (Σ_{j<k} R_jk e_j) / R_kk.

    Args:
        problem: of the run, features in the order of rounding.
        upper: R of the run, (groups, n, n).
        so_far: what is `carried` into the run, (groups, n, rows).

    Returns:
        Codes and e, both (groups, n, rows).
    """
    codes, error = np.empty_like(so_far), np.empty_like(so_far)
    lower = np.ascontiguousarray(np.swapaxes(upper, 1, 2))
    pivot = np.einsum("gkk->gk", upper)
    for k in range(so_far.shape[1]):
        part = so_far[:, k]
        if k:
            part = part + _product(lower[:, k, :k], error[:, :k])
        target, step = problem.target[:, k], problem.at(problem.step, k)
        code = target - part / pivot[:, k, None]
        code /= step
        codes[:, k] = clipped(problem.snap(code), problem.at(problem.low, k), problem.at(problem.high, k))
        np.multiply(codes[:, k], step, out=error[:, k])
        error[:, k] -= target
    return codes, error


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
