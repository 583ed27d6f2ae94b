"""The same network in two frameworks: one analysis, the same figures."""

from __future__ import annotations

import numpy as np
import pytest

import bitwright
from bitwright import QuantSim


@pytest.fixture(scope="module")
def torch_model(trained):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, (weight, bias) in enumerate(trained.layers, 1):
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
                layer.weight.data = torch.tensor(weight, dtype=torch.float32)
                layer.bias.data = torch.tensor(bias, dtype=torch.float32)
                setattr(self, f"fc{i}", layer)

        def forward(self, features):
            x = torch.relu(self.fc1(features))
            x = torch.relu(self.fc2(x))
            return self.fc4(torch.relu(self.fc3(x)))

    return Net().eval()


@pytest.fixture(scope="module")
def sims(trained, torch_model):
    options = {"weights": "int4", "scheme": "minmax", "target": "generic-int8"}
    onnx = QuantSim(trained.model, **options).calibrate(trained.x)
    torch = QuantSim(torch_model, (trained.x[:2],), **options).calibrate(trained.x)
    return onnx, torch


def test_figures_agree(sims, trained):
    one, other = (bitwright.quant_analyzer(s, trained.x, labels=trained.labels, batch_size=128) for s in sims)
    for a, b in zip(one.overall[1:], other.overall[1:], strict=True):
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=0.05) and a.score == pytest.approx(b.score, abs=0.01)
    assert [s.unit for s in one.ranking("weight")] == [s.unit for s in other.ranking("weight")]
    for a, b in zip(one.ranking("weight"), other.ranking("weight"), strict=True):
        assert a.alone == pytest.approx(b.alone, abs=0.01)
        assert a.without == pytest.approx(b.without, abs=0.05)
    assert [r.bits for r in one.accumulators] == [r.bits for r in other.accumulators]
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert a.counts == b.counts and a.channel_low == b.channel_low


def test_a_dump_of_one_is_compared_with_the_other(sims, trained, tmp_path):
    onnx, torch = sims
    expected = bitwright.layer_outputs(onnx, trained.x[:8], tmp_path / "a")
    target = bitwright.layer_outputs(torch, trained.x[:8], tmp_path / "b")
    names = dict(zip(expected.index.tensors, target.index.tensors, strict=True))
    found = bitwright.compare(expected.path, target.path, names=names)
    assert found.first is None and len(found.rows) == 7
    assert np.isfinite([r.cosine for r in found.rows]).all()
