"""Attention masks in ONNX graphs: whatever the form, masked scores don't set the grid of the others."""

from __future__ import annotations

import builders as b
import numpy as np
import onnxruntime as ort
import pytest

from bitwright.errors import InputError
from bitwright.placement import Float
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr, verify

DOUBLE = b.TensorProto.DOUBLE
S, D, N = 12, 16, 24
KEPT = np.arange(S) < 8
TRIANGLE = np.triu(np.ones((S, S), bool), 1)
LOWEST = float(np.finfo(np.float32).min)


class Net(b.ModelBuilder):
    """q·W = k; scores k·qᵀ; a masked softmax; its product with k."""

    def __init__(self, mask):
        super().__init__(opset=17)
        self.data = {"q": b_normal(N, S, D)}
        self.input("q", ["n", S, D])
        self.const("W", b_normal(D, D, seed=1) * D**-0.5)
        self.node("MatMul", ["q", "W"], "k")
        self.node("Transpose", ["k"], "kt", perm=[0, 2, 1])
        self.node("MatMul", ["q", "kt"], "s0")
        self.const("scale", np.float32(D**-0.5))
        self.node("Mul", ["s0", "scale"], "s")
        masked = mask(self, "s")
        if masked != "p":
            self.node("Softmax", [masked], "p", axis=-1)
        self.node("MatMul", ["p", "k"], "y")
        self.output("y")

    def flags(self, dtype=b.INT64, shape=(1, S)):
        """A padding mask as an input; 1 where a key counts."""
        self.input("mask", ["n", *shape], dtype)
        kind = {b.INT64: np.int64, b.BOOL: bool, b.FLOAT: np.float32}[dtype]
        self.data["mask"] = np.tile(KEPT.astype(kind), (N, *shape[:-1], 1))
        return "mask"

    def inverse(self, flags):
        """1 − mask, in float."""
        self.const("one", np.float32(1))
        self.node("Cast", [flags], "mf", to=b.FLOAT)
        return self.node("Sub", ["one", "mf"], "inv")

    def added(self, a, c, name="m"):
        return self.node("Add", [a, c], name)


def b_normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def causal(value):
    def mask(net, s):
        return net.added(s, net.const("triangle", np.where(TRIANGLE, value, 0).astype(np.float32)))

    return mask


def scaled(value):
    """(1 − m) · value."""

    def mask(net, s):
        inverse = net.inverse(net.flags())
        return net.added(s, net.node("Mul", [inverse, net.const("big", np.float32(value))], "am"))

    return mask


def on_the_left(net, s):
    inverse = net.inverse(net.flags())
    return net.added(net.node("Mul", [net.const("big", np.float32(-1e4)), inverse], "am"), s)


def subtracted(net, s):
    inverse = net.inverse(net.flags())
    return net.node("Sub", [s, net.node("Mul", [inverse, net.const("big", np.float32(1e9))], "am")], "m")


def filled(value):
    def mask(net, s):
        kept = net.node("Cast", [net.flags()], "kept", to=b.BOOL)
        return net.node("Where", [kept, s, net.const("fill", np.float32(value))], "m")

    return mask


def chosen(net, s):
    """where(m, 0, −100), added: both operands of the Where are constants."""
    kept = net.flags(b.BOOL)
    net.const("zero", np.float32(0))
    return net.added(s, net.node("Where", [kept, "zero", net.const("fill", np.float32(-100))], "am"))


def given_as_float(lowest):
    def mask(net, s):
        net.flags(b.FLOAT)
        net.data["mask"] = np.where(net.data["mask"] > 0, np.float32(0), np.float32(lowest))
        return net.added(s, "mask")

    return mask


def two(net, s):
    return net.added(
        scaled(-1e4)(net, s), net.const("triangle", np.where(TRIANGLE, -np.inf, 0).astype(np.float32)), "t"
    )


def before_scaling(net, s):
    m = causal(-1e9)(net, s)
    return net.node("Div", [m, net.const("root", np.float32(4))], "scaled")


def bounded(net, s):
    """max(scores + mask, lowest), as in OPT."""
    return net.node("Max", [scaled(LOWEST)(net, s), net.const("lowest", np.float32(LOWEST))], "bounded")


def logarithm(net, s):
    net.node("Cast", [net.flags()], "mf", to=b.FLOAT)
    return net.added(s, net.node("Log", ["mf"], "lm"))


