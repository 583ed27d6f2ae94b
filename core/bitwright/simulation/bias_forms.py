"""Biases that ops of different scales share: what a simulation makes of their int32 forms.

An integer accumulator takes a bias in its own unit, s_input · s_weight, so that a bias of several ops has a form for
each (`plan.OwnForms`). Coarse weights make the unit coarse, and its rounding moves codes; a simulation sees it by
copies of the bias, one for each form, in a model that is only simulated.
"""

from __future__ import annotations

from typing import Any

from bitwright.backend import Backend, Simulation
from bitwright.calibration import bias_encoding
from bitwright.graph import OpId, SplitSharedParam
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Derived, OwnForms, Plan, SharedWith, Site, SiteId, SiteKind


def simulate(backend: Backend[Any], model: object, plan: Plan, table: EncodingTable) -> Simulation[Any]:
    """`Backend.simulate` of a full table, with every form of a shared bias on its own grid.

    Args:
        backend, model: the float model, which stays as it is.
        plan: of the model.
        table: one encoding for every quantized site.
    """
    forms = _forms(backend, model, plan, table)
    if not forms:
        return backend.simulate(model, plan, table)
    edits = [SplitSharedParam(op, bias) for bias, grids in forms.items() for op in list(grids)[1:]]
    split = backend.edit(model, edits)
    before, graph = backend.graph(model), backend.graph(split)
    sites: dict[SiteId, Site] = {}
    encodings: dict[SiteId, Encoding] = {}
    for op in graph:
        for role, param in op.params.items():
            whole = before.op(op.id).params[role] if op.id in before else param
            if whole in forms:
                sites[param] = Site(param, SiteKind.PARAMETER, Derived(forms[whole][op.id][0]), op.id, role)
                encodings[param] = forms[whole][op.id][1]
            elif param not in plan and whole in plan:  # some frameworks copy the whole layer
                sites[param] = Site(param, SiteKind.PARAMETER, SharedWith(whole), op.id, role)
                if whole in table:
                    encodings[param] = table[whole]
    return backend.simulate(split, plan.changed(sites), table.merged(encodings))


Form = tuple[tuple[SiteId, SiteId], Encoding]
"""(input, weight) of an op, and the grid of its accumulators."""


def _forms(backend: Backend[Any], model: object, plan: Plan, table: EncodingTable) -> dict[SiteId, dict[OpId, Form]]:
    """Shared biases → the form for each op."""
    shared = [s for s in plan if isinstance(plan[s].decision, OwnForms)]
    found: dict[SiteId, dict[OpId, Form]] = {}
    graph = backend.graph(model) if shared else None
    for bias in shared:
        assert graph is not None
        forms: dict[OpId, Form] = {}
        for op in graph.users(bias):
            source, weight = op.data_inputs[0], op.weight or ""
            known = source in table and weight in table
            grid = bias_encoding(table[source], table[weight]) if known else None
            if grid is not None:
                forms[op.id] = (source, weight), grid
        if len(forms) == len(graph.users(bias)):
            found[bias] = forms
    return found
