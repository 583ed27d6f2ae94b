"""Attention masks in PyTorch models: whatever the form, masked scores don't set the grid of the others."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

S, D, N = 12, 16, 24
LOWEST = torch.finfo(torch.float32).min
KEPT = (torch.arange(S) < 8).expand(N, 1, S)
X = torch.randn(N, S, D, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(1)
        self.masked = masked
        self.k = nn.Linear(D, D)
        self.bias = nn.Parameter(torch.randn(S, S) * 4 - 12)
        self.register_buffer("triangle", torch.full((S, S), -torch.inf).triu(1))
        self.register_buffer("finite", torch.full((S, S), -1e4).triu(1))

    def forward(self, q, mask):
        k = self.k(q)
        scores = q @ k.transpose(1, 2) * D**-0.5
        return torch.softmax(self.masked(self, scores, mask), -1) @ k


FORMS = {
    "triangle of -inf": (lambda m, s, mask: s + m.triangle, KEPT),
    "triangle of -1e4": (lambda m, s, mask: s + m.finite, KEPT),
    "masked_fill": (lambda m, s, mask: s.masked_fill(~mask, -1e4), KEPT),
    "where": (lambda m, s, mask: torch.where(mask, s, LOWEST), KEPT),
    "-1e4": (lambda m, s, mask: s + (1 - mask) * -1e4, KEPT.long()),
    "-100": (lambda m, s, mask: (1 - mask.float()) * -100 + s, KEPT.long()),
    "subtracted": (lambda m, s, mask: s - 1e9 * (1.0 - mask), KEPT.long()),
    "lowest": (lambda m, s, mask: s + (1.0 - mask) * LOWEST, KEPT.float()),
    "a float input": (lambda m, s, mask: s + mask, (~KEPT) * -1e4),
    "computed triangle": (lambda m, s, mask: s + torch.full((S, S), -1e4).triu(1), KEPT),
    "two": (lambda m, s, mask: s + (1 - mask) * -1e4 + m.finite, KEPT.long()),
    "scaled behind": (lambda m, s, mask: s.masked_fill(~mask, -1e9) / 4, KEPT),
    "looked up -inf": (lambda m, s, rows: s + m.triangle[rows], torch.arange(S).expand(N, S)),
    "looked up -1e4": (lambda m, s, rows: s + m.finite.index_select(0, rows[0]), torch.arange(S).expand(N, S)),
    "bounded": (lambda m, s, mask: torch.max(s + m.triangle, torch.tensor(LOWEST)), KEPT),
}


@pytest.mark.parametrize("target", ["default", "htp_v73"])
@pytest.mark.parametrize("form", FORMS)
def test_masked_attention_keeps_its_accuracy(form, target):
    masked, mask = FORMS[form]
    mask = mask.contiguous()
    sim = QuantSim(Attention(masked).eval(), (X[:2], mask[:2]), target=target)
    data = dict(zip(sim.graph.inputs, (X.numpy(), mask.numpy()), strict=False))
    sim.calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) >= 28


def test_a_learned_bias_keeps_its_grid():
    sim = QuantSim(Attention(lambda m, s, mask: s + m.bias).eval(), (X[:2], KEPT[:2]))
    assert "bias" in sim.plan.quantized
    assert not any(t.mask for t in sim.graph.tensors.values())


def test_the_larger_of_two_tensors_is_no_reduction():
    bounds = {
        "max": (lambda m, s, mask: torch.max(s, m.bias), "Max"),
        "min": (lambda m, s, mask: torch.min(s, m.bias), "Min"),
        "amax": (lambda m, s, mask: s - torch.max(s, -1, keepdim=True)[0], "ReduceMax"),
    }
    for form, type in bounds.values():
        sim = QuantSim(Attention(form).eval(), (X[:2], KEPT[:2]))
        assert sum(op.type == type for op in sim.graph) == 1
        assert all(op.kind is (OpKind.MAX_POOL if type == "ReduceMax" else OpKind.ELEMENTWISE)
                   for op in sim.graph if op.type == type)  # fmt: skip
