"""A model as a frozen TensorFlow graph whose tensors and constants have bitwright's names.

The graph is traced call by call, so that every activation is known by its tensor; nodes are then renamed, so that the
activation "block/relu" is the tensor "block/relu:0" and the parameter "block/kernel" the constant "block/kernel".

TensorFlow's own freezing copies the weights five times and more. Here large ones aren't in the graph: their constants
are of the right type and shape, and the values are read, one by one, when the graph is written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np

from bitwright.errors import CapabilityError, ModelError, needs_extra
from bitwright.files import Array, Scratch, write_graph_def
from bitwright.graph import ParamId, TensorId, free_name
from bitwright_keras.graph.canonical import canonical
from bitwright_keras.graph.constants import constant_of, with_operand
from bitwright_keras.graph.model import KerasModel, Node, execute, variables_of
from bitwright_keras.graph.native import first_line
from bitwright_keras.graph.optable import AUGMENTATION
from bitwright_keras.graph.params import native_value

_PLAIN = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")
"""What TensorFlow allows as a node's name."""
LARGE = 2**16
"""Bytes of a weight that is left out of the graph until it is written; shapes and the like are smaller."""
LARGEST = 2**31 - 1
"""Bytes that a protobuf message holds at most."""
_FREEZING = ("_FunctionConverterDataInEager", "_replace_variables_by_constants", "_construct_concrete_function")
"""What TensorFlow freezes with; no part of what it promises, so that a release may lack it."""


@dataclass(frozen=True)
class FrozenGraph:
    """A graph without variables.

    Attributes:
        outline: the graph, with static shapes noted at its nodes; constants in `left_out` have NaN for their values.
        tensors: activation → tensor ("name:0"); model inputs and outputs too.
        constants: parameter → constant's node name; those that the graph computes anew are missing.
        left_out: node of a large constant → what reads its values from the model.
    """

    outline: Any
    tensors: Mapping[TensorId, str]
    constants: Mapping[ParamId, str]
    left_out: Mapping[str, Callable[[], Array]] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Site → its name in the file."""
        return {**self.tensors, **self.constants}

    @property
    def graph_def(self) -> Any:
        """The graph with all values in it, which is as large as the model."""
        import tensorflow as tf

        whole = type(self.outline)()
        whole.CopyFrom(self.outline)
        for node in whole.node:
            if node.name in self.left_out:
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(self.left_out[node.name]()))
        return whole

    def write(self, file: BinaryIO) -> None:
        """Write `graph_def`, one large constant in memory at a time."""
        write_graph_def(self.outline, self.left_out, file)


def frozen(model: KerasModel, *, batch_size: int | None = None) -> FrozenGraph:
    """The model's graph; made once for each batch size.

    Args:
        model: the model.
        batch_size: of the inputs; None leaves it as it is in the model.

    Raises:
        MissingExtraError: TensorFlow isn't installed.
        ModelError: the model can't be traced by TensorFlow.
        CapabilityError: another Keras backend is active, and the model can't be handed to TensorFlow's.
    """
    key = f"frozen/{batch_size}"
    if key not in model.memo:
        with needs_extra("frozen graphs need", "tensorflow"):
            import tensorflow  # noqa: F401
        here = keras.backend.backend() == "tensorflow"
        model.memo[key] = _traced(model, batch_size) if here else _elsewhere(model, batch_size)
    found = model.memo[key]
    assert isinstance(found, FrozenGraph)
    return found


def _traced(model: KerasModel, batch_size: int | None) -> FrozenGraph:
    import tensorflow as tf

    recorded: dict[TensorId, Any] = {}
    operands: dict[ParamId, Any] = {}
    nodes = tuple(model.nodes)

    def call(*inputs: Any) -> list[Any]:
        recorded.clear()
        operands.clear()
        values: dict[TensorId, Any] = dict(zip(model.inputs, inputs, strict=True))
        for node in nodes:
            execute((_with_operands(model, _without_draws(model, node), operands),), values)
            if len(node.outputs) > 1:  # states of a loop have a node of their own only behind it
                values.update({t: tf.identity(values[t]) for t in node.outputs})
        recorded.update(values)
        return [tf.identity(values[t]) for t in model.output_ids]

    specs = [_spec(tf, model, name, batch_size, i) for i, name in enumerate(model.inputs)]
    try:
        with _set(_dropouts(model), 0.0):
            concrete = tf.function(call, input_signature=specs, autograph=False).get_concrete_function()
        names = {t: x.name for t, x in recorded.items() if hasattr(x, "graph") and x.graph is concrete.graph}
        constants = _constant_names(model, concrete)
        constants |= {p: x.op.name for p, x in operands.items() if x.graph is concrete.graph}
        made, left_out = _without_variables(concrete)
    except Exception as error:
        raise ModelError(f"TensorFlow can't freeze {model.name!r}: {first_line(error)}") from error
    outputs = dict(zip(model.output_ids, (t.name for t in made.outputs), strict=True))
    graph_def = made.graph.as_graph_def(add_shapes=True)
    return _renamed(graph_def, names, constants, outputs, left_out)


class _Absent(np.ndarray[Any, Any]):
    """In the place of a large weight's values, which TensorFlow writes as one number for all.

    Attributes:
        variable: that has them.
        shape: theirs.
    """

    variable: Any

    @property  # type: ignore[misc]
    def shape(self) -> Any:
        """The variable's."""
        return tuple(self.variable.shape)


