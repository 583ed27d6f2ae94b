"""Backends that read and edit wrongly."""

from __future__ import annotations

import numpy as np

from bitwright.errors import ModelError
from bitwright.graph import (
    AddBranch,
    FoldBatchNorm,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
)
from kit_mutants.base import MUTANTS, Mutant, Wrong, mutant

ROUND_TRIP = "test_read_and_edit_round_trip"


@mutant("`read` hands out the model's own arrays", "cnn", ROUND_TRIP)
class HandsOutItsArrays(Wrong):
    def read(self, model, ids):
        self.inner.read(model, ids)
        return {p: model.params[p] for p in ids}


@mutant("`read` transposes matrices", "prenormed", "test_canonical_layouts")
class TransposesMatrices(Wrong):
    def read(self, model, ids):
        return {p: v.T.reshape(v.shape) if v.ndim == 2 else v for p, v in self.inner.read(model, ids).items()}


@mutant("edits change the model that is given", "cnn", ROUND_TRIP)
class EditsInPlace(Wrong):
    def edit(self, model, edits):
        for edit in edits:
            if isinstance(edit, SetParams):
                for p, v in edit.values.items():
                    if p in model.params and np.shape(v) == model.params[p].shape:
                        model.params[p][...] = v
        return self.inner.edit(model, edits)


def edited(name, case, change, *tests):
    """Register one that makes other edits: `change(backend, model, edit)` gives edits, or raises."""

    class Backend(Wrong):
        def edit(self, model, edits):
            for edit in edits:
                for made in change(self.inner, model, edit):
                    model = self.inner.edit(model, [made])
            return model

    MUTANTS.append(Mutant(name, Backend, case, tests))


def _skips_biases(backend, model, edit):
    if isinstance(edit, SetParams):
        return [SetParams({p: v for p, v in edit.values.items() if not p.endswith("bias")})]
    return [edit]


def _adds_biases(backend, model, edit):
    if not isinstance(edit, SetBias) or edit.op not in backend.graph(model):
        return [edit]
    bias = backend.graph(model).op(edit.op).params.get(ParamRole.BIAS)
    known = 0 if bias is None else backend.read(model, [bias])[bias]
    return [SetBias(edit.op, np.asarray(edit.value) + known)] if np.shape(known) == np.shape(edit.value) else [edit]


def _no_forward_folds(backend, model, edit):
    if (
        isinstance(edit, FoldBatchNorm)
        and edit.into in backend.graph(model)
        and edit.batch_norm in backend.graph(model)
    ):
        norm, into = (backend.graph(model).op(i) for i in (edit.batch_norm, edit.into))
        if norm.output in into.data_inputs:
            raise ModelError("folding forward isn't there")
    return [edit]


def _one_activation(backend, model, edit):
    return (
        [ReplaceActivation(edit.op, "Relu")] if isinstance(edit, ReplaceActivation) and edit.type == "Elu" else [edit]
    )


def _soft_removal(backend, model, edit):
    if isinstance(edit, RemoveOp) and edit.op in backend.graph(model):
        op = backend.graph(model).op(edit.op)
        if op.kind in (OpKind.RELU, OpKind.CLIPPED_RELU):
            return [ReplaceActivation(edit.op, "Identity")]
    return [edit]


edited("biases can't be set by SetParams", "cnn", _skips_biases, ROUND_TRIP, "test_new_values_are_used")
edited("SetBias adds", "cnn", _adds_biases, "test_every_linear_op_takes_a_bias")
edited("batch norms don't fold forward", "prenormed", _no_forward_folds, "test_batch_norms_fold_forward")
edited("Elu is Relu", "cnn", _one_activation, "test_every_activation_type")
edited("removed ops stay", "cnn", _soft_removal, "test_removed_ops_are_gone")


BRANCHES = "test_branches_are_put_beside_linear_ops"


class Branching(Wrong):
    """One that puts in branches, wrongly."""

    def branch_obstacle(self, model, op):
        return self.inner.branch_obstacle(model, op)

    def change(self, model, edit):
        return [edit]

    def edit(self, model, edits):
        for edit in edits:
            possible = isinstance(edit, AddBranch) and edit.op in model.graph
            possible = possible and not self.inner.branch_obstacle(model, edit.op)
            model = self.inner.edit(model, self.change(model, edit) if possible else [edit])
        return model


