"""What the packaging, the checks and the contributors' commands promise."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_every_package_is_shipped_typed_and_checked():
    found = {
        p.parent.relative_to(ROOT).as_posix()
        for r in ("core", "backends", "plugins")
        for p in (ROOT / r).glob("*/__init__.py")
    }
    assert set(PACKAGES) == found
    names = {Path(package).name for package in PACKAGES}
    assert set(PROJECT["tool"]["mypy"]["packages"]) == names and PROJECT["tool"]["mypy"]["strict"]
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == names
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file(), package


@pytest.mark.parametrize("package", [Path(package).name for package in PACKAGES])
def test_every_public_name_is_there(package):
    needed = {"bitwright_onnx": "onnxruntime", "bitwright_keras": "keras", "bitwright_tensorflow": "tensorflow"}
    pytest.importorskip(needed.get(package, package.replace("bitwright_torch", "torch")))
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, name


def test_every_requirement_is_pinned():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    for requirement in needed:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        # The tests run with the build for CPUs, which is another distribution.
        assert name in pinned or name in ("bitwright", "tensorflow"), name


def test_check_runs_every_linter_then_the_tests():
    if (
        not (ROOT / "Makefile").exists()
        or subprocess.run(["make", "--version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("make isn't installed")
    planned = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    order = [
        planned.index(tool) for tool in ("ruff check", "ruff format --check", "bin/mypy", "lint-imports", "-m pytest")
    ]
    assert order == sorted(order)
    assert "exec make check" in (ROOT / ".ci" / "run").read_text()
