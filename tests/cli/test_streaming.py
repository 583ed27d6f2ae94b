"""A streaming model (time first, a recurrent state, a scalar) from Python and by command, its data as whole feeds."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from bitwright import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402


def feeds(count=6):
    made = []
    for k in range(count):
        rng = np.random.default_rng(k)
        made.append({
            "frames": rng.normal(size=(5, 1, 3)).astype(np.float32),
            "state": (0.3 * rng.normal(size=(1, 1, 4))).astype(np.float32),
            "gain": np.float32(0.5 + 0.1 * k),
        })  # fmt: skip
    return made


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    h = onnx.helper
    weights = {"W": (1, 12, 3), "R": (1, 12, 4), "v": (4, 2)}
    nodes = [
        h.make_node("Add", ["frames", "gain"], ["loud"], name="add"),
        h.make_node("GRU", ["loud", "W", "R", "", "", "state"], ["", "next"], name="gru", hidden_size=4),
        h.make_node("MatMul", ["next", "v"], ["y"], name="head"),
    ]
    inputs = [h.make_tensor_value_info(n, 1, np.shape(v)) for n, v in feeds(1)[0].items()]
    outputs = [h.make_tensor_value_info("y", 1, [1, 1, 2]), h.make_tensor_value_info("next", 1, [1, 1, 4])]
    arrays = [
        onnx.numpy_helper.from_array((0.5 * rng.normal(size=s)).astype(np.float32), n) for n, s in weights.items()
    ]
    proto = h.make_model(h.make_graph(nodes, "stream", inputs, outputs, arrays), ir_version=8,
                         opset_imports=[h.make_opsetid("", 17)])  # fmt: skip
    onnx.save(proto, tmp_path / "stream.onnx")
    return tmp_path / "stream.onnx"


def test_a_list_of_feeds(model, tmp_path):
    data = feeds()
    sim = QuantSim(model, weights="int4").calibrate(data).apply("adaround", data).calibrate(data)
    expected, found = (sim.predict(data, simulated=s) for s in (False, True))
    assert [a.shape for a in found] == [(6, 1, 2), (6, 1, 4)]
    for a, b in zip(expected, found, strict=True):
        assert np.square(a - b).sum() < 0.01 * np.square(a).sum()
    alone = np.concatenate([sim.predict([f])[0] for f in data])
    assert np.array_equal(alone, found[0])
    sim.export(tmp_path / "out", name="m")
    result = verify(tmp_path / "out", data, limit=5)
    assert not result.problems
    assert result.samples == 5


@pytest.mark.parametrize("way", ["stacked", "folder"])
def test_the_command_line(model, run, tmp_path, way):
    data = tmp_path / "data.npz"
    if way == "stacked":
        np.savez(data, **{n: np.stack([f[n] for f in feeds()]) for n in feeds(1)[0]})
    else:
        data = tmp_path / "feeds"
        data.mkdir()
        for i, feed in enumerate(feeds()):
            np.savez(data / f"{i}.npz", **feed)
    done = run("quantize", model, "--data", data, "--recipe", "bias_correction", "--out", tmp_path / "out", "-q")
    assert done.status == 0, done.err
    done = run("verify", tmp_path / "out", "--data", data, "-q")
    assert done.status == 0, done.err
    assert "6 samples" in done.out
    done = run("analyze", model, "--data", data, "--out", tmp_path / "report", "-q")
    assert done.status == 0, done.err
    joined = tmp_path / "joined.npz"
    np.savez(joined, **{n: np.concatenate([np.atleast_1d(f[n]) for f in feeds()]) for n in feeds(1)[0]})
    done = run("quantize", model, "--data", joined, "--out", tmp_path / "no", "-q")
    assert done.status == 2
    assert "input 'frames'" in done.err and "whole feeds" in done.err and "axis 0" in done.err
