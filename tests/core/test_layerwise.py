"""The layer-by-layer walk: right moments, right order, resumable, bounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.data import CutCache, close_all
from bitwright.data._dataset import ArrayDataset
from bitwright.errors import InputError, ModelError
from bitwright.files import Spill, is_spilled
from bitwright.graph import output_channels
from bitwright.grids import PerChannel, QuantSpec, encoding_of_weights
from bitwright.layerwise import LayerwiseWalk
from bitwright.layerwise._cuts import cut_before, schedule
from bitwright.layerwise._solving import reconstruction_loss
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer, LayerResult
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import Interrupted, MemoryStore, Quiet, min_max_encodings, simple_plan
from bitwright.testing.reference import ReferenceBackend

BUILDERS = {
    "chain": models.conv_bn_relu,
    "depthwise": models.depthwise_triple,
    "residual": models.residual,
    "concat": models.concat_branches,
    "mlp": models.mlp,
    "transposed": models.transposed,
}


def walk_of(model, *, store=None, samples=10, batch_size=4, backend=None, **options):
    backend = backend or ReferenceBackend()
    graph = backend.graph(model)
    plan = simple_plan(graph)
    data = models.batch(model, samples)
    encodings = min_max_encodings(backend, model, plan, [data])
    dataset, memory = ArrayDataset(data, batch_size), store or MemoryStore()
    walk = LayerwiseWalk(backend, model, graph, plan, encodings, dataset, memory, Quiet(), **options)
    return walk, graph, plan, data


def nearest(layer: Layer) -> LayerResult:
    encoding = layer.encoding.with_(frozen=True, source="test")
    return LayerResult(encoding.fake_quantize(layer.weight), encoding)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("quantized", [True, False])
def test_moments_are_those_of_the_two_whole_networks(name, quantized):
    """The walk's cuts and segments give what running both networks from their inputs gives."""
    model = BUILDERS[name]()
    walk, graph, plan, data = walk_of(model)
    seen = {}

    def solve(layer):
        seen[layer.op.id] = layer.moments
        return nearest(layer)

    ops = [op.id for op in graph.linear_ops]
    results = walk(ops, solve, quantized_inputs=quantized)
    backend = walk.backend
    quantized_model = backend.edit(model, [])
    simulation = backend.simulate(quantized_model, plan, walk.encodings)
    for op in graph.linear_ops:
        tap = Tap(op.data_inputs[0])
        x = backend.session(model, [tap]).run(data)[tap]
        xq = simulation.session([tap]).run(data)[tap]
        ours = seen[op.id]
        whole = LayerMoments(op, ours.mean.shape[1], graph.tensors[tap.tensor].channel_axis, paired=quantized)
        whole.update(*((x, xq) if quantized else (x,)))
        for field in ("mean", "mean_quantized", "xx", "qq", "xq"):
            np.testing.assert_allclose(getattr(ours, field), getattr(whole, field), rtol=1e-4, atol=1e-5, err_msg=field)
    assert set(results) == set(ops)


@pytest.mark.parametrize("quantized", [True, False])
def test_what_several_layers_read_is_observed_once(quantized):
    b = Builder(0)
    x = b.linear("first", b.input("x", 8), 8)
    for name, out in (("q", 8), ("k", 4), ("v", 4)):
        b.linear(name, x, out)
    walk, graph, _, _ = walk_of(b.build("q", "k", "v"))
    seen = {}

    def solve(layer):
        seen[layer.op.id] = layer.moments
        return nearest(layer)

    walk([op.id for op in graph.linear_ops], solve, quantized_inputs=quantized)
    assert seen["q"] is seen["k"] is seen["v"] is not seen["first"]
    assert seen["v"].count == seen["first"].count == 10


def test_a_layer_sees_the_layers_replaced_before_it():
    model = models.residual()
    walk, graph, _, _ = walk_of(model)
    seen = {}

    def silence(layer):
        seen[layer.op.id] = layer.moments.mean_quantized
        result = nearest(layer)
        return replace(result, weight=np.zeros_like(result.weight), bias=np.zeros(len(layer.weight), np.float32))

    walk([op.id for op in graph.linear_ops], silence)
    # With every earlier layer silenced, only zeros arrive at the later ones.
    assert np.abs(seen["stem"]).max() > 0
    assert np.abs(seen["head"]).max() == 0


