"""Banks of several machines or days as one: what one run over all the data would have found.

Histograms and ranges are those of one run exactly. Moments are added in float64, pairwise in a tree over the banks in
the order of their data's fingerprints: whatever the order they are given in, the result has the same bits, and departs
from one run's by the rounding of the sums alone (and of float32, where banks are kept in that).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitwright.bank._bank import Bank
from bitwright.bank._record import INDEX
from bitwright.bank._writing import Writer
from bitwright.errors import InputError
from bitwright.files import sweep_beside
from bitwright.statistics import LayerMoments


def merge(banks: Sequence[Bank | str | Path], out: str | Path) -> Bank:
    """Join banks that were collected on the same network, on different data.

    Args:
        banks: two or more, or their folders.
        out: the new bank's folder; not there yet, or empty, or the same merge's result.

    Raises:
        InputError: they are of different networks or formats, two hold the same data, or the folder is there already.
    """
    opened = [b if isinstance(b, Bank) else Bank.open(b) for b in banks]
    if len(opened) < 2:
        raise InputError(f"{len(opened)} banks: merging takes two or more")
    parts = sorted(opened, key=lambda b: sorted(b.record.data))
    first, *others = parts
    for other in others:
        _require_alike(first, other)
    prints = [p for b in parts for p in b.record.data]
    if twice := next((p for p in prints if prints.count(p) > 1), None):
        named = " and ".join(repr(str(b.path)) for b in parts if twice in b.record.data)
        raise InputError(f"{named} were collected on the same data, which would count twice")
    sweep_beside(Path(out))
    if (there := _whole(Path(out), first, prints)) is not None:
        return there
    with Writer(Path(out), first.record.number, first.record.thin) as writer:
        tensors = [t for t in first.record.tensors if all(t in b.record.tensors for b in others)]
        for tensor in tensors:
            histogram = first.histogram(tensor)
            low, high = first.ranges(tensor)
            for bank in others:
                histogram.merge(bank.histogram(tensor))
                lows, highs = bank.ranges(tensor)
                low, high = np.minimum(low, lows), np.maximum(high, highs)
            writer.add_tensor(tensor, histogram, first.record.tensors[tensor].axis, low, high)
        places: dict[tuple[int, ...], int | None] = {}
        layers: dict[str, int] = {}
        left_out = {op: reason for bank in reversed(parts) for op, reason in bank.record.left_out.items()}
        for op in first.record.layers:
            if op in left_out:
                continue
            held = tuple(bank.record.layers[op] for bank in parts)
            if held not in places:
                places[held] = writer.add_moments(_sum(parts, held))
            if (place := places[held]) is not None:
                layers[op] = place
            else:
                left_out[op] = f"its moments overflow {first.record.number}"
        writer.finish(
            network=first.record.network, steps=first.record.steps, samples=sum(b.record.samples for b in parts),
            data=prints, versions=first.record.versions, layers=layers, left_out=left_out,
        )  # fmt: skip
    return Bank.open(out)


def _whole(out: Path, like: Bank, prints: Sequence[str]) -> Bank | None:
    """What an earlier run of the same merge has finished."""
    if not (out / INDEX).is_file():
        return None
    bank = Bank.open(out)
    record, other = bank.record, like.record
    of = record.network, record.number, record.thin, record.steps, record.data
    if of != (other.network, other.number, other.thin, other.steps, tuple(prints)):
        return None
    bank.verify()
    return bank


def _sum(banks: Sequence[Bank], held: Sequence[int]) -> LayerMoments:
    """The two halves' sums, added; a half of one bank is its own."""
    if len(banks) == 1:
        return banks[0].moments(held[0])
    middle = len(banks) // 2
    total = _sum(banks[:middle], held[:middle])
    total.merge(_sum(banks[middle:], held[middle:]))
    return total


def _require_alike(first: Bank, other: Bank) -> None:
    a, b = first.record, other.record
    names = f"banks {str(first.path)!r} and {str(other.path)!r}"
    if a.network != b.network:
        raise InputError(f"{names} were collected on different networks; collect on the same model")
    if a.number != b.number:
        raise InputError(f"{names} hold moments of different types, {a.number} and {b.number}; collect with the same")
    if a.thin != b.thin:
        told = " and ".join("all" if r.thin is None else f"those of thin={r.thin}" for r in (a, b))
        raise InputError(f"{names} have moments of different positions, {told}; collect with the same")
    if a.steps != b.steps:
        raise InputError(f"{names} say that different techniques were applied before")
    for tensor in a.tensors.keys() & b.tensors.keys():
        one, two = a.tensors[tensor], b.tensors[tensor]
        if (one.axis, one.step, one.layout) != (two.axis, two.step, two.layout):
            raise InputError(f"{names} count the values of {tensor!r} differently; collect with the same version")
    if missing := (a.layers.keys() | a.left_out.keys()) ^ (b.layers.keys() | b.left_out.keys()):
        raise InputError(f"{names}: only one of them knows of layer {min(missing)!r}")
