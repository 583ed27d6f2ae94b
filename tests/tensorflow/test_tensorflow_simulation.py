"""Simulation of TensorFlow graphs: the grid's bits, live encodings, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402
import tfsims  # noqa: E402
from tfsims import SPECS, setup  # noqa: E402

from bitwright.backend import Tap, Training  # noqa: E402
from bitwright.errors import EncodingError, InputError, ModelError  # noqa: E402
from bitwright.grids import PerChannel, QuantSpec, encoding_from_range, encoding_of_weights  # noqa: E402  # noqa: E402
from bitwright.testing.contract_base import holds  # noqa: E402
from bitwright_tensorflow.graph.canonical import recognize  # noqa: E402
from bitwright_tensorflow.graph.params import read_params  # noqa: E402
from bitwright_tensorflow.simulate.fake_quant import kind_of, numbers, switched  # noqa: E402

v1 = tf.compat.v1


@pytest.fixture(scope="module")
def net():
    return setup("trained")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ops_give_the_core_s_bits(spec):
    """Codes, midpoints and values beyond the ends, with scales that vary as encodings' do."""
    rng = np.random.default_rng(3)
    for seed in range(4):
        weights = (rng.normal(size=(6, 8, 3, 2)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        encoding = encoding_of_weights(weights, spec)
        x = tfsims.points(encoding, weights.shape) if seed else weights
        kind, graph = kind_of(encoding), tf.Graph()
        with graph.as_default(), v1.Session() as session:
            given = v1.placeholder(tf.float32, (None,) * 4)
            values = numbers(kind, encoding, 4)
            held = {n: v1.placeholder(v.dtype, v.shape) for n, v in values.items()}
            on = v1.placeholder(tf.bool, ())
            y = switched(given, on, kind, held, "y")
            feed = {given: x, **{held[n]: v for n, v in values.items()}}
            assert np.array_equal(session.run(y, {**feed, on: True}), encoding.fake_quantize(x))
            assert np.array_equal(session.run(y, {**feed, on: False}), x)


@pytest.mark.parametrize("kind", ["float16", "float8e5m2", "float8e4m3fn", "bfloat16", "nf4"])
def test_float_formats_saturate_and_keep_subnormals(kind):
    encoding = encoding_of_weights(np.ones((1,), np.float32), QuantSpec(16, float_format=kind))
    encoding = encoding.with_(scale=np.float32(1))
    x = np.float32([0, 65519, 65520, 1e38, -1e38, 6e-8, 3e-8, 448, 464, 480, 1.0625, 1.1875, 61440, 2e-3, 1.5e-5])
    with tf.Graph().as_default(), v1.Session() as session:
        values = numbers(kind, encoding, 1)
        held = {n: v1.placeholder(v.dtype, v.shape) for n, v in values.items()}
        y = switched(tf.constant(x), tf.constant(True), kind, held, "y")
        found = session.run(y, {held[n]: v for n, v in values.items()})
    assert np.array_equal(found, encoding.fake_quantize(x))


def test_setting_builds_nothing(net):
    """Other numbers, other widths, None and back: the same graph and session, which follow."""
    simulation, table = net.simulation(), net.table
    model = simulation.model
    before = model(net.sample)
    model.function  # noqa: B018 - made, so that it must follow
    session, graph, revision = model.session, model.graph, simulation.revision
    other = {s: e.with_(scale=e.scale * np.float32(3)) for s, e in table.items()}
    simulation.set(other)
    assert not np.array_equal(model(net.sample), before)
    nodes = len(graph.get_operations())
    narrow = {
        s: encoding_from_range(net.sim.plan.spec(s).with_(bits=5), e.minimum, e.maximum)
        for s, e in table.items()
        if s in net.sim.plan.activations
    }
    simulation.set(narrow)
    assert holds(simulation, narrow)
    simulation.set(dict.fromkeys(table))
    float_outputs = net.sim.backend.session(net.model, [Tap(t) for t in net.sim.graph.outputs])
    expected = float_outputs.run({"x:0": net.sample})[Tap(net.sim.graph.outputs[0])]
    assert np.allclose(model(net.sample), expected, rtol=1e-6, atol=1e-6)
    simulation.set(table)
    assert np.array_equal(model(net.sample), before)
    assert np.array_equal(model.function(net.sample).numpy(), before)
    assert (simulation.model, model.session, model.graph) == (model, session, graph)
    assert simulation.revision == revision
    assert len(graph.get_operations()) == nodes


def test_sessions_follow_changes(net):
    simulation, table = net.simulation(), net.table
    output = net.sim.graph.outputs[0]
    session = simulation.session([Tap(output)])
    before = session.run({"x:0": net.sample})[Tap(output)]
    weight = net.sim.graph.linear_ops[0].weight
    simulation.set({weight: table[weight].with_(scale=table[weight].scale * np.float32(20)), "x:0": None})
    changed = session.run({"x:0": net.sample})[Tap(output)]
    assert not np.array_equal(changed, before)
    assert np.array_equal(changed, simulation.model(net.sample))
    simulation.set(table)
    assert np.array_equal(session.run({"x:0": net.sample})[Tap(output)], before)


def test_another_kind_of_grid_builds_the_graph_again(net):
    """A float format, 32 bits and scales for each channel, on an activation; then back."""
    simulation, table = net.simulation(), net.table
    output, before = net.sim.graph.outputs[0], simulation.model(net.sample)
    session = simulation.session([Tap(output), Tap("act1:0")])
    values = net.sim.backend.session(net.model, [Tap("act1:0")]).run({"x:0": net.sample})[Tap("act1:0")]
    channels = QuantSpec(8, signed=False, symmetric=False, granularity=PerChannel(3))
    low, high = values.min((0, 1, 2)), values.max((0, 1, 2))
    kinds = [
        encoding_from_range(QuantSpec(16, float_format="bfloat16"), low.min(), high.max()),
        encoding_from_range(QuantSpec(8, float_format="float8e4m3fn"), low.min(), high.max()),
        encoding_from_range(QuantSpec(32), low.min(), high.max()),
        encoding_from_range(channels, low, high),
    ]
    simulation.set(dict.fromkeys(table))
    plain = session.run({"x:0": net.sample})[Tap("act1:0")]
    for encoding in kinds:
        simulation.set({"act1:0": encoding})
        found = session.run({"x:0": net.sample})
        assert np.array_equal(found[Tap("act1:0")], encoding.fake_quantize(plain))
        assert np.array_equal(simulation.model(net.sample), found[Tap(output)])
    simulation.set(table)
    assert np.array_equal(simulation.model(net.sample), before)


@pytest.mark.parametrize("kind", ["session", "references", "function", "frozen"])
def test_parameters_are_on_their_grids(kind):
    """Weights in native layout are the core's fake-quantized ones, a depthwise kernel with a multiplier too."""

    def build(net, x):
        x = tf.nn.relu(net.conv("conv", x, 4), name="act")
        return net.dense("fc", tf.reduce_mean(net.depthwise("dw", x, multiplier=2), [1, 2]), 5)

    net = setup(kind, build)
    simulation = net.simulation()
    for name in ("int4 channels", "int4 blocks", "lpbq", "e4m3 channels"):
        for op in net.sim.graph.linear_ops:
            param = op.weight
            value = read_params(net.model, [param])[param]
            spec = SPECS[name]
            if ("block" in name or name == "lpbq") and value.shape[1] % 4:
                continue
            encoding = encoding_of_weights(value, spec)
            simulation.set({param: encoding})
            held = simulation.model.session.run(f"{param}/quantized/Read/ReadVariableOp:0")
            assert np.array_equal(
                recognize(net.model).params[param].form.canonical(held), encoding.fake_quantize(value)
            )
            simulation.set({param: None})
            held = simulation.model.session.run(f"{param}/quantized/Read/ReadVariableOp:0")
            assert np.array_equal(recognize(net.model).params[param].form.canonical(held), value)


def test_the_user_s_own_nodes_see_the_simulation(net):
    """The output keeps its name, so that a loss on it is the simulated network's; training nodes stay as they are."""
    simulation = net.simulation()
    model = simulation.model
    labels = np.arange(8) % 5
    logits, loss = model.session.run(["logits:0", "loss:0"], {"x:0": net.sample, "labels:0": labels})
    assert model.outputs == ("logits:0",)
    assert np.array_equal(logits, model(net.sample))
    shifted = logits - logits.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    assert np.isclose(loss, -log_softmax[np.arange(8), labels].mean(), rtol=1e-5)
    inside = set(recognize(net.model).network.inference.order)
    kept = {n.name: n for n in simulation.network.meta.graph_def.node}
    others = [n for n in net.model.graph_def.node if n.name not in inside]
    assert any("Adam" in n.name for n in others)
    for node in others:
        assert kept[node.name] == node
    assert simulation.network.meta.saver_def == net.model.meta.saver_def


def test_a_loop_s_frames_are_left_alone():
    def build(net, x):
        x = tf.nn.relu(net.conv("conv", x, 4), name="act")
        _, x = tf.while_loop(lambda i, _: i < 3, lambda i, v: (i + 1, v * 0.5 + 1.0), [tf.constant(0), x])
        return net.dense("fc", tf.reduce_mean(x, [1, 2]), 5)

    v1.disable_control_flow_v2()
    try:
        net = setup("session", build)
    finally:
        v1.enable_control_flow_v2()
    assert any(n.op == "Enter" for n in net.model.graph_def.node)
    error = net.simulated() - net.sim.predict(net.sample, simulated=False)[0]
    assert 0 < np.abs(error).max() < 0.1
    trained = net.simulation(Training()).model
    with trained.graph.as_default():
        gradients = tf.gradients(trained.graph.get_tensor_by_name(trained.outputs[0]), trained.trainable_variables)
    found = trained.session.run(gradients, {"x:0": net.sample})
    assert all(np.abs(g).max() > 0 for g in found)


def test_calls_by_name_and_position(net):
    model = net.simulation().model
    expected = model(net.sample)
    assert np.array_equal(model(x=net.sample), expected)
    assert np.array_equal(model.run({"x:0": net.sample})["logits"], expected)
    assert np.array_equal(model.function(x=net.sample).numpy(), expected)
    for wrong in ({}, {"y": net.sample}):
        with pytest.raises(InputError):
            model.run(wrong)
    with pytest.raises(InputError):
        model(net.sample, net.sample)


def test_reference_variables_have_no_function():
    with pytest.raises(ModelError, match="reference variable"):
        setup("references").simulation().model.function  # noqa: B018


def test_encodings_that_don_t_fit_are_refused(net):
    simulation, table = net.simulation(), net.table
    weight = net.sim.graph.linear_ops[0].weight
    many = encoding_from_range(QuantSpec(8, granularity=PerChannel(0)), -np.ones(3), np.ones(3))
    for bad in ({weight: many}, {"act1:0": many.with_(granularity=PerChannel(3))}, {"nothing": many}):
        with pytest.raises(EncodingError):
            simulation.set({"x:0": None, **bad})
        assert holds(simulation, table)


def test_segments_take_what_they_are_fed(net):
    simulation = net.simulation()
    op = net.sim.graph.linear_ops[-1]
    feed = op.data_inputs[0]
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    segment = simulation.segment([feed], [Tap(op.output), Tap(feed)])
    assert segment.needs == (feed,)
    found = segment.run({feed: x})
    assert np.array_equal(found[Tap(feed)], x)
    table, params = net.table, read_params(net.model, list(op.params.values()))
    expected = (
        x @ table[op.weight].fake_quantize(params[op.weight]).T + params[next(p for p in params if p != op.weight)]
    )
    assert (
        np.abs(found[Tap(op.output)] - table[op.output].fake_quantize(expected)).max() <= table[op.output].scale * 1.01
    )


def test_half_precision_tensors_are_rounded_in_float32():
    def build(net, x):
        x = tf.cast(x, tf.float16)
        w = tf.cast(net.variable("w", 10, 6), tf.float16)
        return tf.cast(tf.nn.relu(tf.matmul(x, w), name="act"), tf.float32)

    net = setup("session", build, (10,))
    simulation = net.simulation()
    (site,) = [s for s in net.sim.plan.activations if s.startswith("act")]
    simulation.set(dict.fromkeys(net.table))
    plain = simulation.session([Tap(site)]).run({"x:0": net.sample})[Tap(site)]
    simulation.set({site: net.table[site]})
    found = simulation.session([Tap(site)]).run({"x:0": net.sample})[Tap(site)]
    assert found.dtype == np.float16
    assert np.array_equal(found, net.table[site].fake_quantize(plain.astype(np.float32)).astype(np.float16))


def test_signature_names_that_share_a_tensor():
    """One tensor under two result names is computed once and handed out twice."""

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, "x")])
    def twice(x):
        y = tf.nn.relu(tf.matmul(x, weight))
        return {"a": y, "b": y}

    weight = tf.Variable(tfnets.image(6, 4), name="w")
    from bitwright.simulation import QuantSim

    sim = QuantSim(twice, scheme="minmax").calibrate(tfnets.image(8, 6))
    results = sim.model.run({"x": tfnets.image(8, 6)})
    assert np.array_equal(results["a"], results["b"])
