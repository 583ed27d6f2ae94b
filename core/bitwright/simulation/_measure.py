"""Metrics of a simulated network, and of the float network beside it, over a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Simulation, Tap, arrays_of
from bitwright.data import DataLike, samples_in
from bitwright.errors import InputError, unknown_name
from bitwright.metrics import Figure, Metric, metric_factory
from bitwright.progress import closing
from bitwright.state import SimState


def measured(
    state: SimState,
    simulation: Simulation[Any],
    data: DataLike,
    metrics: Sequence[str],
    *,
    reference: SimState | None = None,
    labels: Sequence[int] | NDArray[np.integer] | None = None,
    output: str | None = None,
) -> dict[str, Figure]:
    """A figure for each metric, in one pass; see `QuantSim.measure`."""
    if not metrics:
        raise InputError("measure: name a metric, such as 'perplexity' or 'kl'")
    if len(set(metrics)) != len(metrics):
        raise InputError(f"measure: a metric is named twice in {', '.join(metrics)}")
    if reference is None and state.changed_by:
        raise InputError(
            f"measure: {state.changed_by[0]!r} has changed the float model since it was opened, so there is nothing "
            "to compare with: pass reference=before, with `before = sim.fork()` made before techniques, or a QuantSim "
            "of the model as it was"
        )
    tap = Tap(_output(state, output))
    origin = reference or state
    if tap.tensor not in origin.graph.tensors:
        raise InputError(f"measure: the reference has no tensor {tap.tensor!r}")
    factories = {name: metric_factory(name, labels) for name in metrics}
    pairs: dict[str, tuple[Metric, Metric | None]] = {}
    for name, make in factories.items():
        metric = make()
        pairs[name] = metric, None if metric.compares else make()
    quantized = simulation.session([tap])
    floating = origin.backend.session(origin.native, [tap])
    dataset = state.open(data)
    with closing(state.progress) as progress:
        progress.start(f"Measuring {', '.join(metrics)}", dataset.samples)
        for batch in dataset:
            inputs = arrays_of(batch)
            found, wanted = (np.asarray(s.run(batch)[tap]) for s in (quantized, floating))
            if found.shape != wanted.shape:
                shapes = f"{found.shape}, and {wanted.shape} in the reference"
                raise InputError(f"measure: {tap.tensor!r} has shape {shapes}")
            for metric, beside in pairs.values():
                metric.add(inputs, found, wanted)
                if beside is not None:
                    beside.add(inputs, wanted, None)
            progress.advance(samples_in(batch))
    return {
        name: Figure(
            name,
            metric.value(),
            None if beside is None else beside.value(),
            metric.count,
            (metric.terms if beside is None else metric.terms - beside.terms).error,
        )
        for name, (metric, beside) in pairs.items()
    }


def _output(state: SimState, name: str | None) -> str:
    if name is None:
        return state.graph.outputs[0]
    if name not in state.graph.tensors:
        raise InputError(
            f"measure: the model has no tensor {name!r}{unknown_name(name, state.graph.tensors, listed=False)}; its "
            f"outputs are {', '.join(state.graph.outputs)}"
        )
    return name
