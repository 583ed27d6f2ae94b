"""Shapes, types and static values of the inference graph's tensors, by TensorFlow's own inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.errors import ModelError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.frames import regions
from bitwright_tensorflow.graph.graphs import Spec, Wiring, extract
from bitwright_tensorflow.graph.model import Array, TfModel
from bitwright_tensorflow.graph.runtime import import_graph, open_graph
from bitwright_tensorflow.graph.sizes import static_value


@dataclass(frozen=True, eq=False)
class Inference:
    """The part of a model between its inputs and outputs.

    Attributes:
        wiring: of the model's whole graph.
        order: nodes of the part, topologically.
        controlled: nodes inside of loops and conditions.
        regions: the same, by loop or condition.
        graph: the part, imported.
        places: placeholder of each input that the outputs depend on.
        specs: types and shapes of the inputs.
        stored: bytes of the model's graph as it is written.
    """

    wiring: Wiring
    order: tuple[str, ...]
    controlled: frozenset[str]
    regions: tuple[tuple[str, ...], ...]
    graph: tf.Graph
    places: dict[TensorId, TensorId]
    specs: dict[TensorId, Spec]
    stored: int

    def tensor(self, tensor: TensorId) -> Any:
        """The imported tensor."""
        return self.graph.get_tensor_by_name(self.places.get(tensor, tensor))

    def spec(self, tensor: TensorId) -> Spec:
        """Type and shape.

        Raises:
            KeyError: no such tensor between inputs and outputs.
        """
        if tensor in self.specs:
            return self.specs[tensor]
        found = self.tensor(tensor)
        return found.dtype.base_dtype, found.shape

    def shape(self, tensor: TensorId) -> tuple[int | None, ...] | None:
        """Shape with None for free dimensions; None where the rank is unknown."""
        shape = self.spec(tensor)[1]
        return None if shape.rank is None else tuple(shape.as_list())

    def dtype(self, tensor: TensorId) -> str:
        """Name of the type ("float32")."""
        return str(self.spec(tensor)[0].name)

    def value(self, tensor: TensorId) -> Array | None:
        """The value, where it doesn't depend on data or variables.

        Raises:
            ModelError: it is computed, and far larger than the graph.
        """
        return None if tensor in self.places else static_value(self.tensor(tensor), self.stored)


def inference(model: TfModel) -> Inference:
    """The inference part of a model; worked out once."""
    found = model.memo.get("inference")
    if found is None:
        found = model.memo["inference"] = _infer(model)
    assert isinstance(found, Inference)
    return found


def computed(model: TfModel, tensors: Sequence[TensorId]) -> list[Array]:
    """Values of tensors that depend on constants and variables alone."""
    part, _ = extract(model.graph_def, (), tensors, inference(model).spec)
    with open_graph(part, model.values) as session:
        return [np.asarray(value) for value in session.run(list(tensors))]


def _infer(model: TfModel) -> Inference:
    wiring = Wiring(model.graph_def)
    order = tuple(wiring.order(model.outputs, model.inputs))
    inner = tuple(regions(wiring, order))
    controlled = frozenset(name for region in inner for name in region)
    specs = model.memo.get("input_specs", {})

    def spec(tensor: TensorId) -> Spec:
        if tensor not in specs:
            whole = import_graph(model.graph_def)
            found = whole.get_tensor_by_name(tensor)
            specs[tensor] = (found.dtype.base_dtype, found.shape)
        result: Spec = specs[tensor]
        return result

    for tensor in model.inputs:
        node = wiring.node(tensor.partition(":")[0])
        if node.op == "Placeholder":
            shape = tf.TensorShape(node.attr["shape"].shape) if "shape" in node.attr else tf.TensorShape(None)
            try:
                specs[tensor] = (tf.as_dtype(node.attr["dtype"].type), shape)
            except TypeError as error:
                raise ModelError(f"the graph doesn't say of what type its input {tensor!r} is") from error
        else:
            spec(tensor)
    part, places = extract(model.graph_def, model.inputs, model.outputs, spec, controlled=controlled)
    return Inference(wiring, order, controlled, inner, import_graph(part), dict(places), specs, part.ByteSize())
