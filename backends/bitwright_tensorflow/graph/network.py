"""The data flow between inputs and outputs: what computes on data, what is constant, what is shape arithmetic."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.graph import TensorId
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.layouts import Layout, Reshaped, Step, Transposed
from bitwright_tensorflow.graph.model import VARIABLES, Array, NodeDef, TfModel, node_of
from bitwright_tensorflow.graph.shapes import Inference, computed, inference

Edge = tuple[str, int]
"""A node and which of its operands."""

FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
PASSING = frozenset({"Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics"})
"""Ops that hand on their first operand as it is."""
_SHAPE_SOURCES = frozenset({"Shape", "ShapeN", "Size", "Rank"})
_RANDOM = ("Random", "Multinomial", "TruncatedNormal", "StatelessRandom", "StatefulRandom")
_READS = frozenset({"ReadVariableOp"})

ALIAS = "_bitwright_name"
"""Attribute of an Identity that an edit has put in to give a tensor the name that it must have."""
OP_NAME = "_bitwright_op"
"""Attribute with an op's id, on a main node that had to give its own name away."""


@dataclass(frozen=True)
class Read:
    """How an op reads a parameter.

    Attributes:
        source: node of the variable or constant.
        edge: the operand, nearest to the op, that carries the values in native layout.
        tensor: the tensor on that edge.
        form: from the native layout to what the op sees; recognizers add the steps to the canonical layout.
        dtype: name of the type.
    """

    source: str
    edge: Edge
    tensor: TensorId
    form: Layout
    dtype: str

    def then(self, *steps: Step) -> Read:
        """With further steps."""
        return Read(self.source, self.edge, self.tensor, self.form.then(*steps), self.dtype)


