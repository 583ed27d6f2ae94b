"""Graphs that differ where graph and parameters show nothing are told apart; those opened alike are not."""

import numpy as np
import pytest
import tensorflow as tf

from bitwright import QuantSim
from bitwright.runs import RunDirectory

X = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)


def opened(behind, **options):
    weight = tf.Variable(W, name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, name="x")])
    def net(x):
        return behind(tf.matmul(x, weight))

    return QuantSim(net, **options)


def fingerprint(behind):
    sim = opened(behind)
    return sim.backend.fingerprint(sim.native)


PAIRS = {
    "axis": (lambda x: tf.cumsum(x, axis=1), lambda x: tf.cumsum(x, axis=0)),
    "attribute": (lambda x: tf.cumsum(x, axis=1), lambda x: tf.cumsum(x, axis=1, reverse=True)),
    "bounds": (lambda x: x[:, 1:4], lambda x: x[:, 2:5]),
    "integers": (lambda x: tf.gather(x, [0, 1], axis=1), lambda x: tf.gather(x, [0, 2], axis=1)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_graphs_are_told_apart(pair):
    one, other = map(fingerprint, pair)
    assert one != other
    assert fingerprint(pair[0]) == one


def test_results_of_another_graph_are_not_taken(tmp_path):
    """The same parameters, data and settings in one run directory."""
    for behind in PAIRS["axis"]:
        with RunDirectory(tmp_path / "run") as run:
            kept = opened(behind, run=run).calibrate(X)
        anew = opened(behind).calibrate(X)
        assert {s: e.scale.tolist() for s, e in kept.encodings.items()} == {
            s: e.scale.tolist() for s, e in anew.encodings.items()
        }
