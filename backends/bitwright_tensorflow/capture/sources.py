"""From what users hold (sessions, checkpoints, SavedModels, functions, frozen files) to a `TfModel`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from bitwright.backend import Fault, Finding
from bitwright.errors import InputError, ModelError, unknown_name
from bitwright.graph import TensorId
from bitwright_tensorflow.capture.assignments import look_at_assignments
from bitwright_tensorflow.capture.bombs import refuse_bombs
from bitwright_tensorflow.capture.branches import take_branches
from bitwright_tensorflow.capture.comparing import of_function, of_session
from bitwright_tensorflow.capture.inline import CALLS, flatten, inline_calls
from bitwright_tensorflow.capture.normalize import normalize
from bitwright_tensorflow.capture.restoring import has_checkpoint, restored, session_values
from bitwright_tensorflow.capture.trust import refuse_outside
from bitwright_tensorflow.graph.graphs import Wiring
from bitwright_tensorflow.graph.model import (
    VARIABLES,
    GraphDef,
    Kind,
    MetaGraphDef,
    Signature,
    TfModel,
    node_of,
    tensor_id,
)
from bitwright_tensorflow.graph.rewriter import constant
from bitwright_tensorflow.graph.runtime import reason
from bitwright_tensorflow.graph.sizes import refuse_computed

Names = Sequence[Any] | Mapping[str, Any] | str | None


@dataclass(frozen=True)
class SessionModel:
    """A TF 1 session and which of its tensors are the network: what `QuantSim` takes for a session.

    Attributes:
        session: with all variables initialized. It isn't changed.
        inputs: tensors that are fed: names ("x", "x:0") or tensors, or a mapping of argument names to them. By default
            the placeholders that the outputs depend on.
        outputs: the network's results (logits rather than a loss), likewise.
        constants: placeholders that are no data ("is_training", "keep_prob") and the value that inference gives them.
    """

    session: Any
    outputs: Names
    inputs: Names = None
    constants: Mapping[str, Any] = field(default_factory=dict)


def owns(model: object) -> bool:
    """Whether an object is something that this backend opens. Keras models are Keras's, saved ones excepted."""
    if isinstance(model, TfModel | SessionModel | tf.compat.v1.Session | GraphDef):
        return True
    if any(base.__module__.partition(".")[0] in ("keras", "tf_keras") for base in type(model).__mro__):
        return False
    if _is_concrete(model) or _is_function(model):
        return True
    loaded = bool(getattr(model, "signatures", None)) and type(model).__module__.startswith("tensorflow")
    return loaded or isinstance(model, tf.Module)


def adopt(model: object, sample: Any = None) -> TfModel:
    """What the user holds, as a `TfModel`.

    Args:
        model: a `SessionModel`, a concrete function, a `tf.function` or `tf.Module` (with a sample), what
            `tf.saved_model.load` returns, a frozen GraphDef, or a `TfModel`.
        sample: arguments that a `tf.function` is traced with: an array, a tuple, or a mapping by argument name. The
            first axis is left free where the function can be traced so.

    Raises:
        InputError: outputs or a sample are missing, or name what isn't there.
        ModelError: the model can't be opened.
    """
    if isinstance(model, TfModel):
        return model
    if isinstance(model, SessionModel):
        return from_session(model)
    if isinstance(model, tf.compat.v1.Session):
        raise InputError(
            "a session holds many tensors: say which are the network's, "
            "bitwright_tensorflow.SessionModel(session, inputs=['x'], outputs=['logits'])"
        )
    if isinstance(model, GraphDef):
        return from_frozen(model)
    if _is_concrete(model):
        return _compared(model, Kind.FUNCTION)
    signatures = getattr(model, "signatures", None)
    if signatures and not _is_function(model):
        return _compared(signature_of(signatures, None), Kind.SAVED_MODEL)
    if _is_function(model):
        return _compared(_traced(model, sample), Kind.FUNCTION, sample)
    if isinstance(model, tf.Module) and callable(model):
        return _of_module(model, sample)
    raise InputError(f"a {type(model).__name__} is not a TensorFlow model; give a function, a session or a SavedModel")


def _compared(function: Any, kind: Kind, sample: Any = None) -> TfModel:
    """The capture of a function that the user holds, compared with it."""
    model = from_concrete(function, kind)
    _refuse(of_function(function, model, sample))
    return model


def _of_module(module: Any, sample: Any) -> TfModel:
    """The capture of an object that is called, compared with its calls, whose Python runs each time."""
    function = _traced(tf.function(module), sample)
    model = from_concrete(function, Kind.FUNCTION)
    finding = of_function(function, model, sample, called=module)
    if finding is not None and finding.fault is Fault.SIZE:
        fixed = _traced(tf.function(module), sample, free=False)
        model, reason = from_concrete(fixed, Kind.FUNCTION), finding
        finding = of_function(fixed, model, sample, called=module)
        if finding is None:
            warnings.warn(f"the model is captured for the sample's number of samples alone: {reason}", stacklevel=3)
    _refuse(finding)
    return model


