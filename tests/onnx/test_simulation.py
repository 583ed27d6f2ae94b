from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from small_nets import (
    ACTIVATION,
    conv_net,
    encoding,
    encodings_of,
    identity_net,
    midpoints,
    opened,
    plan_of,
    proto,
)

from bitwright.backend import Tap
from bitwright.backend import _parts as parts_module
from bitwright.errors import EncodingError, InputError, ModelError
from bitwright.grids import Blockwise, Encoding, EncodingTable, PerChannel, QuantSpec, encoding_of_weights
from bitwright.placement import Float, SharedWith
from bitwright_onnx.graph.params import read_params
from bitwright_onnx.simulate import session as sessions
from bitwright_onnx.simulate import simulation as simulation_module
from bitwright_onnx.simulate.simulation import OnnxSimulation

SPECS = {
    "uint8": QuantSpec(8, signed=False, symmetric=False),
    "int8": QuantSpec(8),
    "int8 strict": QuantSpec(8, strict=True),
    "uint4": QuantSpec(4, signed=False, symmetric=False),
    "int4": QuantSpec(4),
    "int2": QuantSpec(2),
    "int7 strict": QuantSpec(7, strict=True),
    "uint12": QuantSpec(12, signed=False, symmetric=False),
    "int16": QuantSpec(16),
    "uint16": QuantSpec(16, signed=False, symmetric=False),
    "int16 strict": QuantSpec(16, strict=True),
    "int32": QuantSpec(32),
}


@pytest.fixture
def built(monkeypatch):
    """Counts the ONNX Runtime sessions that are made."""
    made = []
    original = ort.InferenceSession

    def counting(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(sessions.ort, "InferenceSession", counting)
    monkeypatch.setattr(sessions, "BLOCKED_AFTER", np.inf)
    return made


def lone_site(spec=ACTIVATION, opset=17):
    native, graph = identity_net("Identity", opset)
    plan = plan_of(graph, activation=spec, overrides={"y": Float("tested alone")})
    return OnnxSimulation(native, graph, plan, {})


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("name", SPECS)
def test_live_chains_give_the_bits_of_the_reference_grid(name, opset):
    spec, scale = SPECS[name], 0.037
    simulation = lone_site(spec, opset)
    zero = 0 if spec.symmetric else spec.grid.qmax // 3
    grid = encoding(spec, scale, zero)
    simulation.set({"x": grid})
    # 4 × 1001 leaves a remainder behind every vector width.
    x = midpoints(scale, (1001, 4))
    got = simulation.model.run({"x": x})["y"]
    np.testing.assert_array_equal(got, grid.fake_quantize(x))
    baked = ort.InferenceSession(simulation.to_model().SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(baked, got)


@given(
    bits=st.sampled_from([*range(2, 17), 32]),
    signed=st.booleans(),
    scale=st.floats(-14, 7).map(lambda e: float(np.float32(np.exp(e)))),
    where=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_integer_grid_without_rebuilding_within_sixteen_bits(bits, signed, scale, where, seed):
    spec = QuantSpec(bits, signed=signed or bits == 32, symmetric=False)
    grid = encoding(spec, scale, round(spec.grid.qmin + where * spec.grid.steps))
    _SHARED.set({"x": grid})
    x = midpoints(scale, (37, 4), seed)
    np.testing.assert_array_equal(_SHARED_MODEL.run({"x": x})["y"], grid.fake_quantize(x))


_SHARED = lone_site(QuantSpec(16))
_SHARED_MODEL = _SHARED.model


@pytest.mark.parametrize("format", ["float16", "bfloat16", "float8e4m3fn", "float8e5m2"])
def test_float_formats_saturate_and_round_as_the_core(format):
    spec = QuantSpec(8 if "8" in format[5:7] else 16, float_format=format)
    simulation = lone_site(spec)
    grid = encoding(spec, 0.37 if format.startswith("float8") else 1.0).with_(float_format=format)
    simulation.set({"x": grid})
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(0, s, 400) for s in (1e-7, 1e-3, 1, 300, 1e5)] + [[65504, 65519, 65520, 1e38, -1e38]]
    )
    x = np.resize(x.astype(np.float32), (502, 4))
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], grid.fake_quantize(x))


