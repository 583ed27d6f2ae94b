"""Canonical graphs as ONNX models: equal values under the same names, and a quantized file that is the simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import ModelBuilder
from exactness_nets import NETS

from bitwright import QuantSim
from bitwright.backend import Capability, Tap, capabilities
from bitwright.errors import ModelError
from bitwright.graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    Call,
    Constant,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    Param,
    ParamRole,
    PoolAttrs,
    ProductAttrs,
    Tensor,
)
from bitwright.hookspecs import BackendInfo
from bitwright.plugins import registry
from bitwright.testing.builder import Builder
from bitwright.testing.models import BACKEND_MODELS, MODELS, batch
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.replay import replay
from bitwright.verify import verify
from bitwright_onnx.adapters import NotEmittable, QdqExport, write_graph, written
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.emit.emitter import values_equal
from bitwright_onnx.testing import model_port

R = ParamRole


class EmittingBackend(QdqExport, ReferenceBackend):
    """The reference backend with QDQ files."""


@pytest.fixture
def emitting(monkeypatch):
    """A registry with that backend beside the others."""
    held = registry.Registry()
    held.add(BackendInfo("reference", "", factory=EmittingBackend, suffixes=(".npz",)))
    monkeypatch.setattr(registry, "default_registry", lambda: held)
    return held.backend("reference")


def ran(proto: onnx.ModelProto, feeds):
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


# -- models of the kit


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_kit_computes_the_same(name, tmp_path):
    model = MODELS[name]()
    feeds = batch(model)
    proto = write_graph(model.graph, model.params, tmp_path / "m.onnx")
    for made in (proto, onnx.load(tmp_path / "m.onnx")):
        found = ran(made, feeds)
        for tensor, expected in model(feeds).items():
            np.testing.assert_allclose(found[tensor], expected, rtol=1e-5, atol=1e-5)
    assert {i.name for i in proto.graph.initializer} >= set(model.params)
    assert {o for node in proto.graph.node for o in node.output} >= set(model.graph.tensors) - set(model.graph.inputs)


@pytest.mark.parametrize("options", [{"target": "onnxruntime-cpu"}, {"target": "htp_v73"}, {"weights": "int4"}])
@pytest.mark.parametrize("name", MODELS)
def test_its_quantized_file_is_the_simulation(name, options, emitting, tmp_path):
    model = MODELS[name]()
    data = [batch(model, 8, seed) for seed in range(2)]
    sim = QuantSim(model, **options).apply("fold_batch_norm").calibrate(data)
    bundle = sim.export(tmp_path, name="m")
    assert set(bundle.files) >= {"model", "qdq"}
    result = verify(tmp_path, data[0])
    assert not result.problems
    assert result.recorded
    differing = [t.name for t in result.tensors if t.exact_differs]
    assert not differing or result.uncovered
    pairs = emitting.pairs(bundle)
    assert {bundle.names.get(s, s) for s in sim.plan.quantized} >= set(pairs) - {"x"}
    assert set(sim.plan.quantized) - {t.removesuffix("_dequantized") for t in pairs} == set()


def test_what_a_backend_gains():
    assert [*EmittingBackend().formats()] == [*ReferenceBackend().formats(), "qdq"]
    offered = capabilities(EmittingBackend()) - capabilities(ReferenceBackend())
    assert offered == {Capability.INTEGER_RUNTIME, Capability.QUANTIZED_ARTEFACT, Capability.OP_TIMER}


# -- channels last


def turned(model):
    """A model of the kit with its images' channels last: the same parameters and values, other axes."""
    graph = model.graph

    def axes(tensor):
        shape = graph.tensors[tensor].shape
        return (0, *range(2, len(shape)), 1) if len(shape) > 2 else tuple(range(len(shape)))

    def place(axis, tensor):
        return axes(tensor).index(axis % len(graph.tensors[tensor].shape))

    tensors = {
        t: Tensor(t, tuple(known.shape[i] for i in axes(t)), known.dtype, len(known.shape) - 1)
        for t, known in graph.tensors.items()
    }
    ops = []
    for op in graph:
        attrs, x = op.attrs, op.data_inputs[0]
        if isinstance(attrs, BatchNormAttrs):
            attrs = replace(attrs, axis=place(attrs.axis, x))
        if isinstance(attrs, AxisAttrs):
            attrs = AxisAttrs(place(attrs.axis, x))
        if isinstance(attrs, PoolAttrs):
            attrs = replace(attrs, axes=tuple(place(a, x) for a in attrs.axes))
        ops.append(replace(op, attrs=attrs))
    return replace(model, graph=Graph(ops, tensors, graph.params, graph.inputs, graph.outputs))


