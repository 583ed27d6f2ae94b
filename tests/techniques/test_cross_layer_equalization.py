import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import InputError
from bitwright.graph import OpKind
from bitwright.grids import QuantSpec
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques.channel_chains import find_chains
from bitwright_techniques.cross_layer_equalization import CrossLayerEqualization, _balanced
from bitwright_techniques.fold_batch_norm import FoldBatchNorm

BACKEND = ReferenceBackend()


def equalize(model, **options):
    return run_technique(CrossLayerEqualization(), BACKEND, model, **options)


def difference(model, changed, seed=3):
    batch = models.batch(model, 6, seed)
    before, after = model(batch), changed(batch)
    return max(float(np.abs(before[t] - after[t]).max() / max(np.abs(before[t]).max(), 1)) for t in before)


def column(*values):
    return np.array(values, float).reshape(-1, 1, 1, 1)


def test_pair_of_the_worked_example():
    b = Builder()
    x = b.linear("a", b.input("x", 2), 2, weight=np.array([[4, -1], [0.25, 0.1]]), bias=np.array([1, -0.5]))
    model = b.build(b.linear("b", b.relu("relu", x), 1, weight=np.array([[1.0, -4.0]]), bias=False))
    done = equalize(model).outcome
    assert np.allclose(done.params["a.weight"], [[2, -0.5], [1, 0.4]], rtol=1e-6)
    assert np.allclose(done.params["a.bias"], [0.5, -2], rtol=1e-6)
    assert np.allclose(done.params["b.weight"], [[2, -1]], rtol=1e-6)
    assert done.report.figures["largest_scale"] == pytest.approx(4)


def test_depthwise_triple_of_the_worked_example():
    b = Builder()
    x = b.conv("a", b.input("x", 1, 2, 2), 2, 1, weight=column(8, 1), bias=np.ones(2))
    x = b.conv("d", b.relu("r1", x), 2, 1, groups=2, weight=column(1, 1), bias=np.ones(2))
    weight = np.array([1, 27.0]).reshape(1, 2, 1, 1)
    model = b.build(b.conv("b", b.relu("r2", x), 1, 1, weight=weight, bias=False))
    done = equalize(model).outcome
    for name in "adb":
        assert np.allclose(done.params[f"{name}.weight"].ravel(), [2, 3], rtol=1e-6)
    assert np.allclose(done.params["a.bias"], [0.25, 3], rtol=1e-6)
    assert np.allclose(done.params["d.bias"], [0.5, 9], rtol=1e-6)


def _random_chain(b, kinds, activations, shape):
    x = b.input("x", *shape)
    for i, (kind, act) in enumerate(zip(kinds, activations, strict=True)):
        channels = b.shape(x)[1]
        spread = lambda n: np.exp(b.rng.normal(0, 1.5, n))
        if kind == "depthwise":
            w = b.rng.normal(size=(channels, 1, 3, 3)) * spread((channels, 1, 1, 1))
            x = b.conv(f"l{i}", x, channels, 3, pad=1, groups=channels, weight=w)
        elif kind == "transposed":
            w = b.rng.normal(size=(channels, 5, 3, 3)) * spread((1, 5, 1, 1))
            x = b.conv(f"l{i}", x, 5, 3, pad=1, transposed=True, weight=w)
        else:
            w = b.rng.normal(size=(6, channels, 3, 3)) * spread((6, 1, 1, 1))
            x = b.conv(f"l{i}", x, 6, 3, pad=1, weight=w)
        if act == "relu":
            x = b.relu(f"a{i}", x)
        elif act == "prelu":
            x = b.prelu(f"a{i}", x, b.rng.uniform(0, 0.5, b.shape(x)[1]))
        elif act == "leaky":
            x = b.prelu(f"a{i}", x)
        elif act == "max pool":
            x = b.pool(f"a{i}", x, 3, pad=1)
        elif act == "average pool":
            x = b.pool(f"a{i}", x, 3, stride=1, pad=1, type="Average")
    return x


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), iterations=st.integers(1, 8))
def test_function_is_unchanged_and_ranges_become_equal(data, seed, iterations):
    kinds = data.draw(st.lists(st.sampled_from(["conv", "depthwise", "transposed"]), min_size=2, max_size=5))
    acts = st.sampled_from(["relu", "prelu", "leaky", "none", "max pool", "average pool"])
    b = Builder(seed)
    x = _random_chain(b, kinds, [data.draw(acts) for _ in kinds], (3, 5, 5))
    end = data.draw(st.sampled_from(["flatten", "global", "none"]))
    if end != "none":
        x = b.flatten("flatten", x) if end == "flatten" else b.global_pool("gap", x, keepdims=False)
        x = b.linear("fc", x, 4)
    model = b.build(x)
    done = equalize(model, iterations=iterations, absorb_high_bias=False)
    assert difference(model, done.model) < 1e-5
    assert done.outcome.report.figures["sets"] >= 1 or kinds[1:] == []