def _without_variables(concrete: Any) -> tuple[Any, dict[str, Any]]:
    """The function with constants in the place of its variables, as `convert_variables_to_constants_v2` makes it, and
    the variables of those that have no values: node → variable. Where TensorFlow lacks what is in `_FREEZING`, all have
    some, which takes more memory."""
    from tensorflow.python.framework import convert_to_constants as tensorflow_freezing

    if not all(hasattr(tensorflow_freezing, name) for name in _FREEZING):
        return tensorflow_freezing.convert_variables_to_constants_v2(concrete), {}

    class Outlined(tensorflow_freezing._FunctionConverterDataInEager):  # type: ignore[misc]
        def _eval(self, tensor: Any) -> Any:
            # A constant that a layer holds is copied into an array here, which would lose the shape.
            variable = hasattr(tensor, "handle") and tensor.dtype.is_floating
            dtype = np.dtype(tensor.dtype.as_numpy_dtype) if variable else None
            if dtype is None or dtype.itemsize * (tensor.shape.num_elements() or 0) < LARGE:
                return super()._eval(tensor)
            absent = np.full((), np.nan, dtype).view(_Absent)
            absent.variable = tensor
            return absent

    found = Outlined(concrete, lower_control_flow=True, aggressive_inlining=False)
    left_out = {name: d.numpy.variable for name, d in found.tensor_data.items() if isinstance(d.numpy, _Absent)}
    size = sum(v.dtype.size * v.shape.num_elements() for v in left_out.values())
    if size > LARGEST:
        raise ValueError(f"it has {size / 2**30:.1f} GiB of weights, and a frozen graph holds less than 2")
    graph_def, converted = tensorflow_freezing._replace_variables_by_constants(converter_data=found)
    return tensorflow_freezing._construct_concrete_function(concrete, graph_def, converted), left_out


def _spec(tf: Any, model: KerasModel, name: TensorId, batch_size: int | None, index: int) -> Any:
    shape = list(model.specs[name].shape)
    if batch_size is not None:
        if shape and shape[0] is None:
            shape[0] = batch_size
        if None in shape:
            raise ModelError(
                f"input {name!r} has free dimensions {list(model.specs[name].shape)} behind the batch; TFLite files "
                "have static shapes: build the model with a fixed input shape"
            )
    return tf.TensorSpec(shape, model.specs[name].dtype, name=f"bitwright_input_{index}")


