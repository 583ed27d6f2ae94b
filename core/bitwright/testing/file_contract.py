"""The part of the backend contract about files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from bitwright.errors import BitwrightError
from bitwright.graph import TensorId
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    assert_close,
)
from bitwright.testing.harness import min_max_encodings, simple_plan


class FileContract(Contract):
    """Saving, exporting and loading.

    Attributes:
        demanding: formats that only the plans of some targets fit. Others may be refused, leaving no file behind.
    """

    demanding: ClassVar[frozenset[str]] = frozenset()

    def artefact_outputs(self, path: Path, case: Case) -> Mapping[TensorId, Array]:
        """What the exported float artefact computes; override it where another backend opens that format."""
        return self.outputs(self.backend().load(path), case)

    def test_save_and_load(self, case: Case, tmp_path: Path) -> None:
        """A saved model computes the same, and no other file is left."""
        backend, model = self.backend(), case.build()
        path = backend.save(model, tmp_path / f"model{self.suffix}")
        assert path.exists()
        before, after = self.outputs(model, case), self.outputs(backend.load(path), case)
        assert list(after) == list(before)
        for t in before:
            assert_close(after[t], before[t], case.tolerance, t)

    def test_export_and_reload(self, case: Case, tmp_path: Path) -> None:
        """Every format is written; the float artefact computes what the model does and has its parameters."""
        backend, model = self.backend(), case.build()
        plan = simple_plan(backend.graph(model))
        table = min_max_encodings(backend, model, plan, [case.batch])
        before = self.outputs(model, case)
        for index, name in enumerate(backend.formats()):
            held = set(tmp_path.iterdir())
            try:
                bundle = backend.export(model, plan, table, tmp_path / f"{index}{self.suffix}", name)
            except BitwrightError:
                assert name in self.demanding
                assert set(tmp_path.iterdir()) == held
                continue
            assert bundle.files
            assert all(p.exists() for p in bundle.files.values())
            if index == 0:
                again = self.artefact_outputs(bundle.files["model"], case)
                for t, v in zip(before, again.values(), strict=True):
                    assert_close(v, before[t], case.tolerance, t)
        with pytest.raises(BitwrightError):
            backend.export(model, plan, table, tmp_path / "x", "no such format")
