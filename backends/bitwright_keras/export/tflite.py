"""An int8 .tflite file that carries our ranges, from a frozen graph.

The graph gets a fake-quantization op at each site, which tells TensorFlow's converter what to run in integers, and in
what range; the numbers that it writes are then replaced by ours (`tflite_grids`). Sites that the plan leaves in float
get no such op and run in float. Inputs and outputs stay float, with QUANTIZE and DEQUANTIZE operators at the ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import silenced
from bitwright.errors import ModelError, first_line
from bitwright.grids import Encoding
from bitwright_keras.export.tflite_file import TfliteFile
from bitwright_keras.export.tflite_grids import Parameter, Placed, activation_grid, place, weight_grid


@dataclass(frozen=True)
class TfliteReport:
    """What was written.

    Attributes:
        path: the file.
        names: site → its tensor in the file; sites that the converter fused away are missing.
        floating: operators that compute in float, with their number.
        foreign: int8 tensors whose grids aren't ours.
    """

    path: Path
    names: Mapping[str, str] = field(default_factory=dict)
    floating: Mapping[str, int] = field(default_factory=dict)
    foreign: Sequence[str] = ()


def write_tflite(
    graph_def: Any,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    sites: Mapping[str, tuple[str, Encoding]],
    parameters: Sequence[Parameter],
    path: Path,
) -> TfliteReport:
    """Convert a frozen graph and write the file, atomically.

    Args:
        graph_def: with a fixed batch size; TFLite files have static shapes.
        inputs, outputs: name in the file → tensor ("conv/Relu:0").
        sites: activation site → (tensor, encoding).
        parameters: quantized ones, and the weights of linear ops that stay in float.
        path: the file.

    Raises:
        EncodingError: an encoding that int8 TFLite has no grid for; the message names the site.
        ModelError: the converter refuses the graph, or an input or output doesn't exist.
        InputError: the file can't be written.
    """
    for site, (_, encoding) in sites.items():
        activation_grid(site, encoding)
    for parameter in parameters:
        if parameter.encoding is not None:
            weight_grid(parameter)
    quantized, renamed = _with_fake_quantization(graph_def, sites)
    ends = {name: renamed.get(_full(t), _full(t)) for name, t in outputs.items()}
    content = _converted(quantized, {n: _full(t) for n, t in inputs.items()}, ends)
    file = TfliteFile(content)
    ops = {site: (_full(tensor).rpartition(":")[0], encoding) for site, (tensor, encoding) in sites.items()}
    feeds = {_full(t): n for n, t in inputs.items()}
    for site, (tensor, encoding) in sites.items():
        if _full(tensor) in feeds:  # the input itself stays float; its integers are the fake quantization's
            ops[site] = (renamed[_full(tensor)].rpartition(":")[0], encoding)
    placed = place(file, ops, parameters)
    names = _name(file, placed, list(inputs), list(outputs))
    return TfliteReport(file.write(path), names, file.floating(), tuple(placed.foreign))


def _full(tensor: str) -> str:
    return tensor if ":" in tensor else f"{tensor}:0"


def _with_fake_quantization(graph_def: Any, sites: Mapping[str, tuple[str, Encoding]]) -> tuple[Any, dict[str, str]]:
    """A copy of the graph in which each site's readers read it fake-quantized; tensor → what they read."""
    made = type(graph_def)()
    made.CopyFrom(graph_def)
    taken = {n.name for n in made.node}
    grids: dict[str, Encoding] = {}
    for site, (tensor, encoding) in sites.items():
        full = _full(tensor)
        if full.rpartition(":")[0] not in taken:
            raise ModelError(f"site {site!r}: the graph has no tensor {full!r}")
        grids[full] = encoding
    renamed: dict[str, str] = {}
    added = []
    for index, (tensor, encoding) in enumerate(grids.items()):
        name = f"bitwright_fake_quant_{index}"
        while name in taken:
            name += "_"
        renamed[tensor] = f"{name}:0"
        added.append((name, tensor, encoding))
    for node in made.node:
        for position, reference in enumerate(node.input):
            if not reference.startswith("^") and _full(reference) in renamed:
                node.input[position] = renamed[_full(reference)]
        node.attr.pop("_output_shapes", None)
    for name, tensor, encoding in added:
        limits = _limits(encoding)
        for suffix, value in zip(("min", "max"), limits, strict=True):
            constant = made.node.add(name=f"{name}/{suffix}", op="Const")
            constant.attr["dtype"].type = 1
            constant.attr["value"].tensor.dtype = 1
            constant.attr["value"].tensor.tensor_shape.SetInParent()
            constant.attr["value"].tensor.float_val.append(float(value))
        fake = made.node.add(name=name, op="FakeQuantWithMinMaxVars")
        fake.input.extend([tensor, f"{name}/min", f"{name}/max"])
        fake.attr["num_bits"].i = 8
        fake.attr["narrow_range"].b = False
    return made, renamed


def _limits(encoding: Encoding) -> tuple[np.float32, np.float32]:
    grid = encoding.grid
    low, high = (
        np.float32(code - int(encoding.zero_point)) * np.float32(encoding.scale) for code in (grid.qmin, grid.qmax)
    )
    return low, high


def _converted(graph_def: Any, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> bytes:
    import tensorflow as tf

    def load() -> None:
        tf.import_graph_def(graph_def, name="")

    with silenced("tensorflow"):
        try:
            wrapped = tf.compat.v1.wrap_function(load, [])
            graph = wrapped.graph
            feeds = [graph.get_tensor_by_name(t) for t in inputs.values()]
            fetches = [graph.get_tensor_by_name(t) for t in outputs.values()]
            function = wrapped.prune(feeds, fetches)
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function], wrapped)
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            return bytes(converter.convert())
        except Exception as error:
            raise ModelError(f"TensorFlow's converter can't turn the model into TFLite: {first_line(error)}") from error


def _name(file: TfliteFile, placed: Placed, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Call tensors by their sites; inputs and outputs by the model's own names."""
    ends = {int(t): n for t, n in zip(file.graph.inputs, inputs, strict=True)}
    for t, n in zip(file.graph.outputs, outputs, strict=True):
        ends.setdefault(int(t), n)
    names: dict[str, str] = {}
    called: dict[int, str] = {}
    taken = set(ends.values())
    for site, index in placed.sites.items():
        if index in called or index in ends:
            names[site] = called.get(index) or ends[index]
            continue
        name = site if site not in taken else f"{site}_int8"
        while name in taken:
            name += "_"
        taken.add(name)
        called[index] = names[site] = name
    others = {file.name(i): i for i in range(len(file.tensors)) if i not in called and i not in ends}
    for old, index in others.items():
        if old in taken:
            file.rename(index, f"{old}_")
    for index, name in {**called, **ends}.items():
        file.rename(index, name)
    return names
