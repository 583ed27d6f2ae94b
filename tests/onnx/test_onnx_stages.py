"""Networks in stages compute what ONNX Runtime makes of the whole, whatever it fuses there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from bitwright.calibration import _stages, collect, in_parts
from bitwright.simulation import QuantSim
from bitwright.statistics import Request

NETS = {
    "layer normalization in elementary ops, one of whose tensors is read twice": """
        agraph (float[N,8,16] x) => (float[N,8,16] y, float[N,8,16] other)
        <float two = {2.0}, float small = {0.00001}> {
            t = Tanh(x)
            mean = ReduceMean<axes = [-1], keepdims = 1>(t)
            centred = Sub(t, mean)
            other = Sigmoid(t)
            square = Pow(centred, two)
            variance = ReduceMean<axes = [-1], keepdims = 1>(square)
            some = Add(variance, small)
            deviation = Sqrt(some)
            normed = Div(centred, deviation)
            scaled = Mul(normed, gamma)
            shifted = Add(scaled, beta)
            y = MatMul(shifted, weight)
        }""",
    "a product of a scaled operand": """
        agraph (float[N,8,16] x) => (float[N,8,16] y)
        <float third = {0.3}> {
            t = Tanh(x)
            scaled = Mul(t, third)
            product = MatMul(scaled, weight)
            y = Sigmoid(product)
        }""",
    "half precision": """
        agraph (float[N,8,16] x) => (float[N,8,16] y)
        {
            h = Cast<to = 10>(x)
            t = Tanh(h)
            scaled = Mul(t, half)
            z = Softmax<axis = -1>(scaled)
            r = Sigmoid(z)
            y = Cast<to = 1>(r)
        }""",
    "blocks of channels behind a convolution": """
        agraph (float[N,8,16,16] x) => (float[N,16,1,1] y) {
            c = Conv<kernel_shape = [3, 3]>(x, kernels)
            r = Relu(c)
            n = BatchNormalization(r, gamma, beta, beta, gamma)
            p = GlobalAveragePool(n)
            y = Sigmoid(p)
        }""",
}  # fmt: skip


def network(text):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    read = {name for node in model.graph.node for name in node.input}
    for name, values in {
        "weight": rng.normal(0, 0.3, (16, 16)),
        "gamma": rng.uniform(0.5, 1.5, 16),
        "beta": rng.normal(0, 0.2, 16),
        "kernels": rng.normal(0, 0.1, (16, 8, 3, 3)),
        "half": np.array(0.3, np.float16),
    }.items():
        if name in read:
            kept = values if values.dtype == np.float16 else values.astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(kept, name))
    onnx.checker.check_model(model, full_check=True)
    return model


class Kept:
    """A statistic that is all that it has seen."""

    reduction, axis = "none", None

    def __init__(self):
        self.values = []

    def update(self, *values):
        self.values += [np.array(v) for v in values]


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_what_is_fused_blocked_or_kept_in_single_precision_is_not_cut(net, monkeypatch):
    sim = QuantSim(network(net), weights="int8", activations="uint8")
    backend, model, shape = sim.backend, sim.native, sim.graph.tensors["x"].shape[1:]
    data = sim.open([{"x": np.random.default_rng(i).normal(0, 2, (4, *shape)).astype(np.float32)} for i in range(2)])

    def opened(source, taps):
        return backend.session(model, taps)

    def part_opened(source, part, feeds, taps):
        return opened(source, taps) if feeds is None else backend.segment(model, feeds, taps)

    requests = [Request(t, (t,), Kept) for t in sim.plan.activations]
    whole = collect(requests, opened, data)
    monkeypatch.setattr(_stages, "TAP_BYTES", 1)
    monkeypatch.setattr(_stages, "_own_bytes", lambda *_: 0)
    staged = collect(requests, opened, data, divided=in_parts(backend, sim.graph, part_opened))
    for tensor, kept in whole.items():
        for one, other in zip(kept.values, staged[tensor].values, strict=True):
            np.testing.assert_array_equal(other, one, err_msg=tensor)
