"""The part of the backend contract about branches beside linear ops."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.backend import Backend, Branching, Tap
from bitwright.errors import ModelError
from bitwright.graph import AddBranch, Edit, Graph, Op, OpKind, ParamRole, SetBias, SetParams, branch_names
from bitwright.testing.contract_base import Case, Contract, assert_close, bare, min_max_table, run
from bitwright.testing.edit_contract import check_replays
from bitwright.testing.harness import simple_plan


class BranchContract(Contract):
    """`AddBranch`, of backends that are `Branching`."""

    def test_branches_are_put_beside_linear_ops(self, case: Case, tmp_path: Path) -> None:
        """AddBranch: the output moves by up (down x) under its own name, and the new ops are like any others."""
        backend, model = self.backend(), case.model
        if not isinstance(backend, Branching):
            pytest.skip("the backend puts in no branches (`Branching`)")
        graph, rng = backend.graph(model), np.random.default_rng(0)
        able = [op for op in graph.linear_ops if not backend.branch_obstacle(model, op.id)]
        for index, op in enumerate(able[: 1 if self.every > 1 else 2]):
            assert op.kind is OpKind.LINEAR, f"{op.id} is no matrix product, and is said to take a branch"
            out, width = graph.params[op.weight or ""].shape
            down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((3, width), (out, 3)))
            changed = backend.edit(model, [AddBranch(op.id, down, up)])
            after, names = backend.graph(changed), branch_names(op.id)
            assert {o.id for o in after} == {o.id for o in graph} | {names.down, names.up, names.total}
            assert (after.inputs, after.outputs) == (graph.inputs, graph.outputs)
            assert set(graph.tensors) <= set(after.tensors)
            main, first, second, total = (after.op(o) for o in (op.id, names.down, names.up, names.total))
            assert (main.data_inputs, main.params) == (op.data_inputs, op.params)
            assert (first.kind, first.data_inputs) == (OpKind.LINEAR, op.data_inputs)
            assert (second.kind, second.data_inputs) == (OpKind.LINEAR, (first.output,))
            assert (total.kind, total.output) == (OpKind.ADD, op.output)
            assert set(total.data_inputs) == {main.output, second.output}
            assert first.weight is not None
            assert second.weight is not None
            found = backend.read(changed, [first.weight, second.weight])
            slack = 0 if after.params[first.weight].dtype == "float32" else 1e-2
            for param, value in ((first.weight, down), (second.weight, up)):
                assert np.allclose(found[param], value, rtol=slack, atol=slack), param
            before, kept = backend.read(model, list(graph.params)), backend.read(changed, list(graph.params))
            assert all(np.array_equal(before[p], kept[p]) for p in before), "another parameter changed"
            source = op.data_inputs[0]
            old = run(backend.session(model, [Tap(source), Tap(op.output)]), case.batch)
            added = old[source] @ found[first.weight].T @ found[second.weight].T
            now = run(backend.session(changed, [Tap(main.output), Tap(op.output)]), case.batch)
            assert_close(now[main.output], old[op.output], case.tolerance, main.output)
            assert_close(now[op.output], old[op.output] + added, max(10 * case.tolerance, 1e-5), op.output)
            check_replays(backend, changed, case.batch, case.tolerance)
            value = np.linspace(-1, 1, out).astype(np.float32)
            edits: list[Edit] = [AddBranch(op.id, down, up), SetBias(op.id, value), SetParams({first.weight: 2 * down})]
            again = backend.edit(model, edits)
            moved = backend.graph(again).op(op.id).params[ParamRole.BIAS]
            assert np.array_equal(backend.read(again, [moved])[moved], value)
            check_replays(backend, again, case.batch, case.tolerance)
            if index == 0:
                branched = replace(case, build=partial(_itself, changed))
                check_branch_is_rounded(backend, branched, first, second, total)
            if index == 0 and self.suffix is not None:
                loaded = backend.load(backend.save(changed, tmp_path / f"model{self.suffix}"))
                assert {o.id for o in backend.graph(loaded)} == {o.id for o in after}
                wanted = self.outputs(changed, case)
                for t, v in self.outputs(loaded, case).items():
                    assert_close(v, wanted[t], case.tolerance, t)
            with pytest.raises(ModelError, match=f"{re.escape(repr(op.id))} can't be given a branch: there is an op"):
                backend.edit(model, [AddBranch(op.id, down, up), AddBranch(op.id, down, up)])
            with pytest.raises(ModelError, match=rf"\(rank, {width}\) and \({out}, rank\)"):
                backend.edit(model, [AddBranch(op.id, down[:2], up)])
            with pytest.raises(ModelError, match="holds NaN or infinity"):
                backend.edit(model, [AddBranch(op.id, down, np.full_like(up, np.inf))])
        both = [AddBranch(op.id, *(np.ones(s, np.float32) for s in self._sizes(graph, op))) for op in able]
        assert {o.id for o in backend.graph(backend.edit(model, both))} >= {branch_names(op.id).total for op in able}
        one = np.ones((1, 1), np.float32)
        for op in graph:
            if obstacle := backend.branch_obstacle(model, op.id):
                told = f"{op.id!r} can't be given a branch: {obstacle}"
                with pytest.raises(ModelError, match=re.escape(told)):
                    backend.edit(model, [AddBranch(op.id, one, one)])
        with pytest.raises(ModelError, match="the model has no op 'nowhere'"):
            backend.edit(model, [AddBranch("nowhere", one, one)])
        assert backend.graph(model) is graph, "editing changed the original"

    def _sizes(self, graph: Graph, op: Op) -> tuple[tuple[int, int], tuple[int, int]]:
        out, width = graph.params[op.weight or ""].shape
        return (1, width), (out, 1)


def _itself(model: object) -> object:
    return model


def check_branch_is_rounded(backend: Backend[Any], case: Case, first: Op, second: Op, total: Op) -> None:
    """Assert that the matrices and the tensors of a branch are rounded where a plan says so.

    Args:
        backend: under test.
        case: the model with the branch.
        first, second, total: the branch's ops.
    """
    plan = simple_plan(backend.graph(case.model))
    table, simulation = min_max_table(backend, case, plan), bare(backend, case, plan)
    read, matrices = first.data_inputs[0], (first.weight or "", second.weight or "")
    simulation.set({site: table[site] for site in (*matrices, first.output)})
    others = [t for t in total.data_inputs if t != second.output]
    taps = [Tap(t) for t in (read, first.output, total.output, *others)]
    found, values = run(simulation.session(taps), case.batch), backend.read(case.model, matrices)
    down, up = (table[p].fake_quantize(values[p]) for p in matrices)
    error = np.abs(found[first.output] - table[first.output].fake_quantize(found[read] @ down.T))
    step = float(table[first.output].scale)
    assert error.max() <= 1.01 * step, f"{first.output} isn't rounded"
    assert (error > 0.01 * step).mean() < 0.02, f"{first.output} isn't rounded"
    expected = found[others[0]] + found[first.output] @ up.T
    assert_close(found[total.output], expected, max(10 * case.tolerance, 1e-5), total.output)