def last(feeds):
    return {k: np.moveaxis(v, 1, -1) for k, v in feeds.items()}


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mlp"}))
def test_channels_last(name, emitting, tmp_path):
    model = MODELS[name]()
    feeds = batch(model)
    found = ran(write_graph(turned(model).graph, model.params), last(feeds))
    for tensor, expected in model(feeds).items():
        moved = np.moveaxis(expected, 1, -1) if expected.ndim > 2 else expected
        np.testing.assert_allclose(found[tensor], moved, rtol=1e-5, atol=1e-5)
    sim = QuantSim(turned(model), target="onnxruntime-cpu").calibrate([last(feeds)])
    assert "qdq" in sim.export(tmp_path, name="m").files
    assert not verify(tmp_path, last(feeds)).problems


# -- ops one by one


def net(kind, type, x, expected, *, attrs=None, call=None, params=None, axis=None, dtype="float32", free=True):
    """A graph of one op, with its parameters by role, and what it has to compute."""
    params = params or {}
    values = {f"p.{role.value}": np.asarray(v, np.float32) for role, v in params.items()}
    shape = (None, *x.shape[1:]) if free else x.shape
    result = (None, *expected.shape[1:]) if free else expected.shape
    tensors = {"x": Tensor("x", shape, str(x.dtype), axis), "y": Tensor("y", result, dtype, axis)}
    op = Op("op", kind, type, ("x",), ("y",), {role: f"p.{role.value}" for role in params}, attrs, call=call)
    graph = Graph([op], tensors, {p: Param(p, v.shape) for p, v in values.items()}, ["x"], ["y"])
    return graph, values, x, expected


