from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.errors import InputError, ModelError, WriteError
from bitwright.graph import Graph, ParamRole
from bitwright.grids import PerChannel, QuantSpec
from bitwright.placement import Plan, SharedWith
from bitwright.testing import models
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.testing.builder import Builder
from bitwright.testing.harness import min_max_encodings, simple_plan
from bitwright.testing.reference import ReferenceBackend, rebuild

BACKEND = ReferenceBackend()


@pytest.mark.parametrize("name", models.MODELS)
def test_models_run_and_survive_a_file(name, tmp_path):
    model = models.MODELS[name](1)
    batch = models.batch(model)
    outputs = model(batch)
    assert all(np.isfinite(v).all() for v in outputs.values())
    again = BACKEND.load(BACKEND.save(model, tmp_path / "model.npz"))
    assert again.graph.ops == model.graph.ops
    assert again.graph.tensors == model.graph.tensors
    for tensor, value in again(batch).items():
        assert np.array_equal(value, outputs[tensor])
        shape = model.graph.tensors[tensor].shape
        assert value.shape[1:] == shape[1:]


def shared_and_identity():
    b = Builder(7)
    x = b.input("x", 4, 6, 6)
    x = b.identity("first", x)
    x = b.prelu("act", b.conv("conv1", x, 4, 1, dilation=1))
    y = b.conv("conv2", b.identity("middle", x), 4, 1, bias=False)
    model = b.build(b.identity("last", b.binary("sub", "Sub", x, y)))
    ops = [replace(op, params={ParamRole.WEIGHT: "conv1.weight"}) if op.id == "conv2" else op for op in model.graph.ops]
    return rebuild(model, ops)


def odd_geometry():
    """Dilation, strides, one and three spatial axes: where layouts go wrong."""
    b = Builder(8)
    x = b.input("x", 3, 9)
    x = b.conv("one", x, 6, 3, stride=2, pad=2, dilation=2, groups=3)
    x = b.conv("up", x, 4, 3, stride=3, pad=1, groups=2, transposed=True, dilation=2, output_padding=1)
    return b.build(b.conv("three", b.reshape("cube", x, 2, 4, 2, 4), 3, 2, pad=1))


def attention():
    b = Builder(9)
    x = b.input("x", 5, 8, channel_axis=2)
    q, k = (b.linear(n, x, 8) for n in ("q", "k"))
    a = b.softmax("softmax", b.matmul("scores", q, b.transpose("kt", k, 0, 2, 1)))
    y = b.activation("gate", b.matmul("mix", a, b.linear("v", x, 8)), "HardSwish")
    return b.build(b.binary("scaled", "Mul", y, np.float32(0.5)))


class TestReferenceBackend(BackendContract):
    declines: ClassVar = {"recurrent": "the reference backend has no recurrent kernels"}

    def backend(self):
        return BACKEND

    def native_value(self, model, param):
        return model.params[param]

    def cases(self):
        made = {**models.BACKEND_MODELS, "shared": shared_and_identity, "odd": odd_geometry, "attention": attention}
        return {name: Case(make, models.batch(make())) for name, make in made.items()}


