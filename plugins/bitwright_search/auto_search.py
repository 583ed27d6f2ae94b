"""The search of `auto_quantize`: which network is tried next, on top of what, and when it is good enough."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field

from bitwright.data import Dataset
from bitwright.errors import BitwrightError, CapabilityError, InputError, WriteError
from bitwright.placement import SiteId
from bitwright.plugins import registry
from bitwright.runs import identity
from bitwright.simulation import QuantSim
from bitwright.technique import Step
from bitwright.workers import Workers
from bitwright_search.auto_result import Status, Trial
from bitwright_search.drops import SCORE_FORM, Allowance, Drop, read_score, recorded
from bitwright_search.evaluation import Evaluate, Mode, Score, measure, measure_saved, warn_of_guessing
from bitwright_search.stages import Built, Record, SearchStore, content_of

SCHEMES = (
    ("sqnr", "minmax"),
    ("minmax", "minmax"),
    ("percentile:99.99", "minmax"),
    ("mse", "minmax"),
    ("sqnr", "mse"),
)
"""Calibration schemes of activations and weights that are tried by default."""

WIDE = 16
"""From this width on clipping gains nothing, so that `sqnr` keeps the whole range of activations, and more."""


NEGLIGIBLE = 0.1
"""Share of what activations cost from which on weights are worth repairing, where activations alone cost too much."""

Job = tuple[str, Built, Mode]
"""A network to evaluate: what to call it, where it is, and which of its sites are quantized."""


@dataclass
class Limits:
    """When to stop.

    Attributes:
        allowance: largest loss that is good enough, and how sure it must be.
        seconds, evaluations: budgets; None is unlimited. A stage that has begun is finished.
    """

    allowance: Allowance
    seconds: float | None = None
    evaluations: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A network with its score, and the stages that made it, in order."""

    steps: tuple[str, ...]
    built: Built
    result: Score
    refined: bool = False
    """Made by a technique, and not by calibration alone."""
    wider: Mapping[SiteId, str] = field(default_factory=dict)
    """Sites that have more bits than was asked for, with their types."""

    @property
    def score(self) -> float:
        """What `evaluate` gave."""
        return self.result.value

    @property
    def name(self) -> str:
        """The stages, joined."""
        return " + ".join(self.steps)


