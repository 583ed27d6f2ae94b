"""`mixed_precision`: a type for each group of sites, so that a cost falls and accuracy holds.

Phase 1 measures how much noise each group adds alone at each candidate. A solver turns noise and cost into a front of
assignments. Phase 2 evaluates assignments on it with the user's own function, by bisection, for the cheapest that
loses no more than `allowed_drop`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bitwright.bank import Bank
from bitwright.bundle import Formats
from bitwright.errors import InputError
from bitwright.progress import Progress, shows_progress
from bitwright.runs import RunDirectory
from bitwright.simulation import QuantSim, RecipeLike, read_recipe
from bitwright.workers import lent
from bitwright_search.candidates import group_sites, read_candidates, shared_activations
from bitwright_search.costs import Cost, CostModel, multiply_accumulates
from bitwright_search.drops import Allowance
from bitwright_search.evaluation import read_evaluate
from bitwright_search.exporting import refuse_unwritable, write
from bitwright_search.fisher import NOTE as DIVERGENCE
from bitwright_search.fisher import predicted_divergence
from bitwright_search.latency import read_latency
from bitwright_search.mixed_result import MixedPrecisionResult
from bitwright_search.mixed_search import Goal, MixedSearch
from bitwright_search.participants import split_steps
from bitwright_search.predicted import NOTE, blank_batch, predicted_noise
from bitwright_search.sensitivity import SAMPLES, first_samples, measure_noise
from bitwright_search.stages import SearchStore, open_sim, run_of

CANDIDATES = (("int8", "uint16"), ("int8", "uint8"), ("int4", "uint8"))
"""The candidates by default."""


@shows_progress
def mixed_precision(
    model: Any,
    calibration: Any,
    evaluate: Any = None,
    *,
    candidates: Sequence[Any] = CANDIDATES,
    allowed_drop: float | None = None,
    confidence: float | None = None,
    budget: float | None = None,
    lite: float | None = None,
    cost: Cost = "bit_operations",
    latency: Any = None,
    solver: Literal["exact", "greedy"] = "exact",
    techniques: RecipeLike = None,
    sensitivities: Literal["noise", "fisher"] = "noise",
    sensitivity_samples: int = SAMPLES,
    target: Any = None,
    scheme: str | None = None,
    weight_scheme: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    sample: Any = None,
    backend: str | None = None,
    seed: int | None = None,
    batch_size: int = 8,
    out: str | Path | None = None,
    name: str | None = None,
    encodings_version: str = "1.0.0",
    plain_session: bool | None = None,
    formats: Formats | None = None,
    run: RunDirectory | str | Path | None = None,
    executor: object = None,
    progress: Progress | None = None,
) -> MixedPrecisionResult:
    """Give each group of sites the type that it needs.

    Args:
        model: a framework's model, a path, or a `QuantSim` (whose settings and techniques then hold).
        calibration: calibration data in any form that `QuantSim.open` takes; or a `Bank`, from which sensitivities
            are predicted in closed form: nothing runs but `evaluate`.
        evaluate: a function from the native simulated model to a number, higher is better, or ``(data, labels)``;
            needed for `allowed_drop`.
        candidates: pairs of types (weights, activations); "float" leaves the activations of all candidates in float.
            Where all have the same activations, a model gets them throughout, and a `QuantSim` wherever an op reads one
            that has another type.
        allowed_drop: largest loss against the float model: the cheapest assignment within it is wanted.
        confidence: as `auto_quantize` takes it.
        budget: largest cost, as a share (0 to 1) of the reference, which has the dearest candidate everywhere. Alone:
            the least noise within it. With `allowed_drop`: no assignment above it is tried.
        lite: no search: everything at the cheapest candidate, but this percentage of the groups, the most sensitive
            ones, at the most precise.
        cost: "bit_operations" (multiply-accumulates × weight bits × activation bits), "weight_bytes", or "latency".
        latency: for `cost="latency"`: a table (`latency.LatencyTable`, a file, decoded JSON) or a `LatencyModel`.
        solver: "exact" (integer programming; needs scipy) or "greedy".
        techniques: a recipe that every network gets before it is calibrated and evaluated, such as "adaround".
        sensitivities: "noise" measures the noise at the outputs, a forward pass for each group and candidate; "fisher"
            predicts the divergence from float, in nats a position, from one backward pass a batch and the second
            moments of layers' inputs: for networks with logits, candidates that differ in weights alone, and backends
            with gradients (PyTorch, Keras).
        sensitivity_samples: samples of the calibration data for phase 1; whole batches where the model fixes the size.
        target, scheme, weight_scheme, overrides, sample, backend, seed: as `QuantSim` takes them; `weight_scheme` is
            "mse" by default, which suits narrow weights.
        batch_size: samples a batch, for data that are arrays or files.
        out: where the chosen network, its report, the front (JSON) and a page are written.
        name: stem of the exported files.
        encodings_version: schema of the encodings file.
        plain_session, formats: as `QuantSim.export` takes them.
        run: where finished work is kept, to go on after a crash; default ``out/.run``, or nowhere without `out`.
        executor: where sensitivities are measured and independent layers solved, as `workers.open_workers` takes it: a
            number of processes, "local:N" or the address of a Dask scheduler, a Dask client, an executor. Networks
            travel as paths, so its workers need the same file system.
        progress: where progress is shown; default: as bars on a terminal, nowhere else.

    Raises:
        InputError: no goal or contradicting ones, an unattainable budget, or unusable data or arguments.
        MissingExtraError: the exact solver without scipy.
        CapabilityError: `sensitivities="fisher"` and a backend without gradients.
    """
    _check_goal(evaluate, allowed_drop, budget, lite)
    choices = read_candidates(candidates)
    if solver not in ("exact", "greedy"):
        raise InputError(f"solver={solver!r}: choose exact or greedy")
    if sensitivity_samples < 1:
        raise InputError(f"sensitivity_samples={sensitivity_samples}: use at least one sample")
    if sensitivities not in ("noise", "fisher"):
        raise InputError(f"sensitivities={sensitivities!r}: choose noise or fisher")
    steps = read_recipe(techniques)
    is_sim = isinstance(model, QuantSim)
    options: dict[str, Any] = {"target": target, "scheme": scheme, "weight_scheme": weight_scheme,
                               "overrides": overrides, "backend": backend, "seed": seed}  # fmt: skip
    if not is_sim:
        # What all candidates agree on isn't searched for: the whole network has it from the start.
        options |= {"weight_scheme": weight_scheme or "mse", "activations": shared_activations(choices)}
    with run_of(run, out) as directory, lent(executor) as workers:
        sim = open_sim(model, sample, options, directory, progress, workers)
        refuse_unwritable(sim, out, model, name, formats)
        data = sim.open(calibration, batch_size=batch_size)
        if not is_sim:
            # The target runs folded batch norms, so noise is measured with them folded. A simulation is as it is.
            for step in split_steps(None)[0]:
                sim.apply(step.technique, data)
        bank = data if isinstance(data, Bank) else None
        batches = [] if bank is not None else first_samples(data, sensitivity_samples, sim.fixed_batch)
        groups, notes = group_sites(sim, choices)
        if bank is None:
            macs = multiply_accumulates(sim, batches[0])
        else:  # bytes take no multiplications
            macs = {} if cost == "weight_bytes" else multiply_accumulates(sim, blank_batch(sim))
        costs = CostModel(sim, cost, macs, read_latency(latency, sim.graph, macs))
        table = costs.table(groups, choices)
        scored = None if evaluate is None else read_evaluate(evaluate, sim)
        allowance = None if allowed_drop is None else Allowance.of(allowed_drop, confidence, scored)
        stages = SearchStore(directory)
        if sensitivities == "fisher":
            if bank is not None:
                raise InputError('sensitivities="fisher" takes gradients, and a bank has no samples: give data')
            noises = predicted_divergence(sim, groups, choices, data, batches, directory)
            notes = (*notes, DIVERGENCE)
        elif bank is None:
            noises = measure_noise(sim, groups, choices, data, batches, directory)
        else:
            noises, notes = predicted_noise(sim, groups, choices, bank), (*notes, NOTE)
        search = MixedSearch(
            sim=sim,
            data=data,
            evaluate=scored,
            stages=stages,
            groups=groups,
            candidates=choices,
            costs=table,
            noises=noises,
            nats=sensitivities == "fisher",
            outside=costs.outside(groups),
            solver=solver,
            goal=Goal(allowance, budget, lite),
            steps=tuple(steps),
        )
        result = search.run(cost, notes)
        result.sim.attach(run=run if isinstance(run, RunDirectory) else None, executor=None)
        if out is not None:
            from bitwright_search.mixed_page import render

            write(result, render, Path(out), name, model, data, scored, encodings_version, plain_session,
                  formats, tool="mixed_precision", document="mixed_precision")  # fmt: skip
    return result


def _check_goal(evaluate: Any, allowed_drop: float | None, budget: float | None, lite: float | None) -> None:
    if allowed_drop is None and budget is None and lite is None:
        raise InputError("mixed precision needs a goal: allowed_drop (with evaluate), budget, or lite")
    if lite is not None and (allowed_drop is not None or budget is not None):
        raise InputError("lite decides by itself; leave out allowed_drop and budget, or lite")
    if allowed_drop is not None and evaluate is None:
        raise InputError("allowed_drop needs evaluate: a function that scores the simulated model, or (data, labels)")
    if allowed_drop is not None and not allowed_drop >= 0:
        raise InputError(f"allowed_drop={allowed_drop}: give the largest loss that is good enough, 0 or more")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget}: give a share of the reference's cost, more than 0 and at most 1")
    if lite is not None and not 0 <= lite <= 100:
        raise InputError(f"lite={lite}: give a percentage, 0 to 100")
