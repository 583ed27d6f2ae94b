"""Linear ops that mix tokens, as an MLP-Mixer's: their features lie last, the network's channels on another axis."""

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright import QuantSim
from bitwright.backend import Tap
from bitwright.bank import collect
from bitwright.graph import branch_names

TOKENS = {"square": 12, "wide": 20}
CHANNELS, CLASSES = 12, 6


def weights(tokens):
    """Of the layer that mixes tokens and of the head, (in, out)."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, n**-0.5, (n, m)).astype(np.float32) for n, m in ((tokens, tokens), (CHANNELS, CLASSES))]


def onnx_mixer(tokens):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Transpose", ["x"], ["there"], "there", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["there", "mix.weight"], ["mixed"], "mix"),
        helper.make_node("Transpose", ["mixed"], ["back"], "back", perm=[0, 2, 1]),
        helper.make_node("Add", ["x", "back"], ["sum"], "sum"),
        helper.make_node("Relu", ["sum"], ["act"], "act"),
        helper.make_node("MatMul", ["act", "head.weight"], ["y"], "head"),
    ]
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", tokens, width])]
        for n, width in (("x", CHANNELS), ("y", CLASSES))
    ]
    held = [numpy_helper.from_array(w, n) for n, w in zip(("mix.weight", "head.weight"), weights(tokens), strict=True)]
    graph = helper.make_graph(nodes, "mixer", *ends, held)
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )


def torch_mixer(tokens):
    import torch
    from torch import nn

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(tokens, tokens, bias=False)
            self.head = nn.Linear(CHANNELS, CLASSES, bias=False)
            with torch.no_grad():
                for layer, weight in zip((self.mix, self.head), weights(tokens), strict=True):
                    layer.weight.copy_(torch.from_numpy(weight.T))

        def forward(self, x):
            return self.head(torch.relu(x + self.mix(x.transpose(1, 2)).transpose(1, 2)))

    return Mixer().eval()


def keras_mixer(tokens):
    import keras
    from keras import layers

    x = keras.Input((tokens, CHANNELS), name="x")
    mix, head = (layers.Dense(n, use_bias=False, name=m) for n, m in ((tokens, "mix"), (CLASSES, "head")))
    y = layers.Permute((2, 1))(mix(layers.Permute((2, 1))(x)))
    model = keras.Model(x, head(layers.ReLU()(layers.Add()([x, y]))))
    for layer, weight in zip((mix, head), weights(tokens), strict=True):
        layer.set_weights([weight])
    return model


def tensorflow_mixer(tokens):
    import tensorflow as tf

    from bitwright_tensorflow import SessionModel

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, tokens, CHANNELS), name="x")
        mix, head = (v1.get_variable(n, initializer=w) for n, w in zip(("a", "b"), weights(tokens), strict=True))
        y = tf.transpose(tf.matmul(tf.transpose(x, (0, 2, 1)), mix, name="mix"), (0, 2, 1))
        y = tf.matmul(tf.nn.relu(x + y), head, name="head")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return SessionModel(session, inputs=[x], outputs=[y])


MIXERS = {"onnx": onnx_mixer, "torch": torch_mixer, "keras": keras_mixer, "tensorflow": tensorflow_mixer}
NAMES = [n for n in MIXERS if n in FRAMEWORKS]


def opened(name, tokens, **options):
    """A simulation, and two batches in which tokens vary together far more than channels do."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(tokens, tokens)) @ np.diag(np.linspace(0.1, 3, tokens))
    batches = [(mixing @ rng.normal(size=(24, tokens, CHANNELS))).astype(np.float32) for _ in range(2)]
    sim = QuantSim(MIXERS[name](tokens), batches[0], backend=name, **options)
    return sim, batches, next(o for o in sim.graph.linear_ops if "mix" in o.id)


def values(session, batches):
    return np.concatenate([np.asarray(next(iter(session.run(b).values()))) for b in batches]).astype(np.float64)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_that_is_reported_is_the_error_that_is_left(name, tokens):
    """With as many tokens as channels, moments over the wrong axis would fit the weight too."""
    sim, batches, _ = opened(name, tokens, weights="int3", activations="float")
    fed = [{sim.graph.inputs[0]: b} for b in batches]
    done = sim.fork().apply("gptq", batches, inputs="float")
    assert len(sim.graph.linear_ops) == 2
    for op in sim.graph.linear_ops:
        x = values(sim.backend.session(sim.native, [Tap(op.data_inputs[0])]), fed)
        x = x.reshape(-1, x.shape[-1])
        before, after = (np.asarray(s.params[op.weight], np.float64) for s in (sim, done))
        left = np.square(x @ (after - before).T).sum() / np.square(x @ before.T).sum()
        (row,) = (row for row in done.reports[-1][1].rows if row[0] == op.id)
        assert row[3] == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("technique", ["adaround", "seq_mse", "bias_correction", "smooth_quant"])
@pytest.mark.parametrize("name", NAMES)
def test_what_reads_the_inputs_of_layers_runs(name, technique):
    sim, batches, _ = opened(name, TOKENS["wide"], weights="int4")
    sim.apply(technique, batches).calibrate(batches)
    fed, tap = [{sim.graph.inputs[0]: b} for b in batches], Tap(sim.graph.outputs[0])
    found, exact = (values(s, fed) for s in (sim.simulation.session([tap]), sim.backend.session(sim.native, [tap])))
    assert np.abs(found - exact).max() < 0.5 * np.abs(exact).max()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("name", NAMES)
def test_they_have_branches_and_banks(name, tokens, tmp_path):
    sim, batches, mix = opened(name, tokens, weights="int3", activations="float")
    samples = np.concatenate(batches)
    bank = collect(sim, samples, tmp_path / "bank")
    found, names = [sim.fork().apply("low_rank", d, rank=4) for d in (samples, bank)], branch_names(mix.id)
    for done in found:
        assert {names.down, names.up, names.total} <= {o.id for o in done.graph}
        (row,) = (row for row in done.reports[-1][1].rows if row[0] == mix.id)
        assert row[2] < 0.8 * row[1]
    a, b = (np.asarray(d.params[d.graph.op(names.up).weight]) for d in found)
    np.testing.assert_array_equal(a, b)
