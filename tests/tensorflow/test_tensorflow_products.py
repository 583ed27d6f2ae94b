"""Products of two activations in TensorFlow graphs, their operands turned or not: exact integers know which."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright.graph import OpKind, ProductAttrs  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

v1 = tf.compat.v1


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_turned_operands(first, second, tmp_path):
    # The sizes are equal, so that a product of the wrong axes would go through.
    size = 6
    graph = tf.Graph()
    with graph.as_default():
        a, b = (v1.placeholder(tf.float32, [None, size, size], name) for name in "ab")
        shift = v1.get_variable("shift", initializer=np.float32(0.5))  # checkpoints need a variable
        tf.matmul(a + shift, b, transpose_a=first, transpose_b=second, name="y")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    sim = QuantSim(SessionModel(session, ["y:0"], ["a:0", "b:0"]), target="onnxruntime-cpu")
    rng = np.random.default_rng(0)
    data = {t: rng.normal(size=(8, size, size)).astype(np.float32) for t in sim.graph.inputs}
    sim.calibrate(data)
    (product,) = (op for op in sim.graph if op.kind is OpKind.MATMUL)
    assert product.attrs == (ProductAttrs((first, second)) if first or second else None)
    a, b = data.values()
    x, y = (np.swapaxes(v, 1, 2) if turn else v for v, turn in ((a + 0.5, first), (b, second)))
    assert np.allclose(sim.predict(data, simulated=False)[0], x @ y, atol=1e-5)
    sim.export(tmp_path, name="m")
    result = verify(tmp_path, data)
    assert result.problems == []
    assert result.exact["integer_ops"] == 2
