"""The core's graph edits, carried out on a GraphDef.

Names stay: what an edit puts in takes the name of the node whose tensor it now computes, and the node that it
replaces moves aside. Nodes that training still reads (gradients, optimizers, savers) are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Branch, Editor
from bitwright.errors import ModelError
from bitwright.graph import (
    ACTIVATION_TYPES,
    LEAK,
    BranchNames,
    Edit,
    Formula,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    TensorId,
)
from bitwright_tensorflow.graph import rewriter
from bitwright_tensorflow.graph.canonical import Canonical, recognize
from bitwright_tensorflow.graph.elementwise import SPELLED
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.layouts import Layout, Transposed
from bitwright_tensorflow.graph.linear_ops import ADDS
from bitwright_tensorflow.graph.model import Array, Kind, TfModel, array_of, node_of, operand_of, tensor_id
from bitwright_tensorflow.graph.network import ALIAS, OP_NAME, Read
from bitwright_tensorflow.graph.params import checked_native, numpy_dtype
from bitwright_tensorflow.graph.recognized import Recognized
from bitwright_tensorflow.graph.rewriter import Rewriter

_OPS = {"Add": "AddV2", "Div": "RealDiv"}
"""TensorFlow's names, where they differ."""


def edit_model(model: TfModel, edits: Sequence[Edit]) -> TfModel:
    """A new model with the edits applied in order; unchanged values are shared with `model`.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = TfEditor(model)
    editor.apply_all(edits)
    return editor.finish()


class TfEditor(Editor):
    """Edits a copy of a model's graph; keeps track of the nodes that each op has in the meantime."""

    activations = frozenset(ACTIVATION_TYPES) - {*SPELLED}

    def __init__(self, model: TfModel) -> None:
        self._model = model
        known: Canonical = recognize(model)
        super().__init__(known.graph)
        self._net = known.network
        self._found: dict[OpId, Recognized] = dict(known.ops)
        self._params: dict[ParamId, Read] = dict(known.params)
        self._values: dict[str, Array] = dict(model.values)
        self._lazy: Rewriter | None = None

    @property
    def _graph(self) -> Rewriter:
        """The copy; made when an edit first changes the structure or a constant."""
        if self._lazy is None:
            kept = {node_of(t) for t in (*self._model.inputs, *self._model.outputs)}
            if self._model.kind is Kind.SESSION:
                # Collections, savers and the user's own code name nodes that no node reads.
                kept |= {n.name for n in self._model.graph_def.node}
            self._lazy = Rewriter(self._model.copy_meta(), kept)
        return self._lazy

    def finish(self) -> TfModel:
        """The edited model."""
        if self._lazy is None:
            return self._model.with_values(self._values)
        nodes = self._lazy.nodes
        values = {name: value for name, value in self._values.items() if name in nodes}
        return self._model.with_meta(self._lazy.finish(), values)

    # -- values

    def set_values(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `Editor`."""
        new: dict[str, tuple[Array, str]] = {}
        for id, value in values.items():
            if id not in self._params:
                raise ModelError(f"the model has no parameter {id!r}")
            read = self._params[id]
            new[read.source] = checked_native(read, value, id), read.dtype
        for source, (array, dtype) in new.items():
            self._store(source, array, dtype)

    def _store(self, source: str, array: Array, dtype: str) -> None:
        if source in self._values:
            self._values[source] = array
        else:
            old = self._graph.nodes[source]
            fresh = rewriter.constant(source, array, dtype)
            old.attr["value"].CopyFrom(fresh.attr["value"])

    def _value(self, source: str) -> Array:
        if source in self._values:
            return self._values[source]
        nodes = self._lazy.nodes if self._lazy is not None else self._net.inference.wiring.nodes
        return array_of(nodes[source].attr["value"].tensor)

    def _new_param(self, wanted: str, like: str, native: Array, dtype: str) -> tuple[str, str]:
        """A parameter of the same sort as `like` (variable or constant): its node, and the tensor with its value."""
        name = self._graph.free(wanted)
        if like not in self._values:
            self._graph.add(rewriter.constant(name, native, dtype))
            return name, f"{name}:0"
        self._values[name] = native
        if self._model.kind is Kind.SESSION:
            nodes, definition, read = rewriter.declared_variable(name, native, dtype)
            for node in nodes:
                self._graph.add(node)
            for key in ("variables", "trainable_variables"):
                self._graph.meta.collection_def[key].bytes_list.value.append(definition)
            self._graph.protected.add(name)
            return name, read
        for node in rewriter.variable(name, native, dtype):
            self._graph.add(node)
        return name, f"{name}/Read/ReadVariableOp:0"

    # -- biases

    def add_bias(self, op: Op, value: NDArray[np.floating]) -> ParamId:
        """See `Editor`."""
        found = self._found[op.id]
        weight = found.reads[ParamRole.WEIGHT]
        native = value.astype(numpy_dtype(weight.dtype))
        source, tensor = self._new_param(_bias_name(weight.source, found.id), weight.source, native, weight.dtype)
        name = found.end
        end = self._graph.nodes[name]
        data_format = self._data_format(found)
        if ALIAS in end.attr:
            # An Identity that a fold has put there for the name's sake becomes the sum.
            self._graph.put(rewriter.bias_add(name, end.input[0], tensor, weight.dtype, data_format))
            inner = found.nodes
        else:
            moved = self._graph.move_aside(name, "product")
            if found.id == name:
                self._graph.nodes[moved].attr[OP_NAME].s = found.id.encode()
            self._graph.add(rewriter.bias_add(name, f"{moved}:0", tensor, weight.dtype, data_format))
            inner = (*found.nodes[:-1], moved, name)
        read = Read(source, (name, 1), tensor, Layout(native.shape), weight.dtype)
        self._params[source] = read
        self._found[found.id] = replace(found, nodes=inner, reads={**found.reads, ParamRole.BIAS: read})
        return source

    def own_obstacle(self, op: Op) -> str:
        """See `Editor`."""
        return "" if self._rank(self._found[op.id]) is not None else f"the rank of {op.output!r} isn't known"

    def add_branch(self, op: Op, names: BranchNames, down: NDArray[np.float32], up: NDArray[np.float32]) -> Branch:
        """See `Editor`; the sum gets the name of the node whose tensor it now computes."""
        found = self._found[op.id]
        weight, rank, end = found.reads[ParamRole.WEIGHT], self._rank(found), found.end
        (source,) = found.inputs
        assert rank is not None
        dtype, read = weight.dtype, source
        made: list[Recognized] = []
        for name, matrix in ((names.down, down), (names.up, up)):
            native = np.ascontiguousarray(matrix.T).astype(numpy_dtype(dtype))
            held, tensor = self._new_param(f"{name}/kernel", weight.source, native, dtype)
            node = self._graph.free(name)
            self._graph.add(rewriter.product(node, read, tensor, dtype, batched=rank > 2))
            self._keep_id(node, name)
            form = Read(held, (node, 1), tensor, Layout(native.shape).then(Transposed((1, 0))), dtype)
            self._params[held] = form
            channels = dict.fromkeys((read, f"{node}:0"), rank - 1)
            made.append(Recognized(
                name, OpKind.LINEAR, op.type, (read,), (f"{node}:0",), {ParamRole.WEIGHT: form}, None, (node,),
                self._graph.nodes[node].op, channels,
            ))  # fmt: skip
            read = f"{node}:0"
        nodes, product = self._sum_behind(found, read, dtype)
        self._keep_id(end, names.total)
        moved = {end: nodes[-1]} if nodes else {}
        reads = {
            role: replace(held, edge=(moved.get(held.edge[0], held.edge[0]), held.edge[1]))
            for role, held in found.reads.items()
        }
        self._params.update({held.source: held for held in reads.values()})
        channels = {product if t == found.outputs[0] else t: a for t, a in found.channels.items()}
        self._found[op.id] = replace(found, outputs=(product,), nodes=nodes, reads=reads, channels=channels)
        total = Recognized(names.total, OpKind.ADD, "Add", (product, read), found.outputs, nodes=(end,), native="AddV2")
        self._found.update({each.id: each for each in (*made, total)})
        inner, outer = made
        params = inner.reads[ParamRole.WEIGHT].source, outer.reads[ParamRole.WEIGHT].source
        return Branch(product, (inner.outputs[0], outer.outputs[0]), params)

    def _sum_behind(self, found: Recognized, addend: TensorId, dtype: str) -> tuple[tuple[str, ...], TensorId]:
        """Let a sum take over the name of an op's last node; the op's nodes then, and the tensor that it computes."""
        end = found.end
        if ALIAS in self._graph.nodes[end].attr:
            # An Identity that a fold has put there for the name's sake becomes the sum.
            product = tensor_id(self._graph.nodes[end].input[0])
            self._graph.put(rewriter.elementwise("AddV2", end, [product, addend], dtype))
            return found.nodes[:-1], product
        moved = self._graph.move_aside(end, "product")
        if found.id == end:
            self._keep_id(moved, found.id)
        self._graph.add(rewriter.elementwise("AddV2", end, [f"{moved}:0", addend], dtype))
        return (*found.nodes[:-1], moved), f"{moved}:0"

    def _keep_id(self, node: str, id: OpId) -> None:
        if node != id:
            self._graph.nodes[node].attr[OP_NAME].s = id.encode()

    def _data_format(self, found: Recognized) -> str:
        output = found.outputs[0]
        rank = self._rank(found)
        axis = found.channels.get(output, -1)
        return "NCHW" if axis == 1 and rank is not None and rank > 2 else "NHWC"

    def _rank(self, found: Recognized) -> int | None:
        for tensor in (found.outputs[0], *(f"{n}:0" for n in found.nodes)):
            if self._net.inference_has(tensor):
                return self._net.rank(tensor)
        return None

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`."""
        found = self._found[op.id]
        role, old = next((r, read) for r, read in found.reads.items() if read.source == param)
        wanted = f"{old.source}_{found.id.rpartition('/')[2]}"
        source, tensor = self._new_param(wanted, old.source, self._value(old.source), old.dtype)
        read = self._reading(found, old, source, tensor)
        self._params[source] = read
        self._found[found.id] = replace(found, reads={**found.reads, role: read})
        return source

    def _reading(self, found: Recognized, old: Read, source: str, tensor: str) -> Read:
        """Let one op read its parameter from another tensor, through copies of the views of the old one."""
        node, index = old.edge
        chain = []
        while node not in found.nodes:
            users = sorted(self._graph.readers_of(node))
            chain.append(node)
            inside = [u for u in users if u in found.nodes]
            following = inside or [u for u in users if u in self._net.constant]
            if not following:
                raise ModelError(f"{found.id!r} reads {old.source!r} in a way that can't be split")
            node = following[0]
        last = tensor
        edge = (node, 0)
        for view in chain:
            copied = type(self._graph.nodes[view])()
            copied.CopyFrom(self._graph.nodes[view])
            copied.name = self._graph.free(f"{view}/{found.id.rpartition('/')[2]}")
            place = index if view == chain[0] else 0
            copied.input[place] = operand_of(last)
            self._graph.add(copied)
            edge = (copied.name, place) if view == chain[0] else edge
            last = f"{copied.name}:0"
        if chain:
            end = self._graph.nodes[node]
            place = next(i for i, t in enumerate(data_operands(end)) if node_of(t) == chain[-1])
            self._graph.rewire(node, place, last)
        else:
            self._graph.rewire(node, index, last)
            edge = (node, index)
        return Read(source, edge, tensor, old.form, old.dtype)

    # -- structure

    def only_reader(self, tensor: TensorId, reader: Op) -> bool:
        """See `Editor`; the model's user may read what is not an output."""
        return not self._net.is_end(tensor) and super().only_reader(tensor, reader)

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        old, found = self._found.pop(norm.id), self._found[into.id]
        for name in found.nodes:
            for index, tensor in enumerate(data_operands(self._graph.nodes[name])):
                if self._net.resolve(tensor) == old.outputs[0]:
                    self._graph.rewire(name, index, old.inputs[0])
        self._found[into.id] = replace(found, inputs=old.inputs)
        self._graph.collect([old.end])

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._fold_backward(self._found.pop(norm.id), self._found[into.id])

    def _fold_backward(self, norm: Recognized, into: Recognized) -> None:
        name = norm.end
        last = self._graph.nodes[into.end]
        moved = self._graph.move_aside(name, "folded")
        if last.op in ADDS and ParamRole.BIAS in into.reads:
            # The sum that adds the bias moves to where the batch norm was.
            bias = into.reads[ParamRole.BIAS]
            copied = type(last)()
            copied.CopyFrom(last)
            copied.name = name
            self._graph.add(copied)
            inner = (*into.nodes[:-1], name)
            reads = dict(into.reads)
            if bias.edge[0] == last.name:
                reads[ParamRole.BIAS] = Read(bias.source, (name, bias.edge[1]), bias.tensor, bias.form, bias.dtype)
        else:
            alias = rewriter.unary("Identity", name, into.outputs[0], into.reads[ParamRole.WEIGHT].dtype)
            alias.attr[ALIAS].b = True
            self._graph.add(alias)
            inner, reads = (*into.nodes, name), dict(into.reads)
        channels = dict(into.channels)
        if into.outputs[0] in channels:
            channels[norm.outputs[0]] = channels[into.outputs[0]]
        self._found[into.id] = replace(into, outputs=norm.outputs, nodes=inner, reads=reads, channels=channels)
        if ParamRole.BIAS in reads:
            self._params[reads[ParamRole.BIAS].source] = reads[ParamRole.BIAS]
        self._graph.collect([moved])
        self._graph.collect([last.name])

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        self._supplant(self._found[op.id], formula)

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        found = self._found[op.id]
        if op.kind is not OpKind.IDENTITY:
            self._supplant(found, Formula("Identity", (None,)))
        for id, other in list(self._found.items()):
            if found.outputs[0] in other.inputs:
                inputs = tuple(found.inputs[0] if t == found.outputs[0] else t for t in other.inputs)
                self._found[id] = replace(other, inputs=inputs)
        del self._found[op.id]

    def _supplant(self, found: Recognized, formula: Formula) -> None:
        """Put nodes in the place of an op, the last one under the name of its last one."""
        source = found.inputs[0]
        # An Identity at the model's end that gives the op its tensor's name stays.
        end = node_of(found.outputs[0])
        if self._graph.nodes[end].op == "Identity" and len(found.nodes) > 1 and found.id != end:
            end = found.nodes[-2]
        dtype = self._net.inference.dtype(source) if self._net.inference_has(source) else "float32"
        moved = self._graph.move_aside(end, "replaced")
        nodes = self._computed(formula, end, source, dtype)
        self._graph.collect([moved])
        self._found[found.id] = replace(found, nodes=nodes)

    def _computed(self, what: Formula, name: str, source: TensorId, dtype: str) -> tuple[str, ...]:
        """Put in the nodes that compute a formula of a tensor; their names, the last of which is the given one."""
        made: list[str] = []
        operands = []
        for operand in what.operands:
            if isinstance(operand, Formula):
                made += self._computed(operand, self._graph.free(f"{name}/{operand.type}"), source, dtype)
                operands.append(f"{made[-1]}:0")
            elif operand is None:
                operands.append(source)
            else:
                constant = self._graph.free(f"{name}/constant")
                self._graph.add(rewriter.constant(constant, np.array(operand, numpy_dtype(dtype)), dtype))
                operands.append(f"{constant}:0")
        attributes = {"alpha": LEAK} if what.type == "LeakyRelu" else {}
        self._graph.add(rewriter.elementwise(_OPS.get(what.type, what.type), name, operands, dtype, **attributes))
        return (*made, name)


def _bias_name(weight: str, op: OpId) -> str:
    for ending, other in (("kernel", "bias"), ("weights", "biases"), ("weight", "bias"), ("/w", "/b"), ("/W", "/b")):
        if weight.endswith(ending):
            return weight.removesuffix(ending) + other
    return f"{op}/bias"
