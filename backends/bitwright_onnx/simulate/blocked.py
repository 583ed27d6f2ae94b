"""Simulated convolutions in ONNX Runtime's own layout, without a way out of it and back around every site.

ONNX Runtime convolves in a layout of blocks of channels (its domain com.microsoft.nchwc), and puts a ReorderOutput
before and a ReorderInput behind each op that it doesn't know in that layout, such as the chain of a site. A chain with
one scale works value by value, so it gives the same in any order. Here the graph that ONNX Runtime optimized is read
back, chains and sums of tensors that are blocked alike take the blocked tensors, and only what other ops or outputs
read is reordered. Taps too (`taps.TapOps`): extremes are the same in any order, and of a thinned tensor, or at places
of it, the values are picked where they lie in the blocks. Nothing is computed otherwise: results are equal bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bitwright.files import Scratch

DOMAIN = "com.microsoft.nchwc"
VALUE_BY_VALUE = frozenset({"QuantizeLinear", "DequantizeLinear", "Clip", "Identity", "Cast", "Div", "Mul", "Round",
                            "Min", "Max", "Add", "Sub", "If"})  # fmt: skip
"""Ops of chains whose other operands are scalars."""
SUMS = frozenset({"Add", "Sub", "Mul"})
LARGEST_BLOCK = 16
"""Channels of a block are 16 or fewer, a power of 2, as the processor's registers are: so many fill up whole blocks."""


def blocked_session(
    proto: bytes, options: ort.SessionOptions, again: ort.SessionOptions, left_out: Sequence[str]
) -> ort.InferenceSession:
    """A session that computes what `proto` says; sites and taps are blocked where ONNX Runtime blocks convolutions.

    Args:
        proto: a model.
        options: to optimize it by; the file of the optimized model is set in them.
        again: like `options`, for the graph that comes of it; its level is set to none.
        left_out: optimizations that aren't done.
    """
    with Scratch() as folder:
        file = folder / "optimized.onnx"
        options.optimized_model_filepath = str(file)
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out)
        model = onnx.load(file)
    if not keep_blocked(model):
        return session
    del session
    again.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    again.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order in which the nodes stand
    return ort.InferenceSession(model.SerializeToString(), again, providers=["CPUExecutionProvider"])


def keep_blocked(model: onnx.ModelProto) -> bool:
    """Let the sites and taps of an optimized model take blocked tensors; whether any does.

    Args:
        model: as ONNX Runtime wrote it; changed.
    """
    rewritten = _Rewritten(model.graph)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rewritten.nodes()]
    if not rewritten.kept:
        return False
    outputs = {v.name for v in model.graph.output}
    del model.graph.node[:]
    model.graph.node.extend(_early(rewritten.copied_once(_read_at_all(nodes, outputs), outputs)))
    model.graph.initializer.extend(rewritten.constants)
    # Shapes of blocked tensors have their channels rounded up, which what is noted doesn't say.
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.name in rewritten.in_blocks:
            value.type.tensor_type.ClearField("shape")
    return True


