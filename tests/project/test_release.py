"""What a release must have right: one version, and the licence of everything that is installed with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import bitwright

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"dev", "docs", "notebooks", "all"}


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == bitwright.__version__


def test_every_dependency_has_its_licence_named():
    text = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| ([\w-]+) \|", text, re.M)) - {"package"}
    extras = (e for name, e in PROJECT["optional-dependencies"].items() if name not in FOR_DEVELOPERS)
    entries = [*PROJECT["dependencies"], *(entry for extra in extras for entry in extra)]
    wanted = {re.match(r"[\w-]+", entry)[0] for entry in entries} - {"bitwright"}
    assert listed == wanted


def test_licences_travel_with_the_wheel():
    for name in PROJECT["license-files"]:
        assert (ROOT / name).is_file(), name
    assert "THIRD_PARTY.md" in PROJECT["license-files"]
