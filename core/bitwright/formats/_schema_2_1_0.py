"""Schema 2.1.0: entries as in `onnx_entries`; two-level scales are an object in y_scale, itself a quantized tensor.

`{"x": integer factors, "x_scale": channel scales, "axis": channel axis}` gives LPBQ, and
`{"x": float8e4m3fn numbers, "x_scale": the tensor's scale, "input_dtype": "float8e4m3fn"}` NVFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from bitwright.formats import _onnx_entries as onnx_entries
from bitwright.formats._entries import EncodingsFile, Entry, ScaleLayout, Version
from bitwright.formats._fields import Fields, Where
from bitwright.grids import cast_float

VERSION: Version = "2.1.0"
FLOATS: Literal["float8e4m3fn"] = "float8e4m3fn"
"""Block scales that aren't integers."""
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
    scale.refuse(("block_size",), "scales of scales by block aren't supported")
    if "x_zero_point" in scale and scale.numbers("x_zero_point").any():
        raise scale.where.error("block scales with a zero point aren't supported", "x_zero_point")
    if scale.get("input_dtype", None) == FLOATS:
        return _of_floats(fields, scale)
    if "input_dtype" in scale and not scale.text("input_dtype").lstrip("u").startswith("int"):
        raise scale.where.error(f"block scales are integers (LPBQ) or {FLOATS} (NVFP4)", "input_dtype")
    factors = scale.integers("x", 1, 2**16)
    if "axis" in scale:
        axis: int | None = scale.integer("axis", -64, 63)
    else:
        axis = onnx_entries.block_axes(fields, factors.shape, "y_scale")[0]
    return onnx_entries.parse_two_level(fields, factors, scale.scales("x_scale"), axis)


def _of_floats(fields: Fields, scale: Fields) -> Entry:
    """NVFP4: factors in float8e4m3fn, one float32 scale for all of them."""
    float_format, _, bits = onnx_entries.output_type(fields)
    if float_format is None:
        raise fields.where.error(f"{FLOATS} scales of integers aren't supported", "output_dtype")
    factors, whole = scale.scales("x").astype(np.float32), scale.scales("x_scale")
    if whole.size != 1:
        raise scale.where.error(f"{whole.size} numbers; scales in {FLOATS} have one for the tensor", "x_scale")
    if (cast_float(factors, FLOATS) != factors).any():
        raise scale.where.error(f"a number isn't one of {FLOATS}", "x")
    axis, block_axis = onnx_entries.block_axes(fields, factors.shape, "y_scale")
    blocks = onnx_entries.unnested(fields.where, factors, axis, block_axis, "x")
    tensor_scale = np.float32(whole.max())
    return Entry(
        bits, blocks * tensor_scale, np.zeros(blocks.shape, np.int64), ScaleLayout.BLOCK, float_format, signed=True,
        symmetric=True, axis=axis, block_axis=block_axis, rank=factors.ndim,
        block_size=fields.integer("block_size", 1, 2**31), scale_type=FLOATS, tensor_scale=float(tensor_scale),
    )  # fmt: skip


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
    if entry.tensor_scale is not None:
        factors = cast_float(entry.scale / entry.tensor_scale, FLOATS)
        nested = onnx_entries.nested(entry, factors).tolist()
        scale = {"x": nested, "x_scale": entry.tensor_scale, "input_dtype": FLOATS}
        return {"y_scale": scale, "axis": entry.block_axis, "block_size": entry.block_size}
    return {
        "y_scale": {
            "x": onnx_entries.nested(entry, entry.block_scale).tolist(),  # type: ignore[arg-type]
            "x_scale": entry.scale.tolist(),
            "axis": entry.block_axes[0],
        },
        "axis": entry.block_axis,
        "block_size": entry.block_size,
    }
