"""A constant that is joined to activations is a parameter, stored on the result's grid, in Keras and in TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.bundle import OutputQuality  # noqa: E402
from bitwright.graph import OpKind, ParamRole, SetParams  # noqa: E402
from bitwright.placement import SharedWith  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402

TOKEN = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def net(framework: str):
    if framework == "tensorflow":
        spec = [tf.TensorSpec([3, 6], name="x")]
        return tf.function(lambda x: tf.concat([tf.sigmoid(x), TOKEN], 1), input_signature=spec).get_concrete_function()
    x = L.Input((6,), batch_size=3, name="x")
    return keras.Model(x, ops.concatenate([ops.sigmoid(x), TOKEN], axis=1))


@pytest.mark.filterwarnings("ignore:.*no .h5 is written")
@pytest.mark.parametrize("framework", ["keras", "tensorflow"])
def test_the_constant_is_stored_on_the_grid_of_the_result(tmp_path, framework):
    sim = QuantSim(net(framework))
    data = {sim.graph.inputs[0]: X}
    sim.calibrate(data)
    (op,) = (op for op in sim.graph if op.kind is OpKind.CONCAT)
    token = op.params[ParamRole.CONSTANT]
    assert sim.plan[token].decision == SharedWith(op.output)
    grid = sim.table[op.output]
    assert grid.minimum < -2.9 and grid.maximum > 4.9  # what the constant needs; the sigmoid's is 0 to 1
    assert np.array_equal(sim.predict(data)[0][:, 6:], grid.fake_quantize(TOKEN))
    bundle = sim.export(tmp_path)
    assert "qdq" in bundle.files
    assert verify(tmp_path, data).problems == []


def test_a_constant_inside_of_a_list_is_read_and_written():
    sim = QuantSim(net("keras"))
    (token,) = sim.graph.params
    assert np.array_equal(sim.params[token], TOKEN)
    edited = sim.backend.edit(sim.native, [SetParams({token: 2 * TOKEN})])
    assert np.array_equal(sim.backend.read(edited, [token])[token], 2 * TOKEN)
    assert np.array_equal(sim.params[token], TOKEN)


def test_a_list_of_one_is_passed_on():
    x = L.Input((6,), name="x")
    sim = QuantSim(keras.Model(x, L.Concatenate()([L.ReLU()(x)])))
    assert [op.kind for op in sim.graph] == [OpKind.RELU, OpKind.IDENTITY]


@pytest.mark.parametrize(("size", "crushed"), [(500, 1), (1, 0)])
def test_what_is_crushed_beside_what_it_is_stacked_with_is_named(size, crushed):
    x = L.Input((6,), batch_size=3, name="x")
    sim = QuantSim(keras.Model(x, ops.stack([x * size, ops.sigmoid(x)], axis=-1)))
    sim.calibrate({"x": X})
    quality = OutputQuality(sim.graph)
    real, simulated = sim.backend.session(sim.native, quality.taps), sim.simulation.session(quality.taps)
    found = quality.run(real, simulated, [{"x": X}]).crushed()
    assert len(found) == crushed
    assert all("sigmoid" in text and "is crushed in output" in text for text in found)
