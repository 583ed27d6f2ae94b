"""Model files: .keras and .h5, which plain Keras loads, with the user's names beside.

Keras allows no "/" in a layer's name, so a file has "block_conv" for the op "block/conv"; after edits, an op may
also compute a tensor that has another's name. What differs is kept in the file as JSON that Keras doesn't look at: a
member "bitwright.json" of a .keras archive, a data set "bitwright" of an .h5 file. Without it, names are the file's.
"""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras

from bitwright.backend import silenced
from bitwright.errors import BitwrightError, InputError, ModelError
from bitwright.files import staging, temporaries_in, written_beside
from bitwright_keras.capture.bombs import bounded_loading
from bitwright_keras.capture.h5_writing import write_hdf5
from bitwright_keras.capture.normalize import normalize_file
from bitwright_keras.capture.plain_layers import with_layers
from bitwright_keras.graph.model import KerasModel, Ref, substitute
from bitwright_keras.graph.native import first_line, keras_model

SUFFIXES = (".keras", ".h5", ".hdf5")
_MEMBER = "bitwright.json"
_MISFIT = "the names kept in the file don't fit its model; remove bitwright.json from the archive"


def load_model(path: Path, *, custom_objects: Any = None, safe_mode: bool = True, sample: Any = None) -> KerasModel:
    """Open a model file.

    Raises:
        InputError: no such file, or not a Keras model.
        ModelError: the model can't be brought into normal form.
    """
    model = load_native(path, custom_objects=custom_objects, safe_mode=safe_mode)
    return renamed(normalize_file(model, sample), read_names(path))


def load_native(path: Path, *, custom_objects: Any = None, safe_mode: bool = True) -> keras.Model:
    """Open a model file as Keras does, without its optimizer.

    Raises:
        InputError: no such file, not a Keras model, or one that is far larger than its file.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}")
    try:
        with bounded_loading(path):
            return keras.saving.load_model(path, custom_objects=custom_objects, compile=False, safe_mode=safe_mode)
    except BitwrightError:
        raise
    except Exception as error:
        said = first_line(error)
        remedy = ""
        if "Lambda" in str(error) and safe_mode:
            remedy = "; if you trust the file, load it with safe_mode=False"
        elif "custom" in str(error).lower() or "Unknown layer" in str(error):
            named = re.search(r"(?:Could not locate class|Unknown layer:) '?(\w+)'?", str(error))
            own = named.group(1) if named else "Name"
            said = f"{own!r} is a class of its own" if named else said
            remedy = (
                f"; give it as custom_objects={{{own!r}: {own}}}, or open the model in Python, where its classes are, "
                "and give that to QuantSim"
            )
        raise InputError(f"{path} can't be opened as a Keras model: {said[:300]}{remedy}") from error


def save_model(model: KerasModel, path: Path) -> Path:
    """Write a .keras or .h5 file atomically.

    Raises:
        InputError: another suffix, a model that .h5 can't hold, or the file can't be written.
    """
    written = model if path.suffix == ".keras" else with_layers(model)
    return save_native(keras_model(written), path, names_of(model))


def save_native(model: keras.Model, path: Path, names: Mapping[str, Any] | None = None) -> Path:
    """Write a Keras model atomically, with names beside (see `names_of`).

    Raises:
        InputError: another suffix, a model that .h5 can't hold, or the file can't be written.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path.name!r}: Keras models are saved as .keras or .h5")
    if path.suffix != ".keras" and (why := beyond_h5(model.operations)):
        raise InputError(f"{path.name!r} can't be written: {why}; save as .keras")
    with written_beside(path) as folder, silenced("absl"):  # it calls .h5 an old format
        if path.suffix == ".keras":
            with staging(path.parent) as scratch, temporaries_in(scratch):
                model.save(folder / path.name)
            if names:
                with zipfile.ZipFile(folder / path.name, "a") as archive:
                    archive.writestr(_MEMBER, json.dumps(names))
        else:
            write_hdf5(folder / path.name, lambda file: _fill(file, model, names or {}))
    return path


def _fill(file: Any, model: keras.Model, names: Mapping[str, Any]) -> None:
    model.save(file)
    if names:
        file.create_dataset("bitwright", data=json.dumps(names))


def beyond_h5(operations: Iterable[keras.Operation]) -> str:
    """Why Keras couldn't load these from an .h5 file, which it writes without a word; empty where it could."""
    for operation in operations:
        told = f"{operation.name!r} ({type(operation).__name__})"
        if not isinstance(operation, keras.layers.Layer):
            return f"{told} is a call of keras.ops, and Keras loads only layers from .h5"
        try:
            copy.deepcopy(operation.get_config())
        except TypeError:  # lists of settings that Keras tracks, as RandomBrightness has them
            return f"Keras writes no settings of {told} into an .h5"
        except Exception:
            continue
    return ""


