"""How large are values that TensorFlow works out when it imports a graph, told before it does.

Where an op's shape depends on an operand's value (a Reshape's shape, a Tile's multiples), importing the op evaluates
all that the operand is computed from, if that is constants alone; `tf.get_static_value` does the same for what it is
asked. A graph of a hundred bytes, a Fill among them, is gigabytes then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework import op_def_registry

from bitwright.errors import ModelError
from bitwright_tensorflow.graph.runtime import Array

_BYTES, _TIMES = 3 * 2**26, 40
"""What one value is computed from may take so many bytes, or so many times the graph's own."""
_NOTED = 2**14
"""Bytes from which a tensor counts."""
_CALM = frozenset({
    "Cast", "ExpandDims", "Identity", "Neg", "Rank", "Reshape", "Shape", "Size", "Slice", "Squeeze", "StopGradient",
    "StridedSlice", "Transpose",
})  # fmt: skip
"""Ops whose results are about as large as their operands at most."""
_SELECTING = frozenset({"ListDiff", "Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2", "Where"})
"""Ops whose results have no more elements than their operands, times the rank, and of which only running them says how
many."""
_UNASKED: dict[str, int | None] = {
    **dict.fromkeys(("Abs", "Add", "AddV2", "Cast", "Equal", "FloorDiv", "FloorMod", "GatherNd", "Greater",
                     "GreaterEqual", "Identity", "Less", "LessEqual", "Maximum", "Minimum", "Mul", "Neg", "NotEqual",
                     "RealDiv", "Rank", "Select", "SelectV2", "Shape", "Sign", "Size", "Square", "Squeeze", "Sub")),
    **dict.fromkeys(("BroadcastTo", "ExpandDims", "Pad", "PadV2", "Reshape", "Slice", "StridedSlice", "Tile",
                     "Transpose"), 1),
    "GatherV2": 2,
}  # fmt: skip
"""Ops, and how many of their operands, the first ones (None for all), say nothing of a result's shape by their values:
their shape functions in TensorFlow never ask for those."""
_FLOW = frozenset({
    "Enter", "Exit", "LoopCond", "Merge", "NextIteration", "PlaceholderWithDefault", "RefEnter", "RefExit", "RefMerge",
    "RefNextIteration", "RefSwitch",
})  # fmt: skip
"""What TensorFlow takes for no constant, whatever its operands are."""
_LISTS = {"TensorListReserve": 1, "TensorListResize": 1}
"""Ops that make so many tensors as an operand says, by its place."""
_TEXTS = frozenset({
    "BroadcastTo", "Concat", "ConcatV2", "ExpandDims", "Fill", "Gather", "GatherNd", "GatherV2", "Identity", "Pack",
    "Pad", "PadV2", "Reshape", "Select", "SelectV2", "Slice", "Split", "Squeeze", "StopGradient", "StridedSlice",
    "StringLower", "StringStrip", "StringUpper", "Substr", "Tile", "Transpose", "Unpack",
})  # fmt: skip
"""Ops that make no text longer than the longest of their operands."""
_VISITS = 100_000
"""How many times operands are looked at for one value."""
_PIECED = frozenset({"Cast", "Concat", "ConcatV2", "Pack", "StridedSlice"})
"""Ops through which TensorFlow looks for the parts of a shape."""
_STATIC = {"Cast": 1, "Concat": None, "ConcatV2": None, "Equal": 2, "Fill": 2, "NotEqual": 2, "Pack": None,
           "Range": 3, "Split": 2, "StopGradient": 1, "Unpack": 1, "CheckNumericsV2": 1, "Identity": 1}  # fmt: skip
"""Ops that `tf.get_static_value` computes, with how many operands it looks at."""


def refuse_computed(graph_def: GraphDef, where: str) -> None:
    """Refuse a graph whose import evaluates values that are far larger than the graph.

    Args:
        graph_def: of a file; its functions are looked at too, each as it stands.
        where: the file, for the message.

    Raises:
        ModelError: it is one.
    """
    most = max(_BYTES, _TIMES * graph_def.ByteSize())
    _Constants(graph_def, most, where).check()
    for function in graph_def.library.function:
        if body := _body(function):
            _Constants(body, most, where).check()