def logarithm_of_a_float(net, s):
    """log(m), m given as a float: −∞ is known only when data come."""
    net.flags(b.FLOAT)
    return net.added(s, net.node("Log", ["mask"], "lm"))


def filled_triangle(net, s):
    """triu(full(−∞), 1), computed from the size of the scores."""
    net.node("Shape", ["q"], "shape", start=1, end=2)
    net.node("Concat", ["shape", "shape"], "square", axis=0)
    net.node("ConstantOfShape", ["square"], "full", value=b.numpy_helper.from_array(np.float32([-np.inf])))
    net.node("Trilu", ["full", net.const("one_up", np.int64(1))], "triangle", upper=1)
    return net.added(s, "triangle")


def guarded(net, s):
    """A row that is masked whole is NaN behind the softmax, and zero behind the Where, which gives the weights."""
    kept = net.node("Cast", [net.flags()], "kept", to=b.BOOL)
    net.data["mask"] = net.data["mask"].copy()
    net.data["mask"][0] = 0
    m = net.node("Where", [kept, s, net.const("fill", np.float32(-np.inf))], "m")
    net.node("Softmax", [m], "raw", axis=-1)
    net.node("IsNaN", ["raw"], "nan")
    return net.node("Where", ["nan", net.const("zero", np.float32(0)), "raw"], "p")


def guarded_by_the_mask(net, s, fill=-np.inf):
    """The same, where the mask tells which rows are masked whole, as in ONNX's own expansion of Attention."""
    kept = net.node("Cast", [net.flags()], "kept", to=b.BOOL)
    net.data["mask"] = net.data["mask"].copy()
    net.data["mask"][0] = 0
    offset = net.node("Where", [kept, net.const("zero", np.float32(0)), net.const("fill", np.float32(fill))], "off")
    net.node("Softmax", [net.added(s, offset)], "raw", axis=-1)
    net.node("Identity", ["raw"], "cast")
    largest = net.node("ReduceMax", [offset], "largest", axes=[-1], keepdims=1)
    lost = net.node("Equal", [largest, "fill"], "lost")
    return net.node("Where", [lost, "zero", "cast"], "p")


def looked_up(op, value, dtype=np.float32):
    """The rows of a causal triangle that belong to the positions given, as models with a cache of keys have it."""

    def mask(net, s):
        net.input("positions", ["n", S], b.INT64)
        net.data["positions"] = np.tile(np.arange(S), (N, 1))
        values = np.where(TRIANGLE, value, 0).astype(dtype)
        rows = "positions"
        if op == "Gather, axis 1":
            # (keys, n, queries), turned
            found = net.node("Gather", [net.const("triangle", values.T.copy()), rows], "columns", axis=1)
            return net.added(s, net.node("Transpose", [found], "am", perm=[1, 2, 0]))
        if op == "GatherElements":
            net.const("last", np.array([-1]))
            rows = net.node("Unsqueeze", [rows, "last"], "rows")
            rows = net.node("Expand", [rows, net.const("square", np.array([1, S, S]))], "all")
            rows = net.node("Reshape", [rows, net.const("flat", np.array([-1, S]))], "indices")
            found = net.node(op, [net.const("triangle", values), rows], "found", axis=0)
            return net.added(s, net.node("Reshape", [found, net.const("cube", np.array([-1, S, S]))], "am"))
        if op == "GatherND":
            rows = net.node("Unsqueeze", [rows, net.const("last", np.array([-1]))], "rows")
        found = net.node(op, [net.const("triangle", values), rows], "am")
        return net.added(s, found if dtype is np.float32 else net.node("Cast", [found], "wide", to=b.FLOAT))

    return mask


