"""`compare`: where a target's tensors first depart from those that the simulation promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitwright.data import DataLike
from bitwright.errors import InputError
from bitwright.files import Scratch
from bitwright.report import finite
from bitwright_analysis.scoring import Power, decibels
from bitwright_deploy.layer_outputs import Dump, Stored, layer_outputs
from bitwright_deploy.target_dump import TargetDump, common
from bitwright_deploy.tensor_names import matched

MIN_SQNR = 20.0
"""Decibels. Roundings that fall to the neighbouring code, as the last float bit decides them, stay above; see
docs/analysis.md."""
OTHER_LAYOUT = 10.0
"""A tensor is taken to be in the other layout if it fits so many decibels better."""


class Departure(BaseModel):
    """One tensor, reference against target, over all samples.

    Attributes:
        tensor, op, type: of the reference.
        target: the target's name for it.
        sqnr_db: 10·log10(Σ reference² / Σ error²); null where they are equal.
        max_error: largest magnitude of an error.
        max_steps: the same in steps of the tensor's grid; null where it has none.
        cosine: of the angle between both; 1 is the same direction.
        departs: whether `sqnr_db` is below the limit.
        note: what had to be assumed, or why it couldn't be compared.
    """

    model_config = ConfigDict(frozen=True)

    tensor: str
    op: str
    type: str
    target: str
    sqnr_db: float | None
    max_error: float | None
    max_steps: float | None
    cosine: float | None
    departs: bool
    note: str = ""


class Departures(BaseModel):
    """What `compare` found.

    Attributes:
        rows: tensors that both have, in the order of the network.
        missing: tensors of the reference that the target doesn't have (fused there, or renamed), or in no sample that
            the reference has too.
        unknown: the target's names that nothing in the reference matches.
        samples: samples compared.
        min_sqnr: the limit.
        causes: of the first departure: its inputs that were compared, with their SQNR.
    """

    model_config = ConfigDict(frozen=True)

    rows: tuple[Departure, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    samples: int
    min_sqnr: float
    causes: dict[str, float | None] = Field(default_factory=dict)

    @property
    def first(self) -> Departure | None:
        """The first tensor that departs."""
        return next((r for r in self.rows if r.departs), None)

    def __str__(self) -> str:
        counted = f"{len(self.rows)} tensors compared on {self.samples} samples"
        if self.missing:
            counted += f", {len(self.missing)} missing in the target's dump"
        if self.unknown:
            counted += f", {len(self.unknown)} of its names unknown"
        first = self.first
        if first is None:
            return f"{counted}: none departs"
        why = first.note if first.sqnr_db is None and first.note else f"{_db(first.sqnr_db)}"
        inputs = ", ".join(f"{name} {_db(sqnr)}" for name, sqnr in self.causes.items())
        return f"{counted}: {first.tensor!r} ({first.type} {first.op}) departs first, {why}" + (
            f"; its inputs: {inputs}" if inputs else ""
        )


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


@dataclass
class _Pair:
    """Sums of one reading of a tensor."""

    signal: Power = field(default_factory=Power)
    other: Power = field(default_factory=Power)
    noise: Power = field(default_factory=Power)
    dot: float = 0.0
    largest: float = 0.0
    broken: bool = False

    def add(self, reference: NDArray[Any], target: NDArray[Any]) -> None:
        a, b = np.asarray(reference, np.float64).reshape(1, -1), np.asarray(target, np.float64).reshape(1, -1)
        if not np.isfinite(b).all():
            self.broken = True
            return
        self.signal.add(a)
        self.other.add(b)
        self.noise.add(b - a)
        self.dot += float((a * b).sum())
        self.largest = max(self.largest, float(np.abs(b - a).max(initial=0.0)))

    @property
    def ratio(self) -> float:
        if self.broken:
            return math.inf
        if self.signal.total > 0:
            return self.noise.total / self.signal.total
        return math.inf if self.noise.total > 0 else 0.0

    @property
    def cosine(self) -> float | None:
        length = math.sqrt(self.signal.total * self.other.total)
        return self.dot / length if length > 0 else None


def compare(
    reference: Any,
    target: str | Path,
    data: DataLike | None = None,
    *,
    min_sqnr: float = MIN_SQNR,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> Departures:
    """Compare a target's dump with a dump of the simulation, tensor by tensor.

    Names needn't be equal: separators, case and endings such as ``:0`` or ``_native`` don't count. Values may be
    float32, float16 or codes of the tensor's grid, in NHWC or NCHW.

    Args:
        reference: a folder that `layer_outputs` wrote, a `Dump`, or a `QuantSim` (or model), with `data`.
        target: see `TargetDump.open`.
        data: for a simulation: the samples, in the order in which the target ran them.
        min_sqnr: decibels; a tensor below departs.
        names: tensor → the target's name for it, where nothing else matches them.
        options: of `layer_outputs`, for a simulation.

    Raises:
        InputError: a dump can't be read, or nothing in it can be compared.
    """
    if isinstance(reference, Dump | str | Path) and data is None:
        dump = reference if isinstance(reference, Dump) else Dump.open(reference)
        return _compare(dump, TargetDump.open(target), min_sqnr, dict(names or {}))
    if data is None:
        raise InputError("a simulation is compared on data: give the samples that the target ran")
    found = TargetDump.open(target)
    with Scratch() as folder:
        dump = layer_outputs(reference, data, folder / "dump", **options)
        return _compare(dump, found, min_sqnr, dict(names or {}))


def _compare(dump: Dump, target: TargetDump, min_sqnr: float, names: Mapping[str, str]) -> Departures:
    tensors, offered = dump.index.tensors, target.names
    for tensor, name in names.items():
        if tensor not in tensors or name not in offered:
            raise InputError(f"names: the dumps have no pair {tensor!r} and {name!r}")
    free = [n for n in offered if n not in names.values()]
    pairs = {**matched({t: s.file for t, s in tensors.items() if t not in names}, free), **names}
    if not pairs:
        raise InputError(
            f"no name of the target's dump ({', '.join(offered[:3])}, …) is one of the reference "
            f"({', '.join(list(tensors)[:3])}, …); give `names`"
        )
    samples = common(range(dump.index.samples), target.samples)
    rows = {
        t: _row(dump, target, t, pairs[t], samples, min_sqnr)
        for t in tensors
        if t in pairs and any(pairs[t] in target.samples[k] for k in samples)
    }
    if not rows:
        raise InputError(
            f"nothing can be compared: the target's dump has no tensor of the reference in the {len(samples)} samples "
            f"that both hold; dump {next(iter(pairs.values()))!r} for samples of the reference"
        )
    first = next((r for r in rows.values() if r.departs), None)
    causes = {} if first is None else {t: rows[t].sqnr_db for t in tensors[first.tensor].inputs if t in rows}
    return Departures(
        rows=tuple(rows.values()),
        missing=tuple(t for t in tensors if t not in rows),
        unknown=tuple(n for n in offered if n not in pairs.values()),
        samples=len(samples),
        min_sqnr=min_sqnr,
        causes=causes,
    )


def _row(dump: Dump, target: TargetDump, tensor: str, name: str, samples: list[int], min_sqnr: float) -> Departure:
    stored = dump.index.tensors[tensor]
    base = {"tensor": tensor, "op": stored.op, "type": stored.type, "target": name}
    readings = {"": _Pair(), "in the other layout": _Pair()}
    try:
        for k in samples:
            if name not in target.samples[k]:
                continue
            values, expected = target.samples[k][name](stored), dump.read(tensor, k)
            if values.size != expected.size:
                raise InputError(f"{values.size} values, {expected.size} are expected")
            readings[""].add(expected, values.reshape(expected.shape))
            if (turned := _turned(values, stored)) is not None:
                readings["in the other layout"].add(expected, turned)
    except InputError as error:
        nothing = {"sqnr_db": None, "max_error": None, "max_steps": None, "cosine": None}
        return Departure(**base, **nothing, departs=True, note=f"can't be compared: {error}")
    note, pair = "", readings[""]
    other = readings["in the other layout"]
    if other.signal.count and pair.ratio > other.ratio * 10 ** (OTHER_LAYOUT / 10):
        note, pair = "in the other layout", other
    if pair.broken:
        note = "NaN or infinite values"
    sqnr = decibels(pair.ratio)
    shown = None if sqnr is None else finite(sqnr)
    return Departure(
        **base,
        sqnr_db=shown,
        max_error=pair.largest,
        max_steps=None if stored.scale is None else pair.largest / stored.scale,
        cosine=pair.cosine,
        departs=sqnr is not None and sqnr < min_sqnr,
        note=note,
    )


def _turned(values: NDArray[np.float32], stored: Stored) -> NDArray[np.float32] | None:
    """The values read in the other layout, brought to the reference's; None where there is one layout only."""
    axis = stored.channel_axis
    if axis is None or len(stored.native) < 3 or axis % len(stored.native) in (0, len(stored.native) - 1):
        return None
    if stored.channels_last:
        return np.moveaxis(values.reshape(stored.native), axis, -1)
    last = (*(d for i, d in enumerate(stored.native) if i != axis), stored.native[axis])
    return np.moveaxis(values.reshape(last), -1, axis)
