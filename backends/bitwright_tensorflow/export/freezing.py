"""The inference graph by itself: with constants for its variables, or as a TF 2 module with a signature."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import silenced
from bitwright.errors import ModelError
from bitwright.files import atomic_write, cannot_write, staging, temporaries_in, write_graph_def, written_beside
from bitwright.graph import free_name
from bitwright_tensorflow.graph.graphs import extract
from bitwright_tensorflow.graph.model import VARIABLES, Array, GraphDef, NodeDef, TfModel, node_of
from bitwright_tensorflow.graph.rewriter import constant
from bitwright_tensorflow.graph.shapes import inference

LARGEST = 2**31 - 1
"""Bytes that a protobuf message holds at most."""
LARGE = 2**16
"""Bytes of a variable whose values are put in when a frozen graph is written."""


def inference_graph(model: TfModel) -> GraphDef:
    """Only the nodes between inputs and outputs, variables as they are."""
    part = inference(model)
    graph_def, _ = extract(model.graph_def, model.inputs, model.outputs, part.spec, controlled=part.controlled)
    present = {node.name for node in graph_def.node}
    # An input that no output depends on is still one of the model's arguments.
    for tensor in model.inputs:
        if (name := node_of(tensor)) not in present:
            graph_def.node.append(part.wiring.nodes[name])
    _name_functions(graph_def)
    return graph_def


def _name_functions(graph_def: GraphDef) -> None:
    """Give the bodies of loops and conditions names of this graph's own, which follow from what they hold.

    TensorFlow knows one function by a name in a process, and may hold the source's, from which these differ.
    """
    library = graph_def.library
    if not library.function:
        return
    ending = hashlib.sha256(library.SerializeToString(deterministic=True)).hexdigest()[:8]
    names = {f.signature.name: f"{f.signature.name}_{ending}" for f in library.function}
    for function in library.function:
        function.signature.name = names[function.signature.name]
    for gradient in library.gradient:
        gradient.function_name = names.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = names.get(gradient.gradient_func, gradient.gradient_func)
    for node in [*graph_def.node, *(n for f in library.function for n in f.node_def)]:
        for value in node.attr.values():
            for called in [*([value.func] if value.HasField("func") else ()), *value.list.func]:
                called.name = names.get(called.name, called.name)


def frozen_graph(model: TfModel) -> GraphDef:
    """The inference graph with constants in the place of variables; names of nodes and tensors stay.

    A variable's node becomes the constant, the nodes that read it become Identities.

    Raises:
        ModelError: the body of a loop or condition reads a variable.
    """
    graph_def, left_out = _frozen_outline(model)
    for node in graph_def.node:
        if node.name in left_out:
            node.CopyFrom(constant(node.name, left_out[node.name], left_out[node.name].dtype.name))
    return graph_def


def _frozen_outline(model: TfModel) -> tuple[GraphDef, dict[str, Array]]:
    """`frozen_graph` without the values of large variables, and these by node."""
    graph_def = inference_graph(model)
    left_out: dict[str, Array] = {}
    held: set[str] = set()
    references = {n.name for n in graph_def.node if n.op in VARIABLES and n.op != "VarHandleOp"}
    for node in graph_def.node:
        if node.op in VARIABLES:
            held.add(node.name)
            kind = tf.as_dtype(node.attr["dtype"].type).base_dtype
            array = np.asarray(model.values[node.name])
            if array.nbytes >= LARGE and array.dtype == kind.as_numpy_dtype and kind.is_floating:
                left_out[node.name] = array
                made = NodeDef(name=node.name, op="Const")
                made.attr["dtype"].type = made.attr["value"].tensor.dtype = kind.as_datatype_enum
                made.attr["value"].tensor.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
            else:
                made = constant(node.name, array, kind.name)
            node.CopyFrom(made)
    _rewrite_readers(graph_def, held, _to_identity)
    for node in graph_def.node:
        if not any(value.HasField("func") for value in node.attr.values()):
            continue
        inner = [source for source in map(node_of, node.input) if source in held - references]
        if inner:
            raise ModelError(
                f"{node.op} {node.name!r} reads the variable {inner[0]!r} inside of its body, where a frozen graph can "
                "have no constant; export as saved_model or meta, or read the variable before the loop or condition"
            )
    return graph_def, left_out


def _rewrite_readers(graph_def: GraphDef, held: set[str], rewrite: Any) -> None:
    """Rewrite the nodes that read variables, those behind Identities of handles too."""
    nodes = {node.name: node for node in graph_def.node}
    found = True
    while found:
        found = False
        for node in nodes.values():
            if node.name in held or not node.input or node_of(node.input[0]) not in held:
                continue
            if node.op in ("Identity", "ReadVariableOp"):
                if node.op == "Identity" and node.attr["T"].type == tf.resource.as_datatype_enum:
                    held.add(node.name)
                    found = True
                rewrite(node, nodes[node_of(node.input[0])])


def _to_identity(node: NodeDef, source: NodeDef) -> None:
    kind = source.attr["dtype"].type or source.attr["T"].type
    node.op = "Identity"
    node.attr.clear()
    node.attr["T"].type = kind


def save_frozen(model: TfModel, path: Path) -> Path:
    """Write a frozen .pb, large weights one by one.

    Raises:
        InputError: the file can't be written.
        ModelError: the graph is larger than a .pb can be.
    """
    outline, left_out = _frozen_outline(model)
    if outline.ByteSize() + sum(array.nbytes for array in left_out.values()) > LARGEST:
        raise ModelError("the frozen graph exceeds 2 GiB, which a .pb can't hold; export as meta or saved_model")
    with atomic_write(path) as file:
        write_graph_def(outline, {name: partial(np.asarray, array) for name, array in left_out.items()}, file)
    return path


class InferenceModule(tf.Module):  # type: ignore[misc]
    """A model's inference graph as a `tf.Module`: variables under their own names, and one function.

    Args:
        model: its graph is imported into the function, under its own names.
    """

    def __init__(self, model: TfModel) -> None:
        super().__init__(name="inference")
        graph_def = inference_graph(model)
        handles = {n.name: n for n in graph_def.node if n.op in VARIABLES}
        self.weights = {
            name: tf.Variable(np.asarray(model.values[name]), name=name, dtype=_base(node))
            for name, node in handles.items()
        }
        _resources(graph_def, set(handles))
        fed = {node_of(t) for t in model.inputs}
        kept = [n for n in graph_def.node if n.name not in handles and n.name not in fed]
        del graph_def.node[:]
        graph_def.node.extend(kept)
        signature = model.signature
        part = inference(model)
        keys = _identifiers(signature.inputs)
        specs = {
            keys[name]: tf.TensorSpec(part.spec(tensor)[1], part.spec(tensor)[0], keys[name])
            for name, tensor in signature.inputs.items()
        }

        def run(**arguments: Any) -> Mapping[str, Any]:
            graph = tf.compat.v1.get_default_graph()
            feeds = {f"{n}:0": graph.capture(v.handle) for n, v in self.weights.items()}
            feeds |= {tensor: arguments[keys[name]] for name, tensor in signature.inputs.items()}
            used = {i for n in graph_def.node for i in (_tensor(o) for o in n.input)} | set(signature.outputs.values())
            inner = [t for t in signature.outputs.values() if t not in feeds]
            made = tf.graph_util.import_graph_def(
                graph_def, {t: v for t, v in feeds.items() if t in used}, return_elements=inner, name=""
            )
            results = dict(zip(inner, made, strict=True)) | feeds
            return {name: results[tensor] for name, tensor in signature.outputs.items()}

        self.function = tf.function(run, autograph=False)
        self.concrete = self.function.get_concrete_function(**specs)


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """Names of arguments as TensorFlow takes them: "input/x" becomes "input_x"; they stay distinct."""
    names, found = list(names), dict[str, str]()
    # TensorFlow takes no leading underscore or digit.
    taken = {name for name in names if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII)}
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        found[name] = name if name in taken else free_name(plain if plain[0].isalpha() else f"arg_{plain}", taken)
        taken.add(found[name])
    return found


def _tensor(operand: str) -> str:
    return operand if ":" in operand else f"{operand}:0"


def _base(node: NodeDef) -> tf.DType:
    return tf.as_dtype(node.attr["dtype"].type).base_dtype


def _resources(graph_def: GraphDef, held: set[str]) -> None:
    """Let the readers of TF 1 reference variables read resource variables."""
    nodes = {node.name: node for node in graph_def.node}
    old = {n for n in held if nodes[n].op != "VarHandleOp"}
    for node in list(graph_def.node):
        if node.op == "Identity" and node_of(node.input[0]) in old:
            kind = node.attr["T"].type
            node.op = "ReadVariableOp"
            node.attr.clear()
            node.attr["dtype"].type = kind
        elif node.name not in held:
            for index, operand in enumerate(node.input):
                if node_of(operand) in old and not operand.startswith("^"):
                    read = _read(graph_def, nodes, node_of(operand))
                    node.input[index] = read


def _read(graph_def: GraphDef, nodes: dict[str, NodeDef], name: str) -> str:
    read = f"{name}/bitwright_read"
    if read not in nodes:
        node = graph_def.node.add()
        node.name, node.op = read, "ReadVariableOp"
        node.input.append(name)
        node.attr["dtype"].type = nodes[name].attr["dtype"].type
        nodes[read] = node
    return read


def remove_parts(folder: Path) -> None:
    """Remove folders of parts beside a checkpoint: TensorFlow merges them, and is silent where it can't remove one."""
    for parts in folder.glob("*_temp*"):
        if parts.is_dir():
            shutil.rmtree(parts, ignore_errors=True)


def save_saved_model(model: TfModel, path: Path) -> Path:
    """Write a SavedModel folder, whole or not at all; one that is there is replaced.

    Raises:
        InputError: it can't be written.
    """
    module = InferenceModule(model)
    try:
        with written_beside(path) as folder, staging(path.parent) as scratch, temporaries_in(scratch):
            made = folder / path.name
            with silenced("tensorflow"):  # that a function can't be translated, on a disk that fails
                tf.saved_model.save(module, str(made), signatures={model.signature.key: module.concrete})
            remove_parts(made / "variables")
    except tf.errors.OpError as error:
        raise cannot_write(path, OSError(0, str(error))) from error
    return path