# -- names


def names_of(model: KerasModel) -> dict[str, Any]:
    """By the op id that loading the file gives: what is called otherwise here; ops and their tensors and parameters.

    Keras orders calls by their distance from the outputs. Where they aren't so here, each has its place too.
    """
    found: dict[str, Any] = {}
    counts: dict[int, int] = {}
    depths = _depths(model)
    placed = any(depths[a.op] < depths[b.op] for a, b in pairwise(model.nodes))
    for place, node in enumerate(model.nodes):
        number = counts.get(id(node.operation), 0)
        counts[id(node.operation)] = number + 1
        loaded = node.operation.name if not number else f"{node.operation.name}_{number}"
        first = node.operation.name
        plain = (loaded,) if len(node.outputs) == 1 else tuple(f"{loaded}:{i}" for i in range(len(node.outputs)))
        params = {key: f"{first}/{key}" for key in node.params} if node.layer is not None else _constants(node, loaded)
        if placed or node.op != loaded or node.outputs != plain or dict(node.params) != params:
            found[loaded] = {"op": node.op, "outputs": list(node.outputs), "params": dict(node.params)}
            if placed:
                found[loaded]["place"] = place
    return found


def _depths(model: KerasModel) -> dict[str, int]:
    """Of each call, how many calls at most lie behind it."""
    behind: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in reversed(model.nodes):
        found[node.op] = max((behind.get(t, 0) for t in node.outputs), default=0)
        for t in node.inputs:
            behind[t] = max(behind.get(t, 0), found[node.op] + 1)
    return found


def _constants(node: Any, op: str) -> dict[str, str]:
    return {key: f"{op}/constant" if i == 0 else f"{op}/constant_{i}" for i, key in enumerate(node.params)}


def renamed(model: KerasModel, names: Mapping[str, Any]) -> KerasModel:
    """A model with the names that were kept beside it.

    Raises:
        ModelError: they are another model's.
    """
    if not names:
        return model
    tensors: dict[str, str] = {}
    for node in model.nodes:
        if node.op in names:
            if len(node.outputs) != len(names[node.op]["outputs"]):
                raise ModelError(_MISFIT)
            tensors.update(zip(node.outputs, names[node.op]["outputs"], strict=True))
    nodes = []
    for node in model.nodes:
        kept = names.get(node.op)
        node = node.rewired(tensors)
        if kept is not None:
            params = {key: kept["params"].get(key, p) for key, p in node.params.items()}
            node = replace(node, op=kept["op"], outputs=tuple(kept["outputs"]), params=params)
        nodes.append(node)
    specs = {tensors.get(t, t): s for t, s in model.specs.items()}
    places = {kept["op"]: kept["place"] for kept in names.values() if "place" in kept}
    if places:
        nodes = sorted(nodes, key=lambda node: places.get(node.op, len(places)))
        known = set(model.inputs)
        for node in nodes:
            if not known.issuperset(node.inputs):
                raise ModelError(_MISFIT)
            known.update(node.outputs)
    if len({n.op for n in nodes}) != len(nodes) or len(specs) != len(model.specs):
        raise ModelError(_MISFIT)
    outputs = substitute(model.outputs, lambda ref: Ref(tensors.get(ref.id, ref.id)))
    return model.with_(nodes=tuple(nodes), specs=specs, outputs=outputs)


def read_names(path: Path) -> dict[str, Any]:
    """The names kept in a file; none if there are none."""
    try:
        if path.suffix == ".keras" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                text = archive.read(_MEMBER).decode() if _MEMBER in archive.namelist() else "{}"
        elif path.suffix == ".keras":
            return {}
        else:
            import h5py

            with h5py.File(path, "r") as file:
                text = file["bitwright"][()].decode() if "bitwright" in file else "{}"
        found = json.loads(text)
        if not isinstance(found, dict) or not all(map(_is_record, found.values())):
            raise ValueError("they aren't written as bitwright writes them")
    except (OSError, ValueError, AttributeError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: the names kept in the file can't be read: {error}") from error
    return found


def _is_record(value: Any) -> bool:
    """Whether it is what `names_of` keeps of an op."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("op"), str)
        and isinstance(value.get("outputs"), list)
        and all(isinstance(t, str) for t in value["outputs"])
        and isinstance(value.get("params"), dict)
        and all(isinstance(p, str) for p in value["params"].values())
        and isinstance(value.get("place", 0), int)
    )
