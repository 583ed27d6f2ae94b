"""Softmax, log-softmax, sigmoid, softplus and the like, written out in ONNX ops: exponentials inside have no grid."""

from __future__ import annotations

import builders as b
import numpy as np
import pytest

from bitwright.simulation import QuantSim
from bitwright.verify import sqnr

CLASSES = 300


class Net(b.ModelBuilder):
    """x·W, up to 20, what is made of it, ·W."""

    def __init__(self, made):
        super().__init__(opset=17)
        self.input("x", ["n", 16])
        self.weight("w1", 16, CLASSES, scale=1.5)
        self.node("MatMul", ["x", "w1"], "h")
        for name, value in {"two": 2.0, "eps": 1e-6, "one": 1.0, "zero": 0.0}.items():
            self.const(name, np.float32(value))
        self.const("last", np.int64([-1]))
        self.weight("w2", CLASSES, 8)
        self.node("MatMul", [made(self, "h"), "w2"], "y")
        self.output("y")

    def exp(self, x, y="e"):
        return self.node("Exp", [x], y)

    def total(self, x, y="s"):
        return self.node("ReduceSum", [x, "last"], y)

    def shifted(self, x):
        return self.node("Sub", [x, self.node("ReduceMax", [x], "m", axes=[-1])], "d")

    def negative(self, x):
        return self.exp(self.node("Neg", [x], "n"))

    def plus_one(self, e):
        return self.node("Add", [e, "one"], "s")


def softmax(net, x):
    return net.node("Div", [net.exp(x), net.total("e")], "p")


def softmax_shifted(net, x):
    return net.node("Div", [net.exp(net.shifted(x)), net.node("Add", [net.total("e"), "eps"], "bounded")], "p")


def softmax_by_a_reciprocal(net, x):
    return net.node("Mul", [net.node("Div", ["one", net.total(net.exp(x))], "r"), "e"], "p")


def softmax_of_a_log_softmax(net, x):
    return net.exp(net.node("LogSoftmax", [x], "l", axis=-1), "p")


def softmax_masked(net, x):
    kept = net.node("Mul", [net.exp(x), net.node("Sigmoid", [x], "g")], "kept")
    return net.node("Div", [kept, net.total(kept)], "p")


def log_softmax(net, x):
    return net.node("Sub", [x, net.node("Log", [net.total(net.exp(x))], "l")], "p")


def log_softmax_shifted(net, x):
    return net.node("Sub", [net.shifted(x), net.node("Log", [net.total(net.exp("d"))], "l")], "p")


def log_softmax_of_a_softmax(net, x):
    return net.node("Log", [net.node("Add", [net.node("Softmax", [x], "s", axis=-1), "eps"], "bounded")], "p")


def log_sum_exp(net, x):
    total = net.node("Log", [net.total(net.exp(net.shifted(x)))], "l")
    return net.node("Sub", [x, net.node("Add", [total, "m"], "bounded")], "p")


def sigmoid(net, x):
    return net.node("Div", ["one", net.plus_one(net.negative(x))], "p")


def sigmoid_of_e(net, x):
    return net.node("Div", [net.exp(x), net.plus_one("e")], "p")


def swish(net, x):
    return net.node("Div", [x, net.plus_one(net.negative(x))], "p")


def softplus(net, x):
    return net.node("Log", [net.plus_one(net.exp(x))], "p")


def tanh(net, x):
    twice = net.exp(net.node("Mul", [x, "two"], "d"))
    return net.node("Div", [net.node("Sub", [twice, "one"], "r"), net.plus_one(twice)], "p")


def elu(net, x):
    below = net.node("Sub", [net.exp(x), "one"], "s")
    return net.node("Where", [net.node("Greater", [x, "zero"], "c"), x, below], "p")


ALL = [softmax, softmax_shifted, softmax_by_a_reciprocal, softmax_of_a_log_softmax, softmax_masked, log_softmax,
       log_softmax_shifted, log_softmax_of_a_softmax, log_sum_exp, sigmoid, sigmoid_of_e, swish, softplus, tanh,
       elu]  # fmt: skip


@pytest.mark.parametrize("made", ALL, ids=lambda f: f.__name__)
def test_exponentials_have_no_grid(made):
    x = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    model = Net(made).build()
    for target, types, least in (
        ("default", {"weights": "int16", "activations": "uint16", "scheme": "minmax"}, 65),
        ("htp_v66", {}, 20),  # it says nothing of passes
    ):
        sim = QuantSim(model, target=target, **types).calibrate({"x": x})
        expected, found = (sim.predict({"x": x}, simulated=s)[0] for s in (False, True))
        assert sqnr(expected, found) >= least
        assert not {"e", "s", "l", "kept", "bounded", "r"} & set(sim.plan.quantized)
        assert {"h", "p"} <= set(sim.plan.quantized)


def test_one_that_others_read_keeps_its_grid():
    def leaking(net, x):
        return net.node("Add", [softmax(net, x), "s"], "out")

    assert {"e", "s", "p"} <= set(QuantSim(Net(leaking).build()).plan.quantized)


def test_a_file_that_lists_its_passes_gets_those_alone():
    target = {"bitwright": {"extends": "default"}, "supergroup_pass_list": []}
    assert {"e", "s"} <= set(QuantSim(Net(softmax).build(), target=target).plan.quantized)
