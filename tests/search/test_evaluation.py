"""Evaluations: which are the same, and functions in files."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import onnx
import pytest
from search_net import top1

from bitwright import QuantSim
from bitwright.data import ImplausibleDataWarning
from bitwright.errors import InputError
from bitwright.runs import identity
from bitwright.verify import verify
from bitwright_analysis.analyzer import quant_analyzer
from bitwright_search.auto_quantize import auto_quantize
from bitwright_search.evaluation import ByMetric, FileFunction, Labelled
from bitwright_search.mixed_precision import mixed_precision


def test_evaluations_are_told_apart_by_content(net, tmp_path):
    sim = QuantSim(net.model)
    a, b = (Labelled(net.images, labels).opened(sim) for labels in (net.labels, np.zeros_like(net.labels)))
    assert identity(a) == identity(Labelled(net.images.copy(), net.labels.copy()).opened(sim)) != identity(b)
    f, g, h = (partial(top1, images=net.images, labels=labels) for labels in (net.labels, net.labels + 1, net.labels))
    assert identity(f) == identity(h) != identity(g)
    file = tmp_path / "score.py"
    file.write_text("def score(model):\n    return 1\n")
    one = identity(FileFunction.parse(f"{file}:score"))
    file.write_text("def score(model):\n    return 2\n")
    assert identity(FileFunction(str(file), "score")) != one


def test_searches_warn_of_labels_that_are_guesses(net):
    """A guessing float model loses nothing by quantization, whatever the network."""
    wrong = (net.images, (net.labels + 1) % 5)
    with pytest.warns(ImplausibleDataWarning, match="what guessing among 5 classes gives"):
        auto_quantize(net.model, net.images, wrong, allowed_drop=0.5, schemes=["minmax"])
    with pytest.warns(ImplausibleDataWarning, match="what guessing among 5 classes gives"):
        mixed_precision(net.model, net.images, wrong, candidates=[("int8", "uint8"), ("int4", "uint8")], lite=50)


class Scorer:
    def __init__(self, weight, table=()):
        self.weight, self.table, self.me = weight, table, self

    def __call__(self, model):
        return self.weight

    def score(self, model):
        return self.weight


def closed(value):
    def evaluate(model):
        return value if model else evaluate(model)

    return evaluate


def defaulted(value):
    def evaluate(model, a=value, *, b=value):
        return a + b

    return evaluate


def large(value):
    """Its repr leaves the middle out."""
    found = np.zeros(5000)
    found[2500] = value
    return found


@pytest.mark.parametrize(
    "make",
    [
        Scorer,
        lambda v: Scorer(1, {"a": [large(v)]}),
        lambda v: Scorer(v).score,
        closed,
        lambda v: closed(Scorer(v)),
        defaulted,
        lambda v: partial(top1, images=[large(v)]),
        lambda v: partial(top1, images={"x": large(v)}),
        lambda v: partial(top1, images=(closed(v),)),
    ],
)
def test_what_an_evaluation_holds_counts(make):
    assert identity(make(1)) == identity(make(1)) != identity(make(2))


def test_tensors_count_by_content():
    torch = pytest.importorskip("torch")
    first = torch.zeros(5000, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        a = first.detach().to(dtype)
        b, other = copy.deepcopy(a), copy.deepcopy(a)
        other[2500] = 1
        one, two, three = (identity(partial(top1, images=[x])) for x in (a, b, other))
        assert one == two != three
    assert identity(closed(first)) == identity(closed(first.clone()))


def test_a_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "beside_the_file.py").write_text("VALUE = 3\n")
    file = tmp_path / "scoring_file.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, KW_ONLY\n"
        "from beside_the_file import VALUE\n"
        "@dataclass\nclass S:\n    _: KW_ONLY\n    x: int = VALUE\n"
        "def score(model):\n    return S().x\n"
    )
    assert FileFunction.parse(f"{file}:score")(None) == 3
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        FileFunction.parse(f"{tmp_path / 'bad.py'}:score")


# -- outputs whose first axis isn't samples, or whose last is


def saved(path, nodes, inputs, output, **arrays):
    h = onnx.helper
    graph = h.make_graph(
        nodes, "net", [h.make_tensor_value_info(n, 1, shape) for n, shape in inputs.items()],
        [h.make_tensor_value_info("y", 1, output)],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in arrays.items()],
    )  # fmt: skip
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def one_a_feed(tmp_path):
    """A scalar beside a vector: each feed is one sample, whose output is (classes,)."""
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    nodes = [onnx.helper.make_node("Mul", ["x", "gain"], ["loud"], "loud"),
             onnx.helper.make_node("MatMul", ["loud", "w"], ["y"], "head")]  # fmt: skip
    return saved(tmp_path / "feed.onnx", nodes, {"x": [4], "gain": []}, [3], w=weight)


def feeds(count):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=4).astype(np.float32), "gain": np.float32(1 + 0.1 * i)} for i in range(count)]


def test_each_feed_of_a_vector_of_classes_is_a_sample(one_a_feed):
    data = feeds(12)
    sim = QuantSim(one_a_feed, weights="int4", activations="uint4").calibrate(data)
    p, q = (np.reshape(sim.predict(data, simulated=s)[0], (12, 3)) for s in (False, True))
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    labels = p.argmax(-1)
    found = sim.measure(data, "agreement", "kl", "top1", labels=labels)
    assert (found["agreement"].simulated, found["agreement"].count) == (pytest.approx(same), 12)
    assert (found["top1"].float_model, found["top1"].simulated) == (1.0, pytest.approx(same))
    assert found["kl"].count == 12
    for evaluation in (ByMetric(data, "agreement"), Labelled(data, labels)):
        score = evaluation.opened(sim).score(sim, sim.simulation)
        assert score.value == pytest.approx(same)
        assert score.terms.counts == (1,) * 12


def test_one_value_a_sample_has_no_class(tmp_path):
    """The last axis is samples there: they would be compared with one another, or class 0 be found everywhere."""
    rng = np.random.default_rng(0)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["column"], "head"),
             onnx.helper.make_node("Squeeze", ["column", "axes"], ["y"], "flat")]  # fmt: skip
    model = saved(tmp_path / "one.onnx", nodes, {"x": ["n", 4]}, ["n"], axes=np.array([1]),
                  w=rng.normal(size=(4, 1)).astype(np.float32))  # fmt: skip
    data, labels = rng.normal(size=(16, 4)).astype(np.float32), np.zeros(16, np.int64)
    sim = QuantSim(model).calibrate(data)
    for name in ("agreement", "kl", "top1"):
        with pytest.raises(InputError, match="without an axis of classes"):
            sim.measure(data, name, labels=labels)
    for evaluation in (Labelled(data, labels), ByMetric(data, "agreement")):
        with pytest.raises(InputError, match="without an axis of classes"):
            evaluation.opened(sim).score(sim, sim.simulation)
    with pytest.raises(InputError, match="without an axis of classes"):
        quant_analyzer(sim, data, labels=labels)
    sim.export(tmp_path / "out", name="m")
    with pytest.raises(InputError, match="without an axis of classes"):
        verify(tmp_path / "out", data, labels)
    found = verify(tmp_path / "out", data)
    assert not found.problems
    assert not found.agreement
    assert found.plain.agreement is None
    assert found.sqnr_db["integer_float"] > 20
