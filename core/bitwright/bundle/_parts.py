"""Exports of models that were captured in parts: a float and a quantized file for each, one encodings file for all.

No file holds what runs between the parts, so the record keeps what it handed to them, and each is proven by itself.
A part is named as an export is: "net.head" is the part "head" of the export "net".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from bitwright.graph import Graph, TensorId
from bitwright.plugins import registry

MODEL = "model"

V = TypeVar("V")


def parts_in(files: Iterable[str]) -> tuple[str, ...]:
    """The parts whose float files an export has, by the purposes of its files ("model/backbone")."""
    return tuple(f.removeprefix(f"{MODEL}/") for f in files if f.startswith(f"{MODEL}/"))


def of_part(files: Mapping[str, V], part: str) -> dict[str, V]:
    """The files that a part shares with none, by purpose."""
    return {key.removesuffix(f"/{part}"): file for key, file in files.items() if key.endswith(f"/{part}")}


def belongs(name: str, part: str, parts: Collection[str]) -> bool:
    """Whether an op, tensor or parameter is of a part: ids begin with its name, and parts may lie within each other."""
    found = [p for p in parts if name == p or name.startswith(f"{p}.")]
    return bool(found) and max(found, key=len) == part


def handed_to_parts(graph: Graph, files: Mapping[str, Path]) -> list[TensorId]:
    """What parts are fed that the model isn't, from their files."""
    found: dict[TensorId, None] = {}
    for path in (files[f"{MODEL}/{part}"] for part in parts_in(files)):
        backend = registry.backend_for_path(path)
        inputs = backend.graph(backend.load(path)).inputs
        found |= dict.fromkeys(t for t in inputs if t in graph.tensors and t not in graph.inputs)
    return list(found)
