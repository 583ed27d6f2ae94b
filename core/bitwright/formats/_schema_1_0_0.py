"""Schema 1.0.0: two lists of objects with `name`, `enc_type` and flat number lists; offsets as in 0.6.1.

LPBQ gives the decompressed width as `bw`, the code width as `compressed_bw`, a float scale a channel and
`per_block_int_scale` with channels · blocks integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.formats._block_order import pack
from bitwright.formats._entries import EncodingsFile, Entry, RenderedLater, ScaleLayout, Version
from bitwright.formats._fields import Fields, Where, describe
from bitwright.formats._header import cast_entry, collect, described, parse_header, refuse_unsplit
from bitwright.formats._legacy_offset import offset_of, zero_point_of

VERSION: Version = "1.0.0"
SECTIONS = ("activation_encodings", "param_encodings")
_HEADER = ("version", "producer", "excluded_layers", "quantizer_args")
_COMMON = ("name", "dtype", "bw", "enc_type")
_INTEGER = (*_COMMON, "is_sym", "scale", "offset")
_LPBQ = ("block_size", "compressed_bw", "per_block_int_scale")
_TYPES = {
    "PER_TENSOR": ScaleLayout.TENSOR,
    "PER_CHANNEL": ScaleLayout.CHANNEL,
    "PER_BLOCK": ScaleLayout.BLOCK,
    "LPBQ": ScaleLayout.LPBQ,
}
_NAMES = {layout: name for name, layout in _TYPES.items()}


def parse(document: Mapping[str, Any], source: str) -> EncodingsFile:
    """A file's JSON object → entries. Axes stay None, and blocks in the file's order, until bound."""
    where = Where(source)
    top = Fields(where, document, (*SECTIONS, *_HEADER))
    if not any(s in top for s in SECTIONS):
        raise where.error("has neither activation_encodings nor param_encodings")
    activations, parameters = (collect(_section(top, section, source), where) for section in SECTIONS)
    return EncodingsFile(activations, parameters, version=VERSION, **parse_header(top))


def _section(top: Fields, section: str, source: str) -> Iterable[tuple[str, Entry]]:
    items = top.get(section, [])
    if not isinstance(items, list):
        raise top.where.error(f"expected a list of encodings, found {describe(items)}", section)
    for index, item in enumerate(items):
        named = isinstance(item, Mapping) and isinstance(item.get("name"), str) and item["name"]
        where = Where(source, item["name"]) if named else Where(f"{source}: {section}[{index}]")
        fields = Fields(where, item, (*_INTEGER, *_LPBQ, "zero_point_shift"), _COMMON)
        yield fields.text("name"), _entry(fields)


def _entry(fields: Fields) -> Entry:
    where = fields.where
    kind = fields.text("enc_type", (*_TYPES, "VECTOR"))
    if kind == "VECTOR":
        raise where.error("vector quantization isn't supported", "enc_type")
    layout = _TYPES[kind]
    if fields.text("dtype", ("INT", "FLOAT")) == "FLOAT":
        fields.refuse([f for f in fields if f not in _COMMON], "a float encoding has no such field")
        if layout is not ScaleLayout.TENSOR or fields.integer("bw", 1, 64) != 16:
            raise where.error("the only float encoding of schema 1.0.0 is 16 bits PER_TENSOR (float16)", "bw")
        return cast_entry("float16")
    fields.require("is_sym", "scale", "offset")
    if layout in (ScaleLayout.TENSOR, ScaleLayout.CHANNEL):
        fields.refuse(("block_size",), f"doesn't go with enc_type {kind}")
    if layout is not ScaleLayout.LPBQ:
        fields.refuse(_LPBQ[1:], f"doesn't go with enc_type {kind}")
    if "zero_point_shift" in fields and fields.numbers("zero_point_shift").any():
        raise where.error("grids that don't hold 0 (shifted zero points) aren't supported", "zero_point_shift")
    bits, symmetric = fields.bits("bw"), fields.flag("is_sym")
    scale = fields.scales("scale").reshape(-1)
    offset = fields.integers("offset", -(2**bits - 1), 0).reshape(-1)
    if len(scale) != len(offset):
        raise where.error(f"{len(offset)} offsets for {len(scale)} scales", "offset")
    if layout is ScaleLayout.TENSOR:
        if len(scale) != 1:
            raise where.error(f"{len(scale)} scales, but enc_type is PER_TENSOR", "scale")
        scale, offset = scale[0], offset[0]
    if layout is ScaleLayout.LPBQ:
        return _two_level(fields, bits, symmetric, scale, offset)
    zero_point, strict = zero_point_of(np.asarray(offset), bits, symmetric)
    size = None
    if layout is ScaleLayout.BLOCK:
        fields.require("block_size")
        size = fields.integer("block_size", 1, 2**31)
    return Entry(
        bits, scale, zero_point, layout, symmetric=symmetric, strict=strict, block_size=size,
        packed=VERSION if layout is ScaleLayout.BLOCK else None,
    )  # fmt: skip


def _two_level(
    fields: Fields, decompressed: int, symmetric: bool, scale: NDArray[np.float64], offset: NDArray[np.int64]
) -> Entry:
    where = fields.where
    fields.require(*_LPBQ)
    bits = fields.bits("compressed_bw")
    if bits >= decompressed:
        raise where.error(f"{bits} bits aren't fewer than the decompressed {decompressed}", "compressed_bw")
    if not symmetric or (offset != -(2 ** (decompressed - 1))).any():
        raise where.error(f"LPBQ is symmetric: is_sym true and every offset {-(2 ** (decompressed - 1))}", "offset")
    factors = fields.integers("per_block_int_scale", 1, 2 ** (decompressed - bits)).reshape(-1)
    if len(factors) % len(scale):
        raise where.error(f"{len(factors)} block scales for {len(scale)} channels", "per_block_int_scale")
    return Entry(
        bits, scale, np.full(scale.shape, 1 << (bits - 1)), ScaleLayout.LPBQ, symmetric=True, strict=False,
        block_size=fields.integer("block_size", 1, 2**31), block_scale=factors, decompressed_bits=decompressed,
        packed=VERSION,
    )  # fmt: skip


def render(file: EncodingsFile) -> dict[str, Any]:
    """Entries → a file's JSON object.

    Raises:
        EncodingError: the schema can't express an entry.
    """
    refuse_unsplit(file, VERSION)
    return {
        "version": VERSION,
        "producer": described(file, VERSION),
        "activation_encodings": RenderedLater(file.activations, render_entry).values(),
        "param_encodings": RenderedLater(file.parameters, render_entry).values(),
        "excluded_layers": list(file.excluded_layers),
        "quantizer_args": dict(file.quantizer_args),
    }


def render_entry(name: str, entry: Entry) -> dict[str, Any]:
    """One tensor's object."""
    if entry.float_format is not None:
        if entry.float_format != "float16":
            raise EncodingError(
                f"tensor {name!r}: schema 1.0.0 has no {entry.float_format}; use schema 2.0.0 (of an export: "
                "`--encodings-version 2.0.0`), or float16"
            )
        return {"name": name, "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}
    layout = entry.layout or (ScaleLayout.TENSOR if entry.count == 1 else None)
    if layout is None:
        raise EncodingError(
            f"tensor {name!r}: its {entry.count} scales may be those of channels or of blocks; "
            "give the tensor's geometry (the model)"
        )
    if layout in (ScaleLayout.BLOCK, ScaleLayout.LPBQ) and entry.packed not in (None, VERSION):
        raise EncodingError(
            f"tensor {name!r}: schema 1.0.0 lists blocks in another order than {entry.packed}; "
            "give the tensor's geometry (the model)"
        )
    said: dict[str, Any] = {"name": name, "dtype": "INT", "bw": entry.bits, "is_sym": entry.is_symmetric}
    if layout is ScaleLayout.LPBQ:
        decompressed = entry.decompressed_bits or 2 * entry.bits
        said["bw"] = decompressed
        said["scale"] = entry.scale.tolist()
        said["offset"] = [-(2 ** (decompressed - 1))] * entry.scale.size
    else:
        said["scale"] = _ordered(entry, entry.scale)
        said["offset"] = _ordered(entry, offset_of(name, entry))
    said["enc_type"] = _NAMES[layout]
    if layout in (ScaleLayout.BLOCK, ScaleLayout.LPBQ):
        said["block_size"] = entry.block_size
    if layout is ScaleLayout.LPBQ:
        said["compressed_bw"] = entry.bits
        said["per_block_int_scale"] = _ordered(entry, entry.block_scale)
    return said


def _ordered(entry: Entry, values: NDArray[Any] | None) -> list[Any]:
    assert values is not None, "an LPBQ entry has block scales"
    if values.ndim < 2:
        return list(values.reshape(-1).tolist())
    return list(pack(values, *entry.block_axes, VERSION).tolist())


def losses(entry: Entry) -> list[str]:
    """What a reader of this schema won't find."""
    del entry
    return []
