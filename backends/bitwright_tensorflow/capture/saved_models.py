"""SavedModel folders of TF 2 and TF 1, opened without running what they bring along.

TensorFlow's loader runs the initializers of a SavedModel's resources, and its objects' own functions for restoring
them; an optimizer of Keras 2 it can only revive with Keras 2. None of this is needed to read a network and its
weights, so a copy of the description without it is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from bitwright.errors import BitwrightError, InputError, ModelError
from bitwright.files import Scratch, cannot_write
from bitwright.graph import TensorId
from bitwright_tensorflow.capture.bombs import refuse_bombs
from bitwright_tensorflow.capture.restoring import has_checkpoint, restored
from bitwright_tensorflow.capture.sources import SessionModel, default_key, from_concrete, open_graph, signature_of
from bitwright_tensorflow.capture.trust import refuse_outside
from bitwright_tensorflow.graph.model import Kind, MetaGraphDef, Signature, TfModel
from bitwright_tensorflow.graph.runtime import reason
from bitwright_tensorflow.graph.sizes import refuse_computed

SERVE = ("serve",)
_PLAIN_OBJECTS = ("_generic_user_object", "signature_map", "trackable_")
"""Kinds of objects that only hold others; all others are loaded as such."""
_INERT = {"_initialize", "_destroy_resource", "_create_resource"}


def from_saved_model(
    path: Path, key: str | None = None, tags: Sequence[str] = SERVE, constants: Mapping[str, Any] | None = None
) -> TfModel:
    """A SavedModel folder, of TF 2 or TF 1.

    Args:
        path: the folder.
        key: which signature; "serving_default" or else the first.
        tags: of the MetaGraph.
        constants: values of placeholders that are no data, in a graph of TF 1.

    Raises:
        InputError: no SavedModel, no such signature, or constants for functions, into which nobody feeds any.
        ModelError: it can't be loaded, or it reaches outside of itself.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is not a SavedModel: {error}") from error
    found = [m for m in saved.meta_graphs if set(m.meta_info_def.tags) == set(tags)]
    if not found:
        there = "; ".join(",".join(m.meta_info_def.tags) for m in saved.meta_graphs)
        raise InputError(f"{path} has no graph with the tags {', '.join(tags)}; there is {there}")
    meta = found[0]
    try:
        if not (meta.HasField("object_graph_def") and meta.object_graph_def.nodes):
            return _first_generation(path, meta, key, constants or {})
        if constants:
            raise InputError(
                f"{path} holds functions, whose placeholders nobody feeds: constants are for graphs of TF 1; trace the "
                "function with the value that inference takes"
            )
        signatures = {k: s for k, s in meta.signature_def.items() if not k.startswith("__")}
        refuse_bombs(meta.graph_def, str(path))
        name = key or default_key(signatures)
        ends = [t.name for t in signature_of(signatures, name).outputs.values()]
        refuse_outside(meta.graph_def, ends, str(path))
        with _inert(saved, path) as folder:
            # Optimizers' variables find no object; a network's that has no value is noticed when it is read.
            options = tf.saved_model.LoadOptions(allow_partial_checkpoint=True)
            try:
                loaded = tf.saved_model.load(str(folder), tags=list(tags), options=options)
            except Exception as error:  # some of its errors derive from nothing else, as NotEncodableError
                raise ModelError(f"the SavedModel {path} can't be loaded: {reason(error)}") from error
        model = from_concrete(signature_of(loaded.signatures, name), Kind.SAVED_MODEL, name)
        refuse_computed(model.graph_def, str(path))  # what functions compute of constants that they are given
        return model
    except BitwrightError:
        raise
    except (tf.errors.OpError, OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError,
            RuntimeError) as error:  # fmt: skip
        # TensorFlow's loader takes a description at its word, and falls over one that contradicts itself; ops that it
        # doesn't know (a custom one whose library isn't loaded) are a RuntimeError.
        raise ModelError(f"the SavedModel {path} can't be loaded: {reason(error)}") from error


@contextmanager
def _inert(saved: Any, path: Path) -> Iterator[Path]:
    """A folder with the same variables, and a description of them and of the functions alone."""
    for meta in saved.meta_graphs:
        for node in meta.object_graph_def.nodes:
            del node.slot_variables[:]
            node.saveable_objects.clear()
            node.registered_saver = ""
            kind = node.WhichOneof("kind")
            other = kind == "user_object" and not node.user_object.identifier.startswith(_PLAIN_OBJECTS)
            if other or kind in ("resource", "asset"):
                node.user_object.identifier = _PLAIN_OBJECTS[0]
                kept = [c for c in node.children if c.local_name not in _INERT]
                del node.children[:]
                node.children.extend(kept)
    with Scratch() as folder:
        try:
            (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
            try:
                (folder / "variables").symlink_to((path / "variables").resolve(), target_is_directory=True)
            except OSError:  # no links here
                shutil.copytree(path / "variables", folder / "variables")
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield folder


def _first_generation(path: Path, meta: MetaGraphDef, key: str | None, constants: Mapping[str, Any]) -> TfModel:
    signatures = {k: s for k, s in meta.signature_def.items() if not k.startswith("__")}
    name = key or default_key(signatures)
    signature = signature_of(signatures, name)
    inputs = {k: signature.inputs[k].name for k in signature.inputs}
    outputs = {k: signature.outputs[k].name for k in signature.outputs}
    prefix = str(path / "variables" / "variables")
    given = SessionModel(None, outputs, inputs, constants)
    has_values = has_checkpoint(prefix)
    model = open_graph(meta, lambda: restored(meta, prefix) if has_values else {}, given, Kind.SAVED_MODEL, str(path))
    order = _declared_order(meta, model)
    return TfModel(model.meta, model.values, order, model.outputs, model.kind, Signature(inputs, outputs, name))


def _declared_order(meta: MetaGraphDef, model: TfModel) -> tuple[TensorId, ...]:
    """Inputs in the order of their nodes: a map of a protobuf has none."""
    place = {node.name: i for i, node in enumerate(meta.graph_def.node)}
    return tuple(sorted(model.inputs, key=lambda t: place[t.partition(":")[0]]))