def test_convolutions_agree_with_a_loop():
    rng = np.random.default_rng(0)
    x, w, bias = rng.normal(size=(1, 4, 7)), rng.normal(size=(6, 2, 3)), rng.normal(size=6)
    b = Builder()
    model = b.build(b.conv("c", b.input("x", 4, 7), 6, 3, stride=2, pad=2, dilation=2, groups=2, weight=w, bias=bias))
    padded = np.pad(x, [(0, 0), (0, 0), (2, 2)])
    expected = np.array(
        [
            [
                bias[o] + sum(w[o, i, k] * padded[0, o // 3 * 2 + i, 2 * p + 2 * k] for i in range(2) for k in range(3))
                for p in range(4)
            ]
            for o in range(6)
        ]
    )
    assert np.allclose(model({"x": x.astype(np.float32)})["c.output"][0], expected, atol=1e-5)


def test_transposed_convolutions_agree_with_scattering():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(1, 4, 5)), rng.normal(size=(4, 3, 3))
    b = Builder()
    model = b.build(
        b.conv("c", b.input("x", 4, 5), 6, 3, stride=2, pad=1, groups=2, transposed=True, output_padding=1,
               weight=w, bias=False)
    )  # fmt: skip
    full = np.zeros((6, (5 - 1) * 2 + 3 + 1))
    for i in range(4):
        for o in range(3):
            for p in range(5):
                full[i // 2 * 3 + o, 2 * p : 2 * p + 3] += x[0, i, p] * w[i, o]
    assert np.allclose(model({"x": x.astype(np.float32)})["c.output"][0], full[:, 1:-1], atol=1e-5)


def test_channels_last_is_only_a_layout():
    first, last = Builder(3), Builder(3)
    a = first.build(first.conv("c", first.input("x", 3, 5, 5), 4, pad=1))
    model = last.build(last.conv("c", last.input("x", 3, 5, 5), 4, pad=1))
    tensors = {
        t: replace(x, channel_axis=3, shape=(x.shape[0], *x.shape[2:], x.shape[1]))
        for t, x in model.graph.tensors.items()
    }
    graph = Graph(model.graph.ops, tensors, model.graph.params, model.graph.inputs, model.graph.outputs)
    batch = models.batch(a)
    moved = {"x": np.moveaxis(batch["x"], 1, 3)}
    y = replace(model, graph=graph)(moved)["c.output"]
    assert np.allclose(np.moveaxis(y, 3, 1), a(batch)["c.output"], atol=1e-6)


def test_average_pooling_counts_what_is_inside():
    b = Builder()
    model = b.build(b.pool("p", b.input("x", 1, 3), 3, pad=1, type="Average"))
    y = model({"x": np.array([[[1.0, 2.0, 6.0]]], np.float32)})["p.output"]
    assert np.allclose(y, [[[1.5, 3, 4]]])


def test_sites_that_share_follow_their_root():
    model = models.concat_branches()
    plan = simple_plan(model.graph)
    root, tied = "right.output", "pool.output"
    sites = {**plan, tied: replace(plan[tied], decision=SharedWith(root))}
    plan = Plan(sites, "tied")
    batch = models.batch(model)
    table = min_max_encodings(BACKEND, model, plan, [batch])
    simulation = BACKEND.simulate(model, plan, table)
    coarse = table[root].with_(scale=table[root].scale * 20)
    simulation.set({root: coarse})
    value = simulation.session([Tap(tied)]).run(batch)[Tap(tied)]
    assert np.array_equal(value, coarse.fake_quantize(value))
    assert len(np.unique(value)) < 20
    assert simulation.get()[tied].equals(coarse)


def test_errors_name_what_is_wrong(tmp_path):
    model = models.mlp()
    with pytest.raises(InputError, match="no array for input"):
        model({})
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        BACKEND.session(model, [Tap("nowhere")])
    b = Builder()
    unknown = b.build(b.opaque("strange", b.input("x", 2), "Quux"))
    with pytest.raises(ModelError, match="strange"):
        unknown({"x": np.zeros((1, 2), np.float32)})
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match=r"broken\.npz"):
        BACKEND.load(tmp_path / "broken.npz")
    with pytest.raises(InputError):
        BACKEND.load(tmp_path / "absent.npz")


def test_exports_with_encodings_keep_quantizing(tmp_path):
    model = models.residual()
    batch = models.batch(model)
    plan = simple_plan(model.graph, weights=QuantSpec(4, granularity=PerChannel(0)))
    table = min_max_encodings(BACKEND, model, plan, [batch])
    bundle = BACKEND.export(model, plan, table, tmp_path / "q.npz", "npz-quantized")
    again = BACKEND.load(bundle.files["qdq"])
    expected = BACKEND.simulate(model, plan, table).model(batch)
    for t, v in again(batch).items():
        assert np.array_equal(v, expected[t])
    assert [p.name for p in tmp_path.iterdir()] == ["q.npz"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(WriteError, match="space"):
        BACKEND.save(models.mlp(), tmp_path / "m.npz")
    assert list(tmp_path.iterdir()) == []