def normal(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def over(x, axes, epsilon=1e-3):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


X, IMAGE, LAST = normal(2, 6), normal(2, 4, 6, 6), normal(2, 6, 6, 4)
G, B = normal(4), normal(4)
K = OpKind


def average(x, k):
    return x.reshape(*x.shape[:2], x.shape[2] // k, k, x.shape[3] // k, k).mean((3, 5))


WINDOW = ConvAttrs((2, 2), (2, 2), (1, 1), ((0, 0), (0, 0)))
ONE_OP = {
    "transpose": lambda: net(
        K.TRANSPOSE, "Transpose", IMAGE, IMAGE.transpose(0, 2, 3, 1), call=Call({"perm": (0, 2, 3, 1)})
    ),
    "reshape": lambda: net(K.RESHAPE, "Reshape", X, X.reshape(2, 3, 2)),
    "reshape to a literal": lambda: net(
        K.RESHAPE, "Reshape", X, X.reshape(2, 3, 2), call=Call(operands={1: Constant([-1, 3, 2])})
    ),
    "flatten": lambda: net(K.RESHAPE, "Flatten", IMAGE, IMAGE.reshape(2, -1)),
    "unsqueeze": lambda: net(K.RESHAPE, "Unsqueeze", X, X[:, None]),
    "expand": lambda: net(
        K.RESHAPE, "Expand", X[:, None], np.broadcast_to(X[:, None], (2, 3, 6)),
        call=Call(operands={1: Constant([1, 3, 1])}),
    ),
    "tile": lambda: net(K.RESHAPE, "Tile", X, np.tile(X, (1, 3)), call=Call(operands={1: Constant([1, 3])})),
    "slice": lambda: net(
        K.SLICE, "Slice", IMAGE, IMAGE[:, 1:3, ::2],
        call=Call(operands={1: Constant([1, 0]), 2: Constant([3, 6]), 3: Constant([1, 2]), 4: Constant([1, 2])}),
    ),
    "gather": lambda: net(
        K.SLICE, "Gather", IMAGE, IMAGE[:, [2, 0]], call=Call({"axis": 1}, {1: Constant([2, 0])})
    ),
    "pad": lambda: net(
        K.PAD, "Pad", IMAGE, np.pad(IMAGE, ((0, 0), (0, 0), (1, 0), (0, 2)), constant_values=0.5),
        call=Call({"mode": "constant"}, {1: Constant([0, 0, 1, 0, 0, 0, 0, 2]), 2: Constant(0.5)}),
    ),
    "reflecting pad": lambda: net(
        K.PAD, "Pad", IMAGE, np.pad(IMAGE, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect"),
        call=Call({"mode": "reflect"}, {1: Constant([0, 0, 1, 1, 0, 0, 1, 1])}),
    ),
    "nearest resize": lambda: net(
        K.RESIZE, "Resize", IMAGE, IMAGE.repeat(2, 2).repeat(3, 3), axis=1,
        call=Call({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
                  {2: Constant([1.0, 1.0, 2.0, 3.0])}),
    ),
    "resize, channels last": lambda: net(
        K.RESIZE, "Resize", LAST, LAST.repeat(2, 1).repeat(3, 2), axis=3,
        call=Call({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor",
                   "axes": (1, 2)}, {3: Constant([12, 18])}),
    ),
    "resize to odd sizes, channels last": lambda: net(
        K.RESIZE, "Resize", LAST, LAST[:, [0, 0, 1, 2, 2, 3, 4, 4, 5]][:, :, [0, 2, 4]], axis=3,
        call=Call({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor",
                   "axes": (1, 2)}, {3: Constant([9, 3])}),
    ),
    "space to depth": lambda: net(
        K.RESHAPE, "SpaceToDepth", LAST, LAST.reshape(2, 3, 2, 3, 2, 4).swapaxes(2, 3).reshape(2, 3, 3, 16),
        axis=3, call=Call({"blocksize": 2}),
    ),
    "depth to space": lambda: net(
        K.RESHAPE, "DepthToSpace", LAST, LAST.reshape(2, 6, 6, 2, 2, 1).swapaxes(2, 3).reshape(2, 12, 12, 1),
        axis=3, call=Call({"blocksize": 2, "mode": "DCR"}),
    ),
    "layer norm": lambda: net(
        K.LAYER_NORM, "LayerNormalization", LAST, over(LAST, (3,)) * G + B, attrs=AxisAttrs(3),
        call=Call({"epsilon": 1e-3}), params={R.GAMMA: G, R.BETA: B},
    ),
    "layer norm without scale": lambda: net(
        K.LAYER_NORM, "LayerNormalization", LAST, over(LAST, (2, 3)), attrs=AxisAttrs(2), call=Call({"epsilon": 1e-3})
    ),
    "rms norm": lambda: net(
        K.NORM, "RMSNormalization", LAST, LAST / np.sqrt((LAST**2).mean(-1, keepdims=True) + 1e-3) * G,
        call=Call({"epsilon": 1e-3, "axis": -1}), params={R.GAMMA: G},
    ),
    "group norm": lambda: net(
        K.NORM, "GroupNormalization", IMAGE,
        over(IMAGE.reshape(2, 2, -1), (2,)).reshape(IMAGE.shape) * G[:, None, None] + B[:, None, None], axis=1,
        call=Call({"epsilon": 1e-3, "num_groups": 2}), params={R.GAMMA: G, R.BETA: B},
    ),
    "instance norm, channels last": lambda: net(
        K.NORM, "InstanceNormalization", LAST, over(LAST, (1, 2)) * G + B, axis=3,
        call=Call({"epsilon": 1e-3}), params={R.GAMMA: G, R.BETA: B},
    ),
    "batch norm without scale, channels last": lambda: net(
        K.BATCH_NORM, "BatchNormalization", LAST, (LAST - G) / np.sqrt(B**2 + 1e-3), axis=3,
        attrs=BatchNormAttrs(1e-3, 3), params={R.MEAN: G, R.VAR: B**2},
    ),
    "lp norm": lambda: net(
        K.NORM, "LpNormalization", X, X / np.linalg.norm(X, axis=-1, keepdims=True), call=Call({"axis": -1, "p": 2})
    ),
    "clip": lambda: net(K.ACTIVATION, "Clip", X, X.clip(-0.5, 0.7), attrs=ActivationAttrs(-0.5, 0.7)),
    "leaky relu": lambda: net(K.PRELU, "LeakyRelu", X, np.where(X < 0, X * 0.3, X), attrs=ActivationAttrs(alpha=0.3)),
    "prelu, channels last": lambda: net(
        K.PRELU, "PRelu", LAST, np.where(LAST < 0, LAST * G, LAST), axis=3, params={R.SLOPE: G}
    ),
    "prelu": lambda: net(
        K.PRELU, "PRelu", IMAGE, np.where(IMAGE < 0, IMAGE * G[:, None, None], IMAGE), axis=1, params={R.SLOPE: G}
    ),
    "swish": lambda: net(K.ACTIVATION, "Swish", X, X / (1 + np.exp(-X))),
    "hard sigmoid": lambda: net(K.ACTIVATION, "HardSigmoid", X, np.clip(X / 6 + 0.5, 0, 1)),
    "gelu by tanh": lambda: net(
        K.ACTIVATION, "Gelu", X, 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
        call=Call({"approximate": "tanh"}),
    ),
    "elu": lambda: net(K.ACTIVATION, "Elu", X, np.where(X > 0, X, 0.5 * np.expm1(X)), call=Call({"alpha": 0.5})),
    "softmax": lambda: net(
        K.SOFTMAX, "Softmax", IMAGE, np.exp(IMAGE) / np.exp(IMAGE).sum(1, keepdims=True), attrs=AxisAttrs(1)
    ),
    "from a constant": lambda: net(
        K.ELEMENTWISE, "Sub", X, 1 - X, params={R.CONSTANT: 1.0}, call=Call(operands={0: R.CONSTANT})
    ),
    "constant behind": lambda: net(K.ELEMENTWISE, "Sub", X, X - 2, params={R.CONSTANT: 2.0}),
    "power of a literal": lambda: net(K.ELEMENTWISE, "Pow", X, X**3, call=Call(operands={1: Constant(3.0)})),
    "sum": lambda: net(
        K.ELEMENTWISE, "ReduceSum", IMAGE, IMAGE.sum((1, 3)), call=Call({"keepdims": 0}, {1: Constant([1, 3])})
    ),
    "mean over time": lambda: net(
        K.AVERAGE_POOL, "ReduceMean", IMAGE[0], IMAGE[0].mean(1), attrs=PoolAttrs((1,), keepdims=False)
    ),
    "global mean, channels last": lambda: net(
        K.AVERAGE_POOL, "ReduceMean", LAST, LAST.mean((1, 2)), attrs=PoolAttrs((1, 2), keepdims=False)
    ),
    "global maximum": lambda: net(
        K.MAX_POOL, "GlobalMaxPool", IMAGE, IMAGE.max((2, 3), keepdims=True), attrs=PoolAttrs((2, 3)), axis=1
    ),
    "average pool": lambda: net(
        K.AVERAGE_POOL, "AveragePool", IMAGE, average(IMAGE, 2), axis=1, attrs=PoolAttrs(window=WINDOW)
    ),
    "max pool by its call, channels last": lambda: net(
        K.MAX_POOL, "MaxPool", LAST, LAST.reshape(2, 3, 2, 3, 2, 4).max((2, 4)), axis=3,
        call=Call({"kernel_shape": (2, 2), "strides": (2, 2)}),
    ),
    "cumulative sum": lambda: net(
        K.ELEMENTWISE, "CumSum", X, X.cumsum(1), call=Call(operands={1: Constant(np.array(1, np.int64))})
    ),
    "cast": lambda: net(K.ELEMENTWISE, "Cast", X, X.astype(np.int32), dtype="int32"),
    "embedding": lambda: net(
        K.EMBEDDING, "Gather", np.array([[1, 0], [3, 2]]), normal(4, 5)[[[1, 0], [3, 2]]],
        params={R.WEIGHT: normal(4, 5)},
    ),
    "linear on three axes": lambda: net(
        K.LINEAR, "MatMul", LAST[0], LAST[0] @ normal(3, 4).T + normal(3),
        params={R.WEIGHT: normal(3, 4), R.BIAS: normal(3)},
    ),
    "product with a constant in front": lambda: net(
        K.MATMUL, "MatMul", IMAGE[0], normal(5, 6) @ IMAGE[0], params={R.CONSTANT: normal(5, 6)},
        call=Call(operands={0: R.CONSTANT}),
    ),
    "einsum": lambda: net(
        K.MATMUL, "Einsum", IMAGE[0], np.einsum("bij,jk->bki", IMAGE[0], normal(6, 5)),
        params={R.CONSTANT: normal(6, 5)}, call=Call({"equation": "bij,jk->bki"}),
    ),
    "where": lambda: net(
        K.ELEMENTWISE, "Where", X, np.where([True, False] * 3, X, -1).astype(np.float32),
        call=Call(operands={0: Constant([True, False] * 3), 2: Constant(-1.0)}),
    ),
    "concatenated with a constant": lambda: net(
        K.CONCAT, "Concat", IMAGE[:1], np.concatenate([B.reshape(1, 4, 1, 1).repeat(6, 2), IMAGE[:1]], 3),
        attrs=AxisAttrs(3), params={R.CONSTANT: B.reshape(1, 4, 1, 1).repeat(6, 2)},
        call=Call(operands={0: R.CONSTANT}), free=False,
    ),
    "an opaque op with a call": lambda: net(K.OPAQUE, "Tanh", X, np.tanh(X), call=Call()),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_OP)
def test_an_op_computes_what_its_attributes_say(name):
    graph, values, x, expected = ONE_OP[name]()
    found = ran(write_graph(graph, values), {"x": x})["y"]
    assert found.dtype == np.dtype(graph.tensors["y"].dtype)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_several_inputs_and_outputs():
    x, y = normal(2, 6, 4), normal(2, 6, 4)
    tensors = {t: Tensor(t, s) for t, s in {
        "x": (None, 6, 4), "y": (None, 6, 4), "a": (None, 2, 4), "b": (None, 4, 4), "s": (None, 2, 6, 4),
        "p": (None, 6, 6), "q": (None, 4, 4), "i": (None, 6, 6), "m": (None, 6, 4),
    }.items()}  # fmt: skip
    ops = [
        Op("split", K.SPLIT, "Split", ("x",), ("a", "b"), attrs=AxisAttrs(1)),
        Op("stack", K.CONCAT, "Concat", ("x", "y"), ("s",), attrs=AxisAttrs(1), call=Call({"new_axis": 1})),
        Op("product", K.MATMUL, "MatMul", ("x", "y"), ("p",), attrs=ProductAttrs((False, True))),
        Op("gram", K.MATMUL, "MatMul", ("x", "y"), ("q",), attrs=ProductAttrs((True, False))),
        Op("pass", K.IDENTITY, "Dropout", ("p",), ("i",)),
        Op("mean", K.ELEMENTWISE, "Mean", ("x", "y"), ("m",)),
    ]
    graph = Graph(ops, tensors, {}, ["x", "y"], ["a", "b", "s", "p", "q", "i", "m", "x"])
    found = ran(write_graph(graph, {}), {"x": x, "y": y})
    p = x @ y.transpose(0, 2, 1)
    expected = {"a": x[:, :2], "b": x[:, 2:], "s": np.stack([x, y], 1), "p": p, "i": p, "q": x.transpose(0, 2, 1) @ y}
    for name, value in {**expected, "m": (x + y) / 2}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_one_table_read_as_rows_and_as_a_matrix():
    """A weight that an embedding and a linear op share is one initializer."""
    table = normal(5, 4)
    tensors = {"t": Tensor("t", (None, 3), "int64"), "e": Tensor("e", (None, 3, 4)), "y": Tensor("y", (None, 3, 5))}
    ops = [
        Op("look", K.EMBEDDING, "Gather", ("t",), ("e",), {R.WEIGHT: "table"}),
        Op("head", K.LINEAR, "MatMul", ("e",), ("y",), {R.WEIGHT: "table"}),
    ]
    graph = Graph(ops, tensors, {"table": Param("table", (5, 4))}, ["t"], ["y"])
    rows = np.array([[0, 4, 2]])
    proto = write_graph(graph, {"table": table})
    np.testing.assert_allclose(ran(proto, {"t": rows})["y"], table[rows] @ table.T, rtol=1e-5)
    assert [i.name for i in proto.graph.initializer] == ["table"]


# -- what isn't written


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lambda: net(K.TRANSPOSE, "Transpose", IMAGE, IMAGE.transpose(0, 2, 3, 1)), "it has no `perm`"),
        (lambda: net(K.SLICE, "Slice", X, X[:, :2]), r"no starts \(operand 1\), no ends"),
        (lambda: net(K.LAYER_NORM, "LayerNormalization", X, X, attrs=AxisAttrs(1)), "it has no `epsilon`"),
        (lambda: net(K.MAX_POOL, "MaxPool", IMAGE, average(IMAGE, 2)), "it has no PoolAttrs"),
        (lambda: net(K.OPAQUE, "Tanh", X, X), "doesn't say what it computes"),
        (lambda: net(K.ACTIVATION, "Squareplus", X, X), "ONNX has no operator Squareplus"),
        (lambda: net(K.MATMUL, "MatMul", X, X, attrs=ProductAttrs(None)), "it contracts other axes"),
    ],
)
def test_what_lacks_something_says_what(graph, reason):
    made, values, *_ = graph()
    with pytest.raises(NotEmittable, match=rf"op 'op' \(\w+\), .*{reason}") as caught:
        write_graph(made, values)
    assert (caught.value.op, caught.value.type) == ("op", made.op("op").type)


def test_all_that_cannot_be_written_is_named_at_once():
    b = Builder()
    x = b.opaque("first", b.input("x", 4), "Foo")
    model = b.build(b.opaque("second", x, "Bar"))
    with pytest.raises(NotEmittable, match=r"op 'first' \(Foo\).*; op 'second' \(Bar\)"):
        write_graph(model.graph, model.params)


def test_a_name_means_one_thing():
    b = Builder()
    model = b.build(b.linear("fc", b.input("fc.weight", 4), 3))
    with pytest.raises(Exception, match=r"'fc.weight' names a tensor and a parameter"):
        write_graph(model.graph, model.params)


def test_an_op_that_computes_something_else_is_seen(emitting):
    """The written model is compared with the backend's own, tensor by tensor, before anybody uses it."""
    model = MODELS["residual"]()
    wrong = [
        replace(op, attrs=replace(op.attrs, pads=((2, 0), (1, 1)))) if op.id == "conv1" else op for op in model.graph
    ]
    graph = model.graph
    other = Graph(wrong, graph.tensors, graph.params, graph.inputs, graph.outputs)
    emitting.graph = lambda m: other
    with pytest.raises(Exception, match=r"tensor 'conv1.output', the output of 'conv1' \(Conv\), has other values"):
        written(emitting, model)


def cancelling():
    """Differences of sums ten million times as large, which two runtimes round differently."""
    b, rng = Builder(), np.random.default_rng(0)
    row = rng.normal(size=2048)
    weights = np.float32([1e3 * (1 + row), 1e3 * (1 + row) + 1e-4 * rng.normal(size=2048)])
    sums = b.linear("sums", b.input("x", 2048), 2, weight=weights, bias=False)
    differences = b.linear("differences", sums, 1, weight=np.float32([[1, -1]]), bias=False)
    return b.build(b.prelu("act", differences)), {"x": (1 + rng.uniform(size=(16, 2048))).astype(np.float32)}


def test_ops_are_judged_on_equal_inputs_where_rounding_has_grown(emitting):
    model, feeds = cancelling()
    made = written(emitting, model, sample=feeds)
    (end,) = model.graph.outputs
    tap, twin = Tap(end), Tap(made.names.get(end, end))
    ours = emitting.session(model, [tap]).run(feeds)[tap]
    assert not values_equal(ours, OnnxBackend().session(made.model, [twin]).run(feeds)[twin]), "else nothing is judged"
    wrong = [replace(op, attrs=ActivationAttrs(alpha=0.3)) if op.id == "act" else op for op in model.graph]
    other = Graph(wrong, model.graph.tensors, model.graph.params, model.graph.inputs, model.graph.outputs)
    emitting.graph = lambda m: other
    with pytest.raises(ModelError, match=r"the output of 'act'"):
        written(emitting, model, sample=feeds)


def test_a_model_that_cannot_be_written_is_exported_without(emitting, tmp_path):
    b = Builder()
    model = b.build(b.opaque("odd", b.relu("act", b.linear("fc", b.input("x", 4), 3)), "Tanh"))
    feeds = batch(model)
    sim = QuantSim(model).calibrate([feeds])
    with pytest.warns(UserWarning, match=r"m.qdq.onnx isn't written: not emittable as ONNX: op 'odd' \(Tanh\)"):
        assert "qdq" not in sim.export(tmp_path, name="m").files


# -- graphs of ONNX models

NOT_WRITTEN = {}


@pytest.mark.parametrize("name", NETS)
def test_graphs_of_onnx_models_are_complete(name):
    """What the ONNX backend shows of a model says all that it computes."""
    backend = OnnxBackend()
    proto, data = NETS[name]()
    model = backend.adopt(proto)
    if name in NOT_WRITTEN:
        with pytest.raises(NotEmittable, match=NOT_WRITTEN[name]):
            written(backend, model, sample=data)
        return
    made = written(backend, model, sample=data)
    assert set(backend.graph(made.model).params) >= set(backend.graph(model).params)


def _f(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


NODES = {
    "a norm's factors are tensors": ("LayerNormalization", [_f(2, 3, 4), _f(4), _f(4)], {}, 20),
    "a batch norm's statistics are tensors": ("BatchNormalization", [_f(2, 3, 4), *[np.abs(_f(3))] * 4], {}, 20),
    "a norm that ONNX has from a later opset on": ("RMSNormalization", [_f(2, 3, 4), _f(4)], {"axis": -1}, 23),
    "attention, a later operator": ("Attention", [_f(1, 2, 3, 4)] * 3, {"is_causal": 1}, 23),
    "types of a later version": ("BitShift", [np.int32([1, 2]), np.int32([1, 1])], {"direction": "LEFT"}, 28),
    "a sum over all axes": ("ReduceSum", [_f(2, 3)], {"keepdims": 0}, 20),
    "no axes, which means none": ("ReduceSum", [_f(2, 3), np.int64([])], {"noop_with_empty_axes": 1}, 20),
    "factors are tensors": ("Resize", [_f(1, 2, 3, 3), None, np.float32([1, 1, 2, 2])], {"mode": "nearest"}, 20),
    "a part of a shape": ("Shape", [_f(2, 3, 4)], {"start": 1, "end": 2}, 20),
    "slopes are a tensor": ("PRelu", [_f(2, 3), _f(3)], {}, 20),
    "bounds are tensors": ("Clip", [_f(2, 3), np.float32(-1), np.float32(1)], {}, 20),
    "the largest values of images": ("GlobalMaxPool", [_f(1, 2, 3, 3)], {}, 20),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_an_operator_is_written_with_whatever_operands_onnx_has(name):
    """Inputs of the model stand where parameters and literals are usual; the opset is that of what is used."""
    type, inputs, attributes, opset = NODES[name]
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    given = {n: x for n, x in zip(names, inputs, strict=True) if x is not None}
    feeds = {n: x for n, x in given.items() if x.size}
    constants = [onnx.numpy_helper.from_array(x, n) for n, x in given.items() if not x.size]
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in feeds.items()
    ]
    node = onnx.helper.make_node(type, names, ["y"], "node", **attributes)
    graph = onnx.helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name="y")], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    backend = OnnxBackend()
    made = written(backend, backend.adopt(onnx.shape_inference.infer_shapes(model)), sample=feeds)
    assert made.model.opset_imports[""] == opset