def _refuse(finding: Finding | None) -> None:
    if finding is not None:
        raise ModelError(f"the model can't be captured: {finding}")


# -- sessions


def from_session(given: SessionModel) -> TfModel:
    """The graph of a session with all its collections, and its variables' contents.

    Raises:
        InputError: a name that isn't in the graph, or no outputs.
        ModelError: a variable isn't initialized.
    """
    graph = given.session.graph
    with graph.as_default():
        meta = tf.compat.v1.train.export_meta_graph(graph=graph, clear_devices=True)
    model = open_graph(meta, lambda: session_values(given.session), given, Kind.SESSION)
    _refuse(of_session(given.session, model, given.constants))
    return model


def from_meta(path: Path, checkpoint: Path | None, inputs: Names, outputs: Names, constants: Any = None) -> TfModel:
    """A .meta file with its checkpoint (by default of the same name).

    Raises:
        InputError: no such file, or it is something else.
        ModelError: the checkpoint lacks a variable.
    """
    meta = MetaGraphDef()
    try:
        meta.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is not a MetaGraph: {error}") from error
    prefix = str(checkpoint or path.with_suffix(""))
    if not has_checkpoint(prefix):
        raise InputError(f"there is no checkpoint {prefix!r}; name it: load(path, checkpoint=…)")
    signature = next(iter(meta.signature_def.values()), None)
    if outputs is None and signature is not None:
        outputs = {k: v.name for k, v in signature.outputs.items()}
        inputs = {k: v.name for k, v in signature.inputs.items()} if inputs is None else inputs
    given = SessionModel(None, outputs, inputs, constants or {})
    return open_graph(meta, lambda: restored(meta, prefix), given, Kind.SESSION, str(path))


def open_graph(meta: MetaGraphDef, values: Any, given: SessionModel, kind: Kind, file: str = "") -> TfModel:
    """A `TfModel` of a graph with variables in it; `values` reads them once the names are known to be right.

    Args:
        meta: the caller's own.
        values: reads the variables.
        given: inputs, outputs and constants.
        kind: of the source.
        file: that it came from; what its graph may do is then looked at.
    """
    if file:
        refuse_bombs(meta.graph_def, file)
    wiring = Wiring(meta.graph_def)
    _fix_constants(wiring, given.constants)
    outputs = _named(wiring, given.outputs, "outputs")
    if not outputs:
        raise InputError(
            f"which tensors{f' of {file}' if file else ''} are the network's results? Name them, outputs=['logits']"
            + (
                f": TensorFlowBackend().load({Path(file).name!r}, outputs=['logits']), on the command line "
                "--load outputs=logits"
                if file
                else ""
            )
        )
    inputs = _named(wiring, given.inputs, "inputs")
    if not inputs:
        inputs = {n.removesuffix(":0"): n for n in _placeholders(wiring, list(outputs.values()))}
    if not inputs:
        raise InputError("no placeholder feeds the outputs; name the tensors that the data go into: inputs=[…]")
    if missing := set(_placeholders(wiring, list(outputs.values()), set(inputs.values()))) - set(inputs.values()):
        first = min(missing)
        raise InputError(
            f"the outputs depend on the placeholder {first!r} too; name it among the inputs, or give its value in "
            f"inference: constants={{{first.removesuffix(':0')!r}: …}}"
        )
    if file:
        refuse_outside(meta.graph_def, list(outputs.values()), file)
    _flatten(meta.graph_def, list(inputs.values()), list(outputs.values()), kind, file)
    nodes = {node.name: node for node in meta.graph_def.node}
    look_at_assignments(nodes, list(inputs.values()), list(outputs.values()), {}, whole=False)
    normalize(meta.graph_def, list(inputs.values()), list(outputs.values()))
    return TfModel(meta, values(), tuple(inputs.values()), tuple(outputs.values()), kind, Signature(inputs, outputs))


