"""bitwright's kit on the JAX backend, and the whole way to ONNX Runtime's integers."""

from typing import ClassVar

import jax
import numpy as np
import pytest
from bitwright_jax import JaxFunction
from bitwright_jax.backend import JaxBackend
from jax_models import CNN, IMAGES, MODELS, cnn

from bitwright import QuantSim
from bitwright.errors import ModelError
from bitwright.graph import OpKind, SetBias
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.verify import verify

BACKEND = JaxBackend()


class TestJaxBackend(BackendContract):
    suffix = ".jaxq"
    declines: ClassVar = {"recurrent": "JAX has loops, no recurrent ops"}

    def backend(self):
        return BACKEND

    def native_value(self, model, param):
        if model.graph.params[param].layout is None:
            return model.params[param]
        return model.layouts[param].native(model.params[param])

    def cases(self):
        return {
            name: Case(lambda make=make, batch=batch: BACKEND.adopt(make(), batch), batch)
            for name, (make, batch) in MODELS.items()
        }


def test_captured_models_compute_what_theirs_do():
    for name, (make, batch) in MODELS.items():
        model = BACKEND.adopt(make(), batch)
        given = make()
        arguments = [batch[n] for n in model.graph.inputs]
        if isinstance(given, JaxFunction):
            expected = given.function(given.params, *arguments)
        else:
            given.eval()
            expected = given(*arguments)
        for found, right in zip(jax.tree.leaves(model(*arguments)), jax.tree.leaves(expected), strict=True):
            assert np.allclose(found, right, atol=2e-6), name


def test_weights_are_learned_block_by_block():
    make, batch = MODELS["cnn"]
    sim = QuantSim(make(), batch, weights="int4").apply("fold_batch_norm")
    sim.apply("block_reconstruction", batch, iterations=60, layers=2)
    rows = [row for row in sim.reports[-1][1].rows if isinstance(row[1], int)]
    assert rows
    assert all(row[3] < 0.9 * row[2] for row in rows), rows
    for op in sim.graph.linear_ops:
        if (encoding := sim.encodings[op.weight]).frozen:
            np.testing.assert_array_equal(encoding.fake_quantize(sim.params[op.weight]), sim.params[op.weight])


def test_what_is_spelled_out_is_one_op():
    kinds = {name: {op.kind for op in BACKEND.adopt(make(), batch).graph} for name, (make, batch) in MODELS.items()}
    assert OpKind.OPAQUE not in kinds["cnn"] | kinds["decoder"] | kinds["block"]
    assert {OpKind.BATCH_NORM, OpKind.CLIPPED_RELU, OpKind.SOFTMAX} <= kinds["cnn"]
    assert {OpKind.CONV_TRANSPOSE, OpKind.PRELU, OpKind.AVERAGE_POOL} <= kinds["decoder"]
    assert {OpKind.EMBEDDING, OpKind.LAYER_NORM, OpKind.NORM, OpKind.LINEAR, OpKind.MATMUL} <= kinds["block"]


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way(name, tmp_path):
    make, batch = MODELS[name]
    rng = np.random.default_rng(1)
    data = [{n: rng.permutation(v) for n, v in batch.items()} for _ in range(2)]
    sim = QuantSim(make(), batch, target="onnxruntime-cpu")
    sim.apply("fold_batch_norm").calibrate(data)
    bundle = sim.export(tmp_path / "out")
    assert bundle.files["qdq"].exists()
    seen = verify(tmp_path / "out", data)
    assert seen.recorded
    assert not seen.problems


def test_what_it_does_not_take():
    with pytest.raises(ModelError, match=r"takes a JaxFunction or an nnx\.Module, got dict"):
        BACKEND.adopt({})
    with pytest.raises(ModelError, match="give a sample batch"):
        BACKEND.adopt(JaxFunction(cnn, CNN))
    with pytest.raises(ModelError, match="the function takes image, gain; the sample has x"):
        BACKEND.adopt(JaxFunction(cnn, CNN), {"x": IMAGES})
    with pytest.raises(ModelError, match="the function can't be traced"):
        BACKEND.adopt(JaxFunction(lambda p, x: x @ p, np.zeros((5, 5))), {"x": IMAGES})


@pytest.mark.parametrize("learning", [False, True])
def test_training_by_jax_grad(learning):
    make, batch = MODELS["decoder"]
    sim = QuantSim(make(), batch, weights="int4", target="generic-int8").calibrate([batch])
    (expected,) = sim.predict([batch], simulated=False)
    (before,) = sim.predict([batch])
    model = sim.trainable(range_learning=learning)
    steps = float(sim.table[sim.graph.outputs[0]].scale)

    def close(found, right):
        # Averages of values on one grid lie midway between the codes of the next: there the last bit of a float sum,
        # which XLA forms otherwise in another program, decides. Some values are a few steps apart.
        apart = np.abs(np.asarray(found) - right) / steps
        return apart.max() < 4.5 and apart.mean() < 0.2

    assert close(model(batch["image"]), before)

    def loss(params):
        return ((model.apply(params, batch["image"]) - expected) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    start, _ = step(model.params)
    for _ in range(30):
        _, gradients = step(model.params)
        model.params = jax.tree.map(lambda p, g: p - 0.2 * g, model.params, gradients)
    assert float(loss(model.params)) < 0.9 * float(start)
    trained = np.asarray(model(batch["image"]))
    (after,) = sim.take().predict([batch])
    assert close(after, trained)
    assert not np.array_equal(after, before)


def test_files_keep_biases_that_were_added(tmp_path):
    make, batch = MODELS["decoder"]
    model = BACKEND.adopt(make(), batch)
    biased = BACKEND.edit(model, [SetBias("up", np.float32([1, 2, 3, 4]))])
    again = BACKEND.load(BACKEND.save(biased, tmp_path / "model.jaxq"))
    assert np.allclose(again(IMAGES), biased(IMAGES), atol=1e-5)
    assert not np.allclose(model(IMAGES), biased(IMAGES), atol=1e-2)
