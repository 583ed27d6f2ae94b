"""What a graph builder makes of a model that is traced call by call: numpy stands for the framework."""

from dataclasses import dataclass

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.dataflow import FlowBackend, FlowModel, GraphBuilder, Layout
from bitwright.errors import ModelError
from bitwright.graph import (
    AxisAttrs,
    BatchNormAttrs,
    Call,
    Constant,
    ConvAttrs,
    OpKind,
    ParamRole,
    PoolAttrs,
    SetBias,
    SetParams,
    erf,
    lacking,
)
from bitwright.testing.kernels import ACTIVATIONS

K, R = OpKind, ParamRole


@dataclass(frozen=True, eq=False)
class TracedModel(FlowModel):
    """Of numpy calls."""


class TracedBackend(FlowBackend[TracedModel]):
    name = "traced"
    model_type = TracedModel

    def adopt(self, model, sample=None):
        return model


BACKEND = TracedBackend()
BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Max": np.maximum, "Min": np.minimum,
          "Pow": np.power, "Less": np.less, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
          "NotEqual": np.not_equal}  # fmt: skip
UNARY = {"Exp": np.exp, "Sqrt": np.sqrt, "Tanh": np.tanh, "Neg": np.negative, "Abs": np.abs, "Log1p": np.log1p,
         "Log": np.log, "Expm1": np.expm1, "Reciprocal": np.reciprocal, "Erf": lambda x: erf(x).astype(np.float32),
         "Erfc": lambda x: (1 - erf(x)).astype(np.float32), "Sigmoid": ACTIVATIONS["Sigmoid"]}  # fmt: skip


class T:
    """A traced array: every call is told to the builder."""

    def __init__(self, b, id):
        self.b, self.id = b, id

    @property
    def shape(self):
        return self.b.shape(self.id)

    def of(self, x):
        return x if isinstance(x, T) else T(self.b, self.b.constant(np.float32(x)))

    def call(self, type, function, *others, shape=None, **told):
        operands = [self, *map(self.of, others)]
        lengths = [[n or 7 for n in t.shape] for t in operands]
        found = np.broadcast_shapes(*lengths) if shape is None else shape
        free = [None if n == 7 else n for n in found]
        (y,) = self.b.op(type, [t.id for t in operands], [free], lambda *a: [function(*a)], **told)
        return T(self.b, y)

    def two(self, type, other, swapped=False):
        return self.of(other).call(type, BINARY[type], self) if swapped else self.call(type, BINARY[type], other)

    def one(self, type):
        return self.call(type, UNARY[type])

    def reshape(self, *shape):
        return self.call("Reshape", lambda x: x.reshape([-1 if n == 7 else n for n in shape]), shape=shape)

    def transpose(self, *perm):
        shape = [self.shape[i] or 7 for i in perm]
        return self.call("Transpose", lambda x: x.transpose(perm), shape=shape, attributes={"perm": perm})

    def reduce(self, type, function, *axes, keep=False):
        shape = [1 if i in axes else n or 7 for i, n in enumerate(self.shape) if keep or i not in axes]
        return self.call(type, lambda x: function(x, axis=axes, keepdims=keep), shape=shape,
                         attributes={"axes": axes, "keepdims": int(keep)})  # fmt: skip

    def mean(self, *axes, keep=False):
        count = float(np.prod([self.shape[a] for a in axes]))
        return self.reduce("ReduceSum", np.sum, *axes, keep=keep) / count

    def matmul(self, other):
        shape = [*(n or 7 for n in self.shape[:-1]), other.shape[-1]]
        return self.call("MatMul", np.matmul, other, shape=shape)

    __add__ = lambda s, o: s.two("Add", o)
    __radd__ = lambda s, o: s.two("Add", o, True)
    __sub__ = lambda s, o: s.two("Sub", o)
    __rsub__ = lambda s, o: s.two("Sub", o, True)
    __mul__ = lambda s, o: s.two("Mul", o)
    __rmul__ = lambda s, o: s.two("Mul", o, True)
    __truediv__ = lambda s, o: s.two("Div", o)
    __rtruediv__ = lambda s, o: s.two("Div", o, True)


