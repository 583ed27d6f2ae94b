"""A layer called twice: its one bias is int32 in the unit of each call's accumulators, in simulation and export."""

from __future__ import annotations

import keras
import numpy as np
import onnxruntime as ort
import pytest

from bitwright import QuantSim
from bitwright.placement import OwnForms


@pytest.mark.parametrize("options", [{}, {"weights": "int4"}])
def test_simulation_and_file_agree(options, tmp_path):
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(8, activation="relu", bias_initializer="random_normal", name="dense")
    inputs = keras.Input((8,), name="x")
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(layer(layer(inputs))))
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    sim = QuantSim(model, **options).calibrate({"x": x})
    assert any(isinstance(s.decision, OwnForms) for s in sim.plan.values())
    path = sim.export(tmp_path, name="m").files["qdq"]
    simulated = sim.predict({"x": x})[0]
    (out,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    step = float(sim.table[sim.graph.outputs[0]].scale)
    assert (np.abs(out - simulated) > 0.5 * step).mean() < 0.03
