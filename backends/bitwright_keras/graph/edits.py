"""The core's graph edits, carried out on the calls of a model in normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Branch, Editor
from bitwright.errors import ModelError
from bitwright.graph import LEAK, BranchNames, Edit, Formula, Op, ParamId, ParamRole, TensorId, free_name
from bitwright_keras.graph.attributes import data_axis
from bitwright_keras.graph.canonical import canonical, readers_of
from bitwright_keras.graph.constants import constant_params
from bitwright_keras.graph.model import KerasModel, Node, Ref, Spec, substitute, variables_of
from bitwright_keras.graph.native import copy_layer
from bitwright_keras.graph.params import array_of, with_values

_ACTIVATIONS = {
    "Identity": "linear", "Relu": "relu", "Relu6": "relu6", "Sigmoid": "sigmoid", "HardSigmoid": "hard_sigmoid",
    "Tanh": "tanh", "Softplus": "softplus", "Softsign": "softsign", "Elu": "elu", "Selu": "selu", "Gelu": "gelu",
    "Swish": "silu", "HardSwish": "hard_silu", "Mish": "mish",
}  # fmt: skip
"""Keras's function for each activation but LeakyRelu, which has a layer of its own."""


def edit_model(model: KerasModel, edits: Sequence[Edit]) -> KerasModel:
    """A new model with the edits applied in order; layers that stay as they are are shared.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = KerasEditor(model)
    editor.apply_all(edits)
    return editor.model


class KerasEditor(Editor):
    """Edits by replacing calls; what is edited is `model`, what was given stays."""

    def __init__(self, model: KerasModel) -> None:
        super().__init__(canonical(model).graph)
        self.model = model

    def _replace(self, node: Node, *others: Node) -> None:
        """Put calls in a call's place."""
        nodes = [n for old in self.model.nodes for n in (others if old is node else (old,))]
        self.model = self.model.with_(nodes=tuple(nodes))

    def _file_name(self, wanted: str) -> str:
        return free_name(wanted, {n.operation.name for n in self.model.nodes} | set(self.model.inputs))

    # -- values

    def set_values(self, values: Mapping[ParamId, NDArray[Any]]) -> None:
        """See `Editor`."""
        self.model = with_values(self.model, values)

    def add_bias(self, op: Op, value: NDArray[Any]) -> ParamId:
        """See `Editor`."""
        node, bias = self.model.node(op.id), value.astype(np.float32, copy=False)
        assert node.layer is not None
        if len(self.model.calls_of[id(node.layer)]) > 1:
            return self._add_bias(node, bias)
        layer = copy_layer(node.layer, use_bias=True)
        variables_of(layer)["bias"].assign(bias)
        self._replace(node, replace(node, operation=layer, params={**node.params, "bias": _bias_id(node)}))
        return _bias_id(node)

    def own_bias(self, op: Op, bias: ParamId, value: NDArray[Any]) -> ParamId:
        """See `Editor`; the kernel stays shared."""
        node = self.model.node(op.id)
        if "bias" in node.params:
            self._part_biases(node)
            graph = canonical(self.model).graph
            self.see(graph)
            bias = next(p for r, p in graph.op(op.id).params.items() if r is ParamRole.BIAS)
        self.set_values({bias: value})
        return bias

    def _part_biases(self, node: Node) -> None:
        """Give each call of a shared layer its own bias, as a sum with a constant; the kernel stays shared."""
        assert node.layer is not None
        bias = array_of(variables_of(node.layer)["bias"])
        layer = copy_layer(node.layer, use_bias=False)
        for call in self.model.calls_of[id(node.layer)]:
            held = {key: p for key, p in call.params.items() if key != "bias"}
            self._replace(call, plain := replace(call, operation=layer, params=held))
            self._add_bias(plain, bias)

    def _add_bias(self, node: Node, bias: NDArray[Any]) -> ParamId:
        """The sum of a call's output and a constant takes over the output's name."""
        (output,) = node.outputs
        spec = self.model.specs[output]
        rank = len(spec.shape)
        shape = (len(bias), *(1,) * (rank - 1 - data_axis(node, rank)))
        inner = f"{output}/without_bias"
        symbol = keras.ops.add(keras.KerasTensor(spec.shape, dtype=spec.dtype), bias.reshape(shape).astype(spec.dtype))
        operation = symbol._keras_history.operation
        operation.__dict__["_inbound_nodes"] = []
        operation.name = self._file_name(f"{node.operation.name}_bias")
        name = f"{node.op}/bias"
        add = Node(name, operation, (Ref(inner), bias.reshape(shape).astype(spec.dtype)), {}, (output,))
        add = replace(constant_params(add), params={"args/1": f"{name}/constant"})
        self.model = self.model.with_(specs={**self.model.specs, inner: spec})
        self._replace(node, replace(node, outputs=(inner,)), add)
        return f"{name}/constant"

    def add_branch(self, op: Op, names: BranchNames, down: NDArray[Any], up: NDArray[Any]) -> Branch:
        """See `Editor`; two dense layers without bias, and a sum."""
        node, last = self.model.node(op.id), canonical(self.model).nodes[op.id][-1]
        (output,) = last.outputs
        spec, (source, *_) = self.model.specs[output], node.inputs
        assert node.layer is not None
        product = self.free_tensor(f"{op.id}/product")
        specs, calls, read = {product: spec}, [replace(last, outputs=(product,))], source
        for name, matrix in ((names.down, down), (names.up, up)):
            layer = keras.layers.Dense(
                len(matrix), use_bias=False, name=self._file_name(name.replace("/", "_")), dtype=node.layer.dtype_policy
            )
            layer.build({**self.model.specs, **specs}[read].shape)
            layer.kernel.assign(matrix.T)
            layer.trainable = node.layer.trainable
            tensor = self.free_tensor(name)
            calls.append(Node(name, layer, (Ref(read),), {}, (tensor,), {"kernel": f"{name}/kernel"}))
            specs[tensor], read = Spec((*spec.shape[:-1], len(matrix)), spec.dtype), tensor
        symbols = (keras.KerasTensor(spec.shape, dtype=spec.dtype) for _ in range(2))
        operation = keras.ops.add(*symbols)._keras_history.operation
        operation.__dict__["_inbound_nodes"] = []
        operation.name = self._file_name(names.total.replace("/", "_"))
        calls.append(Node(names.total, operation, (Ref(product), Ref(read)), {}, (output,)))
        self.model = self.model.with_(specs={**self.model.specs, **specs})
        self._replace(last, *calls)
        return Branch(product, (calls[1].outputs[0], read), (f"{names.down}/kernel", f"{names.up}/kernel"))

    def is_shared(self, op: Op, param: ParamId) -> bool:
        """See `Editor`; constants of calls are their own."""
        return self.model.node(op.id).layer is not None and super().is_shared(op, param)

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`; the op gets a layer of its own, with all that this has."""
        node = self.model.node(op.id)
        assert node.layer is not None
        layer = copy_layer(node.layer, name=self._file_name(node.op.replace("/", "_")))
        known = set(canonical(self.model).graph.params)
        params = {key: free_name(f"{node.op}/{key}", known) for key in node.params}
        self._replace(node, replace(node, operation=layer, params=params))
        graph = canonical(self.model).graph
        self.see(graph)
        return next(p for r, p in graph.op(op.id).params.items() if op.params[r] == param)

    # -- structure

    def only_reader(self, tensor: TensorId, reader: Op) -> bool:
        """See `Editor`; what isn't shown as an op reads too."""
        return tensor not in self.model.output_ids and len(readers_of(self.model).get(tensor, [])) == 1

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._drop(self.model.node(norm.id))
        self._rename_output(norm.data_inputs[0], norm.output)

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._drop(self.model.node(norm.id))
        self._rewire({norm.output: norm.data_inputs[0]})

    def _drop(self, node: Node) -> None:
        self._replace(node)

    def _rename_output(self, tensor: TensorId, name: TensorId) -> None:
        """The call that computes `tensor` comes to compute `name`."""
        node = self.model.producers[tensor]
        outputs = tuple(name if t == tensor else t for t in node.outputs)
        specs: dict[str, Spec] = {t: s for t, s in self.model.specs.items() if t != tensor}
        specs[name] = self.model.specs[tensor]
        self._replace(node, replace(node, outputs=outputs))
        self.model = self.model.with_(specs=specs)

    def _rewire(self, tensors: dict[TensorId, TensorId]) -> None:
        nodes = tuple(node.rewired(tensors) for node in self.model.nodes)
        outputs = substitute(self.model.outputs, lambda ref: Ref(tensors.get(ref.id, ref.id)))
        specs = {t: s for t, s in self.model.specs.items() if t not in tensors}
        self.model = self.model.with_(nodes=nodes, outputs=outputs, specs=specs)

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        node, dtype = self.model.node(op.id), self.model.specs[op.output].dtype
        if formula.type == "LeakyRelu":
            layer: keras.layers.Layer = keras.layers.LeakyReLU(LEAK, name="x", dtype=dtype)
        else:
            layer = keras.layers.Activation(_ACTIVATIONS[formula.type], name="x", dtype=dtype)
        alone = len(self.model.calls_of[id(node.operation)]) == 1
        layer.name = node.operation.name if alone else self._file_name(node.op.replace("/", "_"))
        args = (Ref(op.data_inputs[0]),)
        self._replace(node, replace(node, operation=layer, args=args, kwargs={}, params={}))

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        calls = canonical(self.model).nodes[op.id]
        if len(calls) != 1:
            raise ModelError(f"{op.id!r} ({op.type}) consists of several calls; it can't be removed")
        source, output = op.data_inputs[0], op.output
        self._drop(calls[0])
        if renames:
            self.model = self.model.with_(nodes=tuple(n.rewired({source: output}) for n in self.model.nodes))
            self._rename_output(source, output)
        else:
            self._rewire({output: source})


def _bias_id(node: Node) -> str:
    kernel = node.params["kernel"]
    return kernel.removesuffix("kernel") + "bias" if kernel.endswith("/kernel") else f"{node.op}/bias"
