"""Recurrent layers of a frozen graph as ONNX's LSTM, GRU and RNN.

TensorFlow has a loop in their place. Whoever froze the graph knows what the loop computes, and says so: its output's
node is replaced, and nothing of the loop is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright_onnx.graphdef.builder import Builder
from bitwright_onnx.graphdef.nodes import Node, tensor_name

OP = "bitwright.Recurrent"
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Recurrent:
    """What a loop computes, over (batch, steps, features).

    Attributes:
        kind: "LSTM", "GRU" or "RNN".
        source: the tensor that it reads.
        outputs: tensor → what it is: "sequence" (batch, steps, units), "last" (of the sequence; the two directions
            merged), "state", "cell" (of an LSTM), and "state_reverse", "cell_reverse" of a second direction.
        weights, recurrent, biases: of each direction, in ONNX's layouts: (gates · units, features), (gates · units,
            units), (2 · gates · units,).
        activations: of one direction, in ONNX's order, with their alphas and betas.
        backwards: one direction, from the last step to the first; the sequence is in the order of computation.
        merge: how two directions become one: "concat", "sum", "mul" or "ave".
        initial: tensors of the first states (hidden, and cell of an LSTM), of one direction.
        reset_after: of a GRU.
    """

    kind: str
    source: str
    outputs: Mapping[str, str]
    weights: Sequence[Floats]
    recurrent: Sequence[Floats]
    biases: Sequence[Floats]
    activations: Sequence[tuple[str, float | None, float | None]]
    backwards: bool = False
    merge: str = ""
    initial: Sequence[str] = ()
    reset_after: bool = False
    made: dict[str, ir.Value] = field(default_factory=dict)


class RecurrentNode(Node):
    """Stands for the node that ends a loop."""

    def __init__(self, node: Node, recurrent: Recurrent, role: str) -> None:
        super().__init__(node.proto)
        self.op = OP
        self.inputs = tuple(tensor_name(t) for t in (recurrent.source, *recurrent.initial))
        self.recurrent, self.role = recurrent, role


def stand_ins(nodes: Mapping[str, Node], found: Sequence[Recurrent]) -> dict[str, Node]:
    """The nodes with the ends of loops replaced."""
    changed = dict(nodes)
    for recurrent in found:
        for tensor, role in recurrent.outputs.items():
            name = tensor_name(tensor).rpartition(":")[0]
            changed[name] = RecurrentNode(nodes[name], recurrent, role)
    return changed


def recurrent(g: Builder, node: Node) -> None:
    """One result of a recurrent layer; the first of its results makes the op."""
    assert isinstance(node, RecurrentNode)
    if not node.recurrent.made:
        node.recurrent.made.update(_make(g, node))
    g.set(node.output(), node.recurrent.made[node.role])


def _make(g: Builder, node: RecurrentNode) -> dict[str, ir.Value]:
    layer, name = node.recurrent, node.name

    def op(type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return g.add(type, *inputs, hint=name, **attributes)

    def numbers(hint: str, array: object, dtype: type = np.int64) -> ir.Value:
        return g.numbers(f"{name}/{hint}", array, dtype)

    x = op("Transpose", g.value(node.inputs[0]), perm=[1, 0, 2])
    if layer.backwards:
        last = np.iinfo(np.int64).max
        x = op("Slice", x, numbers("starts", [-1]), numbers("ends", [-last]), numbers("axes", [0]),
               numbers("steps", [-1]))  # fmt: skip
    operands = [numbers(h, np.stack(a), np.float32) for h, a in
                (("weight", layer.weights), ("recurrent", layer.recurrent), ("bias", layer.biases))]  # fmt: skip
    first = [op("Unsqueeze", g.value(t), numbers("axes", [0])) for t in node.inputs[1:]]
    both = len(layer.weights) == 2
    several = list(layer.activations) * (2 if both else 1)
    attributes: dict[str, object] = {
        "hidden_size": int(layer.recurrent[0].shape[1]),
        "direction": "bidirectional" if both else "forward",
        "activations": [a for a, _, _ in several],
    }
    alphas = [v for _, v, _ in several if v is not None]
    betas = [v for _, _, v in several if v is not None]
    attributes |= {k: v for k, v in (("activation_alpha", alphas), ("activation_beta", betas)) if v}
    if layer.kind == "GRU":
        attributes["linear_before_reset"] = int(layer.reset_after)
    count = 3 if layer.kind == "LSTM" else 2
    y = g.add(layer.kind, x, *operands, *([None, *first] if first else []), hint=name, outputs=count, **attributes)
    producer = y.producer()
    assert producer is not None
    whole, *ends = producer.outputs
    results: dict[str, ir.Value] = {}

    def direction(value: ir.Value, index: int, axis: int) -> ir.Value:
        return op("Gather", value, numbers("direction", index), axis=axis)

    directions = 2 if both else 1
    wanted = set(layer.outputs.values())
    if "sequence" in wanted:
        parts = [op("Transpose", direction(whole, i, 1), perm=[1, 0, 2]) for i in range(directions)]
        results["sequence"] = _merged(g, name, layer.merge, parts)
    if "last" in wanted:
        results["last"] = _merged(g, name, layer.merge, [direction(ends[0], i, 0) for i in range(directions)])
    for role, value in zip(("state", "cell"), ends, strict=False):
        for index, part in enumerate((role, f"{role}_reverse")[:directions]):
            if part in wanted:
                results[part] = direction(value, index, 0)
    return results


def _merged(g: Builder, name: str, how: str, parts: list[ir.Value]) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    match how:
        case "concat":
            return g.add("Concat", *parts, hint=name, axis=-1)
        case "mul":
            return g.add("Mul", *parts, hint=name)
    total = g.add("Add", *parts, hint=name)
    return total if how == "sum" else g.add("Div", total, g.numbers(f"{name}/two", 2.0, np.float32), hint=name)
