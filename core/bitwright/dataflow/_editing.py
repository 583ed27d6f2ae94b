"""Edits of a dataflow model, by rebuilding its graph; the ops' functions stay what they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Branch, Editor
from bitwright.dataflow._model import M, PutIn, rebuild
from bitwright.errors import ModelError
from bitwright.graph import (
    ACTIVATION_TYPES,
    BranchNames,
    Formula,
    Op,
    OpKind,
    ParamId,
    ParamRole,
    Tensor,
    TensorId,
    free_name,
)

Array = NDArray[Any]


class FlowEditor(Editor, Generic[M]):
    """What is edited is `model`; what was given stays. An activation put in is kept as a formula, which
    `FlowBackend.function_of` spells out in the functions that the framework has.
    """

    def __init__(self, model: M) -> None:
        super().__init__(model.graph)
        self.model: M = model

    def set_values(self, values: Mapping[ParamId, Array]) -> None:
        """See `Editor`."""
        changed = {p: np.array(v, np.float32) for p, v in values.items()}
        self.model = replace(self.model, params={**self.model.params, **changed})

    def add_bias(self, op: Op, value: Array) -> ParamId:
        """See `Editor`."""
        bias = f"{op.id}.bias"
        if bias in self.model.params:
            raise ModelError(f"can't add a bias to {op.id!r}: parameter {bias!r} exists and belongs to another op")
        return self._give(op, bias, np.array(value, np.float32), (ParamRole.BIAS,), {})

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`."""
        roles = [role for role, held in op.params.items() if held == param]
        own = f"{param}@{op.id}"
        return self._give(op, own, self.model.params[param], roles, {own: param})

    def add_branch(self, op: Op, names: BranchNames, down: Array, up: Array) -> Branch:
        """See `Editor`; what its ops compute is kept as `PutIn`."""
        graph, source = self.model.graph, op.data_inputs[0]
        product = self.free_tensor(f"{op.id}/product")
        inner, outer = self.free_tensor(names.down), self.free_tensor(names.up)
        params = self._free_param(f"{names.down}.weight"), self._free_param(f"{names.up}.weight")
        known = graph.tensors[op.output]
        shape = None if known.shape is None else (*known.shape[:-1], len(down))
        last = None if shape is None else len(shape) - 1
        tensors = [
            replace(known, id=product),
            Tensor(inner, shape, known.dtype, last),
            Tensor(outer, known.shape, known.dtype, last),
        ]
        type = "Gemm" if shape is not None and len(shape) == 2 else "MatMul"
        made = [
            Op(id, OpKind.LINEAR, type, (read,), (tensor,), {ParamRole.WEIGHT: param})
            for id, read, tensor, param in zip(
                (names.down, names.up), (source, inner), (inner, outer), params, strict=True
            )
        ]
        made.append(Op(names.total, OpKind.ADD, "Add", (product, outer), (op.output,)))
        current = graph.op(op.id)
        ops = [*self._swapped(replace(current, outputs=(product,))), *made]
        values = {**self.model.params, **dict(zip(params, (down, up), strict=True))}
        self.model = rebuild(self.model, ops, values, tensors=tensors)
        native = {names.down: PutIn("product"), names.up: PutIn("product"), names.total: PutIn("sum")}
        self.model = replace(self.model, native={**self.model.native, **native})
        return Branch(product, (inner, outer), params)

    def _free_param(self, wanted: ParamId) -> ParamId:
        return free_name(wanted, self.model.params)

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._without(norm, replace(into, outputs=(norm.output, *into.outputs[1:])))

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._without(norm, _reading(into, norm.output, norm.data_inputs[0]))

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        shown = ACTIVATION_TYPES[formula.type]
        changed = replace(
            op, kind=shown.kind, type=shown.type, attrs=shown.attrs, inputs=op.data_inputs, params={}, call=None
        )
        self.model = rebuild(self.model, self._swapped(changed))
        self.model = replace(self.model, native={**self.model.native, op.id: formula})

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        source, gone = op.data_inputs[0], op.output
        ops = [o for o in self.model.graph.ops if o.id != op.id]
        if renames:
            ops = [
                replace(_reading(o, source, gone), outputs=tuple(gone if t == source else t for t in o.outputs))
                for o in ops
            ]
        else:
            ops = [_reading(o, gone, source) for o in ops]
        self.model = rebuild(self.model, ops)

    def _swapped(self, changed: Op) -> list[Op]:
        return [changed if op.id == changed.id else op for op in self.model.graph.ops]

    def _give(
        self, op: Op, param: ParamId, value: Array, roles: Sequence[ParamRole], copies: Mapping[ParamId, ParamId]
    ) -> ParamId:
        current = self.model.graph.op(op.id)
        changed = replace(current, params={**current.params, **dict.fromkeys(roles, param)})
        values = {**self.model.params, param: value}
        self.model = rebuild(self.model, self._swapped(changed), values, copies=copies)
        return param

    def _without(self, gone: Op, changed: Op) -> None:
        self.model = rebuild(self.model, [op for op in self._swapped(changed) if op.id != gone.id])


def _reading(op: Op, old: TensorId, new: TensorId) -> Op:
    return replace(op, inputs=tuple(new if t == old else t for t in op.inputs))