class Net:
    def __init__(self, *shape):
        self.b, self.rng = GraphBuilder(), np.random.default_rng(0)
        self.x = T(self.b, self.b.input("x", (None, *shape)))

    def param(self, name, *shape, low=-1.0):
        return T(self.b, self.b.param(name, self.rng.uniform(low, 1, shape).astype(np.float32)))

    def build(self, y):
        model = self.b.build(TracedModel, [y.id])
        x = self.rng.normal(size=(7, *self.x.shape[1:])).astype(np.float32)
        return model, x, run(model, x)


def run(model, x):
    tap = Tap(model.graph.outputs[0])
    return BACKEND.session(model, [tap]).run({"x": x})[tap]


def test_a_product_and_its_bias_are_one_op_under_the_parameter_s_names():
    net = Net(6)
    w, b = net.param("layer.w", 6, 4), net.param("layer.b", 4)
    model, x, y = net.build(net.x.matmul(w) + b)
    (op,) = model.graph
    assert (op.id, op.kind, op.type) == ("layer", K.LINEAR, "Gemm")
    assert op.params == {R.WEIGHT: "layer.w", R.BIAS: "layer.b"}
    assert model.graph.params["layer.w"].shape == (4, 6)
    assert model.graph.params["layer.w"].layout == (1, 0)
    values = BACKEND.read(model, ["layer.w", "layer.b"])
    assert np.array_equal(y, x @ values["layer.w"].T + values["layer.b"])
    doubled = BACKEND.edit(model, [SetParams({"layer.w": values["layer.w"] * 2}), SetBias("layer", np.zeros(4))])
    assert np.allclose(run(doubled, x), 2 * (y - values["layer.b"]), atol=1e-5)


def test_a_bias_that_is_added_later_is_added_by_the_base():
    net = Net(5, 6)
    model, x, y = net.build(net.x.matmul(net.param("w", 6, 4)))
    assert model.graph.ops[0].type == "MatMul"
    biased = BACKEND.edit(model, [SetBias(model.graph.ops[0].id, np.arange(4))])
    assert np.allclose(run(biased, x) - y, np.arange(4), atol=1e-5)


def test_what_is_no_bias_stays_an_addition():
    for other in ("used twice", "scalar", "along another axis", "mask"):
        net = Net(4, 6)
        y = net.x.matmul(net.param("w", 6, 4))
        added = {"along another axis": lambda n: n.param("b", 4, 1), "scalar": lambda n: 1.5,
                 "mask": lambda n: T(n.b, n.b.constant(np.float32([0, 0, -np.inf, 0])))}  # fmt: skip
        z = y + added.get(other, lambda n: n.param("b", 4))(net)
        model, _, _ = net.build(z + y if other == "used twice" else z)
        linear = next(op for op in model.graph if op.kind is K.LINEAR)
        assert R.BIAS not in linear.params, other


def test_one_array_used_in_two_layouts():
    net = Net(6)
    w = net.param("w", 6, 6)
    model, x, y = net.build(net.x.matmul(w).matmul(w))
    assert {op.weight for op in model.graph} == {"w"}
    net = Net(6)
    w = net.param("w", 6, 6)
    model, x, y = net.build(net.x.matmul(w).matmul(w.transpose(1, 0)))
    first, second = (op.weight for op in model.graph)
    assert first == "w"
    assert second != "w"
    held = BACKEND.read(model, [first, second])
    assert np.array_equal(held[first], held[second].T)
    assert np.allclose(y, x @ held[first].T @ held[second].T, atol=1e-5)


def test_a_matrix_turned_twice_is_one_parameter():
    net = Net(6)
    w = net.param("w", 6, 6)
    model, _, _ = net.build(net.x.matmul(w).matmul(w.transpose(1, 0).transpose(1, 0)))
    assert [op.weight for op in model.graph] == ["w", "w"]


def test_weights_that_are_computed_are_parameters_of_their_ops():
    net = Net(6)
    w = net.param("layer.v", 6, 4) * net.param("layer.g", 4)
    model, x, y = net.build(net.x.matmul(w))
    (op,) = model.graph
    assert op.weight == "layer.weight"
    assert np.allclose(y, x @ BACKEND.read(model, [op.weight])[op.weight].T, atol=1e-5)
    zero = BACKEND.edit(model, [SetParams({op.weight: np.zeros((4, 6))})])
    assert not run(zero, x).any()


