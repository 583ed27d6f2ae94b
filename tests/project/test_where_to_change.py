"""docs/where-to-change.md leads to files, names and tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "where-to-change.md").read_text(encoding="utf-8")
TASKS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
PATH = r"`((?:core|backends|plugins|tests|docs|benchmarks|changes)/[\w./-]*)(?:::(\w+))?`"
ASKED = (
    "calibration scheme", "target preset", "kind of op", "ONNX op", "PyTorch op", "Keras layer", "TensorFlow op",
    "encodings schema", "report", "technique", "command", "graph edit", "export format", "statistic", "integer kernel",
)  # fmt: skip


def defined(path: Path) -> set[str]:
    """Names that a module's own statements and those of its classes and functions define."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def missing(text: str) -> list[str]:
    """What a text names and the repository doesn't have."""
    lost = []
    for path, test in re.findall(PATH, text):
        if not (ROOT / path).exists():
            lost.append(path)
        elif test and test not in defined(ROOT / path):
            lost.append(f"{path}::{test}")
    for names, path in re.findall(r"((?:`\w+`(?:,| and| or| of)? )+)in `([\w./]+\.py)`", text):
        have = defined(ROOT / path) if (ROOT / path).exists() else set()
        lost += [f"{name} in {path}" for name in re.findall(r"`(\w+)`", names) if name not in have]
    return lost


@pytest.mark.parametrize("task", TASKS)
def test_a_task_names_what_to_change_and_what_guards_it(task):
    change, guard, told = TASKS[task].partition("\nGuard: ")
    assert guard, "no guard"
    changed, guards = ([path for path, _ in re.findall(PATH, part)] for part in (change, told))
    assert any(path.startswith(("core/", "backends/", "plugins/")) for path in changed)
    assert any(path.startswith("tests/") or path.endswith("_contract.py") for path in guards)
    assert not missing(TASKS[task])


@pytest.mark.parametrize("words", ASKED)
def test_what_newcomers_ask_is_answered(words):
    assert [task for task in TASKS if words in task]


@pytest.mark.parametrize(
    "text",
    [
        "`core/bitwright/calibration/_gone.py`",
        "`tests/core/test_calibration.py::test_gone`",
        "`_GONE` in `core/bitwright/calibration/_schemes.py`",
        "`VERSIONS` and `Gone` in `core/bitwright/formats/_entries.py`",
        "`core/bitwright/rooms/`",
    ],
)
def test_what_is_gone_is_seen(text):
    assert missing(text)
