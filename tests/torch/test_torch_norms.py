"""Norms written out in PyTorch are one op at every target."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

D = 32


def llama(m, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * x.to(dtype)


def divided(m, x):
    return x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt() * m.weight


def layer(m, x):
    d = x - x.mean(-1, keepdim=True)
    return m.weight * (d / torch.sqrt((d**2).mean(-1, keepdim=True) + 1e-6)) + m.bias


def deviation(m, x):
    """As in the annotated transformer."""
    return m.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + m.bias


def unit(m, x):
    return nn.functional.normalize(x, dim=-1)


def magnitude(m, x):
    """Of a spectrum; no norm, but squares of twice its range."""
    return torch.sqrt(x**2 + (m.weight * x).square())


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm
        self.up, self.down = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.weight, self.bias = nn.Parameter(1 + 0.1 * torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.down(self.norm(self, self.up(x)))


@pytest.mark.parametrize("target", ["default", "per_tensor", "htp_v66", "htp_v73"])
@pytest.mark.parametrize("norm", [llama, divided, layer, deviation, unit, magnitude], ids=lambda f: f.__name__)
def test_a_norm_that_is_written_out_is_one_op(norm, target):
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    x[:, 0] *= 1000
    sim = QuantSim(Net(norm).eval(), torch.from_numpy(x[:2]), target=target, activations="uint16", scheme="minmax")
    sim.calibrate(x)
    expected, found = (sim.predict(x, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= (20 if norm is magnitude else 25)


def softmax(m, x):
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def log_softmax(m, x):
    return torch.log(torch.softmax(x, -1) + 1e-6) + x - torch.logsumexp(x, -1, keepdim=True)


def gates(m, x):
    return torch.log1p(torch.exp(x)) * (1 / (1 + torch.exp(-x)))


def elu(m, x):
    return torch.where(x > 0, x, torch.expm1(x))


@pytest.mark.parametrize("made", [softmax, log_softmax, gates, elu], ids=lambda f: f.__name__)
def test_exponentials_below_a_sum_have_no_grid(made):
    """Those of arguments to 20 lie nine powers of ten apart."""
    net = Net(made).eval()
    with torch.no_grad():
        net.up.weight *= 10
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    sim = QuantSim(net, torch.from_numpy(x[:2]), weights="int16", activations="uint16", scheme="minmax").calibrate(x)
    expected, found = (sim.predict(x, simulated=s)[0] for s in (False, True))
    assert sqnr(expected, found) >= 55


def test_half_precision_norms_as_hugging_face_writes_them():
    """The casts are real there: the norm runs in float32, γ behind the cast back."""
    net = Net(llama).eval().to(torch.bfloat16)
    sim = QuantSim(net, torch.randn(2, 8, D, dtype=torch.bfloat16), activations="uint16")
    inner = [o for op in sim.graph if op.type in ("Pow", "ReduceMean", "Cast") for o in op.outputs]
    assert inner
    assert not set(inner) & set(sim.plan.quantized) - {
        t for op in sim.graph if op.type == "Cast" and sim.graph.producer(op.data_inputs[0]).kind is OpKind.LINEAR
        for t in op.outputs
    }  # fmt: skip