@pytest.mark.parametrize("name", BUILDERS)
def test_interrupted_walk_resumes_without_redoing_layers_and_ends_bit_equal(name):
    model = BUILDERS[name]()
    calls = []

    def solve(layer):
        calls.append(layer.op.id)
        shift = np.float32(layer.moments.mean_quantized.sum() * 1e-3)
        outputs = output_channels(layer.op, layer.weight.shape)
        return replace(nearest(layer), bias=np.full(outputs, shift, np.float32))

    def run(store):
        walk, graph, _, _ = walk_of(model, store=store)
        ops = [op.id for op in graph.linear_ops]
        return walk(ops, solve), ops

    straight, ops = run(MemoryStore())
    first = list(calls)
    calls.clear()
    store = MemoryStore(fail_after=len(ops) // 2)
    with pytest.raises(Interrupted):
        run(store)
    done = list(calls)
    calls.clear()
    store.fail_after = None
    resumed, _ = run(store)
    assert sorted(first) == sorted(ops)
    ops = first
    # The layer in which the crash came is done again, the finished ones are not.
    assert calls == ops[len(done) - 1 :]
    for op in ops:
        assert np.array_equal(straight[op].weight, resumed[op].weight)
        assert np.array_equal(straight[op].bias, resumed[op].bias)
        assert straight[op].encoding.equals(resumed[op].encoding)


def test_finished_walk_runs_nothing():
    model = models.residual()
    store = MemoryStore()
    walk, graph, _, _ = walk_of(model, store=store)
    ops = [op.id for op in graph.linear_ops]
    walk(ops, nearest)
    again, *_ = walk_of(model, store=store)
    again.data = ArrayDataset({"x": np.empty((0, 3, 8, 8), np.float32)}, 4)
    assert set(again(ops, lambda layer: pytest.fail("solved again"))) == set(ops)


def test_without_partial_execution_the_numbers_are_the_same():
    class Whole:
        """The reference backend without `segment`."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name == "segment":
                raise AttributeError(name)
            return getattr(self._inner, name)

    losses = []
    for backend in (ReferenceBackend(), Whole(ReferenceBackend())):
        walk, graph, _, _ = walk_of(models.concat_branches(), backend=backend)
        results = walk([op.id for op in graph.linear_ops], nearest)
        losses.append([r.figures["loss"] for r in results.values()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=1e-7)


def test_loss_is_the_relative_output_error():
    model = models.mlp()
    walk, graph, _, data = walk_of(model)
    op = graph.linear_ops[0]
    x = walk.backend.session(model, [Tap(op.data_inputs[0])]).run(data)[Tap(op.data_inputs[0])]
    weight = walk.backend.read(model, [op.weight])[op.weight]
    coarse = encoding_of_weights(weight, QuantSpec(bits=3, granularity=PerChannel(0))).fake_quantize(weight)
    moments = LayerMoments(op, weight.shape[1], -1, paired=False)
    moments.update(x)
    error = (x @ (coarse - weight).T).astype(np.float64)
    output = (x @ weight.T).astype(np.float64)
    expected = error.var(axis=0).sum() / output.var(axis=0).sum()
    assert reconstruction_loss(op, weight, coarse, moments) == pytest.approx(expected, rel=1e-4)


def test_cuts_hold_all_that_crosses():
    graph = ReferenceBackend().graph(models.residual())
    for position in range(len(graph.ops) + 1):
        cut = cut_before(graph, position)
        made = {t for op in graph.ops[position:] for t in op.outputs} | set(cut)
        for op in graph.ops[position:]:
            assert set(op.data_inputs) <= made


def test_schedule_without_partial_execution_never_moves():
    graph = ReferenceBackend().graph(models.residual())
    ops = [op.id for op in graph.linear_ops]
    assert not any(s.moves for s in schedule(graph, ops, partial=False))
    assert any(s.moves for s in schedule(graph, ops, partial=True))
    assert [s.op.id for s in schedule(graph, list(reversed(ops)), partial=True)] == ops


def test_cache_spills_to_disk_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    values = np.arange(1000, dtype=np.float32)
    with CutCache(budget=5000) as cache:
        for i in range(4):
            cache.append({"t": values + i})
        assert list(tmp_path.rglob("*.npy"))
        for i, held in enumerate(cache):
            assert np.array_equal(held["t"], values + i)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_gram_beyond_the_budget_leaves_the_layer_nearest():
    walk, graph, _, _ = walk_of(models.mlp(), moments_gib=1e-9, name="adaround")
    op = graph.linear_ops[0]
    with pytest.warns(UserWarning, match=rf"adaround: 1 of 1 layers stay .*'{op.id}': .* GiB of moments_gib; raise it"):
        results = walk([op.id], lambda layer: pytest.fail("solved"))
    assert "moments_gib" in results[op.id].left
    weight = walk.backend.read(walk.model, [op.weight])[op.weight]
    assert np.array_equal(results[op.id].weight, walk.encodings[op.weight].fake_quantize(weight))


def test_bad_input_is_named():
    walk, graph, _, _ = walk_of(models.mlp())
    walk.data = ArrayDataset({k: v[:0] for k, v in models.batch(models.mlp(), 4).items()}, 4)
    with pytest.raises(InputError, match="empty"):
        walk([graph.linear_ops[0].id], nearest)
    walk, graph, _, _ = walk_of(models.mlp())
    with pytest.raises(ModelError, match="a weight of shape"):
        walk([graph.linear_ops[0].id], lambda x: replace(nearest(x), weight=x.weight[:1]))


@pytest.mark.parametrize("trouble", ["factor", "nan"])
def test_a_layer_that_cannot_be_solved_is_named_and_the_others_are_solved(trouble):
    walk, graph, _, _ = walk_of(models.mlp())
    first, *others = [op.id for op in graph.linear_ops]

    def solve(layer):
        if layer.op.id != first:
            return replace(nearest(layer), figures={"solved": 1.0})
        if trouble == "factor":
            np.linalg.cholesky(-np.eye(2))
        return replace(nearest(layer), weight=layer.weight * np.nan)

    for _ in range(2):  # and again from the store
        with pytest.warns(UserWarning, match=f"'{first}': .*(LinAlgError|isn't finite)"):
            results = walk([first, *others], solve)
        assert results[first].left
        weight = walk.backend.read(walk.model, [graph.op(first).weight])[graph.op(first).weight]
        assert np.array_equal(
            results[first].weight,
            nearest(Layer(graph.op(first), weight, None, None, walk.encodings[graph.op(first).weight])).weight,
        )
        assert all(results[o].figures["solved"] == 1.0 and not results[o].left for o in others)


def test_a_layer_before_a_sum_learns_the_skip_connections_error():
    model = models.residual()
    walk, graph, _, data = walk_of(model)
    seen = {}

    def coarse(layer):
        seen[layer.op.id] = layer.moments
        encoding = encoding_of_weights(layer.weight, QuantSpec(bits=3))
        return LayerResult(encoding.fake_quantize(layer.weight), encoding)

    ops = [op.id for op in graph.linear_ops]
    walk(ops, coarse, residuals=True)
    assert [o for o in ops if seen[o].has_residual] == ["conv2"]
    op = graph.op("conv2")
    add = graph.sole_consumer(op.output)
    other = next(t for t in add.data_inputs if t != op.output)
    rx, rq, mean, square = seen["conv2"].residual
    # The skip connection carries the error that the 3-bit weights before it have made.
    assert square.min() > 0
    channels = graph.params[op.weight].shape[0]
    assert rx.shape == rq.shape == (channels, seen["conv2"].mean.shape[1])
    x = walk.backend.session(model, [Tap(other)]).run(data)[Tap(other)]
    assert np.abs(mean).max() < np.abs(x).max()
    state = seen["conv2"].state()
    copy = LayerMoments(op, rx.shape[1], 1, residual_outputs=channels)
    copy.restore(state)
    for ours, theirs in zip(copy.residual, seen["conv2"].residual, strict=True):
        assert np.array_equal(ours, theirs)


def test_arrays_beyond_a_budget_lie_on_disk_and_are_arrays_all_the_same(monkeypatch):
    spill = Spill(budget=20_000)
    first, second, tiny = np.arange(2000.0), np.arange(6000, dtype=np.float32).reshape(2, 3000).T, np.ones(3)
    assert spill.kept(first) is first and not is_spilled(first)
    found = spill.kept(second)
    assert is_spilled(found) and is_spilled(found[1:].T) and is_spilled(np.asarray(found))
    np.testing.assert_array_equal(found, second)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1
    assert spill.kept(found) is found and not is_spilled(spill.kept(tiny))
    np.testing.assert_array_equal(Spill(budget=0).kept(first), first)  # its map outlives it

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert Spill(budget=0).kept(first) is first


class Stages(Quiet):
    """How many stages are open."""

    def __init__(self):
        self.open = 0

    def start(self, description, total):
        self.open += 1

    def finish(self):
        self.open -= 1


@pytest.mark.parametrize("broken", ["solving", "networks", "neither"])
def test_all_is_let_go_though_something_cannot_be_closed(broken, monkeypatch):
    from bitwright.backend import _giving_back
    from bitwright.layerwise import _networks, _side_by_side, _walk

    monkeypatch.setattr(_walk, "parts_of", lambda graph: [1, 2])  # as of a large network
    monkeypatch.setattr(_giving_back, "_mallopt", lambda *_: 1)
    closed = []
    for name, kind in (("solving", _side_by_side.Solving), ("networks", _networks.Networks)):

        def close(self, name=name, own=kind.close):
            closed.append(name)
            own(self)
            if name == broken:
                raise OSError("can't be closed")

        monkeypatch.setattr(kind, "close", close)

    def failing(layer):
        raise KeyboardInterrupt

    walk, graph, *_ = walk_of(models.mlp())
    walk.progress = Stages()
    with pytest.raises((KeyboardInterrupt, OSError)):
        walk([op.id for op in graph.linear_ops], failing)
    assert {"solving", "networks"} <= set(closed)
    assert (walk.progress.open, _giving_back._open) == (0, [])


def test_caches_are_closed_though_one_cannot_be(monkeypatch):
    caches = [CutCache(0) for _ in range(3)]
    folders = []
    for cache in caches:
        cache.append({"x": np.ones(3)})
        folders.append(cache._folder.path)
    monkeypatch.setattr(caches[1]._folder, "close", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        close_all(caches)
    assert [f.exists() for f in folders] == [False, True, False]