def static_value(tensor: Any, graph_bytes: int) -> Array | None:
    """`tf.get_static_value`, for what isn't far larger than its graph.

    Args:
        tensor: of an imported graph.
        graph_bytes: how large the graph's description is.

    Raises:
        ModelError: the value, or what it is computed from, is; or TensorFlow can't read a constant behind it.
    """
    behind = _behind(tensor)
    if (total := sum(_bytes(t) or 0 for t in behind)) > max(_BYTES, _TIMES * graph_bytes):
        raise _refused("the graph", tensor.op.name, tensor.op.type, total)
    if _visits(behind) > _VISITS:
        raise _repeated("the graph", tensor.op.name)
    try:
        found = tf.get_static_value(tensor)
    except (TypeError, ValueError) as error:  # a constant of a type that has no values, or that contradicts itself
        raise ModelError(f"the graph can't be read: the value of {tensor.op.name!r} isn't one: {error}") from error
    return None if found is None else np.asarray(found)


def _behind(tensor: Any) -> list[Any]:
    """What computing a tensor's static value makes, each behind its operands."""
    order: list[Any] = []
    seen, stack = set(), [(tensor, False)]
    while stack:
        made, finished = stack.pop()
        if finished:
            order.append(made)
        elif made.ref() not in seen and made.op.type in _STATIC:
            seen.add(made.ref())
            stack += [(made, True), *((t, False) for t in _looked_at(made))]
    return order


def _looked_at(tensor: Any) -> list[Any]:
    return list(tensor.op.inputs)[: _STATIC[tensor.op.type]]


def _visits(behind: Sequence[Any]) -> int:
    """How many calls TensorFlow takes, which computes an operand anew for each of its readers."""
    calls: dict[Any, int] = {}
    for tensor in behind:
        calls[tensor.ref()] = 1 + sum(calls.get(t.ref(), 1) for t in _looked_at(tensor))
    return max(calls.values(), default=0)


def _bytes(tensor: Any) -> int | None:
    if not tensor.shape.is_fully_defined():
        return None
    return int(math.prod(tensor.shape.as_list()) * _width(tensor))


def _width(tensor: Any) -> int:
    found = {tf.string: 16, tf.variant: 64, tf.resource: 64}.get(tensor.dtype.base_dtype) or tensor.dtype.size
    return max(int(found), 1)


def _refused(where: str, name: str, type: str, total: int) -> ModelError:
    return ModelError(
        f"{where} isn't opened: opening it would compute {name!r} ({type}), a constant, from {total / 2**20:,.0f} MiB"
    )


def _repeated(where: str, name: str) -> ModelError:
    return ModelError(
        f"{where} isn't opened: {name!r} reads the same values over and over, by more than {_VISITS:,} ways"
    )


def _body(function: Any) -> GraphDef | None:
    """A function's nodes as a graph; None where they contradict themselves, which importing says later."""
    from tensorflow.python.framework.function_def_to_graph import function_def_to_graph_def

    try:
        found: GraphDef = function_def_to_graph_def(function)[0]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, tf.errors.OpError):
        return None
    return found


