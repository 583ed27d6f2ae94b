"""What an encodings file says of its tensors, in one form for all schemas.

A schema leaves things out (0.6.1 has neither axis nor block size, 2.x neither symmetry nor the split into
activations and parameters). `None` in an `Entry` means "the file doesn't say"; `binding.bind` settles it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids import FloatFormat, Provenance, ScaleType

Version = str
"""The name of a schema, as its files have it under "version"."""
VERSIONS: tuple[Version, ...] = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
"""The built-in schemas; `versions` has those of plugins too."""
CAST_FORMATS = frozenset({"float16", "bfloat16"})
"""Float formats without a scale: a plain cast, which schemas 2.x express by leaving the tensor out."""


class ScaleLayout(StrEnum):
    """Which elements share a scale, as files name it."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"
    LPBQ = "lpbq"


@dataclass(frozen=True, eq=False)
class Entry:
    """The encoding of one tensor as a file gives it; axes are those of the file's artefact.

    Attributes:
        bits: width of the codes, 2 to 16 or 32 (8 or 16 for float formats).
        scale: float64 as the file has it. () per tensor; (channels,) per channel, and for LPBQ, the float scale
            of each channel; (channels, blocks) blockwise; (n,) in the file's order where `packed` is set.
        zero_point: int64, the shape of `scale`: the code of 0.0 counted from the lowest code of the full
            range, so that 128 is the middle of 8 bits, however the codes are stored.
        layout: None in 0.6.1 until bound, which doesn't tell channels from blocks.
        float_format: set for float encodings.
        signed: codes are stored signed; not recorded by 0.6.1 and 1.0.0.
        symmetric: not recorded by 2.x.
        strict: the lowest code is dropped; not recorded by 2.x.
        axis: channel axis; not recorded by 0.6.1 and 1.0.0.
        block_axis, block_size: for blocks; the axis isn't recorded by 0.6.1 and 1.0.0, the size not by 0.6.1.
        rank: number of axes of the tensor, where known; the writers of blocks need it.
        block_scale: LPBQ's integer factors, (channels, blocks), or flat where `packed` is set.
        decompressed_bits: LPBQ only; 2.x doesn't record it and takes twice `bits`.
        packed: the schema in whose flat order the numbers of blocks still are.
        scale_type: of floats alone: the number type of the scales; only 2.1.0 records one of them (float8e4m3fn).
        tensor_scale: of scales in float8e4m3fn: what such numbers are multiplied with, in float32; recorded by 2.1.0.
        minimum, maximum: ends of the range where the file gave them (0.6.1), to write them back unchanged.
    """

    bits: int
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    layout: ScaleLayout | None = ScaleLayout.TENSOR
    float_format: FloatFormat | None = None
    signed: bool | None = None
    symmetric: bool | None = None
    strict: bool | None = None
    axis: int | None = None
    block_axis: int | None = None
    block_size: int | None = None
    rank: int | None = None
    block_scale: NDArray[np.int64] | None = None
    decompressed_bits: int | None = None
    packed: Version | None = None
    scale_type: ScaleType | None = None
    tensor_scale: float | None = None
    minimum: NDArray[np.float64] | None = None
    maximum: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("scale", np.float64), ("zero_point", np.int64), ("block_scale", np.int64)):
            value = getattr(self, name)
            if value is not None:
                value = np.array(value, kind)
                if name == "zero_point" and value.size > 1 and (value == value.flat[0]).all():
                    # Of a large model's blocks, one number for each would take more than the scales that they have.
                    value = np.broadcast_to(value.flat[0], value.shape)
                value.setflags(write=False)
                object.__setattr__(self, name, value)

    @property
    def middle(self) -> int:
        """The code in the middle of the range, where a symmetric grid has its zero."""
        return 1 << (self.bits - 1)

    @property
    def is_symmetric(self) -> bool:
        """Symmetry as the file says, or else as the numbers show: zero lies on the middle code."""
        return bool((self.zero_point == self.middle).all()) if self.symmetric is None else self.symmetric

    @property
    def is_signed(self) -> bool:
        """Signedness as the file says, or else by AIMET's rule: symmetric grids are signed, others unsigned.

        A symmetric grid whose zero is the lowest code (data that are never negative) is unsigned; 32 bits are signed.
        """
        if self.signed is not None:
            return self.signed
        return self.bits == 32 or (self.is_symmetric and bool(self.zero_point.any()))

    @property
    def scales(self) -> NDArray[np.float32]:
        """The scales that a simulation uses, in float32: of LPBQ, integer factor · channel scale, rounded once."""
        single = self.scale.astype(np.float32)
        if self.block_scale is None:
            return single
        if self.block_scale.ndim == 1:
            single = np.repeat(single, self.block_scale.size // single.size)
        else:
            single = single[:, None]
        return np.asarray(self.block_scale.astype(np.float32) * single, np.float32)

    @property
    def block_axes(self) -> tuple[int, int, int]:
        """(channel axis, block axis, rank) of an entry of blocks that isn't packed.

        Where a single channel leaves its axis open, it is any but the block axis: the order of scales is the same.
        """
        assert self.block_axis is not None and self.rank is not None
        if self.axis is not None:
            return self.axis, self.block_axis, self.rank
        return (self.block_axis % self.rank - 1) % self.rank, self.block_axis, self.rank

    @property
    def count(self) -> int:
        """How many scales the tensor has."""
        return self.scale.size if self.block_scale is None else self.block_scale.size

    def with_(self, **changes: Any) -> Entry:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def equals(self, other: Entry) -> bool:
        """All fields equal, numbers bit by bit."""
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


class RenderedLater(Mapping[str, object]):
    """A section of a file as a schema writes it, of which each tensor is rendered when it is asked for.

    Args:
        entries: of the section.
        render: a tensor's name and entry → its part of the file.
    """

    def __init__(self, entries: Mapping[str, Entry], render: Callable[[str, Entry], object]) -> None:
        self._entries, self._render = entries, render

    def __getitem__(self, name: str) -> object:
        return self._render(name, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class EncodingsFile:
    """A whole encodings file.

    Attributes:
        activations, parameters: entries by tensor name, in the file's order.
        unsplit: entries of a 2.x file that doesn't say which are parameters; see `split`.
        version: the schema it was read from, and is written in unless another is asked for.
        producer: the tool that made the numbers ("package", "version").
        quantizer_args: the settings that the tool noted down.
        excluded_layers: layers that the user kept out of quantization.
        provenance: bitwright's steps. They are stored inside `producer`, the one free-form object that every
            schema has and no loader interprets; entries with fields of our own would be refused by AIMET.
        run_time: types of tensors whose range is found at run time ("int8:per_token"): no schema has entries without
            numbers, so they are stored where `provenance` is.
    """

    activations: Mapping[str, Entry] = field(default_factory=dict)
    parameters: Mapping[str, Entry] = field(default_factory=dict)
    unsplit: Mapping[str, Entry] = field(default_factory=dict)
    version: Version = "1.0.0"
    producer: Mapping[str, Any] = field(default_factory=dict)
    quantizer_args: Mapping[str, Any] = field(default_factory=dict)
    excluded_layers: tuple[str, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    run_time: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.activations, *self.parameters, *self.unsplit, *self.run_time]
        if len(names) != len(set(names)):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise EncodingError(f"tensor {twice[0]!r} has two entries; keep one")

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Every entry by tensor name."""
        return {**self.activations, **self.parameters, **self.unsplit}

    def kind_of(self, name: str) -> Literal["activation", "parameter"] | None:
        """What a tensor is, or None where the file doesn't say."""
        if name in self.parameters:
            return "parameter"
        return "activation" if name in self.activations else None

    def split(self, parameters: Collection[str]) -> EncodingsFile:
        """The same file with `unsplit` entries sorted into parameters (those named) and activations (the others)."""
        chosen = {n: e for n, e in self.unsplit.items() if n in parameters}
        rest = {n: e for n, e in self.unsplit.items() if n not in parameters}
        return replace(
            self, activations={**self.activations, **rest}, parameters={**self.parameters, **chosen}, unsplit={}
        )
