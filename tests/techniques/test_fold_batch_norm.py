import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.graph import OpKind
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques.fold_batch_norm import FoldBatchNorm

BACKEND = ReferenceBackend()


def fold(model, **options):
    return run_technique(FoldBatchNorm(), BACKEND, model, **options)


def difference(model, changed, samples=6):
    batch = models.batch(model, samples, seed=3)
    before, after = model(batch), changed(batch)
    assert list(before) == list(after)
    return max(float(np.abs(before[t] - after[t]).max() / max(np.abs(before[t]).max(), 1)) for t in before)


def norms(model):
    return [op.id for op in model.graph if op.kind is OpKind.BATCH_NORM]


def test_numbers_of_the_worked_example():
    b = Builder()
    x = b.conv("conv", b.input("x", 1, 1, 1), 1, 1, weight=np.full((1, 1, 1, 1), 2.0), bias=np.array([0.5]))
    one = [np.array([v]) for v in (3.0, 1.0, 0.25, 4.0)]
    model = b.build(b.batch_norm("bn", x, gamma=one[0], beta=one[1], mean=one[2], var=one[3]))
    done = fold(model)
    assert done.outcome.params["conv.weight"].item() == pytest.approx(2.9999963, rel=1e-6)
    assert done.outcome.params["conv.bias"].item() == pytest.approx(1.3749995, rel=1e-6)
    assert done.outcome.folded["conv"][0].item() == 3.0
    assert done.outcome.folded["conv"][1].item() == 1.0
    assert difference(model, done.model) < 1e-6
    assert norms(done.model) == []


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["conv", "depthwise", "grouped", "transposed", "grouped transposed", "conv1d", "linear"]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
    gamma=st.sampled_from(["random", "zero", "negative"]),
    tiny=st.booleans(),
)
def test_backward_keeps_the_function(kind, bias, seed, gamma, tiny):
    b = Builder(seed)
    if kind == "linear":
        x = b.linear("op", b.input("x", 6), 8, bias=bias)
    elif kind == "conv1d":
        x = b.conv("op", b.input("x", 4, 9), 8, pad=1, bias=bias)
    else:
        groups = {"depthwise": 4, "grouped": 2, "grouped transposed": 2}.get(kind, 1)
        x = b.conv(
            "op", b.input("x", 4, 5, 5), 8, pad=1, groups=groups, transposed="transposed" in kind, stride=2, bias=bias
        )
    g = b.rng.uniform(0.5, 2, 8) * {"random": b.rng.choice([-1, 1], 8), "zero": 0, "negative": -1}[gamma]
    x = b.batch_norm("bn", x, gamma=g, var=np.full(8, 1e-12) if tiny else None, epsilon=1e-5)
    model = b.build(b.relu("relu", x))
    done = fold(model)
    assert norms(done.model) == []
    assert difference(model, done.model) < 1e-5
    assert done.outcome.report.figures["backward"] == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [True, False])
def test_forward_into_conv_and_linear(seed, bias):
    b = Builder(seed)
    x = b.relu("relu", b.batch_norm("bn1", b.input("x", 4, 6, 6)))
    x = b.conv("conv", b.batch_norm("bn2", x), 6, bias=bias)
    x = b.flatten("flatten", b.global_pool("pool", x))
    model = b.build(b.linear("fc", b.batch_norm("bn3", b.activation("tanh", x, "Tanh")), 3, bias=bias))
    done = fold(model)
    assert norms(done.model) == ["bn1"]
    assert done.outcome.report.figures == {"backward": 0, "forward": 2, "standalone": 1, "left": 0}
    assert difference(model, done.model) < 1e-5
    assert done.outcome.folded == {}


