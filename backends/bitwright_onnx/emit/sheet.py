"""The ONNX graph in the making: what the writers of ops write to.

Each tensor of the canonical graph is one ONNX value under its own name and in its own layout; each parameter is one
initializer under its own name. Whatever lies between is called after the op that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import Constant, Graph, Op, OpId, OpKind, ParamId, ParamRole, TensorId, free_name, operands
from bitwright_onnx.graph.stored import ReadTensor

_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
LAZY_VALUES = 2**18
"""Values of a parameter that are read only when somebody asks for them."""

SIZES: Mapping[str, int] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Slice", "Split", "TopK", "GatherND"), 1),
    "ConstantOfShape": 0,
}
"""Operators of whose operands some are sizes, by the place of the first."""


class NotEmittable(ModelError):
    """An op that can't be written as ONNX.

    Attributes:
        op, type: which.
        reason: why not.
        others: further ops and their reasons.
    """

    def __init__(self, op: OpId, type: str, reason: str, others: Sequence[tuple[OpId, str, str]] = ()) -> None:
        self.op, self.type, self.reason, self.others = op, type, reason, tuple(others)
        more = "".join(f"; op {o!r} ({t}), {r}" for o, t, r in self.others[:4])
        left = len(self.others) - 4
        super().__init__(
            f"not emittable as ONNX: op {op!r} ({type}), {reason}{more}{f'; and {left} more' if left > 0 else ''}"
        )


def onnx_type(name: str) -> ir.DataType:
    """ONNX's type by the name that the core has for it.

    Raises:
        ModelError: ONNX has none, or it isn't one of numbers.
    """
    if name == "string":
        raise ModelError("models of text aren't written as ONNX")
    try:
        return ir.DataType[_TYPES.get(name, name.upper())]
    except KeyError:
        raise ModelError(f"ONNX has no type {name!r}") from None


class Sheet:
    """Collects nodes and initializers.

    Args:
        graph: canonical.
        params: hands out a parameter's values, in canonical layout.
    """

    def __init__(self, graph: Graph, params: Callable[[ParamId], NDArray[Any]]) -> None:
        self.graph = graph
        self.values: dict[TensorId, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._params = params
        self._forms: dict[ParamId, tuple[int, ...] | None] = {}
        self._taken = {*graph.tensors, *graph.params, *(op.id for op in graph)}
        self._main: set[OpId] = set()
        self._turned = {p for p in graph.params if _always_turned(graph, p)}

    # -- reading

    def shape(self, tensor: TensorId) -> tuple[int | None, ...] | None:
        """A tensor's shape, as far as the graph knows it."""
        return self.graph.tensors[tensor].shape

    def rank(self, op: Op, tensor: TensorId) -> int:
        """A tensor's rank.

        Raises:
            NotEmittable: the graph doesn't know it.
        """
        shape = self.shape(tensor)
        if shape is None:
            raise NotEmittable(op.id, op.type, f"the rank of {tensor!r} isn't known")
        return len(shape)

    def dtype(self, op: Op) -> str:
        """The float type that an op computes in; that of its first tensor where none is of floats."""
        around = [self.graph.tensors[t] for t in (*op.data_inputs, *op.outputs)]
        return next((t.dtype for t in around if t.dtype.startswith(("float", "bfloat"))), around[0].dtype)

    def operands(self, op: Op) -> list[ir.Value | None]:
        """All of an op's operands, in ONNX's order."""
        found = [self.operand(op, held) for held in operands(op)]
        first = SIZES.get(op.type, len(found))
        return [*found[:first], *(None if v is None else self.whole(op, v) for v in found[first:])]

    def whole(self, op: Op, value: ir.Value) -> ir.Value:
        """A value of whole numbers in 64 bits, as ONNX wants sizes and axes."""
        tensor = None if value.name is None else self.graph.tensors.get(value.name)
        kind = value.dtype if tensor is None else onnx_type(tensor.dtype)
        return value if kind in (None, ir.DataType.INT64) else self.node(op, "Cast", value, to=int(ir.DataType.INT64))

    def operand(self, op: Op, held: TensorId | ParamRole | Constant | None) -> ir.Value | None:
        """One operand: an activation, a parameter by its role, a literal."""
        if held is None:
            return None
        if isinstance(held, Constant):
            array = held.array
            return self.literal(op, array, self.dtype(op) if array.dtype.kind == "f" else None)
        return self.param(op, held) if isinstance(held, ParamRole) else self.values[held]

    # -- parameters and literals

    def param(self, op: Op, role: ParamRole, shape: tuple[int, ...] | None = None, *, turned: bool = False) -> ir.Value:
        """A parameter as an op reads it; kept in the form in which its first reader wants it.

        Args:
            shape: with axes of length 1 put in; None: as it is.
            turned: a matrix transposed.
        """
        name = op.params[role]
        stored = self.initializers.get(name)
        if stored is None:
            self._forms[name] = (-1,) if name in self._turned else shape
            stored = self._stored(name, shape)
        form = self._forms[name]
        value = stored
        if turned != (form == (-1,)):
            value = self.node(op, "Transpose", value, perm=[1, 0])
        elif not turned and form != shape:
            value = self.node(op, "Reshape", value, self.literal(op, shape or self.graph.params[name].shape))
        wanted = self.dtype(op)
        if self.graph.params[name].dtype != wanted and wanted.startswith(("float", "bfloat")):
            value = self.node(op, "Cast", value, to=int(onnx_type(wanted)))
        return value

    def _stored(self, name: ParamId, shape: tuple[int, ...] | None) -> ir.Value:
        """The initializer of a parameter."""
        dtype, turned = onnx_type(self.graph.params[name].dtype), name in self._turned
        params = self._params  # not the sheet, which a tensor would keep with all that is on it

        def made() -> ir.TensorProtocol:
            array = np.asarray(params(name))
            array = array.T if turned else array.reshape(shape) if shape is not None else array
            array = np.asarray(array, order="C").astype(dtype.numpy(), copy=False)
            if lazy and array.shape != held:
                raise ModelError(f"parameter {name!r} is {array.shape} where its op reads {held}")
            return ir.Tensor(array, dtype=dtype, name=name)

        canonical = self.graph.params[name].shape
        held = canonical[::-1] if turned else canonical if shape is None else shape
        lazy = int(np.prod(canonical, dtype=np.int64)) >= LAZY_VALUES
        if not lazy:
            return self._held(name, made())
        return self._held(name, ReadTensor(made, dtype, ir.Shape(held), name=name))

    def literal(self, op: Op, values: Any, dtype: str | None = None) -> ir.Value:
        """An initializer that the op alone reads; whole numbers are int64, floats of `dtype`."""
        array = np.asarray(values)
        if dtype is None and array.dtype.kind in "iu" and not isinstance(values, np.ndarray):
            array = array.astype(np.int64)
        kind = ir.DataType.from_numpy(array.dtype) if dtype is None else onnx_type(dtype)
        return self._initializer(self.fresh(f"{op.id}/constant"), array.astype(kind.numpy(), copy=False), kind)

    def _initializer(self, name: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        return self._held(name, ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name))

    def _held(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers[name] = made
        return made

    # -- writing

    def node(self, op: Op, type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output, which it returns; absent attributes (None) are left out."""
        return self.nodes_of(op, type, inputs, 1, attributes)[0]

    def nodes_of(
        self, op: Op, type: str, inputs: Sequence[ir.Value | None], outputs: int, attributes: Mapping[str, Any]
    ) -> list[ir.Value]:
        """Append a node with some outputs."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        name = self.fresh(f"{op.id}/{type}")
        made = [ir.Value(name=name if i == 0 else f"{name}_{i}") for i in range(outputs)]
        if op.id not in self._main and (type == op.type or (op.kind is OpKind.LINEAR and type in ("Gemm", "MatMul"))):
            self._main.add(op.id)
            name = op.id  # the node that does what the op is named for
        held = {k: list(v) if isinstance(v, tuple) else v for k, v in attributes.items() if v is not None}
        self.nodes.append(ir.node(type, given, held or None, outputs=made, name=name))
        return made

    def main(self, op: Op, value: ir.Value) -> None:
        """Call the node that computes a value by the op's name, where none has it yet."""
        producer = value.producer()
        if op.id not in self._main and producer is not None:
            self._main.add(op.id)
            producer.name = op.id

    def transpose(self, op: Op, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """A transposed value; itself where nothing moves."""
        order = list(order)
        return value if order == sorted(order) else self.node(op, "Transpose", value, perm=order)

    def fresh(self, name: str) -> str:
        """A name that nothing has yet."""
        chosen = free_name(name, self._taken, 2)
        self._taken.add(chosen)
        return chosen


def multiplies_rank_2(graph: Graph, op: Op) -> bool:
    """Whether a linear op becomes a Gemm: a matrix by a matrix that lies as the canonical layout has it."""
    shape = graph.tensors[op.data_inputs[0]].shape
    return op.type == "Gemm" and shape is not None and len(shape) == 2


def _always_turned(graph: Graph, param: ParamId) -> bool:
    """Whether all readers are MatMuls, which want (in, out)."""
    users = graph.users(param)
    return bool(users) and all(
        op.kind is OpKind.LINEAR and op.weight == param and not multiplies_rank_2(graph, op) for op in users
    )