@pytest.mark.parametrize("slope", [(4,), (4, 1), (4, 1, 1), (1, 4, 1), (4, 4), (1,), ()], ids=str)
@pytest.mark.parametrize("before", ["", "Conv", "MatMul"])
def test_slopes_lie_where_onnx_broadcasts_them(slope, before):
    """Each axis is of length 4: what stands on another one has other values."""
    m = ModelBuilder(20)
    x = m.input("x", ["N", 4, 4, 4])
    if before:
        x = m.node(before, [x, m.weight("w", *((4, 4, 1, 1) if before == "Conv" else (4, 4)))], "pre")
    m.output(m.node("PRelu", [x, m.const("slope", np.linspace(0.1, 0.9, np.prod(slope, dtype=int)).reshape(slope)
                                         .astype(np.float32))], "y"))  # fmt: skip
    backend, feeds = OnnxBackend(), {"x": _f(2, 4, 4, 4)}
    model = backend.adopt(m.build())
    graph = backend.graph(model)
    values = backend.session(model, [Tap(t) for t in graph.tensors]).run(feeds)
    params = backend.read(model, list(graph.params))
    taken = {tap.tensor: value for tap, value in values.items()}
    faults, compared = replay(graph, taken, params, None, 1e-5, lambda op, params: None)
    assert not faults and "y_op" in compared
    written(backend, model, sample=feeds)  # compares every tensor


