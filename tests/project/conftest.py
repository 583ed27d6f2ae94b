"""Distributions with entry points, laid out as pip does."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a distribution with an entry point on the path, as pip would lay it out."""
    made: list[str] = []

    def install(name: str, modules: dict[str, str], entry: str, version: str = "1.0") -> None:
        site = tmp_path / name
        package = next(iter(modules)).partition(".")[0]
        for module, text in modules.items():
            file = site.joinpath(*module.split(".")).with_suffix(".py")
            if module == package:
                file = site / package / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        (site / package / "__init__.py").touch()
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[bitwright]\n{entry}\n")
        monkeypatch.syspath_prepend(str(site))
        made.append(package)

    yield install
    for module in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[module]
