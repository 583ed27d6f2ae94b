"""`bitwright quantize`: what it writes, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
from typing import ClassVar

import numpy as np
import onnx
import pytest

from bitwright.files import _durable as durable
from bitwright.plugins import default_registry
from bitwright.report import RunReport
from bitwright.runs import RunDirectory
from bitwright.technique import Outcome, Settings

FILES = ["net.encodings", "net.onnx", "net.qdq.onnx", "net.record.npz", "report.html", "report.json"]


def written(folder):
    return sorted(f.name for f in folder.iterdir() if f.name != ".run")


def test_it_writes_everything_and_leaves_the_model_alone(net, run, tmp_path):
    before = net.model.read_bytes()
    out = tmp_path / "deep" / "out"
    done = run(
        "quantize", net.model, "--data", net.npz, "--labels", net.labels, "--recipe", "bn_fold,cle", "--out", out
    )
    assert done.status == 0, done.err
    assert written(out) == FILES
    assert net.model.read_bytes() == before
    for file in ("net.onnx", "net.qdq.onnx"):
        onnx.checker.check_model(str(out / file), full_check=True)
    assert "simulated" in done.out
    assert "100.00 %" in done.out
    assert str(out / "report.html") in done.out
    report = RunReport.model_validate_json((out / "report.json").read_text())
    assert [step.technique for step in report.steps] == ["fold_batch_norm", "cross_layer_equalization"]
    assert report.accuracy.float_model == 1.0
    assert report.accuracy.samples == len(net.images)
    assert report.calibration.samples == len(net.images)
    assert report.target == "default"
    assert set(report.seconds) >= {
        "open",
        "fold_batch_norm",
        "cross_layer_equalization",
        "calibrate",
        "evaluate",
        "export",
    }
    assert report.count("quantized") > 0


def test_options_reach_the_result(net, run, tmp_path):
    done = run(
        "quantize", net.model, "--data", net.npy, "--out", tmp_path / "o", "--name", "small", "--weights", "int4",
        "--activations", "uint16", "--scheme", "minmax", "--calibration-samples", 10, "--batch-size", 4, "--seed", 7,
        "--encodings-version", "0.6.1", "--override", "fc=float", "--target", "htp_v73", "-q",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert done.err == ""
    report = RunReport.model_validate_json((tmp_path / "o" / "report.json").read_text())
    assert (report.name, report.weights, report.activations, report.seed) == ("small", "int4", "uint16", 7)
    assert (report.calibration.samples, report.calibration.batch_size, report.calibration.scheme) == (10, 4, "minmax")
    sites = {s.site: s for s in report.sites}
    assert sites["conv.weight"].detail.startswith("int4")
    assert sites["image"].detail.startswith("uint16")
    assert sites["fc.weight"].decision == "float"
    encodings = json.loads((tmp_path / "o" / "small.encodings").read_text())
    assert encodings["version"] == "0.6.1"
    assert encodings["param_encodings"]["conv.weight"][0]["bitwidth"] == 4


def test_recipe_file_with_settings(net, run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- bn_fold\n- cle:\n    iterations: 3\n")
    assert run("quantize", net.model, "--data", net.npz, "--recipe", recipe, "--out", tmp_path / "o").status == 0
    report = RunReport.model_validate_json((tmp_path / "o" / "report.json").read_text())
    assert report.steps[1].settings["iterations"] == 3


def test_the_same_command_again_resumes_and_gives_the_same_bytes(net, run, tmp_path):
    out = tmp_path / "o"
    command = ("quantize", net.model, "--data", net.npz, "--recipe", "bn_fold,bias_correction", "--out", out)
    assert run(*command).status == 0
    first = {name: (out / name).read_bytes() for name in FILES[:4]}
    assert run(*command).status == 0
    assert {name: (out / name).read_bytes() for name in FILES[:4]} == first
    with RunDirectory(out / ".run") as directory:
        steps = [(e["name"], e["resumed"]) for e in directory.events() if e["event"] == "step"]
    again = steps[len(steps) // 2 :]
    assert ("bias_correction", True) in again
    assert ("calibrate", True) in again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipe": "bn_fold,adaruond"}, r"step 2: there is no technique 'adaruond' (did you mean 'adaround'?)"),
        ({"--recipe": "nowhere.yaml"}, "can't read recipe 'nowhere.yaml': No such file"),
        ({"--target": "htp_v99"}, "no target is called 'htp_v99'"),
        ({"--data": "absent.npz"}, "absent.npz"),
        ({"--labels": "absent.npy"}, "there is no labels file 'absent.npy'"),
        ({"--weights": "int1"}, "int1"),
        ({"--scheme": "guess"}, "guess"),
        ({"--encodings-version": "3.0"}, "there is no encodings version '3.0'; there are 0.6.1"),
        (
            {"--weights": "fp8"},
            "schema 1.0.0 has no float8e4m3fn; use schema 2.0.0 (of an export: `--encodings-version",
        ),
        ({"--weights": "bfloat16", "--encodings-version": "0.6.1"}, "schema 0.6.1 has no bfloat16; use schema 2.0.0"),
        ({"--name": "a/b"}, "can't be a file name"),
        ({"--override": "fc"}, "isn't of the form NAME=TYPE"),
        ({"--override": "cf=float"}, "no op or tensor 'cf'"),
        ({"--batch-size": "0"}, "'--batch-size'"),
        ({"--calibration-samples": "x"}, "'--calibration-samples'"),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_options_are_one_line_and_write_nothing(net, run, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    options = {"--data": net.npz, "--out": "o"} | change
    done = run("quantize", net.model, *(word for pair in options.items() for word in pair))
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (lambda x: {"picture": x, "other": x}, ("image", "picture")),
        (lambda x: {"image": x, "more": x}, ("more",)),
        (lambda x: {"image": x[:, :2]}, ("image", "3")),
        (lambda x: {"image": x[0]}, ("image",)),
        (lambda x: {"image": x[:0]}, ("empty",)),
        (lambda x: {"image": np.where(x > 2, np.nan, x)}, ("image", "NaN")),
        (lambda x: {"image": x.astype(str)}, ("image",)),
    ],
)
def test_bad_data_name_the_input_and_write_nothing(net, run, tmp_path, arrays, words):
    data = save(tmp_path / "bad.npz", **arrays(net.images))
    done = run("quantize", net.model, "--data", data, "--out", tmp_path / "o", "--quiet")
    assert done.status == 2
    for word in words:
        assert word in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, np.int64), "3 labels"),
        (np.full(48, 0.5), "labels are class indices"),
        (np.zeros((48, 5), np.int64), "labels have shape (samples,)"),
    ],
)
def test_bad_labels(net, run, tmp_path, labels, message):
    np.save(tmp_path / "l.npy", labels)
    done = run("quantize", net.model, "--data", net.npz, "--labels", tmp_path / "l.npy", "--out", tmp_path / "o")
    assert (done.status, message in done.err) == (2, True), done.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_bad_models(net, run, tmp_path, content):
    model = tmp_path / "bad.onnx"
    model.write_bytes(net.model.read_bytes()[:-200] if content is None else content)
    done = run("quantize", model, "--data", net.npz, "--out", tmp_path / "o")
    assert done.status == 2
    assert "bad.onnx" in done.err
    assert "unexpected" not in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_output_that_is_a_file(net, run, tmp_path):
    (tmp_path / "o").write_text("mine")
    done = run("quantize", net.model, "--data", net.npz, "--out", tmp_path / "o")
    assert done.status == 2
    assert "can't write" in done.err
    assert (tmp_path / "o").read_text() == "mine"


def test_full_disk_at_the_end_leaves_no_partial_file(net, run, tmp_path, monkeypatch):
    out = tmp_path / "o"
    real = os.fsync

    def full(handle):
        if any(out.glob(".net.*/*.encodings*")) or any(out.glob(".net.*/.*.encodings*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(durable.os, "fsync", full)
    done = run("quantize", net.model, "--data", net.npz, "--out", out, "--quiet")
    assert done.status == 2, done.out
    assert "No space left" in done.err
    assert not out.exists() or written(out) == []


class Stops:
    """Stops the program."""

    name: ClassVar[str] = "stops"
    Settings: ClassVar[type[Settings]] = Settings
    requires: ClassVar[frozenset] = frozenset()
    error: ClassVar[BaseException] = KeyboardInterrupt()

    def statistics(self, graph, plan, settings):
        return ()

    def apply(self, ctx):
        ctx.store.put("half", {"x": np.ones(3)})
        if self.error is not None:
            raise self.error
        return Outcome()


@pytest.fixture
def stops(monkeypatch):
    default_registry().add(Stops)
    yield lambda error: monkeypatch.setattr(Stops, "error", error)
    catalogue = default_registry()._catalogue
    catalogue.descriptors = [d for d in catalogue.descriptors if d.info.name != "stops"]


def test_interrupts_that_keep_nothing_say_so(net, run, exported, tmp_path, monkeypatch):
    def stop(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitwright.runs._directory._KEPT", [])
    monkeypatch.setattr("bitwright.bank.collect", stop)
    monkeypatch.setattr("bitwright.verify.verify", stop)
    for command in (("collect", net.model, "--data", net.npz, "--out", tmp_path / "bank"), ("verify", exported)):
        done = run(*command)
        assert done.status == 130
        assert done.err == "bitwright: stopped; nothing is kept that the same command could go on from\n"


def test_interrupt_keeps_what_can_be_resumed(net, run, tmp_path, stops):
    out = tmp_path / "o"
    command = ("quantize", net.model, "--data", net.npz, "--recipe", "stops", "--out", out)
    done = run(*command)
    assert done.status == 130
    assert "goes on from the last finished layer" in done.err
    assert written(out) == []
    stops(None)
    assert run(*command).status == 0
    with RunDirectory(out / ".run") as directory:
        events = list(directory.events())
    assert [e["resumed"] for e in events if e["event"] == "step" and e["name"] == "stops"] == [False, True]
    assert "interrupted" in [e["event"] for e in events]


def test_unexpected_error_is_one_line_unless_debugging(net, run, tmp_path, stops):
    stops(ZeroDivisionError("division by zero"))
    command = ("quantize", net.model, "--data", net.npz, "--recipe", "stops", "--out", tmp_path / "o", "--quiet")
    done = run(*command)
    assert done.status == 2
    assert "unexpected ZeroDivisionError: division by zero" in done.err
    assert done.err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        run(*command, "--debug")


def test_another_process_in_the_same_folder_is_refused(net, run, tmp_path):
    (tmp_path / "o").mkdir()
    with RunDirectory(tmp_path / "o" / ".run"):
        done = run("quantize", net.model, "--data", net.npz, "--out", tmp_path / "o")
    assert done.status == 2
    assert "in use by process" in done.err


def test_what_stays_in_float_is_named(run, tmp_path):
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["h"], name="relu"),
        onnx.helper.make_node("Det", ["h"], ["d"], name="determinant"),
        onnx.helper.make_node("NonZero", ["h"], ["i"], name="places"),
    ]
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2, 2])],
        [onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, ["n"]),
         onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [3, "m"])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(8, 2, 2)).astype(np.float32))
    done = run("quantize", tmp_path / "net.onnx", "--data", tmp_path / "x.npy", "--out", tmp_path / "o")
    assert done.status == 0, done.err
    (told,) = [line for line in done.out.splitlines() if line.startswith("note: in float")]
    assert "determinant (Det)" in told and "places" not in told
    report = RunReport.model_validate_json((tmp_path / "o" / "report.json").read_text())
    assert report.model.unknown == ("determinant (Det)",)


def test_workers_change_the_time_alone(net, run, tmp_path, monkeypatch):
    """Layers are sent to two processes; every file with numbers is that of one process."""
    from bitwright.workers import Flight

    sent, submit = [], Flight.submit

    def counted(flight, name, *task):
        sent.append(name)
        submit(flight, name, *task)

    monkeypatch.setattr(Flight, "submit", counted)
    (tmp_path / "r.json").write_text('[{"gptq": {"inputs": "float"}}]')
    command = ("quantize", net.model, "--data", net.npz, "--weights", "int4", "--recipe", tmp_path / "r.json", "--out")
    assert run(*command, tmp_path / "one").status == 0
    assert not sent
    done = run(*command, tmp_path / "two", "--workers", "2")
    assert done.status == 0, done.err
    assert sorted(sent) == ["conv", "dw", "fc"]
    for file in ("net.encodings", "net.onnx", "net.qdq.onnx"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_workers_and_a_cluster_are_one_or_the_other(net, run, tmp_path):
    command = ("quantize", net.model, "--data", net.npz, "--out", tmp_path / "out")
    done = run(*command, "--workers", "2", "--cluster", "local:2")
    assert done.status == 2
    assert "either --workers or --cluster" in done.err
    done = run(*command, "--cluster", "somewhere")
    assert done.status == 2
    assert "tcp://host:8786" in done.err
    assert not (tmp_path / "out").exists()
