"""Token ids that arrive as floats, in Keras and in TensorFlow: `Input((n,))` has a float type by default."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

IDS = np.random.default_rng(0).integers(1, 999, (32, 6)).astype(np.float32)


def net(shift):
    keras.utils.set_random_seed(0)
    ids = L.Input((6,), name="ids")
    read = ops.reshape(ids, (-1, 6)) - 1.0 if shift else ids
    return keras.Model(ids, L.Dense(8)(L.Embedding(1000, 8)(read)))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("framework", ["keras", "tensorflow"])
def test_indices_that_arrive_as_floats_stay_exact(framework, shift):
    model = net(shift)
    if framework == "tensorflow":
        spec = [tf.TensorSpec([None, 6], name="ids")]
        model = tf.function(model, input_signature=spec).get_concrete_function()
    sim = QuantSim(model)
    data = {sim.graph.inputs[0]: IDS}
    sim.calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30
    assert sim.graph.inputs[0] not in sim.plan.quantized