def test_biases_of_heads_go_before_the_split():
    net = Net(5, 6)
    w, b = net.param("w", 6, 8), net.param("b", 2, 4)
    model, x, y = net.build(net.x.matmul(w).reshape(7, 5, 2, 4) + b)
    linear, split = model.graph
    assert (linear.kind, split.kind) == (K.LINEAR, K.RESHAPE)
    assert model.graph.params[linear.params[R.BIAS]].shape == (8,)
    values = BACKEND.read(model, list(model.graph.params))
    assert np.allclose(y.reshape(7, 5, 8), x @ values["w"].T + values["b"], atol=1e-5)


NORMS = {
    "by a root": lambda x, m, v, g, b: (x - m) / (v + 1e-3).one("Sqrt") * g + b,
    "by a power": lambda x, m, v, g, b: (x - m) * ((v + 1e-3).two("Pow", -0.5) * g) + b,
    "by a reciprocal": lambda x, m, v, g, b: b + (x - m) * (g * (v + 1e-3).one("Sqrt").one("Reciprocal")),
    "by a fraction": lambda x, m, v, g, b: (x - m) * (1.0 / (v + 1e-3).one("Sqrt")) * g + b,
    "γ over the root": lambda x, m, v, g, b: (x - m) * (g / (1e-3 + v).one("Sqrt")) + b,
}


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("shaped", [False, True])
def test_batch_norms(form, shaped):
    net = Net(5, 4)
    m, v, g, b = (net.param(n, 4, low=0.1) for n in "mvgb")
    given = [p.reshape(1, 1, 4) for p in (m, v, g, b)] if shaped else [m, v, g, b]
    model, x, y = net.build(NORMS[form](net.x, *given))
    (op,) = model.graph
    assert op.kind is K.BATCH_NORM
    assert op.attrs == BatchNormAttrs(pytest.approx(1e-3), 2)
    assert op.params == {R.MEAN: "m", R.VAR: "v", R.GAMMA: "g", R.BETA: "b"}
    p = BACKEND.read(model, list("mvgb"))
    assert np.allclose(y, (x - p["m"]) / np.sqrt(p["v"] + 1e-3) * p["g"] + p["b"], atol=1e-5)
    new = BACKEND.edit(model, [SetParams({"v": np.full(4, 3.0), "g": np.full(4, 2.0)})])
    assert np.allclose(run(new, x), (x - p["m"]) / np.sqrt(3.001) * 2 + p["b"], atol=1e-5)


def test_what_only_looks_like_a_batch_norm():
    net = Net(5, 4)
    scale, shift = net.param("s", 4), net.param("t", 4)
    model, _, _ = net.build((net.x - shift) * scale)
    assert [op.kind for op in model.graph] == [K.ELEMENTWISE, K.MUL]
    net = Net(5, 4)
    model, _, _ = net.build((net.x - net.param("m", 5, 4)) / (net.param("v", 4, low=0.1) + 1e-3).one("Sqrt"))
    assert K.BATCH_NORM not in {op.kind for op in model.graph}


def layer_norm(x, g, b):
    centred = x - x.mean(2, keep=True)
    return centred / ((centred * centred).mean(2, keep=True) + 1e-5).one("Sqrt") * g + b


def fast_layer_norm(x, g, b):
    mean, square = x.mean(2, keep=True), (x * x).mean(2, keep=True)
    return (x - mean) * ((square - mean * mean).two("Max", 0.0) + 1e-5).two("Pow", -0.5) * g + b


@pytest.mark.parametrize("form", [layer_norm, fast_layer_norm])
def test_layer_norms(form):
    net = Net(5, 8)
    model, x, y = net.build(form(net.x, net.param("g", 8), net.param("b", 8)))
    (op,) = model.graph
    assert (op.kind, op.type) == (K.LAYER_NORM, "LayerNormalization")
    assert op.params == {R.GAMMA: "g", R.BETA: "b"}
    p = BACKEND.read(model, ["g", "b"])
    expected = (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5) * p["g"] + p["b"]
    assert np.allclose(y, expected, atol=1e-4)


