"""Schema 2.0.0: entries as in `onnx_entries`; LPBQ by `per_block_int_scale` and `per_channel_float_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.formats import _onnx_entries as onnx_entries
from bitwright.formats._entries import EncodingsFile, Entry, Version
from bitwright.formats._fields import Fields

VERSION: Version = "2.0.0"
losses = onnx_entries.losses
_LPBQ = ("per_block_int_scale", "per_channel_float_scale")


def parse(document: Mapping[str, Any], source: str) -> EncodingsFile:
    """A file's JSON object → entries."""
    return onnx_entries.parse_document(document, source, VERSION, _entry, _LPBQ)


def _entry(fields: Fields) -> Entry:
    if not any(name in fields for name in _LPBQ):
        return onnx_entries.parse_one_level(fields)
    fields.require(*_LPBQ, "axis", "block_size")
    fields.refuse(("y_scale",), "doesn't go with per_block_int_scale")
    factors = fields.integers("per_block_int_scale", 1, 2**16)
    scale = fields.scales("per_channel_float_scale")
    if scale.ndim == factors.ndim and scale.size > 1:  # its long axis is the channels'
        axis: int | None = max(range(scale.ndim), key=lambda i: scale.shape[i])
    else:
        axis = onnx_entries.block_axes(fields, factors.shape, "per_block_int_scale")[0]
    return onnx_entries.parse_two_level(fields, factors, scale, axis)


def render(file: EncodingsFile) -> dict[str, Any]:
    """Entries → a file's JSON object.

    Raises:
        EncodingError: the schema can't express an entry.
    """
    return onnx_entries.render_document(file, VERSION, _two_level)


def render_entry(name: str, entry: Entry) -> dict[str, Any]:
    """One tensor's object."""
    return onnx_entries.render_entry(name, entry, VERSION, _two_level)


def _two_level(entry: Entry) -> dict[str, Any]:
    return {
        "per_block_int_scale": onnx_entries.nested(entry, entry.block_scale).tolist(),  # type: ignore[arg-type]
        "per_channel_float_scale": onnx_entries.nested(entry, entry.scale[:, None]).tolist(),
        "axis": entry.block_axis,
        "block_size": entry.block_size,
    }
