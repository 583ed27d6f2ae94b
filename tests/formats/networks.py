"""A small network with what language models have: a table, linear layers with and without bias, a head."""

import numpy as np
import torch
from torch import nn

IDS = {"ids": np.random.default_rng(0).integers(0, 40, (4, 6))}


class Net(nn.Module):
    """Weights of 64 and 128 columns; `tied`: the head multiplies by the table."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(torch.relu(self.up(self.embed(ids)))))


def simulated(target, weights=None, *, tied=False, **options):
    """A calibrated simulation."""
    from bitwright import QuantSim

    sim = QuantSim(Net(tied), {"ids": torch.zeros(2, 6, dtype=torch.int64)}, target=target, weights=weights, **options)
    return sim.calibrate(IDS)


def expected(sim):
    """Every parameter as the simulation computes with it."""
    return {
        p: sim.table[p].fake_quantize(sim.params[p]) if p in sim.table else np.array(sim.params[p])
        for p in sim.graph.params
    }
