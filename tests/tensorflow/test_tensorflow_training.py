"""Training simulated TensorFlow graphs: gradients, sessions, functions, and the way back into QuantSim."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfsims  # noqa: E402
from shares import WHOLE  # noqa: E402
from tfsims import SPECS, setup  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.backend import Training  # noqa: E402
from bitwright.errors import CapabilityError, EncodingError, InputError  # noqa: E402
from bitwright.grids import (  # noqa: E402
    FLOAT_FORMATS,
    Groups,
    PerTensor,
    encoding_of_weights,
    lsq_factor,
    min_max_numbers,
    two_level_scales,
)
from bitwright.grids import _gradients as gradients  # noqa: E402
from bitwright.grids._gradients import NumpyNamespace  # noqa: E402
from bitwright.placement import Derived  # noqa: E402
from bitwright.testing.contract_base import holds  # noqa: E402
from bitwright_tensorflow.graph.params import read_params  # noqa: E402
from bitwright_tensorflow.simulate import fake_quant  # noqa: E402
from bitwright_tensorflow.simulate.fake_quant import NAMESPACE, Ends, compiles, in_one_pass, kind_of, trained  # noqa: E402
from bitwright_tensorflow.simulate.recomputed import recompute  # noqa: E402

v1 = tf.compat.v1
MODES = {"regular": Training(), "range learning": Training(True), "lsq": Training(True, True)}


def batch(count=24, seed=1):
    """Images whose class is which of five places is bright."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, count)
    x = (rng.normal(size=(count, *tfsims.SHAPE)) * 0.3).astype(np.float32)
    x[np.arange(count), :, :, y % 3] += (1.0 + 0.6 * (y // 3))[:, None, None]
    return x, y


def train(model, steps=40, rate=0.02):
    """A TF 1 loop in the model's session, on an optimizer of its own."""
    with model.graph.as_default():
        labels = v1.placeholder(tf.int64, (None,))
        logits = model.graph.get_tensor_by_name(model.outputs[0])
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        step = v1.train.AdamOptimizer(rate, name="qat").minimize(loss)
    fresh = model.initialize()
    assert fresh
    assert all("qat" in name or "beta" in name for name in fresh)
    losses = []
    for seed in range(steps):
        x, y = batch(seed=seed)
        losses.append(model.session.run([loss, step], {model.inputs[0]: x, labels: y})[0])
    return losses


@pytest.mark.parametrize("form", ["plain", "compiled", "recomputed"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_are_the_core_s(spec, form, monkeypatch):
    compiled = form != "plain"
    monkeypatch.setattr(fake_quant, "COMPILED_FROM", 1 if compiled else 2**40)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 8, 3, 2)).astype(np.float32)
    encoding = encoding_of_weights(weights * np.float32(0.7), spec)
    x = np.where(rng.random(weights.shape) < 0.5, weights, tfsims.points(encoding, weights.shape)).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)
    kind, groups = kind_of(encoding), Groups.of(x.shape, encoding.granularity)
    dtype = np.float64 if kind == "wide" else np.float32
    with tf.Graph().as_default(), v1.Session() as session:
        given, on = v1.placeholder(tf.float32, x.shape), v1.placeholder(tf.bool, ())
        scale, zero = (v1.placeholder(dtype, encoding.scale.shape) for _ in range(2))
        ends = Ends(kind, scale, zero, dtype(encoding.grid.qmin), dtype(encoding.grid.qmax), True, True)
        with in_one_pass(compiles(given)), tf.name_scope("site"):
            y = trained(given, ends, groups, on, factor=0.25, name="y", compiled=compiles(given))
        if form == "recomputed":
            recompute(session.graph)
            ours = [o for o in session.graph.get_operations() if o._gradient_function is not None]
            assert len(ours) == (3 if kind == "integer" and not encoding.scale.shape else 0)
        found = tf.gradients(y, [given, scale, zero], tf.constant(g))
        assert ("_XlaCompile" in str(session.graph.as_graph_def())) == compiled
        feed = {given: x, on: True, scale: encoding.scale, zero: encoding.zero_point}
        value, dx, ds, dz = session.run([y, *found], feed)
        bypassed = session.run([y, *found], {**feed, on: False})
    assert np.array_equal(value, encoding.fake_quantize(x))
    assert np.array_equal(bypassed[0], x)
    assert np.array_equal(bypassed[1], g)
    assert not np.any(bypassed[2]) and not np.any(bypassed[3])
    if encoding.float_format is not None:
        largest = FLOAT_FORMATS[encoding.float_format][2]
        expected = gradients.cast_vjp(NumpyNamespace, g, x, value, encoding.scale, largest, groups)
    else:
        arrays = (v.astype(dtype) for v in (g, x, encoding.scale, encoding.zero_point))
        expected = gradients.fake_quantize_vjp(NumpyNamespace, *arrays, encoding.grid, groups)
        assert np.allclose(dz, expected.zero_point / 4, rtol=1e-4, atol=1e-5 * np.abs(expected.zero_point).max())
    assert np.array_equal(dx, expected.x.astype(np.float32))
    assert np.allclose(ds, expected.scale / 4, rtol=1e-4, atol=1e-5 * np.abs(expected.scale).max())


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_grid_clips_gets_no_gradient(compiled, monkeypatch):
    """One scale that isn't learned: the limits are computed in the graph, to the bit."""
    monkeypatch.setattr(fake_quant, "COMPILED_FROM", 64 if compiled else 2**40)
    rng = np.random.default_rng(0)
    with tf.Graph().as_default(), v1.Session() as session:
        given, on = v1.placeholder(tf.float32, (2, 1206)), v1.placeholder(tf.bool, ())
        scale, zero, qmin, qmax = (v1.placeholder(tf.float32, ()) for _ in range(4))
        with in_one_pass(compiles(given)):
            ends = Ends("integer", scale, zero, qmin, qmax)
            y = trained(given, ends, Groups.of((), PerTensor()), on, name="y", compiled=compiles(given))
        cotangent = v1.placeholder(tf.float32, (2, 1206))
        (dx,) = tf.gradients(y, [given], cotangent)
        assert ("_XlaCompile" in str(session.graph.as_graph_def())) == compiled
        for bits in (4, 8, 16) * 12:
            top = 2**bits - 1
            s, z = np.float32(10.0 ** rng.uniform(-30, 30)), int(rng.integers(0, top + 1))
            ends = np.concatenate([np.arange(-100, 101), np.arange(2 * top - 100, 2 * top + 101)]) / 2 - z
            points = (ends * np.float64(s)).astype(np.float32)
            up, down = (np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf))
            x = np.resize(np.concatenate([points, up, down]), (2, 1206))
            x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)  # TensorFlow flushes them too
            g = rng.normal(size=x.shape).astype(np.float32)
            feed = {given: x, on: True, scale: s, zero: z, qmin: 0, qmax: top, cotangent: g}
            value, found = session.run([y, dx], feed)
            q = np.rint(x / s)
            assert np.array_equal(value, np.clip(q, np.float32(-z), np.float32(top - z)) * s)
            assert np.array_equal(found, np.where((q >= -z) & (q <= top - z), g, 0)), (bits, s, z)
            bypassed = session.run([y, dx], {**feed, on: False})
            assert np.array_equal(bypassed, [x, g])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weight_ranges_are_the_core_s(spec):
    rng = np.random.default_rng(1)
    for index in range(6):
        weights = (rng.normal(size=(6, 8, 3, 2)) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
        weights[0] = 0 if index == 1 else weights[0]
        expected = encoding_of_weights(weights, spec)
        with tf.Graph().as_default(), v1.Session() as session:
            given = v1.placeholder(tf.float32, weights.shape)
            groups = Groups.of(weights.shape, spec.granularity)
            scale, zero = min_max_numbers(NAMESPACE, groups.cut(NAMESPACE, given), expected, groups)
            scale, zero = session.run([two_level_scales(NAMESPACE, scale, expected), zero], {given: weights})
        assert np.array_equal(scale, expected.scale)
        assert np.array_equal(zero, expected.zero_point)


def test_gradients_are_made_again_in_this_process_s_graphs_alone(monkeypatch):
    """Those of the standard ops, which a written graph has elsewhere, are the same."""
    monkeypatch.setattr(fake_quant, "COMPILED_FROM", 1)
    net = setup()
    model = net.simulation(Training(True)).model
    with model.graph.as_default():
        ours = [o for o in model.graph.get_operations() if o._gradient_function is not None]
        assert len(ours) >= 9
        loss = tf.reduce_sum(model.graph.get_tensor_by_name(model.outputs[0]) ** 2)
        sought = [*model.trainable_variables, model.graph.get_tensor_by_name(model.inputs[0])]
        made = tf.gradients(loss, sought)
        for operation in ours:
            operation._gradient_function = None
        standard = tf.gradients(loss, sought)
    assert [g is None for g in made] == [g is None for g in standard]
    wanted = [[g for g in found if g is not None] for found in (made, standard)]
    pairs = list(zip(*model.session.run(wanted, {model.inputs[0]: batch()[0]}), strict=True))
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())
    assert np.mean([np.any(other) for _, other in pairs]) > 0.8
    with tf.Graph().as_default() as elsewhere:
        v1.train.import_meta_graph(model.meta)
    assert all(o._gradient_function is None for o in elsewhere.get_operations())
    assert any(o._gradient_function is not None for o in model.function.concrete.graph.get_operations())


