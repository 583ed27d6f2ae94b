"""Products of two activations that are turned before: exact integers know which axes a `Dot` contracts."""

import warnings

import numpy as np
import pytest

from bitwright import QuantSim
from bitwright.graph import OpKind, ProductAttrs
from bitwright.verify import verify

keras = pytest.importorskip("keras")

CASES = {
    "plain": (lambda a, b: keras.layers.Dot(axes=(2, 1))([a, b]), None),
    "second turned": (lambda a, b: keras.layers.Dot(axes=(2, 2))([a, b]), ProductAttrs((False, True))),
    "first turned": (lambda a, b: keras.layers.Dot(axes=1)([a, b]), ProductAttrs((True, False))),
    "both turned": (lambda a, b: keras.layers.Dot(axes=(1, -1))([a, b]), ProductAttrs((True, True))),
    "other axes": (keras.ops.dot, ProductAttrs(None)),
    "normalized": (lambda a, b: keras.layers.Dot(axes=(2, 1), normalize=True)([a, b]), ProductAttrs(None)),
}


@pytest.mark.parametrize("name", CASES)
def test_operands_of_dot(name, tmp_path):
    # The sizes are equal, so that a product of the wrong axes would go through.
    build, wanted = CASES[name]
    size = 6
    a, b = keras.Input((size, size), name="a"), keras.Input((size, size), name="b")
    net = keras.Model([a, b], build(a, b))
    rng = np.random.default_rng(0)
    data = {k: rng.normal(size=(8, size, size)).astype(np.float32) for k in ("a", "b")}
    sim = QuantSim(net, target="onnxruntime-cpu").calibrate(data)
    products = [op for op in sim.graph if op.kind is OpKind.MATMUL]
    if wanted != ProductAttrs(None) or products:
        assert [op.attrs for op in products] == [wanted]
    assert np.allclose(sim.predict(data, simulated=False)[0], net.predict(list(data.values()), verbose=0), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no .h5 for calls of keras.ops
        sim.export(tmp_path, name="m")
    assert verify(tmp_path, data).problems == []
