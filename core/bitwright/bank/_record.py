"""The index of a bank, ``bank.json``: what it was collected on, what it holds, and the checksum of every file.

All numbers lie in .npy files: ``codes`` and ``counts`` (the occupied bins of all histograms, one after another),
``ranges`` (lowest and highest value of each channel), ``means`` (sums and shifts of all layers' features), and a
``moments-N`` for the second moments of each layer: the upper triangle, row after row.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.errors import InputError
from bitwright.files import DAMAGED

INDEX = "bank.json"
FORMAT: Final = 1
LARGEST_INDEX = 256 * 2**20
"""Bytes; an entry takes some hundred."""
PRECISION = 10
"""Mantissa bits of the histograms: the most that a scheme asks for, from which all coarser ones follow exactly."""

Number = Literal["float32", "float64"]
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of things, or a place among them, that numpy can hold."""
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Span = tuple[Count, Count]
"""First and last (exclusive) place in the file that holds the numbers of all."""


class Entry(BaseModel):
    """Base of all records: nothing unknown, nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Entry):
    """A file's checksum and size."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: Count


class StepEntry(Entry):
    """A technique that was applied before collecting, without data."""

    technique: str
    settings: dict[str, Any] = Field(default_factory=dict)


class TensorEntry(Entry):
    """What was seen of one tensor.

    Attributes:
        axis: of the channels that `channels` are the ranges of; None for one range.
        step, layout: which values the histogram counts (see `HistogramStatistic`).
        low, high: extremes of the values that were counted.
        bins: in `codes` and `counts`.
        channels: in `ranges`; of all values, counted or not.
    """

    axis: Count | None
    step: Positive
    layout: Count | None
    low: float
    high: float
    bins: Span
    channels: Span


class MomentsEntry(Entry):
    """Moments of the columns that one or more linear ops read.

    Attributes:
        file: of the second moments.
        groups, features: a group's columns have so many features.
        blocks: parts of an op's columns, whose moments with one another weren't kept; each counts as a group.
        count: columns seen.
        means: in `means`.
    """

    file: str = Field(pattern=r"^moments-[0-9]+\.npy$")
    groups: Positive
    features: Positive
    count: Positive
    means: Span
    blocks: Positive = 1


class Record(Entry):
    """The whole index.

    Attributes:
        network: fingerprint of the graph and the parameters that the data ran through.
        steps: what was applied to the model before.
        samples: how many were seen.
        data: fingerprint of the data of each collection that is in here.
        versions: of what collected.
        number: type of the second moments.
        thin: features of a layer for each position of a sample that its moments count; None where they count all.
        tensors, moments: what is held.
        layers: which moments are those of an op.
        left_out: linear ops without moments, with the reason.
        files: all files but the index.
    """

    kind: Literal["bitwright bank"] = "bitwright bank"
    format: Literal[1] = FORMAT
    network: str
    steps: tuple[StepEntry, ...] = ()
    samples: Count
    data: tuple[str, ...] = Field(min_length=1)
    versions: dict[str, str]
    number: Number
    thin: Positive | None = None
    tensors: dict[str, TensorEntry]
    moments: tuple[MomentsEntry, ...]
    layers: dict[str, Count]
    left_out: dict[str, str]
    files: dict[str, FileEntry]

    def text(self) -> str:
        """JSON, with a checksum of itself."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False)


def read_record(folder: Path) -> Record:
    """The index of a bank's folder, checked.

    Raises:
        InputError: there is none, it is of another format, damaged or forged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{str(folder)!r} is no bank: it has no {INDEX}; `bitwright collect` makes one")
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError("it is too large to be one")
        content = json.loads(path.read_bytes())
    except DAMAGED as error:
        raise InputError(f"{str(path)!r} can't be read: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != "bitwright bank":
        raise InputError(f"{str(path)!r} isn't the index of a bank")
    if (found := content.get("format")) != FORMAT:
        raise InputError(f"{str(path)!r}: a bank of format {found!r:.20}; this version reads {FORMAT}")
    if content.pop("sha256", None) != _digest(content):
        raise InputError(f"{str(path)!r} was changed after it was written; collect again, or copy the bank again")
    try:
        record = Record.model_validate_json(json.dumps(content))
    except (ValidationError, *DAMAGED) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(p) for p in first["loc"])
        raise InputError(f"{str(path)!r}: {where}: {first['msg']}") from None
    _check(record, path)
    return record


def _check(record: Record, path: Path) -> None:
    """Refuse references to what isn't there."""
    if lost := next((op for op, place in record.layers.items() if not 0 <= place < len(record.moments)), None):
        raise InputError(f"{str(path)!r}: the moments of {lost!r} aren't among those that it lists")
    if missing := next((m.file for m in record.moments if m.file not in record.files), None):
        raise InputError(f"{str(path)!r}: it has no checksum of {missing!r}")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
