"""`measure_latency`: a latency table from the integer runtime of the model's backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.backend import Capability, OpTimer, require
from bitwright.data import DataLike, whole_batches
from bitwright.errors import InputError
from bitwright.files import Scratch
from bitwright.progress import Progress, shows_progress
from bitwright.simulation import QuantSim
from bitwright_search.candidates import COSTED, group_sites, read_candidates, shared_activations
from bitwright_search.costs import multiply_accumulates
from bitwright_search.latency import Entry, LatencyTable, per_mac
from bitwright_search.mixed_precision import CANDIDATES
from bitwright_search.participants import split_steps
from bitwright_search.sensitivity import first_samples


@shows_progress
def measure_latency(
    model: Any,
    data: DataLike,
    *,
    candidates: Sequence[Any] = CANDIDATES,
    target: Any = "default",
    overrides: Mapping[str, Any] | None = None,
    sample: Any = None,
    backend: str | None = None,
    samples: int = 8,
    batch_size: int = 1,
    repeats: int = 5,
    threads: int = 1,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time every matrix product of a model at each candidate, on the integer runtime that `bitwright verify` uses.

    It tells what that runtime does on this machine: where it has no integer kernel for a width it computes in float,
    and the table says so by its figures.

    Args:
        model: a model, a path, or a `QuantSim`.
        data: some samples, in any form that `QuantSim.open` takes.
        candidates: pairs of types (weights, activations).
        target, overrides, sample, backend: as `QuantSim` takes them; for a model or a path.
        samples: how many are fed; whole batches where the model fixes their size.
        batch_size: samples a batch.
        repeats: passes that count, after one that warms up.
        threads: of the runtime.
        out: a file to write the table to.
        progress: where progress is shown; default: as bars on a terminal, nowhere else.

    Returns:
        Entries by op, by type and weight shape, and by type for each multiply-accumulate.

    Raises:
        CapabilityError: the backend can't time ops; give `mixed_precision` a table of your own.
        InputError: unusable data or arguments.
    """
    if min(samples, batch_size, repeats, threads) < 1:
        raise InputError("samples, batch_size, repeats and threads are at least 1")
    choices = read_candidates(candidates)
    sim = model
    if not isinstance(model, QuantSim):
        activations = shared_activations(choices)
        sim = QuantSim(model, sample, activations=activations, target=target, overrides=overrides, backend=backend)
    timer = sim.backend
    require(timer, {Capability.OP_TIMER}, "measure_latency")
    assert isinstance(timer, OpTimer)
    samples = whole_batches(samples, sim.fixed_batch)
    if not isinstance(model, QuantSim):
        for step in split_steps(None)[0]:
            sim.apply(step.technique, sim.open(data, batch_size=batch_size, limit=samples))
    dataset = sim.open(data, batch_size=batch_size, limit=samples)
    batches = first_samples(dataset, samples, sim.fixed_batch)
    macs = multiply_accumulates(sim, batches[0])
    shown: Progress = progress or sim.progress
    shown.start("Measuring latency", len(choices))
    entries: list[Entry] = []
    groups, _ = group_sites(sim, choices)
    for index, candidate in enumerate(choices):
        types = {s: t for g in groups if index in g.allowed for s, t in g.types(sim, candidate).items()}
        twin = sim.retyped(types).calibrate(dataset)
        ops = [op.id for op in twin.graph if op.kind in COSTED]
        with Scratch() as folder:
            bundle = twin.export(folder, name="timed")
            seconds = timer.op_seconds(bundle, ops, batches, repeats=repeats, threads=threads)
        entries += _entries(twin, seconds, macs)
        shown.advance(1, str(candidate))
    shown.finish()
    if not entries:
        raise InputError("the runtime reports no time for any matrix product of this model")
    table = LatencyTable(tuple({_key(e): e for e in reversed(entries)}.values())[::-1])
    if out is not None:
        table.write(out)
    return table


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.op, entry.type, entry.shape, entry.weights, entry.activations


def _entries(sim: QuantSim, seconds: Mapping[str, float], macs: Mapping[str, int]) -> list[Entry]:
    found: list[Entry] = []
    kinds: dict[tuple[str, int, int], dict[str, float]] = {}
    for id, value in seconds.items():
        op = sim.graph.op(id)
        second = op.weight or op.data_inputs[-1]
        widths = [32 if (spec := sim.plan.spec(s)) is None else spec.bits for s in (second, op.data_inputs[0])]
        found.append(Entry(op=id, weights=widths[0], activations=widths[1], seconds=value))
        if op.weight is not None:
            shape = sim.graph.params[op.weight].shape
            found.append(Entry(type=op.type, shape=shape, weights=widths[0], activations=widths[1], seconds=value))
        kinds.setdefault((op.type, widths[0], widths[1]), {})[id] = value
    for (kind, weights, activations), times in kinds.items():
        rate = per_mac(times, macs)
        found.append(Entry(type=kind, weights=weights, activations=activations, seconds_per_mac=rate))
    return found
