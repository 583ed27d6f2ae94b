"""What schemas 2.0.0 and 2.1.0 have in common: one list of objects with the fields of ONNX QuantizeLinear.

`axis` is the channel axis, or with `block_size` the block axis; the channel axis of blocks is then the other
one that isn't 1. Zero points are those of the stored type and are left out where all are 0.
Tensors in float16 and bfloat16 are left out: no entry means "not quantized". Symmetry isn't recorded;
a zero point on the middle code counts as symmetric. A strict grid is written as its full range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.formats._block_order import nest, unnest
from bitwright.formats._entries import CAST_FORMATS, EncodingsFile, Entry, RenderedLater, ScaleLayout, Version
from bitwright.formats._fields import Fields, Where, describe
from bitwright.formats._header import collect, described, parse_header

HEADER = ("version", "producer", "excluded_layers", "quantizer_args", "encodings")
COMMON = ("name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size")
_INTEGERS = {f"{sign}int{bits}": (sign == "", bits) for bits in (*range(2, 17), 32) for sign in ("", "u")}
_FLOATS = {"float8e4m3fn": 8, "float8e5m2": 8, "float4e2m1": 4, "nf4": 4}
"""Bits by name. NF4 isn't in the schema, which has no tables of values: other readers refuse its name."""
_KNOWN_TYPES = ("int2…int16", "int32", "uint2…uint16", "uint32", *_FLOATS)


def parse_document(
    document: Mapping[str, Any], source: str, version: Version, entry: Callable[[Fields], Entry], known: Iterable[str]
) -> EncodingsFile:
    """A file's JSON object → entries, all of them in `unsplit`."""
    where = Where(source)
    top = Fields(where, document, HEADER, ("version", "encodings"))
    items = top["encodings"]
    if not isinstance(items, list):
        raise where.error(f"expected a list of encodings, found {describe(items)}", "encodings")
    fields = (*COMMON, *known)

    def entries() -> Iterable[tuple[str, Entry]]:
        for index, item in enumerate(items):
            named = isinstance(item, Mapping) and isinstance(item.get("name"), str) and item["name"]
            at = Where(source, item["name"]) if named else Where(f"{source}: encodings[{index}]")
            one = Fields(at, item, fields, ("name", "output_dtype"))
            yield one.text("name"), entry(one)

    return EncodingsFile(unsplit=collect(entries(), where), version=version, **parse_header(top))


def parse_one_level(fields: Fields) -> Entry:
    """An entry whose y_scale is a number or nested list."""
    where = fields.where
    fields.require("y_scale")
    float_format, signed, bits = output_type(fields)
    scale = _whole(fields.scales("y_scale"), fields)
    if "block_size" in fields:
        fields.require("axis")
    zero = np.zeros(scale.shape, np.int64)
    if "y_zero_point" in fields:
        low = -(2 ** (bits - 1)) if signed else 0
        zero = _whole(fields.integers("y_zero_point", low, low + 2**bits - 1), fields)
        if zero.shape != scale.shape:
            raise where.error(f"shape {zero.shape}, but y_scale has {scale.shape}", "y_zero_point")
        if float_format is not None and zero.any():
            raise where.error("float types have zero point 0", "y_zero_point")
    said: dict[str, Any] = {"signed": signed, "float_format": float_format}
    middle = 0 if float_format else 1 << (bits - 1)
    if float_format is not None:
        said["symmetric"] = True
    zero = zero + middle if signed else zero
    if "block_size" in fields:
        axis, block_axis = block_axes(fields, scale.shape, "y_scale")
        rank = scale.ndim
        scale, zero = (unnested(where, values, axis, block_axis, "y_scale") for values in (scale, zero))
        return Entry(
            bits, scale, zero, ScaleLayout.BLOCK, axis=axis, block_axis=block_axis, rank=rank,
            block_size=fields.integer("block_size", 1, 2**31), **said,
        )  # fmt: skip
    if "axis" in fields:
        if scale.ndim != 1:
            raise where.error(f"shape {scale.shape}; with an axis and no block_size, a list is expected", "y_scale")
        return Entry(bits, scale, zero, ScaleLayout.CHANNEL, axis=fields.integer("axis", -64, 63), **said)
    if scale.ndim:
        raise where.error(f"{scale.size} scales need an axis", "axis")
    return Entry(bits, scale, zero, ScaleLayout.TENSOR, **said)


