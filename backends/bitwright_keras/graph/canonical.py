"""A model in normal form as the core's graph.

- A layer without bias and the addition of a constant of its output's width (its only reader) are one op, which has
  the layer's name and the sum's output: so a shared layer can have another bias at each call.
- A strided convolution with "same" padding over free dimensions has no fixed geometry; it is OPAQUE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from bitwright.graph import (
    CONSTANT_KINDS,
    FLOAT_DTYPES,
    ActivationAttrs,
    Attrs,
    Call,
    Graph,
    Op,
    OpKind,
    Param,
    ParamId,
    ParamRole,
    Tensor,
    TensorId,
    around,
    channel_axes,
)
from bitwright.placement import is_mask
from bitwright_keras.graph import attributes
from bitwright_keras.graph.calls import call_of, opaque_call
from bitwright_keras.graph.constants import constant_of
from bitwright_keras.graph.layouts import ROLES, Layout, layout_of
from bitwright_keras.graph.masking import mask_names
from bitwright_keras.graph.model import KerasModel, Node, variables_of
from bitwright_keras.graph.optable import FUNCTIONS, LAYERS, OPERATIONS


@dataclass(frozen=True)
class ParamPlace:
    """Where a parameter is kept.

    Attributes:
        node: a call that has it.
        key: in `Node.params`.
        layout: native ↔ canonical.
    """

    node: Node
    key: str
    layout: Layout

    @property
    def variable(self) -> keras.Variable | None:
        """The layer's variable; None for a constant operand."""
        layer = self.node.layer
        return None if layer is None else variables_of(layer)[self.key]


@dataclass(frozen=True)
class Canonical:
    """A graph, and how to find its parts in the model.

    Attributes:
        graph: for the core.
        places: of parameters.
        nodes: the calls that an op stands for.
    """

    graph: Graph
    places: Mapping[ParamId, ParamPlace]
    nodes: Mapping[str, tuple[Node, ...]]


def canonical(model: KerasModel) -> Canonical:
    """The canonical graph of a model; made once."""
    if "canonical" not in model.memo:
        model.memo["canonical"] = _Builder(model).build()
    found = model.memo["canonical"]
    assert isinstance(found, Canonical)
    return found


def readers_of(model: KerasModel) -> dict[TensorId, list[Node]]:
    """The calls that read each activation."""
    found: dict[TensorId, list[Node]] = {}
    for node in model.nodes:
        for t in dict.fromkeys(node.inputs):
            found.setdefault(t, []).append(node)
    return found


