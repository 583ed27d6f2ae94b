"""Files: plain Keras loads them without bitwright, and the user's names come back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import keras_nets as nets  # noqa: E402

from bitwright.errors import BitwrightError, InputError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.capture.files import save_native  # noqa: E402

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
    with pytest.raises(InputError, match=r"'sin.*' \(Sin\) is a call of keras\.ops.*save as \.keras"):
        BACKEND.save(sim.native, tmp_path / "model.h5")
    with pytest.warns(UserWarning, match=r"no \.h5.*'sin.*'"):
        sim.export(tmp_path, name="net")
    assert "net.keras" in {p.name for p in tmp_path.iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".h5"]


def _file_of_lambda(path, mark):
    """A file whose Lambda layer writes a mark when it is called, as Keras saves it."""
    code = f"open({str(mark)!r}, 'w').close()"
    x = keras.Input((3,), name="x")
    y = keras.layers.Lambda(eval(f"lambda t: (exec({code!r}), t)[1]"), output_shape=(3,))(x)
    keras.Model(x, y).save(path)
    mark.unlink(missing_ok=True)


def _file_of_a_function(path, mark):
    """A file that names a function of Python's own library in place of a layer's."""
    import zipfile

    x = keras.Input((3,), name="x")
    keras.Model(x, keras.layers.Activation("relu", name="act")(x)).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    config = json.loads(members["config.json"])
    layer = next(v for v in config["config"]["layers"] if v["name"] == "act")
    layer.update(module="os", class_name="system", config=f"touch {mark}", registered_name=None)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "config.json": json.dumps(config).encode()}.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("make", "suffix"), [(_file_of_lambda, ".keras"), (_file_of_lambda, ".h5"),
                                              (_file_of_a_function, ".keras")])  # fmt: skip
def test_opening_a_file_runs_nothing_of_it(make, suffix, tmp_path) -> None:
    path, mark = tmp_path / f"net{suffix}", tmp_path / "mark"
    make(path, mark)
    with pytest.raises(InputError, match="can't be opened"):
        BACKEND.load(path)
    assert not mark.exists()
    if make is _file_of_lambda and suffix == ".keras":
        BACKEND.load(path, safe_mode=False)
        assert mark.exists()


@pytest.mark.parametrize(
    "names",
    ["[1]", '"x"', "3", "{", '{"conv": 5}', '{"stem": {"op": "stem"}}',
     '{"stem": {"op": 1, "outputs": [], "params": {}}}', '{"stem": {"op": "a", "outputs": [], "params": {}}}',
     '{"stem": {"op": "a", "outputs": ["a"], "params": {"kernel": 1}}}',
     '{"stem": {"op": "a", "outputs": ["a"], "params": {}, "place": "first"}}',
     '{"fc": {"op": "fc", "outputs": ["fc"], "params": {"kernel": "fc/kernel", "bias": "fc/bias"}, "place": 0}}'],
)  # fmt: skip
def test_kept_names_of_a_wrong_shape_are_refused(names, tmp_path) -> None:
    import zipfile

    path = tmp_path / "net.keras"
    nets.residual().save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bitwright.json", names)
    with pytest.raises(BitwrightError, match="the names kept in the file"):
        BACKEND.load(path)


def test_keras_s_temporary_files_are_where_those_of_killed_processes_are_swept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    sim = QuantSim(nets.settled(nets.separable()))
    for name in ("model.keras", "model.h5"):
        BACKEND.save(sim.native, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.h5", "model.keras"]
    assert tempfile.tempdir == str(tmp_path / "nowhere")


def test_temporary_folders_of_other_threads_outlive_a_save(tmp_path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    model = nets.settled(nets.separable())
    save = type(model).save

    def meanwhile(self, *args, **kwargs):
        other = threading.Thread(target=lambda: made.append(Path(tempfile.mkdtemp())))
        other.start()
        other.join()
        return save(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "save", meanwhile)
    save_native(model, tmp_path / "out/model.keras")
    assert [p.is_dir() and p.parent == tmp_path for p in made] == [True]