@pytest.mark.parametrize("options", [{"pad": 1}, {"groups": 2}, {"transposed": True}])
def test_forward_is_refused_where_it_would_be_wrong(options):
    b = Builder()
    model = b.build(b.conv("conv", b.batch_norm("bn", b.input("x", 4, 6, 6)), 6, **options))
    done = fold(model)
    assert norms(done.model) == ["bn"]
    assert done.outcome.params.keys() == {"bn.gamma", "bn.beta", "bn.mean", "bn.var"}
    assert difference(model, done.model) < 1e-6
    values = done.model.params
    assert not values["bn.mean"].any()
    assert np.allclose(values["bn.var"] + 1e-5, 1)


def test_backward_wins_and_chains_of_norms_fold():
    b = Builder(2)
    x = b.conv("conv1", b.input("x", 3, 6, 6), 4)
    x = b.batch_norm("bn2", b.batch_norm("bn1", x))
    x = b.conv("conv2", x, 5)
    model = b.build(b.batch_norm("bn3", x))
    done = fold(model)
    assert norms(done.model) == []
    assert done.outcome.report.figures["backward"] == 3
    assert np.array_equal(done.outcome.folded["conv1"][0], model.params["bn2.gamma"])
    assert difference(model, done.model) < 1e-5
    assert done.model.graph.outputs == model.graph.outputs


def test_branches_shared_weights_and_outputs_stay():
    b = Builder(3)
    x = b.conv("conv1", b.input("x", 3, 6, 6), 4, pad=1)
    y = b.batch_norm("bn1", x)  # x is read twice
    x = b.binary("add", "Add", x, y)
    shared = b.rng.normal(size=(4, 4, 1, 1))
    p = b.batch_norm("bn2", b.conv("conv2", x, 4, 1, weight=shared, bias=False))
    q = b.conv("conv3", x, 4, 1, weight=shared, bias=False)
    model = b.build(b.binary("sum", "Add", p, q))
    graph_ops = [
        op if op.id != "conv3" else type(op)(**{**_fields(op), "params": {"weight": "conv2.weight"}})
        for op in model.graph.ops
    ]
    from bitwright.testing.reference import rebuild

    model = rebuild(model, graph_ops)
    done = fold(model)
    assert norms(done.model) == ["bn1", "bn2"]
    remarks = {row[0]: row[3] for row in done.outcome.report.rows}
    assert "used elsewhere" in remarks["bn1"]
    assert "shares its weight" in remarks["bn2"]
    assert difference(model, done.model) < 1e-5


def _fields(op):
    return {name: getattr(op, name) for name in op.__dataclass_fields__}


def test_shared_bias_is_split():
    from dataclasses import replace

    from bitwright.graph import ParamRole
    from bitwright.testing.reference import rebuild

    b = Builder(4)
    x = b.input("x", 3, 4, 4)
    p = b.batch_norm("bn", b.conv("conv1", x, 4, 1))
    model = b.build(b.binary("add", "Add", p, b.conv("conv2", x, 4, 1)))
    ops = [
        replace(op, params={**op.params, ParamRole.BIAS: "conv1.bias"}) if op.id == "conv2" else op
        for op in model.graph.ops
    ]
    model = rebuild(model, ops)
    done = fold(model)
    assert norms(done.model) == []
    assert difference(model, done.model) < 1e-5


def test_settings_and_idempotence():
    model = models.conv_bn_relu(1)
    off = fold(model, backward=False, forward=False, standalone=False)
    assert off.outcome.params == {}
    assert not off.outcome.edits
    assert off.outcome.report.figures["left"] == 3
    done = fold(model)
    again = fold(done.model)
    assert again.outcome.params == {}
    assert again.outcome.report.summary == "the model has no batch norm"


def test_frozen_weight_encodings_are_respected():
    model = models.conv_bn_relu(1)
    first = fold(model, backward=False, forward=False, standalone=False)
    frozen = {"conv1.weight": first.context.encodings["conv1.weight"].with_(frozen=True)}
    done = fold(model, encodings=frozen)
    assert norms(done.model) == ["bn1"]
    assert done.outcome.params.keys() & {"conv1.weight", "conv1.bias"} == set()
    assert "frozen" in {r[0]: r[3] for r in done.outcome.report.rows}["bn1"]
