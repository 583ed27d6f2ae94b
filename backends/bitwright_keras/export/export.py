"""Export: Keras files, frozen TensorFlow graphs, SavedModels, QDQ ONNX and int8 TFLite, all with the same names.

The names in an encodings file are the frozen graph's: tensors "block/relu:0", constants "block/kernel".
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from bitwright.backend import Bundle
from bitwright.calibration import full_table
from bitwright.errors import CapabilityError, InputError, MissingExtraError, ModelError, needs_extra
from bitwright.files import atomic_write, written_beside
from bitwright.graph import LINEAR_KINDS, Graph, Op, OpKind, ParamRole
from bitwright.grids import EncodingTable
from bitwright.placement import Derived, Plan, SiteKind
from bitwright_keras.capture.files import beyond_h5, save_model
from bitwright_keras.capture.plain_layers import with_layers
from bitwright_keras.export.complete import complete
from bitwright_keras.export.frozen import frozen
from bitwright_keras.graph.canonical import canonical
from bitwright_keras.graph.model import KerasModel
from bitwright_keras.graph.native import keras_model
from bitwright_keras.graph.params import read_params
from bitwright_keras.simulate.session import KerasSession

if TYPE_CHECKING:
    from bitwright_onnx.adapters import Written

KERAS_FORMATS: Mapping[str, str] = {
    "keras": "the float model with its updated weights as .keras; plain Keras loads it",
    "h5": "the same as .h5",
}
TENSORFLOW_FORMATS: Mapping[str, str] = {
    "pb": "the float model as a frozen TensorFlow graph; encodings files name its tensors",
    "saved_model": "the float model as a TensorFlow SavedModel (a folder)",
    "tflite": "the quantized model as an int8 .tflite file, for LiteRT",
}
ONNX_FORMATS: Mapping[str, str] = {
    "qdq": "the quantized model as ONNX with QuantizeLinear/DequantizeLinear pairs, for integer runtimes",
}


def formats() -> dict[str, str]:
    """Formats that can be written here: TensorFlow's need it, ONNX's their packages, whatever Keras runs on."""
    found = dict(KERAS_FORMATS)
    if importlib.util.find_spec("tensorflow") is not None:
        found |= TENSORFLOW_FORMATS
    if importlib.util.find_spec("onnx_ir") is not None:
        found |= ONNX_FORMATS
    return found


def bundled(model: KerasModel) -> dict[str, str]:
    """What an exported bundle has beside the .keras file: format → ending of the name."""
    found = {"h5": ".h5"}
    if why := beyond_h5(node.operation for node in with_layers(model).nodes):
        warnings.warn(f"{model.name}: no .h5 is written: {why}", stacklevel=3)
        del found["h5"]
    offered = formats()
    if "qdq" in offered:
        found["qdq"] = ".qdq.onnx"
    if "pb" in offered:
        try:
            frozen(model)
        except (CapabilityError, ModelError) as error:
            *first, last = (".keras", *found.values())
            names = f"{', '.join(first)} and {last} are" if first else f"{last} is"
            warnings.warn(f"{model.name}: {names} written only: {error}", stacklevel=3)
        else:
            found["pb"] = ".pb"
    return found


def export(model: KerasModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
    """`Backend.export`.

    Raises:
        InputError: unknown format, or the file can't be written.
        MissingExtraError: TensorFlow or the ONNX packages aren't installed.
        ModelError: TensorFlow or ONNX can't express the model.
        EncodingError: an encoding that the format has no numbers for.
        CapabilityError: the model can't be handed from another Keras backend to TensorFlow's.
    """
    match format:
        case "keras" | "h5":
            return Bundle({"model" if format == "keras" else "h5": save_model(model, path)}, _names(model))
        case "pb":
            graph = frozen(model)
            with atomic_write(path) as file:
                graph.write(file)
            return Bundle({"pb": path}, graph.names)
        case "saved_model":
            return Bundle({"saved_model": save_saved_model(model, path)})
        case "qdq":
            return _qdq(model, plan, encodings, path)
        case "tflite":
            return _tflite(model, plan, encodings, path)
    raise InputError(f"the Keras backend has no format {format!r}; there are {', '.join(formats())}")


def _names(model: KerasModel) -> dict[str, str]:
    """The frozen graph's names, where there can be one."""
    try:
        return frozen(model).names
    except (MissingExtraError, CapabilityError, ModelError):
        return {}


