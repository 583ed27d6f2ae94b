"""Tables for people: what a simulation holds, on a terminal, in a notebook, or as a pandas frame."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from bitwright.errors import MissingExtraError

Value = str | int | float | bool | None
"""A table's cell."""


@dataclass(frozen=True)
class Table:
    """Columns and rows.

    Attributes:
        columns: their headings.
        rows: as many values each as there are columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def __str__(self) -> str:
        lines = [self.columns, *([shown(v) for v in row] for row in self.rows)]
        numbers = [all(_is_number(row[i]) or row[i] is None for row in self.rows) for i in range(len(self.columns))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        told = (
            "   ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numbers, strict=True))
            for line in lines
        )
        return "\n".join(line.rstrip() for line in told)

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """The table as HTML, in a box that scrolls; every value is escaped."""
        head = "".join(f"<th style='text-align:left'>{escape(c)}</th>" for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(shown(v))}</td>" for v in row) + "</tr>"
            for row in self.rows
        )
        return (
            "<div style='max-height:30em;overflow:auto'>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with these columns.

        Raises:
            MissingExtraError: pandas isn't installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("a table becomes a frame with pandas: pip install pandas") from None
        return pandas.DataFrame(list(self.rows), columns=list(self.columns))


class Tabular:
    """What is shown as a table: its text, its form in a notebook, and a pandas frame."""

    __slots__ = ()

    def as_table(self) -> Table:
        """The table that it is shown as."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.as_table())

    def _repr_html_(self) -> str:
        return self.as_table().html()

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of the table.

        Raises:
            MissingExtraError: pandas isn't installed.
        """
        return self.as_table().to_pandas()


def shown(value: Value) -> str:
    """A cell as text: four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: int) -> str:
    """A number of bytes in a readable unit."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.3g} {unit}"
    return f"{count} B"


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