@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_ranges_of_both_layers_are_equal_after_scaling(layer):
    b = Builder(1)
    model = b.build(_random_chain(b, [layer, "conv"], ["relu", "none"], (6, 5, 5)))
    done = equalize(model).outcome
    first = np.abs(done.params["l0.weight"]).max(axis=(1, 2, 3))
    second = np.abs(done.params["l1.weight"]).max(axis=(0, 2, 3))
    assert np.allclose(first, second, rtol=1e-6)


def test_zero_and_negligible_channels_keep_their_scale():
    b = Builder()
    w1 = np.array([[1.0, 2.0], [0.0, 0.0], [1e-9, -1e-9]])
    x = b.relu("relu", b.linear("a", b.input("x", 2), 3, weight=w1, bias=np.array([0.1, 0.5, 0.7])))
    model = b.build(b.linear("b", x, 2, weight=np.array([[0.5, 1, 1], [0.1, 2, 1]])))
    done = equalize(model).outcome
    assert np.array_equal(done.params["a.weight"][1:], w1[1:].astype(np.float32))
    assert np.array_equal(done.params["a.bias"][1:], np.float32([0.5, 0.7]))
    assert all(np.isfinite(v).all() for v in done.params.values())


@pytest.mark.parametrize("name", ["residual", "concat_branches"])
def test_branches_end_chains(name):
    model = models.MODELS[name](2)
    done = equalize(model)
    assert difference(model, done.model) < 1e-5
    titles = {row[0] for row in done.outcome.report.rows}
    assert titles == (
        {
            "conv1 → conv2",
        }
        if name == "residual"
        else set()
    )


@pytest.mark.parametrize("activation", ["Sigmoid", "HardSwish", "opaque", "clip at one", "softmax"])
def test_other_activations_end_chains(activation):
    b = Builder()
    x = b.linear("a", b.input("x", 4), 4)
    if activation == "opaque":
        x = b.opaque("act", x)
    elif activation == "softmax":
        x = b.softmax("act", x)
    elif activation == "clip at one":
        x = b.clip("act", x, 1, 6)
    else:
        x = b.activation("act", x, activation)
    done = equalize(b.build(b.linear("b", x, 4)))
    assert done.outcome.params == {}
    assert done.outcome.report.summary == "no layers to equalize"


def test_a_tensor_that_is_also_an_output_is_left_alone():
    b = Builder()
    y = b.linear("a", b.input("x", 4), 4)
    model = b.build(y, b.linear("b", y, 4))
    assert equalize(model).outcome.params == {}


def test_relu6_is_replaced_only_where_equalization_needs_it():
    b = Builder(5)
    x = b.clip("inside", b.conv("a", b.input("x", 3, 6, 6), 4))
    x = b.conv("b", x, 4)
    model = b.build(b.clip("last", x))
    done = equalize(model, clipped_relu="replace")
    kinds = {op.id: op.kind for op in done.model.graph}
    assert kinds["inside"] is OpKind.RELU
    assert kinds["last"] is OpKind.CLIPPED_RELU
    for mode in ("stop", "auto"):  # nothing tells how far channels reach
        kept = equalize(model, clipped_relu=mode)
        assert kept.outcome.params == {}
        assert not kept.outcome.edits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", ["auto", "keep"])
def test_relu6_stays_and_cuts_what_it_cut(seed, mode):
    model = models.depthwise_triple(seed, spread=1.5)
    data = [models.batch(model, 16, s) for s in range(2)]
    done = equalize(model, data=data, clipped_relu=mode, iterations=5)
    assert [op.kind for op in done.model.graph] == [op.kind for op in model.graph]
    assert done.outcome.report.figures["sets"] == 1
    for batch in data:
        before, after = model(batch)["project.output"], done.model(batch)["project.output"]
        assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()
    held = done.outcome.report.figures["held_channels"]
    fixed = np.isclose(done.outcome.params["expand.bias"], model.params["expand.bias"], rtol=1e-6).sum()
    assert 0 < held < 16
    assert fixed <= 8

    def unevenness(params):
        first = np.log(np.abs(params["expand.weight"]).max(axis=(1, 2, 3)))
        middle = np.log(np.abs(params["depthwise.weight"]).max(axis=(1, 2, 3)))
        last = np.log(np.abs(params["project.weight"]).max(axis=(0, 2, 3)))
        return np.square(first) + np.square(middle) + np.square(last)

    assert (unevenness(done.outcome.params) <= unevenness(model.params) + 1e-5).all()
    assert unevenness(done.outcome.params).sum() < unevenness(model.params).sum()


