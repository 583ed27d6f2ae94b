"""`--metric` of `quantize` and `auto`, on a small language model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright import QuantSim
from bitwright.report import RunReport


@pytest.fixture
def language(tmp_path):
    """A model of 12 tokens, files of ids to calibrate and to evaluate."""
    rng = np.random.default_rng(0)
    table, mix, head = (rng.normal(0, 1, s).astype(np.float32) for s in ((12, 16), (16, 16), (16, 12)))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "mix.weight"], ["h"], "mix"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "head.weight"], ["logits"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "length", 12])],
        [numpy_helper.from_array(v, n) for v, n in ((table, "table"), (mix, "mix.weight"), (head, "head.weight"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "lm.onnx"
    onnx.save(model, path)
    for name, seed in (("calibration", 1), ("test", 2)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 12, (16, 9)))
    return path, tmp_path / "calibration.npy", tmp_path / "test.npy"


def test_perplexity_and_divergence_of_token_files(language, run, tmp_path):
    model, calibration, test = language
    arguments = ("quantize", model, "--data", calibration, "--weights", "int4", "--activations", "float")
    done = run(
        *arguments, "--recipe", "gptq", "--metric", "perplexity,kl", "--evaluation-data", test, "--out", tmp_path / "o"
    )
    assert done.status == 0, done.err
    report = RunReport.model_validate_json((tmp_path / "o" / "report.json").read_text())
    perplexity, kl = report.metrics
    assert (perplexity.metric, kl.metric, perplexity.count, kl.count) == ("perplexity", "kl", 16 * 8, 16 * 9)
    # The float network is the one that was given, not the one whose weights gptq has rounded.
    plain = QuantSim(str(model), weights="int4", activations="float")
    before = plain.fork()
    ids = {"ids": np.load(calibration)}
    plain.apply("gptq", ids).calibrate(ids)
    expected = plain.measure({"ids": np.load(test)}, "perplexity", "kl", reference=before)
    assert perplexity.float_model == pytest.approx(expected["perplexity"].float_model)
    assert kl.simulated == pytest.approx(expected["kl"].simulated)
    assert kl.simulated > 1e-3
    assert perplexity.simulated != perplexity.float_model
    assert f"{kl.simulated:.4f}" in done.out
    page = (tmp_path / "o" / "report.html").read_text()
    assert "perplexity" in page
    assert "calibration data; --evaluation-data" not in done.out + done.err


def test_what_cannot_be_measured(language, run, tmp_path):
    model, calibration, _ = language
    for metric, message in (("ppl", "no metric 'ppl'"), ("kl,top1", "needs labels")):
        done = run("quantize", model, "--data", calibration, "--metric", metric, "--out", tmp_path / "o")
        assert done.status == 2
        assert message in done.err
        assert not (tmp_path / "o").exists()


def test_auto_by_metric(language, run, tmp_path):
    model, calibration, test = language
    common = ("auto", model, "--data", calibration, "--evaluation-data", test)
    for metric, drop in (("perplexity", "0.05"), ("kl", "0.05")):
        done = run(*common, "--metric", metric, "--allowed-drop", drop, "--out", tmp_path / metric)
        assert done.status == 0, done.err + done.out
    done = run(*common, "--metric", "kl", "--allowed-drop", "0.000000001", "--out", tmp_path / "strict")
    assert done.status == 1
    done = run(*common, "--metric", "kl", "--labels", test, "--allowed-drop", "1", "--out", tmp_path / "x")
    assert "give either" in done.err
