"""Files for other runtimes, in formats that plugins write: which are asked for, and the proof of what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from bitwright.backend import Backend, FormatWriter, ToCompile
from bitwright.errors import InputError, ModelError, PluginError
from bitwright.grids import QuantSpec
from bitwright.hookspecs import FormatInfo
from bitwright.placement import SharedWith
from bitwright.plugins import registry

Formats = Iterable[str] | Mapping[str, Mapping[str, Any]]
"""Names of formats, or their settings by name."""


@dataclass(frozen=True)
class Foreign:
    """A format that a plugin writes, with what the user chose."""

    info: FormatInfo
    writer: FormatWriter
    settings: BaseModel


@dataclass(frozen=True)
class Chosen:
    """The formats that an export has.

    Attributes:
        own: of the backend, those that others are made from included.
        foreign: of plugins.
    """

    own: tuple[str, ...]
    foreign: tuple[Foreign, ...]


def chosen_formats(formats: Formats, backend: Backend[Any] | None = None) -> Chosen:
    """What is asked for, by name, checked.

    Args:
        formats: names, or settings by name.
        backend: whose own formats there are too; None takes every name that no plugin has for one of them.

    Raises:
        InputError: none is named, no such format, or a setting is wrong.
        MissingExtraError: what a format needs isn't installed.
    """
    if isinstance(formats, str):
        raise InputError(f"formats={formats!r}: give a list of names")
    given: Mapping[str, Mapping[str, Any]] = formats if isinstance(formats, Mapping) else {f: {} for f in formats}
    if not given:
        raise InputError("formats= names no format; leave it out for all that a bundle has")
    own: dict[str, None] = {}
    foreign: list[Foreign] = []
    for name, settings in given.items():
        known = () if backend is None else backend.formats()
        if name in known:
            if settings:
                raise InputError(f"the format {name!r} has no settings")
            own[name] = None
            continue
        try:
            info = registry.format_info(name)
        except PluginError as error:
            if backend is None and "did you mean" not in str(error):
                own[name] = None  # looked at again once the backend is known
                continue
            here = "" if backend is None else f"; the {backend.name} backend has {', '.join(known)}"
            raise InputError(f"{error}{here}") from None
        writer = registry.format_writer(info.name)
        foreign.append(Foreign(info, writer, _settings(info.name, writer, settings)))
        for needed in info.needs:
            if backend is not None and needed not in known:
                raise InputError(f"{info.name} is made from {needed}, which the {backend.name} backend doesn't write")
            own[needed] = None
    return Chosen(tuple(own), tuple(foreign))


def _settings(name: str, writer: FormatWriter, given: Mapping[str, Any]) -> BaseModel:
    try:
        return writer.Settings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or name
        allowed = ", ".join(writer.Settings.model_fields) or "none"
        told = f"there is no setting {field!r}" if first["type"] == "extra_forbidden" else f"{field}: {first['msg']}"
        raise InputError(f"format {name}: {told}; settings are {allowed}") from None


def check_formats(chosen: Chosen, model: ToCompile) -> None:
    """Refuse what a format can't hold.

    Raises:
        EncodingError, ModelError: see `FormatWriter.check`.
        PluginError: the format's writer is broken.
    """
    for each in chosen.foreign:
        with registry.default_registry().blaming(each.info):
            each.writer.check(model, each.settings)


def write_formats(chosen: Chosen, model: ToCompile, stem: Path) -> dict[str, Path]:
    """Write the formats of plugins and prove each: by name.

    Raises:
        EncodingError, ModelError: one can't be written, or doesn't hold what was simulated.
        PluginError: the format's writer is broken.
    """
    files: dict[str, Path] = {}
    for each in chosen.foreign:
        path = stem.with_name(f"{stem.name}{each.info.suffix}")
        if path.exists():
            raise ModelError(f"format {each.info.name!r} would write over {path.name}, which is there already")
        with registry.default_registry().blaming(each.info):
            written = each.writer.write(model, path, each.settings)
        if written != path or not path.exists():
            raise ModelError(f"format {each.info.name!r} has written {written}, where {path.name} was asked for")
        with registry.default_registry().blaming(each.info):
            prove(model, each.writer, path)
        files[each.info.name] = path
        model = replace(model, bundle=replace(model.bundle, files={**model.bundle.files, each.info.name: path}))
    return files


def prove(model: ToCompile, writer: FormatWriter, path: Path) -> None:
    """Compare what was written with what the simulation computes with: every weight, bit for bit.

    Raises:
        ModelError: a weight differs, or one that is quantized isn't there.
    """
    wanted = {
        p
        for p in model.graph.params
        if p in model.encodings and isinstance(model.plan[p].decision, QuantSpec | SharedWith)
    }
    fault = "so nothing is exported. This is a fault of the format's writer; report it"
    seen: set[str] = set()
    for param, found in writer.read(model, path):
        if param not in model.graph.params:
            raise ModelError(f"{path.name} has a weight {param!r}, which the network hasn't, {fault}")
        value, found = model.params[param], np.asarray(found)
        expected = model.encodings[param].fake_quantize(value) if param in wanted else value
        if found.shape != expected.shape or not np.array_equal(found, expected):
            departing = "another shape" if found.shape != expected.shape else f"{int((found != expected).sum())} values"
            raise ModelError(f"{path.name} departs from the simulation in {departing} of {param!r}, {fault}")
        seen.add(param)
    if left := sorted(wanted - seen):
        raise ModelError(f"{path.name} lacks {len(left)} quantized weights, {left[0]!r} first, {fault}")