class Network:
    """What recognizers ask about a model.

    Args:
        model: whose.
        complete: sizes that are known at run time only are data, and what is computed from variables alone is a
            parameter where it is an op's weight; so that all that is computed can be written down.
    """

    def __init__(self, model: TfModel, *, complete: bool = False) -> None:
        self.inference: Inference = inference(model)
        self.complete = complete
        self._model = model
        self.inputs, self.outputs = model.inputs, model.outputs
        self._wiring = self.inference.wiring
        self.constant: set[str] = set()
        self.sizes: set[str] = set()
        self.alias: dict[TensorId, TensorId] = {}
        self.collapsed = {n for region in self.inference.regions for n in region}
        fed = set(model.inputs)
        for name in self.inference.order:
            self._sort(name, fed)
        hidden = self.constant | self.sizes
        self.open_sizes: set[str] = {n for n in self.sizes if self.value(f"{n}:0") is None} if complete else set()
        self._readers: dict[TensorId, list[Edge]] = defaultdict(list)
        for name in self.inference.order:
            if name in hidden:
                continue
            for index, operand in enumerate(data_operands(self.node(name))):
                if f"{name}:0" not in self.alias:
                    self._readers[self.resolve(operand)].append((name, index))
        self._ends = {self.resolve(t) for t in model.outputs}

    def _sort(self, name: str, fed: set[TensorId]) -> None:
        node = self.node(name)
        operands = data_operands(node)
        sources = {node_of(t) for t in operands if t not in fed}
        free = not any(t in fed for t in operands) and not node.op.startswith(_RANDOM)
        if node.op in ("Const", *VARIABLES) or (operands and free and sources <= self.constant):
            self.constant.add(name)
            return
        follows = bool(sources & self.sizes) and free and sources <= self.constant | self.sizes
        if (node.op in _SHAPE_SOURCES or follows) and not any(node_of(t) == name for t in self.outputs):
            self.sizes.add(name)
            return
        if node.op == "IdentityN" and not any(node_of(t) == name for t in self.outputs):
            # What custom gradients are wrapped in.
            self.alias.update({f"{name}:{i}": self.resolve(t) for i, t in enumerate(operands)})
        elif node.op in PASSING and name not in self.collapsed:
            tensor = f"{name}:0"
            if tensor not in self.outputs and ALIAS not in node.attr:
                self.alias[tensor] = self.resolve(operands[0])

    # -- nodes and tensors

    def node(self, name: str) -> NodeDef:
        """A node by name."""
        return self._wiring.nodes[name]

    def id(self, node: NodeDef) -> str:
        """The op's id: the node's name, or the one that an edit has made it keep."""
        kept: str = self.attr(node, OP_NAME, node.name)
        return kept

    def attr(self, node: NodeDef, name: str, default: Any = None) -> Any:
        """An attribute's value; strings as str."""
        if name not in node.attr:
            return default
        value = node.attr[name]
        match value.WhichOneof("value"):
            case "s":
                return value.s.decode()
            case "i":
                return int(value.i)
            case "f":
                return float(value.f)
            case "b":
                return bool(value.b)
            case "type":
                return tf.as_dtype(value.type).name
            case "list":
                return [int(i) for i in value.list.i]
        return default

    def resolve(self, tensor: TensorId) -> TensorId:
        """The tensor behind Identities."""
        return self.alias.get(tensor, tensor)

    def producer(self, tensor: TensorId) -> NodeDef | None:
        """The node that computes a tensor from data; None for inputs and what isn't computed from data."""
        tensor = self.resolve(tensor)
        if tensor in self.inputs or node_of(tensor) in self.constant or node_of(tensor) in self.sizes:
            return None
        return self._wiring.nodes.get(node_of(tensor))

    def operands(self, node: NodeDef) -> list[TensorId]:
        """All operands of a node, Identities looked through."""
        return [self.resolve(t) for t in data_operands(node)]

    def is_data(self, tensor: TensorId) -> bool:
        """Whether a tensor holds data (and not a constant or a size)."""
        tensor = self.resolve(tensor)
        if tensor in self.inputs or node_of(tensor) in self.open_sizes:
            return True
        return node_of(tensor) not in self.constant | self.sizes

    def data(self, node: NodeDef) -> list[TensorId]:
        """The operands that hold data."""
        return [t for t in self.operands(node) if self.is_data(t)]

    def readers(self, tensor: TensorId) -> list[Edge]:
        """Operands that read a tensor as data."""
        return self._readers.get(tensor, [])

    def is_end(self, tensor: TensorId) -> bool:
        """Whether it is an output of the model."""
        return tensor in self._ends

    def sole(self, tensor: TensorId) -> NodeDef | None:
        """The one node that reads a tensor which is neither input nor output; it may read it twice."""
        names = {name for name, _ in self.readers(tensor)}
        if len(names) != 1 or self.is_end(tensor) or tensor in self.inputs:
            return None
        (name,) = names
        return None if name in self.collapsed else self.node(name)

    def only(self, tensor: TensorId, node: NodeDef) -> bool:
        """Whether that node, and nothing else, reads a tensor (see `sole`)."""
        reader = self.sole(tensor)
        return reader is not None and bool(reader.name == node.name)

    def shape(self, tensor: TensorId) -> tuple[int | None, ...] | None:
        """Static shape."""
        return self.inference.shape(tensor)

    def rank(self, tensor: TensorId) -> int | None:
        """Number of dimensions, if known."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def is_float(self, tensor: TensorId) -> bool:
        """Whether it is of a float type."""
        return self.inference.dtype(tensor) in FLOATS

    def value(self, tensor: TensorId) -> Array | None:
        """Static value of a constant operand (of a shape, too, where it is known)."""
        return self.inference.value(tensor)

    def known(self, tensor: TensorId) -> Array | None:
        """The same; of a complete network, computed from constants and variables where it has to be."""
        value = self.value(tensor)
        if value is None and self.complete and not self.is_data(tensor):
            value = computed(self._model, [tensor])[0]
        return value

    def whole(self, tensor: TensorId) -> tuple[int, ...] | None:
        """`known` as integers."""
        value = self.known(tensor)
        return None if value is None else tuple(int(i) for i in np.asarray(value).reshape(-1))

    def ints(self, tensor: TensorId) -> tuple[int, ...] | None:
        """Static value as integers."""
        value = self.value(tensor)
        return None if value is None else tuple(int(i) for i in np.asarray(value).reshape(-1))

    def scalar(self, tensor: TensorId) -> float | None:
        """Static value of a constant with one element."""
        value = self.value(tensor) if not self.is_data(tensor) else None
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    # -- parameters

    def read(self, node: NodeDef, index: int) -> Read | None:
        """The float parameter that an operand is; None where it holds data or is computed from parameters."""
        edge = (node.name, index)
        tensor = data_operands(node)[index]
        if not self.inference_has(tensor) or not self.is_float(tensor):
            return None
        later: list[tuple[str, TensorId]] = []
        while True:
            source = self.node(node_of(tensor))
            if tensor in self.inputs or source.name not in self.constant:
                return None
            if source.op == "Const" or (source.op in VARIABLES and source.op != "VarHandleOp"):
                found = source.name
                break
            if source.op in _READS:
                handle = self._handle(source)
                if handle is None:
                    return None
                found = handle
                break
            if source.op in PASSING or (source.op == "Enter" and self.attr(source, "is_constant")):
                below = data_operands(source)[0]
                if self.node(node_of(below)).op in VARIABLES and self.node(node_of(below)).op != "VarHandleOp":
                    found = node_of(below)
                    break
                tensor = below
                continue
            if source.op not in ("Reshape", "ExpandDims", "Squeeze", "Transpose"):
                return None
            later.append((source.name, f"{source.name}:0"))
            edge, tensor = (source.name, 0), data_operands(source)[0]
        at = data_operands(self.node(edge[0]))[edge[1]]
        native = self.shape(at)
        if native is None or any(n is None for n in native):
            return None
        form = Layout(tuple(int(n or 0) for n in native))
        for name, result in reversed(later):
            step = self._step(self.node(name), result)
            if step is None:
                return None
            form = form.then(step)
        return Read(found, edge, at, form, self.inference.dtype(at))

    def weight(self, node: NodeDef, index: int) -> Read | None:
        """A parameter, as `read`; of a complete network, what is computed from parameters too."""
        found = self.read(node, index)
        tensor = data_operands(node)[index]
        if found is not None or not self.complete or self.is_data(tensor) or not self.is_float(tensor):
            return found
        shape = self.shape(tensor)
        if shape is None or None in shape or self.node(node_of(tensor)).op in ("Const", *VARIABLES):
            return None
        native = Layout(tuple(int(n or 0) for n in shape))
        return Read(tensor, (node.name, index), tensor, native, self.inference.dtype(tensor))

    def held(self, node: NodeDef, index: int) -> Array | None:
        """What a constant operand holds: its static value, or the variable's behind it, as that holds it."""
        value = self.value(data_operands(node)[index])
        read = self.read(node, index) if value is None else None
        return value if read is None else self._model.values.get(read.source)

    def inference_has(self, tensor: TensorId) -> bool:
        """Whether a tensor lies between inputs and outputs."""
        try:
            self.inference.spec(tensor)
        except (KeyError, ValueError):
            return False
        return True

    def _handle(self, read: NodeDef) -> str | None:
        node = self.node(node_of(read.input[0]))
        while node.op in PASSING:
            node = self.node(node_of(node.input[0]))
        return node.name if node.op == "VarHandleOp" else None

    def _step(self, node: NodeDef, result: TensorId) -> Step | None:
        if node.op == "Transpose":
            order = self.ints(data_operands(node)[1])
            return None if order is None else Transposed(order)
        shape = self.shape(result)
        if shape is None or any(n is None for n in shape):
            return None
        return Reshaped(tuple(int(n or 0) for n in shape))
