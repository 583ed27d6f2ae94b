"""What `verify` finds."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from bitwright.bundle import OutputFigures, PlainView


class TensorComparison(BaseModel):
    """One quantized tensor, float against simulation and simulation against integers.

    Attributes:
        name: the tensor.
        sqnr_db: signal (float) to quantization noise (simulation) ratio, decibels.
        simulated_differs: share of codes in which the float simulation departs from the integer runtime.
        simulated_max_steps: the largest departure, in grid steps.
        exact_differs, exact_max_steps: the same for the exact integer simulation; None where the runtime fused the
            tensor away.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sqnr_db: float
    simulated_differs: float | None = None
    simulated_max_steps: int | None = None
    exact_differs: float | None = None
    exact_max_steps: int | None = None


class Verification(BaseModel):
    """The result of `verify`; `model_dump_json()` is what ``bitwright verify --json`` prints.

    Where the export has no quantized artefact, nothing of "integer" is there.

    Attributes:
        samples: how many were run.
        runtime: the integer runtime that "integer" is of; empty where there is nothing that one executes.
        float_model: "original", or "exported" where the original isn't at hand (its weights may be on their grids).
        accuracy: top-1 as a fraction, of "float", "simulated", "integer"; empty without labels.
        agreement: share of equal argmax of the first output: "simulated_float", "integer_float", "integer_simulated".
        sqnr_db: of the first output: "simulated_float", "integer_float", "integer_simulated" (second is the signal).
        outputs: the same figures of every output, and "plain_float" of a session with the runtime's default options.
        exact: the exact integer simulation against the runtime on the inspected samples: "output_differs" (share of
            output elements), "argmax_agreement", "integer_ops" and "float_ops" (counts), "peak_accumulator" (share of
            int32's range).
        plain: a session with the runtime's default options, as users open it; None where the backend has none.
        tensors: those that differ most first.
        uncovered: ops whose exact integers may differ from the runtime's, with the reason; compared as float.
        recorded: whether the export's record says what was simulated.
        parts: of a model that was captured in parts, what was found of each; beside it only `samples`, `outputs`,
            `tensors`, `uncovered`, `notes` and `problems` are filled, with those of all parts.
        notes: what couldn't be compared, and samples that were left out.
        problems: what is wrong in words; empty if all is well.
    """

    model_config = ConfigDict(frozen=True)

    samples: int
    runtime: str = ""
    float_model: str = "exported"
    accuracy: dict[str, float] = Field(default_factory=dict)
    agreement: dict[str, float] = Field(default_factory=dict)
    sqnr_db: dict[str, float] = Field(default_factory=dict)
    outputs: list[OutputFigures] = Field(default_factory=list)
    exact: dict[str, float] = Field(default_factory=dict)
    plain: PlainView | None = None
    tensors: list[TensorComparison] = Field(default_factory=list)
    uncovered: dict[str, str] = Field(default_factory=dict)
    recorded: bool = False
    parts: dict[str, Verification] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    problems: list[str] = Field(default_factory=list)


def of_parts(parts: Mapping[str, Verification]) -> Verification:
    """One result of all parts of a model."""
    told = dict.fromkeys(p for found in parts.values() for p in found.problems)
    notes = dict.fromkeys(n for found in parts.values() for n in found.notes)
    return Verification(
        samples=min((found.samples for found in parts.values()), default=0),
        runtime=next((found.runtime for found in parts.values() if found.runtime), ""),
        outputs=[o for found in parts.values() for o in found.outputs],
        tensors=sorted(
            (t for found in parts.values() for t in found.tensors), key=lambda c: -(c.simulated_differs or 0.0)
        ),
        uncovered={op: why for found in parts.values() for op, why in found.uncovered.items()},
        recorded=all(found.recorded for found in parts.values()),
        parts=dict(parts),
        notes=["the model was captured in parts: each is compared on what it was handed, and the Python between them "
               "isn't run", *notes],
        problems=list(told),
    )  # fmt: skip
