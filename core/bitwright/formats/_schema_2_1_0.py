"""Schema 2.1.0: entries as in `onnx_entries`; two-level scales are an object in y_scale, itself a quantized tensor.

`{"x": integer factors, "x_scale": channel scales, "axis": channel axis}` gives LPBQ. Factors in a float format
(NVFP4) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.formats import _onnx_entries as onnx_entries
from bitwright.formats._entries import EncodingsFile, Entry, Version
from bitwright.formats._fields import Fields, Where

VERSION: Version = "2.1.0"
losses = onnx_entries.losses
_SCALE = ("x", "x_scale", "axis", "x_zero_point", "input_dtype", "block_size")


def parse(document: Mapping[str, Any], source: str) -> EncodingsFile:
    """A file's JSON object → entries."""
    return onnx_entries.parse_document(document, source, VERSION, _entry, ())


def _entry(fields: Fields) -> Entry:
    if not isinstance(fields.get("y_scale", None), Mapping):
        return onnx_entries.parse_one_level(fields)
    where = fields.where
    fields.require("axis", "block_size")
    scale = Fields(Where(where.source, f"{where.tensor}: y_scale"), fields["y_scale"], _SCALE, ("x", "x_scale"))
    if "input_dtype" in scale and not scale.text("input_dtype").lstrip("u").startswith("int"):
        raise scale.where.error("only integer block scales (LPBQ) are supported", "input_dtype")
    scale.refuse(("block_size",), "scales of scales by block aren't supported")
    if "x_zero_point" in scale and scale.numbers("x_zero_point").any():
        raise scale.where.error("block scales with a zero point aren't supported", "x_zero_point")
    factors = scale.integers("x", 1, 2**16)
    if "axis" in scale:
        axis: int | None = scale.integer("axis", -64, 63)
    else:
        axis = onnx_entries.block_axes(fields, factors.shape, "y_scale")[0]
    return onnx_entries.parse_two_level(fields, factors, scale.scales("x_scale"), axis)


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
        "y_scale": {
            "x": onnx_entries.nested(entry, entry.block_scale).tolist(),  # type: ignore[arg-type]
            "x_scale": entry.scale.tolist(),
            "axis": entry.block_axes[0],
        },
        "axis": entry.block_axis,
        "block_size": entry.block_size,
    }
