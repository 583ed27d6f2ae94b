from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from analysis_models import conv_model, onnx

import bitwright
from bitwright import QuantSim
from bitwright.errors import InputError

TOOLS = ("qnn", "snpe", "qairt", "onnxruntime", "tensorrt")


@pytest.fixture(scope="module")
def out(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "my export"
    QuantSim(conv_model(), target="onnxruntime-cpu").apply("fold_batch_norm").calibrate(images).export(
        folder, name="net"
    )
    np.save(folder.parent / "images.npy", images)
    return folder


def run(line):
    words = shlex.split(line)
    words[:1] = {"python": [sys.executable], "bitwright": [sys.executable, "-m", "bitwright"]}[words[0]]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    )


def test_onnxruntime_lines_run(out):
    found = bitwright.target_commands(out, "onnxruntime", data=out.parent / "images.npy")
    assert not found.warnings
    for command in found.commands:
        result = run(command.line)
        assert result.returncode == 0, result.stderr
    assert "simulation and onnxruntime:" in result.stdout


def test_tflite_line_runs(out, tmp_path):
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(InputError, match=r"no net\.tflite.*Keras models alone"):
        bitwright.target_commands(out, "tflite")
    folder = tmp_path / "with lite"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    @tf.function(input_signature=[tf.TensorSpec([1, 4], tf.float32)])
    def double(x):
        return 2 * x

    converter = tf.lite.TFLiteConverter.from_concrete_functions([double.get_concrete_function()])
    (folder / "net.tflite").write_bytes(converter.convert())
    first, compared, last = bitwright.target_commands(folder, "tflite").commands
    result = run(first.line)
    assert result.returncode == 0, result.stderr
    assert "(1, 4)" in result.stdout
    assert compared.line.startswith("bitwright verify ")
    assert compared.line.endswith("--name net --runtime tflite")
    assert last.line.startswith("adb push ")


@pytest.mark.parametrize("tool", TOOLS)
def test_lines_name_files_that_exist(out, tool):
    found = bitwright.target_commands(out, tool)
    text = str(found)
    for command in found.commands:
        for word in shlex.split(command.line.replace("$", "")):
            path = word.partition("=")[2] or word
            if path.startswith("/") and path.endswith((".onnx", ".encodings")):
                assert Path(path).exists(), path
    assert "net.qdq.onnx" in text if tool in ("onnxruntime", "tensorrt") else "net.encodings" in text
    if tool in ("qnn", "snpe", "qairt"):
        assert "image 1,3,12,12" in text, "free batch dimensions are one sample"
        assert found.schema in found.schemas
        assert [c.line.split()[1] for c in found.commands if c.line.startswith("bitwright")] == [
            "layer-outputs",
            "compare",
        ]


def test_the_dump_lines_of_qualcomm_tools_run(out):
    found = bitwright.target_commands(out, "qairt", data=out.parent / "images.npy")
    dump, *_, compare, _ = found.commands
    assert run(dump.line).returncode == 0
    words = shlex.split(compare.line)
    index = json.loads((Path(words[2]) / "index.json").read_text())
    assert index["layout"] == "native" and index["samples"] == 20
    Path(words[3]).symlink_to(words[2])
    assert run(compare.line).returncode == 0


@pytest.mark.parametrize("tool", ["qnn", "snpe", "qairt"])
def test_lines_for_a_relative_folder_run_one_after_another_in_one_shell(out, tool, monkeypatch, tmp_path):
    monkeypatch.chdir(out.parent)
    commands = bitwright.target_commands(out.name, tool).commands
    Path(out.name, f"net.{tool}", "expected").mkdir(parents=True, exist_ok=True)
    lines = [c.line for c in commands if "cd " in c.line]
    assert lines
    # The tools themselves need a licence: a stand-in for each, found before anything else.
    for line in lines:
        stand_in = tmp_path / shlex.split(line.partition(" && ")[2].rstrip(")"))[0]
        stand_in.write_text("#!/bin/sh\nexit 0\n")
        stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-e"], input="\n".join(lines), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("version", "tools"), [("2.0.0", ("qnn", "snpe")), ("2.1.0", ("qnn", "snpe", "qairt"))])
def test_another_schema_is_converted_first(images, tmp_path, version, tools):
    sim = QuantSim(conv_model()).apply("fold_batch_norm").calibrate(images)
    sim.export(tmp_path, name="net", encodings_version=version)
    for tool in tools:
        found = bitwright.target_commands(tmp_path, tool)
        assert any(version in w and "convert" in w for w in found.warnings)
        assert "--quantization_overrides" in str(found) and "net.1.0.0.json" in str(found)
    result = run(found.commands[0].line)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "net.1.0.0.json").read_text())["version"] == "1.0.0"
    assert bitwright.target_commands(tmp_path, tools[0]), "the bundle is still one bundle"


def test_qairt_takes_2_0_0_with_its_second_quantizer(images, tmp_path):
    QuantSim(conv_model()).calibrate(images).export(tmp_path, name="net", encodings_version="2.0.0")
    found = bitwright.target_commands(tmp_path, "qairt")
    assert "--use_quantize_v2" in str(found) and any("2.37" in w for w in found.warnings)


def test_tensorrt_wants_symmetric_grids(out):
    found = bitwright.target_commands(out, "tensorrt")
    assert any("symmetric" in w for w in found.warnings)
    assert "--minShapes=image:1x3x12x12" in str(found)


def test_free_dimensions_must_be_given(images, tmp_path):
    model = conv_model()
    for d in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[d].dim_param = f"s{d}"
    QuantSim(model).calibrate(images).export(tmp_path, name="net")
    with pytest.raises(InputError, match="--input-shape image=1"):
        bitwright.target_commands(tmp_path, "qnn")
    found = bitwright.target_commands(tmp_path, "qnn", input_shapes={"image": (1, 3, 12, 12)})
    assert "image 1,3,12,12" in str(found)
    with pytest.raises(InputError, match="no input 'picture'"):
        bitwright.target_commands(tmp_path, "qnn", input_shapes={"picture": (1,)})
    assert onnx is not None


def test_unknown_tools_and_folders(out, tmp_path):
    with pytest.raises(InputError, match="there are: qnn, snpe"):
        bitwright.target_commands(out, "abacus")
    with pytest.raises(InputError, match="0 encodings files"):
        bitwright.target_commands(tmp_path, "qnn")
