"""What `import bitwright_keras` does and doesn't import; saved simulations load in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import bitwright_keras  # noqa: E402
from bitwright.errors import InputError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_keras.simulate.fake_quant import FakeQuantize  # noqa: E402

X = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(16) % 5


def net() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3), name="x")
    x = keras.layers.ReLU(name="relu")(keras.layers.Conv2D(6, 3, name="conv")(x))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(5, name="fc")(x))


def learning(factor: float | None = None) -> keras.Model:
    keras.utils.set_random_seed(0)
    sim = QuantSim(net(), scheme="minmax", weights="int4", activations="uint4").calibrate(X)
    model = sim.trainable(range_learning=True)
    if factor is not None:
        assert bitwright_keras.set_grid_rate(model, factor) >= 5
    model.sim = sim  # the test's handle on it
    return model


def step(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """One training step."""
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    model.fit(X, LABELS, batch_size=16, shuffle=False, verbose=0)


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_discovery_imports_no_keras() -> None:
    code = "import sys, bitwright_keras.plugin as p; assert p.register_backends(); print('keras' in sys.modules)"
    assert run(code).split() == ["False"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained simulation, a batch and its outputs."""
    folder = tmp_path_factory.mktemp("saved")
    model = learning(5.0)
    step(model, keras.optimizers.SGD(0.1))
    np.savez(folder / "data.npz", x=X, y=keras.ops.convert_to_numpy(model(X, training=False)))
    model.save(folder / "qat.keras")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import keras, bitwright_keras; loads = [keras.saving.load_model]",
        "import bitwright_keras; loads = [bitwright_keras.load_model]; "
        "from bitwright_keras import QuantizedLayer; import keras; loads.append(keras.models.load_model)",
    ],
)
def test_a_saved_simulation_loads_elsewhere(imports: str, saved: Path) -> None:
    code = (
        f"{imports}; import sys, numpy as np; d = np.load(sys.argv[1] + '/data.npz')\n"
        "for load in loads:\n"
        "    m = load(sys.argv[1] + '/qat.keras')\n"
        "    np.testing.assert_allclose(np.asarray(m(d['x'], training=False)), d['y'], rtol=1e-4, atol=1e-5)\n"
        "    print({q.grid_rate for q in m._flatten_layers() if getattr(q, 'log_scale', None) is not None})"
    )
    assert set(run(code, str(saved)).split()) == {"{5.0}"}


def test_all_that_is_exported_is_there() -> None:
    for name in bitwright_keras.__all__:
        # Not the folder of that name, though every module of the backend is loaded.
        assert callable(getattr(bitwright_keras, name)) and getattr(bitwright_keras, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bitwright_keras.nothing  # noqa: B018


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_grids_learn_at_so_many_times_the_rate(optimizer: str) -> None:
    one, five = learning(), learning(5.0)
    start = scale_of(one)
    for model in (one, five):
        step(model, getattr(keras.optimizers, optimizer)(1e-3))
    for a, b in zip(one.trainable_weights, five.trainable_weights, strict=True):
        if "log_scale" in a.path or "zero_shift" in a.path:  # the variable moves as before, and counts five times
            np.testing.assert_allclose(*(keras.ops.convert_to_numpy(v.value) for v in (a, b)), rtol=1e-3, atol=1e-8)
    moved = [np.log(scale_of(m) / start) for m in (one, five)]
    assert abs(moved[0]) > 1e-6
    np.testing.assert_allclose(moved[1], 5 * moved[0], rtol=2e-2)


def scale_of(model: keras.Model, site: str = "relu") -> np.ndarray:
    layer = next(q for q in model.layers if isinstance(q, FakeQuantize) and q.name == f"{site}_fake_quant")
    return np.float64(keras.ops.convert_to_numpy(layer.numbers()[0]))


def test_another_rate_leaves_the_grids_where_they_are() -> None:
    model = learning()
    step(model, keras.optimizers.Adam(1e-2))
    before = model.predict(X, verbose=0)
    bitwright_keras.set_grid_rate(model, 8.0)  # a power of two: to the bit
    assert np.array_equal(model.predict(X, verbose=0), before)
    with pytest.raises(InputError, match="above 0"):
        bitwright_keras.set_grid_rate(model, 0.0)
    following = model.sim.trainable()
    assert bitwright_keras.set_grid_rate(following) == 0
