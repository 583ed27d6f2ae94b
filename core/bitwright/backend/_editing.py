"""Editing a model, whatever the framework: what each edit means, when it is refused, and what becomes of the ops.

A backend derives its editor from `Editor` and gives the primitives that truly differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from bitwright.backend._checks import checked_bias, checked_branch, checked_params
from bitwright.errors import ModelError
from bitwright.graph import (
    ACTIVATION_KINDS,
    ACTIVATION_TYPES,
    LINEAR_KINDS,
    AddBranch,
    BranchNames,
    Edit,
    FoldBatchNorm,
    Formula,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
    Tensor,
    TensorId,
    branch_names,
    branch_obstacle,
    formula,
    free_name,
    output_channels,
)


@dataclass(frozen=True)
class Branch:
    """What `Editor.add_branch` has put in.

    Attributes:
        product: the tensor that the op computes now.
        tensors: what the branch's two ops compute, down x and up (down x).
        params: their matrices.
    """

    product: TensorId
    tensors: tuple[TensorId, TensorId]
    params: tuple[ParamId, ParamId]


class Editor(ABC):
    """Carries out edits, in order, on a copy of a model that the backend makes.

    Primitives are called only where an edit is right, and before `ops` are changed accordingly.

    Attributes:
        activations: which of `ACTIVATION_TYPES` the framework has as one op; what it lacks is spelled out.
        ops: as they are after the edits so far, by id.
        outputs: of the model.
    """

    activations: Collection[str] = frozenset(ACTIVATION_TYPES)

    def __init__(self, graph: Graph) -> None:
        self.see(graph)

    def see(self, graph: Graph) -> None:
        """Take the ops from a graph: for a primitive that changes more than the base can know."""
        self.ops: dict[OpId, Op] = {op.id: op for op in graph}
        self.outputs = frozenset(graph.outputs)
        self._shapes = {p: param.shape for p, param in graph.params.items()}
        self._tensors = dict(graph.tensors)

    # -- primitives

    @abstractmethod
    def set_values(self, values: Mapping[ParamId, NDArray[Any]]) -> None:
        """Set parameters, given in canonical layout; names, shapes and finiteness are checked before."""

    @abstractmethod
    def add_bias(self, op: Op, value: NDArray[Any]) -> ParamId:
        """Give a linear op that has no bias one, (out,); the tensor `op.output` holds the sum then.

        Returns:
            The new parameter.
        """

    def own_bias(self, op: Op, bias: ParamId, value: NDArray[Any]) -> ParamId:
        """Give a linear op a bias of its own instead of one that others use too; returns the new parameter."""
        own = self.split(op, bias)
        self.set_values({own: value})
        return own

    @abstractmethod
    def split(self, op: Op, param: ParamId) -> ParamId:
        """Give an op its own copy of a parameter that others use too; returns the new one."""

    @abstractmethod
    def fold_backward(self, norm: Op, into: Op) -> None:
        """Drop a batch norm: `into`, whose output it alone reads, computes `norm.output` instead."""

    @abstractmethod
    def fold_forward(self, norm: Op, into: Op) -> None:
        """Drop a batch norm: `into`, which alone reads its output, reads what the norm read."""

    @abstractmethod
    def put_activation(self, op: Op, formula: Formula) -> None:
        """Compute `op.output` from the op's one input by a formula of what `activations` has."""

    @abstractmethod
    def drop(self, op: Op, *, renames: bool) -> None:
        """Drop an op of one input and one output.

        Args:
            op: the op.
            renames: its output is a model output: what computes its input comes to compute that instead. Otherwise
                readers of the output come to read the input.
        """

    def add_branch(self, op: Op, names: BranchNames, down: NDArray[Any], up: NDArray[Any]) -> Branch:
        """Put a branch beside a linear op, whose features lie on the last axis: the sum computes `op.output`.

        A backend that gives it offers `Branching`.

        Args:
            op: the op.
            names: of the ops that are put in; no op has them.
            down: (rank, in).
            up: (out, rank).
        """
        raise ModelError(f"{op.id!r} can't be given a branch: this backend puts no ops beside others")

    def branch_obstacle(self, op: OpId) -> str:
        """Why the op, as it is at present, can't have a branch, in words; "" if it can.

        Raises:
            ModelError: the model has no such op.
        """
        found = self.op(op)
        shape = None if found.weight is None else self._shapes[found.weight]
        return branch_obstacle(found, self._tensors, shape, self.names_taken()) or self.own_obstacle(found)

    def names_taken(self) -> Container[OpId]:
        """Names that ops which are put in can't have; those of `ops` unless the framework's model has others."""
        return self.ops

    def own_obstacle(self, op: Op) -> str:
        """What the framework's form of the model says against a branch beside a matrix product, or ""."""
        return ""

    def is_shared(self, op: Op, param: ParamId) -> bool:
        """Whether anything but the op uses one of its parameters."""
        return any(other.id != op.id and param in other.params.values() for other in self.ops.values())

    def only_reader(self, tensor: TensorId, reader: Op) -> bool:
        """Whether an op alone reads a tensor, which isn't a model output."""
        return tensor not in self.outputs and [op.id for op in self._readers(tensor)] == [reader.id]

    # -- edits

    def apply(self, edit: Edit) -> None:
        """Carry out one edit.

        Raises:
            ModelError: it names what isn't there, or would change what the model computes elsewhere.
        """
        match edit:
            case SetParams(values):
                self.set_values(checked_params(self._shapes, values))
            case SetBias(op, value):
                self._set_bias(self.op(op), value)
            case FoldBatchNorm(norm, into):
                self._fold(self.op(norm), self.op(into))
            case ReplaceActivation(op, type):
                self._replace_activation(self.op(op), type)
            case RemoveOp(op):
                self._remove(self.op(op))
            case SplitSharedParam(op, param):
                self._split(self.op(op), param)
            case AddBranch(op, down, up):
                self._add_branch(self.op(op), down, up)
            case _:
                raise ModelError(f"{edit!r} is not an edit; `bitwright.graph.edits` has them all")

    def apply_all(self, edits: Sequence[Edit]) -> None:
        """Carry out edits in order.

        Raises:
            ModelError: as `apply`.
        """
        for edit in edits:
            self.apply(edit)

    def op(self, id: OpId) -> Op:
        """An op as it is at present.

        Raises:
            ModelError: there is none of that name, or no longer.
        """
        try:
            return self.ops[id]
        except KeyError:
            raise ModelError(f"the model has no op {id!r}") from None

    def free_tensor(self, wanted: TensorId) -> TensorId:
        """A name that no tensor has: the one that is wanted, or it with a number."""
        return free_name(wanted, self._tensors)

    def _readers(self, tensor: TensorId) -> list[Op]:
        return [op for op in self.ops.values() if tensor in op.inputs]

    def _set_bias(self, op: Op, value: object) -> None:
        if op.kind not in LINEAR_KINDS or op.weight is None:
            raise ModelError(
                f"{op.id!r} is a {op.native or op.type} without a constant weight; it can't be given a bias"
            )
        array = checked_bias(op.id, value, output_channels(op, self._shapes[op.weight]))
        bias = op.params.get(ParamRole.BIAS)
        if bias is None:
            bias = self.add_bias(op, array)
        elif self.is_shared(op, bias):
            bias = self.own_bias(op, bias, array)
        else:
            self.set_values({bias: array})
        self._shapes[bias] = array.shape
        self.ops[op.id] = replace(self.ops[op.id], params={**self.ops[op.id].params, ParamRole.BIAS: bias})

    def _split(self, op: Op, param: ParamId) -> None:
        roles = [role for role, held in op.params.items() if held == param]
        if not roles:
            raise ModelError(f"{op.id!r} has no parameter {param!r}")
        if not self.is_shared(op, param):
            return
        own = self.split(op, param)
        self._shapes[own] = self._shapes[param]
        params = {role: own if role in roles else held for role, held in op.params.items()}
        self.ops[op.id] = replace(self.ops[op.id], params=params)

    def _add_branch(self, op: Op, down: object, up: object) -> None:
        if reason := self.branch_obstacle(op.id):
            raise ModelError(f"{op.id!r} can't be given a branch: {reason}")
        shape = self._shapes[op.weight or ""]
        names, matrices = branch_names(op.id), checked_branch(op.id, down, up, shape)
        made = self.add_branch(op, names, *matrices)
        self._shapes.update(zip(made.params, (m.shape for m in matrices), strict=True))
        known, width = self._tensors[op.output], len(matrices[0])
        inner = None if known.shape is None else (*known.shape[:-1], width)
        self._tensors[made.product] = replace(known, id=made.product)
        for tensor, size in zip(made.tensors, (inner, known.shape), strict=True):
            self._tensors[tensor] = Tensor(tensor, size, known.dtype)
        self.ops[op.id] = replace(self.ops[op.id], outputs=(made.product,))
        source = op.data_inputs[0]
        for id, read, tensor, param in zip(
            (names.down, names.up), (source, made.tensors[0]), made.tensors, made.params, strict=True
        ):
            self.ops[id] = Op(id, OpKind.LINEAR, op.type, (read,), (tensor,), {ParamRole.WEIGHT: param})
        self.ops[names.total] = Op(names.total, OpKind.ADD, "Add", (made.product, made.tensors[1]), (op.output,))

    def _fold(self, norm: Op, into: Op) -> None:
        what = f"{norm.id!r} ({norm.type}) can't be folded into {into.id!r} ({into.type})"
        if norm.kind is not OpKind.BATCH_NORM or into.kind not in LINEAR_KINDS or into.weight is None:
            raise ModelError(f"{what}: only a batch norm can be, into a linear op with a constant weight")
        source, result = norm.data_inputs[0], norm.output
        backward = source == into.output
        if not backward and into.data_inputs[0] != result:
            raise ModelError(f"{what}: they are not neighbours")
        between, reader = (source, norm) if backward else (result, into)
        if not self.only_reader(between, reader):
            raise ModelError(f"{what}: {between!r} is also read elsewhere")
        if backward:
            self.fold_backward(norm, into)
            self.ops[into.id] = replace(into, outputs=(result, *into.outputs[1:]))
        else:
            self.fold_forward(norm, into)
            self.ops[into.id] = _reading(into, {result: source})
        del self.ops[norm.id]

    def _replace_activation(self, op: Op, type: str) -> None:
        if op.kind not in ACTIVATION_KINDS or len(op.data_inputs) != 1 or len(op.outputs) != 1:
            raise ModelError(f"{op.id!r} ({op.type}) is not an activation; it can't be turned into a {type}")
        if type not in ACTIVATION_TYPES:
            raise ModelError(f"{op.id!r} can't be turned into a {type!r}; possible are {', '.join(ACTIVATION_TYPES)}")
        self._put(op, type)

    def _put(self, op: Op, type: str) -> None:
        shown = ACTIVATION_TYPES[type]
        self.put_activation(op, formula(type, self.activations))
        self.ops[op.id] = replace(
            op, kind=shown.kind, type=shown.type, attrs=shown.attrs, inputs=op.data_inputs, params={}, native="",
            call=None,
        )  # fmt: skip

    def _remove(self, op: Op) -> None:
        if len(op.data_inputs) != 1 or len(op.outputs) != 1:
            raise ModelError(f"{op.id!r} ({op.type}) doesn't pass one input on to one output; it can't be removed")
        source, result = op.data_inputs[0], op.output
        maker = next((o for o in self.ops.values() if source in o.outputs), None)
        if result in self.outputs and (maker is None or source in self.outputs):
            # A model output needs an op of its own that computes it.
            if op.kind is not OpKind.IDENTITY:
                self._put(op, "Identity")
            return
        renames = result in self.outputs
        self.drop(op, renames=renames)
        del self.ops[op.id]
        if renames and maker is not None:
            outputs = tuple(result if t == source else t for t in maker.outputs)
            self.ops[maker.id] = replace(maker, outputs=outputs)
        old, new = (source, result) if renames else (result, source)
        for reader in self._readers(old):
            self.ops[reader.id] = _reading(reader, {old: new})


def _reading(op: Op, tensors: Mapping[TensorId, TensorId]) -> Op:
    return replace(op, inputs=tuple(t if t is None else tensors.get(t, t) for t in op.inputs))
