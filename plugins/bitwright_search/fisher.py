"""Phase 1 by gradients: the divergence from the float network that rounding a weight brings, in closed form.

For a small change Δ of the weights the Kullback–Leibler divergence is ½ Δᵀ F Δ, with the Fisher information F = E[g gᵀ]
of gradients g of −log p(y) at labels y that are drawn from the float network's own distribution p. Of a layer y = W x
it is taken as the product of what its outputs matter and the second moments of its inputs, and of rows and layers as
independent (Kronecker-factored curvature: Martens and Grosse 2015, with a diagonal factor for outputs)::

    KL ≈ ½ Σ_layers Σ_rows G_r · δ_rᵀ H δ_r,      H = E[x xᵀ],      G_r = Σ_k E[g_rk²] / Σ_k H_kk

δ is a row's rounding error. G is such that rounding errors without a direction have what the diagonal of F says; so
weights of other ops, and those that several ops read, are taken by that diagonal alone: ½ Σ E[g²] δ².

Gradients of a batch are summed over its positions; labels drawn independently make the expectation of the sum's square
the sum of the squares', so that one backward pass serves all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Capability, Differentiable, Pullback, arrays_of, require
from bitwright.calibration import collect
from bitwright.data import Dataset
from bitwright.errors import InputError
from bitwright.graph import Op, ParamId, groups_of, input_channels, to_matrix
from bitwright.grids import Encoding
from bitwright.metrics import are_probabilities, counted
from bitwright.placement import SiteId
from bitwright.runs import RunDirectory, fingerprint
from bitwright.simulation import QuantSim
from bitwright.statistics import LayerMoments, Request, Statistic
from bitwright_search.candidates import Candidate, Group
from bitwright_search.solvers import Table
from bitwright_search.stages import content_of

GRADIENT_BYTES = 2**29
"""Gradients of one backward pass at most; larger networks take several."""
FEATURES = 8192
"""Inputs of a layer at most whose second moments are taken; wider ones go by the diagonal."""
MOMENTS_BYTES = 2**30
"""Second moments of one pass over the data at most; those of a larger network take several."""
NOTE = (
    "sensitivities are predicted divergences from float (nats a position) by the gradients of the float network, for "
    "weights rounded to nearest; measure the result"
)
Values = NDArray[np.floating[Any]]


def predicted_divergence(
    sim: QuantSim,
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    data: Dataset,
    batches: Sequence[Batch],
    run: RunDirectory,
) -> Table:
    """Nats a position that each group alone brings at each candidate, (groups, candidates); infinite where it isn't
    allowed.

    Args:
        sim: the network; its first output are logits.
        groups, candidates: what is chosen between; weights alone.
        data: that weights' inputs are taken from.
        batches: that gradients are taken on.
        run: where the table is kept.

    Raises:
        CapabilityError: the backend has no gradients.
        InputError: a group has activations, or the output isn't one of logits (probabilities are none).
    """
    require(sim.backend, [Capability.DIFFERENTIABLE], 'sensitivities="fisher"')
    if with_activations := [g.name for g in groups if g.activations]:
        raise InputError(
            f'sensitivities="fisher" knows weights alone, and {with_activations[0]!r} would choose activations too: '
            "give candidates that have the same activations"
        )
    seen = fingerprint.of_arrays((f"{i}/{k}", v) for i, b in enumerate(batches) for k, v in sorted(b.items()))
    depends = {"network": content_of(sim), "data": [data.fingerprint(), seen], "candidates": list(map(str, candidates)),
               "groups": [[g.name, g.weights] for g in groups], "scheme": sim.weight_scheme,
               "allowed": [g.allowed for g in groups]}  # fmt: skip
    store = run.step("mixed precision: divergence by gradients", depends)
    if (known := store.get("nats")) is not None:
        return np.asarray(known["nats"], np.float64)
    table = _table(sim, groups, candidates, data, batches)
    store.put("nats", {"nats": table})
    return table


def _table(
    sim: QuantSim, groups: Sequence[Group], candidates: Sequence[Candidate], data: Dataset, batches: Sequence[Batch]
) -> Table:
    grids: dict[SiteId, dict[int, Encoding]] = {}
    twin = sim
    for c, candidate in enumerate(candidates):
        members = [g for g in groups if c in g.allowed]
        twin = sim.retyped({site: text for g in members for site, text in g.types(sim, candidate).items()})
        twin.calibrate(data)
        for w in (w for g in members for w in g.weights):
            grids.setdefault(w, {})[c] = twin.encodings[w]

    def error(c: int, w: SiteId) -> Values:
        exact = np.asarray(sim.params[w], np.float32)
        return grids[w][c].fake_quantize(exact) - exact

    found: dict[tuple[int, SiteId], float] = {}
    rows: dict[SiteId, Values] = {}
    ops = {op.weight: op for op in reversed(sim.graph.linear_ops)}
    for w, squares in _mean_squares(twin, list(grids), batches, seed=sim.seed):
        found |= {(c, w): 0.5 * float((squares * np.square(error(c, w), dtype=np.float64)).sum()) for c in grids[w]}
        if w in ops:
            rows[w] = to_matrix(ops[w], squares).sum(axis=-1, dtype=np.float64)

    def take(op: Op, moments: Values) -> None:
        assert op.weight is not None
        trace = np.maximum(np.trace(moments, axis1=1, axis2=2), np.finfo(np.float64).tiny)
        matter = rows[op.weight] / trace[:, None]
        for c in grids[op.weight]:
            delta = to_matrix(op, error(c, op.weight)).astype(np.float64)
            found[c, op.weight] = 0.5 * float(np.einsum("gr,grk,grk->", matter, delta @ moments, delta))

    _with_moments(sim, list(grids), data, take)
    table = np.full((len(groups), len(candidates)), np.inf)
    for g, group in enumerate(groups):
        for c in group.allowed:
            table[g, c] = sum(found[c, w] for w in group.weights)
    return table


def _mean_squares(
    sim: QuantSim, weights: Sequence[ParamId], batches: Sequence[Batch], *, seed: int
) -> Iterator[tuple[ParamId, Values]]:
    """E[g²] a position of each value of weights, at labels drawn from the float network's distribution."""
    backend, tap = sim.backend, sim.graph.outputs[0]
    assert isinstance(backend, Differentiable)
    simulation = backend.simulate_differentiable(sim.native, sim.plan, sim.table)
    roots = sorted({sim.plan.root(s) for s in sim.plan.quantized})
    for part in _parts(sim, weights):
        # In float but for those whose values are given, and are float's as well.
        simulation.set({s: sim.table[s] if s in part else None for s in roots})
        pullback = simulation.pullback(part, sim.graph.inputs, [tap])
        values = {p: np.asarray(sim.params[p], np.float32) for p in part}
        rng = np.random.default_rng(seed)
        positions = 0
        sums = {p: np.zeros(v.shape, np.float32) for p, v in values.items()}
        sim.progress.start("Gradients", len(batches))
        try:
            for batch in batches:
                gradients, count = _gradients(pullback, batch, values, tap, rng)
                positions += count
                for p, g in gradients.items():
                    sums[p] += np.square(g)
                sim.progress.advance(1)
        finally:
            sim.progress.finish()
        if not positions:
            raise InputError('sensitivities="fisher": no position of the samples counts; all are masked')
        for p in part:
            yield p, sums.pop(p) / np.float32(positions)


