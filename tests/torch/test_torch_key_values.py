"""Keys and values of attention as PyTorch writes it: grouped heads in `scaled_dot_product_attention`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitwright import QuantSim
from bitwright.backend import Tap


class Attention(nn.Module):
    """Four heads of queries, two of keys and values, of four features each."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, n, bias=False) for n in (16, 8, 8, 16))

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        k = k * 1.5 + 0.25 * k.flip(-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("kind", "scales"), [("int8:per_head", (2,)), ("int4:per_token", (0,))])
def test_heads_and_tokens_have_their_own_scale(kind, scales, tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 6, 16)).astype(np.float32)
    sim = QuantSim(Attention().eval(), {"x": x}, activations="int8:per_token", kv_cache=kind).calibrate({"x": x})
    kept = {s for s in sim.encodings if s in sim.graph.tensors} - {op.data_inputs[0] for op in sim.graph.linear_ops}
    assert len(kept) == 2
    assert not sim.plan.notes
    assert {sim.encodings[s].scale.shape for s in kept} == {scales}
    taps = [Tap(s) for s in kept]
    found = sim.simulation.session(taps).run({"x": x})
    for tap in taps:
        values = np.asarray(found[tap])
        assert values.shape[-1] == 4  # features are last, so that rows are tokens of a head
        if kind == "int4:per_token":
            steps = values / np.maximum(np.abs(values).max(axis=-1, keepdims=True), 1e-9) * 7
            assert np.abs(steps - np.rint(steps)).max() < 1e-3
        else:
            assert np.array_equal(sim.encodings[tap.tensor].fake_quantize(values), values)
    expected, quantized = (sim.predict({"x": x}, simulated=s)[0] for s in (False, True))
    assert np.square(quantized - expected).sum() < 0.02 * np.square(expected).sum()
    sim.export(tmp_path, name="net")
