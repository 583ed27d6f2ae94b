"""An environment for each peer and a process for each run, on one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def environment(packages: Sequence[str], folder: Path) -> Path:
    """The python of the environment in `folder`, made on first use; bitwright in it is always of today's commit.

    Raises:
        subprocess.CalledProcessError: pip can't install the packages here.
    """
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for wanted in (("--upgrade", "pip"), packages):  # an old pip searches these trees for hours
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "installed").write_text(commit())
    own = [wanted for wanted in packages if wanted.startswith(str(REPOSITORY))]
    if own and (folder / "installed").read_text() != commit():
        again = ("--force-reinstall", "--no-deps", *own)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *again], check=True)
        (folder / "installed").write_text(commit())
    return python


def commit() -> str:
    """The repository's, which an environment's `installed` keeps: bitwright's code there is of that commit."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, check=False, capture_output=True)
    return done.stdout.decode().strip() or "no repository"


def run(packages: Sequence[str], folder: Path, program: Path, arguments: Sequence[Any], timeout: int) -> dict[str, Any]:
    """The figures that `program` prints in the environment in `folder`, as far as it got; {"failed": why} if there are
    none.

    A program may print its figures again and again, each time all it has; the last ones count. One that ends before
    its end leaves under "doing" what it was at, which becomes a figure "NAME failed".
    """
    try:
        python = environment(packages, folder)
    except subprocess.CalledProcessError:
        return {"failed": "doesn't install here"}
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        late = False
        try:
            done = subprocess.run(
                [python, program, *map(str, arguments)], check=False, stdout=said, stderr=told,
                env=os.environ | single, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            late = True
        finally:
            said.seek(0)
            told.seek(0)
            output, errors = said.read(), told.read()
            sys.stderr.write(errors)
    why = None
    if late:
        why = f"not ready after {timeout} s"
    elif done.returncode < 0:
        why = f"killed by signal {-done.returncode}"
    elif done.returncode or "FIGURES " not in output:
        why = next((x.strip() for x in reversed(errors.splitlines()) if x.strip()), f"ended with {done.returncode}")
    line = next((x for x in reversed(output.splitlines()) if x.startswith("FIGURES ")), None)
    if line is None:
        return {"failed": why if late else f"`{why}`"}
    figures: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
    doing = figures.pop("doing", "end")
    if why:
        figures[f"{doing} failed"] = why
    return figures


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def replaced_section(page: str, heading: str, section: str) -> str:
    """The page with its section of that heading (up to the next of its rank) replaced, or put at its end."""
    rank = heading.split(" ", maxsplit=1)[0] + " "
    before, found, rest = page.partition(f"\n{heading}\n")
    if not found:
        return page.rstrip("\n") + "\n\n" + section
    _, follows, after = rest.partition(f"\n{rank}")
    return before.rstrip("\n") + "\n\n" + section.rstrip("\n") + "\n" + (f"\n{rank}{after}" if follows else "")


def kept_section(page: str, heading: str) -> str:
    """The section of that heading; empty where the page has none."""
    rank = heading.split(" ", maxsplit=1)[0] + " "
    _, found, rest = page.partition(f"\n{heading}\n")
    return f"{heading}\n{rest.partition(f'{chr(10)}{rank}')[0]}".rstrip("\n") + "\n" if found else ""
