"""Installs bitwright as users do, in an environment for each cell, and runs `smoke.py` there (`make matrix`).

    python tests/matrix/matrix.py                      # every cell on every Python that is here (an hour, gigabytes)
    python tests/matrix/matrix.py --cells core,onnx --pythons 3.12    # some
    python tests/matrix/matrix.py --write              # and the table of docs/versions.md; rows not run now stay

A cell is an extra alone (or core: none), with the newest versions that pip finds or with the oldest that
`pyproject.toml` allows. The wheel is built once, from a clean environment; nothing else of the repository is on the
path. Nothing is compiled: versions without wheels for a Python are reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "versions.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
CELLS = {
    "core": (), "onnx": ("onnx",), "torch": ("torch",), "keras with TensorFlow": ("keras", "tensorflow"),
    "tensorflow": ("tensorflow",), "report": ("report",), "search": ("search",), "images": ("images",),
    "text": ("text",), "distributed": ("distributed",),
}  # fmt: skip
SHOWN = ("numpy", "pydantic", "onnx", "onnxruntime", "torch", "keras", "tensorflow", "bokeh", "scipy", "pillow",
         "tokenizers", "distributed")  # fmt: skip


NOT_INSTALLED = "not installed: "


@dataclass(frozen=True)
class Result:
    """One cell: what was installed, and what came of it ("" if all is well)."""

    cell: str
    python: str
    edge: str
    versions: str
    ran: str
    problem: str


def requirements(extras: tuple[str, ...]) -> list[str]:
    """What the core and these extras ask for, extras of extras included."""
    found = list(PROJECT["dependencies"])
    for extra in extras:
        for entry in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(r"bitwright\[(.+)\]", entry)
            found += requirements(tuple(own[1].split(","))) if own else [entry]
    return list(dict.fromkeys(found))


def oldest(extras: tuple[str, ...]) -> list[str]:
    """The lower bounds as pins: ``numpy>=1.26`` is ``numpy==1.26.*``."""
    pins = []
    for entry in requirements(extras):
        name, bound = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?>=([\d.]+).*", entry).groups()  # type: ignore[union-attr]
        pins.append(f"{name}=={bound if '.' in bound else f'{bound}.0'}.*")
    return pins


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """A process whose output is kept."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def wheel(folder: Path) -> Path:
    """Built by pip, in an environment that it makes itself."""
    built = run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT])
    if built.returncode:
        raise SystemExit(built.stderr)
    return next(folder.glob("bitwright-*.whl"))


def refusal(stderr: str) -> str:
    """Why pip didn't install: the first requirement without a file, or the first of its errors."""
    if found := re.search(r"No matching distribution found for (\S+)", stderr):
        return f"no wheel of {found[1]} for this Python"
    return next((line for line in stderr.splitlines() if line.startswith("ERROR")), "pip failed")[:200]


def interpreters(wanted: list[str]) -> dict[str, str]:
    """Version → its interpreter: on the path, or among pyenv's (whose names on the path are shims of one version)."""
    own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in wanted:
        name = f"python{version}"
        places = [shutil.which(name), *sorted(map(str, own.glob(f"{version}.*/bin/{name}")), reverse=True)]
        if works := [p for p in places if p and not run([p, "--version"]).returncode]:
            found[version] = works[0]
    return found


def cell(name: str, interpreter: str, edge: str, built: Path, folder: Path) -> Result:
    """Install one and run the smoke test in it."""
    extras = CELLS[name]
    version = run([interpreter, "-c", "import sys; print('.'.join(map(str, sys.version_info[:2])))"]).stdout.strip()
    place = folder / "env"
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    run([interpreter, "-m", "venv", "--without-pip", place])
    target = f"bitwright[{','.join(extras)}] @ {built.as_uri()}" if extras else str(built)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    pins = oldest(extras) if edge == "oldest" else []
    done = run([*pip, "install", "--quiet", "--no-compile", "--no-cache-dir", "--only-binary=:all:", target, *pins])
    if done.returncode:
        return Result(name, version, edge, "", "", f"{NOT_INSTALLED}{refusal(done.stderr)}")
    listed = {p["name"].lower(): p["version"] for p in json.loads(run([*pip, "list", "--format=json"]).stdout)}
    shown = ", ".join(f"{n} {listed[n]}" for n in SHOWN if n in listed)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    smoke = run([python, ROOT / "tests/matrix/smoke.py"], cwd=work, env=clean)
    problem = "" if smoke.returncode == 0 else smoke.stderr.strip().splitlines()[-1][:300]
    return Result(name, version, edge, shown, smoke.stdout.strip().splitlines()[-1] if not problem else "", problem)


def main() -> None:
    """All cells, printed as they come; exits with 1 if one that could be installed failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS), help="names, a,b,c")
    parser.add_argument("--edges", default="newest,oldest")
    parser.add_argument("--pythons", default=",".join(PYTHONS))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    wanted = args.pythons.split(",")
    here = interpreters(wanted)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        built = wheel(folder)
        for version, interpreter in here.items():
            for name in args.cells.split(","):
                for edge in args.edges.split(","):
                    begin = time.perf_counter()
                    results.append(found := cell(name, interpreter, edge, built, folder))
                    told = found.problem or f"ok: {found.ran} ({found.versions})"
                    print(f"{name}, Python {version}, {edge}: {told} [{time.perf_counter() - begin:.0f} s]", flush=True)
                    if args.write:  # at once: what comes later may be killed
                        before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
                        PAGE.write_text(page(found, before), encoding="utf-8")
    if absent := [v for v in wanted if v not in here]:
        print(f"not here: Python {', '.join(absent)}")
    sys.exit(any(r.problem and not r.problem.startswith(NOT_INSTALLED) for r in results))


def page(found: Result, before: str) -> str:
    """The page with this row, and all rows that it had before of other cells."""
    rows = {}
    for line in before.splitlines():
        if match := re.fullmatch(r"\| ([^|]+) \| (3\.\d+) \| (newest|oldest) \| .* \|", line):
            rows[match.groups()] = line
    row = (found.cell, found.python, found.edge)
    rows[row] = f"| {' | '.join(row)} | {found.versions} | {(found.problem or found.ran).replace('|', '/')} |"
    places = [(c, v, e) for c in CELLS for e in ("newest", "oldest") for v in PYTHONS]
    lines = ["| installed | Python | versions | with | went through |", "|---|---|---|---|---|"]
    lines += [rows[place] for place in places if place in rows]
    return f"""# Versions that were tried

Written by `make matrix`: the wheel, built from a clean environment, is installed by pip with each extra alone, with the newest versions that pip finds and with the oldest that `pyproject.toml` allows, where they have wheels for the Python (what has no row wasn't run); a small model of each framework that is then there is calibrated, exported and verified. The tests themselves run with the versions of `constraints.txt`.

{chr(10).join(lines)}
"""  # noqa: E501


if __name__ == "__main__":
    main()
