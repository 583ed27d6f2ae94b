"""An export opened again as a simulation: the model and the grids of its encodings file, whatever made them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitwright.bundle import find_bundle, plan_of, read_encodings
from bitwright.progress import Progress
from bitwright.simulation import QuantSim


def exported(directory: str | Path, name: str | None = None, *, progress: Progress | None = None) -> QuantSim:
    """The simulation that an export came from, without its target: what has an entry is quantized so.

    Args:
        directory: what `QuantSim.export` or ``bitwright quantize`` wrote.
        name: stem of the files, if it holds several exports.
        progress: where progress is shown.

    Raises:
        InputError: the directory holds no bundle.
        EncodingError: the encodings don't fit the model.
    """
    bundle = find_bundle(Path(directory), name)
    sim = QuantSim(bundle.files["model"], progress=progress)
    encodings = read_encodings(bundle.files["encodings"], sim.graph)
    plan = plan_of(sim.graph, encodings)
    return QuantSim.of(replace(sim.state, plan=plan, encodings=encodings.restricted(set(plan))))
