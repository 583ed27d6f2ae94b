from __future__ import annotations

import numpy as np
import pytest
from kernels_run import runtime_ops
from onnx import helper, numpy_helper
from small_nets import ACTIVATION, conv_net, encoding, encodings_of, identity_net, opened, plan_of, proto

from bitwright.backend import Bundle, Tap
from bitwright.calibration import full_table
from bitwright.errors import InputError, ModelError
from bitwright.grids import EncodingTable, PerChannel, QuantSpec, encoding_of_weights
from bitwright.simulation import QuantSim
from bitwright_onnx.export.qdq import write_qdq
from bitwright_onnx.export.runtime import IntegerSession, compile_bundle
from bitwright_onnx.simulate.simulation import OnnxSimulation


def exported(folder, seed=0, **specs):
    native, graph = conv_net(seed)
    plan = plan_of(graph, **specs)
    batch = {"x": np.random.default_rng(seed).normal(0, 1, (16, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    bundle = write_qdq(native, graph, plan, encodings, folder / "m.qdq.onnx").bundle()
    table = full_table(plan, EncodingTable(encodings))
    return OnnxSimulation(native, graph, plan, table), plan, encodings, bundle, batch


def test_onnx_runtime_makes_integer_kernels(tmp_path):
    *_, bundle, _ = exported(tmp_path)
    ops = runtime_ops(bundle.files["qdq"])
    assert ops.counts["QLinearConv"] == 2
    assert ops.counts["QLinearAdd"] == 1
    assert ops.counts["QGemm"] == 1
    assert ops.counts["QLinearGlobalAveragePool"] == 1
    assert "Clip" not in ops.counts
    assert not ops.floating


def test_four_bit_weights_run_in_integers_when_kept_as_bytes(tmp_path):
    native, graph = conv_net()
    plan = plan_of(graph, weight=QuantSpec(4, granularity=PerChannel(0)))
    batch = {"x": np.random.default_rng(0).normal(0, 1, (16, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    outputs = []
    for packed in (True, False):
        path = write_qdq(native, graph, plan, encodings, tmp_path / f"{packed}.onnx", packed=packed).path
        outputs.append(IntegerSession(path).run(batch)[Tap("y")])
    assert runtime_ops(tmp_path / "False.onnx").counts["QLinearConv"] == 2
    step = encodings["y"].scale
    np.testing.assert_allclose(outputs[0], outputs[1], atol=float(step) * 1.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "specs",
    [
        {},
        {"activation": QuantSpec(8)},
        {"weight": QuantSpec(8)},
        {"weight": QuantSpec(4, granularity=PerChannel(0))},
        {"activation": QuantSpec(16, signed=False, symmetric=False)},
    ],
    ids=["u8s8", "s8s8", "per tensor", "int4", "uint16"],
)
def test_within_one_step_of_the_simulation(tmp_path, seed, reference, specs):
    simulation, plan, encodings, bundle, batch = exported(tmp_path, seed, **specs)
    sites = list(plan.activations)
    runtime = compile_bundle(bundle, sites, reference=reference).run(batch)
    simulated = simulation.session([Tap(s) for s in sites]).run(batch)
    wide = encodings["y"].bits == 16
    for site in sites:
        grid = encodings[site]
        # The runtime hands out values of the grid itself.
        np.testing.assert_array_equal(grid.fake_quantize(runtime[Tap(site)]), runtime[Tap(site)])
        steps = np.abs(grid.quantize(runtime[Tap(site)]) - grid.quantize(simulated[Tap(site)]))
        # 16-bit steps come near float32's summation noise.
        assert steps.max() <= (2 if wide else 1), site
        assert (steps > 0).mean() < 0.01, site


def test_a_large_bias_leaves_the_accumulator_room_for_products(tmp_path):
    """Weights that are negligible beside their bias: with the bias at int32's end, the products would wrap around."""
    weight = np.full((1, 32, 1, 1), -3e-6, np.float32)
    conv = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    native, graph = opened(proto([conv], {"x": ["N", 32, 4, 4]}, ["y"], {"w": weight, "b": np.float32([-100.0])}))
    plan = plan_of(graph)
    encodings = {
        "x": encoding(ACTIVATION, 0.01),
        "y": encoding(QuantSpec(8, signed=False, symmetric=False), 0.5, 255),
        "w": encoding_of_weights(weight, QuantSpec(granularity=PerChannel(0))),
    }
    bundle = write_qdq(native, graph, plan, encodings, tmp_path / "m.onnx").bundle()
    got = compile_bundle(bundle).run({"x": np.full((2, 32, 4, 4), 2.5, np.float32)})[Tap("y")]
    assert runtime_ops(bundle.files["qdq"]).counts["QLinearConv"] == 1
    np.testing.assert_array_equal(got, np.full((2, 1, 4, 4), -100, np.float32))


def test_taps_do_not_change_the_outputs(tmp_path):
    _, plan, _, bundle, batch = exported(tmp_path)
    plain = IntegerSession(bundle.files["qdq"]).run(batch)
    tapped = IntegerSession(bundle.files["qdq"], plan.activations).run(batch)
    assert list(plain) == [Tap("y")]
    np.testing.assert_array_equal(plain[Tap("y")], tapped[Tap("y")])
    assert set(tapped) == {Tap(s) for s in plan.activations}


def test_the_input_tap_is_quantized(tmp_path):
    native, graph = identity_net()
    grid = encoding(ACTIVATION, 0.1, 50)
    bundle = write_qdq(native, graph, plan_of(graph), {"x": grid, "y": grid}, tmp_path / "m.onnx").bundle()
    x = np.linspace(-9, 30, 8, dtype=np.float32).reshape(2, 4)
    got = compile_bundle(bundle, ["x"]).run({"x": x})
    np.testing.assert_array_equal(got[Tap("x")], grid.fake_quantize(x))


def test_bad_bundles_and_batches(tmp_path):
    *_, bundle, batch = exported(tmp_path)
    with pytest.raises(InputError, match="no quantized model"):
        compile_bundle(Bundle({"model": tmp_path / "m.onnx"}))
    with pytest.raises(InputError, match="no model file"):
        IntegerSession(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(bundle.files["qdq"].read_bytes()[:1000])
    with pytest.raises(InputError, match=r"broken\.onnx"):
        IntegerSession(tmp_path / "broken.onnx")
    with pytest.raises(ModelError, match="'nothing'"):
        compile_bundle(bundle, ["nothing"])
    session = compile_bundle(bundle)
    with pytest.raises(InputError, match="'x'"):
        session.run({"z": batch["x"]})
    with pytest.raises(InputError, match=r"input 'x' takes shape"):
        session.run({"x": batch["x"][0]})


def test_a_weight_that_two_convolutions_share_runs(tmp_path):
    """ONNX Runtime moves weights to uint8 once for each reader, and must not stop at the second."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="first"),
        helper.make_node("Conv", ["y", "w"], ["z"], name="second"),
    ]
    graph = helper.make_graph(
        nodes, "shared", [helper.make_tensor_value_info("x", 1, [None, 4, 5, 5])],
        [helper.make_tensor_value_info("z", 1, [None, 4, 5, 5])],
        [numpy_helper.from_array(rng.normal(0, 0.5, (4, 4, 1, 1)).astype(np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    sim = QuantSim(model, target="generic-int8")
    x = rng.normal(size=(8, 4, 5, 5)).astype(np.float32)
    sim.calibrate({"x": x})
    bundle = sim.export(tmp_path, name="shared")
    got = compile_bundle(bundle, ["y"]).run({"x": x})
    assert np.abs(got[Tap("z")] - sim.predict({"x": x})[0]).max() <= 2 * float(sim.table["z"].scale)


@pytest.mark.parametrize("bits", [8, 6])
def test_signed_activations_run_as_unsigned_ones(tmp_path, bits):
    sims = []
    for kind in (f"int{bits}", f"uint{bits}"):
        sim = QuantSim(conv_net(3)[0], target="generic-int8", activations=kind)
        x = {"x": np.random.default_rng(0).normal(0, 1, (16, 3, 8, 8)).astype(np.float32)}
        sim.calibrate(x)
        bundle = sim.export(tmp_path, name=kind)
        sims.append((sim.predict(x)[0], next(iter(compile_bundle(bundle).run(x).values()))))
    assert np.array_equal(sims[0][0], sims[1][0])
    assert np.array_equal(sims[0][1], sims[1][1])