@pytest.mark.parametrize("mode", [MODES["regular"], MODES["range learning"]], ids=["regular", "range learning"])
def test_large_weights_are_compiled_and_train_alike(mode, monkeypatch):
    found = []
    for values in (2**40, 64):
        monkeypatch.setattr(fake_quant, "COMPILED_PARAMETER", values)
        model = setup().simulation(mode).model
        names = {n.name for n in model.meta.graph_def.node if "_XlaCompile" in n.attr}
        assert bool(names) == (values == 64)
        with model.graph.as_default():
            loss = tf.reduce_sum(model.graph.get_tensor_by_name(model.outputs[0]) ** 2)
            gradients = tf.gradients(loss, model.trainable_variables)
        fetches = [loss, *(g for g in gradients if g is not None)]
        found.append(model.session.run(fetches, {model.inputs[0]: batch()[0]}))
    assert found[0][0] == found[1][0]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("mode", [MODES["regular"], MODES["range learning"]], ids=["regular", "range learning"])
def test_derived_grids_of_biases_stay(mode):
    """They follow from others: neither the bias's values nor an optimizer moves them."""
    net = setup()
    sim = net.sim
    simulation = sim.backend.simulate_trainable(net.model, sim.plan, sim.table, mode)
    train(simulation.model, steps=4)
    derived = [s for s in sim.plan.quantized if isinstance(sim.plan[s].decision, Derived)]
    found, trained = simulation.get(), read_params(simulation.float_model(), derived)
    assert derived
    for site in derived:
        assert not np.array_equal(trained[site], sim.params[site])
        assert found[site].equals(sim.table[site]), site


