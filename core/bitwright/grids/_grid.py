"""Quantization grids: what a number may become, and the reference arithmetic that puts it there.

The integer grid is the one of ONNX QuantizeLinear, computed in float32 and in this order
(ONNX operator specification, QuantizeLinear-21)::

    q  = clip(round_half_even(x / scale) + zero_point, qmin, qmax)
    x' = (q - zero_point) * scale

Composed so, numpy, PyTorch, TensorFlow and ONNX Runtime give identical integers, midpoints included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.grids._code_tables import CODE_TABLES
from bitwright.grids._scale_types import ScaleType

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

FLOAT_FORMATS: dict[str, tuple[int, int, float]] = {
    # name: (exponent bits, mantissa bits, largest finite value)
    "float16": (5, 10, 65504.0),
    "bfloat16": (8, 7, 3.3895313892515355e38),
    "float8e4m3fn": (4, 3, 448.0),
    "float8e5m2": (5, 2, 57344.0),
}
DTYPES: dict[str, str] = {**{name: name for name in FLOAT_FORMATS}, "float8e4m3fn": "float8_e4m3fn",
                         "float8e5m2": "float8_e5m2"}  # fmt: skip
"""Float format → what frameworks call its data type."""
WIDE = 2**24
"""Grid steps from which codes don't fit float32's significand: they are computed in double."""
FLOAT = "float"
"""The type of what isn't quantized at all: `activations="float"` is weights only. No grid has it."""
FloatFormat = Literal["float16", "bfloat16", "float8e4m3fn", "float8e5m2", "float4e2m1", "nf4"]
"""What `FLOAT_FORMATS` has, and for weights what `CODE_TABLES` has."""


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index of `axis` (canonical layout)."""

    axis: int = 0


@dataclass(frozen=True, slots=True)
class Blockwise:
    """One scale for each (index of `axis`, run of `block_size` indices of `block_axis`); other axes are covered whole.

    `decompressed_bits` makes it two-level (LPBQ): block scales are integer multiples, 1 to
    2**(decompressed_bits - bits), of one float scale a channel.
    """

    axis: int = 0
    block_axis: int = 1
    block_size: int = 32
    decompressed_bits: int | None = None


@dataclass(frozen=True, slots=True)
class Dynamic:
    """The range is that of the values themselves, at run time: of the whole tensor, or of each token.

    `per_token`: one scale for each row, which is the last axis; what else a tensor has are tokens.
    """

    per_token: bool = False


Granularity = PerTensor | PerChannel | Blockwise | Dynamic


class HasCodes:
    """What specifications and encodings say of their codes alike."""

    bits: int
    signed: bool
    strict: bool
    granularity: Granularity

    @cached_property
    def grid(self) -> Grid:
        """The integer code range; meaningless for a float format."""
        return Grid.of(self.bits, signed=self.signed, strict=self.strict)

    @cached_property
    def run_time(self) -> RunTimeGrid | None:
        """The codes of a range at run time; None where the numbers are known before."""
        layout = self.granularity
        return RunTimeGrid(self.grid, layout.per_token) if isinstance(layout, Dynamic) else None


@dataclass(frozen=True)
class QuantSpec(HasCodes):
    """How one site is to be quantized; what calibration turns into an `Encoding`.

    Attributes:
        bits: width of the integer codes, 2 to 16, or 32.
        signed: codes are stored signed (int8) or unsigned (uint8).
        symmetric: zero lies in the middle of the code range; otherwise the range follows the data.
        strict: drop the most negative code of a symmetric grid (−127..127 for 8 bits).
        unsigned_symmetric: a symmetric site whose data are never negative uses the codes 0..2**bits − 1.
        granularity: which elements share a scale.
        float_format: a float format, or a table of values, in place of integers; `bits` is then its width.
        minimum, maximum: the target's encoding constraints. Both together pin the range; one clamps that end of it.
        scheme: the calibration scheme's name; None takes the one that the user chose for the run.
        pair_limit: of weights whose kernel adds products in twos in int16: the largest sum of two neighbouring codes
            of one sign (`bitwright.grids._pair_sums`); scales are raised to keep it.
        scale_type: the number type of the scales, where they aren't any float32.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    strict: bool = False
    unsigned_symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    float_format: FloatFormat | None = None
    minimum: float | None = None
    maximum: float | None = None
    scheme: str | None = None
    pair_limit: int | None = None
    scale_type: ScaleType | None = None

    def __repr__(self) -> str:
        # What most don't have isn't shown, so that results stored under what this gives are found again.
        shown = [f for f in fields(self) if f.name != "scale_type" or self.scale_type is not None]
        return f"QuantSpec({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        if self.float_format is None:
            if not (2 <= self.bits <= 16 or self.bits == 32):
                raise InputError(f"bits={self.bits}: integer grids have 2 to 16 bits, or 32")
        elif self.float_format not in (*FLOAT_FORMATS, *CODE_TABLES):
            known = ", ".join((*FLOAT_FORMATS, *CODE_TABLES))
            raise InputError(f"unknown float format {self.float_format!r}; known: {known}")
        if self.strict and not self.symmetric:
            raise InputError("strict=True drops the most negative code of a symmetric grid; set symmetric=True too")
        if isinstance(self.granularity, Dynamic):
            run_time_grid(self.granularity, self.bits, (self.signed, self.symmetric, self.strict), self.float_format)

    def with_(self, **changes: object) -> QuantSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Grid:
    """An interval of integer codes, ends included."""

    qmin: int
    qmax: int

    @classmethod
    def of(cls, bits: int, *, signed: bool, strict: bool = False) -> Grid:
        """The codes of a `bits`-wide integer; `strict` drops the lowest one."""
        low = -(2 ** (bits - 1)) if signed else 0
        return cls(low + int(strict), 2 ** (bits - 1) - 1 if signed else 2**bits - 1)

    @property
    def steps(self) -> int:
        """Number of grid steps between the ends (codes − 1)."""
        return self.qmax - self.qmin


