"""Whether a file has exactly one right entry for every tensor that is to be quantized, and no other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitwright.formats._entries import CAST_FORMATS, EncodingsFile, Entry
from bitwright.grids import FloatFormat, QuantSpec, scale_shape

Kind = Literal["activation", "parameter"]


@dataclass(frozen=True)
class ExpectedEntry:
    """What a file must say of a tensor.

    Attributes:
        kind: which section it belongs to.
        bits: width of the codes.
        signed, symmetric, strict: None: either will do. Compared where the schema records them.
        scale_shape: () , (channels,) or (channels, blocks); None: any number of scales.
        float_format: for float encodings.
        optional: the entry may be missing (int32 biases in 0.6.1 and 1.0.0).
        run_time: the type, where the range is found at run time.
    """

    kind: Kind
    bits: int
    signed: bool | None = None
    symmetric: bool | None = None
    scale_shape: tuple[int, ...] | None = None
    strict: bool | None = None
    float_format: FloatFormat | None = None
    optional: bool = False
    run_time: str | None = None

    @classmethod
    def of(
        cls, spec: QuantSpec, kind: Kind, shape: tuple[int, ...] | None = None, *, optional: bool = False
    ) -> ExpectedEntry:
        """What a site's specification asks of its entry; `shape` is the tensor's, in the layout of the granularity."""
        either = spec.symmetric and spec.unsigned_symmetric  # the data decide
        return cls(
            kind,
            spec.bits,
            signed=None if either or spec.float_format else spec.signed,
            symmetric=None if spec.float_format else spec.symmetric,
            scale_shape=None if shape is None else scale_shape(shape, spec.granularity),
            strict=None if either or spec.float_format else spec.strict,
            float_format=spec.float_format,
            optional=optional,
            run_time=None if spec.run_time is None else str(spec.run_time),
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a tensor's entry, in words."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def check(file: EncodingsFile, expected: Mapping[str, ExpectedEntry], tensors: Collection[str]) -> list[Problem]:
    """Every way in which the file isn't what it must be; empty if all is right.

    Args:
        file: as read (a name can't come twice, as reading refuses that).
        expected: what the target quantizes, by tensor name.
        tensors: all tensors and parameters of the artefact.

    Tensors in float16 and bfloat16 have no entry in 2.x, so there they need none.
    """
    known = frozenset(tensors)
    problems = []
    for name, wanted in expected.items():
        if name not in known:
            problems.append(Problem(name, "is to be quantized, but the artefact has no tensor of that name"))
        entry, at_run_time = file.entries.get(name), file.run_time.get(name)
        if at_run_time != wanted.run_time:
            told = f"has a range at run time ({at_run_time})" if at_run_time else "has no range at run time"
            problems.append(Problem(name, f"{told}, {wanted.run_time or 'numbers'} expected"))
        elif at_run_time is not None:
            continue
        elif entry is not None:
            problems.extend(Problem(name, message) for message in _mismatches(file, name, entry, wanted))
        elif not wanted.optional and not (file.version[0] == "2" and wanted.float_format in CAST_FORMATS):
            problems.append(Problem(name, "has no entry"))
    for name in (*file.entries, *file.run_time):
        if name not in known:
            problems.append(Problem(name, "has an entry, but the artefact has no tensor of that name"))
        elif name not in expected:
            problems.append(Problem(name, "has an entry, but isn't to be quantized"))
    return problems


def _mismatches(file: EncodingsFile, name: str, entry: Entry, wanted: ExpectedEntry) -> list[str]:
    found = []
    kind = file.kind_of(name)
    if kind is not None and kind != wanted.kind:
        found.append(f"is listed as {kind}, but is {'an activation' if kind == 'parameter' else 'a parameter'}")
    if entry.float_format != wanted.float_format:
        return [*found, f"{entry.float_format or 'integer'} encoding, expected {wanted.float_format or 'integer'}"]
    if entry.bits != wanted.bits:
        found.append(f"{entry.bits} bits, expected {wanted.bits}")
    if entry.float_format is None:
        found.extend(_grid_mismatches(entry, wanted))
    if wanted.scale_shape is not None and entry.float_format not in CAST_FORMATS:
        found.extend(_count_mismatches(entry, wanted.scale_shape))
    return found


def _grid_mismatches(entry: Entry, wanted: ExpectedEntry) -> list[str]:
    found = []
    # Of data that are never negative a symmetric grid begins with its zero.
    central = bool(np.isin(entry.zero_point, (0, entry.middle)).all())
    if None not in (entry.signed, wanted.signed) and entry.signed != wanted.signed:
        found.append(
            f"{_word(entry.signed, 'signed', 'unsigned')} codes, expected {_word(wanted.signed, 'signed', 'unsigned')}"
        )
    if entry.symmetric is not None:
        if wanted.symmetric is not None and entry.symmetric != wanted.symmetric:
            found.append(f"{_word(entry.symmetric, 'a symmetric', 'an asymmetric')} grid, expected the other kind")
        elif entry.symmetric and not central:
            found.append("is said to be symmetric, but its zero point is off the middle")
    elif wanted.symmetric and not central:
        found.append("a zero point off the middle, expected a symmetric grid")
    if None not in (entry.strict, wanted.strict) and entry.strict != wanted.strict:
        found.append(f"{_word(entry.strict, 'no', 'a')} lowest code, expected {_word(wanted.strict, 'none', 'one')}")
    return found


def _count_mismatches(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    count = int(np.prod(shape, dtype=np.int64))
    if entry.count != count:
        return [f"{entry.count} scales, expected {count} {_counted(shape)}"]
    channels = entry.scale.shape[:1]
    if len(shape) == 2 and entry.packed is None and entry.layout is not None and channels != shape[:1]:
        return [f"scales for {channels[0] if channels else 1} channels, expected {shape[0]}"]
    return []


def _counted(shape: tuple[int, ...]) -> str:
    return (
        ("per tensor", "channels", "in blocks")[len(shape)]
        if len(shape) != 2
        else f"({shape[0]} channels of {shape[1]} blocks)"
    )


def _word(flag: bool | None, yes: str, no: str) -> str:
    return yes if flag else no
