"""Whether a .tflite file holds what the float model and the encodings give: it is made again, and compared whole."""

from __future__ import annotations

import re

import numpy as np

from bitwright.backend import Bundle
from bitwright.files import Scratch
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_keras.export.export import export
from bitwright_keras.export.litert import TFLITE
from bitwright_keras.export.tflite_file import TfliteFile
from bitwright_keras.graph.model import KerasModel

_NUMBER = re.compile(r"_\d+(?=[/;]|$)")


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
    with Scratch() as folder:
        made = export(model, plan, encodings, folder / "again.tflite", TFLITE)
        wanted = TfliteFile.read(made.files[TFLITE])
    sites = {tensor: site for site, tensor in made.names.items()}
    pairs = _matched(found, wanted)
    if pairs is None:
        return [(bundle.files[TFLITE].name, "holds other tensors than the float model and the encodings give")]
    problems = []
    for theirs, ours in pairs:
        said = _departure(found, theirs, wanted, ours)
        if said:
            name = wanted.name(ours)
            problems.append((sites.get(name, name), said))
    return problems


def _matched(found: TfliteFile, wanted: TfliteFile) -> list[tuple[int, int]] | None:
    """Tensors of the file and those that are wanted, in pairs; None where one has none.

    The converter orders branches, and numbers what it makes itself, by how the process came to the model: names are
    compared, not places, and what no name is left for goes by its name without numbers.
    """
    left = {found.name(i): i for i in range(len(found.tensors))}
    if len(left) != len(found.tensors) or len(left) != len(wanted.tensors):
        return None
    pairs = [(left.pop(name), i) for i in range(len(wanted.tensors)) if (name := wanted.name(i)) in left]
    unnumbered: dict[str, list[int]] = {}
    for name, index in left.items():
        unnumbered.setdefault(_NUMBER.sub("", name), []).append(index)
    paired = {i for _, i in pairs}
    for i in (i for i in range(len(wanted.tensors)) if i not in paired):
        if not (same := unnumbered.get(_NUMBER.sub("", wanted.name(i)))):
            return None
        pairs.append((same.pop(0), i))
    return sorted(pairs, key=lambda pair: pair[1])


def _departure(found: TfliteFile, place: int, wanted: TfliteFile, index: int) -> str:
    """How a tensor of the file isn't the one that is wanted, in words; empty if it is."""
    theirs, ours = found.grid(place), wanted.grid(index)
    if found.tensors[place].type != wanted.tensors[index].type or (theirs is None) != (ours is None):
        return "has another type in the .tflite file than the encodings ask for"
    if theirs is not None and ours is not None:
        if theirs.axis != ours.axis or not np.array_equal(theirs.scale, ours.scale):
            return "has another scale in the .tflite file than in the encodings file"
        if not np.array_equal(theirs.zero_point, ours.zero_point):
            return "has another zero point in the .tflite file than in the encodings file"
    a, b = found.constant(place), wanted.constant(index)
    if a is None or b is None:
        return "" if a is b else "is a constant in the .tflite file or in what the float model gives, not in both"
    if a.shape != b.shape:
        return f"holds values of shape {a.shape} in the .tflite file, {b.shape} in the float model"
    wrong = int((a != b).sum())
    what = "values aren't the float model's" if ours is None else "codes aren't those of the float model's values"
    return f"{wrong} of {a.size} {what}" if wrong else ""