def _dropouts(model: KerasModel) -> list[tuple[Any, str]]:
    """Dropout of recurrent cells, which draw its masks in inference too and throw them away."""
    names = ("dropout", "recurrent_dropout")
    cells = [x for layer in model.layers for x in layer._flatten_layers() if all(hasattr(x, n) for n in names)]
    return [(x, n) for x in cells for n in names if isinstance(x.__dict__.get(n), int | float)]


@contextmanager
def _set(places: Sequence[tuple[Any, str]], value: Any) -> Iterator[None]:
    """Attributes with another value for a while."""
    held = [(x, name, getattr(x, name)) for x, name in places]
    try:
        for x, name, _ in held:
            setattr(x, name, value)
        yield
    finally:
        for x, name, old in reversed(held):
            setattr(x, name, old)


def _without_draws(model: KerasModel, node: Node) -> Node:
    """An augmenting layer as what it is in inference: some draw numbers and throw them away."""
    if node.type not in AUGMENTATION or model.specs[node.inputs[0]] != model.specs[node.outputs[0]]:
        return node
    return replace(node, operation=keras.layers.Identity(dtype=model.specs[node.outputs[0]].dtype), kwargs={})


def _with_operands(model: KerasModel, node: Node, found: dict[ParamId, Any]) -> Node:
    """The node with its constant operands as TensorFlow constants that can be found again."""
    import tensorflow as tf

    if node.layer is not None or not node.params:
        return node
    dtype = model.specs[node.outputs[0]].dtype  # what Keras computes in: a uint8 image by 255.0 is float32
    for key, param in node.params.items():
        found[param] = tf.constant(constant_of(node, key), dtype)
        node = with_operand(node, key, found[param])
    return node


def _constant_names(model: KerasModel, concrete: Any) -> dict[ParamId, str]:
    """Parameter → the placeholder of its variable, which becomes the constant."""
    handles = {id(external): internal.op.name for external, internal in concrete.graph.captures}
    found: dict[ParamId, str] = {}
    for param, place in canonical(model).places.items():
        if place.node.layer is None:
            continue
        variable = variables_of(place.node.layer)[place.key]
        handle = getattr(variable.value, "handle", None)
        if handle is not None and id(handle) in handles:
            found[param] = handles[id(handle)]
    return found


def _renamed(
    graph_def: Any,
    tensors: Mapping[TensorId, str],
    constants: Mapping[ParamId, str],
    outputs: Mapping[TensorId, str],
    variables: Mapping[str, Any],
) -> FrozenGraph:
    """Nodes called by the sites that they compute; the outputs' Identity nodes are left out."""
    nodes = {n.name: n for n in graph_def.node}
    known = {t: n for t, n in tensors.items() if n.rpartition(":")[0] in nodes}
    passed = {n: _source(nodes, n) for n in {*known.values(), *outputs.values()}}
    known = {t: passed[n] for t, n in {**known, **outputs}.items()}
    fresh: dict[str, str] = {}
    given: set[str] = set()
    taken = set(nodes)
    for site, old in [*((t, n.rpartition(":")[0]) for t, n in known.items()), *constants.items()]:
        name = re.sub(r":\d+$", "", site)
        if old in fresh or name in given or old not in nodes or _PLAIN.fullmatch(name) is None:
            continue
        if name in taken and name != old:
            spare = free_name(f"{name}/inner", taken)
            fresh.setdefault(name, spare)
            taken.add(spare)
        fresh[old] = name
        given.add(name)
        taken.add(name)
    left = type(graph_def)(versions=graph_def.versions, library=graph_def.library)
    flows = any(n.op in ("Switch", "Enter") for n in graph_def.node)
    for node in _needed(graph_def, nodes, {n.rpartition(":")[0] for n in known.values()}, flows):
        copy = left.node.add()
        copy.CopyFrom(node)
        copy.name = fresh.get(node.name, node.name)
        del copy.input[:]
        copy.input.extend(_moved(i, fresh) for i in _inputs(node, flows))
    names = {t: _moved(n, fresh) for t, n in known.items()}
    present = {n.name for n in left.node}
    held = {p: fresh.get(n, n) for p, n in constants.items()}
    left_out = {fresh.get(n, n): _reading(v) for n, v in variables.items()}
    return FrozenGraph(
        left,
        names,
        {p: n for p, n in held.items() if n in present},
        {n: read for n, read in left_out.items() if n in present},
    )


