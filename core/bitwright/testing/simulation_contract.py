"""The part of the backend contract about fake quantization and partial execution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.backend import ParamUpdates, PartialExecution, Tap
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import SetParams, moved_from
from bitwright.grids import QuantSpec, encoding_from_range
from bitwright.placement import SharedWith
from bitwright.testing.contract_base import (
    Case,
    Contract,
    assert_close,
    bare,
    floats,
    grid_points,
    linear_output,
    own,
    rows,
    run,
)
from bitwright.testing.harness import min_max_encodings, simple_plan


class SimulationContract(Contract):
    """Simulations and segments."""

    @pytest.mark.parametrize(
        "spec",
        [
            QuantSpec(8, signed=False, symmetric=False),
            QuantSpec(8),
            QuantSpec(8, strict=True),
            QuantSpec(4, signed=False, symmetric=False),
            QuantSpec(16, signed=False, symmetric=False),
        ],
        ids=["uint8", "int8", "int8 strict", "uint4", "uint16"],
    )
    def test_fake_quantization_is_the_core_s_grid(self, case: Case, spec: QuantSpec) -> None:
        """Bit-equal to `Encoding.fake_quantize` on every code, every midpoint between codes, and beyond the ends."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        plan = simple_plan(graph, activations=spec)
        for t in (t for t in graph.inputs if graph.tensors[t].is_float):
            encoding = encoding_from_range(spec, -1.3, 2.1)
            batch = {**case.batch, t: grid_points(encoding, case.batch[t].shape)}
            simulation = bare(backend, model, case, plan)
            simulation.set({t: encoding})
            found = run(simulation.session([Tap(t)]), batch)[t]
            assert np.array_equal(found, encoding.fake_quantize(batch[t]))

    def test_activations_are_quantized_where_the_plan_says(self, case: Case) -> None:
        """With one site active, its tensor is the float one on the grid; bypassed, the network is the float one."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        plan = simple_plan(graph, weights=QuantSpec(8))
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulation = bare(backend, model, case, plan)
        floats = run(backend.session(model, [Tap(t) for t in plan.activations]), case.batch)
        outputs = self.outputs(model, case)
        session = simulation.session([Tap(t) for t in plan.activations])
        for site in plan.activations:
            simulation.set({site: table[site]})
            assert simulation.get()[site].equals(table[site])
            found = run(session, case.batch)[site]
            expected = table[site].fake_quantize(floats[site])
            # Fusions may move the float value by its last bit, and so a few values to the neighbouring code.
            steps = np.rint(np.abs(found - expected) / float(table[site].scale))
            assert steps.max(initial=0) <= 1, site
            assert np.mean(steps > 0) <= 0.01, site
            simulation.set({site: None})
        for t, v in run(simulation.session([Tap(t) for t in graph.outputs]), case.batch).items():
            assert_close(v, outputs[t], case.tolerance, t)

    def test_weights_are_quantized(self, case: Case) -> None:
        """With one weight active, its op computes with the weight on its grid."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        plan = simple_plan(graph, weights=QuantSpec(4))
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulation = bare(backend, model, case, plan)
        for op in graph.linear_ops:
            assert op.weight is not None
            if len(graph.users(op.weight)) > 1:
                continue
            simulation.set({op.weight: table[op.weight]})
            values = run(simulation.session([Tap(op.data_inputs[0]), Tap(op.output)]), case.batch)
            params = dict(backend.read(model, own(op)))
            params[op.weight] = table[op.weight].fake_quantize(params[op.weight])
            expected = linear_output(graph, op, values[op.data_inputs[0]], params)
            assert_close(rows(graph, op, values[op.output]), expected, max(case.tolerance, 1e-5), op.id)
            simulation.set({op.weight: None})

    def test_sites_that_share_follow_their_root(self, case: Case) -> None:
        """A tensor whose op only moves values is on its root's grid; either name sets it, and `get` has both."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        plan = simple_plan(graph)
        for op in graph:
            root, tied = next((t for t in moved_from(op) if t in plan.activations), None), op.output
            if root is None or len(moved_from(op)) > 1 or tied not in plan:
                continue
            shared = plan.changed({tied: replace(plan[tied], decision=SharedWith(root))})
            table = min_max_encodings(backend, model, shared, [case.batch])
            simulation = bare(backend, model, case, shared)
            for name, factor in ((root, 20), (tied, 30)):
                coarse = table[root].with_(scale=table[root].scale * np.float32(factor))
                simulation.set({name: coarse})
                assert simulation.get()[root].equals(coarse)
                assert simulation.get()[tied].equals(coarse)
                found = run(simulation.session([Tap(root), Tap(tied)]), case.batch)
                assert np.array_equal(found[tied], coarse.fake_quantize(found[tied])), op.id
                assert set(np.unique(found[tied])) <= {*np.unique(found[root]), 0.0}, op.id
            simulation.set({tied: None})
            assert root not in simulation.get()

    def test_unknown_sites_are_refused(self, case: Case) -> None:
        """And nothing is changed by the attempt."""
        backend, model = self.backend(), case.build()
        plan = simple_plan(backend.graph(model))
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulation = backend.simulate(model, plan, table)
        with pytest.raises(EncodingError):
            simulation.set({"no such site": next(iter(table.values()))})
        assert all(simulation.get()[s].equals(e) for s, e in table.items())

    def test_simulating_leaves_the_model_alone(self, case: Case) -> None:
        """The float model computes what it did before."""
        backend, model = self.backend(), case.build()
        before = self.outputs(model, case)
        plan = simple_plan(backend.graph(model))
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulated = backend.simulate(model, plan, table).session([Tap(t) for t in before])
        assert all(np.isfinite(v).all() for v in run(simulated, case.batch).values())
        for t, v in self.outputs(model, case).items():
            assert np.array_equal(v, before[t])

    def test_segments_compute_what_the_whole_does(self, case: Case) -> None:
        """From any tensor through which everything flows, in the float and in the simulated network."""
        backend, model = self.backend(), case.build()
        if not isinstance(backend, PartialExecution):
            pytest.skip("no PartialExecution")
        graph = backend.graph(model)
        plan = simple_plan(graph)
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulation = backend.simulate(model, plan, table)
        networks: list[tuple[Any, Any, float]] = [
            (
                lambda taps: backend.session(model, taps),
                lambda feeds, taps: backend.segment(model, feeds, taps),
                case.tolerance,
            ),
            (simulation.session, simulation.segment, 1e-2),  # a value on the edge may fall to the next code
        ]
        for whole, segment, tolerance in networks:
            values = run(whole([Tap(t) for t in floats(graph)]), case.batch)
            for op in graph.linear_ops:
                feeds = [op.data_inputs[0]]
                part = run(segment(feeds, [Tap(op.output)]), {feeds[0]: values[feeds[0]]})
                assert_close(part[op.output], values[op.output], tolerance, op.id)

    def test_segments_that_can_t_be_computed_are_refused(self, case: Case) -> None:
        """A tap before the feed is a ModelError when the segment is compiled."""
        backend, model = self.backend(), case.build()
        if not isinstance(backend, PartialExecution):
            pytest.skip("no PartialExecution")
        graph = backend.graph(model)
        first = graph.linear_ops[0]
        with pytest.raises(ModelError):
            backend.segment(model, [graph.outputs[0]], [Tap(first.output)])

    def test_new_parameters_are_those_of_an_edited_model(self, case: Case) -> None:
        """`ParamUpdates.set_params` gives bit for bit what simulating the edited model gives; the model stays."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        plan = simple_plan(graph)
        table = min_max_encodings(backend, model, plan, [case.batch])
        simulation = backend.simulate(model, plan, table)
        if not isinstance(simulation, ParamUpdates):
            pytest.skip("no ParamUpdates")
        before = self.outputs(model, case)
        taps = [Tap(t) for t in graph.outputs]
        run(simulation.session(taps), case.batch)
        known = backend.read(model, list(graph.params))
        for factor in (0.5, 0.75):
            values = {p: v * np.float32(factor) for p, v in known.items()}
            simulation.set_params(values)
            found = run(simulation.session(taps), case.batch)
            edited = backend.simulate(backend.edit(model, [SetParams(values)]), plan, table)
            for t, v in run(edited.session(taps), case.batch).items():
                assert np.array_equal(found[t], v), t
        with pytest.raises(ModelError):
            simulation.set_params({"no such parameter": np.zeros(3, np.float32)})
        for t, v in self.outputs(model, case).items():
            assert np.array_equal(v, before[t])
