"""The harness itself: a model that crashes, hangs, eats memory, lies or fails is told apart from one that is fine."""

from __future__ import annotations

import os
import time

import numpy as np
import onnx
from foreign import Foreign, NotRun, examine
from measures import Distance, _as_far, distance, equal
from onnx import TensorProto, helper
from pool import run

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def _gemm(scale: float = 1.0) -> Foreign:
    w = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 6]), ("y", [4, 3]))]
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [onnx.numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Foreign("gemm", "Gemm", model, {"x": X}, [(X @ w) * np.float32(scale)])


def _load(name: str) -> Foreign:
    if name == "crash":
        os._exit(7)
    if name == "hang":
        time.sleep(60)
    if name == "not run":
        raise NotRun("its framework says no")
    if name == "raises":
        raise RuntimeError("from the source")
    return _gemm()


def test_one_model_ends_and_the_others_go_on():
    names = ["crash", "hang", "not run", "raises"]
    told = []
    found = run(names, ["g"] * len(names), _load, workers=2, seconds=5, tell=told.append)
    assert [o.kind for o in found] == ["crashed", "late", "not run", "untyped"]
    assert "status 7" in found[0].reason and "5 s" in found[1].reason and len(told) == len(names)


def test_each_step_is_compared(monkeypatch):
    from bitwright.simulation import QuantSim

    assert examine(_gemm()).kind == "ok"
    wrong = examine(_gemm(1.01))
    assert (wrong.kind, wrong.step) == ("wrong", "float")
    predict = QuantSim.predict

    def worse(self, data, *, simulated=True):
        found = predict(self, data, simulated=simulated)
        return [v * np.float32(1.01) for v in found] if simulated else found

    monkeypatch.setattr(QuantSim, "predict", worse)
    wrong = examine(_gemm())
    assert (wrong.kind, wrong.step) == ("wrong", "simulated") and "40.0 dB" in wrong.reason


def test_a_wrong_export_and_an_untyped_error_are_seen(monkeypatch):
    from bitwright.simulation import QuantSim

    export = QuantSim.export

    def changed(self, directory, **options):
        bundle = export(self, directory, **options)
        model = onnx.load(bundle.files["qdq"])
        for t in model.graph.initializer:
            if t.name == "w_scale":
                t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t) * np.float32(1.5), t.name))
        onnx.save(model, bundle.files["qdq"])
        return bundle

    monkeypatch.setattr(QuantSim, "export", changed)
    wrong = examine(_gemm())
    assert (wrong.kind, wrong.step) == ("wrong", "qdq")

    def broken(self, directory, **options):
        raise KeyError("lost")

    monkeypatch.setattr(QuantSim, "export", broken)
    wrong = examine(_gemm())
    assert (wrong.kind, wrong.step) == ("untyped", "export") and "KeyError" in wrong.reason


def test_measures():
    a = np.array([1.0, 2.0], np.float32)
    assert distance(a, a).close(199) and not distance(a, a[None]).close(0)
    assert not distance(a, a.astype(np.float64)).close(0)
    assert not distance(np.array([1, 2]), np.array([1, 3])).close(0)
    assert not distance(a, np.array([1, np.nan], np.float32)).close(0)
    assert distance(np.array([1, np.inf]), np.array([1, np.inf])).close(199)
    assert equal(a, a * np.float32(1 + 1e-6), 1e-4) == "" and "differ" in equal(a, a * np.float32(1.01), 1e-4)
    assert "in place of" in equal(a, a.astype(np.float16), 1e-4)


def test_below_nothing_of_the_signal_it_is_chance_how_far():
    lost, worse, well = Distance(-10.0), Distance(-30.0), Distance(20.0)
    assert "-10 dB" in _as_far(lost, worse, 60.0)
    assert _as_far(well, worse, 60.0) == "" and _as_far(well, Distance(10.0), 60.0) == ""
