"""Models that differ where graph and parameters show nothing are told apart; those opened alike are not."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from bitwright import QuantSim
from bitwright.errors import InputError
from bitwright.runs import RunDirectory

X = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


class Gated(layers.Layer):
    """Opaque: what it computes depends on values."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1],), initializer="ones", name="gate")

    def call(self, x):
        return ops.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, h * self.gate), (0, x))[1]


def opened(behind, **options):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    x = keras.Input((6,), name="x")
    model = keras.Model(x, behind(layers.Dense(6, name="dense")(x)))
    return QuantSim(model, **options), model


def fingerprint(behind):
    sim, _ = opened(behind)
    return sim.backend.fingerprint(sim.native)


PAIRS = {
    "axis": (lambda x: ops.cumsum(x, axis=1), lambda x: ops.cumsum(x, axis=0)),
    "bounds": (lambda x: x[:, 1:4], lambda x: x[:, 2:5]),
    "rate": (layers.LeakyReLU(0.1, name="leaky"), layers.LeakyReLU(0.3, name="leaky")),
    "code": (layers.Lambda(lambda x: ops.flip(x, 0), name="own"), layers.Lambda(lambda x: ops.flip(x, 1), name="own")),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_models_are_told_apart(pair):
    one, other = map(fingerprint, pair)
    assert one != other
    assert fingerprint(pair[0]) == one


def test_results_of_another_model_are_not_taken(tmp_path):
    """The same parameters, data and settings in one run directory."""
    for behind in PAIRS["axis"]:
        with RunDirectory(tmp_path / "run") as run:
            kept = opened(behind, run=run)[0].calibrate(X)
        anew = opened(behind)[0].calibrate(X)
        assert {s: e.scale.tolist() for s, e in kept.encodings.items()} == {
            s: e.scale.tolist() for s, e in anew.encodings.items()
        }


def test_weights_of_opaque_layers_that_were_trained_alone_are_noticed():
    sim, _ = opened(Gated(name="gated"))
    sim.calibrate(X)
    model = sim.trainable()
    sim.predict(X)
    (gate,) = [v for v in model.trainable_variables if "gate" in v.path]
    gate.assign(gate * 3)
    with pytest.raises(InputError, match="would use the weights from before training"):
        sim.predict(X)
    assert np.abs(sim.take().predict(X)[0]).max() > 0
