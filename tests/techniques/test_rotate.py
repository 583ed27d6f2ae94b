"""Rotation of residual streams: the float function stays, channels even out, and what can't be rotated is said."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap
from bitwright.bank import collect
from bitwright.errors import InputError
from bitwright.graph import OpKind, ParamRole
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques.orthogonal import hadamard, rotation
from bitwright_techniques.residual_streams import residual_streams
from bitwright_techniques.rotate import Rotate
from bitwright_techniques.value_heads import value_heads

WIDTH = 12


def decoder(*, norm="layer", bias=True, read=False, tied=False):
    """Two pre-norm blocks on a stream that a linear op begins, with a channel that stands out."""
    b = Builder(3)
    x = b.input("x", WIDTH, channel_axis=1)
    weight = b.rng.normal(0, 0.5, (WIDTH, WIDTH))
    weight[7] *= 30
    x = b.linear("embed", x, WIDTH, weight=weight, bias=bias)
    if norm == "rms":
        x = b.binary("place", "Add", x, b.rng.normal(0, 1, WIDTH))

    def normed(name, y):
        if norm == "layer":
            return b.layer_norm(name, y)
        square = b.binary(f"{name}.square", "Mul", y, y)
        mean = b.op(f"{name}.mean", OpKind.AVERAGE_POOL, "ReduceMean", (square,), (None, 1), attrs=last_mean())
        root = b.activation(f"{name}.root", b.binary(f"{name}.eps", "Add", mean, np.float32([1e-5])), "Sqrt")
        y = b.op(f"{name}.div", OpKind.ELEMENTWISE, "Div", (y, root), (None, WIDTH))
        return b.binary(name, "Mul", y, b.rng.uniform(0.5, 2, WIDTH))

    for i in range(2):
        y = normed(f"norm{i}", x)
        y = b.binary(f"gated{i}", "Mul", b.relu(f"act{i}", b.linear(f"gate{i}", y, 20)), b.linear(f"up{i}", y, 20))
        x = b.binary(f"sum{i}", "Add", x, b.linear(f"down{i}", y, WIDTH, bias=bias))
    extra = [b.relu("seen", x)] if read else []
    y = normed("last", x)
    head = {ParamRole.WEIGHT: "embed.weight"} if tied else {}
    y = b.op("head", OpKind.LINEAR, "MatMul", (y,), (None, WIDTH), params=head) if tied else b.linear("head", y, 9)
    return b.build(y, *extra)


def last_mean():
    from bitwright.graph import PoolAttrs

    return PoolAttrs((1,), None, False, True)


def outputs(port, sim, batch):
    taps = [Tap(t) for t in sim.graph.outputs]
    return [sim.backend.session(sim.native, taps).run(batch)[t] for t in taps]


@pytest.mark.parametrize("n", [1, 2, 12, 28, 36, 40, 576])
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert np.allclose(h @ h.T, np.eye(n))
    assert np.allclose(np.abs(h), n**-0.5)


def test_rotations():
    rng = np.random.default_rng(0)
    assert hadamard(6) is None
    for n, random, keeps in ((6, False, False), (12, True, False), (12, False, True), (7, True, True)):
        q = rotation(n, rng, random=random, keeps_mean=keeps)
        assert np.allclose(q @ q.T, np.eye(n))
        assert np.allclose(q.sum(axis=0), 1) == keeps
        assert np.abs(q - np.eye(n)).max() > 0.1


def test_the_float_function_stays_with_layer_norms():
    port, model = FRAMEWORKS["onnx"], decoder()
    sim = port.sim(model)
    batch = port.batch(models.batch(model, 4))
    before = outputs(port, sim, batch)[0]
    sim.apply("rotate")
    after = outputs(port, sim, batch)[0]
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()
    (row,) = sim.reports[-1][1].rows
    assert row[1:] == (WIDTH, 3, 5, "rotated")
    rows = np.linalg.norm(np.asarray(sim.params[sim.graph.op("embed").weight]), axis=1)
    assert rows.max() < 0.7 * np.linalg.norm(rows)  # one was 30 times as large as the others: 0.99


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_written_out_norms_constants_and_shared_matrices(kind, tied):
    """On the reference backend; a matrix that writes and reads the stream parts in two."""
    model = decoder(norm="rms", tied=tied)
    backend, batch = ReferenceBackend(), models.batch(model, 4)
    graph = backend.graph(model)
    applied = run_technique(Rotate(), backend, model, kind=kind)
    tap = Tap(graph.outputs[0])
    before, after = (backend.session(m, [tap]).run(batch)[tap] for m in (model, applied.model))
    report = applied.outcome.report
    assert (report.figures["rotated"], report.figures.get("split", 0)) == (1, int(tied))
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()


def test_a_language_model_with_a_tied_embedding():
    torch = pytest.importorskip("torch")
    from bitwright import QuantSim

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(24) + 0.5)

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(40, 24)
            self.norms = torch.nn.ModuleList(Norm() for _ in range(3))
            self.ups = torch.nn.ModuleList(torch.nn.Linear(24, 32) for _ in range(2))
            self.downs = torch.nn.ModuleList(torch.nn.Linear(32, 24) for _ in range(2))
            self.head = torch.nn.Linear(24, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
                x = x + down(torch.nn.functional.silu(up(norm(x))))
            return self.head(self.norms[2](x))

    torch.manual_seed(0)
    ids = {"ids": np.arange(30).reshape(3, 10)}
    sim = QuantSim(Net().eval(), {k: torch.from_numpy(v) for k, v in ids.items()})
    before = outputs(None, sim, ids)[0]
    sim.apply("rotate")
    after = outputs(None, sim, ids)[0]
    assert sim.reports[-1][1].figures == {**sim.reports[-1][1].figures, "rotated": 1.0, "split": 1.0}
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_what_reads_a_stream_otherwise_keeps_it_as_it_is():
    (stream,) = residual_streams(decoder(read=True).graph)
    assert "'seen' (Relu) reads it" in stream.obstacle
    (stream,) = residual_streams(decoder().graph)
    assert not stream.obstacle
    assert list(residual_streams(models.conv_bn_relu().graph)) == []


def test_an_lp_norm_is_no_norm_that_rotations_commute_with():
    """With p = 1, or over another axis, the rotated stream would have another norm."""
    b = Builder(3)
    x = b.linear("embed", b.input("x", WIDTH, channel_axis=1), WIDTH)
    x = b.binary("sum", "Add", x, b.linear("fc", b.layer_norm("norm", x), WIDTH))
    unit = b.op("unit", OpKind.NORM, "LpNormalization", (x,), (None, WIDTH))
    model = b.build(b.linear("head", unit, 9))
    (stream,) = residual_streams(model.graph)
    assert "'unit' (LpNormalization) reads it" in stream.obstacle


def test_frozen_weights_are_left_with_the_reason():
    port = FRAMEWORKS["onnx"]
    sim = port.sim(decoder()).calibrate(port.batch(models.batch(decoder(), 4)))
    head = sim.graph.op("head").weight
    before = np.asarray(sim.params[head])
    sim.set({head: sim.encodings[head]}, freeze=True)
    sim.apply("rotate")
    assert "is frozen" in sim.reports[-1][1].rows[0][-1]
    assert np.array_equal(sim.params[head], before)


@pytest.mark.skipif("onnx" not in FRAMEWORKS, reason="needs ONNX")
def test_a_bank_is_collected_behind_a_rotation(tmp_path):
    """It solves and calibrates as data do there; one from before it is refused."""
    port, model = FRAMEWORKS["onnx"], decoder()
    sim = port.sim(model, weights="int4")
    data = port.batch(models.batch(model, 24))
    before = collect(sim, data, tmp_path / "before")
    rotated = sim.fork().apply("rotate")
    with pytest.raises(InputError, match="rotate changed the network since: collect behind"):
        rotated.fork().apply("gptq", before)
    behind = collect(rotated, data, tmp_path / "behind")
    on_data = rotated.fork().apply("gptq", data, inputs="float")
    on_bank = sim.fork().apply("rotate").apply("gptq", behind)
    for op in sim.graph.linear_ops:
        one, other = (s.encodings[op.weight].quantize(s.params[op.weight]) for s in (on_bank, on_data))
        np.testing.assert_array_equal(one, other, err_msg=op.id)
        assert (on_bank.params[op.weight] != rotated.params[op.weight]).any(), "nothing was rounded"
    on_bank.calibrate(behind)
    assert all(site in on_bank.encodings for site in on_bank.plan.activations)


def attention(*, normed=False, apart=True, seen=False):
    """Three heads of four channels on six tokens, with biases; values leave a stream and come back to it."""
    b = Builder(5)
    x = b.linear("embed", b.input("x", 6, WIDTH, channel_axis=2), WIDTH)
    y = b.layer_norm("norm", x) if normed else x

    def heads(name):
        z = b.linear(name, y, WIDTH)
        if not apart and name == "v":
            return b.reshape(f"{name}.heads", z, 3, 6, 4)  # tokens and channels in a muddle
        return b.transpose(f"{name}.turn", b.reshape(f"{name}.heads", z, 6, 3, 4), 0, 2, 1, 3)

    q, k, v = (heads(n) for n in "qkv")
    scores = b.softmax("softmax", b.matmul("scores", q, b.transpose("kt", k, 0, 1, 3, 2)))
    z = b.transpose("mix.turn", b.matmul("mix", scores, v), 0, 2, 1, 3)
    z = b.linear("o", b.reshape("mix.joined", z, 6, WIDTH), WIDTH)
    z = b.binary("sum", "Add", x, z)
    return b.build(b.linear("head", b.layer_norm("last", z) if normed else z, 9), *([v] if seen else []))


@pytest.mark.skipif("onnx" not in FRAMEWORKS, reason="needs ONNX")
@pytest.mark.parametrize("normed", [False, True])
def test_values_are_rotated_within_their_heads(normed):
    port, model = FRAMEWORKS["onnx"], attention(normed=normed)
    sim = port.sim(model)
    batch = port.batch(models.batch(model, 4))
    weights = [op.weight for op in sim.graph.linear_ops]
    before, plain = outputs(port, sim, batch)[0], sim.fork().apply("rotate")
    sim.apply("rotate", heads=True)
    after, report = outputs(port, sim, batch)[0], sim.reports[-1][1]
    assert report.figures["rotated"] == normed
    assert report.rows[-1][1:] == (4, 3, 3, "rotated")
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()
    # Beside what R1 does, R2 turns each head's rows of the values, and the columns that read them.
    old, new = ([np.asarray(s.params[w]) for w in weights] for s in (plain, sim))
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not np.array_equal(a, b)]
    assert len(changed) == 2
    for first, turned in ((0, lambda w: w), (1, np.transpose)):
        one, two = (turned(w[changed[first]]).reshape(3, 4, WIDTH) for w in (old, new))
        assert (np.abs(one - two).max(axis=(1, 2)) > 0.1).all()
        np.testing.assert_allclose(np.swapaxes(one, 1, 2) @ one, np.swapaxes(two, 1, 2) @ two, atol=1e-3)


def test_heads_that_queries_share_and_values_in_one_matrix_with_the_rest():
    """Grouped queries by expansion, two value heads for six; queries, keys and values are pieces of one product."""
    torch = pytest.importorskip("torch")
    from bitwright import QuantSim

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = torch.nn.Linear(12, 24 + 8 + 8), torch.nn.Linear(24, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).split((24, 8, 8), -1)
            q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
            k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) for t in (k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    sim = QuantSim(Net().eval(), torch.randn(2, 5, 12))
    batch = {sim.graph.inputs[0]: np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)}
    before = outputs(None, sim, batch)[0]
    sim.apply("rotate", heads=True)
    after, row = outputs(None, sim, batch)[0], sim.reports[-1][1].rows[-1]
    assert row[1:] == (4, 2, 6, "rotated")
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.skipif("keras" not in FRAMEWORKS, reason="needs Keras")
def test_values_of_a_keras_attention_layer():
    import keras

    from bitwright import QuantSim

    keras.utils.set_random_seed(0)
    x = keras.Input((6, 12))
    sim = QuantSim(keras.Model(x, keras.layers.MultiHeadAttention(3, 4, value_dim=8)(x, x)))
    batch = {sim.graph.inputs[0]: np.random.default_rng(0).normal(size=(2, 6, 12)).astype(np.float32)}
    before = outputs(None, sim, batch)[0]
    sim.apply("rotate", heads=True)
    after, row = outputs(None, sim, batch)[0], sim.reports[-1][1].rows[-1]
    assert row[1:] == (8, 3, 3, "rotated")
    assert 0 < np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_shapes_that_an_onnx_file_leaves_open():
    onnx = pytest.importorskip("onnx")
    from bitwright import QuantSim

    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[n, t, 6] x) => (float[n, t, 5] y)
        <int64[4] apart = {0, 0, 2, 4}, int64[4] two = {0, 0, 2, 2}, int64[3] joined = {0, 0, 8}>
        {
            vm = MatMul(x, wv)
            v = Add(bv, vm)
            vr = Reshape(v, apart)
            vt = Transpose<perm = [0, 2, 1, 3]>(vr)
            q = MatMul(x, wq)
            qr = Reshape(q, two)
            qt = Transpose<perm = [0, 2, 1, 3]>(qr)
            kt = Transpose<perm = [0, 2, 3, 1]>(qr)
            s = MatMul(qt, kt)
            a = Softmax<axis = -1>(s)
            m = MatMul(a, vt)
            mt = Transpose<perm = [0, 2, 1, 3]>(m)
            mj = Reshape(mt, joined)
            y = MatMul(mj, wo)
        }
    """)
    rng = np.random.default_rng(0)
    for name, shape in (("wv", (6, 8)), ("bv", (8,)), ("wq", (6, 4)), ("wo", (8, 5))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    sim = QuantSim(model)
    batch = {"x": rng.normal(size=(3, 7, 6)).astype(np.float32)}
    before = outputs(None, sim, batch)[0]
    sim.apply("rotate", heads=True)
    after, row = outputs(None, sim, batch)[0], sim.reports[-1][1].rows[-1]
    assert row[1:] == (4, 2, 2, "rotated")
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_heads_that_are_no_heads_stay():
    ((name, found),) = value_heads(attention().graph)
    assert name == "v"
    assert found.channels.tolist() == np.arange(12).reshape(3, 4).tolist()
    for how, why in (({"apart": False}, "depends on the token"), ({"seen": True}, "is an output of the model")):
        ((_, found),) = value_heads(attention(**how).graph)
        assert isinstance(found, str)
        assert why in found