class _Builder:
    def __init__(self, model: KerasModel) -> None:
        self._model = model
        self._readers = readers_of(model)
        self._params: dict[ParamId, Param] = {}
        self._places: dict[ParamId, ParamPlace] = {}
        self._own: dict[str, int] = {}
        self._orders: dict[str, tuple[int, ...]] = {}

    def build(self) -> Canonical:
        model = self._model
        biases = {n.op: add for n in model.nodes if (add := self._bias_add(n)) is not None}
        hidden = {add.op for add in biases.values()}
        ops: list[Op] = []
        nodes: dict[str, tuple[Node, ...]] = {}
        for node in model.nodes:
            if node.op in hidden:
                continue
            op = self._op(node, biases.get(node.op))
            ops.append(op)
            nodes[op.id] = tuple(n for n in (node, biases.get(node.op)) if n is not None)
        shown = dict.fromkeys([*model.inputs, *(t for op in ops for t in op.outputs)])
        ranks = {t: len(model.specs[t].shape) for t in shown}
        told = {
            op.id: {t: self._own[op.id] for t in around(op) if self._own[op.id] < ranks[t]}
            for op in ops
            if op.id in self._own
        }
        axes = channel_axes(ops, ranks, told, self._orders)
        masked = mask_names(model, self._kind)
        tensors = {t: Tensor(t, model.specs[t].shape, model.specs[t].dtype, axes.get(t), t in masked) for t in shown}
        graph = Graph(ops, tensors, self._params, model.inputs, model.output_ids)
        return Canonical(graph, self._places, nodes)

    def _sole_reader(self, tensor: TensorId) -> Node | None:
        readers = self._readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self._model.output_ids else None

    def _bias_add(self, node: Node) -> Node | None:
        """The addition that gives a layer its bias."""
        layer: Any = node.layer
        kind, _ = LAYERS.get(node.type, (OpKind.OPAQUE, ""))
        if kind not in (OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR) or layer is None or layer.use_bias:
            return None
        add = self._sole_reader(node.outputs[0])
        if add is None or add.type != "Add" or add.layer is not None or len(add.params) != 1 or len(add.inputs) != 1:
            return None
        (key,) = add.params
        value = np.asarray(constant_of(add, key))
        shape = self._model.specs[node.outputs[0]].shape
        axis = attributes.data_axis(node, len(shape))
        wanted = (shape[axis], *(1,) * (len(shape) - 1 - axis))
        return add if value.ndim and value.shape == wanted and not is_mask(value) else None

    # -- one op

    def _op(self, node: Node, bias: Node | None) -> Op:
        kind, type = self._kind(node)
        attrs: Attrs | None = None
        first = self._model.specs[node.outputs[0]]
        roles: dict[ParamRole, str] = {}
        if kind is not OpKind.OPAQUE and first.dtype in FLOAT_DTYPES and node.inputs:
            kind, type, attrs, roles = self._classify(node, kind, type)
        else:
            kind = OpKind.OPAQUE
        params = self._register(node, kind, roles)
        if params is None:
            kind, attrs, params = OpKind.OPAQUE, None, {}
        if bias is not None and kind is not OpKind.OPAQUE:
            (key,) = bias.params
            native = np.shape(constant_of(bias, key))
            params[ParamRole.BIAS] = self._declare(bias, key, Layout(native, tuple(range(len(native))), native[:1]))
        self._axes(node, kind)
        outputs = node.outputs if bias is None else bias.outputs
        call = self._call(node, kind, type, params)
        return Op(node.op, kind, type, node.inputs, outputs, params, attrs, _native(node), call=call)

    def _call(self, node: Node, kind: OpKind, type: str, params: Mapping[ParamRole, str]) -> Call | None:
        if kind is not OpKind.OPAQUE:
            return call_of(node, type, self._model.specs, params)
        known, named = self._kind(node)
        return opaque_call(node, named if known is not OpKind.OPAQUE else "", self._model.specs)

    def _kind(self, node: Node) -> tuple[OpKind, str]:
        opaque = OpKind.OPAQUE, node.type
        if type(node.operation).__module__.partition(".")[0] != "keras":
            return opaque
        if node.layer is None:
            return OPERATIONS.get(node.type, opaque)
        if node.type == "Activation":
            return FUNCTIONS.get(_function_name(node), (OpKind.OPAQUE, _function_name(node)))
        return LAYERS.get(node.type, opaque)

    def _classify(self, node: Node, kind: OpKind, type: str) -> tuple[OpKind, str, Attrs | None, dict[ParamRole, str]]:
        roles = {ROLES[key]: key for key in node.params if key in ROLES}
        opaque: tuple[OpKind, str, Attrs | None, dict[ParamRole, str]] = (OpKind.OPAQUE, type, None, {})
        source, result = self._model.specs[node.inputs[0]], self._model.specs[node.outputs[0]]
        layer: Any = node.layer
        match kind:
            case OpKind.CONV | OpKind.CONV_TRANSPOSE:
                if getattr(layer, "lora_enabled", False) or len(node.inputs) > 1:
                    return opaque
                kernel = tuple(layer.kernel.shape[:-2])
                if kind is OpKind.CONV_TRANSPOSE:
                    return kind, type, attributes.transposed(node, source, result, kernel), roles
                geometry = attributes.convolution(node, source, kernel, int(layer.kernel.shape[-2]))
                return opaque if geometry is None else (kind, type, geometry, roles)
            case OpKind.MATMUL if type.startswith("Conv") and len(node.inputs) < 2:
                return opaque
            case OpKind.MATMUL if node.type == "Dot" and len(node.inputs) == 2:
                ranks = [len(self._model.specs[t].shape) for t in node.inputs]
                return kind, type, attributes.product(layer, ranks), {}
            case OpKind.LINEAR:
                if getattr(layer, "lora_enabled", False):
                    return opaque
                return kind, "Gemm" if len(source.shape) == 2 else "MatMul", None, roles
            case OpKind.BATCH_NORM:
                plain = len(node.inputs) == 1 and node.kwargs.get("training") is not True
                return (kind, type, attributes.batch_norm(node, len(source.shape)), roles) if plain else opaque
            case OpKind.LAYER_NORM:
                if getattr(layer, "rms_scaling", False):
                    return OpKind.NORM, "RMSNormalization", None, roles
                return kind, type, attributes.axis(node, kind, source, result), roles
            case OpKind.NORM | OpKind.EMBEDDING:
                return kind, type, None, roles
            case OpKind.PRELU if type == "LeakyRelu":
                alpha = attributes.setting(node, "negative_slope", 1, 0.2)
                return kind, type, ActivationAttrs(alpha=float(alpha)), {}
            case OpKind.PRELU:
                return kind, type, ActivationAttrs(), roles
            case OpKind.RELU if node.type == "ReLU":
                kind, type, limits = attributes.rectifier(layer)
                return kind, type, limits, {}
            case OpKind.CLIPPED_RELU:
                return kind, type, ActivationAttrs(0.0, 6.0), {}
            case OpKind.ACTIVATION if type == "Clip":
                low, high = -1.0, 1.0
                if node.type == "Clip":
                    low, high = (attributes.setting(node, n, i) for i, n in enumerate(("x_min", "x_max"), 1))
                return *attributes.bounds(low, high), {}
            case OpKind.CONCAT if node.type == "Concatenate" and len(node.args[0]) == 1:
                return OpKind.IDENTITY, "Identity", None, {}  # TensorFlow leaves it out
            case OpKind.SOFTMAX | OpKind.CONCAT | OpKind.SPLIT:
                return kind, type, attributes.axis(node, kind, source, result), self._constant(node, kind)
            case OpKind.AVERAGE_POOL:
                if len(node.inputs) > 1:  # masked: another mean for each sample
                    return OpKind.ELEMENTWISE, "ReduceMean", None, {}
                type, averaged = attributes.pool(node, source)
                return kind, type, averaged, {}
            case OpKind.MAX_POOL if node.type.startswith("Adaptive"):
                return kind, type, None, {}
            case OpKind.ADD if len(node.inputs) > 2:
                return kind, "Sum", None, {}
            case OpKind.PAD if attributes.setting(node, "constant_values", None, 0):
                return OpKind.ELEMENTWISE, type, None, {}
            case OpKind.PAD if attributes.setting(node, "mode", None, "constant") != "constant":
                return kind, type, None, {}
            case OpKind.ELEMENTWISE if type == "Cast":
                same = source.dtype == result.dtype
                return (OpKind.IDENTITY, "Identity", None, {}) if same else (kind, type, None, {})
        return kind, type, None, self._constant(node, kind)

    @staticmethod
    def _constant(node: Node, kind: OpKind) -> dict[ParamRole, str]:
        """The first constant operand of an op that has no roles of its own."""
        constants = [key for key in node.params if key.startswith(("args/", "kwargs/"))]
        return {ParamRole.CONSTANT: constants[0]} if constants and kind in CONSTANT_KINDS else {}

    def _axes(self, node: Node, kind: OpKind) -> None:
        rank = len(self._model.specs[node.inputs[0]].shape) if node.inputs else 0
        result = len(self._model.specs[node.outputs[0]].shape)
        layer: Any = node.layer
        if kind is OpKind.TRANSPOSE:
            order = attributes.permutation(node, self._model.specs[node.inputs[0]])
            if order is not None:
                self._orders[node.op] = order
        elif kind is OpKind.EMBEDDING or kind is OpKind.LAYER_NORM or layer is None:
            return
        elif kind in (OpKind.BATCH_NORM, OpKind.NORM) and isinstance(getattr(layer, "axis", None), int):
            self._own[node.op] = layer.axis % rank
        elif hasattr(layer, "data_format") and kind not in (OpKind.OPAQUE, OpKind.RESHAPE) and result >= 2:
            self._own[node.op] = attributes.data_axis(node, rank)

    def _register(self, node: Node, kind: OpKind, roles: Mapping[ParamRole, str]) -> dict[ParamRole, str] | None:
        """Declare an op's parameters; None where one is shown already in another layout."""
        depthwise = hasattr(node.operation, "depth_multiplier")
        described: dict[str, Layout] = {}
        for role, key in roles.items():
            shape = self._native_shape(node, key)
            described[key] = layout_of(kind, role, shape, depthwise=depthwise)
        for key, layout in described.items():
            known = self._places.get(node.params[key])
            if known is not None and known.layout != layout:
                return None
        return {role: self._declare(node, key, described[key]) for role, key in roles.items()}

    def _declare(self, node: Node, key: str, layout: Layout) -> str:
        id = node.params[key]
        dtype = "float32"
        if node.layer is not None:
            dtype = keras.backend.standardize_dtype(variables_of(node.layer)[key].dtype)
        order = layout.order if len(layout.order) == len(layout.shape) else None
        self._params.setdefault(id, Param(id, layout.shape, dtype, order))
        self._places.setdefault(id, ParamPlace(node, key, layout))
        return id

    def _native_shape(self, node: Node, key: str) -> tuple[int, ...]:
        if node.layer is None:
            return np.shape(constant_of(node, key))
        return tuple(int(n) for n in variables_of(node.layer)[key].shape)


def _function_name(node: Node) -> str:
    function = node.operation.activation
    own = getattr(function, "__module__", "").startswith("keras.")
    return str(getattr(function, "__name__", type(function).__name__)) if own else f"Activation({function!r})"


def _native(node: Node) -> str:
    """What messages call it: the class, with its package where that isn't Keras."""
    module = type(node.operation).__module__.partition(".")[0]
    prefix = "" if module == "keras" else f"{module}."
    kind = "layer" if node.layer is not None else "operation"
    return f"{prefix}{node.type} {kind}"
