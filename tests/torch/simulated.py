"""Small networks with their plans and encodings, for the tests of simulation, training and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright.backend import Tap, Training
from bitwright.graph import Graph
from bitwright.grids import Encoding, encoding_from_range, encoding_of_weights
from bitwright.placement import Plan, build_plan
from bitwright.targets import load_target
from bitwright_torch.capture.capturing import capture
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import CapturedModel
from bitwright_torch.graph.params import read_params
from bitwright_torch.simulate.session import open_session
from bitwright_torch.simulate.simulation import TorchSimulation


class ConvNet(nn.Module):
    """Convolutions with batch norm, in-place ReLU, a concatenation of a tensor with its pooled self, dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv2 = nn.Conv2d(16, 12, 1)
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = nn.functional.relu6(self.dw(x)) + x
        x = torch.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        x = torch.relu(self.conv2(x))
        return self.fc(self.drop(x.mean((2, 3))))


class TiedNet(nn.Module):
    """An embedding whose table is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


@dataclass
class Setup:
    """A captured model with everything that a simulation of it takes."""

    module: nn.Module
    sample: torch.Tensor
    model: CapturedModel
    graph: Graph
    plan: Plan
    table: dict[str, Encoding]

    def simulation(self, trainable: bool | Training = False, **changes: Any) -> TorchSimulation:
        return TorchSimulation(self.model, self.plan, {**self.table, **changes}, trainable=trainable)


def setup(module: nn.Module, sample: torch.Tensor, target: str = "default", **options: Any) -> Setup:
    """Capture, plan, and min-max encodings from the sample."""
    module.eval()
    model = capture(module, sample)
    graph = canonical(model).graph
    plan = build_plan(graph, load_target(target), **options)
    values = read_params(model, plan.parameters)
    table = {s: encoding_of_weights(values[s], plan.spec(s)) for s in plan.parameters}
    watched = {s: plan.observed(s) for s in plan.activations}
    taps = [Tap(t) for t in dict.fromkeys(t for ts in watched.values() for t in ts)]
    seen = {k.tensor: v for k, v in open_session(model, taps).run({graph.inputs[0]: sample.numpy()}).items()}
    for site, tensors in watched.items():
        low = min(float(np.min(seen[t])) for t in tensors)
        high = max(float(np.max(seen[t])) for t in tensors)
        table[site] = encoding_from_range(plan.spec(site), low, high, source="minmax")
    return Setup(module, sample, model, graph, plan, table)


def conv_setup(p: float = 0.0, **options: Any) -> Setup:
    """`ConvNet` with batch statistics of its own."""
    torch.manual_seed(0)
    module, sample = ConvNet(p), torch.randn(6, 3, 9, 9)
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(16, 3, 9, 9))
    return setup(module, sample, **options)
