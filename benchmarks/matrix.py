"""Technique × backend: runs the conformance kit of each pair and writes the table of docs/matrix.md.

    python benchmarks/matrix.py            # minutes; needs the development environment (`make test`)

A cell says how many tests of the kit passed, and that the technique's numbers are those of the reference backend.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKENDS = ("reference", "onnx", "torch", "keras", "tensorflow")
PAGE = """# Techniques on backends

Each technique is written once. On every backend it passes the conformance kit that third parties use \
(`bitwright.testing.technique_contract`), and gives the numbers that it gives on the numpy reference backend: weights \
and scales within 1e-4 of their largest value, but for roundings that sit on an edge (at most 1 %).

Written by `python benchmarks/matrix.py`: ✓ and how many tests passed, ✗ and how many failed. The kit runs all small \
models on the reference backend and one of them on the others. Skipped tests aren't counted: a technique without \
settings or data has nothing to show there.

"""


def results() -> dict[tuple[str, str], list[int]]:
    """(technique, backend) → [passed, failed]."""
    from bitwright import registry

    titles = {"".join(w.title() for w in name.split("_")): name for name in registry.techniques()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        tests = [str(p) for p in sorted((ROOT / "tests/techniques").glob("test_*.py"))]
        command = [sys.executable, "-m", "pytest", *tests, "-q", "-k", "Test or same_number", f"--junitxml={file}"]
        # All techniques on all backends: the tests take a share.
        subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "BITWRIGHT_WHOLE": "1"})
        cases = list(ElementTree.parse(file).iter("testcase"))
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for case in cases:
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        owner, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        if match := re.fullmatch(r"test_same_numbers_on_every_backend\[(\w+)-(\w+)\]", name):
            technique, backend = match.groups()
            if backend in titles.values():
                technique, backend = backend, technique
        elif match := re.fullmatch(r"Test(\w+?)(?:On(\w+))?", owner):
            title, backend = match[1], (match[2] or "reference").lower()
            # AdaRound has a class for each solver.
            technique = titles.get(title) or next(
                (n for n in titles.values() if _plain(title).startswith(_plain(n))), ""
            )
        else:
            continue
        if technique:
            found[technique, backend][failed] += 1
    return found


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def main() -> None:
    found = results()
    techniques = list(dict.fromkeys(t for t, _ in found))
    lines = ["| technique | " + " | ".join(BACKENDS) + " |", "|" + "---|" * (len(BACKENDS) + 1)]
    for technique in sorted(techniques):
        cells = []
        for backend in BACKENDS:
            passed, failed = found.get((technique, backend), (0, 0))
            cells.append(f"✗ {failed}" if failed else f"✓ {passed}" if passed else "not run")
        lines.append(f"| `{technique}` | " + " | ".join(cells) + " |")
    (ROOT / "docs/matrix.md").write_text(PAGE + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
