"""Norms written out in ONNX ops are one op at every target, however they are written."""

from __future__ import annotations

import warnings

import builders as b
import numpy as np
import pytest

from bitwright.backend import NonFiniteWarning
from bitwright.errors import ModelError
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr

D = 32
TARGETS = ("default", "per_tensor", "htp_v66", "htp_v73", "generic-int8", "onnxruntime-cpu")


class Net(b.ModelBuilder):
    """x·W, a norm, ·W; one token in eight carries a thousand times the others' activations."""

    def __init__(self, norm):
        super().__init__(opset=17)
        self.input("x", ["n", 8, D])
        self.weight("w1", D, D, scale=D**-0.5)
        self.node("MatMul", ["x", "w1"], "h")
        for name, value in {"two": 2.0, "eps": 1e-6, "half": 0.5, "minus_half": -0.5, "one": 1.0, "count": D}.items():
            self.const(name, np.float32(value))
        self.const("last", np.int64([-1]))
        self.positive("gamma", D)
        self.weight("beta", D)
        self.weight("w2", D, D, scale=D**-0.5)
        self.node("MatMul", [norm(self, "h"), "w2"], "y")
        self.output("y")

    def mean(self, x, y):
        return self.node("ReduceMean", [x], y, axes=[-1])

    def square(self, x, y="sq"):
        return self.node("Pow", [x, "two"], y)

    def root(self, v):
        return self.node("Sqrt", [self.node("Add", [v, "eps"], "shifted")], "root")

    def scaled(self, x):
        return self.node("Mul", [x, "gamma"], "norm")


def rms(net, x):
    return net.scaled(net.node("Div", [x, net.root(net.mean(net.square(x), "v"))], "n"))


def rms_times_itself(net, x):
    v = net.mean(net.node("Mul", [x, x], "sq"), "v")
    inverse = net.node("Reciprocal", [net.root(v)], "inverse")
    return net.node("Mul", ["gamma", net.node("Mul", [inverse, x], "n")], "norm")


def rms_with_casts(net, x):
    """As Hugging Face has it in half precision: the norm in float32, γ behind the cast back."""
    wide = net.node("Cast", [x], "wide", to=b.FLOAT)
    v = net.node("Add", [net.mean(net.square(wide), "v"), "eps"], "shifted")
    n = net.node("Mul", [wide, net.node("Pow", [v, "minus_half"], "inverse")], "n")
    return net.node("Mul", ["gamma", net.node("Cast", [n], "narrow", to=b.FLOAT)], "norm")


def rms_of_a_sum(net, x):
    v = net.node("Div", [net.node("ReduceSum", [net.square(x), "last"], "s"), "count"], "v")
    return net.scaled(net.node("Div", [x, net.root(v)], "n"))


def layer(net, x):
    d = net.node("Sub", [x, net.mean(x, "mu")], "d")
    n = net.node("Div", [d, net.root(net.mean(net.square(d), "v"))], "n")
    return net.node("Add", [net.scaled(n), "beta"], "out")


def layer_with_casts(net, x):
    d = net.node("Sub", [x, net.mean(x, "mu")], "d")
    wide = net.node("Cast", [d], "wide", to=b.FLOAT)
    n = net.node("Div", [d, net.root(net.mean(net.square(wide), "v"))], "n")
    return net.node("Add", [net.scaled(net.node("Cast", [n], "narrow", to=b.FLOAT)), "beta"], "out")


def layer_of_squares(net, x):
    """The variance as mean(x²) − mean(x)²."""
    mu = net.mean(x, "mu")
    v = net.node("Sub", [net.mean(net.square(x), "ms"), net.square(mu, "mu2")], "v")
    n = net.node("Div", [net.node("Sub", [x, mu], "d"), net.root(v)], "n")
    return net.node("Add", [net.scaled(n), "beta"], "out")


def layer_shifted(net, x):
    """x·s + (β − mean·s), as tf2onnx writes it."""
    mu = net.mean(x, "mu")
    d = net.node("Sub", [x, mu], "d")
    inverse = net.node("Reciprocal", [net.root(net.mean(net.node("Mul", [d, d], "sq"), "v"))], "inverse")
    s = net.node("Mul", [inverse, "gamma"], "s")
    shift = net.node("Sub", ["beta", net.node("Mul", [mu, s], "moved")], "shift")
    return net.node("Add", [net.node("Mul", [x, s], "scaled"), shift], "out")


def unit(net, x):
    length = net.node("ReduceL2", [x], "length", axes=[-1])
    return net.node("Div", [x, net.node("Max", [length, "eps"], "bounded")], "norm")


def unit_of_a_sum(net, x):
    s = net.node("ReduceSum", [net.node("Mul", [x, x], "sq"), "last"], "s")
    inverse = net.node("Reciprocal", [net.node("Sqrt", [net.node("Max", [s, "eps"], "bounded")], "root")], "inverse")
    return net.node("Mul", [x, inverse], "norm")


