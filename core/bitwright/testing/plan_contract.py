"""The part of the backend contract about whole plans: what every shipped target makes of a model, simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from bitwright.backend import Backend, Simulation, Tap
from bitwright.calibration import bias_encoding, full_table, guarded
from bitwright.graph import Graph, OpId, ParamId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import OwnForms, Plan, build_plan
from bitwright.simulation import bias_forms
from bitwright.targets import target_names
from bitwright.testing.contract_base import Array, Case, Contract, fallback_of, min_max_table, run
from bitwright.testing.replay import Quantization, agrees, departure, replay, tappable

TYPES: Mapping[str, tuple[str, str, str]] = {
    "int4 blocks × uint16": ("htp_v75", "int4:block2", "uint16"),
    "int4 LPBQ × int16": ("htp_v79", "int4:lpbq2", "int16"),
    "fp8 × fp8": ("per_tensor", "fp8", "fp8"),
    "float16 × bfloat16": ("default", "float16", "bfloat16"),
    "int16 × float16": ("generic-int8", "int16", "float16"),
    "int4 blocks, weights only": ("default", "int4:block2", "float"),
    "float × uint8": ("htp_v73", "float", "uint8"),
}
"""Target, weights and activations, beside what the targets have by default."""


class PlanContract(Contract):
    """The whole plan of a target, with the encodings that its model gets: op by op as the numpy reference computes it.

    Attributes:
        targets: names of targets, or files; by default all that come with bitwright.
    """

    targets: ClassVar[Sequence[str]] = target_names(shipped=True)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each case, or for each type that a case takes."""
        if metafunc.function.__name__ != "test_every_type_is_simulated":
            super().pytest_generate_tests(metafunc)
            return
        pairs = {f"{c}-{name}": (case, name) for c, case in self._cases().items() for name in self._taken(TYPES, case)}
        metafunc.parametrize(("case", "name"), list(pairs.values()), ids=list(pairs))

    def test_every_target_is_simulated(self, case: Case) -> None:
        """The plan that QuantSim makes, and its encodings: each op makes of its inputs what the reference makes."""
        backend, graph = self.backend(), self.backend().graph(case.model)
        seen: set[tuple[tuple[str, str], ...]] = set()
        for target in self._taken(self.targets, case):
            plan = build_plan(graph, target, scheme="minmax")
            key = tuple((s, repr(site.decision)) for s, site in plan.items())
            if key not in seen:  # several targets decide the same
                seen.add(key)
                simulated(backend, case, plan, target)

    def test_every_type_is_simulated(self, case: Case, name: str) -> None:
        """The same with blocks, two-level scales, 16 bits, float16, bfloat16 and fp8, and of one side alone."""
        target, weights, activations = TYPES[name]
        backend = self.backend()
        plan = build_plan(backend.graph(case.model), target, weights=weights, activations=activations, scheme="minmax")
        simulated(backend, case, plan, name)


def simulated(backend: Backend[Any], case: Case, plan: Plan, what: str) -> None:
    """Assert that the simulation of a plan is the reference's, and that `get` says what is in force."""
    graph, model = backend.graph(case.model), case.model
    table = calibrated(backend, case, plan)
    simulation = bias_forms.simulate(backend, model, plan, table)
    biases = own_forms(graph, plan, table)
    if not biases:
        check_table(simulation, plan, table)
    check_network(backend, case, simulation, Quantization(plan, table, biases), what)


def check_network(
    backend: Backend[Any], case: Case, simulation: Simulation[Any], quantization: Quantization, what: str
) -> None:
    """Assert that each op of a simulation makes of its inputs what the reference does, on the same grid."""
    graph = backend.graph(case.model)
    values = run(simulation.session([Tap(t) for t in tappable(graph)]), case.batch)
    params = case.kept.setdefault("params", backend.read(case.model, list(graph.params)))
    fallback = fallback_of(backend, case)
    faults: list[str] = []
    for t in graph.inputs:
        encoding = quantization.encodings.get(t) if t in quantization.plan else None
        given = np.asarray(case.batch[t]).astype(values[t].dtype)
        if not agrees(values[t], given, encoding, 0.0):
            faults.append(f"input {t}: {departure(values[t], given, encoding)}")
    tolerance = max(case.tolerance, 1e-5)
    found, _ = replay(
        graph, values, params, quantization, tolerance, lambda op, rounded: fallback.outputs(op, values, rounded)
    )
    faults += found
    assert not faults, f"{what}: " + "\n".join(faults[:8])


def check_table(simulation: Simulation[Any], plan: Plan, table: EncodingTable) -> None:
    """Assert that `get` has what is in force: at roots, at sites that share with them, at derived biases."""
    found = simulation.get()
    assert set(found) == set(table), f"`get` has other sites: {sorted(set(found) ^ set(table))}"
    for site, encoding in table.items():
        assert found[site].equals(encoding), f"`get` has another encoding for {site!r}: {found[site]}, not {encoding}"


def calibrated(backend: Backend[Any], case: Case, plan: Plan) -> EncodingTable:
    """Every site's encoding: weights by their values, activations by the float network's extremes."""
    params = backend.read(case.model, list(backend.graph(case.model).params))
    return full_table(plan, guarded(plan, min_max_table(backend, case, plan), params))


def own_forms(graph: Graph, plan: Plan, table: EncodingTable) -> dict[tuple[OpId, ParamId], Encoding]:
    """Grids of the biases that have one for each op."""
    made: dict[tuple[OpId, ParamId], Encoding] = {}
    for bias in (s for s in plan if isinstance(plan[s].decision, OwnForms)):
        users = graph.users(bias)
        grids = {}
        for op in users:
            source, weight = op.data_inputs[0], op.weight or ""
            grid = bias_encoding(table[source], table[weight]) if source in table and weight in table else None
            if grid is not None:
                grids[op.id, bias] = grid
        if len(grids) == len(users):
            made |= grids
    return made


def rounded(params: Mapping[ParamId, Array], table: Mapping[str, Encoding]) -> dict[ParamId, Array]:
    """Parameters on their grids."""
    return {p: table[p].fake_quantize(v) if p in table else v for p, v in params.items()}
