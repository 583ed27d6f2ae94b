"""The part of the backend contract about fake quantization and partial execution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.backend import ParamUpdates, PartialExecution, Tap
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import SetParams, moved_from
from bitwright.placement import SharedWith
from bitwright.testing.contract_base import (
    Case,
    Contract,
    assert_close,
    bare,
    floats,
    holds,
    min_max_table,
    of_any_case,
    plain,
    run,
)
from bitwright.testing.harness import simple_plan


class SimulationContract(Contract):
    """Simulations and segments."""

    def test_sites_that_share_follow_their_root(self, case: Case) -> None:
        """A tensor whose op only moves values is on its root's grid; either name sets it, and `get` has both."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan = simple_plan(graph)
        moved = [(op.output, moved_from(op)[0]) for op in graph if len(moved_from(op)) == 1 and op.output in plan]
        moved = [(t, source) for t, source in moved if {t, source} <= set(plan.activations)]
        plan = plan.changed({t: replace(plan[t], decision=SharedWith(source)) for t, source in moved})
        simulation = bare(backend, case, plan)
        table = min_max_table(backend, case, plan)
        session = simulation.session([Tap(t) for t in dict.fromkeys(t for pair in moved for t in pair)])
        for tied, source in moved:
            root = plan.root(tied)
            for name, factor in ((root, 20), (tied, 30)):
                coarse = table[root].with_(scale=table[root].scale * np.float32(factor))
                simulation.set({name: coarse})
                assert holds(simulation, {root: coarse, tied: coarse})
                found = run(session, case.batch)
                assert np.array_equal(found[tied], coarse.fake_quantize(found[tied])), tied
                assert set(np.unique(found[tied])) <= {*np.unique(found[source]), 0.0}, tied
            simulation.set({tied: None})
            assert root not in simulation.get()

    @of_any_case
    def test_unknown_sites_are_refused(self, case: Case) -> None:
        """And nothing is changed by the attempt."""
        _, table, simulation = plain(self.backend(), case)
        with pytest.raises(EncodingError):
            simulation.set({"no such site": next(iter(table.values()))})
        assert holds(simulation, table)

    @of_any_case
    def test_simulating_leaves_the_model_alone(self, case: Case) -> None:
        """The float model computes what it did before."""
        backend, model = self.backend(), case.model
        before = self.outputs(model, case)
        plan = simple_plan(backend.graph(model))
        table = min_max_table(backend, case, plan)
        simulated = backend.simulate(model, plan, table).session([Tap(t) for t in before])
        assert all(np.isfinite(v).all() for v in run(simulated, case.batch).values())
        for t, v in self.outputs(model, case).items():
            assert np.array_equal(v, before[t])

    def test_segments_compute_what_the_whole_does(self, case: Case) -> None:
        """From any tensor through which everything flows, in the float and in the simulated network."""
        backend, model = self.backend(), case.model
        if not isinstance(backend, PartialExecution):
            pytest.skip("no PartialExecution")
        graph = backend.graph(model)
        _, table, simulation = plain(backend, case)
        networks: list[tuple[Any, Any, bool]] = [
            (lambda taps: backend.session(model, taps), lambda feeds, taps: backend.segment(model, feeds, taps), False),
            (simulation.session, simulation.segment, True),
        ]
        for whole, segment, quantized in networks:
            values = run(whole([Tap(t) for t in floats(graph)]), case.batch)
            for op in (*graph.linear_ops[:2], *graph.linear_ops[2:][-2:]):
                feeds = [op.data_inputs[0]]
                part = run(segment(feeds, [Tap(op.output)]), {feeds[0]: values[feeds[0]]})[op.output]
                if quantized:  # a value on the edge may fall to the next code
                    grid = table[op.output]
                    assert np.array_equal(grid.fake_quantize(part), part), f"{op.id}: not on the grid of {op.output}"
                    steps = grid.steps_between(part, values[op.output])
                    assert steps.max(initial=0) <= 1, op.id
                    assert np.count_nonzero(steps) <= 1 + 0.01 * part.size, op.id
                else:
                    assert_close(part, values[op.output], case.tolerance, op.id)

    @of_any_case
    def test_segments_that_can_t_be_computed_are_refused(self, case: Case) -> None:
        """A tap before the feed is a ModelError when the segment is compiled."""
        backend, model = self.backend(), case.model
        if not isinstance(backend, PartialExecution):
            pytest.skip("no PartialExecution")
        graph = backend.graph(model)
        before = next(op.output for op in graph if op.output not in graph.outputs)
        with pytest.raises(ModelError):
            backend.segment(model, [graph.outputs[0]], [Tap(before)])

    @of_any_case
    def test_new_parameters_are_those_of_an_edited_model(self, case: Case) -> None:
        """`ParamUpdates.set_params` gives bit for bit what simulating the edited model gives; the model stays."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan, table, simulation = plain(backend, case)
        if not isinstance(simulation, ParamUpdates):
            pytest.skip("no ParamUpdates")
        before = self.outputs(model, case)
        taps = [Tap(t) for t in graph.outputs]
        simulated = run(simulation.session(taps), case.batch)
        known = backend.read(model, list(graph.params))
        try:
            for factor in (0.5, 0.75):
                values = {p: v * np.float32(factor) for p, v in known.items()}
                simulation.set_params(values)
            with pytest.raises(ModelError):
                simulation.set_params({"no such parameter": np.zeros(3, np.float32)})
            found = run(simulation.session(taps), case.batch)
            for t, v in self.outputs(model, case).items():
                assert np.array_equal(v, before[t]), f"{t} of the float model has changed"
            edited = backend.simulate(backend.edit(model, [SetParams(values)]), plan, table)
            for t, v in run(edited.session(taps), case.batch).items():
                assert np.array_equal(found[t], v), t
        finally:
            simulation.set_params(known)
        for t, v in run(simulation.session(taps), case.batch).items():
            assert np.array_equal(v, simulated[t]), f"{t}, with the old parameters again"
