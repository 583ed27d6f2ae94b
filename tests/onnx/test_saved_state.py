"""A saved simulation that was damaged or exchanged in part is refused, by the file that it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitwright import QuantSim
from bitwright.errors import InputError


@pytest.fixture
def saved(tmp_path):
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "w")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")], "net",
        [helper.make_tensor_value_info("x", 1, ["n", 4])], [helper.make_tensor_value_info("y", 1, ["n", 3])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    sim = QuantSim(model).calibrate(x)
    folder = sim.save(tmp_path / "saved")
    return sim, folder, x


def test_what_was_saved_comes_back(saved):
    sim, folder, x = saved
    again = QuantSim.load(folder)
    assert all(again.encodings[s].equals(e) for s, e in sim.encodings.items())
    assert np.array_equal(again.predict(x)[0], sim.predict(x)[0])


def test_it_takes_the_place_of_an_older_one_alone(saved, tmp_path):
    sim, folder, x = saved
    sim.save(folder)
    assert np.array_equal(QuantSim.load(folder).predict(x)[0], sim.predict(x)[0])
    for name in ("model.onnx", "encodings.npz"):
        mine = tmp_path / name.partition(".")[0]
        mine.mkdir()
        (mine / name).write_bytes(b"mine")
        with pytest.raises(InputError, match=rf"saving would overwrite '.*{name}', which isn't .*another folder"):
            sim.save(mine)
        assert [p.read_bytes() for p in mine.iterdir()] == [b"mine"]


@pytest.mark.parametrize("number", range(1, 7))
def test_what_a_killed_process_leaves_is_replaced(saved, monkeypatch, number):
    sim, folder, x = saved
    real, moves = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        if folder not in (path.parent, target.parent):  # of a file that is being written
            return real(path, target)
        moves.append(path)
        return path if len(moves) > number else real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    sim.save(folder)
    monkeypatch.undo()
    assert len(moves) == 6
    sim.save(folder)
    assert np.array_equal(QuantSim.load(folder).predict(x)[0], sim.predict(x)[0])


def test_a_changed_scale_is_refused(saved):
    _, folder, _ = saved
    path = folder / "encodings.npz"
    arrays = dict(np.load(path))
    name = next(n for n in arrays if n.endswith("/scale"))
    np.savez(path, **{**arrays, name: arrays[name] * np.float32(2)})
    with pytest.raises(InputError, match=r"encodings\.npz isn't the file that was saved"):
        QuantSim.load(folder)


def test_a_changed_weight_is_refused(saved):
    _, folder, _ = saved
    model = onnx.load(folder / "model.onnx")
    held = next(i for i in model.graph.initializer if i.name == "w")
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) * 2, "w"))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx was changed after"):
        QuantSim.load(folder)


@pytest.mark.parametrize(
    "changes",
    [{"options": {"scheme": "minmax"}}, {"sites": []}, {"model": "../../etc/model.onnx"}, {"provenance": [{}]}],
)
def test_a_changed_text_is_refused(saved, changes):
    _, folder, _ = saved
    path = folder / "quantsim.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match="damaged"):
        QuantSim.load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": {"colour": 1}}, "colour"),
        ({"model": "../model.onnx"}, "own files"),
        ({"sites": ["a"] * 9}, "KeyError: 'encoding'"),
    ],
)
def test_a_text_made_up_without_a_seal_is_refused(saved, changes, reason):
    _, folder, _ = saved
    path = folder / "quantsim.json"
    content = {**json.loads(path.read_text()), **changes}
    del content["seal"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=reason):
        QuantSim.load(folder)


def test_a_state_from_before_there_were_seals_loads(saved):
    sim, folder, x = saved
    path = folder / "quantsim.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("seal", "contents")}))
    assert np.array_equal(QuantSim.load(folder).predict(x)[0], sim.predict(x)[0])
