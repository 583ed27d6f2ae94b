"""A captured model as the core's graph, and the way back from its names to nodes.

- Fused attention is shown spelled out (see `attention`).
- Sizes, and what is made of sizes and fixed buffers alone (positions, causal masks), isn't shown: it carries no data.
- A linear op on a matrix is "Gemm" and on more dimensions "MatMul", the ONNX types that it becomes.
- What is computed from parameters and constants alone (weight normalization, gates, fusion weights, position biases)
  is one parameter, not ops (see `operands`). A weight that is computed of data makes the op a product of two
  activations.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bitwright.graph import (
    CONSTANT_KINDS,
    FLOAT_DTYPES,
    LINEAR_KINDS,
    ActivationAttrs,
    Attrs,
    Call,
    Graph,
    Op,
    OpId,
    OpKind,
    Param,
    ParamRole,
    RecurrentAttrs,
    Tensor,
    TensorId,
    around,
    channel_axes,
)
from bitwright_torch.graph import attributes, modes
from bitwright_torch.graph.attention import lower_attention
from bitwright_torch.graph.constants import constant_nodes
from bitwright_torch.graph.masks import mask_nodes
from bitwright_torch.graph.model import CapturedModel, Program, info, program_of
from bitwright_torch.graph.naming import call_name
from bitwright_torch.graph.operands import Operand, operands
from bitwright_torch.graph.optable import CLIPS, kind_of
from bitwright_torch.graph.visibility import data_nodes, value_operands

R = ParamRole
_SECOND = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.BATCH_NORM, OpKind.RESIZE})
_SECOND_TYPES = frozenset({"InstanceNormalization", "GroupNormalization", "MaxPool", "AveragePool",
                           "GlobalAveragePool", "PRelu", "DepthToSpace", "SpaceToDepth"})  # fmt: skip
"""Ops that have channels on axis 1."""


@dataclass(frozen=True, eq=False)
class Canonical:
    """The canonical graph and what its names stand for.

    Attributes:
        graph: the core's.
        lowered: the fx graph that it shows: the model's own, with fused attention spelled out.
        tensors: activation → the node of `lowered` that computes it.
        ops: op → its node of `lowered`.
        params: parameter → where it is in the model, and how it is shown.
        operands: parameter → the nodes of `lowered` that read it (fake quantization of a weight goes behind these).
    """

    graph: Graph
    lowered: fx.Graph
    tensors: Mapping[str, fx.Node]
    ops: Mapping[str, fx.Node]
    params: Mapping[str, tuple[Operand, Param]]
    operands: Mapping[str, tuple[fx.Node, ...]]


def canonical(model: CapturedModel) -> Canonical:
    """The canonical graph of a captured model; kept with its program."""
    program: Program = program_of(model)
    found = program.memo.get("canonical")
    if found is None:
        found = _Builder(lower_attention(program.graph), model, program).build()
        program.memo["canonical"] = found
    assert isinstance(found, Canonical)
    return found


class _Builder:
    def __init__(self, graph: fx.Graph, model: nn.Module, program: Program) -> None:
        self._graph = graph
        self._program = program
        self._visible = data_nodes(graph, model)
        self._operands = operands(graph, model)
        self._dynamic = _fed(graph)
        self._constant_nodes = constant_nodes(graph)
        self._masks = mask_nodes(graph, self._operands, model)
        self._params: dict[str, Param] = {}
        self._where: dict[str, tuple[Operand, Param]] = {}
        self._readers: dict[str, list[fx.Node]] = {}
        self._orders: dict[str, tuple[int, ...]] = {}

    def build(self) -> Canonical:
        ops: list[Op] = []
        nodes: dict[str, fx.Node] = {}
        inputs = [n for n in self._graph.nodes if n.op == "placeholder" and info(n).shape is not None]
        tensors: dict[str, fx.Node] = {info(n).tensor: n for n in inputs}
        for node in self._graph.nodes:
            if not self._is_op(node):
                continue
            outputs = self._outputs(node)
            if not outputs:
                continue
            op = self._op(node, outputs)
            ops.append(op)
            nodes[op.id] = node
            tensors.update({info(n).tensor: n for n in outputs})
        results: list[fx.Node] = []
        fx.node.map_arg(self._graph.output_node().args, results.append)
        ends = dict.fromkeys(info(n).tensor for n in results if info(n).tensor in tensors)
        ranks = {t: None if (s := info(n).shape) is None else len(s) for t, n in tensors.items()}
        axes = channel_axes(ops, ranks, _told_axes(ops, ranks), self._orders)
        shown = {
            t: Tensor(t, info(n).shape, info(n).dtype or "float32", axes.get(t), n in self._masks)
            for t, n in tensors.items()
        }
        graph = Graph(ops, shown, self._params, [info(n).tensor for n in inputs], list(ends))
        readers = {p: tuple(dict.fromkeys(found)) for p, found in self._readers.items()}
        return Canonical(graph, self._graph, tensors, nodes, self._where, readers)

    def _is_op(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is operator.getitem:
            return False
        if node in self._operands or node in self._constant_nodes:
            return False
        return node in self._visible and node.target is not torch.ops.aten.copy_.default

    def _outputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that hold what an op computes: itself, or the picks from its tuple."""
        if info(node).shape is not None:
            return [node]
        picks = [
            u for u in node.users
            if u.target is operator.getitem and info(u).shape is not None and u not in self._operands
        ]  # fmt: skip
        return sorted(picks, key=lambda u: int(u.args[1]))  # type: ignore[arg-type]

    # -- one op

    def _op(self, node: fx.Node, outputs: list[fx.Node]) -> Op:
        name = call_name(node)
        kind, type = kind_of(node)
        attrs: Attrs | None = None
        roles: dict[ParamRole, fx.Node] = {}
        about = info(node)
        if kind is not OpKind.OPAQUE and all(info(o).dtype in FLOAT_DTYPES for o in outputs[:1]):
            kind, type, attrs, roles = self._classify(node, name, kind, type)
        else:
            kind = OpKind.OPAQUE
        params = self._register(kind, name, roles)
        if params is None or (kind in LINEAR_KINDS and not self._activations(node)):  # a result of parameters alone
            kind, attrs, params = OpKind.OPAQUE, None, {}
        if kind is OpKind.IDENTITY and not any(n in self._visible for n in value_operands(node)):
            kind = OpKind.OPAQUE  # a result that has an input's dtype alone
        call = None
        if kind is OpKind.TRANSPOSE and (order := attributes.permutation(node, name)) is not None:
            self._orders[about.op], call = order, Call({"perm": order})
        if kind is OpKind.PRELU and R.SLOPE in params:
            call = Call({"channel_axis": 1})  # wherever the ops around it have their channels
        native = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
        inputs = tuple(info(n).tensor for n in self._activations(node))
        return Op(
            about.op, kind, type, inputs, tuple(info(o).tensor for o in outputs), params, attrs, native, about.source,
            call,
        )  # fmt: skip

    def _activations(self, node: fx.Node) -> list[fx.Node]:
        """Data operands in order, repeated ones repeated."""
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        read = [n for n in value_operands(node) if n in self._visible]
        return [
            n for n in found
            if n not in self._operands and n not in self._constant_nodes and (n in read or not read)
            and n in self._visible and info(n).shape is not None
        ]  # fmt: skip

    def _classify(
        self, node: fx.Node, name: str, kind: OpKind, type: str
    ) -> tuple[OpKind, str, Attrs | None, dict[ParamRole, fx.Node]]:
        opaque: tuple[OpKind, str, Attrs | None, dict[ParamRole, fx.Node]] = (OpKind.OPAQUE, type, None, {})
        given = attributes.arguments(node)
        if attributes.changes_nothing(node, name):
            return OpKind.IDENTITY, "Identity", None, {}
        match kind:
            case OpKind.CONV | OpKind.CONV_TRANSPOSE:
                roles = self._roles({R.WEIGHT: given["weight"], R.BIAS: given["bias"]})
                if roles is None and given["weight"] in self._dynamic:
                    return OpKind.MATMUL, type, None, {}
                if roles is None or R.WEIGHT not in roles or given.get("transposed"):
                    return opaque
                geometry = attributes.convolution(node, self._operands[roles[R.WEIGHT]].shape[2:])
                return opaque if geometry is None else (kind, type, geometry, roles)
            case OpKind.LINEAR | OpKind.MATMUL:
                return self._matrix_product(node, name, type, given)
            case OpKind.BATCH_NORM if node.target is modes.batch_norm:
                slots = dict(zip((R.GAMMA, R.BETA, R.MEAN, R.VAR), node.args[1:5], strict=True))
                roles = self._roles(slots)
                return opaque if roles is None else (kind, type, attributes.batch_norm(node), roles)
            case OpKind.BATCH_NORM:
                return opaque
            case OpKind.LAYER_NORM | OpKind.NORM:
                roles = self._roles({R.GAMMA: given.get("weight"), R.BETA: given.get("bias")})
                axis = attributes.axis(node, kind, name) if kind is OpKind.LAYER_NORM else None
                return opaque if roles is None else (kind, type, axis, roles)
            case OpKind.EMBEDDING:
                roles = self._roles({R.WEIGHT: given["weight"]})
                return (OpKind.SLICE, type, None, {}) if not roles else (kind, type, None, roles)
            case OpKind.SLICE if name in ("index", "index_select") and given.get("self") in self._operands:
                table = given["self"]
                whole = len(self._operands[table].shape) == 2
                return OpKind.EMBEDDING if whole else kind, type, None, {R.WEIGHT: table} if whole else {}
            case OpKind.PRELU:
                roles = self._roles({R.SLOPE: given.get("weight")})
                alpha = given.get("negative_slope")
                leaky = ActivationAttrs(alpha=float(alpha)) if isinstance(alpha, int | float) else ActivationAttrs()
                return opaque if roles is None else (kind, type, leaky, roles)
            case OpKind.RECURRENT:
                return self._recurrent(node, kind, type, given)
            case OpKind.SOFTMAX | OpKind.CONCAT | OpKind.SPLIT:
                return kind, type, attributes.axis(node, kind, name), self._constant(node, kind, type)
            case OpKind.AVERAGE_POOL:
                type, averaged = attributes.pool(node, name)
                return kind, type, averaged, {}
            case OpKind.PAD if given.get("value"):
                return OpKind.ELEMENTWISE, type, None, {}
            case OpKind.IDENTITY if type == "Cast":
                same = info(node).dtype == info(node.args[0]).dtype if isinstance(node.args[0], fx.Node) else False
                return (kind, "Identity", None, {}) if same else (OpKind.ELEMENTWISE, type, None, {})
            case OpKind.ADD if given.get("alpha", 1) != 1:
                return OpKind.ELEMENTWISE, type, None, self._constant(node, OpKind.ELEMENTWISE, type)
        if name in CLIPS:
            return *attributes.clip(node, name), {}
        return kind, type, None, self._constant(node, kind, type)

    def _matrix_product(
        self, node: fx.Node, name: str, type: str, given: Mapping[str, Any]
    ) -> tuple[OpKind, str, Attrs | None, dict[ParamRole, fx.Node]]:
        if name == "addmm":
            slots = {R.WEIGHT: given["mat2"], R.BIAS: given["self"]}
            plain = given.get("alpha", 1) == 1 and given.get("beta", 1) == 1 and given["mat1"] not in self._operands
        elif name == "linear":
            slots, plain = {R.WEIGHT: given["weight"], R.BIAS: given["bias"]}, given["input"] not in self._operands
            type = "Gemm" if attributes.rank(node.args[0]) == 2 else "MatMul"
        elif name in ("matmul", "mm") and len(node.args) == 2:
            slots, plain = {R.WEIGHT: node.args[1]}, node.args[0] not in self._operands
            if not plain or node.args[1] not in self._operands or len(self._operands[node.args[1]].shape) != 2:  # type: ignore[index]
                return OpKind.MATMUL, type, None, self._constant(node, OpKind.MATMUL, type)
        else:
            return OpKind.MATMUL, type, None, self._constant(node, OpKind.MATMUL, type)
        roles = self._roles(slots)
        if roles is None or R.WEIGHT not in roles or not plain or len(self._operands[roles[R.WEIGHT]].shape) != 2:
            computed = name == "linear" and given["bias"] is None
            computed |= slots[R.WEIGHT] in self._dynamic
            return (OpKind.MATMUL if computed else OpKind.OPAQUE), type, None, {}
        bias = roles.get(R.BIAS)
        if bias is not None and len(self._operands[bias].shape) != 1:
            return OpKind.OPAQUE, type, None, {}
        return OpKind.LINEAR, type, None, roles

    def _recurrent(
        self, node: fx.Node, kind: OpKind, type: str, given: Mapping[str, Any]
    ) -> tuple[OpKind, str, Attrs | None, dict[ParamRole, fx.Node]]:
        """One layer in one direction has its two matrices as parameters; deeper ones run in float."""
        params = given.get("params") or []
        if given.get("num_layers") != 1 or given.get("bidirectional") or len(params) not in (2, 4):
            return OpKind.OPAQUE, type, None, {}
        roles = self._roles({R.WEIGHT: params[0], R.RECURRENT: params[1]})
        outputs = RecurrentAttrs(tuple(int(u.args[1]) for u in self._outputs(node)))  # type: ignore[arg-type]
        return (OpKind.OPAQUE, type, None, {}) if roles is None else (kind, type, outputs, roles)

    def _roles(self, slots: Mapping[ParamRole, Any]) -> dict[ParamRole, fx.Node] | None:
        """Operands by role, absent ones left out; None where one is computed."""
        given = {role: node for role, node in slots.items() if node is not None}
        return given if all(node in self._operands for node in given.values()) else None

    def _constant(self, node: fx.Node, kind: OpKind, type: str) -> dict[ParamRole, fx.Node]:
        """The first parameter operand of an op that has no roles of its own.

        What is scattered, or scattered into, has none in ONNX: it stays in float, and is rounded with the result.
        """
        if kind not in CONSTANT_KINDS or type == "ScatterND":
            return {}
        first = next((n for n in node.all_input_nodes if n in self._operands and n not in self._masks), None)
        return {} if first is None else {R.CONSTANT: first}

    def _register(self, kind: OpKind, name: str, roles: Mapping[ParamRole, fx.Node]) -> dict[ParamRole, str] | None:
        """Declare an op's parameters; None where one is shown already in another layout."""
        described: dict[ParamRole, Param] = {}
        for role, node in roles.items():
            operand = self._operands[node]
            shape, layout = _canonical_layout(kind, name, role, operand)
            described[role] = Param(operand.id, shape, operand.dtype, layout)
        if any(self._params.get(p.id, p) != p for p in described.values()):
            return None
        for role, node in roles.items():
            operand = self._operands[node]
            self._params[operand.id] = described[role]
            self._where.setdefault(operand.id, (operand, described[role]))
            self._readers.setdefault(operand.id, []).append(node)
        return {role: param.id for role, param in described.items()}


def _told_axes(ops: Sequence[Op], ranks: Mapping[TensorId, int | None]) -> dict[OpId, dict[TensorId, int]]:
    return {
        op.id: {t: 1 for t in around(op) if ranks.get(t) in (2, 3, 4, 5)}
        for op in ops
        if op.kind in _SECOND or op.type in _SECOND_TYPES
    }


def _fed(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on the model's inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _canonical_layout(
    kind: OpKind, name: str, role: ParamRole, operand: Operand
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Canonical shape, and the axis of the stored tensor that each canonical axis comes from.

    `linear` reads (out, in), every other matrix product (in, out).
    """
    stored = operand.shape[::-1] if operand.transposed else operand.shape
    swapped = operand.transposed
    if kind is OpKind.LINEAR and role is R.WEIGHT and name != "linear":
        swapped = not swapped
    return ((stored[1], stored[0]), (1, 0)) if swapped else (stored, tuple(range(len(stored))))
