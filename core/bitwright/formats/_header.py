"""The top of a file: the fields that stand beside the entries, and what bitwright stores of its own there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import BitwrightError, EncodingError
from bitwright.formats._block_order import unpack
from bitwright.formats._entries import CAST_FORMATS, EncodingsFile, Entry, ScaleLayout, Version
from bitwright.formats._fields import Fields, Where, describe
from bitwright.grids import FloatFormat, Provenance, ScaleType, dynamic_encoding

OWN_FIELDS = ("provenance", "parameters", "casts", "quantizer_args", "excluded_layers", "tensors", "run_time")
OWN = "bitwright"
"""The key inside `producer` that holds what the schema can't say. Only bitwright reads it."""


def parse_header(fields: Fields) -> dict[str, Any]:
    """`EncodingsFile` arguments from producer, quantizer_args and excluded_layers, as far as they are there."""
    where = fields.where
    header: dict[str, Any] = {}
    for name in ("producer", "quantizer_args"):
        value = fields.get(name, {})
        if not isinstance(value, Mapping):
            raise where.error(f"expected a JSON object, found {describe(value)}", name)
        header[name] = dict(value)
    layers = fields.get("excluded_layers", [])
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise where.error("expected a list of layer names", "excluded_layers")
    header["excluded_layers"] = tuple(layers)
    return header


def described(file: EncodingsFile, version: Version) -> dict[str, Any]:
    """The `producer` object to write: the tool's own, and under `OWN` what `version` can't say."""
    own: dict[str, Any] = {}
    if file.provenance:
        own["provenance"] = [
            {"technique": p.technique, "settings": dict(p.settings), "fingerprint": p.fingerprint}
            for p in file.provenance
        ]
    if file.run_time:
        own["run_time"] = dict(file.run_time)
    if version.startswith("2"):
        casts = {n: e.float_format for n, e in file.entries.items() if e.float_format in CAST_FORMATS}
        # Without entries there is nothing to split; a file with unsplit entries doesn't know.
        if not file.unsplit and file.entries:
            own["parameters"] = list(file.parameters)
        kept = {
            "casts": casts,
            "quantizer_args": dict(file.quantizer_args),
            "excluded_layers": list(file.excluded_layers),
        }
        own |= {name: value for name, value in kept.items() if value}
    tensors = {name: said for name, entry in file.entries.items() if (said := _unsaid(entry, version))}
    if tensors:
        own["tensors"] = tensors
    producer = {k: v for k, v in file.producer.items() if k != OWN}
    return {**producer, OWN: own} if own else producer


def _unsaid(entry: Entry, version: Version) -> dict[str, Any]:
    """What the schema leaves out and its reader wouldn't guess."""
    said: dict[str, Any] = {}
    if entry.float_format in CAST_FORMATS:
        return said
    blocks = entry.layout in (ScaleLayout.BLOCK, ScaleLayout.LPBQ) and entry.packed is None
    if version.startswith("2"):
        if entry.float_format is None and entry.is_symmetric != entry.with_(symmetric=None).is_symmetric:
            said["symmetric"] = entry.is_symmetric
        if entry.strict:
            said["strict"] = True
        if blocks and entry.axis is not None and _channels(entry) == 1 and entry.rank != 2:
            said["axis"] = entry.axis
        if entry.scale_type is not None and (entry.tensor_scale is None or version == "2.0.0"):
            said["scale_type"] = entry.scale_type
            if entry.tensor_scale is not None:
                said["tensor_scale"] = entry.tensor_scale
        return said
    if entry.is_signed != entry.with_(signed=None).is_signed:
        said["signed"] = entry.is_signed
    if entry.axis is not None:
        said["axis"] = entry.axis
    if version == "0.6.1" and (blocks or entry.layout is ScaleLayout.CHANNEL):
        said["layout"] = str(ScaleLayout.BLOCK if blocks else entry.layout)
    if blocks:
        said["block_axis"], said["rank"], said["channels"] = entry.block_axis, entry.rank, _channels(entry)
        if version == "0.6.1":
            said["block_size"] = entry.block_size
    return said


def _channels(entry: Entry) -> int:
    return int(entry.scale.shape[0])


_RANK = 64
"""Axes that a tensor may have (numpy's limit)."""


def with_own(file: EncodingsFile, source: str) -> EncodingsFile:
    """Fill in what bitwright stored under `producer` when it wrote the file; other files are returned as they are.

    Names that the file no longer lists are passed over, and what an entry says itself is never overruled.
    """
    if OWN not in file.producer:
        return file
    where = Where(f"{source}: producer.{OWN}")
    own = Fields(
        where,
        file.producer[OWN],
        OWN_FIELDS,
    )
    notes = _mapping(own, "tensors")
    tables = {
        kind: {n: _filled(e, notes[n], where, n) if n in notes else e for n, e in getattr(file, kind).items()}
        for kind in ("activations", "parameters", "unsplit")
    }
    casts = {str(n): _cast(where, str(n), f) for n, f in _mapping(own, "casts").items() if n not in file.entries}
    parameters = own.get("parameters", None)
    if parameters is not None and not (isinstance(parameters, list) and all(isinstance(n, str) for n in parameters)):
        raise where.error("expected a list of tensor names", "parameters")
    header = parse_header(
        Fields(where, {k: own[k] for k in ("quantizer_args", "excluded_layers") if k in own}, OWN_FIELDS)
    )
    rebuilt = EncodingsFile(
        **{**tables, "unsplit": {**tables["unsplit"], **casts}},
        version=file.version,
        producer={k: v for k, v in file.producer.items() if k != OWN},
        quantizer_args=file.quantizer_args or header["quantizer_args"],
        excluded_layers=file.excluded_layers or header["excluded_layers"],
        provenance=tuple(_provenance(where, own.get("provenance", []))),
        run_time={n: _run_time(where, n, t) for n, t in _mapping(own, "run_time").items() if n not in file.entries},
    )
    return rebuilt if parameters is None else rebuilt.split(set(parameters))


