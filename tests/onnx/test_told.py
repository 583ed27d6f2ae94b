"""What falls back or is lost without an error is told by name, once, where the user is."""

import warnings

import builders as b
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from typer.testing import CliRunner

from bitwright import QuantSim
from bitwright.cli.app import app

RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)


def network(layers=1, scale=1.0, rows=slice(None)):
    """A first convolution of 3 inputs, and others of 32; `scale` goes to rows of the last one's weights."""
    rng = np.random.default_rng(1)
    shapes = [(32, 3, 1, 1), *[(32, 32, 1, 1)] * layers]
    weights = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    weights[-1][rows] *= np.float32(scale)
    names = ["x", *[f"t{i}" for i in range(layers)], "y"]
    nodes = [h.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], f"conv{i}") for i in range(layers + 1)]
    graph = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, ["n", 3, 8, 8])],
        [h.make_tensor_value_info("y", T.FLOAT, ["n", 32, 8, 8])],
        [nh.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )  # fmt: skip
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def told(do):
    """The warnings of a call, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return [str(w.message) for w in caught]


class TestBlocksThatDoNotDivide:
    """A block size that doesn't divide a layer's inputs."""

    def test_are_told_by_name_with_what_they_got_and_the_way_out(self):
        (text,) = told(lambda: QuantSim(network(), weights="int4:block24"))
        assert "quantized per channel and not in blocks as was asked: 'w1' (32 inputs aren't a multiple of 24)." in text
        assert "block size that divides" in text and "overrides" in text
        assert "w0" not in text  # its 3 inputs are less than a block, which would be the whole channel

    def test_are_told_once_for_all_layers(self):
        (text,) = told(lambda: QuantSim(network(layers=5), weights="int4:block24"))
        assert "'w3'" in text and "'w4'" not in text and "and 2 more" in text

    def test_by_an_override_too(self):
        (text,) = told(lambda: QuantSim(network(layers=2), overrides={"conv2": {"weights": "int4:block24"}}))
        assert "'w2'" in text and "'w1'" not in text

    def test_are_said_of_what_the_target_has(self):
        (text,) = told(lambda: QuantSim(network(), weights="int4:block24", target="per_tensor"))
        assert "quantized per tensor and" in text

    def test_a_way_out_silences_it(self):
        assert not told(lambda: QuantSim(network(), weights="int4:block16"))
        assert not told(lambda: QuantSim(network(), weights="int4:block24", overrides={"conv1": {"weights": "int4"}}))

    def test_the_command_line_and_the_report_name_them(self, tmp_path):
        onnx.save(network(), tmp_path / "m.onnx")
        np.save(tmp_path / "d.npy", DATA)
        run = ["quantize", tmp_path / "m.onnx", "--data", tmp_path / "d.npy", "--out", tmp_path / "o"]
        with pytest.warns(UserWarning, match="'w1' \\(32 inputs"):
            done = CliRunner().invoke(app, [*map(str, run), "--weights", "int4:block24"])
        assert done.exit_code == 0, done.output
        assert "32 inputs aren" in (tmp_path / "o/report.html").read_text()


class TestLostWeights:
    """Weights below half the least step: all of them become zero."""

    def test_a_tensor_of_them_is_named(self):
        sim = QuantSim(network(scale=1e-30))
        (text,) = told(lambda: sim.calibrate(DATA))
        assert text.startswith("calibrate: the weights of 'w1' (no larger than ") and "overrides" in text
        assert not sim.predict(DATA)[0].any()  # what it is about

    @pytest.mark.parametrize(
        "options", [{"target": "per_tensor"}, {"weights": "int4:block16"}, {"weights": "fp8"}, {"weights": "float16"}]
    )
    def test_on_every_kind_of_grid(self, options):
        (text,) = told(lambda: QuantSim(network(scale=1e-30), **options).calibrate(DATA))
        assert "'w1' (no larger than " in text

    def test_without_data(self):
        (text,) = told(lambda: QuantSim(network(scale=1e-30), activations="float").calibrate())
        assert "'w1'" in text

    def test_channels_are_counted_where_the_others_are_about_as_small(self):
        model = network(scale=1e-7)
        weights = nh.to_array(model.graph.initializer[1]).copy()
        weights[4:6] *= np.float32(0.01)
        model.graph.initializer[1].CopyFrom(nh.from_array(weights, "w1"))
        (text,) = told(lambda: QuantSim(model).calibrate(DATA))
        assert "'w1' (2 of 32 channels)" in text

    def test_dead_channels_beside_others_are_common_and_not_told(self):
        assert not told(lambda: QuantSim(network(scale=1e-30, rows=slice(2, 4))).calibrate(DATA))

    def test_pruned_weights_are_none_that_are_lost(self):
        assert not told(lambda: QuantSim(network(scale=0.0, rows=slice(2, 4))).calibrate(DATA))

    @pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
    def test_small_ones_that_the_grid_holds_are_not_told(self, scale):
        assert not told(lambda: QuantSim(network(scale=scale)).calibrate(DATA))

    def test_the_way_out_silences_it(self):
        assert not told(lambda: QuantSim(network(scale=1e-30), overrides={"conv1": "float"}).calibrate(DATA))


def test_unsigned_weights_on_symmetric_grids_are_told(recwarn):
    with pytest.warns(UserWarning, match=r"'default'.*uint4 with the zero point 8 stands for what int4 does, -8 … 7"):
        sim = QuantSim(b.mlp(), weights="uint4")
    recwarn.clear()
    weight = sim.plan.mirrored[0]
    for weights, target in (("int4", "default"), ("4", "default"), (None, "default"), ("uint8", "gguf_q4_1")):
        assert QuantSim(b.mlp(), weights=weights, target=target).plan.mirrored == ()
    assert not recwarn.list
    data = np.random.default_rng(0).normal(size=(16, 3, 6)).astype(np.float32)
    found, wanted = (s.calibrate(data).encodings[weight] for s in (sim, QuantSim(b.mlp(), weights="int4")))
    values = sim.params[weight]
    np.testing.assert_array_equal(found.fake_quantize(values), wanted.fake_quantize(values))
