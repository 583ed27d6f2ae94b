"""From a file's entries to encodings and back: `bind` settles what a file leaves open, `unbind` undoes it.

Both speak the artefact's native axes; `permute` takes an encoding from the canonical layout there, and with
`inverse(layout)` back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.formats._entries import CAST_FORMATS, Entry, ScaleLayout
from bitwright.formats._header import cast_entry, laid_out
from bitwright.grids import Blockwise, Encoding, Granularity, PerChannel, PerTensor, QuantSpec, fixed_layout


@dataclass(frozen=True, slots=True)
class TensorGeometry:
    """A tensor of the artefact in its native layout.

    Attributes:
        shape: its dimensions.
        channel_axis: the axis of per-channel scales; for a weight, the output channels.
        block_axis: the axis that blocks divide; for a weight, the input channels.
    """

    shape: tuple[int, ...]
    channel_axis: int | None = None
    block_axis: int | None = None


def resolve(entry: Entry, geometry: TensorGeometry | None, name: str = "the tensor") -> Entry:
    """An entry with layout, axes and order filled in, and its counts checked against the tensor.

    What the file says goes before what the geometry says; its numbers are never changed.

    Args:
        entry: as read.
        geometry: None for tensors of unknown shape; then only per-tensor entries and complete ones can be settled.
        name: the tensor's, for messages.

    Raises:
        EncodingError: the number of scales doesn't fit the tensor, or an axis is needed and not known.
    """
    layout = entry.layout
    if layout is ScaleLayout.TENSOR or (layout is None and entry.count == 1):
        return entry if layout is not None else _unpacked(entry, ScaleLayout.TENSOR)
    rank = entry.rank if geometry is None else len(geometry.shape)
    if entry.rank is not None and entry.rank != rank:
        raise EncodingError(
            f"tensor {name!r}: the scales are for {entry.rank} axes, but its shape is {_shape(geometry)}"
        )
    axis = _axis(entry.axis, geometry.channel_axis if geometry else None, rank, name, "channel")
    if geometry is None:
        if layout is ScaleLayout.CHANNEL or (layout is not None and entry.packed is None):
            return entry.with_(axis=axis)
        raise EncodingError(f"tensor {name!r}: its {entry.count} scales can't be placed without its shape")
    channels = geometry.shape[axis]
    if layout is None:
        layout = ScaleLayout.CHANNEL if entry.count == channels else ScaleLayout.BLOCK
    if layout is ScaleLayout.CHANNEL:
        if entry.count != channels:
            raise EncodingError(
                f"tensor {name!r}: {entry.count} scales for {channels} channels (axis {axis} of {geometry.shape})"
            )
        return _unpacked(entry, layout).with_(axis=axis)
    return _settle_blocks(entry.with_(layout=layout), geometry, axis, name)


def _settle_blocks(entry: Entry, geometry: TensorGeometry, axis: int, name: str) -> Entry:
    rank = len(geometry.shape)
    block_axis = _axis(entry.block_axis, geometry.block_axis, rank, name, "block")
    channels, length = geometry.shape[axis], geometry.shape[block_axis]
    blocks, rest = divmod(entry.count, channels)
    size = entry.block_size or (length // blocks if blocks and not rest else 0)
    if (
        rest
        or axis == block_axis
        or size * blocks != length
        or (entry.layout is ScaleLayout.LPBQ and entry.scale.size != channels)
    ):
        of_size = f" of {entry.block_size}" if entry.block_size else ""
        raise EncodingError(
            f"tensor {name!r}: {entry.count} scales don't fit blocks{of_size} along axis {block_axis} in {channels} "
            f"channels (axis {axis}) of shape {geometry.shape}"
        )
    if entry.packed is not None:
        entry = laid_out(entry, channels, axis, block_axis, rank)
    return entry.with_(axis=axis, block_axis=block_axis, block_size=size, rank=rank)


def _axis(said: int | None, given: int | None, rank: int | None, name: str, what: str) -> int:
    axis = given if said is None else said
    if axis is None:
        raise EncodingError(
            f"tensor {name!r}: its {what} axis isn't in the file; give the tensor's geometry (the model)"
        )
    if rank is None:
        return axis
    if not -rank <= axis < rank:
        raise EncodingError(f"tensor {name!r}: {what} axis {axis} of a tensor with {rank} axes")
    return axis % rank


def _unpacked(entry: Entry, layout: ScaleLayout) -> Entry:
    if layout is ScaleLayout.CHANNEL:
        return entry.with_(layout=layout, packed=None)
    scalar: dict[str, Any] = {
        n: None if (v := getattr(entry, n)) is None else np.asarray(v).reshape(())
        for n in ("scale", "zero_point", "minimum", "maximum")
    }
    return entry.with_(layout=layout, packed=None, **scalar)


def _shape(geometry: TensorGeometry | None) -> str:
    return str(geometry.shape) if geometry is not None else "unknown"


def bind(
    entry: Entry, geometry: TensorGeometry | None = None, spec: QuantSpec | None = None, *, name: str = "the tensor"
) -> Encoding:
    """The encoding that an entry gives a tensor, in the artefact's native axes.

    Where the file doesn't say how codes are stored (0.6.1, 1.0.0), symmetric grids are signed and others
    unsigned, as AIMET reads them; symmetry that it doesn't record (2.x) is seen from the zero point. A `spec`
    settles signedness, symmetry and strictness as the site has them, as far as the numbers allow it;
    the grid's real values don't change.

    Args:
        entry: as read.
        geometry: the tensor's; None does for per-tensor entries and for files that record all.
        spec: the site's specification.
        name: the tensor's, for messages.

    Raises:
        EncodingError: the entry doesn't fit the tensor.
    """
    entry = resolve(entry, geometry, name)
    granularity = _granularity(entry)
    if entry.float_format is not None:
        scale = entry.scale.astype(np.float32)
        floats = Encoding(
            entry.bits, True, True, scale, np.zeros(scale.shape, np.int32), granularity,
            float_format=entry.float_format, source="loaded", scale_type=entry.scale_type,
            tensor_scale=entry.tensor_scale,
        )  # fmt: skip
        if (wrong := floats.scale != scale).any():
            raise EncodingError(
                f"tensor {name!r}: its scales should be {entry.scale_type} numbers, and {scale[wrong][0]!r} isn't "
                f"({int(wrong.sum())} of {scale.size})"
            )
        return floats
    scales = entry.scales
    code = np.broadcast_to(
        entry.zero_point[:, None] if entry.block_scale is not None else entry.zero_point, scales.shape
    )
    signed, symmetric, strict = _convention(entry, code, spec)
    zero = code - entry.middle if signed else code
    if zero.max() > np.iinfo(np.int32).max:
        raise EncodingError(f"tensor {name!r}: an unsigned {entry.bits}-bit zero point beyond int32 can't be used")
    factors = None if entry.block_scale is None else entry.block_scale.astype(np.int32)
    return Encoding(
        entry.bits, signed, symmetric, scales, zero.astype(np.int32), granularity, strict,
        block_scale=factors, source="loaded",
    )  # fmt: skip


def _convention(entry: Entry, code: NDArray[np.int64], spec: QuantSpec | None) -> tuple[bool, bool, bool]:
    """(signed, symmetric, strict) of the encoding to make."""
    symmetric, signed, strict = entry.is_symmetric, entry.is_signed, bool(entry.strict)
    if spec is None or spec.float_format is not None:
        return signed, symmetric, strict
    central = bool((code == entry.middle).all())
    never_negative = bool((code == 0).all()) and spec.unsigned_symmetric
    if entry.symmetric is None:
        symmetric = spec.symmetric and (central or never_negative)
    if entry.bits != 32:
        signed = spec.signed and not (symmetric and never_negative)
    if entry.strict is None and central:
        strict = spec.strict
    return signed, symmetric, strict


def _granularity(entry: Entry) -> Granularity:
    if entry.layout is ScaleLayout.TENSOR:
        return PerTensor()
    assert entry.axis is not None
    if entry.layout is ScaleLayout.CHANNEL:
        return PerChannel(entry.axis)
    assert entry.block_axis is not None and entry.block_size is not None
    rank = entry.rank or 2
    return Blockwise(entry.axis % rank, entry.block_axis % rank, entry.block_size, entry.decompressed_bits)


def unbind(encoding: Encoding, shape: Sequence[int] | None = None) -> Entry:
    """The entry of an encoding in the artefact's native axes.

    Args:
        encoding: permuted to native axes.
        shape: the tensor's native shape; needed for blocks, and checked otherwise.

    Raises:
        EncodingError: blocks without a shape, scales that don't fit it, or LPBQ scales that aren't integer
            multiples of one scale a channel.
    """
    layout = fixed_layout(encoding.granularity)
    if encoding.float_format in CAST_FORMATS:
        return cast_entry(encoding.float_format)
    geometry = None if shape is None else TensorGeometry(tuple(shape))
    middle = 0 if encoding.float_format is not None or not encoding.signed else 1 << (encoding.bits - 1)
    said: dict[str, Any] = {
        "float_format": encoding.float_format,
        "signed": encoding.signed,
        "symmetric": encoding.symmetric,
        "strict": encoding.strict,
    }
    if encoding.float_format is not None:
        said |= {"scale_type": encoding.scale_type, "tensor_scale": encoding.tensor_scale}
    scale, zero = encoding.scale.astype(np.float64), encoding.zero_point.astype(np.int64) + middle
    if isinstance(layout, PerTensor):
        return Entry(encoding.bits, scale, zero, ScaleLayout.TENSOR, **said)
    said["axis"] = layout.axis
    if isinstance(layout, PerChannel):
        return resolve(Entry(encoding.bits, scale, zero, ScaleLayout.CHANNEL, **said), geometry)
    if geometry is None:
        raise EncodingError("blockwise encodings are written in the tensor's own shape; give unbind the shape")
    said |= {"block_axis": layout.block_axis, "block_size": layout.block_size, "rank": len(geometry.shape)}
    if layout.decompressed_bits is None:
        return resolve(Entry(encoding.bits, scale, zero, ScaleLayout.BLOCK, **said), geometry)
    if (zero != 1 << (encoding.bits - 1)).any():
        raise EncodingError("two-level (LPBQ) encodings must be symmetric")
    gamma, factors = two_levels(encoding)
    entry = Entry(
        encoding.bits, gamma, zero[:, 0], ScaleLayout.LPBQ, block_scale=factors,
        decompressed_bits=layout.decompressed_bits, **said,
    )  # fmt: skip
    return resolve(entry, geometry)


def two_levels(encoding: Encoding) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Channel scales γ (channels,) and integer factors k (channels, blocks) of an LPBQ encoding, k·γ = scale exactly.

    An encoding keeps the rounded products; γ is the float32 number that gives all of them back.

    Raises:
        EncodingError: there are no factors, or no such γ.
    """
    if encoding.block_scale is None:
        raise EncodingError("a two-level (LPBQ) encoding without block_scale; make it with encoding.two_level")
    factors = encoding.block_scale.astype(np.float32)
    # Rounding moves a product by half an ulp at most, so γ is the quotient of any block or a near neighbour of it;
    # a factor that is a power of two gives it exactly and is tried first.
    exact = np.argmax(encoding.block_scale & (encoding.block_scale - 1) == 0, axis=1)[:, None]
    quotient = (np.take_along_axis(encoding.scale, exact, 1) / np.take_along_axis(factors, exact, 1))[:, 0]
    gamma, found = quotient.copy(), np.zeros(quotient.shape, bool)
    for steps in (0, 1, -1, 2, -2):
        candidate = quotient
        for _ in range(abs(steps)):
            candidate = np.nextafter(candidate, np.float32(np.inf if steps > 0 else 0))
        fits = (factors * candidate[:, None] == encoding.scale).all(axis=1) & ~found
        gamma[fits], found = candidate[fits], found | fits
    if not found.all():
        channel = int(np.argmin(found))
        raise EncodingError(f"channel {channel}: the block scales aren't integer multiples of one float32 scale")
    return gamma.astype(np.float64), encoding.block_scale.astype(np.int64)