class _Constants:
    """What a graph computes from constants alone, imported piece by piece, so that each size is known in time."""

    def __init__(self, graph_def: GraphDef, most: int, where: str) -> None:
        self._graph_def, self._most, self._where = graph_def, most, where
        self._nodes = {node.name: node for node in graph_def.node}
        self._functions = {f.signature.name for f in graph_def.library.function}
        self._tensors: dict[str, list[Any]] = {}
        """Imported outputs by node."""
        self._large: dict[str, dict[str, int]] = {}
        """By node: the large tensors that it is computed from, its own included, with their bytes."""
        self._longest: dict[str, int] = {}
        """By node that makes texts: bytes of the longest at most."""
        self._untold: set[str] = set()
        """Nodes whose values can't be computed here: placeholders are in the place of what they are computed from."""

    def check(self) -> None:
        """Raise a ModelError where importing the graph would evaluate too much."""
        self._refuse_repeated()
        order = self._order()
        if all(self._nodes[name].op in ("Const", *_CALM) for name in order):
            return
        with tf.Graph().as_default() as graph:
            for batch in self._batches(order):
                for name in batch:
                    self._look(self._nodes[name])
                self._import(batch, graph)
        constant = set(order)
        for node in self._graph_def.node:
            if node.name not in constant:
                self._look(node)

    def _refuse_repeated(self) -> None:
        """What a shape is pieced together from is looked at anew for each of its readers."""
        visits: dict[str, int] = {}
        for first in self._nodes:
            stack = [(first, False)]
            while stack:
                name, finished = stack.pop()
                if finished:
                    visits[name] = 1 + sum(visits.get(source, 1) for source in _sources(self._nodes[name]))
                    if visits[name] > _VISITS:
                        raise _repeated(self._where, name)
                elif name not in visits and name in self._nodes and self._nodes[name].op in _PIECED:
                    visits[name] = 1
                    stack += [(name, True), *((source, False) for source in _sources(self._nodes[name]))]

    def _order(self) -> list[str]:
        """Nodes that are computed from constants alone, with these, each behind its operands."""
        known: dict[str, bool | None] = {}
        order: list[str] = []
        for first in self._nodes:
            stack = [(first, False)]
            while stack:
                name, finished = stack.pop()
                node = self._nodes.get(name)
                if finished and node is not None:
                    known[name] = all(known.get(source) for source in _sources(node))
                    order += [name] if known[name] else []
                elif name not in known:
                    known[name] = None  # a circle, if it is met again
                    if node is None or not self._may_be_constant(node):
                        known[name] = False
                    else:
                        stack += [(name, True), *((source, False) for source in _sources(node))]
        return order

    def _may_be_constant(self, node: NodeDef) -> bool:
        if node.op in _FLOW or node.op in self._functions:
            return False
        if any(value.WhichOneof("value") == "func" for value in node.attr.values()):
            return False
        known = op_def_registry.get(node.op)
        return known is not None and not known.is_stateful and (node.op == "Const" or any(_sources(node)))

    def _batches(self, order: Sequence[str]) -> Iterator[list[str]]:
        """Nodes in pieces that each end with one that may be larger than its operands."""
        batch: list[str] = []
        for name in order:
            batch.append(name)
            if self._nodes[name].op not in ("Const", *_CALM):
                yield batch
                batch = []
        if batch:
            yield batch

    def _look(self, node: NodeDef) -> None:
        """Refuse a node that may ask for an operand whose value takes too much."""
        unasked = _UNASKED.get(node.op, 0)
        for operand in () if unasked is None else _operands(node)[unasked:]:
            source = operand.partition(":")[0]
            large = self._large.get(source)
            if not large or (total := sum(large.values())) <= self._most:
                continue
            made = self._made(operand)
            if made is None:
                continue
            if made.dtype.base_dtype in (tf.int32, tf.int64) or node.op in ("Range", "LinSpace"):
                raise _refused(self._where, source, self._nodes[source].op, total)

    def _import(self, batch: Sequence[str], graph: Any) -> None:
        piece = GraphDef()
        piece.versions.CopyFrom(self._graph_def.versions)
        given, inner = {}, set(batch)
        for name in batch:
            copied = piece.node.add()
            copied.CopyFrom(self._nodes[name])
            copied.device = ""
            for key in ("_class", "_output_shapes"):
                copied.attr.pop(key, None)
            del copied.input[:]
            for operand in _operands(self._nodes[name]):
                copied.input.append(operand)
                if operand.partition(":")[0] not in inner:
                    given[operand] = self._made(operand)
        try:
            ops = tf.import_graph_def(piece, input_map=given, return_elements=list(batch), name="")
        except (ValueError, TypeError, KeyError, IndexError, tf.errors.OpError):
            # Importing the whole says what is wrong; nothing is computed from these.
            self._tensors |= {name: [] for name in batch}
            return
        for name, op in zip(batch, ops, strict=True):
            self._tensors[name] = list(op.outputs)
            behind: dict[str, int] = {}
            for source in _sources(self._nodes[name]):
                if source in self._untold:
                    self._untold.add(name)
                if sum(behind.values()) <= self._most:
                    behind |= self._large.get(source, {})
            own = self._settle(name, op, graph, sum(behind.values()))
            own += sum(_bytes(t) or 0 for t in self._tensors[name]) + self._listed(op) + self._texts(name, op)
            if own >= _NOTED and op.type not in ("Identity", "StopGradient"):
                behind[name] = own
            if behind:
                self._large[name] = behind

    def _made(self, operand: str) -> Any:
        """The imported tensor; None where the node has none of that number."""
        source, _, index = operand.partition(":")
        outputs = self._tensors[source]
        number = int(index) if index.isdigit() else -1 if index else 0
        return outputs[number] if 0 <= number < len(outputs) else None

    def _settle(self, name: str, op: Any, graph: Any, behind: int) -> int:
        """Where no shape is told: run what only selects; of the rest, nothing is taken for known.

        Args:
            behind: bytes of what the node is computed from.

        Returns:
            Bytes that its results may have, where running it takes too much.
        """
        if all(t.shape.is_fully_defined() for t in op.outputs):
            return 0
        if op.type == "RaggedRange":
            raise ModelError(f"{self._where} isn't opened: how long {name!r} ({op.type}) is can't be told beforehand")
        selected = _selected_bytes(op)
        if op.type in _SELECTING and name not in self._untold and behind + selected <= self._most:
            try:
                with tf.compat.v1.Session(graph=graph) as session:
                    values = session.run(list(op.outputs))
            except tf.errors.OpError:  # as when TensorFlow evaluates it: nothing comes of it
                pass
            else:
                self._tensors[name] = [tf.constant(v) for v in values]
                return 0
        self._untold.add(name)
        self._tensors[name] = [tf.compat.v1.placeholder(t.dtype.base_dtype, t.shape) for t in op.outputs]
        return selected if behind + selected > self._most else 0

    def _texts(self, name: str, op: Any) -> int:
        """Bytes of the texts that an op makes at most, which no shape tells."""
        made = [t for t in op.outputs if t.dtype.base_dtype == tf.string]
        if not made:
            return 0
        longest = self._longest[name] = min(self._longest_text(self._nodes[name], op), 2 * self._most)
        return max(
            (math.prod(t.shape.as_list()) * longest for t in made if t.shape.is_fully_defined()), default=longest
        )

    def _longest_text(self, node: NodeDef, op: Any) -> int:
        """Of those that an op makes; far too much where nobody knows."""
        lengths = [self._longest.get(source, 0) for source in _sources(node)]
        if node.op == "Const":
            tensor = node.attr["value"].tensor
            return max(map(len, tensor.string_val), default=len(tensor.tensor_content))
        if node.op in _TEXTS:
            return max(lengths, default=0)
        if node.op == "StringJoin":
            return sum(lengths) + len(lengths) * len(node.attr["separator"].s)
        if node.op == "ReduceJoin" and op.inputs[0].shape.is_fully_defined():
            return int(math.prod(op.inputs[0].shape.as_list()) * (lengths[0] + len(node.attr["separator"].s)))
        return 2 * self._most

    def _listed(self, op: Any) -> int:
        if op.type not in _LISTS:
            return 0
        count = static_value(op.inputs[_LISTS[op.type]], 0)
        return 64 * int(count) if count is not None and count.size == 1 else 0


def _selected_bytes(op: Any) -> int:
    """Bytes that an op's results have at most; 0 for one that makes more than a selection of its operands."""
    if op.type not in _SELECTING or not all(t.shape.is_fully_defined() for t in op.inputs):
        return 0
    elements = sum(math.prod(t.shape.as_list()) for t in op.inputs)
    width = 8 * op.inputs[0].shape.rank if op.type == "Where" else sum(_width(t) for t in op.outputs)
    return int(elements * width)


def _operands(node: NodeDef) -> list[str]:
    return [operand for operand in node.input if not operand.startswith("^")]


def _sources(node: NodeDef) -> Iterable[str]:
    return (operand.partition(":")[0] for operand in _operands(node))
