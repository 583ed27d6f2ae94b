"""Training simulations with `fit`: grids follow or are learned, and weights and encodings come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import keras_nets as nets  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.backend import (  # noqa: E402
    Tap,
    TrainableSimulation,
    Training,
)
from bitwright.errors import InputError  # noqa: E402
from bitwright.grids import (  # noqa: E402  # noqa: E402
    Grid,
    Groups,
    PerTensor,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
    fake_quantize_vjp,
)
from bitwright.grids._gradients import NumpyNamespace  # noqa: E402
from bitwright.placement import Derived  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_keras.graph.engine import value_of  # noqa: E402
from bitwright_keras.graph.model import variables_of  # noqa: E402
from bitwright_keras.simulate import fake_quant  # noqa: E402
from bitwright_keras.simulate.fake_quant import FakeQuantize  # noqa: E402
from bitwright_keras.simulate.rounding import round_to_grid  # noqa: E402
from bitwright_keras.simulate.weights import QuantizedLayer  # noqa: E402

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 5, 64)
X = (RNG.normal(size=(64, 8, 8, 3)) + np.eye(5)[LABELS][:, :3, None, None].transpose(0, 2, 3, 1)).astype(np.float32)


def simulated(**options: object) -> QuantSim:
    keras.utils.set_random_seed(0)
    return QuantSim(nets.settled(nets.residual()), scheme="minmax", **options).calibrate(X)


def compiled(model: keras.Model, rate: float = 1e-2) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=["accuracy"])
    return model


def outputs(model: keras.Model, x: np.ndarray = X) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(model(x, training=False)))


@pytest.mark.parametrize("range_learning", [False, True])
def test_training_starts_where_the_simulation_is(range_learning: bool) -> None:
    sim = simulated()
    plain = sim.backend.simulate(sim.native, sim.plan, sim.encodings)
    made = sim.backend.simulate_trainable(sim.native, sim.plan, sim.encodings, Training(range_learning))
    assert isinstance(made, TrainableSimulation)
    assert np.array_equal(outputs(made.model), outputs(plain.model))
    assert not plain.model.trainable_weights
    for site, encoding in made.get().items():
        assert encoding.equals(plain.get()[site]), site


def test_training_goes_on_in_another_process(tmp_path: Path) -> None:
    """From the simulation as it was before and the model's weights, optimizer included; nothing is calibrated."""
    keras.utils.set_random_seed(0)
    images = keras.Input(X.shape[1:])  # without dropout, whose random numbers no file of weights holds
    hidden = keras.layers.ReLU()(keras.layers.Conv2D(4, 3)(images))
    net = keras.Model(images, keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(hidden)))
    sim = QuantSim(net, weights="int4", activations="uint4").calibrate(X)
    sim.save(tmp_path / "before")
    model = compiled(sim.trainable(range_learning=True))
    options = {"batch_size": 32, "shuffle": False, "verbose": 0}
    model.fit(X, LABELS, **options)
    model.save_weights(tmp_path / "step.weights.h5")
    model.fit(X, LABELS, **options)

    other = QuantSim.load(tmp_path / "before")
    resumed = compiled(other.trainable(range_learning=True))
    resumed.optimizer.build(resumed.trainable_variables)
    assert not np.array_equal(outputs(resumed), outputs(model))
    resumed.load_weights(tmp_path / "step.weights.h5")
    resumed.fit(X, LABELS, **options)
    assert np.array_equal(outputs(resumed), outputs(model))
    other.take()  # it predicts in other batches, whose sums round to other codes at times
    assert all(e.frozen for e in other.encodings.values())


