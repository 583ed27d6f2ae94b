"""What `mixed_precision` found: the front, the assignment that was chosen, and how sensitive each group is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitwright.backend import Bundle
from bitwright.simulation import QuantSim
from bitwright_search.scores import Scale


@dataclass(frozen=True)
class FrontPoint:
    """One assignment.

    Attributes:
        cost: total cost, in the cost's unit.
        relative_cost: as a share of the reference, every group at its most precise candidate.
        predicted_sqnr_db: at the network's outputs, as the sum of the groups' noise predicts it; None without noise.
        score: what `evaluate` gave, where it was asked.
        counts: groups by candidate.
        assignment: candidate of each group.
        predicted_kl: divergence from float that the gradients predict, in nats a position; None where noise was taken.
    """

    cost: float
    relative_cost: float
    predicted_sqnr_db: float | None
    score: float | None
    counts: dict[str, int]
    assignment: dict[str, str]
    predicted_kl: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """One group alone at one candidate.

    Attributes:
        group: its name.
        candidate: its types.
        sqnr_db: at the network's outputs, with all else in float; None without noise.
        cost: of the group.
        kl: divergence from float that the gradients predict, in nats a position; None where noise was taken.
    """

    group: str
    candidate: str
    sqnr_db: float | None
    cost: float
    kl: float | None = None


@dataclass
class MixedPrecisionResult:
    """The result of `mixed_precision`.

    Attributes:
        sim: the network with the chosen assignment, calibrated.
        assignment: candidate of each group, as "int4 × uint8".
        cost, reference_cost: of the chosen network, and of the one with the most precise candidate everywhere.
        cost_kind: "bit_operations", "weight_bytes" or "latency".
        score, float_score, reference_score: what `evaluate` gave for the chosen network, the float one and the
            reference; None where it wasn't asked.
        met: whether the chosen network loses no more than `allowed_drop`, with the margin where `confidence` asks for
            it, and costs no more than the budget.
        predicted_kl: of the chosen network, with `sensitivities="fisher"`, in nats a position.
        front: assignments by rising cost and falling predicted noise.
        measured: those of them that were evaluated, without the ones that cost more and score no better than another.
        sensitivities: what phase 1 measured.
        metric: what scores are: "top-1", a metric's name, or "score" for a function of the user.
        margin: the loss on other samples like those evaluated lies at most so much above the one on these, with a
            probability of `confidence`, or 0.95; None where `evaluate` gives a number alone, or there is one sample.
        confidence: probability with which the allowed drop had to be kept; None judged by the drop alone.
        notes: what was left alone and why, and where the search ended.
        seconds: of work, earlier processes included.
        files: every file written, by purpose.
    """

    sim: QuantSim
    assignment: dict[str, str]
    cost: float
    reference_cost: float
    cost_kind: str
    solver: str
    score: float | None
    float_score: float | None
    reference_score: float | None
    allowed_drop: float | None
    met: bool
    front: tuple[FrontPoint, ...]
    measured: tuple[FrontPoint, ...]
    sensitivities: tuple[Sensitivity, ...]
    notes: tuple[str, ...]
    seconds: float
    target: str
    metric: str = "score"
    margin: float | None = None
    confidence: float | None = None
    predicted_kl: float | None = None
    bundle: Bundle | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The native simulated model of the chosen network."""
        return self.sim.model

    @property
    def relative_cost(self) -> float:
        """Cost as a share of the reference's."""
        return self.cost / self.reference_cost if self.reference_cost else 1.0

    def to_json(self) -> str:
        """Everything but the network, for programs."""
        left_out = {"sim", "bundle", "files", "front", "measured", "sensitivities"}
        found: dict[str, Any] = {k: v for k, v in vars(self).items() if k not in left_out}
        found["relative_cost"] = self.relative_cost
        for name in ("front", "measured", "sensitivities"):
            found[name] = [asdict(item) for item in getattr(self, name)]
        found["files"] = {k: p.name for k, p in self.files.items()}
        return json.dumps({"schema_version": 1, **found}, indent=1) + "\n"

    def __str__(self) -> str:
        text = f"{self.relative_cost:.1%} of the reference's {self.cost_kind.replace('_', ' ')}"
        if self.predicted_kl is not None:
            text += f"; predicted divergence {self.predicted_kl:.4g} nats"
        if self.score is not None and self.float_score is not None:
            scale = Scale(self.metric)
            text += f"; {self.metric} {scale.text(self.score)}, float {scale.text(self.float_score)}"
            if self.margin is not None:
                text += f", a drop of {scale.drop(self.float_score - self.score, self.margin)}"
        return text
