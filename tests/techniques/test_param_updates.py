"""`ParamUpdates.set_params` beyond what the contract runs: frozen graphs, and simulations that are trained."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap, Training
from bitwright.graph import SetParams
from bitwright.testing import models
from bitwright.testing.contract_base import holds
from bitwright.testing.harness import min_max_encodings, simple_plan

MODEL = models.conv_bn_relu(depth=2)


def outputs(backend, graph, simulation, batch):
    return list(simulation.session([Tap(t) for t in graph.outputs]).run(batch).values())


def halved(backend, model, graph):
    """Every parameter, of quantized ops and of norms that stay in float."""
    return {p: v * np.float32(0.5) for p, v in backend.read(model, list(graph.params)).items()}


@pytest.mark.parametrize("name", [n for n in FRAMEWORKS if n in ("torch", "keras", "tensorflow")])
def test_a_simulation_for_training_takes_new_parameters(name):
    port, backend = FRAMEWORKS[name], FRAMEWORKS[name].backend()
    model, batch = port.port(MODEL), port.batch(models.batch(MODEL))
    graph = backend.graph(model)
    plan = simple_plan(graph)
    table = min_max_encodings(backend, model, plan, [batch])
    simulation = backend.simulate_trainable(model, plan, table, Training())
    values = halved(backend, model, graph)
    simulation.set_params(values)
    assert holds(simulation, table)
    edited = backend.edit(model, [SetParams(values)])
    expected = outputs(backend, graph, backend.simulate(edited, plan, table), batch)
    for x, y in zip(outputs(backend, graph, simulation, batch), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())
    float_model = simulation.float_model()
    for p, value in backend.read(float_model, list(values)).items():
        assert np.array_equal(value, values[p]), p


def test_constants_of_a_frozen_graph(tmp_path):
    if "tensorflow" not in FRAMEWORKS:
        pytest.skip("TensorFlow isn't installed")
    port, backend = FRAMEWORKS["tensorflow"], FRAMEWORKS["tensorflow"].backend()
    model = backend.load(backend.save(port.port(MODEL), tmp_path / "net.pb"))
    assert not model.values
    batch, graph = port.batch(models.batch(MODEL)), backend.graph(model)
    plan = simple_plan(graph)
    table = min_max_encodings(backend, model, plan, [batch])
    simulation, values = backend.simulate(model, plan, table), halved(backend, model, graph)
    before = outputs(backend, graph, simulation, batch)
    simulation.model(next(iter(batch.values())))
    simulation.set_params(values)
    expected = outputs(backend, graph, backend.simulate(backend.edit(model, [SetParams(values)]), plan, table), batch)
    found = outputs(backend, graph, simulation, batch)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    assert np.array_equal(np.asarray(simulation.model(next(iter(batch.values())))), found[0])
    assert not np.array_equal(found[0], before[0])