@dataclass(frozen=True, slots=True)
class RunTimeGrid:
    """A grid without numbers: these are found in the values, at run time.

    Attributes:
        codes: −qmax … qmax of a symmetric grid, 0 … qmax of one that follows both ends of the range.
        per_token: as in `Dynamic`.
    """

    codes: Grid
    per_token: bool

    @property
    def symmetric(self) -> bool:
        """Whether zero is the middle code."""
        return self.codes.qmin < 0

    def __str__(self) -> str:
        bits = self.codes.qmax.bit_length() + int(self.symmetric)
        return f"{'int' if self.symmetric else 'uint'}{bits}:{'per_token' if self.per_token else 'dynamic'}"


def run_time_grid(
    layout: Dynamic, bits: int, kind: tuple[bool, bool, bool], float_format: FloatFormat | None
) -> RunTimeGrid:
    """The grid of a range at run time.

    Args:
        layout: of what the range is.
        bits: of a code.
        kind: signed, symmetric, strict; all or none of them.
        float_format: None.

    Raises:
        InputError: there is no such grid.
    """
    if float_format is not None or len(set(kind)) != 1 or bits > 16:
        raise InputError(
            "a range at run time goes with integers of up to 16 bits: signed ones on a symmetric grid without the "
            "lowest code, or unsigned ones on a grid that follows both ends of the range"
        )
    return RunTimeGrid(Grid.of(bits, signed=kind[0], strict=kind[2]), layout.per_token)