def _whole(values: NDArray[Any], fields: Fields) -> NDArray[Any]:
    """A list of one number for a tensor without axis is that number."""
    return values.reshape(()) if values.size == 1 and "axis" not in fields else values


def parse_two_level(
    fields: Fields, factors: NDArray[np.int64], channel_scale: NDArray[np.float64], axis: int | None
) -> Entry:
    """An LPBQ entry of integer factors in native shape and float channel scales."""
    where = fields.where
    float_format, signed, bits = output_type(fields)
    if float_format is not None:
        raise where.error("two-level scales go with integer types", "output_dtype")
    if "y_zero_point" in fields:
        low = -(2 ** (bits - 1)) if signed else 0
        if (fields.integers("y_zero_point", low, low + 2**bits - 1) != (0 if signed else 1 << (bits - 1))).any():
            raise where.error("two-level scales go with symmetric grids only", "y_zero_point")
    elif not signed:
        raise where.error("two-level scales go with signed types", "output_dtype")
    channel_axis, block_axis = block_axes(fields, factors.shape, "axis", axis)
    blocks = unnested(where, factors, channel_axis, block_axis, "per_block_int_scale")
    if channel_scale.size != blocks.shape[0]:
        raise where.error(
            f"{channel_scale.size} channel scales for {blocks.shape[0]} channels", "per_channel_float_scale"
        )
    if blocks.max() > 2**bits:
        raise where.error(f"a block scale exceeds {2**bits}, the most for {bits}-bit codes", "per_block_int_scale")
    return Entry(
        bits, channel_scale.reshape(-1), np.full(blocks.shape[0], 1 << (bits - 1)), ScaleLayout.LPBQ, signed=signed,
        axis=channel_axis, block_axis=block_axis, rank=factors.ndim,
        block_size=fields.integer("block_size", 1, 2**31), block_scale=blocks, decompressed_bits=2 * bits,
    )  # fmt: skip


def output_type(fields: Fields) -> tuple[Any, bool, int]:
    """(float format or None, signed, bits) of `output_dtype`."""
    text = fields.text("output_dtype")
    if text in _FLOATS:
        return text, True, _FLOATS[text]
    if text not in _INTEGERS:
        raise fields.where.error(f"{text!r} is none of {', '.join(_KNOWN_TYPES)}", "output_dtype")
    signed, bits = _INTEGERS[text]
    return None, signed, bits


def block_axes(
    fields: Fields, shape: tuple[int, ...], name: str, channel_axis: int | None = None
) -> tuple[int | None, int]:
    """(channel axis or None if it can't be told, block axis); one that the file gives may count from the end."""
    rank = len(shape)
    if rank < 2:
        raise fields.where.error("blocks need a scale with as many axes as the tensor, at least two", name)
    block_axis = fields.integer("axis", -rank, rank - 1)
    if channel_axis is not None:
        if not -rank <= channel_axis < rank or channel_axis % rank == block_axis % rank:
            raise fields.where.error(f"channel axis {channel_axis} beside block axis {block_axis} of {rank} axes", name)
        return channel_axis, block_axis
    others = [i for i in range(rank) if i != block_axis % rank]
    wide = [i for i in others if shape[i] != 1] or others
    # With one channel only, every other axis has length 1, and nothing tells which is the channels'.
    return (None if shape[wide[0]] == 1 and rank > 2 else wide[0]), block_axis