@mutant("a branch is merged into the weight", "tokens", BRANCHES)
class MergesBranches(Branching):
    def change(self, model, edit):
        weight = model.graph.op(edit.op).weight
        return [SetParams({weight: model.params[weight] + edit.up @ edit.down})]


@mutant("a branch's matrices are another's", "tokens", BRANCHES)
class HalvesBranches(Branching):
    def change(self, model, edit):
        return [AddBranch(edit.op, edit.down * np.float32(0.5), edit.up)]


@mutant("a branch takes the op's bias away", "tokens", BRANCHES)
class BranchesTakeBiases(Branching):
    def change(self, model, edit):
        bias = model.graph.op(edit.op).params.get(ParamRole.BIAS)
        zeros = [] if bias is None else [SetParams({bias: np.zeros_like(model.params[bias])})]
        return [*zeros, edit]


@mutant("what branches make is never rounded", "tokens", BRANCHES)
class BranchesInFloat(Branching):
    def simulate(self, model, plan, encodings):
        made = self.inner.simulate(model, plan, encodings)
        set_all = made.set

        def kept(changes):
            set_all({s: None if s.endswith(("/down", "/up")) else e for s, e in changes.items()})

        made.set = kept
        return made


@mutant("branches are possible where they are refused", "cnn", BRANCHES)
class RefusesBranches(Branching):
    def branch_obstacle(self, model, op):
        self.inner.branch_obstacle(model, op)
        return ""


@mutant("a shared bias is set for all", "pooled", "test_every_linear_op_takes_a_bias")
class SetsSharedBiases(Wrong):
    def edit(self, model, edits):
        for edit in edits:
            if isinstance(edit, SetBias) and edit.op in model.graph:
                bias = model.graph.op(edit.op).params.get(ParamRole.BIAS)
                if bias is not None and np.shape(edit.value) == model.params[bias].shape:
                    edit = SetParams({bias: edit.value})
            model = self.inner.edit(model, [edit])
        return model


@mutant("a parameter that is split stays the same array", "pooled", "test_shared_parameters_split")
class SplitsNothing(Wrong):
    def edit(self, model, edits):
        for edit in edits:
            before = model
            model = self.inner.edit(model, [edit])
            if isinstance(edit, SplitSharedParam):
                self.pairs = dict.fromkeys(set(model.params) - set(before.params), edit.param)
            if isinstance(edit, SetParams):
                also = {self.pairs[p]: v for p, v in edit.values.items() if p in getattr(self, "pairs", {})}
                model = self.inner.edit(model, [SetParams(also)]) if also else model
        return model


@mutant("values are kept, and not used", "cnn", "test_new_values_are_used")
class KeepsForgotten(Wrong):
    """Runs the model that was opened first."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def session(self, model, taps):
        ops = tuple(op.id for op in model.graph)
        first = self.first.setdefault((ops, tuple(model.graph.params)), model)
        return self.inner.session(first, taps)


@mutant("folding a batch norm takes the bias away", "cnn", "test_batch_norms_fold")
class FoldsBiasesAway(Wrong):
    def edit(self, model, edits):
        for edit in edits:
            if isinstance(edit, FoldBatchNorm) and edit.into in model.graph:
                bias = model.graph.op(edit.into).params.get(ParamRole.BIAS)
                if bias is not None:
                    model = self.inner.edit(model, [SetParams({bias: np.zeros_like(model.params[bias])})])
            model = self.inner.edit(model, [edit])
        return model


@mutant("values are set last, whatever comes behind them", "cnn", "test_every_linear_op_takes_a_bias")
class SetsValuesLast(Wrong):
    def edit(self, model, edits):
        return self.inner.edit(model, sorted(edits, key=lambda edit: isinstance(edit, SetParams)))


@mutant(
    "a simulation's new parameters are the float model's", "cnn", "test_new_parameters_are_those_of_an_edited_model"
)
class WritesToTheFloatModel(Wrong):
    def simulate(self, model, plan, encodings):
        made = self.inner.simulate(model, plan, encodings)
        set_params = made.set_params

        def both(values):
            set_params(values)
            for p, v in values.items():
                model.params[p][...] = v

        made.set_params = both
        return made
