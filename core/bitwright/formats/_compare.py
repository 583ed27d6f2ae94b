"""What differs between two encodings files, whatever their schemas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.formats._block_order import pack
from bitwright.formats._entries import EncodingsFile, Entry, ScaleLayout, Version

_GRID = (
    "bits",
    "float_format",
    "signed",
    "symmetric",
    "strict",
    "axis",
    "block_axis",
    "block_size",
    "decompressed_bits",
)


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        name: the tensor.
        field: "missing", "kind", "count", "scale", "zero_point", or the name of a grid field.
        first, second: what the files say; for scales and zero points, where they differ most.
        relative: for scales, the largest |a − b| / max(a, b).
        places: for scales and zero points, how many of them differ.
    """

    name: str
    field: str
    first: Any
    second: Any
    relative: float | None = None
    places: int | None = None

    def __str__(self) -> str:
        if self.field == "missing":
            return f"{self.name}: only in the {'first' if self.second is None else 'second'} file"
        text = f"{self.name}: {self.field} {_shown(self.first)} against {_shown(self.second)}"
        if self.places is not None:
            text += f" ({self.places} differ" + (
                f", by up to {self.relative:.3g})" if self.relative is not None else ")"
            )
        return text


def diff(a: EncodingsFile, b: EncodingsFile, tolerance: float = 0.0) -> list[Difference]:
    """The differences in the order of `a`, then what only `b` has.

    What one of the files doesn't say (axes in 0.6.1, symmetry in 2.x) is not compared. Scales are compared in
    float32, zero points as distances from the lowest code, so that int8 and uint8 storage of one grid are equal
    in these; LPBQ is compared by the scales that it amounts to.

    Args:
        a, b: the files.
        tolerance: relative difference of scales that is let pass.
    """
    found: list[Difference] = []
    for name, first in a.entries.items():
        if name not in b.entries:
            found.append(Difference(name, "missing", first, None))
            continue
        kinds = a.kind_of(name), b.kind_of(name)
        if None not in kinds and kinds[0] != kinds[1]:
            found.append(Difference(name, "kind", *kinds))
        found.extend(_entry_diff(name, first, b.entries[name], tolerance))
    found.extend(Difference(n, "missing", None, e) for n, e in b.entries.items() if n not in a.entries)
    types = {n: (a.run_time.get(n), b.run_time.get(n)) for n in (*a.run_time, *b.run_time)}
    found.extend(Difference(n, "range at run time", x, y) for n, (x, y) in types.items() if x != y)
    return found


def _entry_diff(name: str, a: Entry, b: Entry, tolerance: float) -> list[Difference]:
    found = [
        Difference(name, field, x, y)
        for field in _GRID
        if (x := getattr(a, field)) != (y := getattr(b, field)) and _both_said(field, x, y)
    ]
    if a.float_format is None and b.float_format is None:
        pass
    elif a.float_format != b.float_format:
        return [d for d in found if d.field in ("bits", "float_format")]
    if a.count != b.count:
        return [*found, Difference(name, "count", a.count, b.count)]
    order = a.packed or b.packed
    s, t = _flat(a, a.scales, order), _flat(b, b.scales, order)
    relative = np.abs(s.astype(np.float64) - t) / np.maximum(s, t)
    if (apart := relative > tolerance).any():
        worst = int(np.argmax(relative))
        found.append(
            Difference(name, "scale", float(s[worst]), float(t[worst]), float(relative[worst]), int(apart.sum()))
        )
    if a.bits == b.bits:
        z, w = (_flat(e, np.broadcast_to(_codes(e), e.scales.shape), order) for e in (a, b))
        if (apart := z != w).any():
            worst = int(np.argmax(np.abs(z - w)))
            found.append(Difference(name, "zero_point", int(z[worst]), int(w[worst]), places=int(apart.sum())))
    return found


def _both_said(field: str, x: object, y: object) -> bool:
    if field == "float_format":
        return True
    if x is None or y is None:
        return False
    # Without the rank, an axis counted from the end can't be told from one counted from the start.
    return not (isinstance(x, int) and isinstance(y, int) and "axis" in field) or (x < 0) == (y < 0)


def _codes(entry: Entry) -> NDArray[np.int64]:
    if entry.block_scale is None:
        return entry.zero_point
    return np.full(entry.scales.shape, entry.middle)


def _flat(entry: Entry, values: NDArray[Any], order: Version | None) -> NDArray[Any]:
    if values.ndim < 2 or order is None:
        return values.reshape(-1)
    return pack(values, *entry.block_axes, order)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, ScaleLayout):
        return value.value
    return f"{value:.9g}" if isinstance(value, float) else str(value)
