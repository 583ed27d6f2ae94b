"""Layers whose moments are too large are solved in blocks of input channels: on data and on banks."""

import warnings

import numpy as np
import pytest
from backends import FRAMEWORKS
from layers import KINDS, inputs, make_op

from bitwright.bank import collect
from bitwright.errors import InputError
from bitwright.graph import columns, split_columns, to_matrix
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.layerwise import blocks_within, solution
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer
from bitwright.testing.builder import Builder
from bitwright_techniques.adaround import AdaRoundSettings
from bitwright_techniques.adaround import round_layer as adaround
from bitwright_techniques.gptq import GptqSettings, round_layer
from bitwright_techniques.reconstruction import corrected_bias, reconstruction
from bitwright_techniques.seq_mse import SeqMseSettings, scale_layer

PORT = FRAMEWORKS.get("onnx")
GRANULARITIES = {
    "channel": PerChannel(0),
    "tensor": PerTensor(),
    "blocks": Blockwise(0, 1, 8),
    "lpbq": Blockwise(0, 1, 8, decompressed_bits=8),
}


def blocked(kind, blocks, seed=0, noise=0.0):
    """A random op, its input (x, x̂), and moments of it whole and in blocks."""
    rng = np.random.default_rng(seed)
    op, shape = make_op(kind)
    x = inputs(op, shape, rng)
    pair = (x, (x + noise * rng.normal(size=x.shape)).astype(np.float32)) if noise else (x,)
    features = to_matrix(op, np.zeros(shape)).shape[2]
    found = [LayerMoments(op, features, paired=noise > 0, blocks=n) for n in (1, blocks)]
    for m in found:
        m.update(*(v[: len(x) // 2] for v in pair))
        m.update(*(v[len(x) // 2 :] for v in pair))
    return op, shape, pair, *found


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "depthwise"])
def test_blocks_are_those_along_the_diagonal(kind):
    blocks = 3 if kind in ("grouped", "transposed") else 2
    op, shape, (x, q), whole, parts = blocked(kind, blocks, noise=0.1)
    groups, features = whole.mean.shape
    size = features // blocks
    for name in ("xx", "qq", "xq"):
        for g in range(groups):
            for b in range(blocks):
                at = slice(b * size, (b + 1) * size)
                expected = getattr(whole, name)[g, at, at]
                assert getattr(parts, name)[g * blocks + b] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert parts.mean.reshape(groups, -1) == pytest.approx(whole.mean, rel=1e-9)
    assert parts.count == whole.count
    # The loss is the sum of what each block alone would do to the output.
    rng = np.random.default_rng(1)
    w, v = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    problem = reconstruction(op, w, parts, free_bias=False)
    a, b = (split_columns(to_matrix(op, m), blocks).astype(np.float64) for m in (w, v))
    cx, cq = (np.concatenate(list(columns(op, t)), axis=2).reshape(groups * blocks, size, -1) for t in (x, q))
    error = np.square(a @ cx - b @ cq).mean(axis=2)
    assert problem.loss(b) == pytest.approx(error, rel=1e-4, abs=1e-4)
    bias = rng.normal(size=groups * to_matrix(op, w).shape[1])
    assert corrected_bias(op, w, v, bias, parts) == pytest.approx(corrected_bias(op, w, v, bias, whole), rel=1e-5)
    assert LayerMoments.bytes_for(op, features, blocks=blocks) == sum(
        a.nbytes for k, a in parts.state().items() if k != "count"
    )


def wide_layer(granularity, blocks, features=64, outputs=12):
    rng = np.random.default_rng(3)
    op, _ = make_op("linear")
    mixing = rng.normal(size=(features, features)) / 8
    x = (rng.normal(size=(400, features)) @ (mixing + np.eye(features))).astype(np.float32)
    moments = LayerMoments(op, features, paired=False, blocks=blocks)
    moments.update(x)
    weight = rng.normal(size=(outputs, features)).astype(np.float32)
    encoding = encoding_of_weights(weight, QuantSpec(4, granularity=granularity))
    return Layer(op, weight, np.zeros(outputs, np.float32), moments, encoding), x


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", ["gptq", "adaround", "seq_mse"])
def test_blocks_lose_little_and_gain_over_nearest(rule, granularity):
    """The error at the output, of all features together: less than that of nearest rounding, more than in one piece."""
    solve = {
        "gptq": lambda layer: round_layer(layer, GptqSettings(inputs="float", bias_correction=True)),
        "adaround": lambda layer: adaround(
            layer, AdaRoundSettings(inputs="float", bias_correction=True), np.random.default_rng(0)
        ),
        "seq_mse": lambda layer: scale_layer(layer, SeqMseSettings(inputs="float", bias_correction=True)),
    }[rule]
    errors = {}
    for blocks in (1, 4):
        layer, x = wide_layer(GRANULARITIES[granularity], blocks)
        result = solution(solve, layer)
        assert not result.left
        assert result.figures.get("blocks", 1.0) == blocks
        exact = result.encoding.fake_quantize(layer.weight if rule == "seq_mse" else result.weight)
        assert np.array_equal(exact, result.weight), "off its grid"
        assert result.encoding.scale.shape == layer.encoding.scale.shape
        out = x @ layer.weight.T - (x @ result.weight.T + result.bias)
        errors[blocks] = np.square(out).mean()
    nearest = x @ (layer.weight - layer.encoding.fake_quantize(layer.weight)).T
    nearest = np.square(nearest - nearest.mean(axis=0)).mean()
    assert errors[4] < nearest
    if rule != "seq_mse":
        assert errors[1] < errors[4]


def test_the_fewest_blocks_that_fit():
    op, _ = make_op("linear")
    gib = lambda blocks, features=18944: LayerMoments.bytes_for(op, features, paired=False, blocks=blocks) / 2**30
    shape = (8, 18944)
    assert blocks_within(gib(1), op, shape, 18944) == (1, "")
    assert blocks_within(2.0, op, shape, 18944) == (2, "")
    assert blocks_within(2.0, op, (8, 28672), 28672) == (4, "")
    assert blocks_within(2.0, op, shape, 18944, paired=True) == (8, "")
    encoding = encoding_of_weights(np.ones(shape, np.float32), QuantSpec(4, granularity=Blockwise(0, 1, 128)))
    assert blocks_within(gib(148), op, shape, 18944, encoding) == (148, "")
    none, reason = blocks_within(gib(148) / 1.2, op, shape, 18944, encoding)
    assert none == 0 and "take 2.67 GiB" in reason
    assert blocks_within(2.0, op, shape, 18944, most=1)[0] == 0
    assert blocks_within(2.0, op, (8, 18947), 18947)[0] == 0  # a prime
    with pytest.raises(InputError, match="unequal blocks"):
        LayerMoments(op, 12, blocks=5)


@pytest.mark.skipif(PORT is None, reason="needs ONNX")
@pytest.mark.parametrize("weights", ["int4", "int4:block8"])
def test_a_bank_and_data_are_solved_in_the_same_blocks(weights, tmp_path):
    """From moments kept whole, kept in blocks, and of data: the same codes; without room for any, nearest."""
    b = Builder(0)
    model = b.build(b.linear("narrow", b.relu("act", b.linear("wide", b.input("x", 64), 24)), 4))
    sim = PORT.sim(model, weights=weights)
    shape = {name: s for name, (s, _) in sim.state.inputs.items()}
    data = {n: np.random.default_rng(2).normal(size=(40, *s[1:])).astype(np.float32) for n, s in shape.items()}
    wide = max(sim.graph.linear_ops, key=lambda op: to_matrix(op, sim.params[op.weight]).shape[2])
    features = to_matrix(wide, sim.params[wide.weight]).shape[2]
    budget = LayerMoments.bytes_for(wide, features, paired=False, blocks=2) / 2**30
    bank, small = collect(sim, data, tmp_path / "bank"), collect(sim, data, tmp_path / "small", moments_gib=budget)
    assert small.blocks(wide) == 2 and bank.blocks(wide) == 1
    assert small.bytes < bank.bytes
    told = rf"gptq: the moments of .*{wide.id!r} \(in 2\).*are larger than moments_gib"
    solved = {}
    for name, given in (("data", data), ("bank", bank), ("small", small)):
        with pytest.warns(UserWarning, match=told):
            solved[name] = sim.fork().apply("gptq", given, inputs="float", moments_gib=budget)
    whole = sim.fork().apply("gptq", bank, inputs="float")
    codes = {n: s.encodings[wide.weight].quantize(s.params[wide.weight]) for n, s in {**solved, "": whole}.items()}
    assert np.array_equal(codes["bank"], codes["data"]) and np.array_equal(codes["small"], codes["data"])
    assert not np.array_equal(codes[""], codes["data"])
    with pytest.warns(UserWarning, match=r"weight_clipping: .*in 2 blocks, which this technique doesn't take"):
        sim.fork().apply("weight_clipping", small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim.fork().apply("bias_correction", small)