LOOPS = [
    pytest.param(kind, mode, id=f"{kind}-{name}")
    for i, kind in enumerate(["session", "references", "frozen"])
    for j, (name, mode) in enumerate(MODES.items())
    if WHOLE or (i + j) % 3 == 0
]


@pytest.mark.parametrize(("kind", "mode"), LOOPS)
def test_a_session_s_loop_trains(kind, mode):
    net = setup(kind, weights="int4", activations="uint4")
    simulation = net.simulation(mode)
    model = simulation.model
    assert np.array_equal(model(net.sample), net.simulated())
    assert holds(simulation, net.table)
    losses = train(model)
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    table, after = simulation.get(), simulation.float_model()
    assert type(after.kind) is type(net.model.kind)
    for site in net.sim.plan.parameters:
        value = read_params(after, [site])[site]
        assert not np.array_equal(value, read_params(net.model, [site])[site])
        if mode.range_learning:
            assert table[site].frozen
            assert not table[site].equals(net.table[site])
        else:
            assert table[site].equals(encoding_of_weights(value, net.sim.plan.spec(site)))
    changed = [s for s in net.sim.plan.activations if not table[s].equals(net.table[s])]
    assert bool(changed) is mode.range_learning
    again = net.sim.backend.simulate(after, net.sim.plan, table)
    assert np.array_equal(again.model(net.sample), model(net.sample))
    from bitwright.backend import Tap

    (output,) = net.sim.graph.outputs
    assert np.array_equal(simulation.session([Tap(output)]).run({"x:0": net.sample})[Tap(output)], model(net.sample))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_function_trains_in_eager_code(mode):
    net = setup("function", weights="int4", activations="uint4")
    simulation = net.simulation(mode)
    function = simulation.model.function
    names = {v.name.partition(":")[0] for v in function.trainable_variables}
    assert {"conv1/kernel", "fc/kernel", "fc/bias"} <= names
    assert any("log_scale" in n for n in names) is mode.range_learning
    assert not any("moving" in n for n in names)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, function(x)))
        found = tape.gradient(loss, function.trainable_variables)
        for variable, gradient in zip(function.trainable_variables, found, strict=True):
            variable.assign_sub(0.05 * gradient)
        return loss

    losses = [float(step(*map(tf.constant, batch(seed=seed)))) for seed in range(40)]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    again = net.sim.backend.simulate(simulation.float_model(), net.sim.plan, simulation.get())
    assert np.array_equal(again.model(net.sample), function(net.sample).numpy())


