from __future__ import annotations

import json

import numpy as np
import pytest
from analysis_models import conv_model, onnx


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    onnx.save(conv_model(), folder / "net.onnx")
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(len(images)) % 5)
    return folder


@pytest.fixture(scope="module")
def out(files):
    from bitwright.cli import main

    words = [
        "quantize",
        files / "net.onnx",
        "--data",
        files / "images.npy",
        "--out",
        files / "out",
        "--recipe",
        "bn_fold",
    ]
    assert main([*map(str, words), "--target", "generic-int8", "--quiet"]) == 0
    return files / "out"


def test_analyze(run, files, tmp_path):
    pytest.importorskip("bokeh")
    words = [
        "analyze",
        files / "net.onnx",
        "--data",
        files / "images.npy",
        "--out",
        tmp_path / "a",
        "--batch-size",
        20,
        "--labels",
        files / "labels.npy",
        "--weights",
        "int4",
        "--override",
        "fc.weight=int8",
        "--quiet",
    ]
    result = run(*words)
    assert result.status == 0, result.err
    assert "weights only" in result.out and "most sensitive sites" in result.out and "analysis.html" in result.out
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert found["recipe"] == ["fold_batch_norm"]
    assert next(s for s in found["sensitivities"] if s["unit"] == "fc.weight")["bits"] == "int8"
    again = run(*words, "--json", "--sweep-by", "evaluate", "--recipe", "none")
    assert again.status == 0 and json.loads(again.out)["measure"] == "top-1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep-by", "evaluate"], "needs `evaluate` or `labels`"),
        (["--recipe", "magic"], "magic"),
        (["--accumulator-bits", "3"], "greater than or equal to 8"),
        (["--sweep-by", "luck"], "'sqnr' or by 'evaluate'"),
    ],
)
def test_analyze_refuses(run, files, tmp_path, words, message):
    pytest.importorskip("bokeh")
    result = run(
        "analyze", files / "net.onnx", "--data", files / "images.npy", "--out", tmp_path / "a", "--quiet", *words
    )
    assert result.status == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "a" / "analysis.json").exists()


def test_validate(run, files, tmp_path):
    result = run("validate", files / "net.onnx", "--target", "htp_v66")
    assert result.status == 0 and "no multiple of 32" in result.out and "quantized sites" in result.out
    result = run("validate", files / "net.onnx", "--json", "--multiple", 3)
    hints = json.loads(result.out)["hints"]
    assert {h["rule"] for h in hints} == {"channels"}
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    assert run("validate", tmp_path / "broken.onnx").status == 2


def test_visualize(run, files, out, tmp_path):
    pytest.importorskip("bokeh")
    result = run("visualize", files / "net.onnx", out / "net.onnx", "--out", tmp_path / "page.html", "--quiet")
    assert result.status == 0 and "1 parameters changed" in result.out
    assert (tmp_path / "page.html").stat().st_size > 100_000


def test_dump_and_compare(run, files, out, tmp_path):
    words = ["layer-outputs", out, "--data", files / "images.npy", "--quiet", "--samples", 2]
    assert run(*words, "--out", tmp_path / "d").status == 0
    assert (
        run(*words, "--out", tmp_path / "t", "--tensor", "dw", "--tensor", "scores", "--layout", "native").status == 0
    )
    result = run("compare", tmp_path / "d", tmp_path / "t")
    assert result.status == 0 and "none departs" in result.out
    result = run("compare", out, tmp_path / "t", "--data", files / "images.npy", "--samples", 2, "--json")
    assert result.status == 0 and json.loads(result.out)["samples"] == 2
    file = tmp_path / "t" / "outputs" / "layer_outputs_1" / "scores.raw"
    (np.fromfile(file, np.float32) + 5).astype(np.float32).tofile(file)
    result = run("compare", tmp_path / "d", tmp_path / "t")
    assert result.status == 1 and "'scores' (Gemm fc) departs first" in result.err
    assert run("compare", tmp_path / "d", tmp_path / "t", "--min-sqnr", -100).status == 0
    assert run("compare", tmp_path / "d", tmp_path / "t", "--rename", "scores").status == 2
    assert run("layer-outputs", files / "net.onnx", "--data", files / "images.npy", "--out", tmp_path / "f").status == 2
    result = run(
        "layer-outputs", files / "net.onnx", "--data", files / "images.npy", "--out", tmp_path / "f", "--float"
    )
    assert result.status == 0, result.err


def test_target_commands(run, out):
    result = run("target-commands", out, "--tool", "qnn", "--soc", "sm8650", "--data", "x.npy")
    assert result.status == 0 and "qnn-onnx-converter" in result.out and "this export has 1.0.0" in result.out
    result = run("target-commands", out, "--tool", "snpe", "--soc", "sm8650", "--input-shape", "image=2,3,12,12")
    assert "--htp_socs=sm8650" in result.out and "image 2,3,12,12" in result.out
    assert run("target-commands", out, "--tool", "qnn", "--input-shape", "image=big").status == 2
    assert run("target-commands", out, "--tool", "other").status == 2
