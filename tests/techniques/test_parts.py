"""Large networks run part by part, in every framework: the parts make up the network, and find what all of it finds."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap, parts_of, session_in_parts
from bitwright.backend import _giving_back as giving_back_module
from bitwright.backend import _parts as parts_module
from bitwright.bank import collect
from bitwright.bank._writing import Writer
from bitwright.statistics import LayerMoments
from bitwright.testing import models
from bitwright_techniques.batch_norm_reestimation import BatchNormReestimation

NETWORKS = {"residual": models.residual, "joined": models.concat_branches}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts_module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(parts_module, "PART_BYTES", 64)
    # A collection between parts of a few bytes takes as long as between large ones, once four frameworks are loaded.
    monkeypatch.setattr(parts_module, "gc", SimpleNamespace(collect=int))
    monkeypatch.setattr(parts_module, "_trim", None)


def batches(model, port, count=3):
    return [port.batch(models.batch(model, 4, seed)) for seed in range(count)]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_parts_make_up_the_network(make):
    graph = FRAMEWORKS["onnx"].sim(make()).graph
    parts = parts_of(graph)
    assert len(parts) > 2 and [o for p in parts for o in p.ops] == [op.id for op in graph.ops]
    assert set().union(*(p.params for p in parts)) == set(graph.params)
    known: set[str] = set()
    for part in parts:
        assert set(part.crossing) <= known
        read = {t for o in part.ops for t in graph.op(o).data_inputs} - set(graph.inputs if part is parts[0] else ())
        assert read <= set(part.crossing) | part.computed
        known |= part.computed
    weights = {p: 4 * int(np.prod(graph.params[p].shape)) for p in graph.params}
    for part in parts:
        # No part is larger than allowed, unless it is a single op with parameters.
        owners = [o for o in part.ops if graph.op(o).params]
        assert sum(weights[p] for p in part.params) <= 64 or len(owners) == 1


def test_small_networks_are_one_part():
    graph = FRAMEWORKS["onnx"].sim(models.residual()).graph
    assert len(parts_of(graph)) == 1


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_calibration_bank_and_export_in_parts_are_those_of_the_whole(name, make, tmp_path, request, monkeypatch):
    port, model = FRAMEWORKS[name], make()
    sim = port.sim(model, weights="int4")
    data = batches(model, port)
    whole = sim.fork().calibrate(data)
    expected = whole.predict(data)[0]
    bank = collect(sim, data, tmp_path / "whole")
    request.getfixturevalue("small_parts")
    opened = []
    segment = type(sim.backend).segment
    monkeypatch.setattr(type(sim.backend), "segment", lambda *a: opened.append(1) or segment(*a))
    parted = sim.fork().calibrate(data)
    assert opened
    for site, encoding in whole.encodings.items():
        other = parted.encodings[site]
        np.testing.assert_allclose(other.scale, encoding.scale, rtol=1e-6, err_msg=site)
        np.testing.assert_array_equal(other.zero_point, encoding.zero_point, err_msg=site)
    again = collect(sim, data, tmp_path / "parts")
    for op in sim.graph.linear_ops:
        one, other = (b.layer(op).state() for b in (bank, again))
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-5, atol=1e-6, err_msg=f"{op.id} {key}")
    # Inputs are quantized at their sites in the first part, and behind it they are fed as it left them.
    session = session_in_parts(parted.graph, parted.simulation, [Tap(t) for t in parted.graph.outputs])
    found = np.concatenate([np.asarray(session.run(b)[Tap(parted.graph.outputs[0])]) for b in data])
    step = float(np.ptp(expected)) / 255
    np.testing.assert_allclose(found, expected, atol=1.01 * step)
    assert (np.abs(found - expected) > 0.01 * step).mean() < 0.01
    assert parted.export(tmp_path / "out").files["encodings"].is_file()


@pytest.mark.usefixtures("small_parts")
def test_freed_arrays_go_back_at_once_while_parts_run(tmp_path, monkeypatch):
    """Else the heap is full of holes where weights of parts were, and a limit of memory is met by what nobody uses."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(giving_back_module, "_mallopt", lambda *a: asked.append(a))
    port, model = FRAMEWORKS["onnx"], models.residual()
    sim, data = port.sim(model, weights="int4"), batches(model, port)
    within: list[bool] = []
    spared: list[bool] = []

    def collected():
        within.append(bool(giving_back_module._open))
        spared.append(bool(gc.get_freeze_count()))

    monkeypatch.setattr(parts_module, "gc", SimpleNamespace(collect=collected))
    begin, end = (giving_back_module.M_MMAP_THRESHOLD, 2**20), (giving_back_module.M_MMAP_THRESHOLD, 2**25)
    steps = {
        "bank": lambda: collect(sim, data, tmp_path / "bank"),
        "layers": lambda: sim.apply("gptq", data, inputs="float"),
        "calibration": lambda: sim.calibrate(data),
    }
    for name, step in steps.items():
        asked.clear(), within.clear(), spared.clear()
        gc.unfreeze()  # what conftest.py spares the collector
        try:
            step()
            assert not gc.get_freeze_count()
        finally:
            gc.freeze()
        assert within and all(within), name
        # The collector looks through everything once, before there are parts, and then through what is new.
        assert spared == [False, *[True] * (len(spared) - 1)] and len(spared) > 2, name
        assert asked[0] == begin and end in asked and not giving_back_module._open, name
    asked.clear()
    sim.export(tmp_path / "out")
    assert asked[0] == begin and end in asked, "export"