def _flatten(graph_def: GraphDef, inputs: list[TensorId], outputs: list[TensorId], kind: Kind, file: str) -> None:
    """Calls between inputs and outputs inlined, and conditions that inference always decides the same way."""
    before: set[str] = set()
    by_default: dict[str, bool] = {}
    while True:
        # A session's graph is trained by feeding what its conditions hang on: nothing but `constants` decides them.
        taken = take_branches(graph_def, inputs, outputs, defaults=kind is not Kind.SESSION)
        by_default |= taken.by_default
        wiring = Wiring(graph_def)
        calls = {n for n in wiring.order(outputs, set(inputs)) if wiring.nodes[n].op in CALLS}
        if not calls or (calls <= before and not taken.changed):  # what is left is compiled as a whole
            break
        before = calls
        ends = [f"{n}:0" for n in wiring.nodes if not wiring.readers.get(f"{n}:0")]
        graph_def.CopyFrom(inline_calls(graph_def, [*inputs, *outputs, *ends]))
        if file:
            refuse_computed(graph_def, file)
    if by_default:
        told = ", ".join(f"{name!r} is {value}" for name, value in by_default.items())
        warnings.warn(
            f"conditions between inputs and outputs are decided by defaults of placeholders ({told}), and the other "
            f"branches aren't in the network; to choose them, or to have it so without this warning, give the values "
            f"in inference: {_as_constants(by_default, file)}",
            stacklevel=2,
        )
    if taken.undecided:
        name = taken.undecided[0]
        warnings.warn(
            f"conditions between inputs and outputs hang on the placeholder {name!r}, so they are left as they are, in "
            f"float, with the batch norms in them; give its value in inference: constants={{{name!r}: False}}",
            stacklevel=2,
        )


def _as_constants(values: Mapping[str, bool], file: str) -> str:
    """How a user gives them."""
    given = f"constants={dict(values)}"
    if not Path(file).exists():
        return f"a SessionModel of a session that the graph is imported into, {given}"
    told = json.dumps(dict(values))
    return f"TensorFlowBackend().load({Path(file).name!r}, {given}), on the command line --load 'constants={told}'"


def _fix_constants(wiring: Wiring, constants: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        node = wiring.nodes.get(str(name).partition(":")[0])
        if node is None or not node.op.startswith("Placeholder"):
            placeholders = [n for n, other in wiring.nodes.items() if other.op.startswith("Placeholder")]
            raise InputError(
                f"constants: the graph has no placeholder {name!r}{unknown_name(str(name), placeholders, listed=False)}"
            )
        dtype = tf.as_dtype(node.attr["dtype"].type)
        node.CopyFrom(constant(node.name, np.asarray(value, dtype.as_numpy_dtype), dtype.name))


def _named(wiring: Wiring, given: Names, what: str) -> dict[str, TensorId]:
    if given is None:
        return {}
    if isinstance(given, str) or hasattr(given, "op"):
        given = [given]
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, g) for g in given]
    named: dict[str, TensorId] = {}
    for key, item in pairs:
        tensor = tensor_id(str(getattr(item, "name", item)))
        if tensor.partition(":")[0] not in wiring.nodes:
            raise InputError(f"{what}: the graph has no tensor {tensor!r}{_nearest(wiring, tensor)}")
        named[str(key) if key is not None else tensor.removesuffix(":0")] = tensor
    return named


def _nearest(wiring: Wiring, tensor: TensorId) -> str:
    """A hint at the name that was meant: the same in a scope, or a similar one."""
    name = tensor.partition(":")[0]
    scoped = sorted((n for n in wiring.nodes if n.endswith(f"/{name}")), key=lambda n: (n.count("/"), n))
    return f"; did you mean {scoped[0]!r}?" if scoped else unknown_name(name, wiring.nodes, listed=False)


def _placeholders(wiring: Wiring, outputs: Sequence[TensorId], inputs: set[TensorId] | None = None) -> list[TensorId]:
    order = wiring.order(outputs, inputs or ())
    return [f"{n}:0" for n in order if wiring.nodes[n].op in ("Placeholder", "PlaceholderV2")]


# -- functions


def from_concrete(function: Any, kind: Kind, key: str = "serving_default") -> TfModel:
    """A concrete function, its calls inlined.

    Raises:
        ModelError: it has no tensor inputs or outputs, or captures what is not a variable.
    """
    captured = {inner.name for _, inner in function.graph.captures}
    inputs = {t.name.removesuffix(":0"): t.name for t in function.graph.inputs if t.name not in captured}
    structured = function.structured_outputs
    flat = tf.nest.flatten(structured)
    if isinstance(structured, Mapping) and len(flat) == len(structured):
        names = [str(name) for name in sorted(structured)]  # the order in which TensorFlow flattens a mapping
    else:
        names = ["output"] if len(flat) == 1 else [f"output_{i}" for i in range(len(flat))]
    tensors = [t.name for t in function.graph.outputs]
    if len(tensors) != len(flat) or not tensors or not inputs:
        raise ModelError("the function must take and return tensors, and nothing else")
    graph_def, values, placed, ends = flatten(function, inputs, dict(zip(names, tensors, strict=True)))
    normalize(graph_def, list(placed.values()), list(ends.values()))
    meta = MetaGraphDef()
    meta.graph_def.CopyFrom(graph_def)
    signature = Signature(placed, ends, key)
    return TfModel(meta, values, tuple(placed.values()), tuple(dict.fromkeys(ends.values())), kind, signature)


