"""Simulated convolutions in ONNX Runtime's own layout, without a way out of it and back around every site.

ONNX Runtime convolves in a layout of blocks of channels (its domain com.microsoft.nchwc), and puts a ReorderOutput
before and a ReorderInput behind each op that it doesn't know in that layout, such as the chain of a site. A chain with
one scale works value by value, so it gives the same in any order. Here the graph that ONNX Runtime optimized is read
back, chains and sums of tensors that are blocked alike take the blocked tensors, and only what other ops or outputs
read is reordered. Nothing is computed otherwise: results are equal bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime as ort

DOMAIN = "com.microsoft.nchwc"
VALUE_BY_VALUE = frozenset({"QuantizeLinear", "DequantizeLinear", "Clip", "Identity", "Cast", "Div", "Mul", "Round",
                            "Min", "Max", "Add", "Sub", "If"})  # fmt: skip
"""Ops of chains whose other operands are scalars."""
SUMS = frozenset({"Add", "Sub", "Mul"})


def blocked_session(proto: bytes, options: ort.SessionOptions, again: ort.SessionOptions) -> ort.InferenceSession:
    """A session that computes what `proto` says; where ONNX Runtime blocks its convolutions, with blocked sites.

    Args:
        proto: a model.
        options: to optimize it by; the file of the optimized model is set in them.
        again: like `options`, for the graph that comes of it; its level is set to none.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        file = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(file)
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        model = onnx.load(file)
    if not keep_blocked(model):
        return session
    del session
    again.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), again, providers=["CPUExecutionProvider"])


def keep_blocked(model: onnx.ModelProto) -> bool:
    """Let the sites of an optimized model take blocked tensors; whether any does.

    Args:
        model: as ONNX Runtime wrote it; changed.
    """
    rewritten = _Rewritten(model.graph)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rewritten.nodes()]
    if not rewritten.chains:
        return False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    # Shapes of blocked tensors have their channels rounded up, which what is noted doesn't say.
    del model.graph.value_info[:]
    return True


class _Rewritten:
    """The nodes of a graph anew, in their order.

    Attributes:
        chains: how many sites take blocked tensors.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.chains = 0
        self._graph = graph
        self._shapes = {v.name: _shape(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        self._scalars = {name for name, shape in self._shapes.items() if shape == ()}
        self._scalars |= {i.name for i in graph.initializer if not i.dims}
        self._blocked: dict[str, tuple[str, onnx.NodeProto]] = {}
        """Tensor → its blocked form, and the node that brings it back."""
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
            self.chains += 1
            return self._blocked[tensors[0]][1]
        if node.op_type in SUMS and len(read) == len(tensors) == 2:
            shapes = [self._shapes.get(name) for name in tensors]
            if shapes[0] is not None and None not in shapes[0] and shapes[0] == shapes[1]:
                return self._blocked[tensors[0]][1]
        return None


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


def _channels_last(node: onnx.NodeProto) -> bool:
    return any(a.name == "channels_last" and a.i for a in node.attribute)