def unnested(where: Where, values: NDArray[Any], axis: int | None, block_axis: int, name: str) -> NDArray[Any]:
    """(channels, blocks) of a native-shaped array."""
    if axis is None:
        return values.reshape(1, -1)
    if values.size != values.shape[axis] * values.shape[block_axis]:
        raise where.error(f"shape {values.shape}: scales may vary along the channel and block axes only", name)
    return unnest(values, axis, block_axis)


def render_document(
    file: EncodingsFile, version: Version, two_level: Callable[[Entry], dict[str, Any]]
) -> dict[str, Any]:
    """Entries → a file's JSON object; activations first."""
    return {
        "version": version,
        "producer": described(file, version),
        "encodings": RenderedLater(
            {n: e for n, e in file.entries.items() if e.float_format not in CAST_FORMATS},
            partial(render_entry, version=version, two_level=two_level),
        ).values(),
    }


def render_entry(
    name: str, entry: Entry, version: Version, two_level: Callable[[Entry], dict[str, Any]]
) -> dict[str, Any]:
    """One tensor's object.

    Raises:
        EncodingError: an axis that the schema records isn't known.
    """
    layout = entry.layout or (ScaleLayout.TENSOR if entry.count == 1 else None)
    blocks = layout in (ScaleLayout.BLOCK, ScaleLayout.LPBQ)
    if (
        layout is None
        or (layout is ScaleLayout.CHANNEL and entry.axis is None)
        or (blocks and entry.packed is not None)
    ):
        raise EncodingError(
            f"tensor {name!r}: schema {version} records the channel axis, which isn't known; "
            "give the tensor's geometry (the model)"
        )
    said: dict[str, Any]
    if layout is ScaleLayout.LPBQ:
        if (entry.decompressed_bits or 2 * entry.bits) != 2 * entry.bits:
            raise EncodingError(
                f"tensor {name!r}: in schema {version} LPBQ decompresses to twice the code width; "
                f"{entry.bits} to {entry.decompressed_bits} bits need schema 1.0.0"
            )
        said = {"name": name, "output_dtype": f"{'' if entry.is_signed else 'u'}int{entry.bits}", **two_level(entry)}
        if not entry.is_signed:
            said["y_zero_point"] = nested(entry, np.full(entry.scales.shape, entry.middle)).tolist()
        return said
    if entry.tensor_scale is not None and version == "2.1.0":
        return {"name": name, "output_dtype": entry.float_format, **two_level(entry)}
    if entry.float_format is not None:
        said = {"name": name, "output_dtype": entry.float_format}
        zero = np.zeros(entry.scale.shape, np.int64)
    else:
        said = {"name": name, "output_dtype": f"{'' if entry.is_signed else 'u'}int{entry.bits}"}
        zero = entry.zero_point - (entry.middle if entry.is_signed else 0)
    scale = entry.scale
    if layout is ScaleLayout.BLOCK:
        scale, zero = nested(entry, scale), nested(entry, zero)
    elif layout is ScaleLayout.TENSOR:
        scale, zero = scale.reshape(()), zero.reshape(())
    said["y_scale"] = scale.tolist()
    if zero.any():
        said["y_zero_point"] = zero.tolist()
    if layout is not ScaleLayout.TENSOR:
        said["axis"] = entry.block_axis if layout is ScaleLayout.BLOCK else entry.axis
    if layout is ScaleLayout.BLOCK:
        said["block_size"] = entry.block_size
    return said


def nested(entry: Entry, values: NDArray[Any]) -> NDArray[Any]:
    """(channels, blocks) in the entry's native shape."""
    return nest(values, *entry.block_axes)


def losses(entry: Entry) -> list[str]:
    """What a reader of 2.x won't find."""
    said = []
    if entry.float_format in CAST_FORMATS:
        said.append(f"it has no entry any more: 2.x leaves {entry.float_format} tensors out")
    if entry.strict:
        said.append("its grid gets the lowest code back: 2.x can't drop it")
    return said