@pytest.mark.parametrize("seed", range(3))
def test_float32_noise_in_the_data_changes_no_weight(seed):
    """How far channels reach is measured, and no two frameworks measure it alike to the last bit."""
    model = models.depthwise_triple(seed, spread=1.5)
    data = models.batch(model, 16, 0)
    noisy = {name: (values * (1 + 2e-7)).astype(np.float32) for name, values in data.items()}
    assert any((noisy[name] != data[name]).any() for name in data)
    one, two = (equalize(model, data=[batch], clipped_relu="keep").outcome.params for batch in (data, noisy))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_folded_batch_norms_tell_how_far_channels_reach():
    b = Builder(3)
    weight = b.rng.normal(size=(4, 5))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)  # of standard normal inputs: standard normal outputs
    x = b.linear("a", b.input("x", 5), 4, weight=weight, bias=False)
    gamma, beta = np.array([0.4, 0.5, 2.0, 1.5]), np.array([0.5, -1.0, 1.0, 3.0])  # the last two reach 9
    x = b.batch_norm("bn", x, gamma=gamma, beta=beta, mean=np.zeros(4), var=np.ones(4))
    model = b.build(b.linear("b", b.clip("clip", x), 3))
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    done = equalize(folded.model, folded=folded.outcome.folded, absorb_high_bias=False)
    assert done.outcome.report.figures["sets"] == 1
    assert done.outcome.report.figures["held_channels"] == 2
    assert not done.outcome.edits
    before, after = (m.params["a.weight"] for m in (folded.model, done.model))
    assert np.array_equal(before[2:], after[2:])
    assert not np.allclose(before[:2], after[:2])
    batch = {"x": np.random.default_rng(0).normal(size=(400, 5)).clip(-1.5, 1.5).astype(np.float32)}
    assert np.abs(done.model(batch)["b.output"] - model(batch)["b.output"]).max() < 1e-4
    with pytest.raises(InputError, match="calibration data"):
        equalize(folded.model, folded=folded.outcome.folded, clipped_relu="keep")