def test_activations_with_many_scales():
    layout = PerChannel(1)
    native, graph = opened(proto([helper.make_node("Identity", ["x"], ["y"])], {"x": ["N", 3, 4]}, ["y"]))
    spec = QuantSpec(8, signed=False, symmetric=False, granularity=layout)
    plan = plan_of(graph, activation=spec, overrides={"y": Float("tested alone")})
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.01, 0.1, 3).astype(np.float32)
    zero = rng.integers(0, 255, 3).astype(np.int32)
    grid = Encoding(8, False, False, scale, zero, layout)
    simulation = OnnxSimulation(native, graph, plan, {"x": grid})
    x = midpoints(0.02, (50, 3, 4))
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], grid.fake_quantize(x))
    with pytest.raises(EncodingError, match="'x'"):
        simulation.set({"x": Encoding(8, False, False, scale[:2], zero[:2], layout)})
    blocks = Blockwise(axis=1, block_axis=2, block_size=2)
    with pytest.raises(EncodingError, match=r"'x': .*no blocks"):
        simulation.set(
            {"x": Encoding(8, False, False, np.ones((3, 2), np.float32), np.zeros((3, 2), np.int32), blocks)}
        )


@pytest.mark.parametrize("bits", [8, 16])
def test_half_precision_models_quantize_in_float32(bits):
    model = proto([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 4]}, ["y"])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = 10
    native, graph = opened(model)
    grid = encoding(QuantSpec(bits, signed=False, symmetric=False), 0.3 if bits == 8 else 0.003, 20)
    simulation = OnnxSimulation(native, graph, plan_of(graph, overrides={"x": Float("no")}), {"y": grid})
    x = np.random.default_rng(0).normal(0, 30, (50, 4)).astype(np.float16)
    expected = grid.fake_quantize(np.maximum(x, 0).astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], expected)
    assert simulation.model.run({"x": x})["y"].dtype == np.float16


def test_encodings_and_bypass_change_without_a_new_session(built):
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    simulation = OnnxSimulation(native, graph, plan, encodings)
    model = simulation.model
    first = model.run(batch)["y"]
    simulation.set({"s": encodings["s"].with_(scale=encodings["s"].scale * 3)})
    coarse = model.run(batch)["y"]
    count = len(built)
    simulation.set({"s": None})
    bypassed = model.run(batch)["y"]
    narrow = QuantSpec(4)
    simulation.set({"s": encoding(narrow, 0.5)})
    signed = model.run(batch)["y"]
    simulation.set({"s": encodings["s"]})
    assert np.array_equal(model.run(batch)["y"], first)
    assert len({first.tobytes(), coarse.tobytes(), bypassed.tobytes(), signed.tobytes()}) == 4
    assert len(built) == count
    # A wider grid builds the session once more, and never again for that site.
    wide = encoding(QuantSpec(16, signed=False, symmetric=False), 0.001, 1000)
    simulation.set({"s": wide})
    model.run(batch)
    assert len(built) == count + 1
    for change in (encodings["s"], wide, None, encodings["s"]):
        simulation.set({"s": change})
        last = model.run(batch)["y"]
    assert len(built) == count + 1
    assert np.array_equal(last, first)


def test_numbers_are_constants_while_they_last(built, monkeypatch):
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    simulation = OnnxSimulation(native, graph, plan, encodings)
    fed: list[int] = []
    made = simulation_module.OrtSession

    def kept(part, *given, **options):
        fed.append(len([v for v in part.graph.inputs if "/quantizer/" in str(v.name)]))
        return made(part, *given, **options)

    monkeypatch.setattr(simulation_module, "OrtSession", kept)
    model = simulation.model
    other = encodings["s"].with_(scale=encodings["s"].scale * 3)
    results = {}
    for runs, grid in ((2, encodings["s"]), (1, other), (9, encodings["s"]), (9, other), (1, encodings["s"])):
        simulation.set({"s": grid})
        for _ in range(runs):
            result = model.run(batch)["y"]
            np.testing.assert_array_equal(result, results.setdefault(float(grid.scale), result))
    assert fed[0] == 0, "constants to begin with"
    assert fed[1] > 0, "fed, after a change that came early"
    assert fed[2:] == [0, 0, 0], "constants again after eight runs, and from then on as long as they last"
    assert len(results) == 2
    np.testing.assert_array_equal(result, OnnxSimulation(native, graph, plan, encodings).model.run(batch)["y"])


