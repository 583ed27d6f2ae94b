"""``bitwright diff | report``: runs beside each other."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli import console, options

SHOWN = 20
"""Sites that are printed; the page has all."""

Run = Annotated[
    Path, typer.Argument(help="What `bitwright quantize --out` wrote, or its report.json.", show_default=False)
]


def diff(
    *,
    a: Run,
    b: Run,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("diff.html"),
    as_json: options.Json = False,
) -> None:
    """Compare two runs: accuracy, settings, every site's decision and grid, the noise of each weight."""
    from bitwright.files import write_text
    from bitwright.report import difference, read_run, render_difference

    first, second = read_run(a), read_run(b)
    found = difference(first, second)
    write_text(out, render_difference(first, second, (str(a), str(b))))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=1) + "\n")
        return
    console.say(found.verdict)
    if found.settings:
        console.table(("setting", "A", "B"), found.settings)
    if found.sites:
        console.table(("site", "what differs", "A", "B"), found.sites[:SHOWN])
        if (left := len(found.sites) - SHOWN) > 0:
            console.say(f"and {left} more sites")
    console.say(str(out))


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder with runs in it, at any depth.", show_default=False)
    ],
    as_json: options.Json = False,
) -> None:
    """List all runs below a folder, the most accurate first, and write FOLDER/index.html, which links their pages."""
    from bitwright.files import write_text
    from bitwright.report import COLUMNS, render_index, runs_in

    runs, damaged = runs_in(folder)
    for told in damaged:
        console.complain(f"warning: {told}")
    page = write_text(folder / "index.html", render_index(folder, runs))
    if as_json:
        rows = [{"path": str(run.path), **dict(zip(COLUMNS, run.row(), strict=True))} for run in runs]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    rows_shown = (
        (run.label(folder), *(f"{v:.2f}" if isinstance(v, float) else v for v in run.row()[1:])) for run in runs
    )
    console.table(COLUMNS, rows_shown, numbers=("Top-1 %", "Points to float", "Parameters"))
    console.say(str(page))
