"""Encodings files from one schema to another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from bitwright.errors import EncodingError
from bitwright.formats._binding import TensorGeometry, resolve
from bitwright.formats._entries import CAST_FORMATS, EncodingsFile, Entry, ScaleLayout
from bitwright.formats._files import as_version, schema
from bitwright.formats._header import refuse_unsplit


@dataclass(frozen=True)
class Conversion:
    """A converted file (its `version` is the new one) and what readers of the new schema won't find in it."""

    file: EncodingsFile
    warnings: tuple[str, ...]


def convert(
    file: EncodingsFile,
    version: str,
    geometries: Mapping[str, TensorGeometry] | None = None,
    parameters: Collection[str] | None = None,
) -> Conversion:
    """The same encodings in another schema.

    Scales and zero points never change. What a schema can't say but bitwright reads back (signedness, axes,
    the split into activations and parameters) is kept under `producer`; what changes meaning for other
    readers is a warning (a strict grid in 2.x, LPBQ in 0.6.1, float16 in 2.x, which leaves such tensors
    out); what can't be expressed at all (bfloat16 and fp8 in 0.6.1 and 1.0.0) is an error.

    Args:
        file: as read.
        version: the schema wanted.
        geometries: native shapes and axes by tensor name, for what the file doesn't record.
        parameters: names of the parameters, to split a 2.x file; None takes the names in `geometries`.

    Raises:
        EncodingError: entries that the schema can't express, or needs more about; names the first, counts the others.
    """
    known = as_version(version)
    module = schema(known)
    geometries = geometries or {}
    if file.unsplit and (parameters is not None or geometries):
        file = file.split(set(geometries) if parameters is None else set(parameters))
    warnings: list[str] = []
    problems: list[str] = []

    def converted(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        table = {}
        for name, entry in entries.items():
            try:
                table[name] = _for(name, entry, known, geometries.get(name), warnings)
                if not (known[0] == "2" and entry.float_format in CAST_FORMATS):
                    module.render_entry(name, table[name])
            except EncodingError as error:
                problems.append(str(error))
                continue
            warnings.extend(f"tensor {name!r}: {loss}" for loss in module.losses(table[name]))
        return table

    result = replace(
        file,
        activations=converted(file.activations),
        parameters=converted(file.parameters),
        unsplit=converted(file.unsplit),
        version=known,
    )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EncodingError(f"can't convert to {version}: {problems[0]}{more}")
    if known in ("0.6.1", "1.0.0"):
        refuse_unsplit(result, known)
    return Conversion(result, tuple(warnings))


def _for(name: str, entry: Entry, version: str, geometry: TensorGeometry | None, warnings: list[str]) -> Entry:
    if entry.float_format in CAST_FORMATS:
        return entry
    if geometry is not None:
        return resolve(entry, geometry, name)
    if version == "1.0.0" and entry.layout is None and entry.count > 1:
        warnings.append(
            f"tensor {name!r}: {entry.count} scales are taken as those of channels; give the model to be sure"
        )
        return entry.with_(layout=ScaleLayout.CHANNEL, packed=None)
    return entry
