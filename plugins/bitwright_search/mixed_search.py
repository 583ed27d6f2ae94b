"""Phase 2 of `mixed_precision`: from noise and cost to assignments, and from assignments to evaluated networks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from bitwright.data import Dataset
from bitwright.errors import InputError
from bitwright.runs import identity
from bitwright.simulation import QuantSim
from bitwright.technique import Step
from bitwright_search.candidates import Candidate, Group
from bitwright_search.drops import ONE_SAMPLE, SCORE_FORM, Allowance, read_score, recorded
from bitwright_search.evaluation import Evaluate, Mode, Score, measure, warn_of_guessing
from bitwright_search.mixed_result import FrontPoint, MixedPrecisionResult, Sensitivity
from bitwright_search.scores import metric_of
from bitwright_search.sensitivity import decibels
from bitwright_search.solvers import (
    Choice,
    Point,
    Solver,
    Table,
    cheapest,
    dearest,
    front,
    point,
    solve,
    undominated,
    within,
)
from bitwright_search.stages import Built, Record, SearchStore, content_of


@dataclass(frozen=True)
class Goal:
    """What is wanted, see `mixed_precision`."""

    allowance: Allowance | None
    budget: float | None
    lite: float | None


@dataclass
class MixedSearch:
    """One search.

    Args:
        sim: the model as it was given; never changed.
        data: calibration data.
        evaluate: the user's evaluation; None decides by noise alone.
        stages: where finished stages are kept.
        groups, candidates, costs, noises: what is chosen between; tables are (groups, candidates).
        nats: what `noises` are is predicted divergences from float, in nats a position, and not relative noise.
        outside: cost of what no group decides on.
        solver, goal, steps: see `mixed_precision`.
    """

    sim: QuantSim
    data: Dataset
    evaluate: Evaluate | None
    stages: SearchStore
    groups: Sequence[Group]
    candidates: Sequence[Candidate]
    costs: Table
    noises: Table
    nats: bool
    outside: float
    solver: Solver
    goal: Goal
    steps: tuple[Step, ...]
    scores: dict[Choice, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._content, self._data = content_of(self.sim), self.data.fingerprint()
        self._evaluation = "" if self.evaluate is None else identity(self.evaluate)
        self._opened = {"run": self.sim.run, "progress": self.sim.progress, "source": self.sim.source,
                        "workers": self.sim.workers}  # fmt: skip
        self._networks: dict[Choice, Built] = {}
        precise = np.where(np.isfinite(self.noises), self.costs, -np.inf).argmax(axis=1)
        self.reference = point(tuple(map(int, precise)), self.costs, self.noises)
        """Every group at its dearest candidate: what a uniform network of the most precise types costs."""

    def run(self, kind: str, notes: Sequence[str]) -> MixedPrecisionResult:
        """Search, and tell."""
        points = front(self.costs, self.noises, self.solver)
        reference = None
        if self.goal.lite is not None:
            chosen = self._lite(self.goal.lite)
        elif self.goal.allowance is None:
            chosen = self._solve()
        if self.evaluate is not None:
            reference = self._float_score()
            if self.goal.allowance is not None:
                self.goal.allowance.check(reference)
                chosen = self._bisect(points, reference)
            else:
                self._score(chosen.choice)
            self._score(self.reference.choice)
        built = self._built(chosen.choice)
        score = self.scores.get(chosen.choice)
        lost = None if score is None or reference is None else self._allowance.lost(reference, score)
        if lost is not None and lost.margin is None and self._allowance.confidence is not None:
            self.notes.append(ONE_SAMPLE)
        met = self._good(score, reference) and within(chosen.cost, self._limit)
        told = undominated([*points, chosen])
        measured = [
            self._told(p) for c in self.scores if c != chosen.choice for p in [point(c, self.costs, self.noises)]
        ]
        return MixedPrecisionResult(
            sim=built.sim,
            assignment=self._assignment(chosen.choice),
            cost=chosen.cost + self.outside,
            reference_cost=self.reference.cost + self.outside,
            cost_kind=kind,
            solver=self.solver,
            score=_value(score),
            float_score=_value(reference),
            reference_score=_value(self.scores.get(self.reference.choice)),
            allowed_drop=None if self.goal.allowance is None else self.goal.allowance.drop,
            margin=None if lost is None else lost.margin,
            confidence=None if lost is None else self._allowance.judged(lost),
            met=met,
            predicted_kl=chosen.noise if self.nats else None,
            front=tuple(map(self._told, told)),
            measured=monotone([*measured, self._told(chosen)] if chosen.choice in self.scores else measured),
            sensitivities=tuple(self._sensitivities()),
            notes=(*notes, *self.notes),
            seconds=self.stages.clock.total,
            target=self.sim.target.name,
            metric=metric_of(self.evaluate),
        )

    # -- choosing

    @property
    def _allowance(self) -> Allowance:
        return self.goal.allowance or Allowance(0.0)

    @property
    def _limit(self) -> float:
        """The budget for what the groups decide on, in the cost's unit."""
        if self.goal.budget is None:
            return math.inf
        return self.goal.budget * (self.reference.cost + self.outside) - self.outside

    def _solve(self) -> Point:
        """The assignment of least noise within the budget.

        Raises:
            InputError: even the cheapest assignment costs more.
        """
        limit, budget = self._limit, self.goal.budget
        least = point(cheapest(self.costs, self.noises), self.costs, self.noises).cost
        if budget is not None and not within(least, limit):
            share = (least + self.outside) / (self.reference.cost + self.outside)
            raise InputError(
                f"budget={budget:g} of the reference's cost is below the cheapest assignment, {share:.4g} of it; add "
                "cheaper candidates, or allow more"
            )
        return solve(self.costs, self.noises, limit, self.solver)

    def _lite(self, percent: float) -> Point:
        """Everything at the cheapest candidate, the most sensitive at the most precise."""
        low, high = cheapest(self.costs, self.noises), dearest(self.costs, self.noises)
        rows = np.arange(len(self.groups))
        order = np.argsort(-self.noises[rows, low], kind="stable")
        flipped = set(order[: math.ceil(len(self.groups) * percent / 100)].tolist())
        return point([h if g in flipped else c for g, (c, h) in enumerate(zip(low, high, strict=True))], self.costs,
                     self.noises)  # fmt: skip

    def _bisect(self, points: Sequence[Point], reference: Score) -> Point:
        """The cheapest assignment on the front that reaches the goal, where scores rise along it.

        Where they don't, it is one that reaches the goal all the same. If none that is tried does, it is the one with
        the best score.
        """
        allowed = [p for p in points if within(p.cost, self._limit)]
        if not allowed:
            # Raises, and says what the least cost is.
            allowed = [self._solve()]
        low, high = 0, len(allowed) - 1
        if self._reaches(allowed[low], reference):
            return allowed[low]
        if not self._reaches(allowed[high], reference):
            best = max(allowed, key=lambda p: (_value(self.scores.get(p.choice), -math.inf), -p.cost))
            self.notes.append(
                "not even the most precise assignment reaches the goal; the best that was evaluated is returned. Add a "
                "more precise candidate, or give techniques"
            )
            return best
        while high - low > 1:
            middle = (low + high) // 2
            if self._reaches(allowed[middle], reference):
                high = middle
            else:
                low = middle
        return allowed[high]

    def _reaches(self, candidate: Point, reference: Score) -> bool:
        return self._allowance.keeps(reference, self._score(candidate.choice))

    def _good(self, score: Score | None, reference: Score | None) -> bool:
        if self.goal.allowance is None or score is None or reference is None:
            return self.goal.allowance is None
        return self.goal.allowance.keeps(reference, score)

    # -- networks

    def _built(self, choice: Choice) -> Built:
        """The network of an assignment: types, techniques, calibration."""
        if choice not in self._networks:
            self._networks[choice] = self._build(choice)
        return self._networks[choice]

    def _build(self, choice: Choice) -> Built:
        depends = {"base": self._content, "data": self._data, "assignment": self._assignment(choice),
                   "schemes": [self.sim.scheme, self.sim.weight_scheme],
                   "steps": [[s.technique, dict(s.settings)] for s in self.steps]}  # fmt: skip

        def make() -> QuantSim:
            twin = self.sim.retyped(self._types(choice))
            for step in self.steps:
                twin.apply(step.technique, self.data, **step.settings)
            return twin.calibrate(self.data)

        return self.stages.build("mixed precision: network", depends, make, self._opened)

    def _types(self, choice: Choice) -> dict[str, str]:
        found: dict[str, str] = {}
        for group, c in zip(self.groups, choice, strict=True):
            found |= group.types(self.sim, self.candidates[c])
        return found

    def _score(self, choice: Choice) -> Score:
        if choice not in self.scores:
            self.scores[choice] = self._evaluated(self._built(choice), Mode.FULL)
        return self.scores[choice]

    def _float_score(self) -> Score:
        found = self._evaluated(self._built(self.reference.choice), Mode.FLOAT)
        if self.evaluate is not None:
            warn_of_guessing(self.evaluate, self.sim, found)
        return found

    def _evaluated(self, built: Built, mode: Mode) -> Score:
        assert self.evaluate is not None
        evaluate = self.evaluate
        depends = {"network": built.content, "mode": str(mode), "evaluation": self._evaluation,
                   "form": SCORE_FORM}  # fmt: skip

        def work() -> Record:
            self.sim.progress.start("Evaluating", 1)
            try:
                score, seconds = measure(evaluate, built.sim, mode)
                self.sim.progress.advance()
            finally:
                self.sim.progress.finish()
            return {**recorded(score), "seconds": seconds}

        return read_score(self.stages.once("mixed precision: evaluate", depends, work))

    # -- telling

    def _assignment(self, choice: Choice) -> dict[str, str]:
        return {g.name: str(self.candidates[c]) for g, c in zip(self.groups, choice, strict=True)}

    def _told(self, p: Point) -> FrontPoint:
        assignment = self._assignment(p.choice)
        total, reference = p.cost + self.outside, self.reference.cost + self.outside
        return FrontPoint(
            cost=total,
            relative_cost=total / reference if reference else 1.0,
            predicted_sqnr_db=None if self.nats else decibels(p.noise),
            predicted_kl=p.noise if self.nats else None,
            score=_value(self.scores.get(p.choice)),
            counts=dict(Counter(assignment.values())),
            assignment=assignment,
        )

    def _sensitivities(self) -> list[Sensitivity]:
        return [
            Sensitivity(
                g.name,
                str(self.candidates[c]),
                None if self.nats else decibels(float(self.noises[i, c])),
                float(self.costs[i, c]),
                float(self.noises[i, c]) if self.nats else None,
            )
            for i, g in enumerate(self.groups)
            for c in g.allowed
        ]


@overload
def _value(score: Score | None) -> float | None: ...


@overload
def _value(score: Score | None, otherwise: float) -> float: ...


def _value(score: Score | None, otherwise: float | None = None) -> float | None:
    return otherwise if score is None else score.value


def monotone(points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Evaluated points by rising cost with strictly rising score."""
    kept: list[FrontPoint] = []
    for p in sorted(points, key=lambda p: (p.cost, -(p.score or 0.0))):
        if p.score is not None and (not kept or p.score > (kept[-1].score or -math.inf)):
            kept.append(p)
    return tuple(kept)
