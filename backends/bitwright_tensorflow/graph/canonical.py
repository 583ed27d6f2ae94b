"""A TensorFlow graph as the core's graph, and the way back from its names to nodes.

- Only what lies between the model's inputs and outputs is shown; training nodes, savers and the like are not.
- Identities aren't shown: their readers read what they read. One that is a model output gives its name to the tensor
  of the op before it, or is an op where others read that tensor too.
- What computes sizes alone isn't shown, and what is made of constants alone isn't either.
- A weight that the graph computes from variables is not a parameter; its op is OPAQUE, as is a strided convolution with
  SAME padding over free dimensions.
- A loop or condition of TF 1 (Enter … Exit, Switch … Merge) is one OPAQUE op of type "Loop" or "If".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bitwright.errors import ModelError
from bitwright.graph import Graph, Op, OpKind, Param, ParamRole, Tensor, TensorId, channel_axes
from bitwright_tensorflow.graph.calls import call_of
from bitwright_tensorflow.graph.elementwise import clip, prelu, spelled_activation
from bitwright_tensorflow.graph.linear_ops import linear_op
from bitwright_tensorflow.graph.masking import mask_names
from bitwright_tensorflow.graph.model import NodeDef, TfModel, node_of
from bitwright_tensorflow.graph.network import ALIAS, Edge, Network, Read
from bitwright_tensorflow.graph.norms import fused_batch_norm, spelled_norm
from bitwright_tensorflow.graph.optable import QUANTIZED_OPS
from bitwright_tensorflow.graph.recognized import Recognized
from bitwright_tensorflow.graph.single_ops import single_op

Recognizer = Callable[[Network, NodeDef], Recognized | None]
RECOGNIZERS: tuple[Recognizer, ...] = (linear_op, fused_batch_norm, spelled_norm, prelu, spelled_activation, clip)
"""Tried in this order on all nodes, last ones first (a hard swish holds a clip), before they are ops of their own."""


@dataclass(frozen=True, eq=False)
class Canonical:
    """The canonical graph and what its names stand for.

    Attributes:
        graph: the core's.
        network: the data flow that it was read from.
        ops: op → its nodes, parameters and geometry.
        params: parameter → the first op's way to read it: its form is the parameter's layout.
        operands: parameter → the operands (node, index) that carry its values in native layout, for every op that
            reads it. Fake quantization of a parameter goes onto these edges.
    """

    graph: Graph
    network: Network
    ops: Mapping[str, Recognized]
    params: Mapping[str, Read]
    operands: Mapping[str, tuple[Edge, ...]]


def recognize(model: TfModel, *, complete: bool = False) -> Canonical:
    """The canonical graph of a model; worked out once.

    Args:
        model: whose.
        complete: with what computes sizes, and with computed weights as parameters: the same ops and names, and those
            that only who writes the model down needs.

    Raises:
        ModelError: the model is quantized already.
    """
    key = "complete" if complete else "canonical"
    found = model.memo.get(key)
    if found is None:
        found = model.memo[key] = _recognize(model, complete)
    assert isinstance(found, Canonical)
    return found


def _recognize(model: TfModel, complete: bool) -> Canonical:
    net = Network(model, complete=complete)
    _refuse_quantized(net)
    claimed: dict[str, Recognized] = {}
    candidates = [n for n in reversed(net.inference.order) if n not in net.constant | net.sizes | net.collapsed]
    for recognizer in RECOGNIZERS:
        for name in candidates:
            found = recognizer(net, net.node(name)) if name not in claimed else None
            if found is not None and net.is_float(found.outputs[0]) and claimed.keys().isdisjoint(found.nodes):
                claimed.update(dict.fromkeys(found.nodes, found))
    groups = [_region(net, region) for region in net.inference.regions]
    shown: list[Recognized] = [g for g in groups if g is not None]
    hidden = (net.constant | net.sizes | net.collapsed) - net.open_sizes
    for name in net.inference.order:
        if name in hidden:
            continue
        if name in claimed:
            if claimed[name].end == name:
                shown.append(claimed[name])
        elif f"{name}:0" not in net.alias and f"{name}:0" not in model.inputs:
            shown.append(single_op(net, net.node(name), _outputs(net, name)))
    shown = [replace(found, call=call_of(net, found)) for found in _topological(net, shown)]
    return _assemble(model, net, _named_outputs(net, _without_unread_sizes(net, shown)))


def _without_unread_sizes(net: Network, shown: list[Recognized]) -> list[Recognized]:
    """Sizes that nothing reads (any more: the ops that read them are part of another one) are left out."""
    kept: list[Recognized] = []
    read = {net.resolve(t) for t in net.outputs}
    for found in reversed(shown):
        if found.id not in net.open_sizes or not read.isdisjoint(found.outputs):
            kept.append(found)
            read.update(found.inputs)
    return kept[::-1]


def _refuse_quantized(net: Network) -> None:
    for name in net.inference.order:
        if net.node(name).op in QUANTIZED_OPS:
            raise ModelError(
                f"the model is quantized already (node {name!r} is a {net.node(name).op}); start from the float model "
                "that it was made from"
            )


def _outputs(net: Network, name: str) -> tuple[TensorId, ...]:
    """All outputs that are tensors of data; of those that nothing reads, the first only."""
    count = len(net.inference.graph.get_operation_by_name(name).outputs)
    tensors = [f"{name}:{i}" for i in range(count)]
    read = [t for t in tensors if net.readers(t) or net.is_end(t)]
    if net.node(name).op in ("Split", "SplitV", "Unpack") or name in net.open_sizes:
        return tuple(tensors)
    return tuple(dict.fromkeys([*tensors[:1], *read]))


def _region(net: Network, region: tuple[str, ...]) -> Recognized | None:
    """A loop or condition as one op."""
    inside = set(region)
    reads = dict.fromkeys(
        t for n in region for t in net.data(net.node(n)) if node_of(t) not in inside or t in net.inputs
    )  # fmt: skip
    outputs = tuple(dict.fromkeys(
        t for n in region for t in (f"{n}:{i}" for i in range(2))
        if net.is_end(t) or any(reader not in inside for reader, _ in net.readers(t))
    ))  # fmt: skip
    if not outputs:
        return None
    loop = any(net.node(n).op in ("Enter", "RefEnter") for n in region)
    main = node_of(outputs[0])
    return Recognized(main, OpKind.OPAQUE, "Loop" if loop else "If", tuple(reads), outputs, nodes=region,
                 native="while loop" if loop else "condition")  # fmt: skip


def _topological(net: Network, shown: list[Recognized]) -> list[Recognized]:
    place = {name: i for i, name in enumerate(net.inference.order)}
    return sorted(shown, key=lambda found: max(place[n] for n in found.nodes))


def _named_outputs(net: Network, shown: list[Recognized]) -> list[Recognized]:
    """Let an Identity that is a model output give its name to the op before it, where nothing else reads that."""
    makers = {t: found for found in shown for t in found.outputs}
    gone: set[str] = set()
    renamed: dict[str, Recognized] = {}
    for found in shown:
        if found.kind is not OpKind.IDENTITY or not net.is_end(found.outputs[0]) or len(found.inputs) != 1:
            continue
        source = found.inputs[0]
        maker = makers.get(source)
        readers = {name for name, _ in net.readers(source)}
        if maker is None or net.is_end(source) or readers != {found.id} or maker.kind is OpKind.IDENTITY:
            continue
        maker = renamed.get(maker.id, maker)
        outputs = tuple(found.outputs[0] if t == source else t for t in maker.outputs)
        channels = {found.outputs[0] if t == source else t: a for t, a in maker.channels.items()}
        renamed[maker.id] = replace(maker, outputs=outputs, nodes=(*maker.nodes, *found.nodes), channels=channels)
        gone.add(found.id)
    return [renamed.get(f.id, f) for f in shown if f.id not in gone]


def _assemble(model: TfModel, net: Network, shown: list[Recognized]) -> Canonical:
    ops: list[Op] = []
    params: dict[str, Param] = {}
    reads: dict[str, Read] = {}
    operands: dict[str, list[Edge]] = {}
    for index, found in enumerate(shown):
        described = {role: _param(read) for role, read in found.reads.items()}
        if any(params.get(p.id, p) != p for p in described.values()):
            # One array can't be shown in two layouts (a tied matrix read once as W and once as its transpose).
            found = shown[index] = replace(found, kind=OpKind.OPAQUE, attrs=None, reads={}, call=None)
            described = {}
        for role, param in described.items():
            params[param.id] = param
            reads.setdefault(param.id, found.reads[role])
            operands.setdefault(param.id, []).append(found.reads[role].edge)
        roles: dict[ParamRole, str] = {role: p.id for role, p in described.items()}
        ops.append(
            Op(found.id, found.kind, found.type, found.inputs, found.outputs, roles, found.attrs, found.native,
               call=found.call)
        )  # fmt: skip
    seen = dict.fromkeys([*model.inputs, *(t for op in ops for t in (*op.data_inputs, *op.outputs)), *model.outputs])
    outputs = [t if any(t in op.outputs for op in ops) else net.resolve(t) for t in model.outputs]
    tensors = [t for t in seen if t in model.inputs or any(True for op in ops if t in op.outputs)]
    ranks = {t: net.rank(t) for t in tensors}
    told = {found.id: found.channels for found in shown if found.channels}
    axes = channel_axes(ops, ranks, told, {found.id: found.order for found in shown if found.order is not None})
    shapes = {t: net.shape(t) for t in tensors}
    masked = mask_names(net)
    described_tensors = {
        t: Tensor(t, shapes[t], net.inference.dtype(t), axes.get(t), net.resolve(t) in masked) for t in tensors
    }
    graph = Graph(ops, described_tensors, params, model.inputs, list(dict.fromkeys(outputs)))
    edges = {p: tuple(dict.fromkeys(found)) for p, found in operands.items()}
    return Canonical(graph, net, {f.id: f for f in shown}, reads, edges)


def _param(read: Read) -> Param:
    return Param(read.source, read.form.shape, read.dtype, read.form.layout)


__all__ = ["ALIAS", "Canonical", "recognize"]