class _Rewritten:
    """The nodes of a graph anew, in their order.

    Attributes:
        kept: how many sites and taps take blocked tensors.
        in_blocks: outputs whose channels stay in blocks, see `unblocked`.
        constants: that nodes read which weren't there.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.kept = 0
        self.in_blocks: set[str] = set()
        self.constants: list[onnx.TensorProto] = []
        self._graph = graph
        self._whole = {i.name: i for i in graph.initializer if i.data_type == onnx.TensorProto.INT64}
        self._laid: dict[str, onnx.NodeProto] = {}
        """What only picking reads → the node that lays the positions of a blocked tensor in a row."""
        self._outputs = {v.name for v in graph.output}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._flattened: dict[str, onnx.NodeProto] = {}
        """What only thinning reads → the node that flattens a blocked tensor."""
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in _read(node):
                self._readers.setdefault(name, []).append(node)
        self._shapes = {v.name: _shape(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        self._numbers = {i.name: i for i in graph.initializer if not i.dims}
        self._scalars = {name for name, shape in self._shapes.items() if shape == ()} | self._numbers.keys()
        self._blocked: dict[str, tuple[str, onnx.NodeProto]] = {}
        """Tensor, or codes within a pair → its blocked form, and the node that brings such values back."""
        self._codes: set[str] = set()
        """What within pairs alone is read."""
        self._made: set[str] = set()

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Them; each is to be copied before the next is asked for."""
        alias: dict[str, str] = {}
        for node in self._graph.node:
            _rename(node, alias)
            if node.domain == DOMAIN and node.op_type == "ReorderOutput" and not _channels_last(node):
                self._blocked[node.output[0]] = node.input[0], node
                continue
            if node.domain == DOMAIN and node.op_type == "ReorderInput" and not _channels_last(node):
                if node.input[0] in self._blocked:
                    alias[node.output[0]] = self._blocked[node.input[0]][0]
                    continue
            elif back := self._back_of(node):
                read = {name: self._blocked[name][0] for name in _read(node) if name in self._blocked}
                plain, blocked = node.output[0], f"{node.output[0]}/blocked"
                _rename(node, read)
                node.output[0] = blocked
                self._blocked[plain] = blocked, back
                yield node
                continue
            elif (made := self._tap(node)) is not None:
                yield from made
                continue
            yield from self._plain(_read(node))
            yield node
        yield from self._plain(v.name for v in self._graph.output)

    def _plain(self, names: Iterator[str]) -> Iterator[onnx.NodeProto]:
        """What brings tensors back that are read as they are, once each."""
        for name in names:
            if name in self._blocked and name not in self._made:
                self._made.add(name)
                blocked, back = self._blocked[name]
                node = onnx.NodeProto.FromString(back.SerializeToString())
                node.name = f"{name}/plain"
                node.input[0], node.output[0] = blocked, name
                yield node

    def _back_of(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """For a node that may take blocked tensors: what brings its result back."""
        if node.domain not in ("", "ai.onnx"):
            return None
        read = list(_read(node))
        tensors = [name for name in read if name not in self._scalars]
        if any(name not in self._blocked for name in tensors):
            return None
        if node.op_type == "If" and len(set(tensors)) == 1 and _value_by_value(node, self._scalars):
            self.kept += 1
            return self._blocked[tensors[0]][1]
        if node.output[0] in self._codes or self._begins_pair(node):
            return self._blocked[node.input[0]][1]
        if node.op_type == "DequantizeLinear" and node.input[0] in self._codes:
            self.kept += 1
            return self._blocked[node.input[0]][1]
        if node.op_type in SUMS and len(read) == len(tensors) == 2:
            shapes = [self._shapes.get(name) for name in tensors]
            if shapes[0] is not None and None not in shapes[0] and shapes[0] == shapes[1]:
                return self._blocked[tensors[0]][1]
        return None

    def _begins_pair(self, node: onnx.NodeProto) -> bool:
        """Whether a node is the first of QuantizeLinear → Clip → DequantizeLinear or without Clip, by constants.

        Nothing else may read the codes: there is no ReorderOutput for them.
        """
        if node.op_type != "QuantizeLinear" or node.input[0] not in self._blocked:
            return False
        inner = [node]
        while inner[-1].op_type != "DequantizeLinear":
            readers = self._readers.get(inner[-1].output[0], ())
            if len(readers) != 1 or readers[0].op_type not in ("Clip", "DequantizeLinear"):
                return False
            inner.append(readers[0])
        if any(name not in self._numbers for n in inner for name in n.input[1:]):
            return False
        # What fills up a block stays a number.
        scales = (numpy_helper.to_array(self._numbers[n.input[1]]) for n in (inner[0], inner[-1]))
        codes = {n.output[0] for n in inner[:-1]}
        if not all(0 < scale < np.inf for scale in scales) or codes & {v.name for v in self._graph.output}:
            return False
        self._codes |= codes
        return True

    def _tap(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """For a node that a tap is made of: what is in its place; None where it isn't, or has to read what it does."""
        if node.domain not in ("", "ai.onnx") or not node.input:
            return None
        source = node.input[0]
        if node.op_type in ("ReduceMin", "ReduceMax") and len(node.input) == 1 and source in self._blocked:
            blocked, back = self._blocked[source]
            # Channels that don't fill a block are filled up, with zeros or what an activation makes of them.
            numbers = _numbers(node)
            whole = not numbers.get("keepdims", 1) and "axes" not in numbers
            if not whole or _numbers(back).get("channels", 1) % LARGEST_BLOCK:
                return None
            node.input[0] = blocked
            self.kept += 1
            return [node]
        if node.op_type == "Reshape" and source in self._blocked and self._constant(node.input[1]) == [0, -1]:
            if not all(self._step(reader) for reader in self._readers.get(node.output[0], ())):
                return None
            shape = self._shapes.get(source)
            if shape is None or len(shape) != 4 or not all(isinstance(d, int) for d in shape[1:]):
                return None
            self._flattened[node.output[0]] = node
            return []
        if node.op_type == "Slice" and source in self._flattened:
            return self._thinned(self._flattened[source], node)
        if node.op_type == "Reshape" and source in self._blocked and self._lays(node):
            self._laid[node.output[0]] = node
            return []
        if node.op_type == "Shape" and source in self._laid:  # of which the number of samples is read
            node.input[0] = self._blocked[self._laid[source].input[0]][0]
            return [node]
        if node.op_type == "GatherElements" and source in self._laid:
            return self._picked(self._laid[source], node)
        return None

    def _lays(self, node: onnx.NodeProto) -> bool:
        """Whether a Reshape to (samples, channels, positions) is read by picking alone (`TapOps.picked`)."""
        shape = self._shapes.get(node.input[0])
        if shape is None or len(shape) != 4:
            return False
        sizes = [d for d in shape[1:] if isinstance(d, int)]
        if len(sizes) != 3 or self._constant(node.input[1]) != [0, sizes[0], sizes[1] * sizes[2]]:
            return False
        return all(
            reader.op_type == "Shape" or (reader.op_type == "GatherElements" and self._spread(reader) is not None)
            for reader in self._readers.get(node.output[0], ())
        )

    def _spread(self, node: onnx.NodeProto) -> str | None:
        """Of a node that picks along axis 2 the same places in every channel: their name, (samples, 1, places).

        What it picks is handed out, and nothing else reads it: it may stay in its blocks.
        """
        if node.output[0] not in self._outputs or node.output[0] in self._readers:
            return None
        index = self._makers.get(node.input[1])
        if _numbers(node).get("axis") != 2 or index is None or index.op_type != "Expand":
            return None
        lengths = self._constant(index.input[1])
        return index.input[0] if lengths is not None and lengths[::2] == [1, 1] and len(lengths) == 3 else None

    def _picked(self, laid: onnx.NodeProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Whole blocks of channels, at each place; `unblocked` brings them together where they are handed out."""
        source, name, places = laid.input[0], node.output[0], self._spread(node)
        shape = self._shapes[source]
        assert shape is not None
        assert places is not None
        channels, height, width = (int(d) for d in shape[1:] if d is not None)
        block = block_size()
        blocks = -(-channels // block)
        for suffix, array in (
            ("zero", np.array(0)), ("one", np.array(1)), ("blocks", np.array(blocks)),
            ("area", np.array(height * width)), ("rows", np.array([-1, block])), ("column", np.array([-1, blocks, 1])),
        ):  # fmt: skip
            self.constants.append(numpy_helper.from_array(array.astype(np.int64), f"{name}/{suffix}"))
        self.kept += 1
        self.in_blocks.add(name)
        blocked = self._blocked[source][0]
        ops: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...] = (
            ("Reshape", (blocked, f"{name}/rows"), f"{name}/flat", {}),
            ("Shape", (blocked,), f"{name}/shape", {}),
            ("Gather", (f"{name}/shape", f"{name}/zero"), f"{name}/samples", {}),
            ("Mul", (f"{name}/samples", f"{name}/blocks"), f"{name}/all", {}),
            ("Range", (f"{name}/zero", f"{name}/all", f"{name}/one"), f"{name}/each", {}),
            ("Mul", (f"{name}/each", f"{name}/area"), f"{name}/begin", {}),
            ("Reshape", (f"{name}/begin", f"{name}/column"), f"{name}/begins", {}),
            ("Add", (f"{name}/begins", places), f"{name}/places", {}),
            ("Gather", (f"{name}/flat", f"{name}/places"), f"{name}/blocked", {}),
            ("Transpose", (f"{name}/blocked",), name, {"perm": [0, 1, 3, 2]}),
        )
        return [helper.make_node(op, inputs, [output], output, **given) for op, inputs, output, given in ops]

    def _step(self, node: onnx.NodeProto) -> int:
        """Of a node that takes every so-manieth value along axis 1; 0 for any other."""
        if node.op_type != "Slice" or node.domain not in ("", "ai.onnx") or len(node.input) != 5:
            return 0
        start, end, axis, step = (self._constant(name) for name in node.input[1:])
        whole = start == [0] and end == [np.iinfo(np.int64).max] and axis == [1]
        return step[0] if whole and step else 0

    def _thinned(self, flat: onnx.NodeProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Their places in the blocks, picked of each sample; GatherElements does so in a third of Gather's time."""
        source, step, name = flat.input[0], self._step(node), node.output[0]
        shape = self._shapes[source]
        assert shape is not None
        channels, height, width = (int(d) for d in shape[1:] if d is not None)
        places = blocked_places(channels, height, width, step)
        for suffix, array in (("places", places), ("first", np.zeros(1, np.int64)), ("one", np.ones(1, np.int64))):
            self.constants.append(numpy_helper.from_array(array, f"{name}/{suffix}"))
        self.kept += 1
        ops: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...] = (
            ("Reshape", (self._blocked[source][0], flat.input[1]), f"{name}/flat", {}),
            ("Shape", (f"{name}/flat",), f"{name}/shape", {}),
            ("Gather", (f"{name}/shape", f"{name}/first"), f"{name}/samples", {}),
            ("Concat", (f"{name}/samples", f"{name}/one"), f"{name}/rows", {"axis": 0}),
            ("Expand", (f"{name}/places", f"{name}/rows"), f"{name}/all", {}),
            ("GatherElements", (f"{name}/flat", f"{name}/all"), name, {"axis": 1}),
        )
        return [helper.make_node(op, inputs, [output], output, **given) for op, inputs, output, given in ops]

    def copied_once(self, nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
        """The nodes without those that copy what comes out of the blocks for the caller alone (`TapOps`, of whole
        tensors): what brings it out of the blocks has copied it already."""
        readers = Counter(name for node in nodes for name in _read(node))
        makers = {node.output[0]: node for node in nodes if node.domain == DOMAIN and node.op_type == "ReorderOutput"}
        kept = []
        for node in nodes:
            copies = node.op_type == "Reshape" and self._constant(node.input[1]) == [0] * 4
            source = makers.get(node.input[0]) if copies and node.output[0] in outputs else None
            if source is None or readers[node.input[0]] > 1 or node.input[0] in outputs:
                kept.append(node)
            else:
                source.output[0] = node.output[0]
        return kept

    def _constant(self, name: str) -> list[int] | None:
        held = self._whole.get(name)
        return None if held is None else [int(n) for n in numpy_helper.to_array(held).ravel()]


def _read_at_all(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes whose results are outputs, or are read on the way to one."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(_read(node))
    return kept[::-1]


def _early(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes with those that no convolution waits for right behind what they read, while that is in the cache."""
    leading: set[str] = set()
    for node in reversed(nodes):
        if node.op_type == "Conv" or not leading.isdisjoint(node.output):
            leading.update(_read(node))
    places: dict[str, tuple[int, int]] = {}
    keys = []
    for index, node in enumerate(nodes):
        key = (index, 0)
        if node.op_type != "Conv" and leading.isdisjoint(node.output):
            latest, depth = max((places[name] for name in _read(node) if name in places), default=(index, -1))
            key = (latest, depth + 1)
        places.update((name, key) for name in node.output)
        keys.append(key)
    return [nodes[i] for i in sorted(range(len(nodes)), key=keys.__getitem__)]


def blocked_places(channels: int, height: int, width: int, step: int) -> NDArray[np.int32 | np.int64]:
    """Where every `step`-th value of a sample, counted channel by channel, lies in its blocked form."""
    channel, position = np.divmod(np.arange(0, channels * height * width, step), height * width)
    block = block_size()
    places = (channel // block * height * width + position) * block + channel % block
    found: NDArray[np.int32 | np.int64] = places.astype(np.int32 if places.max() < 2**31 else np.int64)
    return found


def unblocked(values: NDArray[Any], channels: int) -> NDArray[Any]:
    """What a session hands out of picked values: (samples, channels, places), also of (samples, blocks, channels of a
    block, places)."""
    if values.ndim == 3:
        return values
    samples, blocks, block, places = values.shape
    return values.reshape(samples, blocks * block, places)[:, :channels]


@cache
def block_size() -> int:
    """How many channels lie together, on this processor."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, LARGEST_BLOCK, 1, 2]) for name in "xy")
    node = helper.make_node("ReorderOutput", ["x"], ["y"], domain=DOMAIN, channels=LARGEST_BLOCK)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "probe", [x], [y]), opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ordered = session.run(None, {"x": np.arange(2 * LARGEST_BLOCK, dtype=np.float32).reshape(1, LARGEST_BLOCK, 1, 2)})
    return int(ordered[0][0, 0, 0, 1])  # the second place of the first channel follows the first places of its block


def _value_by_value(node: onnx.NodeProto, scalars: set[str]) -> bool:
    """Whether a chain's branches treat each value for itself."""
    for attribute in node.attribute:
        if attribute.type != onnx.AttributeProto.GRAPH:
            continue
        branch = attribute.g
        if any(i.dims for i in branch.initializer):
            return False
        for inner in branch.node:
            if inner.domain not in ("", "ai.onnx") or inner.op_type not in VALUE_BY_VALUE:
                return False
            if inner.op_type == "If" and not _value_by_value(inner, scalars):
                return False
    return True


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors of the outer graph that a node reads, its branches included, once each."""
    seen: set[str] = set()
    stack, own = [node], set[str]()
    while stack:
        inner = stack.pop()
        seen.update(name for name in inner.input if name)
        for attribute in inner.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                stack += attribute.g.node
                own.update(i.name for i in attribute.g.initializer)
                own.update(name for made in attribute.g.node for name in made.output)
                seen.update(v.name for v in attribute.g.output)
    return iter(sorted(seen - own))


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Read other tensors, in branches too, whose noted shapes go."""
    if not names:
        return
    for place, name in enumerate(node.input):
        if name in names:
            node.input[place] = names[name]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            del attribute.g.value_info[:]
            for value in attribute.g.output:
                value.type.tensor_type.ClearField("shape")
            for inner in attribute.g.node:
                _rename(inner, names)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim)


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def _channels_last(node: onnx.NodeProto) -> bool:
    return bool(_numbers(node).get("channels_last"))
