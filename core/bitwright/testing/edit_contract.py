"""The part of the backend contract about edits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from bitwright.backend import Backend, Batch, Tap
from bitwright.errors import BitwrightError, ModelError
from bitwright.graph import (
    ACTIVATION_KINDS,
    ACTIVATION_TYPES,
    LINEAR_KINDS,
    ConvAttrs,
    Edit,
    FoldBatchNorm,
    Graph,
    Op,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
    TensorId,
    from_matrix,
    output_channels,
    to_matrix,
)
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    assert_close,
    of_any_case,
    own,
    rows,
    run,
    scale_shift,
)
from bitwright.testing.kernels import ACTIVATIONS
from bitwright.testing.replay import replay, tappable


class EditContract(Contract):
    """Each edit does what it says, on a copy."""

    @of_any_case
    def test_wrong_edits_are_refused(self, case: Case) -> None:
        """Unknown ids and wrong shapes raise ModelError."""
        backend, model = self.backend(), case.model
        weight = next((op.weight for op in backend.graph(model).linear_ops if op.weight), None)
        bad: list[Any] = [
            SetParams({"no such parameter": np.zeros(1, np.float32)}),
            SetBias("no such op", np.zeros(1, np.float32)),
            RemoveOp("no such op"),
        ]
        if weight is not None:
            bad.append(SetParams({weight: np.zeros((1, 2, 3), np.float32)}))
        for edit in bad:
            with pytest.raises(BitwrightError):
                backend.edit(model, [edit])
        with pytest.raises(BitwrightError):
            backend.read(model, ["no such parameter"])

    def test_new_values_are_used(self, case: Case) -> None:
        """Every parameter can be set, biases and statistics too, and ops compute with what was set."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        self.outputs(model, case)  # what is kept of it must not serve for another
        known = backend.read(model, list(graph.params))
        new = {p: (v * np.float32(0.8) + np.float32(0.01)).astype(np.float32) for p, v in known.items()}
        changed = backend.edit(model, [SetParams(new)])
        for p, v in backend.read(changed, list(new)).items():
            slack = 0 if graph.params[p].dtype == "float32" else 1e-2
            assert np.allclose(v, new[p], rtol=slack, atol=slack), p
        check_replays(backend, changed, case.batch, case.tolerance)

    def test_every_linear_op_takes_a_bias(self, case: Case) -> None:
        """SetBias replaces or creates; the output moves by exactly the difference. Of two edits the last one counts."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for op in graph.linear_ops:
            assert op.weight is not None
            old = backend.read(model, [p for r, p in op.params.items() if r is ParamRole.BIAS])
            size = output_channels(op, graph.params[op.weight].shape)
            value = np.linspace(-1, 1, size).astype(np.float32)
            own = op.params.get(ParamRole.BIAS)
            alone = own is not None and len(graph.users(own)) == 1
            first = [SetParams({own: value + np.float32(1)})] if own is not None and alone else []
            changed = backend.edit(model, [*first, SetBias(op.id, value)])
            moved = backend.graph(changed).op(op.id)
            bias = moved.params[ParamRole.BIAS]
            assert np.array_equal(backend.read(changed, [bias])[bias], value)
            taps = run(backend.session(model, [Tap(op.output)]), case.batch)
            after = run(backend.session(changed, [Tap(moved.output)]), case.batch)
            kept = [p for p in graph.params if p != own]
            before, now = backend.read(model, kept), backend.read(changed, kept)
            assert all(np.array_equal(before[p], now[p]) for p in kept), f"{op.id}: another op's parameter changed"
            for other in (o for o in graph.users(own or "") if o.id != op.id):
                its = backend.graph(changed).op(other.id).params[ParamRole.BIAS]
                assert np.array_equal(backend.read(changed, [its])[its], old[own or ""]), f"{op.id}: {other.id} too"
            step = value - next(iter(old.values()), np.zeros(size, np.float32))
            expected = rows(graph, op, taps[op.output]) + step[:, None]
            assert_close(rows(graph, op, after[moved.output]), expected, max(case.tolerance, 1e-5), op.id)

    def test_batch_norms_fold(self, case: Case) -> None:
        """Arithmetic by SetParams and SetBias, rewiring by FoldBatchNorm: outputs and their names stay."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        before = self.outputs(model, case)
        for norm in (op for op in graph if op.kind is OpKind.BATCH_NORM):
            into = graph.producer(norm.data_inputs[0])
            if into is None or into.kind not in LINEAR_KINDS or graph.sole_consumer(into.output) is not norm:
                continue
            assert into.weight is not None
            scale, shift = scale_shift(backend, model, norm)
            values = backend.read(model, own(into))
            matrix = to_matrix(into, values[into.weight].astype(np.float64))
            weight = from_matrix(into, matrix * scale.reshape(*matrix.shape[:2], 1), values[into.weight].shape)
            bias = values[into.params[ParamRole.BIAS]] if ParamRole.BIAS in into.params else np.zeros(scale.size)
            edits: list[Edit] = [
                FoldBatchNorm(norm.id, into.id),
                SetBias(into.id, (bias * scale + shift).astype(np.float32)),
                SetParams({into.weight: weight.astype(np.float32)}),
            ]
            for p, v in backend.read(backend.edit(model, edits[:1]), own(into)).items():
                assert np.array_equal(v, values[p]), f"FoldBatchNorm rewires; it has changed {p}"
            folded = backend.edit(model, edits)
            after = backend.graph(folded)
            assert norm.id not in after
            assert norm.id in backend.graph(model), "editing changed the original"
            assert after.op(into.id).output == norm.output
            for t, v in self.outputs(folded, case).items():
                assert_close(v, before[t], 10 * case.tolerance, t)

    def test_batch_norms_fold_forward(self, case: Case) -> None:
        """Into the linear op that alone reads it: that op reads what the norm read, and all else keeps its name."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for norm in (op for op in graph if op.kind is OpKind.BATCH_NORM):
            into = graph.sole_consumer(norm.output)
            if (
                into is None
                or into.kind not in LINEAR_KINDS
                or into.weight is None
                or len(graph.users(into.weight)) > 1
            ):
                continue
            scale, shift = scale_shift(backend, model, norm)
            values = backend.read(model, own(into))
            matrix = to_matrix(into, values[into.weight].astype(np.float64))
            s, t = (np.repeat(v.reshape(len(matrix), -1), matrix.shape[2] * len(matrix) // v.size, axis=1)
                    for v in (scale, shift))  # fmt: skip
            width = output_channels(into, graph.params[into.weight].shape)
            bias = values[into.params[ParamRole.BIAS]] if ParamRole.BIAS in into.params else np.zeros(width)
            bias = bias + np.einsum("gok,gk->go", matrix, t).reshape(-1)
            weight = from_matrix(into, matrix * s[:, None, :], values[into.weight].shape).astype(np.float32)
            edits: list[Edit] = [
                FoldBatchNorm(norm.id, into.id),
                SetParams({into.weight: weight}),
                SetBias(into.id, bias.astype(np.float32)),
            ]
            folded = backend.edit(model, edits)
            after = backend.graph(folded)
            assert norm.id not in after
            assert norm.id in backend.graph(model), "editing changed the original"
            assert after.op(into.id).data_inputs[0] == norm.data_inputs[0]
            assert after.op(into.id).output == into.output
            check_replays(backend, folded, case.batch, case.tolerance)
            if not (isinstance(into.attrs, ConvAttrs) and any(map(any, into.attrs.pads))):
                before = self.outputs(model, case)  # the shift isn't a bias where zeros are padded
                for tensor, v in self.outputs(folded, case).items():
                    assert_close(v, before[tensor], 10 * case.tolerance, tensor)

    def test_removed_ops_are_gone(self, case: Case) -> None:
        """RemoveOp: what read the op reads its input; all other ops stay, and compute what the graph says."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        ops = [op for op in graph if op.kind in ACTIVATION_KINDS and op.params == {} and op.output not in graph.outputs]
        for op in ops[:3]:
            changed = backend.edit(model, [RemoveOp(op.id)])
            after = backend.graph(changed)
            assert {o.id for o in after} == {o.id for o in graph} - {op.id}
            for reader in graph.consumers(op.output):
                expected = tuple(op.data_inputs[0] if t == op.output else t for t in reader.inputs)
                assert after.op(reader.id).inputs == expected, reader.id
            check_replays(backend, changed, case.batch, case.tolerance)
            assert op.id in backend.graph(model), "editing changed the original"

    def test_clipped_relus_become_relus(self, case: Case) -> None:
        """ReplaceActivation drops the bound and keeps id and tensors."""
        backend, model = self.backend(), case.model
        for op in (op for op in backend.graph(model) if op.kind is OpKind.CLIPPED_RELU):
            changed = backend.edit(model, [ReplaceActivation(op.id, "Relu")])
            new = backend.graph(changed).op(op.id)
            assert new.kind is OpKind.RELU
            assert (new.data_inputs, new.outputs) == (op.data_inputs, op.outputs)
            values = run(backend.session(changed, [Tap(op.data_inputs[0]), Tap(op.output)]), case.batch)
            assert np.array_equal(values[op.output], np.maximum(values[op.data_inputs[0]], 0))

    @of_any_case
    def test_every_activation_type(self, case: Case) -> None:
        """ReplaceActivation makes all of `ACTIVATION_TYPES`, with the numbers of the kernels; id and tensors stay."""
        backend, model = self.backend(), case.model
        op = _activation(backend.graph(model))
        if op is None:
            pytest.skip("the case has no activation")
        source, wide = op.data_inputs[0], _wide(case)
        without = run_outputs(backend, backend.edit(model, [RemoveOp(op.id)]), wide)
        for type, shown in ACTIVATION_TYPES.items():
            changed = backend.edit(model, [ReplaceActivation(op.id, type)])
            graph = backend.graph(changed)
            if type == "Identity":  # which a backend may show or not
                found, expected = run_outputs(backend, changed, wide), without
            else:
                new = graph.op(op.id)
                assert new.outputs == op.outputs, type
                if new.data_inputs == op.data_inputs:
                    assert (new.kind, new.type) == (shown.kind, shown.type), type
                    if shown.attrs is not None:  # frameworks keep numbers as float32
                        assert new.attrs is not None, type
                        for key, number in asdict(shown.attrs).items():
                            assert getattr(new.attrs, key) == (None if number is None else pytest.approx(number)), type
                values = run(backend.session(changed, [Tap(source), Tap(op.output)]), wide)
                found, expected = {op.output: values[op.output]}, {op.output: ACTIVATIONS[type](values[source])}
            for t in expected:
                assert_close(found[t], expected[t], max(case.tolerance, 2e-6), f"{type}: {t}")
        assert _activation(backend.graph(model)) == op, "editing changed the original"

    @of_any_case
    def test_edits_follow_one_another(self, case: Case) -> None:
        """Each edit of a sequence sees the model that the ones before it have made."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        op = _activation(graph)
        if op is not None:
            removed = run_outputs(backend, backend.edit(model, [RemoveOp(op.id)]), case.batch)
            edits: list[Edit] = [*(ReplaceActivation(op.id, type) for type in ACTIVATION_TYPES), RemoveOp(op.id)]
            for t, v in run_outputs(backend, backend.edit(model, edits), case.batch).items():
                assert_close(v, removed[t], case.tolerance, t)
            with pytest.raises(ModelError, match=repr(op.id)):
                backend.edit(model, [RemoveOp(op.id), ReplaceActivation(op.id, "Relu")])
        for linear in graph.linear_ops[:2]:
            assert linear.weight is not None
            width = output_channels(linear, graph.params[linear.weight].shape)
            ramp = np.arange(width, dtype=np.float32)
            changed = backend.edit(model, [SetBias(linear.id, ramp), SetBias(linear.id, -ramp)])
            bias = backend.graph(changed).op(linear.id).params[ParamRole.BIAS]
            assert np.array_equal(backend.read(changed, [bias])[bias], -ramp)

    @of_any_case
    def test_edits_that_can_t_be_made_are_refused(self, case: Case) -> None:
        """Each mistake has one error, that names what is wrong; nothing of the model changes."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for edit, told in _wrong(graph):
            with pytest.raises(ModelError, match=told):
                backend.edit(model, [edit])
            with pytest.raises(ModelError, match=told):
                backend.edit(model, [*_harmless(graph), edit])
        assert backend.graph(model) is graph

    def test_identities_can_be_removed(self, case: Case) -> None:
        """RemoveOp keeps the outputs and their names."""
        backend, model = self.backend(), case.model
        before = self.outputs(model, case)
        for op in (op for op in backend.graph(model) if op.kind is OpKind.IDENTITY):
            after = self.outputs(backend.edit(model, [RemoveOp(op.id)]), case)
            assert list(after) == list(before)
            for t in before:
                assert_close(after[t], before[t], case.tolerance, t)

    def test_shared_parameters_split(self, case: Case) -> None:
        """After SplitSharedParam the op has a parameter of its own, with the same value."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for p in graph.params:
            users = graph.users(p)
            if len(users) < 2:
                continue
            split = backend.edit(model, [SplitSharedParam(users[0].id, p)])
            after = backend.graph(split).op(users[0].id)
            role = next(r for r, q in users[0].params.items() if q == p)
            assert after.params[role] != p
            own = after.params[role]
            assert np.array_equal(backend.read(split, [own])[own], backend.read(model, [p])[p])
            assert p in backend.graph(split).op(users[1].id).params.values()
            other = backend.read(model, [p])[p] * np.float32(0.5)
            moved = backend.edit(model, [SplitSharedParam(users[0].id, p), SetParams({own: other})])
            assert np.array_equal(backend.read(moved, [p])[p], backend.read(model, [p])[p]), f"{p} changed with {own}"
            assert np.array_equal(backend.read(moved, [own])[own], other), own
            check_replays(backend, moved, case.batch, case.tolerance)
            if all(op.kind in LINEAR_KINDS and op.weight == p for op in users[:2]):
                ramp = np.arange(output_channels(users[0], graph.params[p].shape), dtype=np.float32)
                biases = {users[0].id: ramp, users[1].id: -ramp}
                parts: list[Edit] = [SetBias(op, value) for op, value in biases.items()]
                changed = backend.edit(model, [SplitSharedParam(users[0].id, p), *parts])
                for op, value in biases.items():
                    bias = backend.graph(changed).op(op).params[ParamRole.BIAS]
                    assert np.array_equal(backend.read(changed, [bias])[bias], value), op


def check_replays(backend: Backend[Any], model: object, batch: Batch, tolerance: float) -> None:
    """Assert that an edited model computes what its graph says, op by op."""
    graph = backend.graph(model)
    values = run(backend.session(model, [Tap(t) for t in tappable(graph)]), batch)
    params = backend.read(model, list(graph.params))
    faults, _ = replay(graph, values, params, None, max(tolerance, 1e-5), lambda op, params: None)
    assert not faults, "\n".join(faults)


def run_outputs(backend: Backend[Any], model: object, batch: Batch) -> dict[TensorId, Array]:
    """The float model's outputs."""
    return run(backend.session(model, [Tap(t) for t in backend.graph(model).outputs]), batch)


