"""The walk's simulation with parameters put into it equals one that is lowered anew for each layer."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.data._dataset import ArrayDataset
from bitwright.graph import SetParams, output_channels
from bitwright.layerwise import LayerwiseWalk
from bitwright.technique import LayerResult
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import MemoryStore, Quiet, min_max_encodings, simple_plan
from bitwright.testing.reference import ReferenceBackend


class _Updatable:
    """A reference simulation that takes new parameters."""

    def __init__(self, backend, model, plan, encodings):
        self._make = lambda m, e: ReferenceBackend.simulate(backend, m, plan, e)
        self._backend, self._native, self._simulation = backend, model, self._make(model, encodings)
        self.off = {}

    def set_params(self, values):
        table = self._simulation.get()
        self._native = self._backend.edit(self._native, [SetParams(values)])
        self._simulation = self._make(self._native, table)
        self._simulation.set(self.off)

    def set(self, encodings):
        self.off |= {s: None for s, e in encodings.items() if e is None}
        self._simulation.set(encodings)

    def __getattr__(self, name):
        return getattr(self._simulation, name)


class Updatable(ReferenceBackend):
    """Counts how often a model is lowered."""

    def __init__(self):
        super().__init__()
        self.lowered = 0

    def simulate(self, model, plan, encodings, **options):
        self.lowered += 1
        return _Updatable(self, model, plan, encodings)


def shared_bias():
    """Two layers with one bias between them, and one without."""
    b = Builder()
    x = b.relu("act1", b.conv("first", b.input("x", 4, 6, 6), 4, pad=1, bias=np.ones(4)))
    x = b.conv("second", x, 4, pad=1, bias=False)
    x = b.conv("third", b.relu("act2", x), 4, pad=1, bias=np.zeros(4))
    model = b.build(x)
    first, third = (model.graph.op(o) for o in ("first", "third"))
    from dataclasses import replace

    from bitwright.graph import Graph, ParamRole

    ops = [op if op is not third else replace(op, params={**op.params, ParamRole.BIAS: first.params[ParamRole.BIAS]})
           for op in model.graph.ops]  # fmt: skip
    g = model.graph
    params = {p: v for p, v in g.params.items() if p != "third.bias"}
    values = {p: v for p, v in model.params.items() if p != "third.bias"}
    return replace(model, graph=Graph(ops, g.tensors, params, g.inputs, g.outputs), params=values)


def walk(model, backend, *, active):
    graph = backend.graph(model)
    plan, data = simple_plan(graph), models.batch(model, 8)
    encodings = min_max_encodings(backend, model, plan, [data])
    run = LayerwiseWalk(backend, model, graph, plan, encodings, ArrayDataset(data, 4), MemoryStore(), Quiet())
    seen = {}

    def solve(layer):
        seen[layer.op.id] = layer.moments.mean_quantized, layer.moments.qq
        scale = layer.encoding.scale * np.float32(0.9)
        encoding = layer.encoding.with_(scale=scale, frozen=True)
        shift = np.float32(layer.moments.mean_quantized.sum() * 1e-2)
        bias = np.full(output_channels(layer.op, layer.weight.shape), shift, np.float32)
        return LayerResult(encoding.fake_quantize(layer.weight * np.float32(1.1)), encoding, bias)

    run([op.id for op in graph.linear_ops], solve, quantized_activations=active)
    return seen


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("name", [*models.MODELS, "shared_bias"])
def test_moments_are_bit_equal_and_the_model_is_lowered_twice_at_most(name, active):
    model = shared_bias() if name == "shared_bias" else models.MODELS[name]()
    backend = Updatable()
    expected, found = walk(model, ReferenceBackend(), active=active), walk(model, backend, active=active)
    assert expected.keys() == found.keys()
    for op in expected:
        for a, b in zip(expected[op], found[op], strict=True):
            assert np.array_equal(a, b), op
    # Once, and once more where layers get biases that they didn't have.
    assert backend.lowered <= (3 if name == "shared_bias" else 2)