@dataclass
class AutoSearch:
    """One search.

    Args:
        sim: the model as it was given; never changed.
        data: calibration data.
        evaluate: the user's evaluation.
        stages: where finished stages are kept.
        limits: when to stop.
        schemes: calibration schemes of activations and weights.
        preparations, techniques: steps of each kind, in order.
        workers: where independent networks are evaluated; None evaluates here, one after the other.
    """

    sim: QuantSim
    data: Dataset
    evaluate: Evaluate
    stages: SearchStore
    limits: Limits
    schemes: Sequence[tuple[str, str]]
    preparations: Sequence[Step]
    techniques: Sequence[Step]
    workers: Workers | None = None
    trials: list[Trial] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    evaluations: int = 0
    reference: Score = field(default_factory=lambda: Score(0.0))
    """The float model's score."""
    diagnosis: dict[Mode, Score] = field(default_factory=dict)
    stopped: str = ""
    """Which budget ended the search; empty if none did."""

    def __post_init__(self) -> None:
        self._data = self.data.fingerprint()
        self._evaluation = identity(self.evaluate)
        self._prepared: tuple[str, ...] = ()
        self.prepared = self.sim
        """The network in the form that the target runs, before any calibration."""
        self.opened = {"run": self.sim.run, "progress": self.sim.progress, "source": self.sim.source,
                        "workers": self.sim.workers}  # fmt: skip

    # -- the order of things

    def run(self) -> Candidate:
        """The first candidate that is good enough, or the best of all.

        Raises:
            BitwrightError: not one network could be calibrated and evaluated; the message says why.
        """
        self.prepared = base = self._prepare()
        first = self._first_calibration(base)
        self._reference(first)
        self._diagnose(first)
        self._calibrations(base, first)
        if not self.candidates:
            reasons = "; ".join(f"{t.name}: {t.reason}" for t in self.trials if t.status is Status.FAILED)
            raise InputError(f"no quantized network could be evaluated: {reasons}")
        kept = [self.best]
        for step in self.techniques:
            start = _base(step, kept)
            if self.met or not self.left(step.technique, "technique", (*start.steps, step.technique)):
                break
            if (current := self._technique(step, start, kept[-1])) is not kept[-1]:
                kept.append(current)
        return self.best

    @property
    def best(self) -> Candidate:
        """The highest score, or of those that are good enough, if there are some, one with the fewest wider sites.

        Of equal calibrations the first; a technique that scores the same takes over, since it lowers errors that a
        small evaluation can't show."""
        good = [c for c in self.candidates if self.good(c.result)]
        pool = [c for c in good if len(c.wider) == min(len(c.wider) for c in good)] or self.candidates
        best = pool[0]
        for candidate in pool[1:]:
            if candidate.score > best.score or (candidate.score == best.score and candidate.refined):
                best = candidate
        return best

    @property
    def unrefined(self) -> Candidate:
        """The best of those that calibration alone has made."""
        return max((c for c in self.candidates if not c.refined), key=lambda c: c.score)

    @property
    def prepared_content(self) -> str:
        """Fingerprint of `prepared`."""
        return content_of(self.prepared)

    @property
    def met(self) -> bool:
        """Whether some candidate is good enough."""
        return bool(self.candidates) and self.good(self.best.result)

    @property
    def float_score(self) -> float:
        """What `evaluate` gave for the float model."""
        return self.reference.value

    def good(self, score: Score) -> bool:
        """Whether a score is within the allowed drop, as sure as it must be."""
        return self.limits.allowance.keeps(self.reference, score)

    def lost(self, score: Score) -> Drop:
        """What a network loses against the float model."""
        return self.limits.allowance.lost(self.reference, score)

    # -- stages

    def _prepare(self) -> QuantSim:
        """The network in the form that the target runs."""
        current, content = self.sim, content_of(self.sim)
        for step in self.preparations:
            depends = {"base": content, "data": self._data, **_of(step)}
            try:
                built = self.stages.build(f"auto: {step.technique}", depends, self._applied(step, current), self.opened)
            except Exception as error:
                self.failed(step.technique, "preparation", (), error)
                continue
            status = Status.UNCHANGED
            if built.content != content:
                status = Status.PREPARED
                self._prepared += (step.technique,)
            summary = built.sim.reports[-1][1].summary
            self.note(
                Trial(
                    step.technique, "preparation", status, self._prepared, None, built.seconds, summary, step.settings
                )
            )
            current, content = built.sim, built.content
        return current

    def _first_calibration(self, base: QuantSim) -> tuple[int, Built]:
        """The first scheme that can be computed on these data."""
        for index in range(len(self.schemes)):
            if (built := self._calibrated(base, index)) is not None:
                return index, built
        reasons = "; ".join(f"{t.name}: {t.reason}" for t in self.trials if t.status is Status.FAILED)
        raise InputError(f"the model can't be calibrated: {reasons}")

    def _reference(self, first: tuple[int, Built]) -> None:
        """The float model, without which no drop can be told: its failure is the search's."""
        # Evaluated as the first network with every site bypassed, so that both scores come the same way.
        (result,) = self._scores([("float", first[1], Mode.FLOAT)])
        if isinstance(result, Exception):
            raise result
        self.reference, seconds = result
        self.limits.allowance.check(self.reference)
        warn_of_guessing(self.evaluate, self.sim, self.reference)
        self.note(Trial("float", "reference", Status.REFERENCE, (), self.float_score, seconds))

    def _diagnose(self, first: tuple[int, Built]) -> None:
        """What quantized weights and quantized activations cost alone."""
        modes = (Mode.WEIGHTS, Mode.ACTIVATIONS)
        if self.limits.evaluations is not None and self.limits.evaluations - self.evaluations <= len(modes):
            for mode in modes:
                self.note(
                    Trial(mode.value, "reference", Status.SKIPPED, reason="the budget leaves no evaluation for it")
                )
            return
        steps = (*self._prepared, self._scheme_name(first[0]))
        for mode, result in zip(modes, self._scores([(m.value, first[1], m) for m in modes]), strict=True):
            if isinstance(result, Exception):
                self.failed(mode.value, "reference", steps, result)
                continue
            score, seconds = self.diagnosis[mode], _ = result
            self.note(
                Trial(mode.value, "reference", Status.REFERENCE, steps, score.value, seconds,
                      margin=self.lost(score).margin)
            )  # fmt: skip

    def _calibrations(self, base: QuantSim, first: tuple[int, Built]) -> None:
        """Each calibration scheme, until one is good enough."""
        indices = range(first[0], len(self.schemes))
        pointless = {i: reason for i in indices[1:] if (reason := self._pointless(i, first[0]))}
        # What can't gain anything takes no place in the budget.
        useful = [i for i in indices if i not in pointless]
        affordable = useful
        if self.limits.evaluations is not None:
            affordable = useful[: max(1, self.limits.evaluations - self.evaluations)]
        sent: list[tuple[tuple[str, ...], Built]] = []

        def jobs() -> Iterator[Job]:
            for index in (i for i in indices if i in pointless or i in affordable):
                name = self._scheme_name(index)
                steps = (*self._prepared, name)
                if index in pointless:
                    self.note(Trial(name, "calibration", Status.SKIPPED, steps, reason=pointless[index]))
                    continue
                if index != first[0] and not self.left(name, "calibration", steps):
                    return
                built = first[1] if index == first[0] else self._calibrated(base, index)
                if built is not None:
                    sent.append((steps, built))
                    yield name, built, Mode.FULL

        with closing(self._scores(jobs())) as results:
            for position, result in enumerate(results):
                steps, built = sent[position]
                if isinstance(result, Exception):
                    self.failed(steps[-1], "calibration", steps, result)
                    continue
                score, seconds = result
                status = Status.KEPT if not self.candidates or score.value > self.best.score else Status.WORSE
                self.candidates.append(Candidate(steps, built, score))
                self.note(
                    Trial(steps[-1], "calibration", status, steps, score.value, built.seconds + seconds,
                          margin=self.lost(score).margin)
                )  # fmt: skip
                if self.met:
                    return
        if len(affordable) < len(useful):
            self.stopped = f"{self.limits.evaluations} evaluations"

    def _pointless(self, index: int, first: int) -> str:
        """Why a calibration scheme can't gain anything over the first; empty if it may."""
        (activations, weights), (first_activations, first_weights) = self.schemes[index], self.schemes[first]
        for mode, same in (
            (Mode.ACTIVATIONS, weights == first_weights),
            (Mode.WEIGHTS, activations == first_activations),
        ):
            score = self.diagnosis.get(mode)
            if same and score is not None and score.value >= self.float_score:
                return f"quantized {mode.value.split()[0]} alone cost nothing"
        return ""

    def _technique(self, step: Step, base: Candidate, current: Candidate) -> Candidate:
        """A technique on top of `base`; the one to go on from: the new one, or `current` where that is better."""
        steps = (*base.steps, step.technique)
        auto = registry.techniques()[step.technique].auto
        if auto is not None and auto.weights_only and (reason := self._needless()):
            self.note(Trial(step.technique, "technique", Status.SKIPPED, steps, reason=reason))
            return current
        depends = {"base": base.built.content, "data": self._data, **_of(step),
                   "schemes": [base.built.sim.scheme, base.built.sim.weight_scheme]}  # fmt: skip
        make = self._applied(step, base.built.sim)
        try:
            built = self.stages.build(
                f"auto: {step.technique}", depends, lambda: make().calibrate(self.data), self.opened
            )
        except Exception as error:
            self.failed(step.technique, "technique", steps, error)
            return current
        summary = built.sim.reports[-1][1].summary
        if built.content == base.built.content:
            self.note(
                Trial(step.technique, "technique", Status.UNCHANGED, steps, base.score, built.seconds, summary,
                      step.settings)
            )  # fmt: skip
            return current
        (result,) = self._scores([(" + ".join(steps), built, Mode.FULL)])
        if isinstance(result, Exception):
            self.failed(step.technique, "technique", steps, result)
            return current
        score, seconds = result
        kept = score.value >= current.score
        self.note(
            Trial(step.technique, "technique", Status.KEPT if kept else Status.WORSE, steps, score.value,
                  built.seconds + seconds, summary, step.settings, self.lost(score).margin)
        )  # fmt: skip
        candidate = Candidate(steps, built, score, refined=True)
        self.candidates.append(candidate)
        return candidate if kept else current

    def _needless(self) -> str:
        """Why weights need no repair; empty if they do."""
        weights, activations = self.diagnosis.get(Mode.WEIGHTS), self.diagnosis.get(Mode.ACTIVATIONS)
        if weights is None:
            return ""
        by_weights = self.float_score - weights.value
        if by_weights <= 0:
            return "quantized weights alone cost nothing, and it repairs weights"
        if activations is not None and not self.good(activations):
            by_activations = self.float_score - activations.value
            if by_weights <= min(NEGLIGIBLE * by_activations, self.limits.allowance.drop / 2):
                return (
                    f"it repairs weights, which alone cost {by_weights:.4g}; activations cost {by_activations:.4g}, "
                    "which is beyond the allowed drop"
                )
        return ""

    # -- how one thing is done

    def _applied(self, step: Step, base: QuantSim) -> Callable[[], QuantSim]:
        return lambda: base.fork().apply(step.technique, self.data, **step.settings)

    def _calibrated(self, base: QuantSim, index: int) -> Built | None:
        scheme, weight_scheme = self.schemes[index]
        depends = {"base": content_of(base), "data": self._data, "schemes": [scheme, weight_scheme]}

        def make() -> QuantSim:
            return base.fork(scheme=scheme, weight_scheme=weight_scheme).calibrate(self.data)

        try:
            return self.stages.build("auto: calibrate", depends, make, self.opened)
        except Exception as error:
            name = self._scheme_name(index)
            self.failed(name, "calibration", (*self._prepared, name), error)
            return None

    def _scores(self, jobs: Iterable[Job]) -> Generator[tuple[Score, float] | Exception]:
        """(score, seconds) of each network, or the error, in order; to be closed when enough is known.

        Without workers each is evaluated when it is asked for. With some, all are sent before the first is waited for;
        what comes of those after the one that decides is not used, so that workers change the time alone.
        """
        if self.workers is None:
            for job in jobs:
                yield self._scored(job, None)
            return
        sent: list[tuple[Job, bool]] = []
        with self.workers.flight() as flight:
            for job in jobs:
                name, built, mode = job
                known = self.stages.known("auto: evaluate", self._depends(built, mode)) is not None
                # A network that can't be saved can't travel: it is evaluated here.
                send = built.path is not None and not known
                sent.append((job, send))
                if send:
                    flight.submit(name, measure_saved, str(built.path), self.evaluate, str(mode))
            futures = flight.in_order()
            for job, travels in sent:
                yield self._scored(job, next(futures) if travels else None)

    def _depends(self, built: Built, mode: Mode) -> Record:
        return {"network": built.content, "mode": str(mode), "evaluation": self._evaluation, "form": SCORE_FORM}

    def _scored(self, job: Job, future: Future[tuple[Score, float]] | None) -> tuple[Score, float] | Exception:
        name, built, mode = job
        self.sim.progress.start(f"Evaluating {name}", 1)

        def work() -> Record:
            score, seconds = measure(self.evaluate, built.sim, mode) if future is None else future.result()
            return {**recorded(score), "seconds": seconds}

        try:
            record = self.stages.once("auto: evaluate", self._depends(built, mode), work)
            self.sim.progress.advance()
        except Exception as error:
            self.evaluations += 1
            return error
        finally:
            self.sim.progress.finish()
        self.evaluations += 1
        return read_score(record), record["seconds"]

    def left(self, name: str, kind: str, steps: tuple[str, ...]) -> bool:
        """Whether the budget allows one more stage; if not, that is noted once."""
        limits, spent = self.limits, self.stages.clock.total
        if limits.evaluations is not None and self.evaluations >= limits.evaluations:
            self.stopped = f"{limits.evaluations} evaluations"
        elif limits.seconds is not None and spent >= limits.seconds:
            self.stopped = f"{limits.seconds:g} s"
        else:
            return True
        reason = f"the budget of {self.stopped} is spent: this and what would follow is left out"
        self.note(Trial(name, kind, Status.SKIPPED, steps, reason=reason))
        return False

    def _scheme_name(self, index: int) -> str:
        scheme, weight_scheme = self.schemes[index]
        return scheme if weight_scheme == "minmax" else f"{scheme}, weights {weight_scheme}"

    def failed(self, name: str, kind: str, steps: tuple[str, ...], error: Exception) -> None:
        """Tell that something couldn't be done.

        Raises:
            WriteError: it was the disk.
        """
        if isinstance(error, WriteError):  # a full disk says nothing of the candidate
            raise error
        expected = isinstance(error, BitwrightError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        status = Status.SKIPPED if isinstance(error, CapabilityError) else Status.FAILED
        self.note(Trial(name, kind, status, steps, reason=reason))

    def note(self, trial: Trial) -> None:
        """Tell what became of something."""
        self.trials.append(trial)

    def add(self, steps: tuple[str, ...], built: Built, score: Score, wider: Mapping[SiteId, str]) -> None:
        """A candidate that has more bits at some sites."""
        self.candidates.append(Candidate(steps, built, score, refined=True, wider=wider))

    def score(self, name: str, built: Built, mode: Mode) -> tuple[Score, float] | Exception:
        """(score, seconds) of one network, evaluated here, or the error."""
        return self._scored((name, built, mode), None)


def _base(step: Step, kept: Sequence[Candidate]) -> Candidate:
    """The latest of the networks kept so far that holds none of the techniques which a step replaces."""
    auto = registry.techniques()[step.technique].auto
    replaced = set() if auto is None else set(auto.replaces)
    return next(c for c in reversed(kept) if not replaced & set(c.steps))


def _of(step: Step) -> dict[str, object]:
    """What a step's result depends on, of the step itself: another release of a third party's may find another."""
    release = registry.default_registry().release(step.technique)
    return {"settings": dict(step.settings), **({"release": release} if release else {})}
