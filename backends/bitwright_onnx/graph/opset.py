"""Raising a model's operator-set version with ONNX's converter, without losing the user's names or moving weights."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir

from bitwright.errors import ModelError, first_line
from bitwright_onnx.graph.old_opsets import NUMPY_BROADCASTING, broadcast_as_numpy
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.graph.tensors import INLINE_BYTES, byte_size

MINIMUM_OPSET = 13
"""Per-channel QuantizeLinear needs it; every model is raised at least so far when it is opened."""
INT4_OPSET = 21
"""QuantizeLinear with 4- and 16-bit types and with blocks."""


def opset_of(model: ir.Model) -> int:
    """Version of the default operator set; 0 where the model imports none."""
    return model.opset_imports.get("", 0)


def raise_opset(model: ir.Model, version: int) -> ir.Model:
    """A model of at least this operator-set version: the same object where nothing is to do, else a converted copy.

    Names of tensors and nodes stay, weights are shared.

    Raises:
        ModelError: ONNX's converter can't convert the model.
    """
    present = opset_of(model)
    if present == 0 or present >= version:
        return model
    bare = model.clone()
    bare.ir_version = max(bare.ir_version, 4)  # before, initializers had to be inputs too
    if present < NUMPY_BROADCASTING:
        broadcast_as_numpy(bare)
    weights = detach_weights(bare)
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(bare), version))
    except Exception as error:
        raise ModelError(
            f"the model can't be converted from opset {present} to {version}: {first_line(error)}. "
            f"Export it with opset {version} or newer"
        ) from error
    _attach(converted, weights)
    _restore_names(model.graph, converted.graph)
    _restore_types(model.graph, converted.graph)
    result = ir.Model(
        converted.graph,
        ir_version=max(model.ir_version, minimal_ir_version(version)),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=dict(model.metadata_props),
    )
    result.graph.meta.update(model.graph.meta)
    result.graph.metadata_props.update(model.graph.metadata_props)
    for domain, number in model.opset_imports.items():
        result.opset_imports.setdefault(domain, number)
    return result


def minimal_ir_version(opset: int) -> int:
    """The oldest IR version that a file with this opset may have."""
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], ignore_unknown=True))


def detach_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Make inputs of the big initializers of a model that the caller owns; returns their values.

    So no weight passes through what takes the model as one message.

    Raises:
        ModelError: an initializer has no data.
    """
    graph = model.graph
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {name!r} has no data")
        if byte_size(tensor) > INLINE_BYTES:
            weights[name] = tensor
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            graph.initializers.pop(name)
            value.const_value = None
            if value not in graph.inputs:
                graph.inputs.append(value)
    return weights


def _attach(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> None:
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
        value.const_value = weights[str(value.name)]
        graph.register_initializer(value)


def _restore_names(before: ir.Graph, after: ir.Graph) -> None:
    """Undo renamings: some of the converter's adapters replace a node and give its output a new name.

    A tensor whose name is gone is found again through a reader that kept its own name.
    """
    values = values_of(after)
    for node in reversed(list(before)):
        for output in node.outputs:
            if output.name in values or not output.name:
                continue
            for reader, index in output.uses():
                twin = next((values[o.name] for o in reader.outputs if o.name in values), None)
                maker = twin.producer() if twin is not None else None
                if maker is None or index >= len(maker.inputs) or maker.op_type != reader.op_type:
                    continue
                renamed = maker.inputs[index]
                if renamed is not None and renamed.producer() is not None:
                    renamed.name = output.name
                    values[output.name] = renamed
                    break
    for node in before:
        if node.name and node.outputs and (twin := values.get(str(node.outputs[0].name))) is not None:
            maker = twin.producer()
            if maker is not None:
                maker.name = node.name


def _restore_types(before: ir.Graph, after: ir.Graph) -> None:
    values = values_of(after)
    for name, value in values_of(before).items():
        twin = values.get(name)
        if twin is not None:
            twin.type = twin.type if twin.type is not None else value.type
            twin.shape = twin.shape if twin.shape is not None else value.shape
