"""The part of the backend contract about showing and running a model."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.backend import Backend, Tap
from bitwright.graph import LINEAR_KINDS, BatchNormAttrs, OpKind, SetParams
from bitwright.testing.contract_base import (
    Case,
    Contract,
    assert_close,
    check_weight,
    floats,
    linear_output,
    of_any_case,
    own,
    rows,
    run,
    scale_shift,
)


class GraphContract(Contract):
    """Graph, sessions and parameters."""

    def test_cases_cover_the_kinds(self) -> None:
        """The cases are enough to say something."""
        backend = self.backend()
        graphs = [backend.graph(case.model) for case in self._cases().values()]
        missing = self.kinds - {op.kind for graph in graphs for op in graph} - set(self.declines)
        assert not missing, f"no case holds {sorted(missing)}"

    def test_is_a_backend(self, case: Case) -> None:
        """It offers the protocol, knows its own models and no others."""
        backend = self.backend()
        assert isinstance(backend, Backend)
        assert backend.name
        assert backend.formats() or self.suffix is None
        assert backend.owns(case.model)
        assert not backend.owns(object())
        assert not backend.owns({"x": 1})

    def test_graph_is_well_formed(self, case: Case) -> None:
        """Every name is declared, tensors and parameters don't collide, weights have their canonical shapes."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        assert not graph.tensors.keys() & graph.params.keys()
        for op in graph:
            assert {*op.data_inputs, *op.outputs} <= graph.tensors.keys(), op.id
            assert set(op.params.values()) <= graph.params.keys(), op.id
            if op.kind in LINEAR_KINDS and op.weight is not None:
                check_weight(graph, op)
            if op.kind is OpKind.BATCH_NORM:
                assert isinstance(op.attrs, BatchNormAttrs)
                assert len({graph.params[p].shape for p in op.params.values()}) == 1
        assert {*graph.inputs, *graph.outputs} <= graph.tensors.keys()
        again = backend.graph(model)
        assert again is graph, "the graph is built anew each time that it is asked for"
        again = backend.graph(case.build())
        assert (again.ops, again.tensors, again.params) == (graph.ops, graph.tensors, graph.params)

    def test_input_specs_describe_the_inputs(self, case: Case) -> None:
        """Names in order, ranks and fixed dimensions as in the batch."""
        backend, model = self.backend(), case.model
        specs = backend.input_specs(model)
        assert tuple(specs) == backend.graph(model).inputs
        for name, (shape, dtype) in specs.items():
            value = case.batch[name]
            assert value.ndim == len(shape)
            assert all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
            assert value.dtype == np.dtype(dtype)

    @of_any_case
    def test_taps_don_t_change_what_is_computed(self, case: Case) -> None:
        """Outputs are the same whatever else is tapped; taps have the shapes that the graph states."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plain = run(backend.session(model, [Tap(t) for t in graph.outputs]), case.batch)
        tapped = run(backend.session(model, [Tap(t) for t in floats(graph)]), case.batch)
        for t in graph.outputs:
            assert_close(tapped[t], plain[t], case.tolerance, t)
        for t, value in tapped.items():
            shape = graph.tensors[t].shape
            assert shape is None or value.ndim == len(shape), t
            assert shape is None or all(n is None or n == m for n, m in zip(shape, value.shape, strict=True)), t

    @of_any_case
    def test_reduced_taps(self, case: Case) -> None:
        """Extremes, of the tensor and by channel, are those of the whole tensor; of fewer samples than before too."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        tensors = [t for t in floats(graph) if graph.tensors[t].channel_axis is not None]
        taps = [Tap(t) for t in tensors]
        taps += [Tap(t, "minmax") for t in tensors]
        taps += [Tap(t, "minmax", graph.tensors[t].channel_axis) for t in tensors]
        taps += [Tap(t, axis=axis, step=3) for t in tensors for axis in {None, graph.tensors[t].channel_axis}]
        session, batches = backend.session(model, taps), [case.batch]
        if all(shape[0] is None for shape, _ in backend.input_specs(model).values()):
            batches.append({k: v[:2] for k, v in case.batch.items()})
        for tap, found in ((tap, found) for found in map(session.run, batches) for tap in taps):
            assert set(found) == set(taps)
            if tap.reduce == "minmax":
                whole = np.asarray(found[Tap(tap.tensor)])
                over = None if tap.axis is None else tuple(i for i in range(whole.ndim) if i != tap.axis)
                expected = np.stack([whole.min(axis=over), whole.max(axis=over)])
                low = np.asarray(found[tap])[0]
                # A tensor that its op keeps from being negative may have its minimum reported as 0.
                expected[0] = np.where((low == 0) & (expected[0] > 0), 0, expected[0])
                assert_close(np.asarray(found[tap]), expected, case.tolerance, str(tap))
            elif tap.step > 1:
                whole = np.asarray(found[Tap(tap.tensor)])
                ordered = whole if tap.axis is None else np.moveaxis(whole, tap.axis, 1)
                expected = ordered.reshape(len(whole), -1)[:, :: tap.step]
                assert_close(np.asarray(found[tap]), expected, case.tolerance, str(tap))

    @of_any_case
    def test_samples_are_independent(self, case: Case) -> None:
        """A session takes any number of samples, where the model does, and each gives what it gives alone; what one run
        has handed out is the caller's, and no later one writes into it."""
        backend, model = self.backend(), case.model
        if any(shape[0] is not None for shape, _ in backend.input_specs(model).values()):
            pytest.skip("the model has a fixed batch size")
        session = backend.session(model, [Tap(t) for t in backend.graph(model).outputs])
        whole = run(session, case.batch)
        kept = {t: v.copy() for t, v in whole.items()}
        part = run(session, {k: v[1:3] for k, v in case.batch.items()})
        turned = run(session, {k: np.roll(v, 1, axis=0) for k, v in case.batch.items()})
        for t in whole:
            assert np.array_equal(whole[t], kept[t]), f"{t}: a later run has changed what was handed out"
            assert_close(part[t], whole[t][1:3], case.tolerance, t)
            assert_close(turned[t], np.roll(whole[t], 1, axis=0), case.tolerance, t)

    def test_canonical_layouts(self, case: Case) -> None:
        """`read` weights, applied as `linear_form` says, give what the session gives."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        ops = [op for op in graph.linear_ops if op.data_inputs]
        taps = dict.fromkeys(t for op in ops for t in (op.data_inputs[0], op.output))
        values = run(backend.session(model, [Tap(t) for t in taps]), case.batch)
        for op in ops:
            expected = linear_output(graph, op, values[op.data_inputs[0]], backend.read(model, own(op)))
            assert_close(rows(graph, op, values[op.output]), expected, max(case.tolerance, 1e-5), op.id)

    def test_batch_norm_parameters(self, case: Case) -> None:
        """Batch norms compute γ·(x − μ)/√(var + ε) + β from their `read` parameters."""
        backend, model = self.backend(), case.model
        for op in (op for op in backend.graph(model) if op.kind is OpKind.BATCH_NORM):
            assert isinstance(op.attrs, BatchNormAttrs)
            values = run(backend.session(model, [Tap(op.data_inputs[0]), Tap(op.output)]), case.batch)
            x = values[op.data_inputs[0]]
            scale, shift = scale_shift(backend, model, op)
            shape = [-1 if i == op.attrs.axis % x.ndim else 1 for i in range(x.ndim)]
            expected = x * scale.reshape(shape) + shift.reshape(shape)
            assert_close(values[op.output], expected, max(case.tolerance, 1e-5), op.id)

    def test_read_and_edit_round_trip(self, case: Case) -> None:
        """What is read can be written back; what is written is read; the edited model's original doesn't change."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        values = {p: np.array(v) for p, v in backend.read(model, list(graph.params)).items()}
        assert all(values[p].shape == graph.params[p].shape for p in graph.params)
        before = self.outputs(model, case)
        for p, v in backend.read(model, list(graph.params)).items():
            if v.flags.writeable:
                v[...] = 0  # what is handed out is the reader's own
            assert np.array_equal(backend.read(model, [p])[p], values[p]), f"writing into what was read changed {p}"
        same = backend.edit(model, [SetParams(values)])
        for t, v in self.outputs(same, case).items():
            assert np.array_equal(v, before[t]), t
        weights = {op.weight: values[op.weight] for op in graph.linear_ops if op.weight is not None}
        rng = np.random.default_rng(0)
        new = {p: (v * rng.uniform(0.5, 1.5, v.shape)).astype(np.float32) for p, v in weights.items()}
        changed = backend.edit(model, [SetParams(new)])
        for p, v in backend.read(changed, list(new)).items():
            assert np.array_equal(v, new[p]), p
        for p, v in backend.read(model, list(values)).items():
            assert np.array_equal(v, values[p]), f"editing changed the original's {p}"
        for t, v in self.outputs(model, case).items():
            assert np.array_equal(v, before[t]), t
