"""Whether a .tflite file holds what the float model and the encodings give: it is made again, and compared whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bitwright.backend import Bundle
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_keras.export.export import export
from bitwright_keras.export.litert import TFLITE
from bitwright_keras.export.tflite_file import TfliteFile
from bitwright_keras.graph.model import KerasModel


def departures(model: KerasModel, plan: Plan, encodings: EncodingTable, bundle: Bundle) -> list[tuple[str, str]]:
    """See `bitwright.backend.ReproducedArtefact`; tensors go by their sites where they have one.

    Raises:
        InputError: the file can't be read.
        EncodingError, ModelError, CapabilityError: the model and the encodings can't be written as .tflite.
        MissingExtraError: TensorFlow isn't installed.
    """
    if TFLITE not in bundle.files:
        return []
    found = TfliteFile.read(bundle.files[TFLITE])
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        made = export(model, plan, encodings, Path(folder) / "again.tflite", TFLITE)
        wanted = TfliteFile.read(made.files[TFLITE])
    sites = {tensor: site for site, tensor in made.names.items()}
    names = [wanted.name(i) for i in range(len(wanted.tensors))]
    if names != [found.name(i) for i in range(len(found.tensors))]:
        return [(bundle.files[TFLITE].name, "holds other tensors than the float model and the encodings give")]
    problems = []
    for index, name in enumerate(names):
        said = _departure(found, wanted, index)
        if said:
            problems.append((sites.get(name, name), said))
    return problems


def _departure(found: TfliteFile, wanted: TfliteFile, index: int) -> str:
    """How a tensor of the file isn't the one that is wanted, in words; empty if it is."""
    theirs, ours = found.grid(index), wanted.grid(index)
    if found.tensors[index].type != wanted.tensors[index].type or (theirs is None) != (ours is None):
        return "has another type in the .tflite file than the encodings ask for"
    if theirs is not None and ours is not None:
        if theirs.axis != ours.axis or not np.array_equal(theirs.scale, ours.scale):
            return "has another scale in the .tflite file than in the encodings file"
        if not np.array_equal(theirs.zero_point, ours.zero_point):
            return "has another zero point in the .tflite file than in the encodings file"
    a, b = found.constant(index), wanted.constant(index)
    if a is None or b is None:
        return "" if a is b else "is a constant in the .tflite file or in what the float model gives, not in both"
    if a.shape != b.shape:
        return f"holds values of shape {a.shape} in the .tflite file, {b.shape} in the float model"
    wrong = int((a != b).sum())
    what = "values aren't the float model's" if ours is None else "codes aren't those of the float model's values"
    return f"{wrong} of {a.size} {what}" if wrong else ""