def test_a_written_graph_trains_without_bitwright(tmp_path):
    """Gradients survive .meta and checkpoint: they are the same in a process that doesn't know bitwright."""
    net = setup("trained")
    model = net.simulation(Training(True)).model
    x, y = batch()
    with model.graph.as_default():
        loss = model.graph.get_tensor_by_name("loss:0")
        fetches = [g for g in tf.gradients(loss, model.trainable_variables) if g is not None]
        expected = model.session.run(fetches, {"x:0": x, "labels:0": y})
        v1.train.Saver().save(model.session, str(tmp_path / "qat"))
    np.savez(tmp_path / "data.npz", x=x, y=y, **{str(i): g for i, g in enumerate(expected)})
    script = """
        import sys
        import numpy as np, tensorflow as tf
        v1 = tf.compat.v1
        folder = sys.argv[1]
        data = np.load(folder + "/data.npz")
        with tf.Graph().as_default(), v1.Session() as session:
            v1.train.import_meta_graph(folder + "/qat.meta").restore(session, folder + "/qat")
            loss = session.graph.get_tensor_by_name("loss:0")
            variables = v1.trainable_variables()
            gradients = [g for g in tf.gradients(loss, variables) if g is not None]
            assert len(gradients) > 20
            step = v1.train.GradientDescentOptimizer(0.05).minimize(loss)
            feed = {"x:0": data["x"], "labels:0": data["y"]}
            for i, gradient in enumerate(session.run(gradients, feed)):
                np.testing.assert_allclose(gradient, data[str(i)], rtol=1e-5, atol=1e-7)
            losses = [session.run([loss, step], feed)[0] for _ in range(20)]
        assert losses[-1] < losses[0], losses
        assert any("log_scale" in v.name for v in variables)
        assert not any(m.startswith("bitwright") for m in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_quantsim_takes_what_was_trained():
    net = setup("session", weights="int4", activations="uint4")
    model = net.sim.trainable(range_learning=True)
    net.sim.predict(net.sample)  # not stepped yet: no obstacle
    train(model, steps=10)
    found = model(net.sample)
    with pytest.raises(InputError, match=r"trained and not taken.*take\(\)"):
        net.sim.predict(net.sample)
    net.sim.take()
    assert all(e.frozen for e in net.sim.encodings.values())
    again = net.sim.backend.simulate(net.sim.native, net.sim.plan, net.sim.encodings)
    assert np.array_equal(again.model(net.sample), found)


def test_training_goes_on_in_another_process(tmp_path):
    """From the simulation as it was before and a Saver's checkpoint, optimizer included; nothing is calibrated."""
    net = setup("session", weights="int4", activations="uint4")
    net.sim.save(tmp_path / "before")
    x, y = batch()

    def opened(model):
        with model.graph.as_default():
            labels = v1.placeholder(tf.int64, (None,))
            logits = model.graph.get_tensor_by_name(model.outputs[0])
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
            step = v1.train.AdamOptimizer(0.02, name="qat").minimize(loss)
            saver = v1.train.Saver()
        model.initialize()
        return saver, lambda: model.session.run(step, {model.inputs[0]: x, labels: y})

    def held(model):
        with model.graph.as_default():
            return {v.name: value for v in v1.global_variables() for value in [model.session.run(v)]}

    model = net.sim.trainable(range_learning=True)
    saver, step = opened(model)
    step()
    with model.graph.as_default():
        saver.save(model.session, str(tmp_path / "step"))
    saved = held(model)
    step()
    sim = QuantSim.load(tmp_path / "before")
    other = sim.trainable(range_learning=True)
    saver, step = opened(other)
    with other.graph.as_default():
        saver.restore(other.session, str(tmp_path / "step"))
    found = held(other)
    assert set(found) <= set(saved) and any("qat" in name for name in found)
    assert all(np.array_equal(found[name], saved[name]) for name in found)
    step()
    assert any(not np.array_equal(value, saved[name]) for name, value in held(other).items())
    sim.take()
    with pytest.raises(CapabilityError, match=r"can't be pickled.*QuantSim\.load.*Saver"):
        pickle.dumps(model)


def test_frozen_grids_stay():
    net = setup("session")
    frozen = {s: e.with_(frozen=True) for s, e in net.table.items()}
    for mode in (Training(), Training(True)):
        simulation = net.sim.backend.simulate_trainable(net.model, net.sim.plan, frozen, mode)
        train(simulation.model, steps=3)
        assert holds(simulation, frozen)