def _activation(graph: Graph) -> Op | None:
    """An activation whose output isn't the model's."""
    wanted = ACTIVATION_KINDS - {OpKind.IDENTITY}
    found = (op for op in graph if op.kind in wanted and len(op.data_inputs) == 1 and op.output not in graph.outputs)
    return next(found, None)


def _wide(case: Case) -> Batch:
    """The batch, so much larger that activations saturate."""
    return {t: v * v.dtype.type(8) if v.dtype.kind == "f" else v for t, v in case.batch.items()}


def _harmless(graph: Graph) -> list[Edit]:
    op = _activation(graph)
    return [] if op is None else [ReplaceActivation(op.id, "Tanh")]


def _wrong(graph: Graph) -> Iterator[tuple[Any, str]]:
    """Edits that can't be made, and what is said."""
    no_op, one = "the model has no op 'nowhere'", np.zeros(1, np.float32)
    yield from ((edit, no_op) for edit in (
        SetBias("nowhere", one), FoldBatchNorm("nowhere", "nowhere"), ReplaceActivation("nowhere", "Relu"),
        RemoveOp("nowhere"), SplitSharedParam("nowhere", "nowhere"),
    ))  # fmt: skip
    yield SetParams({"nowhere": one}), "the model has no parameter 'nowhere'"
    yield "remove", "'remove' is not an edit"
    linear = next(iter(graph.linear_ops), None)
    if linear is not None:
        name = re.escape(repr(linear.id))
        yield ReplaceActivation(linear.id, "Relu"), f"{name} .* is not an activation; it can't be turned into a Relu"
        yield SplitSharedParam(linear.id, "nowhere"), f"{name} has no parameter 'nowhere'"
        yield FoldBatchNorm(linear.id, linear.id), f"{name} .* can't be folded into {name}"
    op = _activation(graph)
    if op is not None:
        name = re.escape(repr(op.id))
        yield ReplaceActivation(op.id, "Fancy"), f"{name} can't be turned into a 'Fancy'; possible are Identity, Relu"
        yield SetBias(op.id, one), f"{name} is a .* without a constant weight; it can't be given a bias"
        for norm in (o for o in graph if o.kind is OpKind.BATCH_NORM):
            yield FoldBatchNorm(norm.id, op.id), f"{re.escape(repr(norm.id))} .* can't be folded into {name}"
    for norm in (o for o in graph if o.kind is OpKind.BATCH_NORM):
        for other in graph.linear_ops:
            if norm.data_inputs[0] != other.output and other.data_inputs[0] != norm.output:
                told = f"{re.escape(repr(norm.id))} .* can't be folded into {re.escape(repr(other.id))} "
                yield FoldBatchNorm(norm.id, other.id), told + ".*not neighbours"
    for total in (o for o in graph if o.kind is OpKind.ADD and len(o.data_inputs) == 2):
        yield RemoveOp(total.id), f"{re.escape(repr(total.id))} .* doesn't pass one input on to one output"
