"""The part of the backend contract about files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bitwright import formats
from bitwright.backend import Bundle, SharedConversion
from bitwright.bundle import Quantized, encodings_file, gate, read_encodings, run_simulated
from bitwright.data import Samples
from bitwright.errors import BitwrightError
from bitwright.graph import Graph, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Derived, Plan, SharedWith, SiteId, build_plan
from bitwright.simulation import bias_forms
from bitwright.state import SimState
from bitwright.targets import load_target
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    assert_close,
)
from bitwright.testing.plan_contract import calibrated

QDQ = "qdq"
"""Purpose of quantized artefacts; those in parts are called "qdq/…"."""


class FileContract(Contract):
    """Saving, exporting and loading.

    Attributes:
        demanding: formats that only the plans of some targets fit. Others may be refused, leaving no file behind.
        target: what exports are made for.
    """

    demanding: ClassVar[frozenset[str]] = frozenset()
    target: ClassVar[str] = "default"

    def artefact_outputs(self, path: Path, case: Case) -> Mapping[TensorId, Array]:
        """What the exported float artefact computes; override it where another backend opens that format."""
        return self.outputs(self.backend().load(path), case)

    def test_save_and_load(self, case: Case, tmp_path: Path) -> None:
        """A saved model computes the same, and no other file is left; a sample may be given where none is needed."""
        if self.suffix is None:
            pytest.skip("the backend writes no model files (`suffix` is None)")
        backend, model = self.backend(), case.model
        path = backend.save(model, tmp_path / f"model{self.suffix}")
        assert path.exists()
        before, after = self.outputs(model, case), self.outputs(backend.load(path, sample=case.batch), case)
        assert list(after) == list(before)
        for t in before:
            assert_close(after[t], before[t], case.tolerance, t)

    def test_export_and_reload(self, case: Case, tmp_path: Path) -> None:
        """Every format is written, or refused without a file; each says what is simulated.

        The float artefact computes what the model does; its encodings file has one entry for each site, under the
        artefact's names and in its layouts; a quantized artefact that a backend here can read computes what the
        simulation does, tensor by tensor.
        """
        backend, model = self.backend(), case.model
        if not backend.formats():
            pytest.skip("the backend has no export formats")
        graph = backend.graph(model)
        target = load_target(self.target)
        plan = build_plan(graph, target, scheme="minmax")
        table = calibrated(backend, case, plan)
        state = SimState(
            backend=backend, native=model, graph=graph, target=target, plan=plan, scheme="minmax",
            encodings=table.restricted({*plan.activations, *plan.parameters}),
        )  # fmt: skip
        samples = Samples({t: np.asarray(v) for t, v in case.batch.items()})
        simulated = run_simulated(state, bias_forms.simulate(backend, model, plan, table), samples)
        before = self.outputs(model, case)
        every = list(backend.formats())
        taken = {*every[:1], *(f for f in every if f.startswith(QDQ)), *self._taken(every, case)}
        # As an export does, where formats have a costly step in common.
        with backend.converting_once() if isinstance(backend, SharedConversion) else nullcontext():
            for index, name in enumerate(every):
                if name not in taken:
                    continue
                held = set(tmp_path.iterdir())
                try:
                    bundle = backend.export(model, plan, table, tmp_path / f"{index}{self.suffix or ''}", name)
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
                    check_encodings_file(state, bundle, tmp_path / "model.encodings")
                    if type(self).artefact_outputs is FileContract.artefact_outputs and bundle.layouts:
                        written = backend.graph(backend.load(bundle.files["model"])).params
                        for p, layout in bundle.layouts.items():
                            lies = written[p].layout or tuple(range(len(written[p].shape)))
                            assert tuple(layout) == lies, f"{p} lies as {lies} in the artefact, not {layout}"
                quantized = [Quantized(p, bundle.names) for k, p in bundle.files.items() if k.split("/")[0] == QDQ]
                gate(state, simulated, quantized)
        with pytest.raises(BitwrightError):
            backend.export(model, plan, table, tmp_path / "x", "no such format")


def check_encodings_file(state: SimState, bundle: Bundle, path: Path) -> None:
    """Assert that a bundle's encodings file, read again, is the table: one entry for each site that quantizes."""
    graph, plan, table = state.graph, state.plan, state.table
    entries: Any = encodings_file(graph, plan, table, "2.1.0", bundle, include_bias=True)
    wanted = [s for s in table if s not in bundle.absent]
    names = {s: bundle.names.get(s, s) for s in wanted}
    by_name: dict[str, SiteId] = {}
    for site, name in names.items():  # what does nothing has no tensor of its own in the artefact
        same = by_name.setdefault(name, site)
        assert table[same].equals(table[site]), f"{same!r} and {site!r} have one name in the artefact, {name!r}"
    assert {*entries.activations, *entries.parameters} == set(names.values())
    assert len(entries.activations) + len(entries.parameters) == len(set(names.values())), "a site has two entries"
    if any(name != site for site, name in names.items()):
        return  # the file is read with the artefact's graph
    formats.write(entries, path, "2.1.0")
    layouts = {p: replace(x, layout=bundle.layouts.get(p, x.layout)) for p, x in graph.params.items()}
    artefact = Graph(graph.ops, graph.tensors, layouts, graph.inputs, graph.outputs)
    check_own(plan, table.restricted(set(wanted)), read_encodings(path, artefact, plan))


def check_own(plan: Plan, table: EncodingTable, found: EncodingTable) -> None:
    """Assert that sites with a grid of their own have the table's."""
    own = {s for s in table if not isinstance(plan[s].decision, SharedWith | Derived)}
    assert set(found) == own, f"sites of the encodings file: {sorted(set(found) ^ own)} too many or too few"
    for site in own:
        assert found[site].equals(table[site]), f"{site}: {found[site]} was written as {table[site]}"
