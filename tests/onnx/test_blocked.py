"""Sites in the layout of ONNX Runtime's convolutions: the same bits, from a graph that doesn't reorder around them."""

import builders as b
import numpy as np
import onnx
import pytest

from bitwright import QuantSim
from bitwright.backend import Picking, Places, Tap, picked
from bitwright.grids import Encoding, PerChannel
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.simulate import blocked, session
from bitwright_onnx.simulate.simulation import LASTING


def residual_net(channels: int = 24) -> onnx.ModelProto:
    """Convolutions, plain and depthwise, of channels that don't fill a block, a sum, and a gate that broadcasts."""
    m = b.ModelBuilder()
    m.input("x", ["n", 3, 12, 12])
    m.output("y", ["n", 5])

    def conv(x, y, cin, cout, kernel=3, group=1):
        m.node("Conv", [x, m.weight(f"{y}.w", cout, cin // group, kernel, kernel), m.weight(f"{y}.b", cout)], y,
               pads=[kernel // 2] * 4, group=group)  # fmt: skip
        return y

    conv("x", "c1", 3, channels)
    m.node("Relu", ["c1"], "r1")
    conv("r1", "c2", channels, channels, group=channels)
    m.node("HardSigmoid", ["c2"], "h2")
    conv("h2", "c3", channels, channels, 1)
    m.node("Add", ["r1", "c3"], "sum")
    conv("sum", "c4", channels, channels, 1)
    m.node("GlobalAveragePool", ["c4"], "pool")
    conv("pool", "gate", channels, channels, 1)
    m.node("Mul", ["c4", "gate"], "gated")
    conv("gated", "c5", channels, 16)
    m.node("GlobalAveragePool", ["c5"], "mean")
    m.node("Flatten", ["mean"], "flat")
    m.node("Gemm", ["flat", m.weight("fc.w", 16, 5), m.weight("fc.b", 5)], "y")
    return m.build()


NET = residual_net()
X = b.image(3, 3, 12, 12)
SOON = 1e-9
"""`BLOCKED_AFTER` of sessions that are made anew at their second run."""


@pytest.fixture
def written(monkeypatch):
    """For each session made anew, how many reorderings its graph had and has; None where no site was kept blocked."""
    found, kept_last, keep, make = [], [], blocked.keep_blocked, session.blocked_session

    def reordered(model):
        return sum(node.op_type.startswith("Reorder") for node in model.graph.node)

    def kept(model):
        before = reordered(model)
        done = keep(model)
        kept_last[:] = [(before, reordered(model)) if done else None]
        return done

    def made(*given):
        done = make(*given)
        found.extend(kept_last)
        return done

    monkeypatch.setattr(blocked, "keep_blocked", kept)
    monkeypatch.setattr(session, "blocked_session", made)
    return found


@pytest.mark.parametrize(
    "types", [{}, {"activations": "uint16"}, {"activations": "int4", "weights": "int4"}, {"activations": "float16"},
              {"activations": "uint8:dynamic"}, {"target": "per_tensor"}]
)  # fmt: skip
def test_results_are_the_same_bits(types, written, monkeypatch):
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    sim = QuantSim(NET, **types).calibrate({"x": X})
    taps = [Tap(t) for t in ("r1", "c2", "sum", "gated", "y")]
    for run in (sim.simulation.session(taps), sim.simulation.session([Tap("y")])):
        results = [run.run({"x": X}) for _ in range(4)]
        for tap, value in results[0].items():
            for other in results[1:]:
                np.testing.assert_array_equal(other[tap], value)
    assert len(written) == 2, "each session once"
    if types.get("activations") != "uint8:dynamic":
        # Out of the blocks goes what HardSigmoid, the gate and the end read, and what is tapped.
        assert written[1][1] <= 7 < 11 <= written[1][0]


@pytest.mark.parametrize("channels", [24, 32])
def test_taps_of_the_float_network_are_the_same_bits(channels, written, monkeypatch):
    """Extremes of channels that fill blocks, and of others, in which lie zeros that aren't values; and some values."""
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    net = residual_net(channels)
    for bias in net.graph.initializer:
        if bias.name == "c3.b":
            bias.CopyFrom(onnx.numpy_helper.from_array(np.full(channels, 1000, np.float32), "c3.b"))
    model = OnnxBackend().adopt(net)
    names = ("x", "r1", "c2", "h2", "c3", "sum", "gated", "c5")
    taps = [Tap(t, "minmax") for t in (*names, "y")] + [Tap(t, axis=1, step=7) for t in names]
    taps += [Tap("c2", "minmax", 1), Tap("sum", axis=1, step=11), Tap("sum")]
    run = session.OrtSession(model, taps, blocked=True)
    results = [run.run({"x": X}) for _ in range(4)]
    assert len(written) == 1 and written[0][1] < written[0][0]
    for tap, value in results[0].items():
        for other in results[1:]:
            np.testing.assert_array_equal(other[tap], value)
    lowest, highest = results[-1][Tap("c3", "minmax")]
    whole = session.OrtSession(model, [Tap("c3")]).run({"x": X})[Tap("c3")]
    np.testing.assert_allclose([lowest, highest], [whole.min(), whole.max()], rtol=1e-5)
    assert lowest > 900, "no zero of a block that isn't full"


@pytest.mark.parametrize("channels", [24, 32])
def test_places_are_those_of_the_whole_tensor(channels, written, monkeypatch):
    """Before and after tensors stay in their blocks; other places in each sample, from any number on."""
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    assert isinstance(OnnxBackend(), Picking)
    rng = np.random.default_rng(4)
    names = ("x", "r1", "c2", "h2", "sum", "c5")
    places = [Places(n, rng.integers(0, 144, (5, count))) for n, count in enumerate((1, 4, 9, 9, 20, 7))]
    some = [Tap(t, axis=1, places=p) for t, p in zip(names, places, strict=True)]
    others = [Tap(t) for t in names] + [Tap(t, axis=1, step=7) for t in names]
    model = OnnxBackend().adopt(residual_net(channels))
    run = OnnxBackend().picking_session(model, [*some, *others])
    alone = OnnxBackend().picking_session(model, some)
    assert len(written) == 2, "at once"
    plain = session.OrtSession(model, [*some, *others])
    expected = plain.run_at({"x": X}, dict.fromkeys(some, 3))
    for tap, value in run.run_at({"x": X}, dict.fromkeys(some, 3)).items():
        np.testing.assert_array_equal(value, expected[tap], err_msg=tap.tensor)
    for n in range(4):
        first = {tap: n * 3 + i for i, tap in enumerate(some)}
        found, lone = run.run_at({"x": X}, first), alone.run_at({"x": X}, first)
        for tap in some:
            expected = picked(found[Tap(tap.tensor)], tap, first[tap])
            assert expected.shape == (len(X), expected.shape[1], tap.places.table.shape[1])
            np.testing.assert_array_equal(found[tap], expected, err_msg=tap.tensor)
            np.testing.assert_allclose(lone[tap], expected, rtol=1e-4, atol=1e-5, err_msg=tap.tensor)
            at = tap.places.table[(first[tap] + 2) % 5]
            whole = found[Tap(tap.tensor)][2].reshape(expected.shape[1], -1)
            np.testing.assert_array_equal(found[tap][2], whole[:, at], err_msg=tap.tensor)
    assert len(written) == 2
    assert written[1][1] < written[1][0], "what is picked alone needn't leave the blocks"


@pytest.mark.parametrize(("axis", "sizes"), [(1, [6, 5]), (2, [6, 5]), (-1, [4, 3, 5]), (2, [4, 3, 5])])
def test_places_wherever_the_channels_lie(axis, sizes):
    """Of tokens, whose channels lie last; in the midst of others they are picked outside of the graph."""
    m = b.ModelBuilder()
    m.input("x", ["n", *sizes])
    m.output("y", ["n", *sizes])
    m.node("Neg", ["x"], "mid")
    m.node("Relu", ["mid"], "y")
    x = np.random.default_rng(0).normal(size=(7, *sizes)).astype(np.float32)
    positions = np.prod(sizes) // x.shape[axis]
    tap = Tap("mid", axis=axis, places=Places("some", np.random.default_rng(1).integers(0, positions, (3, 2))))
    run = OnnxBackend().picking_session(OnnxBackend().adopt(m.build()), [tap, Tap("y")])
    for first in (0, 2, 100):
        found = run.run_at({"x": x}, {tap: first})[tap]
        for n, sample in enumerate(-x):
            flat = np.moveaxis(sample, (axis % x.ndim) - 1, 0).reshape(x.shape[axis], -1)
            np.testing.assert_array_equal(found[n], flat[:, tap.places.table[(first + n) % 3]])


def test_whole_tensors_leave_the_blocks_once(written, monkeypatch):
    """Nothing copies them again behind what brings them out, unless it is read by other ops or handed out itself."""
    nodes, keep = [], blocked.keep_blocked

    def kept(graph):
        done = keep(graph)
        nodes.append([n.op_type for n in graph.graph.node])
        return done

    monkeypatch.setattr(blocked, "keep_blocked", kept)
    model = OnnxBackend().adopt(residual_net(32))
    taps = [Tap("sum"), Tap("c5"), Tap("c3", "minmax")]
    for given in (taps, [*taps, Tap("c4")]):  # which a product that broadcasts reads as it is
        found = session.OrtSession(model, given, blocked="at once").run({"x": X})
        for tap, value in session.OrtSession(model, given).run({"x": X}).items():
            np.testing.assert_array_equal(found[tap], value, err_msg=tap.tensor)
    assert len(written) == 2
    assert [ops.count("Reshape") for ops in nodes] == [0, 1]


@pytest.mark.parametrize("reduced", [False, True])
def test_memory_is_taken_by_a_pattern_where_the_plain_session_takes_it_so(reduced, monkeypatch):
    """Of a calibration the second run would take all of it anew."""
    patterns, make = [], session.blocked_session

    def made(proto, options, again, left_out):
        patterns.append((options.enable_mem_pattern, again.enable_mem_pattern))
        return make(proto, options, again, left_out)

    monkeypatch.setattr(session, "blocked_session", made)
    sim = QuantSim(NET).calibrate({"x": X})
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    taps = [Tap("y"), *([Tap("r1", "minmax")] if reduced else [])]
    run = sim.simulation.session(taps)
    [run.run({"x": X}) for _ in range(2)]
    assert patterns == [(not reduced, not reduced)]


def test_it_follows_later_encodings(written, monkeypatch):
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    sim = QuantSim(NET).calibrate({"x": X})
    simulated = sim.backend.simulate(sim.native, sim.plan, sim.table)
    model = simulated.model
    before = [model.run({"x": X})["y"] for _ in range(2)][1]
    assert len(written) == 1
    grid = sim.encodings["r1"]
    simulated.set({"r1": grid.with_(scale=grid.scale * 4)})
    [model.run({"x": X}) for _ in range(2)]
    assert len(written) == 2
    simulated.set({"r1": grid.with_(scale=grid.scale * 8)})
    coarse = model.run({"x": X})["y"]
    assert not np.array_equal(coarse, before) and len(written) == 2, "activations' numbers are fed"
    np.testing.assert_array_equal(coarse, simulated.session([Tap("y")]).run({"x": X})[Tap("y")])
    simulated.set({"r1": None})
    assert not np.array_equal(model.run({"x": X})["y"], coarse), "a site is bypassed"
    weight = sim.encodings["c3.w"]
    simulated.set({"r1": grid, "c3.w": weight.with_(scale=weight.scale * 4)})
    assert not np.array_equal(model.run({"x": X})["y"], before), "parameters are constants: it was made anew"
    simulated.set({"c3.w": weight})
    np.testing.assert_array_equal(model.run({"x": X})["y"], before)


def test_sessions_that_last_a_few_runs_are_not_made_anew(written, monkeypatch):
    """A search that quantizes one weight after the other makes a session for each."""
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    monkeypatch.setattr(session, "BRIEF_AFTER", np.inf)
    sim = QuantSim(NET).calibrate({"x": X})
    simulated = sim.backend.simulate(sim.native, sim.plan, sim.table)
    run = simulated.session([Tap("y")]).run
    weights = [root for root in sim.table if root in sim.graph.params][:4]
    for weight in weights:
        simulated.set({weight: None})
        [run({"x": X}) for _ in range(3)]
    assert len(written) == 1, "the first, which might have lasted"
    [run({"x": X}) for _ in range(LASTING)]
    simulated.set({weights[0]: sim.table[weights[0]]})
    [run({"x": X}) for _ in range(3)]
    assert len(written) == 2, "the one before it lasted"


def test_what_stands_against_it_leaves_the_session_that_runs(monkeypatch):
    tried = []

    def refused(**given):
        tried.append(given)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    monkeypatch.setattr("tempfile.mkdtemp", refused)
    model = QuantSim(NET).calibrate({"x": X}).model
    first = model.run({"x": X})["y"]
    for _ in range(3):
        np.testing.assert_array_equal(model.run({"x": X})["y"], first)
    assert tried
    tried.clear()
    tap = Tap("c2", axis=1, places=Places("some", np.array([[0, 5], [7, 11]])))
    model = OnnxBackend().adopt(NET)
    found = OnnxBackend().picking_session(model, [tap]).run_at({"x": X}, {tap: 1})[tap]
    assert tried
    whole = session.OrtSession(model, [Tap("c2")]).run({"x": X})[Tap("c2")]
    np.testing.assert_array_equal(found, picked(whole, tap, 1))


def test_models_without_convolutions_and_large_ones_are_left_alone(written, monkeypatch):
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    mlp = b.mlp()
    name = mlp.graph.input[0].name
    x = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
    model = QuantSim(mlp).calibrate({name: x}).model
    [model.run({name: x}) for _ in range(3)]
    monkeypatch.setattr(session, "BLOCKED_BYTES", 1000)
    model = QuantSim(NET).calibrate({"x": X}).model
    [model.run({"x": X}) for _ in range(3)]
    assert written == []


def test_a_scale_for_each_channel_is_not_blocked(written, monkeypatch):
    """In blocks, channels lie elsewhere than the scales say."""
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    sim = QuantSim(NET).calibrate({"x": X})
    scales = np.linspace(0.01, 0.05, 24, dtype=np.float32)
    channels = Encoding(8, True, True, scales, np.zeros(24, np.int32), PerChannel(1))
    simulated = sim.backend.simulate(sim.native, sim.plan, sim.table)
    simulated.set({"r1": channels})
    model = simulated.model
    first, second = (model.run({"x": X})["y"] for _ in range(2))
    np.testing.assert_array_equal(second, first)
    assert len(written) == 1 and written[0] is not None


def test_codes_that_others_read_are_not_blocked(monkeypatch):
    """There is no way back for codes: a pair of the model's own, one of whose codes is an output."""
    m = b.ModelBuilder()
    m.input("x", ["n", 3, 12, 12])
    m.output("y", ["n", 16, 12, 12])
    m.node("Conv", ["x", m.weight("w", 16, 3, 3, 3)], "c", pads=[1] * 4)
    scale, zero = m.const("scale", np.float32(0.05)), m.const("zero", np.uint8(128))
    m.node("QuantizeLinear", ["c", scale, zero], "q")
    m.node("DequantizeLinear", ["q", scale, zero], "d")
    m.node("Conv", ["d", m.weight("w2", 16, 16, 1, 1)], "y")
    model = OnnxBackend().adopt(m.build())
    monkeypatch.setattr(session, "BLOCKED_AFTER", SOON)
    taps = [Tap("q"), Tap("y"), Tap("c", "minmax")]
    run = session.OrtSession(model, taps, blocked=True)
    first, second = (run.run({"x": X}) for _ in range(2))
    for tap in taps:
        np.testing.assert_array_equal(second[tap], first[tap])


def test_bypassed_sites_keep_ops_apart_in_every_session():
    """ONNX Runtime adds to a convolution what nothing parts from it, which changes bits."""
    sim = QuantSim(NET).calibrate({"x": X})
    bypassed = dict.fromkeys(sim.plan.activations)
    changed = sim.backend.simulate(sim.native, sim.plan, sim.table)
    model = changed.model
    model.run({"x": X})
    changed.set(bypassed)
    fresh = sim.backend.simulate(sim.native, sim.plan, sim.table)
    fresh.set(bypassed)
    np.testing.assert_array_equal(fresh.model.run({"x": X})["y"], model.run({"x": X})["y"])
