"""Files: plain Keras loads them without bitwright, and the user's names come back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import keras_nets as nets  # noqa: E402

from bitwright.errors import InputError  # noqa: E402
from bitwright.quantsim import QuantSim  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402

BACKEND = KerasBackend()
X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
PLAIN = """
import sys, numpy as np, keras
for path in sys.argv[2:]:
    y = keras.saving.load_model(path, compile=False)(np.load(sys.argv[1])["x"], training=False)
    print(float(np.abs(np.asarray(keras.ops.convert_to_numpy(y)) - np.load(sys.argv[1])["y"]).max()))
assert not any(m.startswith("bitwright") for m in sys.modules)
"""


def test_plain_keras_loads_what_is_saved(tmp_path) -> None:
    sim = QuantSim(nets.settled(nets.separable()))
    sim.apply("bias_correction", {"x": X})  # gives the two calls of a shared layer a bias each
    paths = [str(BACKEND.save(sim.native, tmp_path / name)) for name in ("model.keras", "model.h5")]
    (y,) = sim.predict({"x": X}, simulated=False)
    np.savez(tmp_path / "arrays.npz", x=X, y=y)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "arrays.npz"), *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(float(line) < 1e-6 for line in done.stdout.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arrays.npz", "model.h5", "model.keras"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_names_come_back(tmp_path, suffix: str) -> None:
    sim = QuantSim(nets.settled(nets.separable()))
    again = BACKEND.load(BACKEND.save(sim.native, tmp_path / f"model{suffix}"))
    one, two = BACKEND.graph(sim.native), BACKEND.graph(again)
    assert {op.id for op in one} == {op.id for op in two}
    assert one.tensors == two.tensors
    assert one.params == two.params
    folded = QuantSim(nets.settled(nets.residual())).apply("fold_batch_norm")
    again = BACKEND.load(BACKEND.save(folded.native, tmp_path / f"folded{suffix}"))
    assert BACKEND.graph(again).op("stem").output == "bn1"


def test_a_run_is_saved_and_loaded(tmp_path) -> None:
    sim = QuantSim(nets.settled(nets.separable()), scheme="minmax").calibrate({"x": X})
    sim.save(tmp_path / "run")
    again = QuantSim.load(tmp_path / "run")
    assert np.array_equal(again.predict({"x": X})[0], sim.predict({"x": X})[0])


def operations():
    """Preprocessing layers, and `keras.ops` calls of the user's own that layers can compute."""
    ops = keras.ops
    image = keras.Input((6, 6, 3), name="image", dtype="uint8")
    x = keras.layers.Rescaling([0.5, 0.25, 2.0], offset=-1.0, name="scaled")(image)
    x = keras.layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 4.0, 9.0], name="normalized")(x)
    x = keras.layers.Conv2D(4, 3, padding="same", name="conv")(x)
    x = ops.silu(x) + 1.0 - ops.sigmoid(2.0 - x)
    x = ops.maximum(x, ops.gelu(x, approximate=False)) * 0.5
    x = ops.concatenate([x, x / 3.0], axis=-1)
    x = ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (-1, 8, 36))
    x = keras.layers.Dense(3, name="head")(ops.expand_dims(ops.softmax(x, axis=-1), 2))
    return keras.Model(image, x, name="operations")


def test_h5_has_layers_for_operations(tmp_path) -> None:
    sim = QuantSim(operations())
    image = np.random.default_rng(1).integers(0, 255, (4, 6, 6, 3), dtype=np.uint8)
    path = BACKEND.save(sim.native, tmp_path / "model.h5")
    (y,) = sim.predict({"image": image}, simulated=False)
    np.savez(tmp_path / "arrays.npz", x=image, y=y)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "arrays.npz"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1e-6 * np.abs(y).max()
    one, two = BACKEND.graph(sim.native), BACKEND.graph(BACKEND.load(path))
    assert {"scaled", "normalized", "normalized/mean", "conv", "head"} <= {op.id for op in one}
    # 2 − x is a rescaling in the file, which is a product and a sum.
    before, after = ({op.id for op in graph} for graph in (one, two))
    (added,) = after - before
    assert before < after and added.endswith("/scale") and added.removesuffix("/scale") in before
    assert {"scaled/scale/constant", "normalized/mean/constant"} <= set(one.params) & set(two.params)


def test_layers_that_change_nothing_keep_their_names_in_h5(tmp_path) -> None:
    """As the normalization of an EfficientNet without weights: a mean of 0 and a variance of 1."""
    x = keras.Input((6,), name="x")
    y = keras.layers.Normalization(mean=0.0, variance=1.0, name="normalized")(x)
    y = keras.layers.Dense(3, name="head")(keras.layers.Rescaling(1.0, name="same")(y))
    sim = QuantSim(keras.Model(x, y))
    one, two = BACKEND.graph(sim.native), BACKEND.graph(BACKEND.load(BACKEND.save(sim.native, tmp_path / "model.h5")))
    assert [op.id for op in one] == [op.id for op in two] == ["normalized/mean", "normalized", "same", "head"]


def test_h5_holds_no_calls_of_keras_ops(tmp_path) -> None:
    """Keras writes such a file, and can't load it."""
    x = keras.Input((6,), name="x")
    y = keras.layers.Dense(3, name="head")(keras.ops.sin(x))
    sim = QuantSim(keras.Model(x, y), scheme="minmax", weights="int8", activations="uint8")
    sim.calibrate({"x": X[:, 0, :, 0]})
    with pytest.raises(InputError, match=r"'sin.*' is a call of keras.ops \(Sin\).*save as \.keras"):
        BACKEND.save(sim.native, tmp_path / "model.h5")
    with pytest.warns(UserWarning, match=r"no \.h5.*'sin.*'"):
        sim.export(tmp_path, name="net")
    assert "net.keras" in {p.name for p in tmp_path.iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".h5"]