def _gradients(
    pullback: Pullback, batch: Batch, values: Mapping[ParamId, Values], tap: str, rng: np.random.Generator
) -> tuple[Mapping[ParamId, Values], int]:
    """Of −Σ log p(y), the labels y drawn from p, at one batch; and how many positions count."""
    seen: list[int] = []

    def cotangents(outputs: Mapping[str, Values]) -> dict[str, Values]:
        logits = outputs[tap]
        if logits.ndim < 2:
            raise InputError(f'sensitivities="fisher": {tap!r} has shape {logits.shape}; it takes logits, classes last')
        kept = counted(arrays_of(batch), logits.shape[:-1])
        if are_probabilities(logits):
            raise InputError(
                f'sensitivities="fisher": {tap!r} has probabilities, and it takes logits: give the network without its '
                "last softmax"
            )
        p = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
        p /= p.sum(axis=-1, keepdims=True)
        drawn = (np.cumsum(p, axis=-1) < rng.random(p.shape[:-1])[..., None]).sum(axis=-1)
        labels = np.minimum(drawn, p.shape[-1] - 1)
        pulled = p - (np.arange(p.shape[-1]) == labels[..., None])
        pulled[~kept] = 0.0
        seen.append(int(kept.sum()))
        return {tap: pulled.astype(np.float32)}

    found = pullback.gradients(batch, values, cotangents)
    return found, seen[-1]


def _parts(sim: QuantSim, weights: Sequence[ParamId]) -> Iterator[list[ParamId]]:
    """Weights whose gradients are held together."""
    part: list[ParamId] = []
    size = 0
    for w in weights:
        own = 4 * int(np.prod(sim.graph.params[w].shape, dtype=np.int64))
        if part and size + own > GRADIENT_BYTES:
            yield part
            part, size = [], 0
        part.append(w)
        size += own
    if part:
        yield part


def _with_moments(sim: QuantSim, weights: Sequence[ParamId], data: Dataset, take: Callable[[Op, Values], None]) -> None:
    """Give linear ops that alone read one of the weights, with the second moments of their inputs, (groups, K, K).

    Each as soon as it is known: those of all layers together take more than a large network.
    """
    graph, wanted = sim.graph, set(weights)
    shared: dict[object, list[Op]] = {}
    for op in graph.linear_ops:
        if op.weight in wanted and len(graph.users(op.weight)) == 1 and _features(sim, op) <= FEATURES:
            shared.setdefault((op.data_inputs[0], op.kind, repr(op.attrs), _features(sim, op)), []).append(op)
    requests = []
    for op, *_ in shared.values():
        axis = graph.tensors[op.data_inputs[0]].channel_axis
        features = _features(sim, op)
        make = partial(LayerMoments, op, features, axis, paired=False)
        memory = LayerMoments.bytes_for(op, features, paired=False)
        requests.append(Request(op.id, (op.data_inputs[0],), make, memory=memory))
    readers = {ops[0].id: ops for ops in shared.values()}

    def finished(key: str, statistic: Statistic) -> None:
        assert isinstance(statistic, LayerMoments)
        for op in readers[key]:
            take(op, statistic.xx)

    collect(
        requests, lambda source, taps: sim.backend.session(sim.native, taps), data, budget_bytes=MOMENTS_BYTES,
        progress=sim.progress, finished=finished,
    )  # fmt: skip


def _features(sim: QuantSim, op: Op) -> int:
    """K of the op's columns."""
    shape = sim.graph.params[op.weight or ""].shape
    return input_channels(op, shape) // groups_of(op) * int(np.prod(shape[2:], dtype=np.int64))
