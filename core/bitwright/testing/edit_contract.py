"""The part of the backend contract about edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.errors import BitwrightError
from bitwright.graph import (
    LINEAR_KINDS,
    Edit,
    FoldBatchNorm,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
    from_matrix,
    output_channels,
    to_matrix,
)
from bitwright.testing.contract_base import (
    Case,
    Contract,
    assert_close,
    own,
    rows,
    run,
    scale_shift,
)


class EditContract(Contract):
    """Each edit does what it says, on a copy."""

    def test_wrong_edits_are_refused(self, case: Case) -> None:
        """Unknown ids and wrong shapes raise ModelError."""
        backend, model = self.backend(), case.build()
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

    def test_every_linear_op_takes_a_bias(self, case: Case) -> None:
        """SetBias replaces or creates; the output moves by exactly the difference."""
        backend, model = self.backend(), case.build()
        graph = backend.graph(model)
        for op in graph.linear_ops:
            assert op.weight is not None
            old = backend.read(model, [p for r, p in op.params.items() if r is ParamRole.BIAS])
            size = output_channels(op, graph.params[op.weight].shape)
            value = np.linspace(-1, 1, size).astype(np.float32)
            changed = backend.edit(model, [SetBias(op.id, value)])
            moved = backend.graph(changed).op(op.id)
            bias = moved.params[ParamRole.BIAS]
            assert np.array_equal(backend.read(changed, [bias])[bias], value)
            taps = run(backend.session(model, [Tap(op.output)]), case.batch)
            after = run(backend.session(changed, [Tap(moved.output)]), case.batch)
            step = value - next(iter(old.values()), np.zeros(size, np.float32))
            expected = rows(graph, op, taps[op.output]) + step[:, None]
            assert_close(rows(graph, op, after[moved.output]), expected, max(case.tolerance, 1e-5), op.id)

    def test_batch_norms_fold(self, case: Case) -> None:
        """Arithmetic by SetParams and SetBias, rewiring by FoldBatchNorm: outputs and their names stay."""
        backend, model = self.backend(), case.build()
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
            folded = backend.edit(model, edits)
            after = backend.graph(folded)
            assert norm.id not in after
            assert norm.id in backend.graph(model), "editing changed the original"
            assert after.op(into.id).output == norm.output
            for t, v in self.outputs(folded, case).items():
                assert_close(v, before[t], 10 * case.tolerance, t)

    def test_clipped_relus_become_relus(self, case: Case) -> None:
        """ReplaceActivation drops the bound and keeps id and tensors."""
        backend, model = self.backend(), case.build()
        for op in (op for op in backend.graph(model) if op.kind is OpKind.CLIPPED_RELU):
            changed = backend.edit(model, [ReplaceActivation(op.id, "Relu")])
            new = backend.graph(changed).op(op.id)
            assert new.kind is OpKind.RELU
            assert (new.data_inputs, new.outputs) == (op.data_inputs, op.outputs)
            values = run(backend.session(changed, [Tap(op.data_inputs[0]), Tap(op.output)]), case.batch)
            assert np.array_equal(values[op.output], np.maximum(values[op.data_inputs[0]], 0))

    def test_identities_can_be_removed(self, case: Case) -> None:
        """RemoveOp keeps the outputs and their names."""
        backend, model = self.backend(), case.build()
        before = self.outputs(model, case)
        for op in (op for op in backend.graph(model) if op.kind is OpKind.IDENTITY):
            after = self.outputs(backend.edit(model, [RemoveOp(op.id)]), case)
            assert list(after) == list(before)
            for t in before:
                assert_close(after[t], before[t], case.tolerance, t)

    def test_shared_parameters_split(self, case: Case) -> None:
        """After SplitSharedParam the op has a parameter of its own, with the same value."""
        backend, model = self.backend(), case.build()
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
