"""From captured nodes to ops: roles, biases, kinds, names and functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.dataflow._functions import Captured
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import M
from bitwright.dataflow._nodes import Node, Nodes, Step, ValueId, is_float
from bitwright.graph import (
    KINDS,
    LINEAR_KINDS,
    ONNX_TYPES,
    ActivationAttrs,
    AxisAttrs,
    Call,
    Constant,
    Graph,
    Op,
    OpKind,
    Param,
    ParamId,
    ParamRole,
    PoolAttrs,
    Tensor,
    TensorId,
    channel_axes,
    clipping,
    free_name,
)
from bitwright.placement import UNREAD, Extent, NodeView, masks

K, R = OpKind, ParamRole
_WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}
_ROLES: Mapping[str, Mapping[int, ParamRole]] = {
    "Conv": {1: R.WEIGHT, 2: R.BIAS},
    "ConvTranspose": {1: R.WEIGHT, 2: R.BIAS},
    "Gemm": {1: R.WEIGHT, 2: R.BIAS},
    "MatMul": {1: R.WEIGHT},
    "Gather": {0: R.WEIGHT},
    "BatchNormalization": {1: R.GAMMA, 2: R.BETA, 3: R.MEAN, 4: R.VAR},
    "LayerNormalization": {1: R.GAMMA, 2: R.BETA},
    "InstanceNormalization": {1: R.GAMMA, 2: R.BETA},
    "GroupNormalization": {1: R.GAMMA, 2: R.BETA},
    "RMSNormalization": {1: R.GAMMA},
    "PRelu": {1: R.SLOPE},
    "LSTM": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
    "GRU": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
    "RNN": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
}
_GIVEN: Mapping[str, Sequence[str]] = {
    "Slice": ("starts", "ends", "axes", "steps"),
    "Pad": ("pads",),
    "Split": ("split",),
    "Expand": ("shape",),
    "Tile": ("repeats",),
    "CumSum": ("axis",),
}
"""What ONNX takes as operands, though it is known when a model is captured."""


@dataclass
class _Made:
    """An op as it is put together."""

    node: Node
    kind: OpKind
    type: str
    params: dict[ParamRole, ParamId] = field(default_factory=dict)
    held: dict[ParamRole, ValueId] = field(default_factory=dict)
    members: tuple[Node, ...] = ()
    name: str = ""


class Emission:
    """The ops of captured nodes.

    Args:
        nodes: to be made ops.
        inputs: of the model.
        layouts: of parameters, to their canonical layout, where ops don't say.
        channels: axes that are known of values.
        names: of the outputs.
    """

    def __init__(
        self,
        nodes: Nodes,
        inputs: Sequence[ValueId],
        layouts: Mapping[ValueId, Layout],
        channels: Mapping[ValueId, int],
        names: Sequence[str] = (),
    ) -> None:
        self.nodes, self._inputs, self._own, self._channels, self._names = nodes, inputs, layouts, channels, names
        self._values: dict[ParamId, NDArray[Any]] = {}
        self._natives: dict[ParamId, tuple[ValueId, Layout]] = {}
        self._made: list[_Made] = []
        self._given: set[str] = {*inputs}
        absorbed: set[int] = set()
        for node in nodes:
            if id(node) not in absorbed:
                self._made.append(self._op(node, absorbed))
        for made in self._made:
            self._base(made)
        self.node_of = {made.name: made.members for made in self._made}

    # -- roles

    def _op(self, node: Node, absorbed: set[int]) -> _Made:
        kind, type = KINDS.get(node.type, K.OPAQUE), node.type
        made = _Made(node, kind, type, members=(node,))
        place = _WEIGHTS.get(type)
        weight = node.operands[place] if place is not None and place < len(node.operands) else None
        constant = weight is not None and self.nodes.values[weight].known and is_float(self.nodes.values[weight])
        others = [o for i, o in enumerate(node.operands) if i != place and o is not None]
        free = any(not self.nodes.values[o].known for o in others)
        if place is not None and constant and free:
            array = self.nodes.values[weight or ""].array
            rank = node.layouts.get(place, Layout()).canonical(array).ndim
            if type in ("MatMul", "Gemm"):
                made.kind = K.LINEAR if rank == 2 else K.MATMUL
                wide = len(self.nodes.values[node.output].shape) == 2
                made.type = "Gemm" if made.kind is K.LINEAR and wide else "MatMul"
            elif type == "Gather":
                made.kind = K.EMBEDDING if rank == 2 and not node.attributes.get("axis", 0) else K.SLICE
        elif type == "Gather":
            made.kind = K.SLICE
        elif type in ("MatMul", "Gemm"):
            made.kind, made.type = K.MATMUL, "MatMul"
        elif type in ("Conv", "ConvTranspose"):
            made.kind = K.OPAQUE
        if type in ("Relu", "Clip") and isinstance(node.attrs, ActivationAttrs):
            made.kind, made.type, _ = clipping(node.attrs.minimum, node.attrs.maximum)
        self._assign(made)
        if made.kind in LINEAR_KINDS and R.BIAS not in made.params:
            self._absorb(made, absorbed)
        return made

    def _assign(self, made: _Made) -> None:
        node, roles = made.node, {**_ROLES.get(made.node.type, {}), **made.node.roles}
        weighted = made.kind in LINEAR_KINDS or made.kind is K.EMBEDDING
        for i, operand in enumerate(node.operands):
            if operand is None or not self.nodes.values[operand].known or not is_float(self.nodes.values[operand]):
                continue
            role = roles.get(i, R.CONSTANT)
            if role is R.WEIGHT and not weighted:
                role = R.CONSTANT
            if role in made.held or (role is R.CONSTANT and made.kind is K.OPAQUE):
                continue  # an op has one parameter of each role; further constants are the function's own
            layout = node.layouts.get(i)
            if layout is None and role is R.WEIGHT and made.kind is K.LINEAR:
                layout = Layout().permuted(1, 0)
            made.held[role] = operand
            self._param(made, role, operand, layout)

    def _absorb(self, made: _Made, absorbed: set[int]) -> None:
        """Take an addition of a constant for each output channel in as the bias."""
        node = made.node
        add = self.nodes.sole_user(node.output)
        if add is None or add.type != "Add" or len(add.present) != 2:
            return
        value = next(v for v in add.present if v != node.output) if add.present[0] != add.present[1] else None
        array = None if value is None else self.nodes.values[value].array
        weight = self._values[made.params[R.WEIGHT]]
        width = weight.shape[1] * getattr(node.attrs, "groups", 1) if made.kind is K.CONV_TRANSPOSE else weight.shape[0]
        rank = len(self.nodes.values[node.output].shape)
        axis = node.channels[1] % rank if node.channels is not None else rank - 1
        if value is None or array is None or array.size != width or not is_float(self.nodes.values[value]):
            return
        full = (*(1 for _ in range(rank - array.ndim)), *array.shape)
        if array.ndim > rank or any(n != (width if i == axis else 1) for i, n in enumerate(full)):
            return
        if not np.isfinite(array).all():  # a mask
            return
        made.held[R.BIAS] = value
        self._param(made, R.BIAS, value, Layout().reshaped(array.shape, (width,)))
        made.members = (*made.members, add)
        absorbed.add(id(add))

    # -- parameters

    def _param(self, made: _Made, role: ParamRole, value: ValueId, layout: Layout | None) -> None:
        root = self.nodes.root(value)
        if root is None:
            name = f"{self._base(made)}.{role.value}"
            given, native = layout or Layout(), value
        else:
            name, given = root[0], root[1].then(layout or (self._own[root[0]] if not root[1].steps else Layout()))
            native = root[0]
        held = self._natives.get(name)
        if held is not None and held != (native, given):
            # The same array in another layout, or another one of this name, is a parameter of its own.
            name = free_name(f"{name}@{self._base(made)}", self._natives, 2)
        array = self.nodes.values[native].array
        assert array is not None
        self._natives[name] = (native, given)
        self._values[name] = np.array(given.canonical(array), np.float32, order="C")
        made.params[role] = name

    def _base(self, made: _Made) -> str:
        """What an op is called, before it is made unique; settled when it is first asked for."""
        if not made.name:
            made.name = self._free(made)
        return made.name

    def _free(self, made: _Made) -> str:
        found = made.node.name
        if not found:
            leaves = [p for value in made.held.values() for p in sorted(self._leaves(value))]
            found = re.sub(r"[./]?[^./]+$", "", leaves[0]) if leaves else ""
        plain = made.kind in (K.ACTIVATION, K.ELEMENTWISE, K.NORM, K.OPAQUE)
        name = free_name(found or (made.type.lower() if plain else made.kind.value), self._given, 2)
        self._given.add(name)
        return name

    # -- the model

    def model(self, made: type[M]) -> M:
        """The ops, their parameters, and their functions."""
        names = self._tensors()
        ops, native, told, orders = [], {}, {}, {}
        for one in self._made:
            last = one.members[-1]
            data = [o for o in one.node.operands if o is None or not self.nodes.values[o].known]
            while data and data[-1] is None:
                data.pop()
            inputs = tuple(None if o is None else names[o] for o in data)
            outputs = tuple(names[o] for o in last.outputs)
            op = Op(one.name, one.kind, one.type, inputs, outputs, one.params, _plain(one.node.attrs), one.node.native,
                    one.node.source, self._call(one))  # fmt: skip
            ops.append(op)
            native[op.id] = self._function(one, last)
            if one.node.channels is not None:
                told[op.id] = dict(zip((op.data_inputs[0], op.output), one.node.channels, strict=True))
            if one.kind is K.TRANSPOSE:
                orders[op.id] = one.node.attributes["perm"]
        ranks = {names[v]: len(self.nodes.values[v].shape) for v in names}
        axes = {names[v]: axis for v, axis in self._channels.items() if v in names}
        axes |= channel_axes(ops, ranks, told, orders)
        masked = self._masks(names)
        tensors = {
            t: Tensor(t, self._known(v), self.nodes.values[v].dtype, axes.get(t), v in masked) for v, t in names.items()
        }
        layouts = {p: layout for p, (_, layout) in self._natives.items() if layout.steps}
        params = {p: Param(p, v.shape, "float32", layouts[p].order if p in layouts else None)
                  for p, v in self._values.items()}  # fmt: skip
        graph = Graph(ops, tensors, params, [names[i] for i in self._inputs], [names[o] for o in self.nodes.outputs])
        return made(graph, dict(self._values), native, layouts)

    def _call(self, made: _Made) -> Call | None:
        """What else the op computes with, in ONNX's words; None for what ONNX hasn't got."""
        node, type = made.node, made.type
        if type not in ONNX_TYPES or (made.kind is K.OPAQUE and type in _WEIGHTS):
            return None
        attributes = dict(node.attributes)
        operands: dict[int, Constant | ParamRole] = {}
        for place, name in enumerate(_GIVEN.get(type, ()), 1):
            if name in attributes:
                operands[place] = Constant(np.asarray(attributes.pop(name), np.int64))
        if type.startswith("Reduce") or (isinstance(node.attrs, AxisAttrs | PoolAttrs) and type in KINDS):
            attributes = {k: v for k, v in attributes.items() if type.endswith("Normalization")}
        roles = {value: role for role, value in made.held.items()}
        for place, operand in enumerate(node.operands):
            if operand is None or not self.nodes.values[operand].known:
                continue
            role = roles.get(operand)
            array = self.nodes.values[operand].array
            if role is R.CONSTANT:
                operands[place] = role
            elif role is None and array is not None:
                operands[place] = Constant(array)
        attributes = {k: _plain(v) for k, v in attributes.items()}
        return Call(attributes, operands) if attributes or operands or made.kind is K.OPAQUE else None

    def _masks(self, names: Mapping[ValueId, TensorId]) -> Collection[ValueId]:
        """Values that are masks, or masked."""
        views, constants = [], {}
        for made in self._made:
            node = made.node
            for value in node.present:
                array = self.nodes.values[value].array
                if array is not None and made.kind not in UNREAD and is_float(self.nodes.values[value]):
                    constants[value] = Extent.of_table(array) if node.type == "Gather" else Extent.of(array)
            kind = K.SLICE if made.kind is K.EMBEDDING else made.kind
            views.append(NodeView(kind, made.type, node.present, made.members[-1].outputs))

        def floating(value: ValueId) -> bool:
            return value in names and is_float(self.nodes.values[value])

        return masks(views, list(self._inputs), list(self.nodes.outputs), constants, floating)

    def _known(self, value: ValueId) -> tuple[int | None, ...]:
        return self.nodes.values[value].shape

    def _tensors(self) -> dict[ValueId, TensorId]:
        names: dict[ValueId, TensorId] = {i: i for i in self._inputs}
        wanted = dict(zip(self.nodes.outputs, self._names, strict=False))
        for made in self._made:
            outputs = made.members[-1].outputs
            for i, value in enumerate(outputs):
                base = f"{made.name}.output" + (f".{i}" if len(outputs) > 1 else "")
                names[value] = free_name(wanted.get(value, base), {*names.values(), *self._values}, 2)
        return names

    def _function(self, made: _Made, last: Node) -> Captured:
        roots = {self._natives[param][0]: role for role, param in made.params.items()}
        steps: list[Step] = []
        roles: dict[ParamRole, ValueId] = {}
        constants: dict[ValueId, Any] = {}
        made_here: set[ValueId] = set()

        def need(value: ValueId) -> None:
            """Make a value that depends on no input available to the steps."""
            if value in made_here:
                return
            if value in roots:
                roles[roots[value]] = value
                made_here.add(value)
            elif value in self.nodes.derived and all(p in roots for p in self._leaves(value)):
                for step in self.nodes.derived[value].steps:
                    for operand in step.operands:
                        need(operand)
                    if made_here.isdisjoint(step.outputs):
                        steps.append(step)
                        made_here.update(step.outputs)
            else:
                constants[value] = self.nodes.values[value].array
                made_here.add(value)

        for member in made.members:
            for step in member.steps:
                for operand in step.operands:
                    if self.nodes.values[operand].known:
                        need(operand)
                steps.append(step)
        data = tuple(o for o in made.node.operands if o is not None and not self.nodes.values[o].known)
        return Captured(tuple(steps), data, roles, last.outputs, constants)

    def _leaves(self, value: ValueId) -> set[ValueId]:
        """The parameters that a value is computed from."""
        held = self.nodes.values[value]
        if held.kind == "parameter":
            return {value}
        if held.kind == "constant":
            return set()
        return {p for o in self.nodes.derived[value].present for p in self._leaves(o)}


def _plain(value: Any) -> Any:
    """A number of Python's own, a tuple of such, or a record of both."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value
