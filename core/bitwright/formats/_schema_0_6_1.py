"""Schema 0.6.1: two objects of tensor name → list of one-scale encodings, with ranges and AIMET's negative offsets.

Offsets count on the unsigned grid: offset = −(code of 0.0), minimum = scale · offset,
maximum = scale · (offset + 2**bitwidth − 1). Booleans are the strings "True" and "False". The forerunners 0.4.0
and 0.5.0 (no `dtype`) and files without a header are read too.
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

VERSION: Version = "0.6.1"
EARLIER = ("0.4.0", "0.5.0")
SECTIONS = ("activation_encodings", "param_encodings")
_HEADER = ("version", "producer", "excluded_layers", "quantizer_args")
_INTEGER = ("bitwidth", "dtype", "is_symmetric", "min", "max", "scale", "offset")
_VECTOR = ("rows_per_block", "cols_per_block", "vector_dim", "vector_stride", "index_bw")


def parse(document: Mapping[str, Any], source: str) -> EncodingsFile:
    """A file's JSON object → entries. Those with several scales keep `layout` None until bound."""
    where = Where(source)
    top = Fields(where, document, (*SECTIONS, *_HEADER))
    if not any(s in top for s in SECTIONS):
        raise where.error("has neither activation_encodings nor param_encodings")
    typed = "version" in top and top["version"] not in EARLIER[:1]
    activations, parameters = (collect(_section(top, section, source, typed), where) for section in SECTIONS)
    return EncodingsFile(activations, parameters, version=VERSION, **parse_header(top))


def _section(top: Fields, section: str, source: str, typed: bool) -> Iterable[tuple[str, Entry]]:
    table = top.get(section, {})
    if not isinstance(table, Mapping):
        raise top.where.error(f"expected an object of tensor names, found {describe(table)}", section)
    for name, items in table.items():
        where = Where(source, name)
        if isinstance(items, Mapping) and items and set(items) <= {"input", "output"}:
            raise where.error(
                "this file names PyTorch modules and not tensors (AIMET's *_torch.encodings); "
                "use the .encodings file that the same export wrote beside the ONNX model"
            )
        if not isinstance(items, list) or not items:
            raise where.error(f"expected a list of encodings, found {describe(items)}")
        yield name, _entry(where, items, typed)


def _entry(where: Where, items: list[Any], typed: bool) -> Entry:
    elements = [Fields(where, item, (*_INTEGER, *_VECTOR), ("bitwidth",)) for item in items]
    first = elements[0]
    for element in elements:
        element.refuse(_VECTOR, "vector quantization isn't supported")
        if typed:
            element.require("dtype")
    if "dtype" in first and first.text("dtype", ("int", "float")) == "float":
        return _float_entry(where, elements)
    # A range alone says as much: the overrides that people write by hand have only that.
    numbers = ("scale", "offset") if any("scale" in e or "offset" in e for e in elements) else ("min", "max")
    for element in elements:
        element.require("is_symmetric", *numbers)
    _agree(where, elements)
    bits, symmetric = first.bits("bitwidth"), first.flag("is_symmetric")
    columns = _columns(where, elements)
    minimum, maximum = (columns.numbers(name) if name in columns else None for name in ("min", "max"))
    if "scale" in numbers:
        scale, offset = columns.scales("scale"), columns.integers("offset", -(2**bits - 1), 0)
    else:
        assert minimum is not None and maximum is not None
        scale, offset = _from_range(where, bits, symmetric, minimum, maximum)
    zero_point, strict = zero_point_of(offset, bits, symmetric)
    _check_range(where, scale, offset, bits=bits, strict=strict, minimum=minimum, maximum=maximum)
    return Entry(
        bits, scale, zero_point, None, symmetric=symmetric, strict=strict, packed=VERSION,
        minimum=minimum, maximum=maximum,
    )  # fmt: skip


def _float_entry(where: Where, elements: list[Fields]) -> Entry:
    if len(elements) > 1:
        raise where.error("a float tensor has one encoding")
    elements[0].refuse(
        ("is_symmetric", "min", "max", "scale", "offset"), "a float encoding has only bitwidth and dtype"
    )
    if elements[0].integer("bitwidth", 1, 64) != 16:
        raise where.error("the only float encoding of schema 0.6.1 is 16 bits (float16)", "bitwidth")
    return cast_entry("float16")


def _agree(where: Where, elements: list[Fields]) -> None:
    for name in ("bitwidth", "dtype", "is_symmetric"):
        seen = {str(e[name]) if name in e else "" for e in elements}
        if len(seen) > 1:
            raise where.error(f"the encodings of one tensor differ: {', '.join(sorted(seen))}", name)


