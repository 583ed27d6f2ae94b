"""A convolution of two activations is quantized as a matrix product is, in Keras and in TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

X = np.random.default_rng(0).standard_normal((3, 3, 4, 5)).astype(np.float32)


def net():
    """Correlates a 3×3 image with a kernel that is an input too; their first axes have one length."""
    a, c = L.Input((3, 4, 5), batch_size=3, name="a"), L.Input((3, 4, 5), batch_size=3, name="c")
    y = ops.conv(ops.tanh(ops.transpose(a, (0, 1, 3, 2))), ops.tanh(c), padding="same")
    return keras.Model([a, c], y)


@pytest.mark.parametrize("framework", ["keras", "tensorflow"])
def test_a_convolution_of_two_activations_is_quantized(framework):
    model = net()
    if framework == "tensorflow":
        spec = [tf.TensorSpec([3, 3, 4, 5], name=n) for n in ("a", "c")]
        model = tf.function(lambda a, c: net()([a, c]), input_signature=spec).get_concrete_function()
    sim = QuantSim(model)
    data = dict.fromkeys(sim.graph.inputs, X)
    sim.calibrate(data)
    op = next(op for op in sim.graph if op.type == "Conv")
    assert op.kind is OpKind.MATMUL
    assert {*op.data_inputs, op.output} <= set(sim.plan.quantized)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 25