NORMS = [rms, rms_times_itself, rms_with_casts, rms_of_a_sum, layer, layer_with_casts, layer_of_squares, layer_shifted,
         unit, unit_of_a_sum]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
def test_a_norm_that_is_written_out_is_one_op(norm, target):
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    x[:, 0] *= 1000
    net = Net(norm)
    sim = QuantSim(net.build(), target=target, activations="uint16", scheme="minmax").calibrate({"x": x})
    expected, found = (sim.predict({"x": x}, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= 25
    inner = {"sq", "v", "root", "shifted", "inverse", "d", "mu", "length", "bounded", "s", "n", "narrow", "moved"}
    assert not inner & set(sim.plan.quantized)


def magnitude(net, x):
    """Of a spectrum: √(re² + im²)."""
    im = net.node("Mul", [x, "gamma"], "im")
    power = net.node("Add", [net.square(x), net.node("Mul", [im, im], "sq_im")], "v")
    return net.node("Sqrt", [power], "out")


def distance(net, x):
    """√max(Σ(x − β)², ε)."""
    square = net.square(net.node("Sub", [x, "beta"], "between"))
    s = net.node("Max", [net.node("ReduceSum", [square, "last"], "s"), "eps"], "bounded")
    return net.node("Add", [net.node("Sqrt", [s], "far"), "beta"], "out")


def energy(net, x):
    """log(re² + im² + 1)."""
    im = net.node("Mul", [x, "gamma"], "im")
    power = net.node("Add", [net.square(x), net.node("Mul", [im, im], "sq_im")], "v")
    return net.node("Log", [net.node("Add", [power, "one"], "bounded")], "out")


def deviation(net, x):
    """√(mean(x²) − mean(x)²), as statistics are pooled."""
    squared_mean = net.square(net.mean(x, "mu"), "mu2")
    v = net.node("Sub", [net.mean(net.square(x), "ms"), squared_mean], "v")
    return net.node("Add", [net.node("Pow", [v, "half"], "far"), "beta"], "out")


@pytest.mark.parametrize("target", ["default", "htp_v73", "onnxruntime-cpu"])
@pytest.mark.parametrize("length", [magnitude, distance, deviation, energy], ids=lambda f: f.__name__)
def test_squares_below_a_root_have_no_grid(length, target):
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    x[:, 0] *= 1000
    sim = QuantSim(Net(length).build(), target=target, activations="uint16", scheme="minmax").calibrate({"x": x})
    expected, found = (sim.predict({"x": x}, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= 20
    assert not {"sq", "sq_im", "s", "bounded", "v", "ms", "mu2"} & set(sim.plan.quantized)
    assert "h" in sim.plan.quantized


def test_sums_below_a_root_that_are_no_squares_keep_their_grids():
    def mixed(net, x):
        return net.node("Sqrt", [net.node("Add", [net.square(x), net.node("Abs", [x], "abs")], "v")], "out")

    assert {"sq", "abs", "v"} <= set(QuantSim(Net(mixed).build()).plan.quantized)


def test_parts_of_a_norm_that_others_read_keep_their_grids():
    def leaking(net, x):
        v = net.mean(net.square(x), "v")
        n = net.node("Div", [x, net.root(v)], "n")
        return net.node("Add", [net.scaled(n), v], "out")

    assert {"v", "sq", "root"} <= set(QuantSim(Net(leaking).build()).plan.quantized)


def test_a_simulation_that_is_not_finite_says_where_it_began(tmp_path):
    """With its squares on a grid, a norm's root is zero for ordinary tokens, and 0 / 0 isn't a number."""
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    x[:, 0] *= 1000
    target = {"bitwright": {"extends": "default"}, "supergroup_pass_list": []}
    sim = QuantSim(Net(rms).build(), target=target, activations="uint16", scheme="minmax").calibrate({"x": x})
    with pytest.warns(NonFiniteWarning, match=r"begins at tensor 'n', which 'n_op' \(Div\) computes from 'h', 'root'"):
        found = sim.predict({"x": x})[0]
    assert np.isnan(found).any()
    with pytest.warns(NonFiniteWarning, match="begins at tensor 'n'"), pytest.raises(ModelError, match="NaN"):
        sim.export(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim.predict({"x": x}, simulated=False)
        QuantSim(Net(rms).build(), scheme="minmax").calibrate({"x": x}).predict({"x": x})


def test_infinities_of_the_float_model_are_no_fault_of_the_simulation():
    m = b.ModelBuilder()
    m.input("x", ["n", 4])
    m.weight("w", 4, 4)
    m.node("MatMul", ["x", "w"], "h")
    m.node("Add", ["h", m.const("mask", np.float32([0, -np.inf, 0, -np.inf]))], "y")
    m.output("y")
    data = {"x": np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)}
    sim = QuantSim(m.build()).calibrate(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(sim.predict(data)[0][:, 1::2]).all()