def test_a_grid_that_isn_t_min_max_keeps_its_ratio():
    net = setup("session")
    weight = net.sim.graph.linear_ops[0].weight
    table = {s: e.with_(scale=e.scale * np.float32(0.8)) if s == weight else e for s, e in net.table.items()}
    simulation = net.sim.backend.simulate_trainable(net.model, net.sim.plan, table, Training())
    assert simulation.get()[weight].equals(table[weight])
    train(simulation.model, steps=3)
    value = read_params(simulation.float_model(), [weight])[weight]
    expected = encoding_of_weights(value, net.sim.plan.spec(weight)).scale * 0.8
    assert np.allclose(simulation.get()[weight].scale, expected, rtol=1e-6)


def test_set_while_training():
    """Numbers may change, and None bypasses; another kind of grid is refused, and nothing has changed then."""
    net = setup("session")
    simulation = net.simulation(Training(True))
    train(simulation.model, steps=3)
    assert not holds(simulation, net.table)
    simulation.set(net.table)
    assert holds(simulation, net.table)
    weight = net.sim.graph.linear_ops[0].weight
    blocks = encoding_of_weights(read_params(net.model, [weight])[weight], SPECS["bfloat16"])
    with pytest.raises(EncodingError, match="new trainable simulation"):
        simulation.set({"x:0": None, weight: blocks})
    assert simulation.get()["x:0"].equals(net.table["x:0"])
    simulation.set(dict.fromkeys(net.table))
    assert not simulation.get()
    plain = net.sim.backend.simulate(simulation.float_model(), net.sim.plan, {})
    assert np.array_equal(simulation.model(net.sample), plain.model(net.sample))


def test_gradients_of_scales_are_evened_out():
    """With `gradient_scale`, by 1/√(N·Q), N the elements that share the scale in this very batch."""
    net = setup("trained")
    x, y = batch()
    found = {}
    for mode in (Training(True), Training(True, True)):
        model = net.simulation(mode).model
        with model.graph.as_default():
            # Batch norms in inference have no gradient to their statistics.
            variables = {v.op.name: v for v in model.trainable_variables if "moving" not in v.op.name}
            fetches = tf.gradients(model.graph.get_tensor_by_name("loss:0"), list(variables.values()))
        found[mode] = dict(zip(variables, model.session.run(fetches, {"x:0": x, "labels:0": y}), strict=True))
    plain, evened = found.values()
    assert np.allclose(plain["conv1/kernel"], evened["conv1/kernel"], rtol=1e-5, atol=1e-7)
    shapes = {
        "x/quantizer/log_scale": (x.size, net.table["x:0"]),
        "act1/quantizer/log_scale": (24 * 4 * 4 * 8, net.table["act1:0"]),
    }
    for name, (elements, encoding) in shapes.items():
        assert np.allclose(evened[name], plain[name] * lsq_factor(elements, encoding.grid), rtol=1e-4)


def test_training_leaves_the_float_model_alone():
    net = setup("trained")
    before = {n: v.copy() for n, v in net.model.values.items()}
    meta = net.model.copy_meta()
    train(net.simulation(Training(True)).model, steps=2)
    assert net.model.meta == meta
    assert all(np.array_equal(net.model.values[n], v) for n, v in before.items())


def test_tied_tables_train():
    """An embedding that is read as rows; its scale is learned where it is read."""

    def build(net, ids):
        table = net.variable("table", 11, 6)
        return net.dense("fc", tf.nn.relu(tf.gather(table, tf.cast(tf.abs(ids), tf.int32)), name="act"), 4)

    net = setup("session", build, (), weights="int8")
    simulation = net.simulation(Training(True))
    model = simulation.model
    with model.graph.as_default():
        loss = tf.reduce_mean(tf.square(model.graph.get_tensor_by_name(model.outputs[0])))
        variables = {v.op.name: v for v in model.trainable_variables}
        made = zip(variables, tf.gradients(loss, list(variables.values())), strict=True)
        found = {name: gradient for name, gradient in made if gradient is not None}
        found = model.session.run(found, {"x:0": net.sample})
    assert {"table", "table/quantizer/log_scale", "act/quantizer/log_scale", "fc/kernel"} <= set(found)
    assert all(np.isfinite(g).all() for g in found.values())
    assert all(np.abs(found[n]).max() > 0 for n in ("table", "table/quantizer/log_scale", "fc/kernel")), found
