"""Linear ops, which work on the last axis, beside convolutions and batch norms, which have their channels on another.

Every size is the same, so that numbers of one axis fit the other.
"""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from bitwright import QuantSim
from bitwright.graph import OpKind
from bitwright.verify import verify
from bitwright_techniques.expected_inputs import ExpectedInputs

N = 6


def norm():
    layer = nn.BatchNorm2d(N)
    for values in (layer.running_var, layer.weight, layer.running_mean, layer.bias):
        values.data = torch.rand(N) + 0.3
    return layer


def features():
    return nn.Linear(N, N)


def convolution():
    return nn.Conv2d(N, N, 1)


NETS = {
    "linear, convolution": (features, nn.ReLU, convolution),
    "layer norm, convolution": (lambda: nn.LayerNorm(N), convolution, nn.ReLU, convolution),
    "convolution, linear, convolution": (convolution, nn.ReLU, features, nn.ReLU, convolution),
    "linear, pool, convolution": (features, nn.ReLU, lambda: nn.AvgPool2d(1), convolution),
    "linear, batch norm, convolution": (features, norm, nn.ReLU, convolution),
    "batch norm, linear": (convolution, nn.ReLU, norm, features, nn.ReLU, convolution),
    "linear, batch norm, linear": (features, nn.ReLU, norm, features),
}


def built(name):
    torch.manual_seed(0)
    net = nn.Sequential(*(make() for make in NETS[name])).eval()
    for p in net.parameters():
        if p.ndim > 1:
            p.data *= torch.exp(torch.randn(len(p), *[1] * (p.ndim - 1)))
    return net, torch.randn(8, N, N, N, generator=torch.Generator().manual_seed(1))


def sqnr(wanted, found):
    return 10 * np.log10(np.square(wanted).sum() / max(np.square(found - wanted).sum(), 1e-30))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("technique", ["cross_layer_equalization", "fold_batch_norm"])
def test_what_keeps_the_float_model_keeps_it(name, technique):
    net, x = built(name)
    reference = net(x).detach().numpy()
    sim = QuantSim(net, x[:2]).calibrate(x).apply(technique, x)
    assert sqnr(reference, sim.predict(x, simulated=False)[0]) > 90


@pytest.mark.parametrize("name", NETS)
def test_inputs_of_convolutions_are_measured_by_channel(name):
    net, x = built(name)
    sim = QuantSim(net, x[:2]).calibrate(x)
    for op in sim.graph.linear_ops:
        if op.kind is OpKind.CONV:
            assert {sim.graph.tensors[t].channel_axis for t in (op.data_inputs[0], op.output)} == {1}
    reference = sim.predict(x, simulated=False)[0]
    nearest = sqnr(reference, sim.predict(x)[0])
    for technique in ("gptq", "bias_correction"):
        done = sim.fork().apply(technique, x).calibrate(x)
        assert sqnr(reference, done.predict(x)[0]) > nearest - 1


@pytest.mark.parametrize("name", ["linear, convolution", "linear, pool, convolution"])
def test_the_integer_run_reads_each_axis(name, tmp_path):
    net, x = built(name)
    sim = QuantSim(net, x[:2]).calibrate(x)
    sim.export(tmp_path, name="m")
    assert not verify(tmp_path, {"input": x.numpy()}).problems


def test_expected_means_of_features_are_no_channels():
    net, x = built("linear, convolution")
    graph = QuantSim(net, x[:2]).graph
    linear, conv = graph.linear_ops
    ones = np.ones(N)
    assert ExpectedInputs(graph, {linear.id: (ones, ones)}).columns(conv) is None
    net, x = built("batch norm, linear")
    graph = QuantSim(net, x[:2]).graph
    first, linear, last = graph.linear_ops
    known = ExpectedInputs(graph, {op.id: (ones, ones) for op in (first, linear, last)})
    assert known.columns(linear) is None and known.columns(last) is None