def test_rms_norms():
    net = Net(5, 8)
    x = net.x - 0.0
    model, x, y = net.build(x * ((x * x).mean(2, keep=True) + 1e-6).two("Pow", -0.5) * net.param("g", 8))
    (op,) = model.graph
    assert (op.kind, op.type, op.params) == (K.NORM, "RMSNormalization", {R.GAMMA: "g"})
    assert np.allclose(
        y, x / np.sqrt((x * x).mean(2, keepdims=True) + 1e-6) * BACKEND.read(model, ["g"])["g"], atol=1e-5
    )


def softmax(x):
    e = (x - x.reduce("ReduceMax", np.max, 1, keep=True)).one("Exp")
    return e / e.reduce("ReduceSum", np.sum, 1, keep=True)


def test_softmax():
    net = Net(6)
    model, _, y = net.build(softmax(net.x * 3.0))
    scaled, op = model.graph
    assert (op.kind, op.attrs, op.data_inputs) == (K.SOFTMAX, AxisAttrs(1), (scaled.output,))
    assert np.allclose(y.sum(1), 1)


def leaky(x):
    return T(x.b, x.b.op("Where", [x.two("GreaterOrEqual", 0.0).id, x.id, (x * 0.2).id], [x.shape],
                         lambda *a: [np.where(*a)])[0])  # fmt: skip