def test_outputs_that_are_left_out_in_between_are_said_to_be_unknown():
    names = ["q", "k", "v"]
    infos = [onnx.helper.make_tensor_value_info(n, 1, (1, 2, 3, 4)) for n in names]
    node = onnx.helper.make_node("Attention", names, ["y", "", "", "scores"], "node")
    outputs = [onnx.helper.make_tensor_value_info(n, 1, None) for n in ("y", "scores")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", infos, outputs), opset_imports=[onnx.helper.make_opsetid("", 23)],
        ir_version=10,
    )  # fmt: skip
    backend = OnnxBackend()
    with pytest.raises(NotEmittable, match=r"doesn't say what it computes \(Attention\)"):
        written(backend, backend.adopt(model), sample={n: _f(1, 2, 3, 4) for n in names})


# -- the kit's port


@pytest.mark.parametrize("name", ["tokens", "prenormed"])
def test_the_port_of_the_kit_takes_ids_and_lookups(name):
    """The models that only backends were tested on: integer inputs, a Gather's table before its indices."""
    model = BACKEND_MODELS[name]()
    feeds = batch(model)
    backend = OnnxBackend()
    made = backend.adopt(model_port().native(model))
    graph = backend.graph(made)
    assert [(op.id, op.kind) for op in graph] == [(op.id, op.kind) for op in model.graph]
    assert set(graph.params) == set(model.graph.params)
    found = backend.session(made, [Tap(t) for t in graph.outputs]).run(feeds)
    for tensor, expected in model(feeds).items():
        np.testing.assert_allclose(found[Tap(tensor)], expected, rtol=1e-5, atol=1e-5)
