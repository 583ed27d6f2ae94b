"""Exports of models with an operator that ONNX has no form of: all but the ONNX files is written, and verified."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.bundle import find_bundle  # noqa: E402
from bitwright.errors import InputError  # noqa: E402
from bitwright.graph import SetParams  # noqa: E402
from bitwright.report import read_report  # noqa: E402
from bitwright.verify import verify  # noqa: E402
from bitwright_torch.capture.capturing import CaptureNotice  # noqa: E402

X = torch.linspace(-2, 2, 60).reshape(10, 6)
FEED = [X.numpy()]


class Net(nn.Module):
    """A layer, and a function of what it gives."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x))


def exported(folder, function):
    sim = QuantSim(Net(function).eval(), X).calibrate(FEED)
    with pytest.warns(UserWarning, match="isn't written") as told:
        bundle = sim.export(folder)
    return sim, bundle, [str(w.message) for w in told if "isn't written" in str(w.message)]


def test_an_operator_without_onnx_form_costs_the_onnx_files_only(tmp_path):
    _, bundle, told = exported(tmp_path, torch.special.i0e)
    assert sorted(bundle.files) == ["encodings", "model", "weights"]
    assert bundle.files["model"].name == "model.pt2"
    assert [t.split()[0] for t in told] == ["model.onnx", "model.qdq.onnx"] and all("i0e" in t for t in told)
    found = verify(tmp_path, FEED)
    assert found.problems == [] and found.recorded
    assert found.sqnr_db.keys() == {"simulated_float"} and found.sqnr_db["simulated_float"] > 30
    reasons = read_report(tmp_path, "model").report.record.missing
    assert reasons.keys() == {"onnx", "qdq"}
    assert {f"the export has no {f}: {why}" for f, why in reasons.items()} <= set(found.notes)
    # The weights in the file are those that were simulated: another one is noticed.
    other = QuantSim(Net(torch.special.i0e).eval(), X)
    weight = other.params["fc.weight"].copy()
    weight[0, 0] += 1
    other.backend.save(other.backend.edit(other.native, [SetParams({"fc.weight": weight})]), tmp_path / "model.pt2")
    problems = verify(tmp_path, FEED).problems
    assert any("'fc.weight' holds other values" in p for p in problems)


def test_what_a_former_export_left_is_not_taken_for_this_one_s(tmp_path):
    QuantSim(Net(torch.relu).eval(), X).calibrate(FEED).export(tmp_path)
    assert "qdq" in find_bundle(tmp_path).files
    exported(tmp_path, torch.special.i0e)
    found = find_bundle(tmp_path)
    assert sorted(found.files) == ["encodings", "model"] and found.files["model"].name == "model.pt2"
    assert verify(tmp_path, FEED).problems == []


def test_named_tuples_of_pytorch_come_back_as_tuples(tmp_path):
    sim, _, _ = exported(tmp_path, torch.frexp)
    assert [g.shape for g in sim.predict(FEED)] == [(10, 6)] * 2
    assert verify(tmp_path, FEED).problems == []


def test_where_no_file_holds_the_model_the_rest_is_written(tmp_path):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Net(torch.special.i0e), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x) if float(x.sum()) < 1e9 else x)

    with pytest.warns(CaptureNotice):
        sim = QuantSim(Parts().eval(), X).calibrate(FEED)
    with pytest.warns(UserWarning, match="isn't written") as told:
        bundle = sim.export(tmp_path)
    assert "no file holds the float model" in str(told[0].message)
    assert sorted(bundle.files) == ["encodings", "weights"]
    record = read_report(tmp_path, "model").report.record
    assert record.missing.keys() == {"onnx", "qdq"} and record.reference is not None
    with pytest.raises(InputError, match=r"no model model.*has no onnx: .*i0e"):
        verify(tmp_path, FEED)


@pytest.mark.parametrize("kind", ["scatter_add", "embedding_bag", "index_reduce"])
def test_rows_that_are_read_by_number_export_and_verify(tmp_path, kind):
    rows = torch.tensor([9, 0, 7, 3, 8, 1, 2, 5])
    functions = {
        "scatter_add": lambda y: torch.scatter_add(y, 0, rows[:, None].expand(8, 6), torch.ones(8, 6)),
        "embedding_bag": lambda y: nn.functional.embedding_bag(rows, y, torch.tensor([0, 3]), mode="sum"),
        "index_reduce": lambda y: torch.index_reduce(y, 0, rows, torch.ones(8, 6), "prod"),
    }
    sim = QuantSim(Net(functions[kind]).eval(), X).calibrate(FEED)
    if kind == "index_reduce":
        with pytest.warns(UserWarning, match="isn't written"):
            sim.export(tmp_path)
    else:
        assert "qdq" in sim.export(tmp_path).files
    found = verify(tmp_path, FEED)
    assert found.problems == [] and found.sqnr_db["simulated_float"] > 30
    assert np.isfinite(found.sqnr_db["simulated_float"])
