"""Values computed from parameters alone: their entries fit the exported ONNX model, which holds them as constants."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.verify import sqnr, verify


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


class Anchored(nn.Module):
    """As YOLO's head makes its anchors: numbers of their own, in the dtype of a feature map."""

    def __init__(self, *, told: bool = False) -> None:
        super().__init__()
        self.c, self.told = nn.Conv2d(3, 2, 3, padding=1), told

    def forward(self, x):
        y = self.c(x)
        h, w = y.shape[2:]
        across = torch.arange(w).type_as(y) + 0.5
        down = torch.arange(h).type_as(y) + 0.5
        at = torch.stack((across[None].expand(h, w), down[:, None].expand(h, w)))
        return (y + 0.01 * at, torch.arange(w).type_as(y)) if self.told else y + 0.01 * at


def test_what_has_a_tensor_s_dtype_alone_is_not_on_its_grid(tmp_path):
    """A grid of the feature map (−1 … 1) would crush numbers up to 40."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 40)
    net = Anchored().eval()
    sim = QuantSim(net, x[:2]).calibrate({"x": x.numpy()})
    assert not [s for s in sim.plan if "type_as" in s or "arange" in s]
    (found,) = sim.predict({"x": x.numpy()})
    assert sqnr(net(x).detach().numpy(), found) > 35
    sim.export(tmp_path, name="m")
    both = QuantSim(Anchored(told=True).eval(), x[:2])
    assert len(both.graph.outputs) == 2
    np.testing.assert_array_equal(both.predict({"x": x.numpy()}, simulated=False)[1], np.arange(40, dtype=np.float32))