def permute(encoding: Encoding, layout: Sequence[int] | None) -> Encoding:
    """An encoding in canonical axes → the same one in native axes.

    Args:
        encoding: its granularity names canonical axes.
        layout: as `graph.Param.layout`: canonical axis i comes from native axis `layout[i]`; None is the identity.
            With (1, 0), a Gemm weight stored (in, out), channels move from axis 0 to axis 1.

    Raises:
        EncodingError: the layout has too few axes.
    """
    granularity = fixed_layout(encoding.granularity)
    if layout is None or isinstance(granularity, PerTensor):
        return encoding

    def native(axis: int) -> int:
        if not -len(layout) <= axis < len(layout):
            raise EncodingError(f"axis {axis} of an encoding, but the layout {tuple(layout)} has {len(layout)} axes")
        return layout[axis]

    if isinstance(granularity, PerChannel):
        return encoding.with_(granularity=PerChannel(native(granularity.axis)))
    return encoding.with_(
        granularity=Blockwise(
            native(granularity.axis),
            native(granularity.block_axis),
            granularity.block_size,
            granularity.decompressed_bits,
        )
    )


def inverse(layout: Sequence[int] | None) -> tuple[int, ...] | None:
    """The layout that undoes another: `permute(permute(e, layout), inverse(layout))` is e."""
    return None if layout is None else tuple(int(i) for i in np.argsort(np.asarray(layout)))