def combined(op):
    """Flags of keys resized, spread to neighbours, or paired with themselves before they become (1 − m) · −10⁹."""

    def mask(net, s):
        flags = net.flags(shape=(1, S // 2 if op == "Resize" else S))
        flags = net.node("Cast", [flags], "flags", to=b.FLOAT)
        if op == "Resize":
            net.data["mask"] = net.data["mask"][..., ::2].copy()
            scales = net.const("scales", np.array([1, 1, 2], np.float32))
            flags = net.node("Resize", [flags, "", scales], "made", mode="nearest")
        elif op == "MaxPool":
            flags = net.node("MaxPool", [flags], "made", kernel_shape=[3], pads=[1, 1])
        elif op == "Einsum":
            flags = net.node("Einsum", [flags, flags], "made", equation="bik,bil->bkl")
        net.const("one", np.float32(1))
        inverse = net.node("Sub", ["one", flags], "inv")
        return net.added(s, net.node("Mul", [inverse, net.const("big", np.float32(-1e9))], "am"))

    return mask


def one_hot(net, s):
    """One key that doesn't count, told by its index."""
    net.input("dropped", ["n", S], b.INT64)
    net.data["dropped"] = np.tile((np.arange(S) + 3) % S, (N, 1))
    net.const("depth", np.int64(S))
    net.const("values", np.array([0, -1e9], np.float32))
    return net.added(s, net.node("OneHot", ["dropped", "depth", "values"], "am", axis=-1))


FORMS = {
    "triangle of -inf": causal(-np.inf),
    "triangle of -1e4": causal(-1e4),
    "triangle of -100": causal(-100),
    "lowest": scaled(LOWEST),
    "-1e4": scaled(-1e4),
    "-100": scaled(-100),
    "on the left": on_the_left,
    "subtracted": subtracted,
    "where -inf": filled(-np.inf),
    "where -1e4": filled(-1e4),
    "where of constants": chosen,
    "float input -inf": given_as_float(-np.inf),
    "float input -1e4": given_as_float(-1e4),
    "two masks": two,
    "scaled behind": before_scaling,
    "bounded": bounded,
    "logarithm": logarithm,
    "logarithm of a float": logarithm_of_a_float,
    "computed triangle": filled_triangle,
    "resized": combined("Resize"),
    "spread": combined("MaxPool"),
    "paired": combined("Einsum"),
    "one hot": one_hot,
    "looked up -inf": looked_up("Gather", -np.inf),
    "looked up -1e4": looked_up("Gather", -1e4),
    "looked up by GatherND": looked_up("GatherND", LOWEST),
    "looked up by GatherElements": looked_up("GatherElements", -1e4),
    "looked up in columns": looked_up("Gather, axis 1", -1e4),
    "looked up, float16's lowest": looked_up("Gather", float(np.finfo(np.float16).min), np.float16),
    "looked up, float64's lowest": looked_up("Gather", float(np.finfo(np.float64).min), np.float64),
}


def run(path, data):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, data)[0]


@pytest.mark.parametrize("form", FORMS)
def test_masked_attention_keeps_its_accuracy_and_exports(form, tmp_path):
    net = Net(FORMS[form])
    sim = QuantSim(net.build()).calibrate(net.data)
    expected, found = sim.predict(net.data, simulated=False)[0], sim.predict(net.data)[0]
    assert np.isfinite(expected).all()
    assert sqnr(expected, found) >= 28
    bundle = sim.export(tmp_path, name="net")
    assert np.array_equal(run(bundle.files["qdq"], net.data), found)
    assert {"s", "p", "k"} <= set(sim.plan.quantized)
    if form.startswith("looked up"):
        assert "triangle" not in sim.plan.quantized
        assert verify(tmp_path).problems == []


@pytest.mark.parametrize("lookup", [True, False])
def test_masks_of_doubles(lookup, tmp_path):
    """Float64's lowest number, in a model of doubles."""
    net = b.ModelBuilder(opset=17)
    net.input("q", ["n", S, D], DOUBLE)
    net.input("positions", [S], b.INT64)
    values = np.where(TRIANGLE, np.finfo(np.float64).min, 0)
    net.const("triangle", values)
    net.node("Transpose", ["q"], "t", perm=[0, 2, 1])
    net.node("MatMul", ["q", "t"], "s0")
    net.node("Mul", ["s0", net.const("scale", np.float64(D**-0.5))], "s")
    offset = net.node("Gather", ["triangle", "positions"], "am") if lookup else "triangle"
    net.node("Add", ["s", offset], "m")
    net.node("Softmax", ["m"], "p", axis=-1)
    net.node("MatMul", ["p", "q"], "y")
    net.output("y", dtype=DOUBLE)
    data = {"q": b_normal(N, S, D).astype(np.float64), "positions": np.arange(S)}
    sim = QuantSim(net.build()).calibrate(data)
    expected, found = sim.predict(data, simulated=False)[0], sim.predict(data)[0]
    assert sqnr(expected, found) > 30
    assert np.array_equal(run(sim.export(tmp_path, name="net").files["qdq"], data), found)
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize("target", ["htp_v73", "onnxruntime-cpu", "generic-int8"])
@pytest.mark.parametrize("form", ["triangle of -inf", "-1e4", "where -1e4", "float input -inf"])
def test_masks_at_every_target(form, target, tmp_path):
    net = Net(FORMS[form])
    sim = QuantSim(net.build(), target=target).calibrate(net.data)
    found = sim.predict(net.data)[0]
    assert sqnr(sim.predict(net.data, simulated=False)[0], found) >= 28
    assert np.array_equal(run(sim.export(tmp_path, name="net").files["qdq"], net.data), found)


@pytest.mark.parametrize("form", [guarded, guarded_by_the_mask])
def test_a_softmax_of_nothing_that_the_model_guards(form, tmp_path):
    net = Net(form)
    sim = QuantSim(net.build()).calibrate(net.data)
    assert isinstance(sim.plan["raw"].decision, Float)
    expected, found = sim.predict(net.data, simulated=False)[0], sim.predict(net.data)[0]
    assert not expected[0].any() and not found[0].any()
    assert sqnr(expected, found) >= 28
    assert np.array_equal(run(sim.export(tmp_path, name="net").files["qdq"], net.data), found)


def test_a_softmax_that_cannot_be_nan_keeps_its_grid():
    plan = QuantSim(Net(lambda net, s: guarded_by_the_mask(net, s, LOWEST)).build()).plan
    assert "raw" in plan.quantized


def plan_of(mask):
    return QuantSim(Net(mask).build()).plan


@pytest.mark.parametrize(
    "mask",
    [
        lambda net, s: net.added(s, net.const("bias", b_normal(S, S) * 4 - 12)),
        lambda net, s: net.added(s, net.const("shift", np.float32(-1e4))),
        lambda net, s: net.node("Mul", [s, net.const("sharp", np.float32(2000))], "m"),
        lambda net, s: net.node("Clip", [s, net.const("low", np.float32(-1e4))], "m"),
    ],
    ids=["a learned bias", "a shift of all scores", "sharpened scores", "a bound"],
)
def test_what_merely_is_large_keeps_its_grid(mask):
    plan = plan_of(mask)
    assert "m" in plan.quantized, plan["m"].decision


def test_a_large_constant_that_no_softmax_reads_keeps_its_grid():
    net = b.ModelBuilder()
    net.input("x", ["n", 4])
    net.const("offset", np.float32([0, -2000, 0, 3]))
    net.node("Add", ["x", "offset"], "a")
    net.weight("w", 4, 4)
    net.node("MatMul", ["a", "w"], "y")
    net.output("y")
    plan = QuantSim(net.build()).plan
    assert {"a", "offset"} <= set(plan.quantized)


@pytest.mark.parametrize("read", ["nothing", "ReduceMax", "GlobalMaxPool", "MatMul"])
@pytest.mark.parametrize("outlier", [1500, 3])
def test_a_codebook_with_an_outlier_keeps_its_grid(read, outlier):
    """What is added to a signal that no softmax reads is a mask where it is of zeros and one huge number only."""
    net = b.ModelBuilder(opset=17)
    net.input("x", ["n", 4, D])
    net.input("codes", ["n", 4], b.INT64)
    net.node("Abs", ["x"], "h")
    codebook = b_normal(20, D)
    codebook[3, 2] = outlier
    net.node("Gather", [net.const("codebook", codebook), "codes"], "c")
    net.node("Mul", ["c", net.const("root", np.float32(32))], "scaled")
    net.node("Add", ["h", "scaled"], "sum" if read != "nothing" else "y")
    if read == "ReduceMax":
        net.node("ReduceMax", ["sum"], "y", axes=[1], keepdims=0)
    elif read == "GlobalMaxPool":
        net.node("GlobalMaxPool", ["sum"], "y")
    elif read == "MatMul":
        net.node("Softmax", [net.node("MatMul", ["sum", net.const("W", b_normal(D, D, seed=1))], "z")], "y", axis=-1)
    net.output("y")
    sim = QuantSim(net.build())
    assert not any(t.mask for t in sim.graph.tensors.values())
    assert {"codebook", "y" if read == "nothing" else "sum"} <= set(sim.plan.quantized)


@pytest.mark.parametrize("scale", [1, 8])
def test_biases_by_position_keep_their_grid(scale):
    """T5's and Swin's: small values, one for each difference of positions, added to scores."""
    values = b_normal(2 * S, 1) * scale
    values[3] = 25 * scale

    def mask(net, s):
        net.input("differences", ["n", S, S], b.INT64)
        found = net.node("Gather", [net.const("table", values), "differences"], "found")
        return net.added(s, net.node("Squeeze", [found, net.const("last", np.array([-1]))], "am"))

    plan = plan_of(mask)
    assert {"table", "m"} <= set(plan.quantized)


def test_a_table_of_signals_with_a_large_value_keeps_its_grid():
    net = b.ModelBuilder(opset=17)
    net.input("ids", ["n", 4], b.INT64)
    table = b_normal(20, D)
    table[3, 2] = 2e3
    net.node("Gather", [net.const("table", table), "ids"], "rows")
    net.node("MatMul", ["rows", net.const("W", b_normal(D, D, seed=1))], "h")
    net.node("Softmax", ["h"], "y", axis=-1)
    net.output("y")
    assert {"table", "h"} <= set(QuantSim(net.build()).plan.quantized)


def test_an_input_that_is_also_a_signal_is_no_mask():
    """A residual input that is added to what a softmax reads, and multiplied with weights too."""
    net = b.ModelBuilder()
    net.input("x", ["n", 4])
    net.weight("w", 4, 4)
    net.node("MatMul", ["x", "w"], "h")
    net.node("Add", ["h", "x"], "a")
    net.node("Softmax", ["a"], "y")
    net.output("y")
    assert {"x", "a"} <= set(QuantSim(net.build()).plan.quantized)


def test_real_infinities_are_refused():
    net = Net(scaled(-1e4))
    net.data["q"][0, 0, 0] = -np.inf
    with pytest.raises(InputError, match="infinite"):
        QuantSim(net.build()).calibrate(net.data)
    net.data["q"][:] = 0
    net.data["q"][0, 0, 0] = -np.inf  # zeros and −∞, as a mask has them, but this input is none
    with pytest.raises(InputError, match="infinit"):
        QuantSim(net.build()).calibrate(net.data)


@pytest.mark.parametrize("value", [-np.inf, -1e9, -100])
def test_masked_classes_are_no_bias(value):
    """A constant that takes classes away is added behind a product: as its bias it would set the scale of weights."""
    net = b.ModelBuilder()
    net.input("x", ["n", 8])
    net.weight("w", 8, 4)
    net.node("MatMul", ["x", "w"], "h")
    net.node("Add", ["h", net.const("mask", np.float32([0, value, 0, value]))], "m")
    net.node("Softmax", ["m"], "y")
    net.output("y")
    data = {"x": b_normal(N, 8)}
    sim = QuantSim(net.build()).calibrate(data)
    assert {"h", "y"} <= set(sim.plan.quantized) and not {"mask", "m"} & set(sim.plan.quantized)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30


@pytest.mark.parametrize("target", ["default", "htp_v73", "onnxruntime-cpu"])
def test_the_maximum_over_a_padding_of_infinity_has_a_grid(target, tmp_path):
    """−∞ around an image, as exporters pad before max pooling: what the pooling gives is quantized again."""
    net = b.ModelBuilder()
    net.input("x", ["n", 4, 8, 8])
    net.node("Conv", ["x", net.weight("w1", 4, 4, 1, 1)], "c")
    net.const("pads", np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    net.node("Pad", ["c", "pads", net.const("value", np.float32(-np.inf))], "padded")
    net.node("MaxPool", ["padded"], "pooled", kernel_shape=[3, 3], strides=[2, 2])
    net.node("Conv", ["pooled", net.weight("w2", 4, 4, 1, 1)], "y")
    net.output("y")
    data = {"x": b_normal(16, 4, 8, 8)}
    sim = QuantSim(net.build(), target=target).calibrate(data)
    assert {"c", "pooled"} <= set(sim.plan.quantized)
    found = sim.predict(data)[0]
    assert sqnr(sim.predict(data, simulated=False)[0], found) > 30
    assert np.array_equal(run(sim.export(tmp_path).files["qdq"], data), found)