@pytest.mark.parametrize("range_learning", [False, True])
def test_fit_lowers_the_loss_and_take_takes_it(range_learning: bool) -> None:
    sim = simulated(weights="int4", activations="uint4")
    before, old = sim.encodings, sim.params["stem/kernel"]
    model = compiled(sim.trainable(range_learning=range_learning, gradient_scale=range_learning))
    sim.predict(X[:8])  # not stepped yet: no obstacle
    losses = model.fit(X, LABELS, epochs=6, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.97 * losses[0]
    trained = outputs(model)
    with pytest.raises(InputError, match=r"trained and not taken.*take\(\)"):
        sim.predict(X[:8])
    sim.take()
    assert all(e.frozen for s, e in sim.encodings.items())
    assert not np.array_equal(sim.params["stem/kernel"], old)
    moved = [s for s in sim.plan.activations if not sim.encodings[s].equals(before[s])]
    assert bool(moved) == range_learning
    if not range_learning:  # grids have followed the weights, to the bit where float64 is to be had
        for site in sim.plan.parameters:
            expected = encoding_of_weights(sim.params[site], sim.plan.spec(site))
            if keras.backend.backend() == "jax":
                np.testing.assert_allclose(sim.encodings[site].scale, expected.scale, rtol=1e-6)
            else:
                assert sim.encodings[site].equals(expected), site
    again = sim.backend.simulate(sim.native, sim.plan, sim.encodings)
    assert np.array_equal(outputs(again.model), trained)


def test_a_grid_chosen_otherwise_keeps_its_ratio_and_a_frozen_one_stays() -> None:
    sim = simulated()
    site, other = "stem/kernel", "fc/kernel"
    chosen = sim.encodings[site].with_(scale=sim.encodings[site].scale * np.float32(0.75))
    sim.set({site: chosen})
    sim.set({other: sim.encodings[other]}, freeze=True)
    made = sim.backend.simulate_trainable(sim.native, sim.plan, sim.encodings, Training())
    for layer in made.model.layers:
        if isinstance(layer, QuantizedLayer):
            kernel = variables_of(layer.layer)["kernel"]
            kernel.assign(2 * kernel.value)
    found = made.get()
    np.testing.assert_allclose(found[site].scale, 2 * chosen.scale, rtol=1e-6)
    assert found[other].equals(sim.encodings[other])
    new = sim.backend.read(made.float_model(), [other])[other]
    assert np.array_equal(new, 2 * sim.params[other])


@pytest.mark.parametrize("range_learning", [False, True])
def test_derived_grids_of_biases_stay(range_learning: bool) -> None:
    """They follow from others: neither the bias's values nor an optimizer moves them."""
    sim = simulated()
    made = sim.backend.simulate_trainable(sim.native, sim.plan, sim.table, Training(range_learning))
    compiled(made.model).fit(X[:32], LABELS[:32], epochs=1, batch_size=16, verbose=0)
    derived = [s for s in sim.plan.quantized if isinstance(sim.plan[s].decision, Derived)]
    found, trained = made.get(), sim.backend.read(made.float_model(), derived)
    assert derived
    for site in derived:
        assert not np.array_equal(trained[site], sim.params[site])
        assert found[site].equals(sim.table[site]), site


def test_batch_norms_and_dropout_train() -> None:
    sim = simulated()
    made = sim.backend.simulate_trainable(sim.native, sim.plan, sim.encodings, Training())
    norm = sim.native.by_op["bn1"].layer
    before = ops.convert_to_numpy(norm.moving_mean.value).copy()
    a, b = (ops.convert_to_numpy(made.model(X, training=True)) for _ in range(2))
    assert not np.array_equal(a, b)  # dropout
    after = made.float_model().by_op["bn1"].layer.moving_mean
    after = ops.convert_to_numpy(after.value)
    assert not np.array_equal(after, before)
    assert np.array_equal(ops.convert_to_numpy(norm.moving_mean.value).copy(), before), (
        "training changed the float model"
    )


def test_saved_models_load_and_train_on(tmp_path) -> None:
    sim = simulated(weights="int4")
    model = compiled(sim.trainable(range_learning=True))
    model.fit(X[:16], LABELS[:16], epochs=1, verbose=0)
    model.save(tmp_path / "qat.keras")
    again = keras.saving.load_model(tmp_path / "qat.keras")
    assert np.array_equal(outputs(again), outputs(model))
    assert len(again.trainable_weights) == len(model.trainable_weights)
    scale = next(w for w in again.trainable_weights if "log_scale" in w.path)
    before = ops.convert_to_numpy(scale.value).copy()
    again.fit(X[:16], LABELS[:16], epochs=1, verbose=0)
    assert not np.array_equal(ops.convert_to_numpy(scale.value).copy(), before)


def gradients_of(function, arrays):
    """Of the sum of function(arrays) · cotangent, by the Keras backend that is active."""
    variables = [keras.Variable(a) for a in arrays]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = function(*(value_of(v) for v in variables))
        return [np.asarray(g) for g in tape.gradient(loss, [v.value for v in variables])]
    if keras.backend.backend() == "jax":
        import jax

        whole = jax.grad(function, argnums=tuple(range(len(arrays))))
        return [np.asarray(g) for g in whole(*arrays)]
    import torch

    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]
    function(*leaves).backward()
    return [leaf.grad.numpy() for leaf in leaves]


def test_gradients_are_the_core_s() -> None:
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(50,)).astype(np.float32), rng.normal(size=(50,)).astype(np.float32)
    scale, zero, grid = np.float32(0.1), np.float32(5), Grid.of(4, signed=False)
    x[:4] = (np.array([-5.5, -5, 10, 10.5]) * scale).astype(np.float32)
    weights = ops.convert_to_tensor(g)
    found = gradients_of(
        lambda x, s, z: ops.sum(round_to_grid(x, s, grid.qmin - z, grid.qmax - z, learned=True) * weights),
        (x, scale, zero),
    )
    expected = fake_quantize_vjp(NumpyNamespace(), g, x, scale, zero, grid, Groups.of(x.shape, PerTensor()))
    np.testing.assert_array_equal(found[0], expected.x)
    np.testing.assert_allclose(found[1], expected.scale, rtol=1e-5)
    np.testing.assert_allclose(found[2], expected.zero_point, rtol=1e-5)


