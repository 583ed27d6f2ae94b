"""Values computed from parameters alone: their entries fit the exported ONNX model, which holds them as constants."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.verify import verify


class Gate(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.c, self.d, self.scale = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), scale
        self.w, self.g = nn.Parameter(torch.tensor([1.0, 0.5])), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.d(self.scale(self) * self.c(x))


def fused(module):
    w = torch.relu(module.w)
    return (w / (w.sum() + 1e-4))[0]


class ClassToken(nn.Module):
    """A token for each sample before the patches, and embeddings of positions."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.token, self.pos = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(x)[:, 0]


MODULES = {
    "one of several": lambda: Gate(lambda m: m.w[0]),
    "another": lambda: Gate(lambda m: m.w[1]),
    "sigmoid": lambda: Gate(lambda m: torch.sigmoid(m.g)),
    "two steps": lambda: Gate(lambda m: nn.functional.softplus(m.g) * 2),
    "normalized": lambda: Gate(fused),
    "class token": ClassToken,
}


@pytest.mark.parametrize("kind", MODULES)
def test_encodings_fit_the_exported_model(kind, tmp_path):
    from bitwright.cli import main

    torch.manual_seed(0)
    module, x = MODULES[kind]().eval(), torch.randn(4, 3, 8, 8)
    sim = QuantSim(module, x[:1]).calibrate({"x": x.numpy()})
    sim.export(tmp_path, name="m")
    opened = QuantSim(tmp_path / "m.onnx")
    opened.load_encodings(tmp_path / "m.encodings", strict=True)
    assert not verify(tmp_path, {"x": x.numpy()}).problems
    assert main(["encodings", "check", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "m.encodings").read_text())
    for section, known in (("activation_encodings", opened.graph.tensors), ("param_encodings", opened.graph.params)):
        assert {e["name"] for e in content[section]} <= set(known)
