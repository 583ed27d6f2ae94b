"""Which tensors have a known range or are scores, and how they are calibrated by default."""

import numpy as np
import pytest

from bitwright.calibration import activation_encodings, scheme
from bitwright.data._dataset import ArrayDataset
from bitwright.graph import OpKind
from bitwright.grids import QuantSpec
from bitwright.placement import build_plan
from bitwright.placement._known_ranges import known_ranges
from bitwright.statistics import HistogramStatistic, RangeStatistic
from bitwright.testing.builder import Builder
from bitwright.testing.harness import Quiet
from bitwright.testing.reference import ReferenceBackend


def ends(encoding):
    return float(encoding.minimum), float(encoding.maximum)


def attention(outputs=True):
    """Scores, attention, a product with values; a gate; class scores with a bias of their own; class probabilities."""
    b = Builder(0)
    x = b.input("x", 6, 8)
    scores = b.matmul("scores", b.linear("q", x, 8), b.transpose("kt", b.linear("k", x, 8), 0, 2, 1))
    mixed = b.matmul("mix", b.softmax("attend", scores), b.linear("v", x, 8))
    gate = b.activation("gate", b.linear("g", mixed, 8), "Sigmoid")
    gated = b.binary("gated", "Mul", mixed, b.binary("squared", "Mul", gate, gate))
    logits = b.binary(
        "biased", "Add", b.linear("head", b.flatten("flat", gated), 5, bias=False), np.ones(5, np.float32)
    )
    return b.build(logits, b.softmax("classes", b.linear("other", gated, 4)))


def test_schemes_follow_what_values_are_read_for():
    graph = attention().graph
    plan = build_plan(graph, "default")
    found = {s.removesuffix(".output"): plan.scheme_of(s) for s in plan.activations}
    assert found["scores"] == "scores", "a softmax reads it"
    assert found["attend"] == "mse" and found["gate"] == found["squared"] == "mse"
    assert found["classes"] == "minmax", "probabilities that a user reads"
    assert found["biased"] == "scores" and found["other"] == "scores"
    assert {found[n] for n in ("x", "q", "v", "mix", "gated")} == {"sqnr"}
    for chosen in ("minmax", "mse", "percentile:99.9"):
        plan = build_plan(graph, "default", scheme=chosen)
        assert {plan.scheme_of(s) for s in plan.activations} == {chosen}


def test_what_a_sigmoid_reads_counts_as_scores_where_its_values_are_handed_out():
    b = Builder(0)
    x = b.input("x", 4, 6, 6)
    gated = b.linear("mid", b.binary("mul", "Mul", x, b.activation("gate", b.conv("g", x, 4, pad=1), "Sigmoid")), 6)
    scores = b.activation("score", b.conv("cls", gated, 3, pad=1), "Sigmoid")
    sure = b.activation("sure", b.conv("obj", gated, 3, pad=1), "Sigmoid")
    boxes = b.conv("box", b.relu("wide", gated), 3, pad=1)
    together = b.concat("all", [b.binary("both", "Mul", scores, sure), boxes])
    plan = build_plan(b.build(b.flatten("out", together)).graph, "default")
    found = {s.removesuffix(".output"): plan.scheme_of(s) for s in plan.activations}
    assert found["cls"] == found["obj"] == "scores"
    assert found["g"] == "sqnr" and found["gate"] == "mse"


def test_what_has_a_range():
    b = Builder(0)
    x = b.input("x", 4, 6, 6)
    tanh = b.activation("tanh", x, "Tanh")
    pooled = b.global_pool("pool", b.pool("max", tanh, 2))
    both = b.concat("both", [b.flatten("flat", pooled), b.flatten("raw", b.global_pool("gap", x))])
    exponential = b.activation("exp", b.flatten("all", x), "Exp")
    total = b.op("sum", OpKind.ELEMENTWISE, "ReduceSum", (exponential,), (None, 1))
    written = b.binary("written", "Div", exponential, total)
    other = b.binary("other", "Div", exponential, exponential)
    clipped = b.clip("clip", x, 0, 6)
    constant = b.binary("shifted", "Add", tanh, 3.0)
    graph = b.build(both, written, other, clipped, constant).graph
    assert known_ranges(graph) == {
        tanh: (-1, 1), "max.output": (-1, 1), pooled: (-1, 1), "flat.output": (-1, 1), written: (0, 1), clipped: (0, 6),
    }  # fmt: skip


def test_scores_keep_the_largest_value_and_clip_the_smallest():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(50_000), [-500, 30]]).astype(np.float32)
    for symmetric in (False, True):
        spec = QuantSpec(8, signed=symmetric, symmetric=symmetric)
        h = HistogramStatistic()
        h.update(x)
        found = {n: ends(scheme(n).encoding(h, spec)) for n in ("scores", "sqnr")}
        assert found["scores"][1] == pytest.approx(30, rel=0.02)
        assert found["sqnr"][1] < 20
        assert found["scores"][0] > -35


@pytest.mark.parametrize("name", ["sqnr", "mse", "scores"])
def test_fine_grids_keep_everything(name):
    """From 12 bits on the range is min-max's, and rare values survive: never worse than min-max.

    From 15 bits on a histogram tells whether an activation has codes to spare for wider values (`test_room.py`).
    """
    x = np.concatenate([np.random.default_rng(0).standard_normal(50_000), [1000, -800]]).astype(np.float32)
    for bits in (12, 14, 15, 16):
        spec = QuantSpec(bits, signed=False, symmetric=False)
        assert isinstance(scheme(name).statistic(spec)(), RangeStatistic if bits < 15 else HistogramStatistic)
        found, whole = (scheme(n).of_array(x, spec) for n in (name, "minmax"))
        assert np.array_equal(found.fake_quantize(x), whole.fake_quantize(x))
    coarse = scheme(name).statistic(QuantSpec(10, signed=False, symmetric=False))()
    assert isinstance(coarse, HistogramStatistic)


def test_a_histogram_of_some_values_knows_the_largest_of_all():
    """Scores of 20,000 classes are thinned; the one large value of the batch lies where none is counted."""
    b = Builder(0)
    x = b.input("x", 1, 20_000)
    model = b.build(b.softmax("softmax", b.binary("scores", "Mul", x, 1.0)))
    backend = ReferenceBackend()
    graph = backend.graph(model)
    plan = build_plan(graph, "default")
    data = np.random.default_rng(0).standard_normal((4, 1, 20_000)).astype(np.float32)
    data[1, 0, 12_346] = data[2, 0, 778] = 25
    dataset = ArrayDataset({"x": data}, 2)
    found = activation_encodings(backend, model, plan, model.params, {}, dataset, Quiet())
    assert ends(found["scores.output"])[1] == pytest.approx(25, rel=0.02)
    assert ends(found["x"])[1] < 15