ACTIVATED = {
    "Relu": lambda x: x.two("Max", 0.0),
    "Relu6": lambda x: x.two("Max", 0.0).two("Min", 6.0),
    "Sigmoid": lambda x: 1.0 / (x.one("Neg").one("Exp") + 1.0),
    "Swish": lambda x: x * x.one("Sigmoid"),
    "HardSwish": lambda x: x * ((x + 3.0).two("Max", 0.0).two("Min", 6.0) / 6.0),
    "HardSigmoid": lambda x: (x + 3.0).two("Min", 6.0).two("Max", 0.0) / 6.0,
    "Softplus": lambda x: x.two("Max", 0.0) + x.one("Abs").one("Neg").one("Exp").one("Log1p"),
    "Mish": lambda x: x * (x.two("Max", 0.0) + x.one("Abs").one("Neg").one("Exp").one("Log1p")).one("Tanh"),
    "Gelu": lambda x: x * 0.5 * (1.0 + (x * np.sqrt(0.5)).one("Erf")),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_activations_that_are_spelled_out(name):
    net = Net(6)
    model, x, y = net.build(ACTIVATED[name](net.x))
    (op,) = model.graph
    assert op.type == {"Relu6": "Clip"}.get(name, name)
    assert op.kind is {"Relu": K.RELU, "Relu6": K.CLIPPED_RELU}.get(name, K.ACTIVATION)
    assert op.inputs == ("x",)
    assert np.allclose(y, ACTIVATIONS[name](x), atol=1e-5)


def test_other_forms_of_activations():
    for form, type in (
        (lambda x: 0.5 * (x * (1.0 + (x / np.sqrt(2)).one("Erf"))), "Gelu"),
        (lambda x: (0.5 * x) * (x.one("Neg") * np.sqrt(0.5)).one("Erfc"), "Gelu"),
        (lambda x: x * (0.5 * (1.0 + (np.sqrt(2 / np.pi) * (x + 0.044715 * x.two("Pow", 3.0))).one("Tanh"))), "Gelu"),
        (leaky, "LeakyRelu"),
        (lambda x: x / (1.0 + x.one("Neg").one("Exp")), "Swish"),
        (lambda x: x.two("Min", 2.0).two("Max", -1.0), "Clip"),
    ):
        net = Net(6)
        model, _, _ = net.build(form(net.x))
        assert [op.type for op in model.graph] == [type]
    assert model.graph.ops[0].attrs.minimum == -1


def test_what_is_read_elsewhere_stays():
    net = Net(6)
    inner = net.x.one("Sigmoid")
    model, _, _ = net.build(net.x * inner + inner)
    assert [op.type for op in model.graph] == ["Sigmoid", "Mul", "Add"]


def test_means_over_whole_axes_and_windows():
    net = Net(4, 4, 3)
    model, x, y = net.build(net.x.mean(1, 2))
    (op,) = model.graph
    assert (op.kind, op.type, op.attrs) == (K.AVERAGE_POOL, "ReduceMean", PoolAttrs((1, 2), keepdims=False))
    assert np.allclose(y, x.mean((1, 2)), atol=1e-6)
    net = Net(4, 4, 3)  # as JAX keeps the axes: it puts them back before it divides
    model, x, y = net.build(net.x.reduce("ReduceSum", np.sum, 1, 2).reshape(7, 1, 1, 3) / 16.0)
    (op,) = model.graph
    assert (op.kind, op.type, op.attrs) == (K.AVERAGE_POOL, "ReduceMean", PoolAttrs((1, 2), keepdims=True))
    assert np.allclose(y, x.mean((1, 2), keepdims=True), atol=1e-6)
    net = Net(4, 4, 3)  # of another axis
    model, _, _ = net.build(net.x.reduce("ReduceSum", np.sum, 1, 2).reshape(7, 3, 1, 1) / 16.0)
    assert [op.type for op in model.graph] == ["ReduceSum", "Reshape", "Div"]
    net = Net(6)
    model, _, _ = net.build(net.x.reduce("ReduceSum", np.sum, 1) / 5.0)  # of six
    assert [op.type for op in model.graph] == ["ReduceSum", "Div"]


def test_masks():
    net = Net(6)
    allowed = net.x.two("Greater", 0.0)
    low = T(net.b, net.b.constant(np.float32(-1e30)))
    masked = net.b.op("Where", [allowed.id, net.x.id, low.id], [net.x.shape], lambda *a: [np.where(*a)])[0]
    model, _, _ = net.build(softmax(T(net.b, masked)))
    where = next(op for op in model.graph if op.type == "Where")
    assert model.graph.tensors[where.output].mask
    assert not model.graph.tensors[model.graph.outputs[0]].mask


def test_lookups_with_indices_from_the_end():
    b = GraphBuilder()
    ids = T(b, b.input("x", (None, 5), "int32"))
    table = T(b, b.param("table", np.arange(12, dtype=np.float32).reshape(4, 3)))
    six = b.constant(np.int32(4))
    less = b.op("Less", [ids.id, b.constant(np.int32(0))], [ids.shape], lambda *a: [np.less(*a)], dtypes=["bool"])[0]
    more = b.op("Add", [ids.id, six], [ids.shape], lambda *a: [np.add(*a)], dtypes=["int32"])[0]
    index = b.op("Where", [less, more, ids.id], [ids.shape], lambda *a: [np.where(*a)], dtypes=["int32"])[0]
    (y,) = b.op("Gather", [table.id, index], [(None, 5, 3)], lambda t, i: [t[i]], attributes={"axis": 0})
    model = b.build(TracedModel, [y])
    (op,) = model.graph
    assert (op.kind, op.inputs, op.params) == (K.EMBEDDING, ("x",), {R.WEIGHT: "table"})
    found = run(model, np.int32([[0, -1, 3, 2, -4]]))
    assert np.array_equal(found[0, :, 0], [0, 9, 9, 6, 0])


def test_convolutions_say_where_channels_lie():
    b = GraphBuilder()
    x = b.input("x", (None, 5, 5, 3))
    w = b.param("conv.w", np.zeros((1, 1, 3, 6), np.float32))
    attrs = ConvAttrs((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    (y,) = b.op("Conv", [x, w], [(None, 5, 5, 6)], lambda x, w: [x @ w[0, 0]], attrs=attrs, channels=(3, 3),
                layouts={1: Layout().permuted(3, 2, 0, 1)})  # fmt: skip
    model = b.build(TracedModel, [y], names=["scores"])
    assert model.graph.outputs == ("scores",)
    assert [model.graph.tensors[t].channel_axis for t in ("x", "scores")] == [3, 3]
    assert model.graph.params["conv.w"].shape == (6, 3, 1, 1)


def contraction(net, other, contract, batch=((), ()), equation=""):
    y = net.b.contraction(net.x.id, other.id, lambda a, b: [np.einsum(equation, a, b)], contract=contract, batch=batch)
    model, x, found = net.build(T(net.b, y))
    held = {p: BACKEND.read(model, [p])[p] for p in model.graph.params}
    return model, x, found, held


def test_contractions_are_matrix_products():
    net = Net(5, 6)
    w = net.param("heads.w", 6, 2, 4)
    model, x, y, held = contraction(net, w, ((2,), (0,)), equation="bsi,ihd->bshd")
    linear, split = model.graph
    assert (linear.kind, linear.id, split.kind) == (K.LINEAR, "heads", K.RESHAPE)
    assert held["heads.w"].shape == (8, 6)
    assert np.allclose(y.reshape(7, 5, 8), x @ held["heads.w"].T, atol=1e-5)
    net = Net(5, 2, 4)
    model, x, y, held = contraction(net, net.param("w", 2, 4, 3), ((2, 3), (0, 1)), equation="bshd,hdo->bso")
    assert [op.kind for op in model.graph] == [K.RESHAPE, K.LINEAR]
    assert np.allclose(y, x.reshape(7, 5, 8) @ held["w"].T, atol=1e-5)
    net = Net(5, 2, 4)
    twice = T(net.b, net.b.op("Exp", [net.x.id], [net.x.shape], lambda x: [np.exp(x)])[0])
    model, x, y, _ = contraction(net, twice, ((3,), (3,)), ((0, 2), (0, 2)), "bqhd,bkhd->bhqk")
    assert [op.type for op in model.graph if op.kind is not K.ACTIVATION] == ["Transpose", "Transpose", "MatMul"]
    assert np.allclose(y, np.einsum("bqhd,bkhd->bhqk", x, np.exp(x)), atol=1e-4)
    net = Net(5, 6)
    model, x, y, held = contraction(net, net.param("w", 5, 3), ((1,), (0,)), equation="bsi,so->bio")
    (op,) = model.graph
    assert (op.kind, op.type) == (K.MATMUL, "Einsum")
    assert np.allclose(y, np.einsum(op.call.attributes["equation"], x, held["w"]), atol=1e-5)


def test_calls_say_what_onnx_needs():
    net = Net(6)
    y = (1.0 - net.x).call(
        "Slice",
        lambda x: x[:, 1:3],
        shape=(7, 2),
        attributes={"starts": (np.int64(1),), "ends": (3,), "axes": (1,), "steps": (1,)},
    )
    model, _, _ = net.build(y)
    difference, cut = model.graph
    assert difference.call == Call({}, {0: R.CONSTANT})
    assert cut.call.operands == {1: Constant([1]), 2: Constant([3]), 3: Constant([1]), 4: Constant([1])}
    assert lacking(cut, model.graph) is None
    net = Net(5, 8)
    model, _, _ = net.build(layer_norm(net.x, net.param("g", 8), net.param("b", 8)))
    assert model.graph.ops[0].call.attributes == {"axis": -1, "epsilon": pytest.approx(1e-5)}
    net = Net(6)
    model, _, _ = net.build(net.x.call("fancy", np.cbrt))
    assert model.graph.ops[0].call is None


def test_unknown_calls_end_every_pattern():
    net = Net(6)
    model, x, y = net.build(net.x.call("fancy", np.cbrt) * 2.0)
    assert [(op.kind, op.type, op.native) for op in model.graph] == [
        (K.OPAQUE, "fancy", "fancy"), (K.MUL, "Mul", "Mul"),
    ]  # fmt: skip
    assert np.allclose(y, 2 * np.cbrt(x))


def test_mistakes_are_named():
    b = GraphBuilder()
    x = b.input("x", (None, 3))
    with pytest.raises(ModelError, match="two inputs or parameters are called 'x'"):
        b.param("x", np.zeros(3))
    with pytest.raises(ModelError, match="operand 'nowhere' of a Relu is neither an input nor made before"):
        b.op("Relu", ["nowhere"], [(3,)], lambda x: [x])
    w = b.param("w", np.zeros(3, np.float32))
    with pytest.raises(ModelError, match="a Sqrt of constants can't be computed: no"):
        b.op("Sqrt", [w], [(3,)], lambda x: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ModelError, match="depends on no input"):
        b.build(TracedModel, [w])
    (y,) = b.op("Add", [x, w], [(None, 3)], lambda *a: [np.add(*a)])
    assert b.build(TracedModel, [y]).graph.ops[0].params == {R.CONSTANT: "w"}