_TYPE = re.compile(
    r"(?P<base>u?int(?P<bits>\d+)|float16|bfloat16|float8e4m3fn|float8e5m2)"
    r"(:((?P<layout>block|lpbq)(?P<size>\d+)|(?P<dynamic>per_token|dynamic)))?"
)
_TYPE_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8e4m3fn",
    "fp8_e4m3": "float8e4m3fn",
    "fp8_e5m2": "float8e5m2",
    "mxfp8_e4m3": "mxfp8",
}
"""Every other name that a type goes by."""
_BLOCK_TYPES: dict[str, tuple[int, FloatFormat, int, ScaleType | None]] = {
    "mxfp4": (4, "float4e2m1", 32, "float8e8m0"),
    "mxfp8": (8, "float8e4m3fn", 32, "float8e8m0"),
    "mxfp8_e5m2": (8, "float8e5m2", 32, "float8e8m0"),
    "nvfp4": (4, "float4e2m1", 16, "float8e4m3fn"),
    "nf4": (4, "nf4", 64, None),
}
"""Types in which blocks of floats share a scale: bits, format, elements of a block, type of the scales.

OCP Microscaling Formats v1.0, table 1 (mxfp…), NVIDIA's NVFP4, and QLoRA's NF4, whose blocks may have another size.
"""
_DYNAMIC_ALIASES = {"token": "per_token", "dynamic_per_token": "per_token", "per_tensor": "dynamic"}


def parse_type(text: str) -> tuple[int, bool | None, FloatFormat | None, Blockwise | Dynamic | None]:
    """Read a type as users write it: ``int8``, ``uint16``, ``float16``, ``fp8``, ``int4:block32``, ``int4:lpbq64``,
    ``mxfp4``, ``mxfp8``, ``nvfp4``, ``nf4``, ``int8:per_token``, ``uint8:dynamic``. `block_scales` has the rest of it.

    Returns:
        (bits, signed, float format, layout: blocks, a range at run time, or neither); signed is None for float formats.

    Raises:
        InputError: the text is none of these.
    """
    plain = text.strip().lower()
    name, colon, layout_text = (plain if ":" in plain else plain.replace("-", ":", 1)).partition(":")
    layout_text = layout_text.replace("-", "_")
    layout_text = _DYNAMIC_ALIASES.get(layout_text, layout_text)
    name = _TYPE_ALIASES.get(name, name)
    if name in _BLOCK_TYPES:
        return _parse_blocks(text, name, layout_text)
    match = _TYPE.fullmatch(name + colon + layout_text)
    if match is None:
        raise InputError(
            f"unknown type {text!r}: use int2…int16, uint2…uint16, float16, bfloat16, fp8 (float8e4m3fn), float8e5m2, "
            "with blocks int4:block32, int4:lpbq64, mxfp4, mxfp8 (mxfp8_e5m2), nvfp4 and nf4, with a range at run time "
            "int8:per_token and uint8:dynamic"
        )
    layout: Blockwise | Dynamic | None = None
    if match["layout"]:
        size = int(match["size"])
        if size < 1:
            raise InputError(f"{text!r}: a block has at least one element")
        layout = Blockwise(block_size=size, decompressed_bits=8 if match["layout"] == "lpbq" else None)
    elif match["dynamic"]:
        layout = Dynamic(match["dynamic"] == "per_token")
    if match["bits"]:
        bits = int(match["bits"])
        if not 2 <= bits <= 16:
            raise InputError(f"{text!r}: integer types have 2 to 16 bits")
        wide = layout.decompressed_bits if isinstance(layout, Blockwise) else None
        if wide is not None and bits >= wide:
            raise InputError(f"{text!r}: LPBQ decompresses to {wide} bits, so its codes need fewer")
        return bits, not name.startswith("u"), None, layout
    if layout is not None:
        raise InputError(
            f"{text!r}: blocks and ranges at run time go with integer types, such as int4:block32 and int8:per_token"
        )
    name = match["base"]
    return (16 if name.endswith("float16") else 8), None, name, None  # type: ignore[return-value]


def _parse_blocks(text: str, name: str, layout: str) -> tuple[int, None, FloatFormat, Blockwise]:
    bits, format, size, _ = _BLOCK_TYPES[name]
    if layout:
        given = re.fullmatch(r"block([1-9]\d*)", layout)
        if given is None or (name != "nf4" and int(given[1]) != size):
            own = "blocks of any size, such as nf4:block32" if name == "nf4" else f"blocks of {size}"
            raise InputError(f"{text!r}: {name} has {own}")
        size = int(given[1])
    return bits, None, format, Blockwise(block_size=size)


