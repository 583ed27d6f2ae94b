"""Reading JSON objects field by field, with errors that name file, tensor and field."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file, for messages."""

    source: str
    tensor: str | None = None

    def error(self, message: str, field: str | None = None) -> EncodingError:
        """An error that names the place."""
        parts = [self.source]
        if self.tensor is not None:
            parts.append(f"tensor {self.tensor!r}")
        if field is not None:
            parts.append(f"field {field!r}")
        return EncodingError(f"{': '.join(parts)}: {message}")


class Fields:
    """One JSON object; construction refuses fields outside `known` and the lack of those in `required`."""

    def __init__(self, where: Where, value: object, known: Collection[str], required: Collection[str] = ()) -> None:
        if not isinstance(value, Mapping):
            raise where.error(f"expected a JSON object, found {describe(value)}")
        self.where = where
        self._values: Mapping[str, Any] = value
        for name in value:
            if name not in known:
                raise where.error(f"unknown field; the known ones are {', '.join(sorted(known))}", str(name))
        self.require(*required)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str, default: object = None) -> Any:
        """A field's raw value, or a default."""
        return self._values.get(name, default)

    def require(self, *names: str) -> None:
        """Refuse the object unless it has these fields."""
        for name in names:
            if name not in self._values:
                raise self.where.error("required, but missing", name)

    def refuse(self, names: Collection[str], reason: str) -> None:
        """Refuse the object if it has one of these fields."""
        for name in names:
            if name in self._values:
                raise self.where.error(reason, name)

    def text(self, name: str, choices: Collection[str] = ()) -> str:
        """A non-empty string, one of `choices` if there are any."""
        value = self._values[name]
        if not isinstance(value, str) or not value:
            raise self.where.error(f"expected a string, found {describe(value)}", name)
        if choices and value not in choices:
            raise self.where.error(f"{value!r} is none of {', '.join(choices)}", name)
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self._values[name]
        whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value % 1 == 0)
        if isinstance(value, bool) or not whole:
            raise self.where.error(f"expected a whole number, found {describe(value)}", name)
        if not low <= value <= high:
            raise self.where.error(f"{value} is outside {low}..{high}", name)
        return int(value)

    def bits(self, name: str) -> int:
        """An integer code width: 2 to 16, or 32."""
        value = self.integer(name, 2, 32)
        if 16 < value < 32:
            raise self.where.error(f"{value} bits: integer grids have 2 to 16 bits, or 32", name)
        return value

    def flag(self, name: str) -> bool:
        """A boolean, or AIMET's "True" and "False"."""
        value = self._values[name]
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise self.where.error(f"expected true or false, found {describe(value)}", name)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A number, list or rectangular nested list; at least one number."""
        return numbers(self.where, self._values[name], name)

    def scales(self, name: str) -> NDArray[np.float64]:
        """Numbers that are finite and above 0 in float32 too."""
        values = self.numbers(name)
        with np.errstate(over="ignore", under="ignore"):
            single = values.astype(np.float32)
        bad = ~(np.isfinite(single) & (single > 0))
        if bad.any():
            raise self.where.error(
                f"{values[bad][0]!r} is not a scale: it must be finite and greater than 0 in float32", name
            )
        return values

    def integers(self, name: str, low: int, high: int) -> NDArray[np.int64]:
        """Whole numbers from `low` to `high`; whole floats are taken too."""
        values = self.numbers(name)
        if not (values == np.rint(values)).all():
            raise self.where.error(f"{values[values != np.rint(values)][0]!r} is not a whole number", name)
        outside = (values < low) | (values > high)
        if outside.any():
            raise self.where.error(f"{int(values[outside][0])} is outside {low}..{high}", name)
        return values.astype(np.int64)


def numbers(where: Where, value: object, name: str) -> NDArray[np.float64]:
    """Numbers of a JSON value as a float64 array.

    Raises:
        EncodingError: something else than finite numbers, a ragged list, or no number at all.
    """
    for item in _leaves(value):
        if type(item) not in (int, float):
            raise where.error(f"expected numbers, found {describe(item)}", name)
    try:
        values = np.array(value, np.float64)
    except (ValueError, OverflowError):
        raise where.error("the nested lists differ in length, or a number is out of range", name) from None
    if values.size == 0:
        raise where.error("at least one number is needed", name)
    if not np.isfinite(values).all():
        raise where.error("a number is infinite or NaN", name)
    return values


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def describe(value: object) -> str:
    """A JSON value in a few words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