def test_everything_bypassed_is_the_float_model():
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    simulation = OnnxSimulation(native, graph, plan, encodings_of(native, graph, plan, batch))
    simulation.set(dict.fromkeys(plan))
    expected = sessions.OrtSession(native, [Tap("y")]).run(batch)[Tap("y")]
    np.testing.assert_allclose(simulation.model.run(batch)["y"], expected, rtol=1e-5, atol=1e-5)
    assert not simulation.get()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(8, granularity=PerChannel(0)),
        QuantSpec(4, granularity=PerChannel(0)),
        QuantSpec(4, granularity=Blockwise(block_size=4)),
        QuantSpec(4, granularity=Blockwise(block_size=2, decompressed_bits=8)),
        QuantSpec(16, float_format="float16"),
    ],
    ids=["int8", "int4", "blocks", "lpbq", "float16"],
)
@pytest.mark.parametrize("transposed", [0, 1])
def test_parameters_are_quantized_in_canonical_layout(spec, transposed):
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (5, 8) if transposed else (8, 5)).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
    native, graph = opened(proto([gemm], {"x": ["N", 8]}, ["y"], {"w": weight}))
    plan = plan_of(graph, weight=spec, overrides={"x": Float("no"), "y": Float("no")})
    canonical = read_params(native, ["w"])["w"]
    grid = encoding_of_weights(canonical, spec)
    simulation = OnnxSimulation(native, graph, plan, {"w": grid})
    x = np.eye(8, dtype=np.float32)
    expected = grid.fake_quantize(canonical).T
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], expected)
    # The user's model keeps its weights, and a later change of the encoding is followed.
    np.testing.assert_array_equal(native.graph.initializers["w"].const_value.numpy(), weight)
    simulation.set({"w": None})
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], canonical.T)


def test_only_sessions_that_hold_a_changed_parameter_are_built_again(built):
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    simulation = OnnxSimulation(native, graph, plan, encodings)
    head = simulation.session([Tap("r1")])
    tail = simulation.segment(["f"], [Tap("y")])
    f = np.ones((4, 8), np.float32)
    head.run(batch)
    tail.run({"f": f})
    count = len(built)
    simulation.set({"w3": encodings["w3"].with_(scale=encodings["w3"].scale * 2)})
    head.run(batch)
    assert len(built) == count
    tail.run({"f": f})
    assert len(built) == count + 1