def _reading(variable: Any) -> Callable[[], Array]:
    return lambda: np.asarray(variable.numpy())


def _source(nodes: Mapping[str, Any], tensor: str) -> str:
    """What a chain of Identity nodes passes on; tf.function puts one at each output."""
    while (node := nodes[tensor.rpartition(":")[0]]).op == "Identity":
        source = node.input[0]
        if nodes[source.partition(":")[0]].op == "Const":
            break
        tensor = source if ":" in source else f"{source}:0"
    return tensor


def _needed(graph_def: Any, nodes: Mapping[str, Any], ends: set[str], flows: bool) -> list[Any]:
    """Nodes that the ends are computed from."""
    found: set[str] = set()
    stack = list(ends)
    while stack:
        name = stack.pop()
        if name in found:
            continue
        found.add(name)
        stack += [i.lstrip("^").partition(":")[0] for i in _inputs(nodes[name], flows)]
    return [n for n in graph_def.node if n.name in found]


def _inputs(node: Any, flows: bool) -> list[str]:
    """What a node reads, and in a graph that branches or loops (`flows`) what it waits for if it reads nothing: so a
    constant is of its branch and its loop. Other control edges only order reads of variables, which are gone."""
    data = [i for i in node.input if not i.startswith("^")]
    return data or (list(node.input) if flows else [])


def _moved(reference: str, fresh: Mapping[str, str]) -> str:
    control, plain = ("^", reference[1:]) if reference.startswith("^") else ("", reference)
    name, colon, index = plain.partition(":")
    return f"{control}{fresh.get(name, name)}{colon}{index}"


# -- under another Keras backend


def _elsewhere(model: KerasModel, batch_size: int | None) -> FrozenGraph:
    """The graph traced by a process in which Keras runs on TensorFlow."""
    from tensorflow.core.framework import graph_pb2

    from bitwright_keras.capture.files import save_model

    with Scratch() as folder:
        source = save_model(model, folder / "model.keras")
        result = folder / "graph.pb"
        command = [
            sys.executable,
            "-m",
            "bitwright_keras.export.frozen",
            str(source),
            str(result),
            str(batch_size or ""),
        ]
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise CapabilityError(
                f"TensorFlow graphs of {model.name!r} need Keras on TensorFlow, and the model can't be handed over: "
                f"{said[-1][:300] if said else 'no message'}; run with KERAS_BACKEND=tensorflow"
            )
        graph_def = graph_pb2.GraphDef.FromString(result.read_bytes())
        found = json.loads(result.with_suffix(".json").read_text())
    left_out = {node: _value(model, param) for node, param in found["left_out"].items()}
    return FrozenGraph(graph_def, found["tensors"], found["constants"], left_out)


def _value(model: KerasModel, param: ParamId) -> Callable[[], Array]:
    return lambda: native_value(canonical(model).places[param])


def _main(source: str, result: str, batch_size: str) -> None:
    from tensorflow.core.framework import types_pb2

    from bitwright_keras.capture.files import load_model

    found = frozen(load_model(Path(source)), batch_size=int(batch_size) if batch_size else None)
    # The other process has these parameters too, in this type; what else there may be goes with the graph.
    types = {node.name: node.attr["dtype"].type for node in found.outline.node if node.name in found.left_out}
    params = {n: p for p, n in found.constants.items() if types.get(n) == types_pb2.DT_FLOAT}
    names = {"tensors": dict(found.tensors), "constants": dict(found.constants), "left_out": params}
    Path(result).with_suffix(".json").write_text(json.dumps(names))
    with Path(result).open("wb") as file:
        write_graph_def(found.outline, {n: v for n, v in found.left_out.items() if n not in params}, file)


if __name__ == "__main__":
    _main(*sys.argv[1:])
