"""A TensorFlow graph's nodes as `bitwright.placement._masks` reads them."""

from __future__ import annotations

from bitwright.graph import OpKind
from bitwright.placement import Extent, NodeView, masks
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.model import VARIABLES, NodeDef, node_of
from bitwright_tensorflow.graph.network import PASSING, Network
from bitwright_tensorflow.graph.optable import KINDS

_TYPES = {"IsNan": "IsNaN", "IsInf": "IsInf", "IsFinite": "IsFinite", "TopKV2": "TopK", "ArgMax": "ArgMax",
          "MatrixBandPart": "Trilu", "Fill": "ConstantOfShape", "TensorScatterUpdate": "ScatterND",
          "ClipByValue": "Clip"}  # fmt: skip
_LEAVES = frozenset({"Const", "ReadVariableOp", *VARIABLES})
_FORMS = PASSING | {"Reshape", "ExpandDims", "Squeeze", "Transpose"}
"""What hands on a constant or variable in another form (see `Network.read`)."""
_READ = frozenset({"Add", "Sub", "Sum", "Mul", "Div", "Where", "ConstantOfShape", "ScatterND", "Concat", "Pad"})
"""Types whose constant operands are looked at: those of others are weights, large and no masks."""

_PARTS = frozenset({"Gather", "Slice", "Split", "Cast", "Tile", "Expand", "Trilu", "Neg"})
"""Types that make their result of their first operand's values alone."""


def mask_names(net: Network) -> frozenset[str]:
    """Names of the tensors that are masks or masked (see `bitwright.placement._masks`)."""
    steps: list[NodeView] = []
    constants: dict[str, Extent] = {}
    known: set[str] = set()
    leaves: set[str] = set()
    for name in net.inference.order:
        node = net.node(name)
        if name in net.collapsed:
            continue
        if name in net.constant and (node.op in _LEAVES or (node.op in _FORMS and _source(node) in leaves)):
            leaves.add(name)
            continue
        kind, named = KINDS.get(node.op, (OpKind.OPAQUE, node.op))
        type = str(_TYPES.get(node.op, named))
        operands = net.operands(node)
        for place, tensor in enumerate(operands if type in _READ else operands[: type in _PARTS]):
            if tensor not in constants and tensor not in known and _float(net, tensor) and not net.is_data(tensor):
                value = net.held(node, place)
                if value is not None:
                    constants[tensor] = Extent.of(value) if type in _READ else Extent.of_table(value)
        if name in net.constant and net.value(f"{name}:0") is not None:
            continue  # its value says more than its form
        outputs = tuple(f"{name}:{i}" for i in range(len(net.inference.graph.get_operation_by_name(name).outputs)))
        known.update(outputs)
        steps.append(NodeView(kind, type, tuple(operands), outputs))
    known.update(net.inputs)
    found = masks(
        steps, net.inputs, [net.resolve(t) for t in net.outputs], constants,
        lambda t: t in known and _float(net, t),
    )  # fmt: skip
    return found


def _source(node: NodeDef) -> str:
    return node_of(data_operands(node)[0])


def _float(net: Network, tensor: str) -> bool:
    return net.inference_has(tensor) and net.is_float(tensor)