@pytest.mark.usefixtures("small_parts")
def test_a_bank_s_moments_are_written_and_let_go_as_the_budget_says(tmp_path, monkeypatch):
    port, model = FRAMEWORKS["onnx"], models.residual()
    sim, data = port.sim(model), batches(model, port)
    expected = collect(sim, data, tmp_path / "one")
    monkeypatch.setattr("bitwright.calibration._part_by_part.PART_BUDGET", 1)
    written: list[weakref.ref[LayerMoments]] = []
    add = Writer.add_moments

    def noted(writer, moments):
        assert all(ref() is None for ref in written), "moments of another layer are still held"
        written.append(weakref.ref(moments))
        return add(writer, moments)

    monkeypatch.setattr(Writer, "add_moments", noted)
    found = collect(sim, data, tmp_path / "two")
    assert len(written) == len(expected.record.moments) > 2
    assert (found.record.layers, found.record.left_out) == (expected.record.layers, expected.record.left_out)
    assert list(found.record.tensors) == list(expected.record.tensors)
    for op in found.record.layers:
        one, two = (b.layer(sim.graph.op(op)) for b in (expected, found))
        np.testing.assert_allclose(two.xx, one.xx, rtol=1e-5, atol=1e-6, err_msg=op)


def test_statistics_of_the_simulated_network_in_parts(request):
    model = models.conv_bn_relu()
    sim = FRAMEWORKS["onnx"].sim(model, weights="int4")
    data = batches(model, FRAMEWORKS["onnx"])
    name = BatchNormReestimation.name
    whole = sim.fork().apply(name, data)
    request.getfixturevalue("small_parts")
    parted = sim.fork().apply(name, data)
    changed = [p for p in sim.graph.params if not np.array_equal(whole.params[p], sim.params[p])]
    assert changed
    for param in sim.graph.params:
        np.testing.assert_allclose(parted.params[param], whole.params[param], atol=1e-3, err_msg=param)


def test_solved_weights_lie_on_disk_and_codes_are_computed_when_they_are_written(tmp_path, monkeypatch):
    """ONNX: neither a walk's results nor the model that they are put into hold them in memory; the files are equal."""
    ir, qdq = pytest.importorskip("onnx_ir"), pytest.importorskip("bitwright_onnx.export.qdq_writer")
    model, port = models.residual(), FRAMEWORKS["onnx"]
    data = batches(model, port)

    def exported(place):
        sim = port.sim(model, weights="int4").apply("gptq", data, scales="keep").calibrate(data)
        bundle = sim.export(tmp_path / place, name="m")
        return sim, {kind: bundle.files[kind].read_bytes() for kind in ("model", "qdq", "encodings")}

    _, expected = exported("held")
    monkeypatch.setattr("bitwright.files._spill.HELD_BYTES", 0)
    monkeypatch.setattr("mmap.PAGESIZE", 0)
    monkeypatch.setattr(qdq, "LAZY_BYTES", 0)
    sim, found = exported("spilled")
    solved = [sim.native.graph.initializers[op.weight].const_value for op in sim.graph.linear_ops]
    assert solved and all(isinstance(tensor, ir.LazyTensor) for tensor in solved)
    assert found == expected


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from bitwright import QuantSim
from bitwright.backend import _parts
from bitwright_onnx.backend import OnnxBackend
import onnxruntime

def data():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024

folder, whole, limit = Path(sys.argv[1]), sys.argv[2] == "whole", int(sys.argv[3])
_parts.WHOLE_BYTES, _parts.PART_BYTES = 2**40 if whole else 2**24, 2**23
samples = np.random.default_rng(0).normal(size=(8, 1024)).astype(np.float32)
QuantSim(folder / "small.onnx").calibrate(samples).export(folder / "small")  # the framework's own
private = data() + limit * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (private, private))
QuantSim(folder / "model.onnx").calibrate(samples).export(folder / f"out-{sys.argv[2]}")
print("done")
"""


def _chain(path, layers, width):
    import onnx

    rng, node = np.random.default_rng(0), onnx.helper.make_node
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        weights.append(onnx.numpy_helper.from_array(rng.normal(size=(width, width)).astype(np.float32) / 32, f"w{i}"))
        nodes += [node("MatMul", [x, f"w{i}"], [f"m{i}"], f"m{i}"), node("Tanh", [f"m{i}"], [f"t{i}"], f"t{i}")]
        x = f"t{i}"
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "chain", [shape("x", 1, ["n", width])], [shape(x, 1, ["n", width])], weights)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by RLIMIT_DATA")
def test_parts_are_calibrated_and_exported_where_the_whole_finds_no_memory(tmp_path):
    """64 MiB of weights: in parts of 8 MiB it passes with 130 MiB of private memory; as a whole 165 don't do."""
    _chain(tmp_path / "model.onnx", 16, 1024)
    _chain(tmp_path / "small.onnx", 1, 1024)
    (tmp_path / "run.py").write_text(LIMITED)
    ended = {}
    for how in ("parts", "whole"):
        words = [sys.executable, tmp_path / "run.py", tmp_path, how, "148"]
        ended[how] = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended["parts"].stdout == "done\n", ended["parts"].stderr
    assert (tmp_path / "out-parts/model.qdq.onnx").exists()
    assert ended["whole"].returncode != 0 and not (tmp_path / "out-whole/model.qdq.onnx").exists()