def default_key(signatures: Mapping[str, Any]) -> str:
    """Which signature of a SavedModel is opened if none is named.

    Raises:
        InputError: it has none.
    """
    if not signatures:
        raise InputError("the SavedModel has no signature; save it with signatures=…")
    return "serving_default" if "serving_default" in signatures else min(signatures)


def signature_of(signatures: Mapping[str, Any], key: str | None) -> Any:
    """The signature of that name, or the default one.

    Raises:
        InputError: there is none.
    """
    name = key or default_key(signatures)
    if name not in signatures:
        raise InputError(f"there is no signature {name!r}; there are {', '.join(sorted(signatures))}")
    return signatures[name]


# -- frozen graphs


def from_frozen(
    graph_def: GraphDef,
    inputs: Names = None,
    outputs: Names = None,
    file: str = "the graph",
    constants: Mapping[str, Any] | None = None,
) -> TfModel:
    """A graph whose weights are constants. By default the inputs are its placeholders, the outputs what depends on
    them and nothing reads; placeholders may have values in inference, `constants`.

    Raises:
        InputError: unknown names, no inputs or no outputs.
        ModelError: it holds variables, whose values no frozen graph has, or it reaches outside of itself.
    """
    own = GraphDef()
    own.CopyFrom(graph_def)
    if held := [n.name for n in own.node if n.op in VARIABLES]:
        raise ModelError(f"the graph holds the variable {held[0]!r} without its value; freeze it, or open its session")
    wiring = Wiring(own)
    if outputs is None:
        given = [node_of(tensor) for tensor in _named(wiring, inputs, "inputs").values()]
        read = {i.lstrip("^").partition(":")[0] for n in own.node for i in n.input}
        idle = ("Const", "NoOp", "Assert", "Placeholder")
        fed = _fed(own, given or [n.name for n in own.node if n.op.startswith("Placeholder")])
        outputs = [n.name for n in own.node if n.name not in read and n.op not in idle and n.name in fed]
    meta = MetaGraphDef()
    meta.graph_def.CopyFrom(own)
    del wiring
    return open_graph(meta, dict, SessionModel(None, outputs, inputs, constants or {}), Kind.FROZEN, file)


def _fed(graph_def: GraphDef, inputs: Sequence[str]) -> set[str]:
    """Nodes that depend on some, with these."""
    readers: dict[str, list[str]] = {}
    for node in graph_def.node:
        for operand in node.input:
            readers.setdefault(operand.lstrip("^").partition(":")[0], []).append(node.name)
    waiting = list(inputs)
    found = set(waiting)
    while waiting:
        new = [name for name in readers.get(waiting.pop(), ()) if name not in found]
        found.update(new)
        waiting += new
    return found


def read_frozen(path: Path) -> GraphDef:
    """A GraphDef file.

    Raises:
        InputError: no such file, or it is something else.
    """
    graph_def = GraphDef()
    try:
        graph_def.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is not a frozen graph: {error}") from error
    if not graph_def.node:
        raise InputError(f"{path} is not a frozen graph: it has no nodes")
    return graph_def


# -- tracing


def _is_concrete(model: object) -> bool:
    return all(hasattr(model, name) for name in ("graph", "captured_inputs", "structured_outputs"))


def _is_function(model: object) -> bool:
    return hasattr(model, "get_concrete_function")


def _traced(function: Any, sample: Any, *, free: bool = True) -> Any:
    """A concrete function for a sample's types, the first axis free if that is wanted and possible."""
    if sample is None:
        if getattr(function, "input_signature", None) is not None:
            return function.get_concrete_function()
        raise InputError(
            "a tf.function without input_signature needs a sample batch to be traced: QuantSim(function, sample, …)"
        )
    failure: Exception | None = None
    for so in (True, False) if free else (False,):
        try:
            if isinstance(sample, Mapping):
                return function.get_concrete_function(**{k: _spec(v, so, str(k)) for k, v in sample.items()})
            arguments = sample if isinstance(sample, tuple | list) else (sample,)
            return function.get_concrete_function(*(_spec(v, so) for v in arguments))
        except Exception as error:  # whatever the user's Python raises while it is traced
            failure = failure or error
    raise ModelError(f"the function can't be traced with this sample: {reason(failure or ValueError())}") from failure


def _spec(value: Any, free: bool, name: str | None = None) -> tf.TensorSpec:
    array = np.asarray(value)
    shape = (None, *array.shape[1:]) if free and array.ndim else array.shape
    return tf.TensorSpec(shape, tf.as_dtype(array.dtype), name)
