"""int8 .tflite files: our numbers are in them bit for bit, and LiteRT computes what the simulation said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

import keras_nets as nets  # noqa: E402
from keras import layers as L  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.cli import main  # noqa: E402
from bitwright.errors import EncodingError, InputError, ModelError  # noqa: E402
from bitwright.graph import OpKind, ParamRole  # noqa: E402
from bitwright.grids import Encoding, PerChannel  # noqa: E402
from bitwright.placement import Derived, SiteKind  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402
from bitwright_keras.export.export import export  # noqa: E402
from bitwright_keras.export.litert import LiteRtSession  # noqa: E402
from bitwright_keras.export.tflite_file import TfliteFile  # noqa: E402
from bitwright_keras.export.tflite_grids import activation_grid  # noqa: E402

TARGET = "tflite-int8"


def _data(model: Any, samples: int = 32) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(samples, *model.inputs[0].shape[1:])).astype(np.float32)


def _calibrated(model: Any, *steps: str, **options: Any) -> tuple[QuantSim, np.ndarray]:
    sim, x = QuantSim(model, **{"target": TARGET, **options}), _data(model)
    for step in steps:
        sim.apply(step, x)
    return sim.calibrate(x), x


def _exported(sim: QuantSim, folder: Path) -> tuple[Path, dict[str, str]]:
    bundle = export(sim.native, sim.plan, sim.table, folder / "net.tflite", "tflite")
    return bundle.files["tflite"], dict(bundle.names)


def _mixed() -> Any:
    """What int8 TFLite has special rules for: fixed grids, ties, transposed and strided convolutions, constants."""
    x = inputs = keras.Input((12, 12, 3), name="image")
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu6", name="stem")(x)
    left = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu", name="wide")(x)
    right = L.Conv2D(16, 1, activation="tanh", name="squash")(x)
    x = L.Multiply(name="product")([left, L.Activation("sigmoid", name="gate")(right)])
    x = L.Concatenate(name="both")([x, L.Maximum(name="larger")([left, x])])
    x = L.AveragePooling2D(2, padding="same", name="average")(x)
    x = L.Conv2DTranspose(6, 3, strides=2, padding="same", name="up")(x)
    x = L.UpSampling2D(2, name="double")(L.MaxPooling2D(2, name="maximum")(x))
    x = L.LeakyReLU(0.2, name="leaky")(x)
    x = L.Dense(9, activation="relu", name="hidden")(L.GlobalAveragePooling2D(name="pool")(x))
    return keras.Model(inputs, L.Dense(5, activation="softmax", name="classes")(x * 0.5 + 0.25), name="mixed")


@pytest.fixture(scope="module", params=["mixed", "residual", "branches", "separable"])
def net(request: Any, tmp_path_factory: Any) -> tuple[QuantSim, np.ndarray, Path, dict[str, str]]:
    keras.utils.set_random_seed(5)
    model = nets.settled(_mixed() if request.param == "mixed" else getattr(nets, request.param)())
    sim, x = _calibrated(model, "fold_batch_norm")
    return sim, x, *_exported(sim, tmp_path_factory.mktemp(request.param))


def test_the_file_has_our_scales_bit_for_bit(net: Any) -> None:
    sim, _, path, names = net
    grids = TfliteFile.read(path).grids()
    missing = []
    for site in sim.plan.quantized:
        if isinstance(sim.plan[site].decision, Derived):
            continue
        if site not in names:
            missing.append(site)
            continue
        encoding, grid = sim.table[site], grids[names[site]]
        assert grid.dtype == "int8"
        assert np.array_equal(grid.scale, np.broadcast_to(encoding.scale, grid.scale.shape)), site
        if sim.plan[site].kind is SiteKind.ACTIVATION:
            assert grid.zero_point.tolist() == [activation_grid(site, encoding)[1]], site
        elif encoding.symmetric:
            assert not grid.zero_point.any()
    # Only what the converter computes in one go with its neighbour has no tensor of its own.
    assert all(sim.plan[s].kind is SiteKind.PARAMETER and sim.graph.params[s].shape == () for s in missing), missing


def test_the_file_has_our_weights_and_biases_bit_for_bit(net: Any) -> None:
    sim, _, path, names = net
    file = TfliteFile.read(path)
    index = {file.name(i): i for i in range(len(file.tensors))}
    values = {p: np.asarray(v) for p, v in sim.params.items()}
    biases = 0
    for op in sim.graph.linear_ops:
        codes = file.constant(index[names[op.weight]])
        ours = sim.table[op.weight].quantize(values[op.weight])
        assert sorted(codes.ravel().tolist()) == sorted(ours.ravel().tolist()), op.id
        assert codes.min() >= -127
        bias = op.params.get(ParamRole.BIAS)
        operator = next(o for _, o in file.operators() if index[names[op.weight]] in o.inputs)
        position = 3 if op.kind is OpKind.CONV_TRANSPOSE else 2
        if bias is None or len(operator.inputs) <= position or len(sim.graph.users(bias)) > 1:
            continue
        wanted = sim.table[bias]
        grid = file.grid(int(operator.inputs[position]))
        assert grid.dtype == "int32" and np.array_equal(grid.scale, np.broadcast_to(wanted.scale, grid.scale.shape))
        assert np.array_equal(file.constant(int(operator.inputs[position])), wanted.quantize(values[bias])), op.id
        biases += 1
    assert biases


def test_everything_runs_in_integers(net: Any) -> None:
    _, _, path, _ = net
    assert TfliteFile.read(path).floating() == {}


def test_the_interpreter_computes_what_the_simulation_does(net: Any) -> None:
    sim, x, path, _ = net
    output = sim.graph.outputs[0]
    got = LiteRtSession(path).run({sim.graph.inputs[0]: x})[Tap(output)]
    wanted = sim.predict(x)[0]
    assert got.shape == wanted.shape
    assert sqnr(wanted, got) > 25
    if wanted.ndim == 2:
        assert (got.argmax(1) == wanted.argmax(1)).mean() > 0.93
    step = float(sim.table[output].scale)
    assert np.abs(got - wanted).max() <= 6 * step


def test_taps_are_dequantized_sites(net: Any) -> None:
    sim, x, path, names = net
    sites = [s for s in sim.plan.activations if s in names]
    got = LiteRtSession(path, [*sites, "nothing"]).run({sim.graph.inputs[0]: x[:2]})
    assert Tap("nothing") not in got and {Tap(s) for s in sites} <= set(got)
    inside = sites[1]
    grid = sim.table[inside]
    assert np.array_equal(grid.fake_quantize(got[Tap(inside)]), got[Tap(inside)])


def test_fixed_grids_of_the_operators_are_the_presets() -> None:
    keras.utils.set_random_seed(5)
    sim, _ = _calibrated(nets.settled(_mixed()))
    for site, scale, zero in (("squash/tanh", 1 / 128, 0), ("gate", 1 / 256, -128), ("classes/softmax", 1 / 256, -128)):
        assert (float(sim.table[site].scale), int(sim.table[site].zero_point)) == (scale, zero)


def test_batch_norms_fold_without_a_change_of_codes(tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    sim, x = _calibrated(nets.settled(nets.residual()))
    assert any(op.kind is OpKind.BATCH_NORM for op in sim.graph)
    path, names = _exported(sim, tmp_path)
    file = TfliteFile.read(path)
    index = {file.name(i): i for i in range(len(file.tensors))}
    weight = "stem/kernel"
    codes = file.constant(index[names[weight]])
    ours = sim.table[weight].quantize(np.asarray(sim.params[weight]))
    assert sorted(np.abs(codes).ravel().tolist()) == sorted(np.abs(ours).ravel().tolist())
    gamma, var = (np.asarray(sim.params[f"bn1/{k}"]) for k in ("gamma", "moving_variance"))
    factor = np.abs(gamma / np.sqrt(var + 1e-3))
    np.testing.assert_allclose(file.grid(index[names[weight]]).scale, sim.table[weight].scale * factor, rtol=1e-6)
    assert file.floating() == {}
    got = LiteRtSession(path).run({"x": x})[Tap("fc")]
    assert sqnr(sim.predict(x)[0], got) > 25


@pytest.mark.parametrize("options", [{"weights": "int4"}, {"activations": "uint8"}, {"target": "generic-int8"},
                                     {"overrides": {"pointwise": "float"}}], ids=str)  # fmt: skip
def test_other_types_that_int8_kernels_can_hold(options: dict[str, Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    model = nets.settled(nets.residual())
    sim, x = _calibrated(model, "fold_batch_norm", **options)
    if options.get("target"):  # this target's weights may have the code −128
        sim.set({p: e.with_(scale=e.scale * np.float32(128 / 127)) for p, e in sim.encodings.items()
                 if sim.plan[p].kind is SiteKind.PARAMETER})  # fmt: skip
    path, names = _exported(sim, tmp_path)
    file = TfliteFile.read(path)
    assert file.floating() == ({"CONV_2D": 1} if "overrides" in options else {})
    assert sqnr(sim.predict(x)[0], LiteRtSession(path).run({"x": x})[Tap("fc")]) > 20
    if "weights" in options:
        index = {file.name(i): i for i in range(len(file.tensors))}
        assert np.abs(file.constant(index[names["stem/kernel"]])).max() == 7


def test_weights_left_in_float_are_not_rounded_on_the_fly(tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    inputs = keras.Input((8, 8, 8), name="x")
    x = L.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, L.Dense(64, name="wide")(L.Flatten(name="flat")(x)))
    sim, x = _calibrated(model, overrides={"wide": "float"})
    path, names = _exported(sim, tmp_path)
    file = TfliteFile.read(path)
    assert "wide/kernel" not in names and file.floating() == {"FULLY_CONNECTED": 1}
    assert all(grid.dtype != "int8" or grid.scale.size < 64 for grid in file.grids().values())
    np.testing.assert_allclose(LiteRtSession(path).run({"x": x})[Tap("wide")], sim.predict(x)[0], atol=0.05)


def test_a_channel_that_its_batch_norm_switches_off(tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    model = nets.settled(nets.residual())
    gamma = model.get_layer("bn2").gamma
    gamma.assign(np.where(np.arange(gamma.shape[0]) == 2, 0, gamma.numpy()))
    sim, x = _calibrated(model)
    path, _ = _exported(sim, tmp_path)
    assert sqnr(sim.predict(x)[0], LiteRtSession(path).run({"x": x})[Tap("fc")]) > 25


@pytest.mark.parametrize(
    ("options", "said"),
    [({"activations": "uint16"}, "16 bits"), ({"activations": "float16"}, "float16"), ({"weights": "int16"}, "8 bits")],
)
def test_types_that_tflite_lacks_are_refused_before_anything_is_written(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sim, _ = _calibrated(nets.settled(nets.residual()), **options)
    with pytest.raises(EncodingError, match=said):
        _exported(sim, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lowest_code_of_a_weight_is_refused(tmp_path: Path) -> None:
    sim, _ = _calibrated(nets.settled(nets.residual()), "fold_batch_norm")
    values = np.asarray(sim.params["stem/kernel"])
    scale = (-np.minimum(values.reshape(len(values), -1).min(1), -1e-3) / 128).astype(np.float32)
    wide = Encoding(8, True, True, scale, np.zeros(len(scale), np.int32), PerChannel(0))
    sim.set({"stem/kernel": wide})
    with pytest.raises(EncodingError, match=r"stem/kernel.*−128.*tflite-int8"):
        _exported(sim, tmp_path)


def test_free_image_sizes_are_refused(tmp_path: Path) -> None:
    x = inputs = keras.Input((None, None, 3), name="image")
    model = keras.Model(inputs, L.GlobalAveragePooling2D(name="pool")(L.Conv2D(4, 3, name="conv")(x)))
    sim = QuantSim(model, target=TARGET)
    sim.calibrate(np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype(np.float32))
    with pytest.raises(ModelError, match="static shapes"):
        _exported(sim, tmp_path)


def test_a_bundle_for_the_target_has_the_file_and_verify_runs_it(tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    sim, x = _calibrated(nets.settled(nets.residual()), "fold_batch_norm")
    bundle = sim.export(tmp_path, name="net")
    assert bundle.files["tflite"] == tmp_path / "net.tflite"
    result = verify(tmp_path, x[:16], inspected=2)
    assert result.problems == [] and result.agreement["integer_simulated"] > 0.9
    compared = {t.name: t for t in result.tensors}
    assert compared["relu6"].simulated_max_steps is not None and compared["relu6"].simulated_max_steps <= 1
    # The same bundle in ONNX Runtime, whose kernels round elsewhere.
    other = verify(tmp_path, x[:16], inspected=1, runtime="onnxruntime")
    assert other.agreement["integer_simulated"] > 0.9
    assert other.sqnr_db["integer_simulated"] != result.sqnr_db["integer_simulated"]


def _rows(model: Any) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 20, (32, *model.inputs[0].shape[1:])).astype(np.int32)


def test_rows_of_a_table_are_brought_from_its_grid_to_that_of_what_reads_them(tmp_path: Path) -> None:
    """LiteRT's GATHER copies codes; the embedding's output has a grid of its own."""
    keras.utils.set_random_seed(5)
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = L.Embedding(20, 8, name="table")(ids)
    model = keras.Model(ids, L.Dense(3, name="classes")(L.Flatten(name="flat")(x)))
    x = _rows(model)
    sim = QuantSim(model, target=TARGET).calibrate(x)
    path, names = _exported(sim, tmp_path)
    grids = TfliteFile.read(path).grids()
    assert float(grids[names["table/embeddings"]].scale[0]) != float(grids[names["table"]].scale[0])
    for site in ("table/embeddings", "table", "classes"):
        assert grids[names[site]].scale.tolist() == np.ravel(sim.table[site].scale).tolist(), site
    run = LiteRtSession(path, ["table"]).run({"ids": x})
    wanted = sim.simulation.session([Tap("table"), Tap("classes")]).run({"ids": x})
    steps = np.abs(sim.table["table"].quantize(run[Tap("table")]) - sim.table["table"].quantize(wanted[Tap("table")]))
    assert steps.max() <= 1 and (steps > 0).mean() < 0.02
    assert sqnr(wanted[Tap("classes")], run[Tap("classes")]) > 45


def _sequences(kind: str) -> Any:
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = L.Embedding(20, 8, name="table")(ids)
    if kind == "dense":
        x = L.Dense(4, name="second")(L.Dense(5, activation="relu", name="first")(x))
    elif kind == "attention":
        x = L.Dense(3, name="last")(L.MultiHeadAttention(2, 4, name="attention")(x, x))
    else:
        x = L.GlobalMaxPooling1D()(L.AveragePooling1D(2)(L.Conv1D(5, 3, activation="relu", name="conv")(x)))
    return keras.Model(ids, L.Flatten(name="end")(x))


@pytest.mark.filterwarnings("ignore:.*no .h5 is written:UserWarning")
@pytest.mark.parametrize("kind", ["dense", "attention", "convolution"])
def test_verify_reads_tensors_that_litert_keeps_with_merged_axes(kind: str, tmp_path: Path) -> None:
    """It flattens (samples, steps, features) before a linear layer, and has 1-D convolutions as 2-D ones."""
    keras.utils.set_random_seed(5)
    model = _sequences(kind)
    x = _rows(model)
    QuantSim(model, target=TARGET).calibrate(x).export(tmp_path, name="net")
    result = verify(tmp_path, x)
    assert result.problems == [] and result.notes == []
    compared = {t.name: t for t in result.tensors if t.exact_differs is not None}
    merged = {"dense": "first/relu", "attention": "attention/attention_output", "convolution": "conv/relu"}[kind]
    assert (compared[merged].exact_max_steps or 0) <= 3
    assert main(["encodings", "check", str(tmp_path)]) == 0


def test_a_kernel_that_took_its_padding_in_is_named_by_its_output(tmp_path: Path) -> None:
    """Padding and a strided convolution become one kernel, which mentions both; with ReLU6 both have one grid."""
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = L.ReLU(6.0, name="first")(L.Conv2D(4, 1, name="stem", bias_initializer="ones")(x))
    x = L.ZeroPadding2D(((0, 1), (0, 1)), name="pad")(x)
    x = L.ReLU(6.0, name="second")(L.DepthwiseConv2D(3, strides=2, name="depthwise", bias_initializer="ones")(x))
    model = keras.Model(inputs, L.Dense(3, name="head")(L.Flatten(name="flat")(x)), name="padded")
    sim, data = _calibrated(model)
    sim.set(dict.fromkeys(("second",), sim.encodings["first"]))
    path, names = _exported(sim, tmp_path)
    assert "pad" not in names
    shapes = {str(d["name"]): tuple(d["shape"]) for d in LiteRtSession(path)._interpreter.get_tensor_details()}
    assert {t: shapes[names[t]] for t in ("first", "second")} == {"first": (1, 8, 8, 4), "second": (1, 4, 4, 4)}
    sim.export(tmp_path / "export", name="net")
    assert verify(tmp_path / "export", data, runtime="tflite").agreement["integer_simulated"] > 0.9


def test_sessions_say_what_is_wrong_with_data(net: Any) -> None:
    sim, x, path, _ = net
    session, name = LiteRtSession(path), sim.graph.inputs[0]
    with pytest.raises(InputError, match="no array for input"):
        session.run({"other": x})
    with pytest.raises(InputError, match="samples of shape"):
        session.run({name: x[:, 1:]})


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tflite"
    with pytest.raises(InputError, match="there is no file"):
        LiteRtSession(path)
    with pytest.raises(InputError, match="can't be read"):
        TfliteFile.read(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(InputError, match="not a TFLite model"):
        TfliteFile.read(path)
    with pytest.raises(InputError, match="can't be run"):
        LiteRtSession(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(6, 3, padding="same", activation="relu", name="stem")(inputs)
    x = L.DepthwiseConv2D(3, activation="relu", name="wide")(x)
    model = keras.Model(inputs, L.Dense(4, name="last")(L.GlobalAveragePooling2D(name="pool")(x)))
    sim, x = _calibrated(nets.settled(model))
    folder = tmp_path_factory.mktemp("small")
    sim.export(folder, name="net")
    return folder


def _checked(folder: Path, capsys: Any) -> tuple[int, str]:
    status = main(["encodings", "check", str(folder)])
    return status, capsys.readouterr().out


def test_the_check_reads_the_tflite_file_back(small: Path, capsys: Any) -> None:
    assert _checked(small, capsys)[0] == 0


@pytest.mark.parametrize(
    ("site", "what"),
    [("stem/relu", "scale"), ("wide/relu", "zero point"), ("stem/kernel", "codes"), ("wide/kernel", "scale"),
     ("last/kernel", "codes"), ("bias", "codes")],
)  # fmt: skip
def test_the_check_names_the_number_that_was_changed(
    small: Path, tmp_path: Path, site: str, what: str, capsys: Any
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(small, folder)
    file = TfliteFile.read(folder / "net.tflite")
    called = {file.name(i): i for i in range(len(file.tensors))}
    if site == "bias":
        index = next(int(o.inputs[2]) for kind, o in file.operators() if kind == "CONV_2D")
    else:
        index = next(i for name, i in called.items() if name.removesuffix("_int8") == site)
    grid, values = file.grid(index), file.constant(index)
    if what == "codes":
        changed = np.array(values)
        changed.reshape(-1)[0] += 1 if changed.reshape(-1)[0] < 100 else -1
        file.set_constant(index, changed)
    else:
        scale = grid.scale * np.float32(1.01) if what == "scale" else grid.scale
        file.set_grid(index, scale, grid.zero_point + (what == "zero point"))
    file.write(folder / "net.tflite")
    status, told = _checked(folder, capsys)
    assert status == 1
    assert f"another {what} in the .tflite file" in told if what != "codes" else "codes aren't those" in told
    assert site == "bias" or any(line.startswith(site) for line in told.splitlines())


def test_an_output_that_the_file_has_under_another_s_name_is_compared(tmp_path: Path) -> None:
    """Dropout passes on the very tensor that is an output too; an output that is an input is what was fed."""
    inputs = keras.Input((6,), name="x")
    last = L.Dense(5, activation="relu", name="d")(inputs)
    model = keras.Model(inputs, [last, L.Dropout(0.3, name="p")(last), inputs])
    sim, x = _calibrated(model)
    sim.export(tmp_path, name="net")
    found = verify(tmp_path, x)
    assert found.problems == []
    figures = {o.name: o.sqnr_db["integer_float"] for o in found.outputs}
    assert figures["x"] == float("inf") and figures["p"] == figures["d/relu"] and 30 < figures["p"] < 60
