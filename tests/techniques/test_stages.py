"""Deep networks run stage by stage: every number is that of the whole, and memory doesn't grow with the layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap
from bitwright.calibration import _stage_by_stage as stage_by_stage
from bitwright.calibration import _stages as stages_module
from bitwright.calibration._stages import stages_of
from bitwright.errors import InputError, ModelError
from bitwright.progress import Silent
from bitwright.testing import models
from bitwright_techniques.bias_correction import BiasCorrection

NETWORKS = {"residual": models.residual, "joined": models.concat_branches}


@pytest.fixture
def small_stages(monkeypatch):
    monkeypatch.setattr(stages_module, "TAP_BYTES", 1)
    # The taps of these networks are no more than what they have in memory themselves.
    monkeypatch.setattr(stages_module, "_own_bytes", lambda *_: 0)


def batches(model, port, count=3):
    return [port.batch(models.batch(model, 4, seed)) for seed in range(count)]


def segments(monkeypatch, sim):
    """A list that grows with each segment that the backend compiles."""
    opened: list[int] = []
    segment = type(sim.backend).segment
    monkeypatch.setattr(type(sim.backend), "segment", lambda *a: opened.append(1) or segment(*a))
    return opened


def equal(one, other):
    assert one.encodings.keys() == other.encodings.keys()
    for site, encoding in one.encodings.items():
        np.testing.assert_array_equal(other.encodings[site].scale, encoding.scale, err_msg=site)
        np.testing.assert_array_equal(other.encodings[site].zero_point, encoding.zero_point, err_msg=site)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_calibration_in_stages_is_that_of_the_whole(name, make, request, monkeypatch):
    port, model = FRAMEWORKS[name], make()
    sim, data = port.sim(model, weights="int4"), batches(model, FRAMEWORKS[name])
    whole = sim.fork().calibrate(data)
    request.getfixturevalue("small_stages")
    opened = segments(monkeypatch, sim)
    for held in (stage_by_stage.HELD_BYTES, 1):
        monkeypatch.setattr(stage_by_stage, "HELD_BYTES", held)
        opened.clear()
        equal(whole, sim.fork().calibrate(data))
        assert opened


@pytest.mark.parametrize("held", [2**24, 1])
def test_statistics_of_both_networks_in_stages(held, request, monkeypatch):
    model = models.residual()
    sim, data = FRAMEWORKS["onnx"].sim(model, weights="int4"), batches(model, FRAMEWORKS["onnx"])
    name = BiasCorrection.name
    whole = sim.fork().apply(name, data, quantized_activations=True)
    request.getfixturevalue("small_stages")
    monkeypatch.setattr(stage_by_stage, "HELD_BYTES", held)
    opened = segments(monkeypatch, sim)
    staged = sim.fork().apply(name, data, quantized_activations=True)
    assert opened
    for param in sim.graph.params:
        np.testing.assert_array_equal(staged.params[param], whole.params[param], err_msg=param)


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("held", [2**24, 1])
def test_what_the_backend_cannot_cut_is_run_whole(held, monkeypatch):
    model, port = models.residual(), FRAMEWORKS["onnx"]
    sim, data = port.sim(model), batches(model, port)
    expected = sim.fork().calibrate(data)
    monkeypatch.setattr(stage_by_stage, "HELD_BYTES", held)
    asked: list[int] = []

    def refused(*_):
        asked.append(1)
        raise ModelError("not between these")

    monkeypatch.setattr(type(sim.backend), "segment", refused)
    equal(expected, sim.fork().calibrate(data))
    assert asked


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("held", [2**24, 1])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", [ModelError, InputError])
def test_stages_that_do_not_run_are_taken_whole(held, batch, kind, monkeypatch):
    """As where an op gives another shape than the graph has for it."""
    model, port = models.residual(), FRAMEWORKS["onnx"]
    sim, data = port.sim(model), batches(model, port)
    expected = sim.fork().calibrate(data)
    monkeypatch.setattr(stage_by_stage, "HELD_BYTES", held)
    shown = Shown()
    sim.attach(progress=shown)
    segment = type(sim.backend).segment
    refused: list[int] = []

    class Refusing:
        def __init__(self, session):
            self.session, self.runs = session, 0

        def run(self, values):
            self.runs += 1
            if self.runs > batch:
                refused.append(1)
                raise kind("not this")
            return self.session.run(values)

    monkeypatch.setattr(type(sim.backend), "segment", lambda *a: Refusing(segment(*a)))
    equal(expected, sim.calibrate(data))
    assert refused
    assert shown.stages == [("Collecting statistics", 12, 12)]


class Shown(Silent):
    """What was shown of each stage: its total, and what it came to."""

    def __init__(self):
        self.stages, self.open = [], []

    def start(self, description, total):
        self.open.append([description, total, 0])

    def advance(self, steps=1, note=""):
        self.open[-1][2] += steps

    def finish(self):
        self.stages.append(tuple(self.open.pop()))


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("held", [2**24, 1])
def test_what_is_not_finite_in_a_stage_is_named(held, monkeypatch):
    model, port = models.residual(), FRAMEWORKS["onnx"]
    sim, data = port.sim(model), batches(model, port)
    monkeypatch.setattr(stage_by_stage, "HELD_BYTES", held)
    data[1] = {name: np.full_like(values, 3e38) for name, values in data[1].items()}
    before = sim.encodings
    with pytest.raises(InputError, match=r"\(float network, batch 1\): NaN or infinite"):
        sim.calibrate(data)
    assert sim.encodings is before


def test_stages_hand_out_no_more_than_the_budget(monkeypatch):
    graph = FRAMEWORKS["onnx"].sim(models.residual()).graph
    taps = {"float": [Tap(t) for op in graph.ops for t in op.outputs]}
    assert len(stages_of(graph, taps, 4)) == 1
    monkeypatch.setattr(stages_module, "_own_bytes", lambda *_: 0)
    size = {t: 4 * 4 * int(np.prod(graph.tensors[t].shape[1:])) for op in graph.ops for t in op.outputs}
    budget = 2 * max(size.values())
    monkeypatch.setattr(stages_module, "TAP_BYTES", budget)
    stages = stages_of(graph, taps, 4)
    assert 1 < len(stages) < len(graph.ops)
    assert [o for stage in stages for o in stage.ops] == [op.id for op in graph.ops]
    assert all(sum(size[t] for o in s.ops for t in graph.op(o).outputs) <= budget for s in stages)
    # Of extremes nothing worth the while leaves the network, and where nothing is tapped nothing is cut.
    for reduced in ({"float": [Tap(t.tensor, "minmax") for t in taps["float"]]}, {"float": taps["float"][-1:]}):
        assert len(stages_of(graph, reduced, 4)) == 1


@pytest.mark.parametrize("technique", ["calibrate", "adaround"])
def test_memory_does_not_grow_with_the_layers(technique):
    """Peaks at 40 and 240 layers; 27 to 29 MiB lay between them when all taps of a batch were out at once."""
    pytest.importorskip("bitwright_onnx.backend")
    script = Path(__file__).parents[2] / "benchmarks" / "layers_memory.py"
    peaks = []
    for layers in ("40", "240"):
        words = [sys.executable, str(script), "--child", "--techniques", technique, "--layers", layers]
        told = subprocess.run(
            words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
        ).stdout
        peaks.append(float(told.split("peak")[1].split()[0]))
    assert peaks[1] - peaks[0] < 15, peaks
