"""Activations that TensorFlow spells out: clips, parametric ReLUs, GELU, SiLU, hard swish and their like.

The last kind is recognized by what it computes: a part that reads one tensor and nothing else but scalars is run on
a few points, and is the activation whose values it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ACTIVATION_TYPES, ActivationAttrs, Call, OpKind, ParamRole, TensorId, clipping, erf
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.model import NodeDef, node_of
from bitwright_tensorflow.graph.network import Network, Read
from bitwright_tensorflow.graph.recognized import Recognized

Values = NDArray[np.float64]
_PROBE: Values = np.concatenate([np.linspace(-9, 9, 61), [-0.1, 0.05, 30.0, -30.0]])
_TOLERANCE = 2e-5
_LARGEST = 12
"""Nodes that a spelled activation has at most."""

_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_UNARY: Mapping[str, Callable[[Values], Values]] = {
    "Neg": np.negative, "Erf": erf, "Erfc": _erfc, "Square": np.square, "Exp": np.exp,
    **{t: ACTIVATION_TYPES[t].compute for t in ("Identity", "Relu", "Relu6", "Sigmoid", "Softplus", "Tanh")},
}  # fmt: skip
_BINARY: Mapping[str, Callable[[Values, Values], Values]] = {
    "Add": np.add, "AddV2": np.add, "Sub": np.subtract, "Mul": np.multiply, "RealDiv": np.divide, "Pow": np.power,
    "Maximum": np.maximum, "Minimum": np.minimum,
}  # fmt: skip

SPELLED = ("Gelu", "Swish", "HardSwish", "HardSigmoid", "Mish")
"""Activations that TensorFlow has no op for."""
_C = math.sqrt(2 / math.pi)
KNOWN: Mapping[str, Callable[[Values], Values]] = {
    **{t: ACTIVATION_TYPES[t].compute for t in SPELLED},
    "Gelu (tanh)": lambda x: 0.5 * x * (1 + np.tanh(_C * (x + 0.044715 * x**3))),
}
"""ONNX type → function."""


def spelled_activation(net: Network, node: NodeDef) -> Recognized | None:
    """A known activation that ends at a node."""
    if node.op not in ("Mul", "RealDiv"):
        return None
    members = _one_sourced(net, node)
    if members is None:
        return None
    names, source = members
    values = _evaluated(net, names, source)
    if values is None:
        return None
    for type, function in KNOWN.items():
        expected = function(_PROBE)
        if np.allclose(values, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return Recognized(node.name, OpKind.ACTIVATION, type.partition(" ")[0], (source,), (f"{node.name}:0",),
                         nodes=names, native=type,
                         call=Call({"approximate": "tanh"}) if "tanh" in type else None)  # fmt: skip
    return None


def _one_sourced(net: Network, end: NodeDef) -> tuple[tuple[str, ...], TensorId] | None:
    """Elementwise nodes up to `end` that all come from one tensor, which others may read too."""
    best: tuple[tuple[str, ...], TensorId] | None = None
    members, frontier = {end.name}, set(net.data(end))
    while frontier and len(members) < _LARGEST:
        if len(frontier) == 1 and len(members) > 1:
            best = _in_order(net, members), next(iter(frontier))
            if _is_known(net, *best):
                return best
        # Only what is read by nothing but members may join them; sources read by others stay outside.
        ready = [t for t in frontier if _joins(net, t, members)]
        if not ready:
            break
        for tensor in ready:
            producer = net.producer(tensor)
            assert producer is not None
            members.add(producer.name)
        frontier = {t for m in members for t in net.data(net.node(m)) if node_of(t) not in members or t in net.inputs}
    return best


def _is_known(net: Network, names: tuple[str, ...], source: TensorId) -> bool:
    values = _evaluated(net, names, source)
    return values is not None and any(
        np.allclose(values, f(_PROBE), rtol=_TOLERANCE, atol=_TOLERANCE) for f in KNOWN.values()
    )


def _joins(net: Network, tensor: TensorId, members: set[str]) -> bool:
    producer = net.producer(tensor)
    if producer is None or producer.op not in _UNARY.keys() | _BINARY.keys() or producer.name in net.collapsed:
        return False
    return not net.is_end(tensor) and all(name in members for name, _ in net.readers(tensor))


def _in_order(net: Network, members: set[str]) -> tuple[str, ...]:
    return tuple(n for n in net.inference.order if n in members)


def _evaluated(net: Network, names: tuple[str, ...], source: TensorId) -> Values | None:
    known: dict[TensorId, Values] = {source: _PROBE}
    for name in names:
        node = net.node(name)
        values = []
        for tensor in (net.resolve(t) for t in data_operands(node)):
            if tensor not in known:
                constant = net.scalar(tensor)
                if constant is None:
                    return None
                known[tensor] = np.full_like(_PROBE, constant)
            values.append(known[tensor])
        with np.errstate(all="ignore"):
            if len(values) == 1 and node.op in _UNARY:
                known[f"{name}:0"] = _UNARY[node.op](values[0])
            elif len(values) == 2 and node.op in _BINARY:
                known[f"{name}:0"] = _BINARY[node.op](values[0], values[1])
            else:
                return None
    return known[f"{names[-1]}:0"]


def clip(net: Network, node: NodeDef) -> Recognized | None:
    """Relu6, ClipByValue, and Minimum and Maximum by scalars (`tf.clip_by_value`, in either order)."""
    x: TensorId
    nodes: tuple[str, ...]
    if node.op == "Relu6":
        x, nodes, bounds = net.operands(node)[0], (node.name,), (0.0, 6.0)
    elif node.op == "ClipByValue":
        x, low, high = net.operands(node)
        given = net.scalar(low), net.scalar(high)
        if given[0] is None or given[1] is None:
            return None
        nodes, bounds = (node.name,), (given[0], given[1])
    else:
        outer = _bound(net, node)
        inner = None if outer is None else net.producer(outer[1])
        if outer is None or inner is None:
            return None
        if inner.op == node.op or not net.only(outer[1], node):
            return None
        first = (0.0, net.operands(inner)[0]) if inner.op == "Relu" and node.op == "Minimum" else _bound(net, inner)
        if first is None:
            return None
        x, nodes = first[1], (inner.name, node.name)
        bounds = (first[0], outer[0]) if node.op == "Minimum" else (outer[0], first[0])
    if bounds[0] > bounds[1]:
        return None
    kind, type, attrs = clipping(*bounds)
    return Recognized(node.name, kind, type, (x,), (f"{node.name}:0",), attrs=attrs, nodes=nodes, native=node.op)


def _bound(net: Network, node: NodeDef) -> tuple[float, TensorId] | None:
    if node.op not in ("Minimum", "Maximum"):
        return None
    data, rest = net.data(node), [t for t in net.operands(node) if not net.is_data(t)]
    if len(data) != 1 or len(rest) != 1:
        return None
    bound = net.scalar(rest[0])
    return None if bound is None else (bound, data[0])


def prelu(net: Network, node: NodeDef) -> Recognized | None:
    """relu(x) − α·relu(−x) with a constant α, as Keras spells it."""
    if node.op not in ("Add", "AddV2"):
        return None
    operands = net.operands(node)
    for positive, product in (operands, operands[::-1]):
        relu, mul = net.producer(positive), net.producer(product)
        if relu is None or mul is None:
            continue
        if relu.op != "Relu" or mul.op != "Mul" or not net.only(product, node):
            continue
        x = net.operands(relu)[0]
        for index, other in enumerate(net.operands(mul)):
            below = net.producer(other) if net.is_data(other) else None
            slope = _slope(net, mul, 1 - index)
            if below is None or slope is None:
                continue
            if below.op != "Relu" or not net.only(positive, node):
                continue
            minus = net.producer(net.operands(below)[0])
            if minus is None or minus.op != "Neg" or net.operands(minus)[0] != x:
                continue
            inner = (f"{minus.name}:0", f"{below.name}:0")
            if [net.sole(t) for t in inner] != [below, mul]:
                continue
            names = {relu.name, minus.name, below.name, mul.name, node.name}
            return Recognized(node.name, OpKind.PRELU, "PRelu", (x,), (f"{node.name}:0",), {ParamRole.SLOPE: slope},
                         ActivationAttrs(), _in_order(net, names), "parametric ReLU",
                         call=Call({"channel_axis": -1}))  # fmt: skip
    return None


def _slope(net: Network, mul: NodeDef, index: int) -> Read | None:
    name = node_of(data_operands(mul)[index])
    if name not in net.constant or net.node(name).op != "Neg":
        return None
    return net.read(net.node(name), 0)