def test_setting_numbers_compiles_nothing_and_setting_another_kind_does() -> None:
    sim = simulated()
    made = sim.simulation
    session, site = made.session([Tap("fc")]), "relu6"
    before = made.generation
    (first,) = session.run({"x": X}).values()
    coarse = sim.encodings[site].with_(bits=4, scale=sim.encodings[site].scale * 17)
    made.set({site: coarse, "x": None})
    (second,) = session.run({"x": X}).values()
    assert made.generation == before
    assert not np.array_equal(first, second)
    halves = coarse.with_(float_format="float16", bits=16, symmetric=True, signed=True, scale=np.ones(()), zero_point=0)
    made.set({site: halves})
    (third,) = session.run({"x": X}).values()
    assert made.generation == before + 1
    assert made.get()[site].equals(halves)
    assert not np.array_equal(second, third)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA")
def test_xla_keeps_midpoints() -> None:
    import tensorflow as tf

    encoding = simulated().encodings["relu6"]
    codes = np.linspace(encoding.grid.qmin - 2, encoding.grid.qmax + 2, 2 * (encoding.grid.steps + 4) + 1)
    x = ((codes - int(encoding.zero_point)) * np.float64(encoding.scale)).astype(np.float32)
    layer = FakeQuantize(encoding)
    for jit in (False, True):
        assert np.array_equal(tf.function(layer, jit_compile=jit)(tf.constant(x)), encoding.fake_quantize(x))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA")
def test_large_weights_are_compiled_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(fake_quant, "COMPILED_PARAMETER", 12)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="large"), keras.layers.Dense(2)])
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    trained = QuantSim(model, weights="int8", activations="uint8", scheme="minmax").calibrate([x]).trainable()

    def step(training: bool) -> tuple[str, list[np.ndarray]]:
        @tf.function
        def gradients() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                y = tf.reduce_sum(trained(tf.constant(x), training=training) ** 2)
            return tape.gradient(y, [v.value for v in trained.trainable_variables])

        function = gradients.get_concrete_function()
        return str(function.graph.as_graph_def()), [g.numpy() for g in function()]

    (plain, before), (compiled, after) = step(False), step(True)
    assert "_XlaCompile" not in plain
    assert "_XlaCompile" in compiled
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA")
@pytest.mark.parametrize("learns", [False, True])
def test_large_activations_are_compiled_in_training_alone(learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(fake_quant, "COMPILED_FROM", 64)
    encoding = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 2.0)
    codes = np.arange(-300, 300) / 2
    points = (codes * np.float64(encoding.scale)).astype(np.float32)
    x = np.stack([points, np.nextafter(points, np.float32(9)), np.nextafter(points, np.float32(-9))])
    g = RNG.normal(size=x.shape).astype(np.float32)
    layer = FakeQuantize(encoding, learns=learns)

    def step(training: bool) -> tf.types.experimental.ConcreteFunction:
        @tf.function
        def gradients(x: tf.Tensor, g: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
            return y, tape.gradient(y, [x, *(v.value for v in layer.trainable_variables)], g)

        return gradients.get_concrete_function(tf.constant(x), tf.constant(g))

    results = []
    for training in (False, True):
        function = step(training)
        text = str(function.graph.as_graph_def())
        assert ("_XlaCompile" in text) == training
        for _ in range(3):
            y, (dx, *others) = function(tf.constant(x), tf.constant(g))
        assert np.array_equal(y, encoding.fake_quantize(x))
        results.append((dx.numpy(), [v.numpy() for v in others]))
    assert np.array_equal(results[0][0], results[1][0])
    assert len(results[0][1]) == (2 if learns else 0)
    for plain, compiled_ in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(compiled_, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["float16", "bfloat16", "fp8", "float8e5m2"])
def test_float_formats_are_the_core_s(form: str) -> None:
    sim = simulated(weights="int8", activations=form)
    encoding = sim.encodings["relu6"]
    layer = FakeQuantize(encoding)
    x = np.concatenate([np.linspace(-9, 9, 4001), [1e-9, 7e4, -7e4, 3e38]]).astype(np.float32)
    assert np.array_equal(ops.convert_to_numpy(layer(x)), encoding.fake_quantize(x))


def test_blocks_and_lpbq_train() -> None:
    sim = simulated(weights="int4:lpbq4")
    made = sim.backend.simulate_trainable(sim.native, sim.plan, sim.encodings, Training(True))
    plain = sim.backend.simulate(sim.native, sim.plan, sim.encodings)
    assert np.array_equal(outputs(made.model), outputs(plain.model))
    compiled(made.model).fit(X[:16], LABELS[:16], verbose=0)
    assert made.get()["pointwise/kernel"].block_scale is not None
