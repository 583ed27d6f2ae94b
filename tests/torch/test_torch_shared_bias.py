"""A module called twice: its one bias is int32 in the unit of each call's accumulators, in simulation and export."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.placement import OwnForms


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


@pytest.mark.parametrize("options", [{}, {"weights": "int4"}, {"weights": "int16", "activations": "uint16"}])
def test_simulation_and_file_agree(options, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    sim = QuantSim(Twice().eval(), x[:1], scheme="minmax", **options).calibrate({"x": x.numpy()})
    assert isinstance(sim.plan["conv.bias"].decision, OwnForms)
    path = sim.export(tmp_path, name="m").files["qdq"]
    simulated = sim.predict({"x": x.numpy()})[0]
    (out,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    step = float(sim.table[sim.graph.outputs[0]].scale)
    assert (np.abs(out - simulated) > 0.5 * step).mean() < 0.004
    assert np.abs(out - simulated).max() < 1.5 * step
    assert set(sim.native.state_dict()) == {"conv.weight", "conv.bias"}