def _filled(entry: Entry, note: object, where: Where, tensor: str) -> Entry:
    at = Where(where.source, tensor)
    known = (
        "signed", "symmetric", "strict", "axis", "layout", "block_axis", "block_size", "rank", "channels", "scale_type",
        "tensor_scale",
    )  # fmt: skip
    fields = Fields(at, note, known)
    changes: dict[str, Any] = {}
    for name in ("signed", "symmetric", "strict"):
        if name in fields and getattr(entry, name) is None:
            changes[name] = fields.flag(name)
    for name in ("axis", "block_axis", "block_size", "rank"):
        if name in fields and getattr(entry, name) is None:
            changes[name] = fields.integer(
                name, 0 if name != "axis" else -_RANK, 2**31 if name == "block_size" else _RANK
            )
    if "layout" in fields and entry.layout is None:
        changes["layout"] = ScaleLayout(fields.text("layout", tuple(ScaleLayout)))
    if "scale_type" in fields and entry.float_format is not None and entry.scale_type is None:
        changes["scale_type"] = fields.text("scale_type", get_args(ScaleType))
        if "tensor_scale" in fields:
            changes["tensor_scale"] = float(fields.scales("tensor_scale").max())
    filled = entry.with_(**changes)
    if entry.packed is None or filled.layout not in (ScaleLayout.BLOCK, ScaleLayout.LPBQ):
        return filled.with_(packed=None) if filled.layout in (ScaleLayout.TENSOR, ScaleLayout.CHANNEL) else filled
    fields.require("axis", "block_axis", "rank", "channels")
    channels = fields.integer("channels", 1, 2**31)
    if entry.count % channels:
        raise at.error(f"{entry.count} scales can't belong to {channels} channels", "channels")
    axis, block_axis, rank = filled.axis or 0, filled.block_axis or 0, filled.rank or 0
    if not (-rank <= axis < rank and block_axis < rank and axis % rank != block_axis):
        raise at.error(f"channels along axis {axis} and blocks along {block_axis} of {rank} axes", "block_axis")
    return laid_out(filled, channels, axis, block_axis, rank)


def laid_out(entry: Entry, channels: int, axis: int, block_axis: int, rank: int) -> Entry:
    """A packed entry of blocks with its numbers brought to (channels, blocks)."""
    version = entry.packed or "1.0.0"

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        return unpack(values, channels, axis=axis, block_axis=block_axis, rank=rank, version=version)

    changes: dict[str, Any] = {"packed": None, "axis": axis, "block_axis": block_axis, "rank": rank}
    if entry.block_scale is not None:
        return entry.with_(block_scale=spread(entry.block_scale), **changes)
    for name in ("minimum", "maximum"):
        value = getattr(entry, name)
        changes[name] = None if value is None else spread(np.asarray(value))
    return entry.with_(scale=spread(entry.scale), zero_point=spread(entry.zero_point), **changes)


def _mapping(fields: Fields, name: str) -> Mapping[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, Mapping):
        raise fields.where.error(f"expected a JSON object, found {describe(value)}", name)
    return value


def _cast(where: Where, tensor: str, format: object) -> Entry:
    if not isinstance(format, str) or format not in CAST_FORMATS:
        raise Where(where.source, tensor).error(f"{describe(format)} is none of float16, bfloat16", "casts")
    return cast_entry(cast(FloatFormat, format))


def _run_time(where: Where, tensor: str, type: object) -> str:
    try:
        return str(dynamic_encoding(str(type)).run_time)
    except BitwrightError:
        raise Where(where.source, tensor).error(
            f"{describe(type)} is no type with a range at run time, such as int8:per_token", "run_time"
        ) from None


def cast_entry(format: FloatFormat) -> Entry:
    """The entry of a tensor in float16 or bfloat16."""
    return Entry(16, np.array(1.0), np.array(0), ScaleLayout.TENSOR, format, signed=True, symmetric=True)


def _provenance(where: Where, value: object) -> Iterable[Provenance]:
    if not isinstance(value, list):
        raise where.error(f"expected a list, found {describe(value)}", "provenance")
    for item in value:
        step = Fields(where, item, ("technique", "settings", "fingerprint"), ("technique",))
        fingerprint = step.get("fingerprint", "")
        yield Provenance(step.text("technique"), dict(_mapping(step, "settings")), str(fingerprint))


def collect(entries: Iterable[tuple[str, Entry]], where: Where) -> dict[str, Entry]:
    """Entries by name.

    Raises:
        EncodingError: a name comes twice.
    """
    table: dict[str, Entry] = {}
    for name, entry in entries:
        if name in table:
            raise Where(where.source, name).error("has two entries; keep one")
        table[name] = entry
    return table


def refuse_unsplit(file: EncodingsFile, version: Version) -> None:
    """Schemas 0.6.1 and 1.0.0 list activations and parameters apart."""
    if file.unsplit:
        raise EncodingError(
            f"schema {version} lists activations and parameters apart, and the file doesn't say which "
            f"{shown(file.unsplit)} are; name the parameters, for example by giving the model"
        )


def shown(names: Collection[str], most: int = 3) -> str:
    """A few names of many."""
    first = ", ".join(repr(n) for n in list(names)[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"
