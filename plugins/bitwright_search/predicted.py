"""Phase 1 on a bank: noise of each group at each candidate in closed form, with no data and without running anything.

A weight's noise is that of its layer's output, δᵀHδ / wᵀHw, an activation's that of its own values, from its histogram;
a group has the sum. That says how much is lost there, and not what the rest of the network makes of it: sums over
groups are the noise at the outputs if every op passes relative noise on as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.backend import Batch
from bitwright.bank import Bank, tensor_noise, weight_noise
from bitwright.errors import InputError
from bitwright.simulation import QuantSim
from bitwright_search.candidates import Candidate, Group
from bitwright_search.solvers import Table

NOTE = (
    "sensitivities are predicted from the bank: each group's noise at its own layers, not measured at the network's "
    "outputs; evaluate the result on data"
)


def predicted_noise(sim: QuantSim, groups: Sequence[Group], candidates: Sequence[Candidate], bank: Bank) -> Table:
    """Relative noise power of each group at each candidate, (groups, candidates); infinite where it isn't allowed.

    Raises:
        InputError: the bank is of another network, or lacks a layer or a tensor.
    """
    noises = np.full((len(groups), len(candidates)), np.inf)
    users = {op.weight: op for op in reversed(sim.graph.linear_ops)}
    for c, candidate in enumerate(candidates):
        members = [(g, group) for g, group in enumerate(groups) if c in group.allowed]
        types = {site: text for _, group in members for site, text in group.types(sim, candidate).items()}
        twin = sim.retyped(types).calibrate(bank)
        for g, group in members:
            weights = [weight_noise(bank, users[w], sim.params[w], twin.encodings[w]) for w in group.weights]
            roots = dict.fromkeys(map(twin.plan.root, group.activations))
            values = [
                max(tensor_noise(bank, t, twin.encodings[root]) for t in twin.plan.observed(root))
                for root in roots
                if root in twin.encodings
            ]
            noises[g, c] = sum(weights) + sum(values)
    return noises


def blank_batch(sim: QuantSim) -> Batch:
    """One sample of zeros, for shapes that the graph doesn't tell.

    Raises:
        InputError: an input has further free dimensions, which only data have.
    """
    found = {}
    for name, (shape, dtype) in sim.backend.input_specs(sim.native).items():
        if None in shape[1:]:
            raise InputError(f"input {name!r} has free dimensions, {shape}: costs need data, or cost='weight_bytes'")
        found[name] = np.zeros([1 if n is None else n for n in shape], dtype)
    return found