def test_rounded_parameters_of_a_network_in_parts_are_not_kept(monkeypatch):
    """They are rounded again: the same bits in a new session."""
    native, graph = conv_net()
    plan = plan_of(graph)
    x = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    table = encodings_of(native, graph, plan, x)
    taps = [Tap(graph.outputs[0])]
    kept = OnnxSimulation(native, graph, plan, table)
    expected = kept.session(taps).run(x)
    assert len(kept._quantized) > 1
    monkeypatch.setattr(parts_module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(parts_module, "PART_BYTES", 64)
    simulation = OnnxSimulation(native, graph, plan, table)
    for _ in range(2):
        np.testing.assert_array_equal(simulation.session(taps).run(x)[taps[0]], expected[taps[0]])
        assert not simulation._quantized


def test_taps_and_segments_agree_with_the_whole():
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    simulation = OnnxSimulation(native, graph, plan, encodings)
    taps = [Tap("x"), Tap("r1"), Tap("s"), Tap("y"), Tap("s", "minmax"), Tap("r1", "minmax", 1)]
    seen = simulation.session(taps).run(batch)
    np.testing.assert_array_equal(seen[Tap("x")], encodings["x"].fake_quantize(batch["x"]))
    for name in ("r1", "s"):
        on_grid = seen[Tap(name)]
        np.testing.assert_array_equal(encodings[name].fake_quantize(on_grid), on_grid)
    np.testing.assert_array_equal(seen[Tap("s", "minmax")], [seen[Tap("s")].min(), seen[Tap("s")].max()])
    assert seen[Tap("r1", "minmax", 1)].shape == (2, 8)
    part = simulation.segment(["r1"], [Tap("s"), Tap("r1")])
    got = part.run({"r1": seen[Tap("r1")]})
    assert np.abs(encodings["s"].quantize(got[Tap("s")]) - encodings["s"].quantize(seen[Tap("s")])).max() <= 1
    # A fed tensor isn't quantized again.
    raw = np.full((1, 8, 8, 8), 0.1234567, np.float32)
    np.testing.assert_array_equal(part.run({"r1": raw})[Tap("r1")], raw)
    with pytest.raises(ModelError, match=r"can't be computed"):
        simulation.segment(["s"], [Tap("r1")]).run({"s": raw})


def test_sites_that_share_an_encoding():
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["a"], kernel_shape=[2]),
    ]
    model = proto(nodes, {"x": ["N", 8]}, ["a"])
    model.graph.initializer.append(helper.make_tensor("shape", 7, [3], [-1, 2, 4]))
    native, graph = opened(model)
    plan = plan_of(graph, overrides={"r": SharedWith("x"), "a": SharedWith("r")})
    grid = encoding(ACTIVATION, 0.1, 100)
    simulation = OnnxSimulation(native, graph, plan, EncodingTable({"x": grid}))
    x = midpoints(0.1, (20, 8))[2:]
    got = simulation.session([Tap("r"), Tap("a")]).run({"x": x})
    q = grid.fake_quantize(x).reshape(-1, 2, 4)
    np.testing.assert_array_equal(got[Tap("r")], q)
    np.testing.assert_array_equal(grid.fake_quantize(got[Tap("a")]), got[Tap("a")])
    quantizers = [n for n in simulation.to_model().graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2  # the reshaped tensor lies on the grid already
    assert set(simulation.get()) == {"x", "r", "a"}
    # An encoding for a tied site reaches the root.
    other = encoding(ACTIVATION, 0.2, 7)
    simulation.set({"a": other})
    assert simulation.get()["x"] is other


def test_subgraphs_read_quantized_tensors():
    body = [
        helper.make_graph(
            [helper.make_node(op, ["r"], [f"{op}_y"])], op, [], [helper.make_tensor_value_info(f"{op}_y", 1, None)]
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body[0], else_branch=body[1]),
    ]
    native, graph = opened(proto(nodes, {"x": [2, 3]}, ["y"], {"limit": np.float32(0)}))
    grid = encoding(ACTIVATION, 0.3)
    plan = plan_of(graph, overrides={t: Float("no") for t in ("x", "sum", "c", "y", "limit")})
    simulation = OnnxSimulation(native, graph, plan, {"r": grid})
    x = np.linspace(-1, 5, 6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(simulation.model.run({"x": x})["y"], -grid.fake_quantize(np.maximum(x, 0)))


def test_an_input_that_is_an_output_is_tapped_quantized_and_handed_out_as_it_came():
    model = proto([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 4]}, ["y"])
    model.graph.output.append(model.graph.input[0])
    native, graph = opened(model)
    grid = encoding(ACTIVATION, 0.1, 100)
    simulation = OnnxSimulation(native, graph, plan_of(graph), {"x": grid})
    x = midpoints(0.1, (5, 4))
    tapped = simulation.session([Tap("x")]).run({"x": x})[Tap("x")]  # what the network's ops read
    np.testing.assert_array_equal(tapped, grid.fake_quantize(x))
    np.testing.assert_array_equal(simulation.model.run({"x": x})["x"], x)  # as the model with its grids baked in
    baked = ort.InferenceSession(simulation.to_model().SerializeToString()).run(["x"], {"x": x})
    np.testing.assert_array_equal(baked[0], x)
    assert [o.name for o in simulation.to_model().graph.output] == ["y", "x"]


def test_bad_encodings_change_nothing():
    native, graph = conv_net()
    plan = plan_of(graph)
    good = encoding(ACTIVATION, 0.1)
    simulation = OnnxSimulation(native, graph, plan, {"x": good})
    for bad, message in (
        ({"nothing": good}, "no site 'nothing'"),
        ({"c1": good}, "its activation follows"),
        ({"w1": encoding_of_weights(np.ones((3, 2), np.float32), QuantSpec(granularity=PerChannel(0)))}, "'w1'"),
    ):
        with pytest.raises(EncodingError, match=message):
            simulation.set({"x": None, **bad})
        assert set(simulation.get()) == {"x"}
    with pytest.raises(ModelError, match="'nowhere'"):
        simulation.session([Tap("nowhere")])
    with pytest.raises(InputError, match="'x'"):
        simulation.model.run({"z": np.zeros(1, np.float32)})
