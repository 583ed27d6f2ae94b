"""What commands print with: tables and JSON on the output stream, progress and warnings on the error stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200
"""Columns where the output isn't a terminal, so that names aren't cut in logs and pipes."""


def out() -> Console:
    """The output stream."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def say(text: str) -> None:
    """A line of plain text; square brackets are no markup."""
    out().print(Text(text), soft_wrap=True)


def complain(line: str) -> None:
    """One line on the error stream."""
    sys.stderr.write(" ".join(line.split()) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """A table; columns named in `numbers` are set flush right."""
    shown = Table(
        box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0), show_header=any(map(bool, columns))
    )
    for column in columns:
        shown.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text("" if value is None else str(value)) for value in row))
    console = out()
    with console.capture() as captured:
        console.print(shown)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def percent(fraction: float) -> str:
    """``"87.80 %"``."""
    return f"{100 * fraction:.2f} %"


def points(fraction: float, reference: float) -> str:
    """The difference in percentage points, signed."""
    return f"{100 * (fraction - reference):+.2f}"


def decibels(value: float | None) -> str:
    """``"31.2 dB"``; equal signals are "exact"."""
    return "exact" if value is None or value == float("inf") else f"{value:.1f} dB"
