"""What `auto_quantize` found: every trial in order, the best network, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitwright.backend import Bundle
from bitwright.simulation import QuantSim
from bitwright_search.scores import Scale


class Status(StrEnum):
    """What became of a trial."""

    REFERENCE = "reference"  # evaluated to compare with, never returned
    PREPARED = "prepared"
    KEPT = "kept"  # what follows builds on it
    WORSE = "worse"
    UNCHANGED = "unchanged"  # it had nothing to do
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Trial:
    """One thing that was tried.

    Attributes:
        name: "float", "weights only", "minmax", "adaround", ….
        kind: "reference", "preparation", "calibration", "technique" or "types" (more bits at some sites).
        status: what became of it.
        steps: the stages that made the network, itself last.
        score: what `evaluate` gave; None where it wasn't evaluated.
        seconds: what making and evaluating it took, in whichever process.
        reason: why it failed or was skipped, or what the technique reports.
        settings: the technique's, where they aren't its defaults.
        margin: how far its drop on other samples may lie above the one on these, see `AutoQuantResult.margin`.
    """

    name: str
    kind: str
    status: Status
    steps: tuple[str, ...] = ()
    score: float | None = None
    seconds: float = 0.0
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    margin: float | None = None


@dataclass
class AutoQuantResult:
    """The result of `auto_quantize`.

    Attributes:
        sim: the best network, calibrated; its `model` is the native simulated model.
        score, float_score: what `evaluate` gave for it, and for the float model.
        met: whether it loses no more than `allowed_drop`, with the margin where `confidence` asks for it.
        allowed_drop: as given.
        margin: the drop on other samples like those evaluated lies at most so much above `drop`, with a probability of
            `confidence`, or 0.95; None where `evaluate` gives a number alone, or there is one sample.
        confidence: probability with which the allowed drop had to be kept; None judged by the drop alone.
        best: name of its trial.
        steps: the stages that made it, in order.
        trials: everything that was tried, in order.
        weights_only, activations_only: scores with one kind of site quantized; None if the budget left no room.
        findings: what validation said of the model.
        advice: what to do next, in words.
        seconds, evaluations: what it took, earlier processes included.
        target: the target's name.
        metric: what scores are: "top-1", a metric's name, or "score" for a function of the user.
        wider: types of the sites that got more bits than was asked for, as `overrides` take them.
        bundle: what was exported; None without `out`.
        files: every file written, by purpose.
    """

    sim: QuantSim
    score: float
    float_score: float
    met: bool
    allowed_drop: float
    best: str
    steps: tuple[str, ...]
    trials: tuple[Trial, ...]
    weights_only: float | None
    activations_only: float | None
    findings: tuple[str, ...]
    advice: tuple[str, ...]
    seconds: float
    evaluations: int
    target: str
    metric: str = "score"
    wider: Mapping[str, str] = field(default_factory=dict)
    margin: float | None = None
    confidence: float | None = None
    bundle: Bundle | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The native simulated model of the best network."""
        return self.sim.model

    @property
    def drop(self) -> float:
        """How much the best network's score lies below the float model's."""
        return self.float_score - self.score

    def to_json(self) -> str:
        """Everything but the network, for programs."""
        left_out = {"sim", "bundle", "files", "trials"}
        found: dict[str, Any] = {k: v for k, v in vars(self).items() if k not in left_out}
        found["drop"] = self.drop
        found["trials"] = [asdict(t) for t in self.trials]
        found["files"] = {k: p.name for k, p in self.files.items()}
        return json.dumps({"schema_version": 1, **found}, indent=1, default=str) + "\n"

    def __str__(self) -> str:
        verdict, scale = "within" if self.met else "beyond", Scale(self.metric)
        return (
            f"{self.best}: {scale.text(self.score)}, float {scale.text(self.float_score)}; a drop of "
            f"{scale.drop(self.drop, self.margin)} is {verdict} the allowed {scale.drop(self.allowed_drop)}"
        )