def test_lower_bounds_hold_and_the_rest_is_as_equal_as_can_be():
    logs = np.array([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
    free = np.full((2, 3), -np.inf)
    expected = np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]
    assert np.array_equal(_balanced(logs, free), expected)
    lowest = free.copy()
    lowest[0, 1] = np.inf  # fixed: the second link equalizes the two others
    lowest[1, 2] = 3.0  # bound: the first link follows it
    found = _balanced(logs, lowest)
    assert np.allclose(found[:, 0], expected[:, 0])
    assert np.allclose(found[:, 1], [0, 0.5], atol=1e-9)
    assert np.allclose(found[:, 2], [(2.0 - 0.0 + 3.0) / 2, 3.0], atol=1e-9)


def test_frozen_encodings_and_shared_parameters_are_respected():
    model = models.mlp(1)
    base = equalize(model).context.encodings
    frozen = equalize(model, encodings={"fc1.weight": base["fc1.weight"].with_(frozen=True)})
    assert "fc1.weight" not in frozen.outcome.params
    assert "fc3.weight" in frozen.outcome.params


def test_flatten_maps_each_feature_to_its_channel():
    b = Builder(6)
    x = b.relu("relu", b.conv("conv", b.input("x", 3, 4, 4), 5))
    model = b.build(b.linear("fc", b.reshape("flat", x, 20), 3))
    done = equalize(model)
    first = np.abs(done.outcome.params["conv.weight"]).max(axis=(1, 2, 3))
    second = np.abs(done.outcome.params["fc.weight"]).max(axis=0).reshape(5, 4).max(axis=1)
    assert np.allclose(first, second, rtol=1e-6)
    assert difference(model, done.model) < 1e-5
    assert equalize(model, across_pooling=False).outcome.params == {}


def test_reshape_that_moves_positions_into_samples_ends_a_chain():
    b = Builder(6)
    x = b.relu("relu", b.conv("conv", b.input("x", 3, 4, 4), 5))
    x = b.op("rows", OpKind.RESHAPE, "Reshape", (x,), (None, 5))
    assert equalize(b.build(b.linear("fc", x, 3))).outcome.params == {}


def vgg16():
    b = Builder()
    x = b.input("x", 3, 32, 32)
    for i, width in enumerate([2, 2, "M", 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M"]):
        x = b.pool(f"pool{i}", x, 2, stride=2) if width == "M" else b.relu(f"r{i}", b.conv(f"c{i}", x, width, pad=1))
    for i in (6, 7):
        x = b.identity(f"drop{i}", b.relu(f"rf{i}", b.linear(f"fc{i}", b.flatten("f", x) if i == 6 else x, 16)))
    return b.build(b.linear("fc8", x, 10))


@pytest.mark.parametrize(("pooling", "convolutions", "linear"), [(False, 8, 2), (True, 12, 3)])
def test_sets_of_vgg16(pooling, convolutions, linear):
    graph = vgg16().graph
    sets = find_chains(graph, lambda op: True, lambda tensor: True, pooling=pooling)
    ends = [chain[-1].second.id for chain in sets]
    assert sum(e.startswith("c") for e in ends) == convolutions
    assert sum(e.startswith("fc") for e in ends) == linear


def test_grouped_convolutions_end_a_chain():
    b = Builder()
    x = b.conv("a", b.input("x", 4, 6, 6), 4)
    x = b.conv("b", b.conv("g", x, 4, groups=2), 4)
    model = b.build(b.conv("c", x, 4))
    assert [row[0] for row in equalize(model).outcome.report.rows] == ["b → c"]


def _biased(activation, pad=0, kind="conv", seed=0):
    b = Builder(seed)
    x = b.conv("a", b.input("x", 3, 6, 6), 4, bias=False)
    x = b.batch_norm("bn", x, gamma=np.array([0.1, 0.1, 1, 0.2]), beta=np.array([2.0, 0.2, 1.0, -3.0]))
    x = b.relu("relu", x) if activation else x
    x = b.conv("b", x, 4, 3, pad=pad, groups=4 if kind == "depthwise" else 1, bias=False)
    return b.build(x)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("kind", ["conv", "depthwise"])
def test_high_biases_are_absorbed(activation, kind):
    model = _biased(activation, kind=kind)
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    done = equalize(folded.model, folded=folded.outcome.folded)
    plain = equalize(folded.model, folded=folded.outcome.folded, absorb_high_bias=False)
    drop = plain.outcome.params["a.bias"] - done.outcome.params["a.bias"]
    scale = folded.outcome.folded["a"][1] / plain.outcome.folded["a"][1]
    expected = np.array([1.7, 0, 0, 0] if activation else [2.0, 0.2, 1.0, -3.0]) / scale
    assert np.allclose(drop, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(done.outcome.folded["a"][1], plain.outcome.folded["a"][1] - expected, rtol=1e-5, atol=1e-6)
    # The bound holds for the absorbed channel (its spread is small), so the function stays.
    assert difference(model, done.model) < (1e-5 if not activation else 2e-2)


def test_absorption_needs_folded_statistics_and_exact_borders():
    model = _biased(True, pad=1)
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    assert equalize(folded.model).outcome.report.figures["absorbed_channels"] == 0
    known = {"folded": folded.outcome.folded}
    assert equalize(folded.model, **known).outcome.report.figures["absorbed_channels"] == 0
    forced = equalize(folded.model, absorb_through_padding=True, **known)
    assert forced.outcome.report.figures["absorbed_channels"] == 1


def test_it_lowers_the_error_of_per_tensor_weights():
    model = models.depthwise_triple(3, spread=2.0, relu6=False)
    data = models.batch(model, 16)
    plan = simple_plan(model.graph, weights=QuantSpec(8), activations=None)
    reference = next(iter(model(data).values()))

    def error(applied):
        simulation = BACKEND.simulate(applied.model, plan, applied.encodings)
        return float(np.square(next(iter(simulation.model(data).values())) - reference).mean())

    untouched = run_technique(FoldBatchNorm(), BACKEND, model, [data], plan=plan)
    assert untouched.outcome.params == {}
    assert error(equalize(model, data=[data], plan=plan)) < 0.1 * error(untouched)
