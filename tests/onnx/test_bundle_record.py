"""What an export records, that it proves itself before it is handed out, and that it never overwrites its source."""

from __future__ import annotations

import json
import os
import shutil
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bitwright_onnx.export.qdq as qdq_writer
from bitwright import QuantSim
from bitwright.bundle import _recording as recording
from bitwright.bundle._agreement import agreement
from bitwright.bundle._export_gate import open_quantized
from bitwright.bundle._record import read_reference, spread
from bitwright.bundle._synthetic import synthetic
from bitwright.data import Samples
from bitwright.data._reference import kept
from bitwright.errors import InputError, ModelError, WriteError
from bitwright.report import digest, read_report
from bitwright.report._page import render
from bitwright.report._seal import named, seal
from bitwright.runs import of_file
from bitwright.verify import verify

N = onnx.helper.make_node
FLOAT = onnx.TensorProto.FLOAT


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def model_of(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], **arrays: Any) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "net", [info(k, FLOAT, v) for k, v in inputs.items()], [info(k, FLOAT, None) for k in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def residual(depth: int = 3) -> onnx.ModelProto:
    """Convolutions with skip connections: rounding noise grows with each of them."""
    nodes, arrays = [N("Conv", ["x", "w0", "b0"], ["t0"], pads=[1] * 4)], {"w0": normal(8, 3, 3, 3, scale=0.3)}
    arrays["b0"] = normal(8, scale=0.1)
    for i in range(1, depth):
        nodes += [
            N("Relu", [f"t{i - 1}"], [f"r{i}"]),
            N("Conv", [f"r{i}", f"w{i}"], [f"c{i}"], pads=[1] * 4),
            N("Add", [f"c{i}", f"t{i - 1}"], [f"t{i}"]),
        ]
        arrays[f"w{i}"] = normal(8, 8, 3, 3, scale=0.1, seed=i)
    return model_of(nodes, {"x": ["n", 3, 8, 8]}, [f"t{depth - 1}"], **arrays)


DATA = {"x": normal(16, 3, 8, 8)}


def calibrated(model: Any = None, **options: Any) -> QuantSim:
    return QuantSim(residual() if model is None else model, **options).calibrate(DATA)


def record_of(folder: Path, name: str = "model") -> Any:
    found = read_report(folder, name)
    assert found.report is not None and not found.damage
    return found.report.record


# -- what is recorded


def test_an_export_says_what_was_simulated(tmp_path):
    sim = calibrated(weights="int4")
    bundle = sim.export(tmp_path)
    report = read_report(tmp_path, "model").report
    assert (report.target, report.weights, report.name) == ("default", "int4", "model")
    record = report.record
    written = {p.name for p in tmp_path.iterdir()} - {"report.json", "report.html"}
    assert record.contents == {name: of_file(tmp_path / name) for name in written}
    assert {p.name for p in bundle.files.values()} <= written
    rows = {row.site: row for row in report.sites}
    assert rows.keys() == set(sim.plan)
    for site, encoding in sim.table.items():
        assert rows[site].digest == digest(encoding)
    assert rows["b0"].follows == ("x", "w0")
    assert record.compared == len(sim.activation_sites())
    assert not record.not_compared


def test_the_reference_is_the_native_simulation_on_the_first_samples(tmp_path):
    sim = calibrated()
    sim.export(tmp_path)
    reference = read_reference(tmp_path, record_of(tmp_path).reference)
    assert not reference.synthetic
    np.testing.assert_array_equal(reference.inputs["x"], DATA["x"][:4])
    np.testing.assert_array_equal(reference.tensors["t2"], sim.predict({"x": DATA["x"][:4]})[0])
    assert set(sim.activation_sites()) == reference.tensors.keys()
    assert np.load(tmp_path / "model.record.npz")["tap/0"].dtype == np.uint8


def test_no_samples_travel_unless_they_are_wanted(tmp_path):
    sim = calibrated()
    sim.export(tmp_path, reference_samples=0)
    assert not (tmp_path / "model.record.npz").exists()
    record = record_of(tmp_path)
    assert record.reference is None and record.without_reference
    assert record.compared == len(sim.activation_sites())  # proven all the same
    for count in (2, 7):  # more than are taken by default, too
        folder = tmp_path / str(count)
        sim.export(folder, reference_samples=count)
        np.testing.assert_array_equal(
            read_reference(folder, record_of(folder).reference).inputs["x"], DATA["x"][:count]
        )
    with pytest.raises(InputError, match="reference_samples=-1"):
        sim.export(tmp_path, reference_samples=-1)


def test_without_data_the_samples_are_made_up_and_say_so(tmp_path):
    sim = calibrated()
    other = QuantSim(residual()).set(sim.encodings)
    other.export(tmp_path)
    reference = read_reference(tmp_path, record_of(tmp_path).reference)
    assert reference.synthetic
    assert reference.inputs["x"].shape == (4, 3, 8, 8)
    assert np.ptp(reference.inputs["x"]) > 0.5 * np.ptp(DATA["x"])
    found = verify(tmp_path, DATA)
    assert not found.problems
    assert any("made up" in note for note in found.notes)


def test_made_up_ids_are_rows_of_the_table():
    model = model_of([N("Gather", ["table", "ids"], ["e"]), N("MatMul", ["e", "w"], ["y"])], {"ids": ["n", "t"]}, ["y"],
                     table=normal(7, 8), w=normal(8, 3))  # fmt: skip
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    sim = QuantSim(model)
    made = synthetic(sim.backend, sim.native, sim.graph, {})
    assert made is not None
    ids = made.inputs["ids"]
    assert ids.dtype == np.int64 and ids.ndim == 2 and ids.min() >= 0 and 4 < ids.max() < 7


def test_kept_samples_are_bounded_and_fixed_batches_whole():
    batch = {"x": np.zeros((8, 2**20), np.float32)}
    assert len(kept(batch, {"x": ((None, 2**20), "float32")}).inputs["x"]) == 4
    big = {"x": np.zeros((8, 2**22), np.float32)}
    assert len(kept(big, {"x": ((None, 2**22), "float32")}).inputs["x"]) == 2
    fixed = kept(batch, {"x": ((8, 2**20), "float32")})
    assert len(fixed.inputs["x"]) == 8 and fixed.first(1) is fixed
    assert len(Samples(batch).first(3).inputs["x"]) == 3
    assert fixed.entire is None and kept(big, {"x": ((None, 2**22), "float32")}).uncut() is None
    uncut = kept(batch, {"x": ((None, 2**20), "float32")}).first(1).uncut()
    assert uncut is not None and len(uncut.inputs["x"]) == 8 and uncut.first(1) is uncut


def test_rows_that_are_read_by_number_take_the_whole_batch(tmp_path):
    """Row 7 of a batch of 10 isn't among its first samples: the export's comparison and the checks inside take all."""
    model = model_of([N("MatMul", ["x", "w"], ["h"]), N("Gather", ["h", "rows"], ["y"])], {"x": ["n", 6]}, ["y"],
                     w=normal(6, 6), rows=np.array([7, 2, 9]))  # fmt: skip
    model.graph.output[0].type.tensor_type.shape.Clear()
    feed = [{"x": normal(10, 6)}]
    sim = QuantSim(model).calibrate(feed)
    for name, made in (("a", sim), ("b", QuantSim.load(sim.save(tmp_path / "state")))):
        assert len(made.reference.inputs["x"]) == 4
        made.export(tmp_path / name)
        found = verify(tmp_path / name, feed)
        assert found.problems == [] and found.recorded and not [n for n in found.notes if "reference" in n]
        record = read_report(tmp_path / name, "model").report.record
        assert len(read_reference(tmp_path / name, record.reference).inputs["x"]) == 10
    two = QuantSim(model).calibrate([{"x": normal(2, 6)}])
    with pytest.raises(InputError, match="idx=7"):  # there is nothing to fall back to
        two.export(tmp_path / "c")


def test_a_small_budget_spreads_over_the_network():
    tensors = [f"t{i}" for i in range(10)]
    sizes = dict.fromkeys(tensors, 10)
    assert spread(tensors, sizes, 100) == tensors
    assert spread(tensors, sizes, 50) == ["t1", "t3", "t5", "t7", "t9"]
    assert spread(tensors, sizes, 25) == ["t1", "t5", "t9"] or spread(tensors, sizes, 25) == ["t4", "t9"]
    assert spread(tensors, sizes, 5) == []


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("options", [{}, {"weights": "int4", "activations": "uint16"}, {"target": "htp_v73"}])
def test_digests_survive_every_schema(tmp_path, version, options):
    calibrated(**options).export(tmp_path, encodings_version=version)
    assert verify(tmp_path, DATA).problems == []


def test_command_line_and_python_write_the_same_record(tmp_path):
    from bitwright.cli import main

    onnx.save(residual(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", **DATA)
    words = ["quantize", tmp_path / "net.onnx", "--data", tmp_path / "data.npz", "--out", tmp_path / "cli", "-q"]
    assert main(list(map(str, words))) == 0
    QuantSim(tmp_path / "net.onnx").calibrate(DATA).export(tmp_path / "python", name="net")
    command, python = (read_report(tmp_path / d, "net").report for d in ("cli", "python"))
    assert command.record == python.record
    assert command.sites == python.sites
    assert command.calibration is not None and command.seconds
    assert (tmp_path / "cli/report.html").exists()


def test_a_record_of_fewer_samples_is_of_the_same_session(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "BUDGET", 1)
    sim, opened = calibrated(), []
    network = type(sim.simulation)
    session = network.session
    monkeypatch.setattr(network, "session", lambda self, taps: opened.append(taps) or session(self, taps))
    sim.export(tmp_path)
    assert len(opened) == 1
    record = read_report(tmp_path, "model").report.record
    assert record is not None and record.reference is not None
    recorded = read_reference(tmp_path, record.reference)
    assert len(recorded.inputs["x"]) == 1 < len(sim.reference.inputs["x"])
    np.testing.assert_array_equal(recorded.inputs["x"][0], sim.reference.inputs["x"][0])


def test_notes_of_the_plan_travel_with_the_report(tmp_path):
    sim = calibrated(weights="int4:block16")
    sim.export(tmp_path)
    report = read_report(tmp_path, "model").report
    assert report.notes == sim.plan.notes and any("instead of in blocks" in note for note in report.notes)
    assert escape(report.notes[0]) in render(report)


def test_a_changed_report_breaks_its_seal(tmp_path):
    calibrated().export(tmp_path)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    assert content["seal"] == seal(content)
    content["sites"][0]["digest"] = "0" * 16
    path.write_text(json.dumps(content))
    assert "report.json: it was changed" in read_report(tmp_path, "model").damage
    path.write_text("{")
    assert "can't be read" in read_report(tmp_path, "model").damage
    assert any("report.json" in p for p in verify(tmp_path, DATA).problems)


def test_two_exports_in_one_folder_keep_their_reports(tmp_path):
    sim = calibrated()
    sim.export(tmp_path, name="a")
    sim.export(tmp_path, name="b")
    assert (named(tmp_path / "a.report.json"), named(tmp_path / "report.json")) == ("a", "b")
    sim.export(tmp_path, name="a")
    assert (named(tmp_path / "b.report.json"), named(tmp_path / "report.json")) == ("b", "a")
    assert not (tmp_path / "a.report.json").exists()
    for name in ("a", "b"):
        found = verify(tmp_path, DATA, name=name)
        assert found.recorded and not found.problems


# -- the gate


def corrupted(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the QDQ writer make a mistake."""
    real = qdq_writer.build_qdq

    def wrong(*args: Any, **options: Any) -> Any:
        model, report = real(*args, **options)
        change(model)
        return model, report

    monkeypatch.setattr(qdq_writer, "build_qdq", wrong)


def initializer(model: ir.Model, name: str, change: Any) -> None:
    value = model.graph.initializers[name]
    array = change(np.array(value.const_value.numpy()))
    value.const_value = ir.tensor(array, dtype=value.const_value.dtype, name=name)


def float_weight(model: ir.Model) -> None:
    """One layer keeps its weight in float, as a tied head once did."""
    value = next(n.outputs[0] for n in model.graph if n.op_type == "DequantizeLinear" and n.outputs[0].name == "w1")
    array = normal(8, 8, 3, 3, scale=0.1, seed=1)
    plain = ir.Value(name="w1_plain", const_value=ir.tensor(array, name="w1_plain"), type=value.type)
    plain.shape = ir.Shape(array.shape)
    model.graph.register_initializer(plain)
    value.replace_all_uses_with(plain)


def without_pair(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.outputs[0].name == "r1")
    node.outputs[0].replace_all_uses_with(node.inputs[0].producer().inputs[0])


CHANGES = {
    "scale of r2": ("r2", lambda m: initializer(m, "r2_scale", lambda a: a * np.float32(1.05))),
    "zero point of t0": ("t0", lambda m: initializer(m, "t0_zero_point", lambda a: a + 60)),
    "weight codes": ("t1", lambda m: initializer(m, "w1_quantized", lambda a: np.roll(a, 1))),
    "bias": ("t0", lambda m: initializer(m, "b0_quantized", lambda a: a + 4000)),
    "weight in float": ("t1", float_weight),
    "no pair": ("t1", without_pair),
}


@pytest.mark.parametrize("label", CHANGES)
def test_what_departs_from_the_simulation_is_not_handed_out(tmp_path, monkeypatch, label):
    tensor, change = CHANGES[label]
    sim = calibrated(weights="int4" if "float" in label else None)
    corrupted(monkeypatch, change)
    named_tensor = {"t1": "c1|t1"}.get(tensor, tensor)
    with pytest.raises(ModelError, match=rf"model\.qdq\.onnx doesn't compute what was simulated.*'({named_tensor})'"):
        sim.export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def unknown_op(model: ir.Model) -> None:
    next(n for n in model.graph if n.op_type == "Conv").op_type = "Convolution"


def refused_as_it_runs(model: ir.Model) -> None:
    """A file that loads; that its shapes don't fit is seen on data only."""
    first = next(n for n in model.graph if n.op_type == "Add")
    shape = ir.Value(name="shape", const_value=ir.tensor([7, -1], name="shape"))
    model.graph.register_initializer(shape)
    reshape = ir.node("Reshape", [first.inputs[0], shape])
    model.graph.insert_before(first, reshape)
    first.replace_input_with(0, reshape.outputs[0])


@pytest.mark.parametrize("change", [unknown_op, refused_as_it_runs])
def test_a_file_that_does_not_run_is_not_handed_out(tmp_path, monkeypatch, change):
    sim = calibrated()
    corrupted(monkeypatch, change)
    with pytest.raises(ModelError, match=r"model\.qdq\.onnx can't be run, so nothing is exported: "):
        sim.export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_verify_says_that_the_file_does_not_run(tmp_path):
    calibrated().export(tmp_path)
    model = onnx.load(tmp_path / "model.qdq.onnx")
    next(n for n in model.graph.node if n.op_type == "Conv").op_type = "Convolution"
    onnx.save(model, tmp_path / "model.qdq.onnx")
    assert any(p.startswith("model.qdq.onnx can't be run: ") for p in verify(tmp_path, DATA).problems)


def test_custom_ops_of_a_library_that_a_file_does_not_name_are_not_compared(tmp_path):
    """Whether it runs can't be known here, which is told and no fault of the file."""
    calibrated().export(tmp_path)
    model = onnx.load(tmp_path / "model.qdq.onnx")
    next(n for n in model.graph.node if n.op_type == "Relu").domain = "of.others"
    model.opset_import.append(onnx.helper.make_opsetid("of.others", 1))
    onnx.save(model, tmp_path / "other.qdq.onnx")
    sim = calibrated()
    expected = {t: sim.predict(DATA)[0] for t in sim.graph.outputs}
    network = open_quantized(tmp_path / "other.qdq.onnx")
    assert network is not None
    found = agreement(sim.graph, expected, DATA, network, sim.table)
    assert not found.refused and not found.compared and "'of.others'" in found.unreached["t2"]


def test_rounding_in_a_deep_network_is_no_departure(tmp_path):
    """The same changes by a last bit grow to a different output here, and each op is still right."""
    sim = calibrated(residual(24))
    sim.export(tmp_path)
    result = verify(tmp_path, DATA)
    assert result.problems == []


def test_one_wrong_op_in_a_deep_network_is_named(tmp_path, monkeypatch):
    sim = calibrated(residual(24))
    corrupted(monkeypatch, lambda m: initializer(m, "w17_quantized", lambda a: np.roll(a, 1)))
    with pytest.raises(ModelError, match=r"'(c17|t17)' differs"):
        sim.export(tmp_path)


# -- the user's own model


def saved(folder: Path, external: bool = False) -> Path:
    path = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0} if external else {}
    onnx.save(residual(), path, **options)
    return path


def test_the_source_is_never_overwritten(tmp_path):
    path = saved(tmp_path)
    before = path.read_bytes()
    sim = QuantSim(path).calibrate(DATA)
    with pytest.raises(InputError, match=r"would overwrite '.*model\.onnx', which the model is read from; .*name"):
        sim.export(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    sim.export(tmp_path, name="quantized")
    assert path.read_bytes() == before
    assert verify(tmp_path, DATA, name="quantized").problems == []


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder"])
def test_links_to_the_source_count_as_it(tmp_path, link):
    (tmp_path / "mine").mkdir()
    path, out = saved(tmp_path / "mine"), tmp_path / "out"
    if link == "folder":
        out.symlink_to(tmp_path / "mine")
    else:
        out.mkdir()
        make = os.link if link == "hard" else os.symlink
        make(path, out / "model.onnx")
    before = path.read_bytes()
    with pytest.raises(InputError, match="would overwrite"):
        QuantSim(path).calibrate(DATA).export(out)
    assert path.read_bytes() == before


def test_external_weights_belong_to_the_source(tmp_path):
    path = saved(tmp_path, external=True)
    path.rename(tmp_path / "other.onnx")  # its weights keep their name
    sim = QuantSim(tmp_path / "other.onnx").calibrate(DATA)
    weights = (tmp_path / "model.onnx.data").read_bytes()
    with pytest.raises(InputError, match=r"would overwrite '.*model\.onnx\.data'"):
        sim.export(tmp_path)
    assert (tmp_path / "model.onnx.data").read_bytes() == weights


def test_the_command_line_refuses_before_any_work(tmp_path, capsys):
    from bitwright.cli import main

    path = saved(tmp_path)
    before = path.read_bytes()
    np.savez(tmp_path / "data.npz", **DATA)
    np.save(tmp_path / "labels.npy", np.zeros(16, np.int64))
    for command in (
        ["quantize", path, "--data", tmp_path / "data.npz", "--out", tmp_path, "-q"],
        ["auto", path, "--data", tmp_path / "data.npz", "--labels", tmp_path / "labels.npy", "--allowed-drop", 0.99,
         "--out", tmp_path, "-q"],
        ["mixed-precision", path, "--data", tmp_path / "data.npz", "--budget", 0.9, "--out", tmp_path, "-q"],
    ):  # fmt: skip
        assert main(list(map(str, command))) == 2
        assert "would overwrite" in capsys.readouterr().err
        assert path.read_bytes() == before
        assert not (tmp_path / "report.json").exists()
        shutil.rmtree(tmp_path / ".run", ignore_errors=True)


def test_a_model_given_as_an_object_is_not_overwritten(tmp_path):
    """Nothing tells where it came from: what no export has written stays, whatever it is."""
    path = saved(tmp_path)
    before = path.read_bytes()
    sim = QuantSim(onnx.load(path)).calibrate(DATA)
    with pytest.raises(InputError, match=r"would overwrite '.*model\.onnx', which no export has written; .*name="):
        sim.export(tmp_path)
    with pytest.raises(InputError, match=r"saving would overwrite '.*model\.onnx', .*another folder"):
        sim.save(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    sim.export(tmp_path, name="quantized")
    path.unlink()
    sim.export(tmp_path)
    sim.export(tmp_path)  # in its own place


@pytest.mark.parametrize(
    "name", ["model.qdq.onnx", "model.record.npz", "model.encodings", "report.json", "report.html"]
)
@pytest.mark.parametrize("after", [False, True])
def test_nothing_of_the_users_is_replaced(tmp_path, name, after):
    sim = calibrated()
    if after and not name.startswith("report"):  # a report that a program has added to is one
        sim.export(tmp_path)
    (tmp_path / name).write_bytes(b"mine")
    before = contents(tmp_path)
    told = "was changed after an export" if after and not name.startswith("report") else "no export has written"
    with pytest.raises(InputError, match=rf"would overwrite '.*{name}', which {told}"):
        sim.export(tmp_path)
    assert contents(tmp_path) == before


def test_a_link_is_not_replaced(tmp_path):
    sim = calibrated()
    (tmp_path / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(InputError, match="which is a link"):
        sim.export(tmp_path)


@pytest.mark.parametrize("number", range(1, 13))
def test_what_a_killed_export_leaves_is_replaced_by_the_next(tmp_path, monkeypatch, number):
    """Whichever of the moves was the last; nothing is undone, as in a process that is gone."""
    sim, real, moves = calibrated(), Path.replace, []
    sim.export(tmp_path)

    def replace(path: Path, target: Path) -> Path:
        moves.append(path)
        return path if len(moves) > number else real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    sim.export(tmp_path)
    monkeypatch.undo()
    assert len(moves) >= number
    sim.export(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.onnx", "model.qdq.onnx", "model.record.npz", "model.encodings", "report.json", "report.html"
    }  # fmt: skip


# -- taking the place of an older export


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_export_without_its_seals_is_seen_to_be_incomplete(tmp_path):
    calibrated().export(tmp_path)
    for name in ("model.encodings", "report.json"):  # as after a kill between renames
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="incomplete"):
        verify(tmp_path, DATA)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 4, 6, 9])
def test_the_older_export_comes_back_where_the_new_one_can_not_be_moved_in(tmp_path, monkeypatch, fault, number):
    calibrated().export(tmp_path)
    before, real, moves = contents(tmp_path), Path.replace, []

    def replace(source: Path, target: Path) -> Path:
        if tmp_path in (source.parent, target.parent):
            moves.append(target)
            if len(moves) == number:
                raise fault
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(WriteError if isinstance(fault, OSError) else KeyboardInterrupt):
        calibrated(weights="int4").export(tmp_path)
    monkeypatch.undo()
    assert len(moves) == 2 * number - 1, "all that had been moved has been moved back"
    assert contents(tmp_path) == before
    assert verify(tmp_path, DATA).problems == []


def test_what_only_the_older_export_had_goes_with_it(tmp_path):
    calibrated().export(tmp_path, reference_samples=1)
    (tmp_path / "notes.txt").write_text("the user's")
    assert (tmp_path / "model.record.npz").exists()
    calibrated().export(tmp_path, reference_samples=0)
    assert not (tmp_path / "model.record.npz").exists()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("forged", ["", "..", "/", "../other.txt", "notes.txt", "folder/notes.txt", "notes\0.txt"])
def test_a_report_that_names_what_it_did_not_write_takes_nothing_away(tmp_path, forged):
    folder = tmp_path / "out"
    calibrated().export(folder)
    for path in (folder / "notes.txt", folder / "folder/notes.txt", tmp_path / "other.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("the user's")
    content = json.loads((folder / "report.json").read_text())
    content["record"]["contents"][forged] = "0" * 64
    (folder / "report.json").write_text(json.dumps(content | {"seal": seal(content)}))
    calibrated().export(folder)
    assert (folder / "notes.txt").exists() and (folder / "folder/notes.txt").exists()
    assert (tmp_path / "other.txt").exists()
    assert verify(folder, DATA).problems == []
