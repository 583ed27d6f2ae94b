"""The ONNX graph in the making: what the handlers of TensorFlow ops write to.

Tensors keep TensorFlow's layouts, so that each has one value of its own shape under its own name; convolutions and
pools stand between two Transposes. A Transpose that would undo another one is left out where the tensor between has
no name that must last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright_onnx.graphdef.nodes import Node, onnx_type


class Constant:
    """A tensor known in advance: its values, and the Const node that they come from (None: several)."""

    def __init__(self, array: NDArray[Any], origin: str | None) -> None:
        self.array, self.origin = array, origin


class Linear:
    """A convolution or matrix product that can still take a bias.

    Attributes:
        node: the ONNX node.
        result: the value behind it that ends the chain (a Transpose's or Reshape's output, or the node's own).
        channels: width of the output.
        trailing: shape that the channels have at the end of the chain ((channels,) without a Reshape).
    """

    def __init__(self, node: ir.Node, result: ir.Value, channels: int, trailing: tuple[int, ...]) -> None:
        self.node, self.result, self.channels, self.trailing = node, result, channels, trailing


class Builder:
    """Collects ONNX nodes.

    Args:
        nodes: the GraphDef's nodes by name.
        names: TensorFlow tensor → the name that it gets in ONNX; others keep their own ("node:0").
        kept: tensors whose names must last besides (outputs).
    """

    def __init__(self, nodes: Mapping[str, Node], names: Mapping[str, str], kept: Collection[str]) -> None:
        self.nodes = nodes
        self.names = dict(names)
        self.kept = {*names, *kept}
        self.values: dict[str, ir.Value] = {}
        self.constants: dict[str, Constant] = {}
        self.linear: dict[str, Linear] = {}
        self.made: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.readers: Counter[str] = Counter(i for n in nodes.values() for i in n.inputs)
        self.dilated: dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {}
        """Convolutions between SpaceToBatchND and BatchToSpaceND: dilations and paddings that these stand for."""
        self.passed: set[str] = set()
        """Those two nodes, which pass their input on."""
        self._forms: dict[tuple[str, str], ir.Value] = {}
        self._turned: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
        self._taken = {self.name_of(n.output()) for n in nodes.values()} | set(self.names.values())
        self._owners: dict[int, str] = {}

    # -- reading

    def name_of(self, tensor: str) -> str:
        """The ONNX name of a TensorFlow tensor."""
        return self.names.get(tensor, tensor)

    def known(self, tensor: str) -> NDArray[Any] | None:
        """A tensor's values if they are constant."""
        found = self.constants.get(tensor)
        return None if found is None else found.array

    def constant(self, node: Node, index: int, what: str) -> NDArray[Any]:
        """An operand that must be constant.

        Raises:
            ModelError: it is computed.
        """
        array = self.known(node.inputs[index])
        if array is None:
            raise ModelError(f"{node.op} {node.name!r}: {what} is computed in the graph; ONNX needs a constant here")
        return array

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Static shape where the file records it."""
        if tensor in self.constants:
            return self.constants[tensor].array.shape
        name, _, index = tensor.rpartition(":")
        return self.nodes[name].shape(int(index))

    def value(self, tensor: str) -> ir.Value:
        """The ONNX value of a tensor; constants become initializers."""
        if tensor not in self.values:
            constant = self.constants.get(tensor)
            if constant is None:
                raise ModelError(f"tensor {tensor!r} is read before it is computed: the graph has a cycle")
            return self.form(tensor, constant.array, "")
        return self.values[tensor]

    def is_private(self, tensor: str) -> bool:
        """Whether one op reads a tensor, and nobody asks for its name."""
        return tensor not in self.kept and self.readers[tensor] == 1

    # -- writing

    def form(self, tensor: str, array: NDArray[Any], form: str) -> ir.Value:
        """An initializer that holds a constant in some form (transposed, reshaped), under the constant's name.

        A constant that is used in several forms has a name of its own for each but the first.
        """
        origin = self.constants[tensor].origin
        key = (origin if origin is not None else tensor, f"{form}|{array.shape}")
        if key not in self._forms:
            wanted = self.name_of(key[0])
            name = wanted if wanted not in self.initializers else self.fresh(wanted)
            self._forms[key] = self.initializer(name, array)
        return self._forms[key]

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer of exactly this name; 32-bit integers are widened."""
        array = np.asarray(array, order="C")
        if array.dtype == np.int32:
            array = array.astype(np.int64)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.initializers[name] = value
        return value

    def numbers(self, hint: str, array: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer of a few numbers that the conversion itself needs."""
        return self.initializer(self.fresh(hint), np.asarray(array, dtype))

    def scalar_like(self, node: Node, value: float) -> ir.Value:
        """A scalar of the type of the node's attribute T."""
        return self.numbers(f"{node.name}/constant", value, onnx_type(node.dtype("T")).numpy())

    def add(self, op: str, *inputs: ir.Value | None, hint: str, outputs: int = 1, **attributes: Any) -> ir.Value:
        """Append an ONNX node whose outputs have no TensorFlow name (yet); returns the first."""
        name = self.fresh(f"{hint}/{op}")
        made = [ir.Value(name=name if i == 0 else f"{name}_{i}") for i in range(outputs)]
        self.made.append(ir.node(op, inputs, attributes or None, outputs=made, name=name))
        return made[0]

    def set(self, tensor: str, value: ir.Value) -> None:
        """Declare what a TensorFlow tensor is in ONNX; the value takes its name unless it has a lasting one already."""
        self.values[tensor] = value
        owner = self._owners.get(id(value))
        if value.producer() is None:  # inputs and initializers keep theirs
            return
        if owner is None or (owner not in self.kept and tensor in self.kept):
            self._owners[id(value)] = tensor
            value.name = self.name_of(tensor)
        elif tensor in self.kept:
            alias = self.add("Identity", value, hint=tensor)
            alias.name, self.values[tensor] = self.name_of(tensor), alias
            self._owners[id(alias)] = tensor

    def rename(self, tensor: str, value: ir.Value) -> None:
        """As `set`, where the value no longer is what its old name says."""
        self._owners.pop(id(value), None)
        self.set(tensor, value)

    def transpose(self, value: ir.Value, order: Sequence[int], hint: str) -> ir.Value:
        """A transposed value; undoing a Transpose whose output has no lasting name takes that one's input."""
        order = tuple(order)
        if order == tuple(range(len(order))):
            return value
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose" and self._owners.get(id(value)) not in self.kept:
            before = producer.attributes.get_ints("perm") or ()
            source = producer.inputs[0]
            if source is not None and [before[i] for i in order] == list(range(len(order))):
                return source
        key = (id(value), order)
        if key not in self._turned:
            self._turned[key] = self.add("Transpose", value, hint=hint, perm=list(order))
        return self._turned[key]

    def shape_of(self, value: ir.Value, hint: str, start: int = 0, end: int | None = None) -> ir.Value:
        """The value's dimensions as an int64 vector."""
        limits: dict[str, int] = {"start": start} if end is None else {"start": start, "end": end}
        return self.add("Shape", value, hint=hint, **limits)

    def fresh(self, name: str) -> str:
        """A name that nothing has yet."""
        chosen, count = name, 1
        while chosen in self._taken or chosen in self.initializers:
            count += 1
            chosen = f"{name}_{count}"
        self._taken.add(chosen)
        return chosen