def _columns(where: Where, elements: list[Fields]) -> Fields:
    """The numbers of all encodings, one list a field; `min` and `max` only where all have them."""
    names = [name for name in ("min", "max", "scale", "offset") if all(name in e for e in elements)]
    for name in names:
        if any(isinstance(e[name], list) for e in elements):
            raise where.error("one number an encoding is expected", name)
    return Fields(where, {name: [e[name] for e in elements] for name in names}, names)


def _from_range(
    where: Where, bits: int, symmetric: bool, low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if (low > 0).any() or (high < 0).any() or (low >= high).any():
        raise where.error("min ≤ 0 ≤ max and min < max are needed", "min")
    steps, half = 2**bits - 1, 2 ** (bits - 1) - 1
    if symmetric and (low == -high).all():  # the strict grid, as AIMET 1.x infers it
        scale = high / half
        return _positive(where, scale), np.full(scale.shape, -half)
    scale = _positive(where, (high - low) / steps)
    return scale, np.rint(low / scale).astype(np.int64)


def _positive(where: Where, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    if not (scale.astype(np.float32) > 0).all():
        raise where.error("the range is empty in float32", "max")
    return scale


def _check_range(
    where: Where,
    scale: NDArray[np.float64],
    offset: NDArray[np.int64],
    *,
    bits: int,
    strict: bool,
    minimum: NDArray[np.float64] | None,
    maximum: NDArray[np.float64] | None,
) -> None:
    low, high = _range(scale, offset, bits, strict)
    # Writers round differently, so the two need to agree only well enough to catch a mix-up.
    slack = scale + 1e-3 * (high - low)
    for name, given, implied in (("min", minimum, low), ("max", maximum, high)):
        if given is not None and (wrong := np.abs(given - implied) > slack).any():
            raise where.error(
                f"{given[wrong][0]:g} contradicts scale and offset, which give {implied[wrong][0]:g}", name
            )


def _range(
    scale: NDArray[np.float64], offset: NDArray[np.int64], bits: int, strict: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return scale * offset, scale * (offset + 2**bits - 1 - int(strict))


def render(file: EncodingsFile) -> dict[str, Any]:
    """Entries → a file's JSON object.

    Raises:
        EncodingError: the schema can't express an entry.
    """
    refuse_unsplit(file, VERSION)
    return {
        "version": VERSION,
        "producer": described(file, VERSION),
        "activation_encodings": RenderedLater(file.activations, render_entry),
        "param_encodings": RenderedLater(file.parameters, render_entry),
        "excluded_layers": list(file.excluded_layers),
        "quantizer_args": dict(file.quantizer_args),
    }


def render_entry(name: str, entry: Entry) -> list[dict[str, Any]]:
    """One tensor's list. LPBQ is written as the block scales that it amounts to."""
    if entry.float_format is not None:
        if entry.float_format != "float16":
            raise EncodingError(
                f"tensor {name!r}: schema 0.6.1 has no {entry.float_format}; use schema 2.0.0 (of an export: "
                "`--encodings-version 2.0.0`), or float16"
            )
        return [{"bitwidth": 16, "dtype": "float"}]
    scale, offset = _flat(name, entry)
    low, high = _range(scale, offset, entry.bits, bool(entry.strict))
    if entry.minimum is not None and entry.maximum is not None and entry.minimum.size == scale.size:
        low, high = (_ordered(entry, np.asarray(v)) for v in (entry.minimum, entry.maximum))
    common = {"bitwidth": entry.bits, "dtype": "int", "is_symmetric": str(entry.is_symmetric)}
    columns = zip(low.tolist(), high.tolist(), scale.tolist(), offset.tolist(), strict=True)
    return [{**common, "min": lo, "max": hi, "scale": s, "offset": o} for lo, hi, s, o in columns]


def _flat(name: str, entry: Entry) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if entry.packed not in (None, VERSION) and entry.layout in (ScaleLayout.BLOCK, ScaleLayout.LPBQ):
        raise EncodingError(
            f"tensor {name!r}: schema 0.6.1 lists blocks in another order than {entry.packed}; "
            "give the tensor's geometry (the model)"
        )
    if entry.layout is ScaleLayout.LPBQ:
        scale = entry.scales.astype(np.float64)
        offset = np.full(scale.shape, -entry.middle)
    else:
        scale, offset = entry.scale, offset_of(name, entry)
    return _ordered(entry, scale), _ordered(entry, offset)


def _ordered(entry: Entry, values: NDArray[Any]) -> NDArray[Any]:
    if values.ndim < 2:
        return values.reshape(-1)
    return pack(values, *entry.block_axes, VERSION)


def losses(entry: Entry) -> list[str]:
    """What a reader of this schema won't find."""
    return ["its two-level (LPBQ) scales become plain block scales"] if entry.layout is ScaleLayout.LPBQ else []
