"""Encodings: the numbers that pin a site to a grid, and the immutable table that holds a model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids._grid import (
    Blockwise,
    Dynamic,
    FloatFormat,
    Granularity,
    HasCodes,
    PerChannel,
    PerTensor,
    QuantSpec,
    RunTimeGrid,
    cast_float,
    dequantize,
    fake_quantize,
    fixed_layout,
    largest_of,
    parse_type,
    quantize,
    run_time_grid,
    spread,
    to_groups,
)
from bitwright.grids._pair_sums import fitted_scale
from bitwright.grids._range_numbers import NUMPY, GridKind, range_numbers, two_level_factors
from bitwright.grids._run_time import run_time_numbers, run_time_rounded
from bitwright.grids._scale_types import ScaleType, shared_exponent_scale, tensor_scale_of, typed_scale
from bitwright.tables import Table, Tabular, Value


@dataclass(frozen=True, eq=False)
class Encoding(HasCodes):
    """A calibrated grid: scale and zero point for each group of elements that share them.

    Attributes:
        bits, signed, symmetric, strict: as in `QuantSpec`; together they give `grid`.
        scale: float32, () per tensor, (channels,) per channel, (channels, blocks) blockwise; always > 0. Empty, (0,),
            of a range at run time (`Dynamic`), which has no numbers before.
        zero_point: int32 of the same shape, ONNX convention (the code of 0.0); within the grid.
        granularity: which elements share a scale, in the canonical layout of the tensor.
        float_format: set for float encodings; scale is then 1 but below 16 bits.
        block_scale: LPBQ only, int32 (channels, blocks): scale = channel_scale[:, None] · block_scale.
        pair_limit: as in `QuantSpec`, for those who choose codes; not kept in files.
        scale_type: as in `QuantSpec`; scales are rounded to it, whoever gives them. Two-level scales aren't.
        tensor_scale: float32, of scales in float8e4m3fn, which are such numbers times this; None takes the one of which
            the largest scale is the largest multiple.
        frozen: later calibrations keep it, and later techniques don't change what it goes with (AdaRound, SeqMSE,
            loaded encodings).
        kept: later calibrations keep it as long as the parameter has the values that it was found for; techniques may
            search again, and change the parameter.
        source: what produced it, for reports ("minmax", "sqnr", "adaround", "loaded", …).
        held_by: who froze or keeps it, for reports: a technique, "loaded", "set by hand" or "training".
    """

    bits: int
    signed: bool
    symmetric: bool
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    granularity: Granularity = field(default_factory=PerTensor)
    strict: bool = False
    float_format: FloatFormat | None = None
    block_scale: NDArray[np.int32] | None = None
    frozen: bool = False
    source: str = ""
    pair_limit: int | None = None
    kept: bool = False
    held_by: str = ""
    scale_type: ScaleType | None = None
    tensor_scale: float | None = None

    def __post_init__(self) -> None:
        raw = _own(self.scale, np.float32)
        if self.scale_type == "float8e4m3fn" and self.tensor_scale is None and raw.size:
            object.__setattr__(self, "tensor_scale", tensor_scale_of(raw))
        scale = self.typed(raw)
        zero = _own(self.zero_point, np.int32)
        if zero.shape != scale.shape:
            raise EncodingError(f"zero point of shape {zero.shape} beside a scale of shape {scale.shape}")
        rank = {PerTensor: 0, PerChannel: 1, Blockwise: 2, Dynamic: 1}[type(self.granularity)]
        if scale.ndim != rank or (isinstance(self.granularity, Dynamic) and scale.size):
            raise EncodingError(
                f"{type(self.granularity).__name__} encodings need a scale of rank {rank}, got shape {scale.shape}"
            )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise EncodingError("a scale must be finite and greater than 0")
        if isinstance(self.granularity, Dynamic):
            run_time_grid(self.granularity, self.bits, (self.signed, self.symmetric, self.strict), self.float_format)
        if self.float_format is None and ((zero < self.grid.qmin).any() or (zero > self.grid.qmax).any()):
            raise EncodingError(f"a zero point lies outside the codes {self.grid.qmin}..{self.grid.qmax}")
        scale.setflags(write=False)
        zero.setflags(write=False)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero)

    def typed(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales as this encoding would have them: rounded to its `scale_type`."""
        if self.scale_type is None or self.block_scale is not None:
            return scale
        return typed_scale(scale, self.scale_type, self.bits, self.tensor_scale)

    @property
    def is_fixed(self) -> bool:
        """Whether it is an integer grid whose numbers are known: no float format, no range at run time."""
        return self.float_format is None and self.run_time is None

    @property
    def minimum(self) -> NDArray[np.float32]:
        """Smallest representable value of each group."""
        return dequantize(np.full(self.scale.shape, self.grid.qmin), self.scale, self.zero_point)

    @property
    def maximum(self) -> NDArray[np.float32]:
        """Largest representable value of each group."""
        return dequantize(np.full(self.scale.shape, self.grid.qmax), self.scale, self.zero_point)

    def spread(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Scale and zero point, ready to broadcast against a tensor of `shape`."""
        return spread(self.scale, shape, self.granularity), spread(self.zero_point, shape, self.granularity)  # type: ignore[return-value]

    def quantize(self, x: NDArray[np.floating]) -> NDArray[np.int32]:
        """Integer codes of a tensor in canonical layout.

        Raises:
            EncodingError: the encoding is a float format.
        """
        if self.float_format is not None:
            raise EncodingError(f"a {self.float_format} encoding has no integer codes")
        if self.run_time is not None:
            scale, zero = self._at_run_time(x, self.run_time)
            return quantize(x, scale, zero.astype(np.int32), self.grid)
        return quantize(x, *self.spread(x.shape), self.grid)

    def dequantize(self, q: NDArray[np.integer]) -> NDArray[np.float32]:
        """Real values of integer codes."""
        return dequantize(q, *self.spread(q.shape))

    def steps_between(self, a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.int64]:
        """How many codes two tensors of one shape are apart, flat: only where they differ, if there is one grid.

        Raises:
            EncodingError: the encoding is a float format.
        """
        if self.run_time is not None:
            # Of values that are on a grid of their own; those of `a` tell it.
            scale, _ = self._at_run_time(a, self.run_time)
            return np.asarray(np.rint(np.abs(a.astype(np.float64) - b) / scale), np.int64).reshape(-1)
        if self.scale.ndim == 0:  # equal values have equal codes
            moved = a != b
            a, b = a[moved], b[moved]
        return np.asarray(np.abs(self.quantize(a).astype(np.int64) - self.quantize(b)), np.int64).reshape(-1)

    def fake_quantize(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """Round a tensor to the grid (or float format) and back."""
        if self.float_format is not None:
            return cast_float(x, self.float_format, spread(self.scale, x.shape, self.granularity))  # type: ignore[arg-type]
        if self.run_time is not None:
            values = np.asarray(x, np.float32)
            return np.asarray(run_time_rounded(NUMPY, values, self.run_time)) if values.size else values
        return fake_quantize(x, *self.spread(x.shape), self.grid)

    @staticmethod
    def _at_run_time(x: NDArray[np.floating], grid: RunTimeGrid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if not np.size(x):
            return np.ones((), np.float32), np.zeros((), np.float32)
        return run_time_numbers(NUMPY, np.asarray(x, np.float32), grid)

    def with_(self, **changes: Any) -> Encoding:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def equals(self, other: Encoding) -> bool:
        """Same grid and bit-equal numbers; provenance (`frozen`, `kept`, `source`, `held_by`) is not compared."""
        return (
            (self.bits, self.signed, self.symmetric, self.strict, self.float_format, self.granularity)
            == (other.bits, other.signed, other.symmetric, other.strict, other.float_format, other.granularity)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


def _own(values: object, kind: type[np.generic]) -> NDArray[Any]:
    """The values in an array that nobody else writes to: a copy, unless it is one already, such as an encoding's."""
    array = np.asarray(values)
    if array.dtype == kind and array.base is None and not array.flags.writeable:
        return array
    return np.array(values, kind)


def extents(encoding: Encoding, rank: int) -> tuple[int, ...]:
    """The smallest shape of that rank that an encoding's scales fit: 1 along axes that they don't vary over.

    Raises:
        EncodingError: an axis is out of range.
    """
    layout, shape = fixed_layout(encoding.granularity), [1] * rank
    axes: tuple[int, ...] = () if isinstance(layout, PerTensor) else (layout.axis,)
    if isinstance(layout, Blockwise):
        axes = (layout.axis, layout.block_axis)
    if any(not -rank <= axis < rank for axis in axes):
        raise EncodingError(f"an encoding over axes {axes} doesn't fit a tensor of rank {rank}")
    for axis, length in zip(axes, encoding.scale.shape, strict=True):
        shape[axis] = length
    if isinstance(layout, Blockwise):
        shape[layout.block_axis] *= layout.block_size
    return tuple(shape)


def encoding_from_range(
    spec: QuantSpec,
    low: NDArray[np.floating] | float,
    high: NDArray[np.floating] | float,
    *,
    source: str = "",
) -> Encoding:
    """The encoding whose grid covers [low, high], zero always included and exactly representable.

    Formulas: `range_numbers.range_numbers`.

    Args:
        spec: the site's specification; `low` and `high` have its scale shape.
        low, high: the range before zero is included.
        source: kept as the encoding's provenance.

    Raises:
        EncodingError: a bound is NaN or infinite, or low > high.
    """
    lo, hi = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
        raise EncodingError(
            "the range holds NaN or infinite bounds; check the calibration data and the model's outputs"
        )
    if (lo > hi).any():
        raise EncodingError("the range's low end exceeds its high end")
    if spec.minimum is not None and spec.maximum is not None:
        lo, hi = np.full_like(lo, spec.minimum), np.full_like(hi, spec.maximum)
    elif spec.minimum is not None:
        lo, hi = np.maximum(lo, spec.minimum), np.maximum(hi, spec.minimum)
    elif spec.maximum is not None:
        lo, hi = np.minimum(lo, spec.maximum), np.minimum(hi, spec.maximum)
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    as_float = spec.float_format is not None
    one_sided = not as_float and spec.symmetric and spec.unsigned_symmetric and bool((lo >= 0).all())
    signed, strict = (True, False) if as_float else (spec.signed and not one_sided, spec.strict and not one_sided)
    symmetric = spec.symmetric or as_float
    kind = GridKind(spec.bits, signed, symmetric, strict, spec.float_format, one_sided)
    scale, zero = range_numbers(NUMPY, lo, hi, kind)
    if spec.float_format is not None and spec.scale_type == "float8e8m0":
        scale = shared_exponent_scale(np.maximum(-lo, hi), largest_of(spec.float_format))
    limit = spec.pair_limit if signed and symmetric and not as_float else None
    return Encoding(
        spec.bits, signed, symmetric, scale, zero.astype(np.int32), spec.granularity, strict, spec.float_format,
        source=source, pair_limit=limit, scale_type=spec.scale_type,
    )  # fmt: skip


def dynamic_encoding(of: QuantSpec | str) -> Encoding:
    """The encoding of a site whose range is found at run time: all of it is in the specification, or in the type.

    Raises:
        EncodingError: the range is to be known before.
        InputError: no type.
    """
    if isinstance(of, str):
        bits, signed, float_format, layout = parse_type(of)
        of = QuantSpec(
            bits, bool(signed), bool(signed), bool(signed), granularity=layout or PerTensor(), float_format=float_format
        )
    spec = of
    if not isinstance(spec.granularity, Dynamic):
        raise EncodingError("only a range at run time needs neither data nor values")
    none = np.zeros(0)
    return Encoding(
        spec.bits, spec.signed, spec.symmetric, none.astype(np.float32), none.astype(np.int32), spec.granularity,
        spec.strict, source="run time",
    )  # fmt: skip


def encoding_of_weights(weight: NDArray[np.floating], spec: QuantSpec, *, source: str = "minmax") -> Encoding:
    """Min-max encoding of a parameter in canonical layout; LPBQ specs give two-level scales."""
    groups = to_groups(np.asarray(weight, np.float32), spec.granularity)
    raw = encoding_from_range(spec, groups.min(axis=-1), groups.max(axis=-1), source=source)
    return fit_pairs(two_level(raw), weight)


def fit_pairs(encoding: Encoding, weight: NDArray[np.floating]) -> Encoding:
    """The encoding with scales raised so that codes of neighbours keep its `pair_limit`; as it is without one."""
    if encoding.pair_limit is None or not isinstance(encoding.granularity, PerChannel):
        return encoding
    scale = fitted_scale(np.asarray(weight), encoding.scale, encoding.bits, encoding.pair_limit)
    return encoding.with_(scale=scale)


def two_level(encoding: Encoding) -> Encoding:
    """Round block scales to integer multiples of one float scale a channel (low-power blockwise quantization).

    γ = max over the channel's blocks / 2**(d − b), k = clip(round(scale/γ), 1, 2**(d − b)), scale = k·γ,
    with b the code width and d the decompressed width (AIMET's grouped blockwise quantization).
    Encodings of any other granularity are returned as they are.
    """
    layout = encoding.granularity
    if not isinstance(layout, Blockwise) or layout.decompressed_bits is None:
        return encoding
    ratio = 2 ** (layout.decompressed_bits - encoding.bits)
    factors, gamma = two_level_factors(NUMPY, encoding.scale, len(encoding.scale), ratio)
    return encoding.with_(scale=factors * gamma, block_scale=factors.astype(np.int32))


@dataclass(frozen=True)
class Provenance:
    """One technique that shaped a table: its name, settings and the fingerprint of what it ran on."""

    technique: str
    settings: Mapping[str, Any]
    fingerprint: str = ""


class EncodingTable(Tabular, Mapping[str, Encoding]):
    """An immutable mapping of site ids to encodings; every change is a new table."""

    __slots__ = ("_entries", "provenance")

    def __init__(self, entries: Mapping[str, Encoding] | None = None, provenance: tuple[Provenance, ...] = ()) -> None:
        self._entries: dict[str, Encoding] = dict(entries or {})
        self.provenance = provenance

    def __getitem__(self, site: str) -> Encoding:
        return self._entries[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        frozen = sum(e.frozen for e in self._entries.values())
        return f"EncodingTable({len(self)} encodings, {frozen} frozen)"

    def as_table(self) -> Table:
        """A row for each encoding: type, range over all its groups, scales, who made it and who holds it.

        Of a scale or zero point for each channel or block, the smallest and the largest are given.
        """
        columns = (
            "site", "type", "scales", "low", "high", "smallest scale", "largest scale", "zero point", "source", "held",
        )  # fmt: skip
        return Table(columns, tuple(_row(site, e) for site, e in self._entries.items()))

    def merged(self, entries: Mapping[str, Encoding]) -> EncodingTable:
        """A table in which `entries` replace or extend these."""
        return EncodingTable({**self._entries, **entries}, self.provenance)

    def restricted(self, sites: Iterator[str] | set[str] | frozenset[str]) -> EncodingTable:
        """A table with only these sites."""
        keep = set(sites)
        return EncodingTable({s: e for s, e in self._entries.items() if s in keep}, self.provenance)

    def recorded(self, step: Provenance) -> EncodingTable:
        """The same encodings with one more step of provenance."""
        return EncodingTable(self._entries, (*self.provenance, step))

    @property
    def frozen(self) -> EncodingTable:
        """Only the frozen entries."""
        return EncodingTable({s: e for s, e in self._entries.items() if e.frozen}, self.provenance)

    @property
    def held(self) -> EncodingTable:
        """Only the entries that calibration doesn't replace: frozen and kept ones."""
        return EncodingTable({s: e for s, e in self._entries.items() if e.frozen or e.kept}, self.provenance)


def _row(site: str, e: Encoding) -> tuple[Value, ...]:
    """What `EncodingTable.as_table` says of one encoding."""
    kind = e.float_format or f"{'int' if e.signed else 'uint'}{e.bits}"
    held = "frozen" if e.frozen else "kept" if e.kept else ""
    who = f"{held} ({e.held_by})" if held and e.held_by else held
    if isinstance(e.granularity, Dynamic):
        scales = "of each token" if e.granularity.per_token else "at run time"
        return (site, kind, scales, None, None, None, None, None, e.source, who)
    low = high = None
    if e.float_format is None:
        low, high = float(e.minimum.min()), float(e.maximum.max())
    points = sorted({int(z) for z in np.ravel(e.zero_point)})
    zero = points[0] if len(points) == 1 else f"{points[0]} to {points[-1]}"
    ends = (float(e.scale.min()), float(e.scale.max()))
    return (site, kind, e.scale.size, low, high, *ends, zero, e.source, who)