def save_saved_model(model: KerasModel, path: Path) -> Path:
    """Write a SavedModel folder: beside, then renamed.

    Raises:
        CapabilityError: Keras doesn't run on TensorFlow or JAX.
        InputError: the folder can't be written.
    """
    if keras.backend.backend() not in ("tensorflow", "jax"):
        raise CapabilityError(
            f"SavedModels can't be made with Keras on {keras.backend.backend()}: export .keras, open it with "
            "KERAS_BACKEND=tensorflow and export from there"
        )
    with written_beside(path) as folder:
        keras_model(model).export(folder / path.name, format="tf_saved_model", verbose=False)
    return path


def _qdq(model: KerasModel, plan: Plan, encodings: EncodingTable, path: Path) -> Bundle:
    with needs_extra("QDQ files need", "onnx"):
        from bitwright_onnx.adapters import export_written
    return export_written(as_onnx(model), canonical(model).graph, plan, encodings, path)


def as_onnx(model: KerasModel) -> Written:
    """The model as an ONNX model that was seen to compute the same.

    Raises:
        NotEmittable, ModelError: see `bitwright_onnx.adapters.written`.
    """
    from bitwright_onnx.adapters import written_graph

    graph, values = complete(model)
    own = canonical(model).graph
    return written_graph(graph, values, lambda taps: KerasSession(model, own, taps), tensors=own.tensors)


def _tflite(model: KerasModel, plan: Plan, encodings: EncodingTable, path: Path) -> Bundle:
    from bitwright_keras.export.tflite import write_tflite
    from bitwright_keras.export.tflite_grids import Parameter
    from bitwright_keras.graph.batch_norms import folded

    graph = frozen(model, batch_size=1)
    shown = canonical(model).graph
    table = full_table(plan, encodings)
    values = read_params(model, list(shown.params))
    found = [s for s in plan.quantized if plan[s].kind is SiteKind.ACTIVATION and s in graph.tensors and s in table]
    order = {t: index for index, op in enumerate(shown) for t in op.outputs}
    sites = {s: (graph.tensors[s], table[s]) for s in sorted(found, key=lambda s: order.get(s, -1))}
    parameters: list[Parameter] = []
    for site, value in values.items():
        op = shown.users(site)[0]
        decision = plan[site].decision if site in plan else None
        encoding = None if isinstance(decision, Derived) else table.get(site)
        if op.kind in LINEAR_KINDS and op.weight == site:
            whole = folded(shown, op, values, value, _bias(shown, op, values), encoding)
            transposed = op.kind is OpKind.CONV_TRANSPOSE
            parameters.append(Parameter(site, whole.weight, whole.encoding, whole.bias, transposed, whole.codes))
        elif encoding is not None:
            parameters.append(Parameter(site, value, encoding))
    report = write_tflite(
        graph.graph_def,
        {t: graph.tensors[t] for t in model.inputs},
        {t: graph.tensors[t] for t in model.output_ids},
        sites,
        parameters,
        path,
    )
    return Bundle({"tflite": report.path}, report.names)


def _bias(graph: Graph, op: Op, values: Mapping[str, Any]) -> Any:
    """A linear op's bias; zeros where it has none."""
    bias, weight = op.params.get(ParamRole.BIAS), op.weight
    assert weight is not None
    if bias is not None:
        return np.asarray(values[bias], np.float32)
    return np.zeros(graph.params[weight].shape[1 if op.kind is OpKind.CONV_TRANSPOSE else 0], np.float32)