def block_scales(text: str) -> ScaleType | None:
    """The number type of the scales that a type's name stands for: float8e8m0 of ``mxfp4``; None where it's float32."""
    name = text.strip().lower().partition(":")[0]
    name = _TYPE_ALIASES.get(name, name)
    return _BLOCK_TYPES[name][3] if name in _BLOCK_TYPES else None


def spread(values: NDArray[np.generic], shape: tuple[int, ...], granularity: Granularity) -> NDArray[np.generic]:
    """Bring a scale or zero-point array to a shape that broadcasts against a tensor of `shape`.

    Args:
        values: () for `PerTensor`, (channels,) for `PerChannel`, (channels, blocks) for `Blockwise`.

    Raises:
        InputError: the numbers don't fit the tensor (axis out of range, block size that doesn't divide).
    """
    granularity = fixed_layout(granularity)
    if isinstance(granularity, PerTensor):
        return values.reshape(())
    axis = axis_of(granularity.axis, shape)
    if isinstance(granularity, PerChannel):
        if values.shape != (shape[axis],):
            raise InputError(
                f"per-channel values of shape {values.shape} for {shape[axis]} channels (axis {axis} of {shape})"
            )
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    block_axis = axis_of(granularity.block_axis, shape)
    blocks = block_count(shape, granularity)
    if values.shape != (shape[axis], blocks):
        raise InputError(
            f"blockwise values of shape {values.shape}, expected {(shape[axis], blocks)} for a tensor {shape}"
        )
    full = np.repeat(values, shape[block_axis] // blocks, axis=1)
    if axis > block_axis:
        full = full.T
    return full.reshape([n if i in (axis, block_axis) else 1 for i, n in enumerate(shape)])


def block_count(shape: tuple[int, ...], granularity: Blockwise) -> int:
    """Blocks along the block axis.

    Raises:
        InputError: the block size doesn't divide the axis.
    """
    length = shape[axis_of(granularity.block_axis, shape)]
    if length % granularity.block_size:
        raise InputError(
            f"block size {granularity.block_size} doesn't divide axis {granularity.block_axis} of {shape} "
            f"({length} elements); choose a divisor of {length}"
        )
    return length // granularity.block_size


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the scale array for a tensor of `shape`: (0,) where there is none before run time."""
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, Dynamic):
        return (0,)
    channels = shape[axis_of(granularity.axis, shape)]
    return (channels,) if isinstance(granularity, PerChannel) else (channels, block_count(shape, granularity))


def to_groups(values: NDArray[np.generic], granularity: Granularity) -> NDArray[np.generic]:
    """Rearrange a tensor to (*scale_shape, elements): the elements that share a scale lie on the last axis."""
    granularity = fixed_layout(granularity)
    if isinstance(granularity, PerTensor):
        return values.reshape(-1)
    axis = axis_of(granularity.axis, values.shape)
    if isinstance(granularity, PerChannel):
        return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    block_axis = axis_of(granularity.block_axis, values.shape)
    blocks = block_count(values.shape, granularity)
    moved = np.moveaxis(values, (axis, block_axis), (0, 1))
    return moved.reshape(moved.shape[0], blocks, -1)


def fixed_layout(granularity: Granularity) -> PerTensor | PerChannel | Blockwise:
    """A layout whose scales are known before run time.

    Raises:
        InputError: they are found at run time.
    """
    if isinstance(granularity, Dynamic):
        raise InputError("a range that is found at run time has no scales to lay out: they follow from the values")
    return granularity


def stored_granularity(granularity: Granularity, layout: Sequence[int] | None) -> Granularity:
    """A canonical granularity along the axes of an array that is stored otherwise.

    Args:
        granularity: of the parameter.
        layout: the stored axis of each canonical one; None where they are the same.
    """
    if layout is None or isinstance(granularity, PerTensor | Dynamic):
        return granularity
    axis = layout[granularity.axis]
    if isinstance(granularity, Blockwise):
        return replace(granularity, axis=axis, block_axis=layout[granularity.block_axis])
    return PerChannel(axis)


def axis_of(axis: int, shape: tuple[int, ...]) -> int:
    """An axis counted from the front.

    Raises:
        InputError: the shape has no such axis.
    """
    if not -len(shape) <= axis < len(shape):
        raise InputError(f"axis {axis} is out of range for a tensor of shape {shape}")
    return axis % len(shape)


def quantize(
    x: NDArray[np.floating],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32],
    grid: Grid,
) -> IntArray:
    """Integer codes of `x`; scale and zero point must broadcast against it (see `spread`)."""
    # A 32-bit code doesn't fit float32's 24-bit significand; all narrower grids use float32, as runtimes do.
    if grid.steps >= 2**24:
        wide = np.rint(np.divide(x, scale, dtype=np.float64))
        return np.asarray(np.clip(wide + zero_point, grid.qmin, grid.qmax), np.int32)
    with np.errstate(over="ignore"):  # what overflows float32 is clipped to the end of the grid
        q = np.asarray(np.divide(x, scale, dtype=np.float32))
    np.rint(q, out=q)
    q = np.add(q, np.asarray(zero_point, np.float32), out=q)
    return np.asarray(np.clip(q, grid.qmin, grid.qmax, out=q), np.int32)


def dequantize(q: NDArray[np.integer], scale: NDArray[np.float32], zero_point: NDArray[np.int32]) -> FloatArray:
    """Real values of integer codes: (q − zero_point) · scale in float32."""
    return np.asarray(np.subtract(q, zero_point, dtype=np.int64).astype(np.float32) * scale, np.float32)


def fake_quantize(
    x: NDArray[np.floating],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32],
    grid: Grid,
) -> FloatArray:
    """`dequantize(quantize(x))` in one float32 pass, bit-equal to the two steps for grids of up to 16 bits."""
    if grid.steps >= 2**24:
        return dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    with np.errstate(over="ignore"):  # what overflows float32 is clipped to the end of the grid
        q = np.divide(x, scale, dtype=np.float32)
    q = np.asarray(q)
    np.rint(q, out=q)
    zero = np.asarray(zero_point, np.float32)
    np.clip(q, grid.qmin - zero, grid.qmax - zero, out=q)
    return np.asarray(np.multiply(q, scale, out=q), np.float32)


def largest_of(format: FloatFormat) -> float:
    """The largest magnitude of a float format or table of values, before the scale."""
    return CODE_TABLES[format].largest if format in CODE_TABLES else FLOAT_FORMATS[format][2]


def cast_float(x: NDArray[np.floating], format: FloatFormat, scale: NDArray[np.float32] | float = 1.0) -> FloatArray:
    """Round to a float format and back, saturating at its largest finite value.

    fp8 values are scaled first: x' = cast(x / scale) · scale, the division in float32 as in QuantizeLinear.
    Formulas: OCP 8-bit Floating Point Specification (E4M3, E5M2), IEEE 754 binary16, bfloat16; all round half
    to even, subnormals kept. Tables of values (`CODE_TABLES`) are scaled too.
    """
    with np.errstate(over="ignore"):  # what overflows float32 saturates below, as it does in QuantizeLinear
        single = np.divide(x, scale, dtype=np.float32)
    if format in CODE_TABLES:
        table = CODE_TABLES[format]
        values = np.array((*table.values, np.nan), np.float32)
        places = np.searchsorted(np.array(table.above, np.float32), single)
        return np.asarray(values[np.where(np.isnan(single), -1, places)] * scale, np.float32)
    exponent_bits, mantissa_bits, largest = FLOAT_FORMATS[format]
    v = single.astype(np.float64)
    bias = 2 ** (exponent_bits - 1) - 1
    _, exponent = np.frexp(np.abs(v))  # |v| in [0.5, 1) · 2**exponent
    step = np.ldexp(1.0, np.maximum(exponent - 1, 1 - bias) - mantissa_bits)
    rounded = np.clip(np.rint(v / step) * step, -largest, largest)
    return np.asarray(rounded * scale, np.float32)
