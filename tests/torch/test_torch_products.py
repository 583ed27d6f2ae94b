"""Products of two activations in PyTorch, other than matmul, are quantized as it is."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

PRODUCTS = {
    "linear": lambda m, a, c: F.linear(a, c),
    "linear with a bias": lambda m, a, c: F.linear(a, c, m.bias),
    "addmm": lambda m, a, c: torch.addmm(m.bias, a, c),
    "addmm of three": lambda m, a, c: torch.addmm(a, a, c, alpha=0.5),
    "baddbmm": lambda m, a, c: torch.baddbmm(a[None], a[None], c[None], beta=0.5, alpha=0.25),
    "conv1d": lambda m, a, c: F.conv1d(a[None], c[:, :, None].expand(8, 8, 3).contiguous(), padding=1),
}


class Net(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.product = product
        self.bias = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(1)))

    def forward(self, a, c):
        return self.product(self, torch.tanh(a), torch.tanh(c))


@pytest.mark.filterwarnings("ignore:the model is captured with fixed input shapes:bitwright_torch.CaptureNotice")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_activations_are_quantized(name):
    a, c = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    sim = QuantSim(Net(PRODUCTS[name]).eval(), (a, c))
    data = dict(zip(sim.graph.inputs, (a.numpy(), c.numpy()), strict=True))
    sim.calibrate(data)
    op = next(op for op in sim.graph if op.kind is OpKind.MATMUL)
    assert {*op.data_inputs, op.output} <= set(sim.plan.quantized)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 25
