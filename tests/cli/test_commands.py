"""The other commands: verify, encodings, listings, doctor, and the program as a whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import bitwright
from bitwright.cli.listings import attribute_notes, setting_notes
from bitwright.plugins import default_registry

# -- verify


def test_verify_shows_a_table(net, exported, run):
    done = run("verify", exported, "--data", net.npz, "--labels", net.labels)
    assert done.status == 0, done.err
    for word in ("float", "simulated", "integer", "100.00 %", "dB", "ops in integers"):
        assert word in done.out


def test_verify_shows_the_plain_session(net, run, tmp_path):
    for option, proof in (
        ("--plain-session", "no sum of products can saturate"),
        ("--no-plain-session", "can saturate"),
    ):
        out = tmp_path / option
        done = run("quantize", net.model, "--data", net.npz, "--out", out, option, "-q")
        assert done.status == 0, done.err
        assert ("stored as uint8" in done.out + done.err) == (option == "--plain-session")
        done = run("verify", out, "--data", net.npz, "-q")
        assert "plain session" in done.out
        assert proof in done.out
        assert ("session.x64quantprecision" in done.out) == (option == "--no-plain-session")


def test_verify_json_has_the_documented_keys(net, exported, run):
    done = run("verify", exported, "--data", net.npz, "--labels", net.labels, "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["samples"] == len(net.images)
    assert found["accuracy"].keys() == {"float", "simulated", "integer"}
    assert all(0.9 <= value <= 1 for value in found["accuracy"].values())
    pairs = {"simulated_float", "integer_float", "integer_simulated"}
    assert found["agreement"].keys() == pairs
    assert found["sqnr_db"].keys() == pairs
    assert found["sqnr_db"]["simulated_float"] > 20
    assert {"name", "sqnr_db"} <= found["tensors"][0].keys()


def test_verify_without_data_takes_the_exports_own(exported, run):
    done = run("verify", exported, "--json")
    found = json.loads(done.out)
    assert done.status == 0 and found["samples"] == 4 and found["problems"] == []
    assert any("no data were given" in note for note in found["notes"])


def test_verify_without_labels_has_no_accuracy(net, exported, run):
    done = run("verify", exported, "--data", net.npy, "--samples", 8, "--json")
    found = json.loads(done.out)
    assert (found["samples"], found["accuracy"]) == (8, {})
    done = run("verify", exported, "--data", net.npy, "--samples", 8)
    assert "top-1" not in done.out


def test_verify_limits_decide_the_status(net, exported, run, tmp_path):
    wrong = (np.load(net.labels) + 1) % 5
    np.save(tmp_path / "wrong.npy", wrong)
    assert run("verify", exported, "--data", net.npz, "--min-agreement", 0.5, "-q").status == 0
    assert run("verify", exported, "--data", net.npz, "--labels", net.labels, "--max-drop", 50, "-q").status == 0
    done = run("verify", exported, "--data", save_noise(tmp_path, net), "--min-agreement", 1.0, "-q")
    assert done.status in (0, 1)
    done = run("verify", exported, "--data", net.npz, "--max-drop", 1)
    assert done.status == 2
    assert "--max-drop needs --labels" in done.err


def save_noise(folder, net):
    np.savez(folder / "noise.npz", image=np.random.default_rng(5).normal(size=(200, 3, 12, 12)).astype(np.float32))
    return folder / "noise.npz"


def test_verify_fails_when_the_runtime_departs(net, exported, run, tmp_path):
    """A bundle whose integer model is of other weights must be found out."""
    import onnx

    broken = shutil.copytree(exported, tmp_path / "broken")
    model = onnx.load(broken / "net.qdq.onnx")
    bias = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32 and t.dims == [5])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 0, 0, 2**30], np.int32), bias.name))
    onnx.save(model, broken / "net.qdq.onnx")
    done = run("verify", broken, "--data", net.npz, "--labels", net.labels, "--min-agreement", 0.9, "--max-drop", 5)
    assert done.status == 1
    assert "integer and float agree on" in done.err
    assert "points below float, 5 are allowed" in done.err


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "is not a directory"),
        (lambda folder: folder.mkdir(), "holds 0 encodings files"),
        (lambda folder: (folder.mkdir(), (folder / "quantsim.json").write_text("{}")), "a saved simulation; export it"),
        (lambda folder: (folder.mkdir(), (folder / "a.encodings").write_text("{}")), "no model a"),
    ],
)
def test_verify_refuses_folders_without_a_bundle(net, run, tmp_path, prepare, message):
    prepare(tmp_path / "dir")
    done = run("verify", tmp_path / "dir", "--data", net.npz)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


# -- encodings


def test_check_proves_an_export(exported, run):
    done = run("encodings", "check", exported)
    assert done.status == 0, done.err
    assert "checked against model and target" in done.out
    found = json.loads(run("encodings", "check", exported, "--json").out)
    assert found["problems"] == []
    assert found["entries"] > 5


def test_check_finds_missing_wrong_and_superfluous_entries(exported, run, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "o")
    content = json.loads((folder / "net.encodings").read_text())
    content["activation_encodings"] = [e for e in content["activation_encodings"] if e["name"] != "image"]
    content["param_encodings"][0]["bw"] = 4
    content["param_encodings"][0]["offset"] = [-8] * len(content["param_encodings"][0]["offset"])
    content["param_encodings"].append({**content["param_encodings"][-1], "name": "nobody"})
    (folder / "net.encodings").write_text(json.dumps(content))
    done = run("encodings", "check", folder)
    assert done.status == 1
    assert "image: has no entry" in done.out
    assert "4 bits, expected 8" in done.out
    assert "nobody: has an entry, but the artefact has no tensor of that name" in done.out
    assert "3 problems" in done.err


def test_check_of_a_single_file(exported, net, run, tmp_path):
    file = exported / "net.encodings"
    assert "its schema" in run("encodings", "check", file).out
    assert "the model" in run("encodings", "check", file, "--model", exported / "net.onnx").out
    done = run("encodings", "check", file, "--model", exported / "net.onnx", "--target", "onnxruntime-cpu")
    assert done.status == 0, done.out
    assert run("encodings", "check", file, "--target", "default").status == 2
    (tmp_path / "cut.encodings").write_bytes(file.read_bytes()[:100])
    done = run("encodings", "check", tmp_path / "cut.encodings")
    assert done.status == 2
    assert "cut.encodings" in done.err


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
def test_convert_there_and_back_differs_in_nothing(exported, run, tmp_path, version):
    source, there, back = exported / "net.encodings", tmp_path / "there.encodings", tmp_path / "back.encodings"
    model = ("--model", exported / "net.onnx")
    assert run("encodings", "convert", source, there, "--to", version, *model).status == 0
    assert run("encodings", "convert", there, back, "--to", "1.0.0", *model).status == 0
    done = run("encodings", "diff", source, back, "--tolerance", 1e-6)
    assert (done.status, done.out) == (0, "equal\n")


def test_convert_refuses_an_unknown_schema(exported, run, tmp_path):
    done = run("encodings", "convert", exported / "net.encodings", tmp_path / "x", "--to", "9")
    assert done.status == 2
    assert not (tmp_path / "x").exists()


def test_diff_says_what_differs(exported, run, tmp_path):
    content = json.loads((exported / "net.encodings").read_text())
    content["activation_encodings"][0]["scale"][0] *= 1.5
    (tmp_path / "b.encodings").write_text(json.dumps(content))
    name = content["activation_encodings"][0]["name"]
    done = run("encodings", "diff", exported / "net.encodings", tmp_path / "b.encodings")
    assert done.status == 1
    assert f"{name}: scale" in done.out
    found = json.loads(run("encodings", "diff", exported / "net.encodings", tmp_path / "b.encodings", "--json").out)
    assert [(d["name"], d["field"]) for d in found] == [(name, "scale")]
    assert (
        run("encodings", "diff", exported / "net.encodings", tmp_path / "b.encodings", "--tolerance", 0.5).status == 0
    )


# -- listings


def test_targets(run, tmp_path):
    assert "htp_v73" in run("targets").out
    assert {t["name"] for t in json.loads(run("targets", "--json").out)} >= {"default", "onnxruntime-cpu"}
    assert "Hexagon V73" in run("targets", "htp_v73").out
    config = run("targets", "htp_v73", "--config").out
    (tmp_path / "mine.json").write_text(config)
    assert run("targets", tmp_path / "mine.json", "--config").out == config
    assert run("targets", "--config").status == 2
    assert run("targets", "nope").status == 2


def test_techniques(run):
    assert "cross_layer_equalization   cle" in run("techniques").out
    assert len(json.loads(run("techniques", "--json").out)) >= 5
    done = run("techniques", "cle")
    assert "iterations" in done.out
    assert "passes over all sets" in done.out
    assert json.loads(run("techniques", "cle", "--json").out)["settings"]["properties"]["iterations"]["default"] == 1
    assert run("techniques", "clee").status == 2


@pytest.mark.parametrize("name", default_registry().techniques())
def test_every_setting_of_every_technique_is_explained(run, name):
    settings = default_registry().settings(name)
    notes = setting_notes(settings)
    for field, info in settings.model_fields.items():
        assert info.description or notes.get(field), f"{name}.{field}"


def test_attribute_notes():
    text = "Title.\n\nAttributes:\n    a, b: first,\n        and more.\n    c: last.\n\nRaises:\n    X: no."
    assert attribute_notes(text) == {"a": "first, and more.", "b": "first, and more.", "c": "last."}
    assert attribute_notes("no section") == {}


def test_plugins(run):
    done = run("plugins")
    assert "bitwright_onnx.plugin" in done.out
    assert {p["state"] for p in json.loads(run("plugins", "--json").out)} <= {
        "ok",
        "missing framework",
        "failed",
        "blocked",
    }


def test_doctor(run):
    done = run("doctor")
    assert done.status == 0, done.out
    assert "backend onnx: ready (branching, fingerprinting, integer_runtime, observable, op_timer, " in done.out
    assert "uint8 × int8 kernels" in done.out
    assert "all well" in done.out
    assert "results" not in done.out  # the layout of stored results, which nobody has installed


# -- the program


def test_help_version_and_usage(run):
    assert run("--version").out == bitwright.__version__ + "\n"
    for words in ((), ("--help",), ("encodings",), ("encodings", "--help"), ("quantize", "-h")):
        done = run(*words)
        assert done.status == 0
        assert "Usage" in done.out
    for words in (
        ("quantise",),
        ("quantize",),
        ("quantize", "m.onnx", "--nope"),
        ("encodings", "chek"),
        ("targets", "a", "b"),
    ):
        done = run(*words)
        assert done.status == 2
        assert done.err.startswith("bitwright: ")
        assert done.err.count("\n") == 1
        assert done.out == ""


def test_exit_status_reaches_the_shell():
    def status(*words):
        return subprocess.run([sys.executable, "-m", "bitwright", *words], capture_output=True, text=True, check=False)

    assert status("targets").returncode == 0
    refused = status("targets", "nope")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m bitwright targets --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "["
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_broken_plugins_are_a_warning_line(run, monkeypatch):
    import warnings

    from bitwright.cli import listings
    from bitwright.plugins.registry import PluginWarning

    monkeypatch.setattr(
        listings, "_json", lambda value: warnings.warn("plugin 'x' skipped", PluginWarning, stacklevel=1)
    )
    done = run("targets", "--json")
    assert done.status == 0
    assert done.err == "warning: plugin 'x' skipped\n"
