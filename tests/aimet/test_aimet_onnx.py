"""AIMET's workflows on ONNX models run once their imports are changed, with the results of bitwright's own calls."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import onnxruntime  # noqa: E402

from bitwright.errors import InputError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_aimet.common.defs import QuantScheme  # noqa: E402
from bitwright_aimet.common.utils import CallbackFunc  # noqa: E402
from bitwright_aimet.onnx.adaround.adaround_weight import (  # noqa: E402
    Adaround,
    AdaroundParameters,
    apply_adaround,
)
from bitwright_aimet.onnx.batch_norm_fold import fold_all_batch_norms_to_weight  # noqa: E402
from bitwright_aimet.onnx.cross_layer_equalization import equalize_model  # noqa: E402
from bitwright_aimet.onnx.quant_analyzer import QuantAnalyzer  # noqa: E402
from bitwright_aimet.onnx.quantsim import (  # noqa: E402
    QuantizationSimModel,
    compute_encodings,
    load_encodings_to_sim,
)
from bitwright_aimet.onnx.sequential_mse import apply_seq_mse  # noqa: E402
from bitwright_aimet.onnx.utils import make_dummy_input  # noqa: E402


@pytest.fixture
def net():
    rng = np.random.default_rng(6)
    sizes = {"w1": (6, 3, 3, 3), "w2": (8, 6, 3, 3), "w3": (8, 4), "b2": (8,), "b3": (4,)}
    weights = {name: rng.normal(0, 0.3, shape) for name, shape in sizes.items()}
    weights |= {name: rng.uniform(0.5, 2, 6) for name in ("scale", "shift", "mean", "var")}
    nodes = [
        ("Conv", ["image", "w1"], "c1", {}),
        ("BatchNormalization", ["c1", "scale", "shift", "mean", "var"], "n1", {}),
        ("Relu", ["n1"], "r1", {}),
        ("Conv", ["r1", "w2", "b2"], "c2", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c2"], "r2", {}),
        ("GlobalAveragePool", ["r2"], "p", {}),
        ("Flatten", ["p"], "f", {}),
        ("Gemm", ["f", "w3", "b3"], "logits", {}),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ins, [out], name=f"{op}_{out}", **attrs) for op, ins, out, attrs in nodes],
        "net",
        [value("image", onnx.TensorProto.FLOAT, ("N", 3, 8, 8))],
        [value("logits", onnx.TensorProto.FLOAT, ("N", 4))],
        [onnx.numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def forward(session, batches):
    name = session.get_inputs()[0].name
    return [session.run(None, {name: batch})[0] for batch in batches]


def score(session, batches):
    return float(np.mean([y.argmax(1).mean() for y in forward(session, batches)]))


def float_outputs(model, batches):
    return forward(onnxruntime.InferenceSession(model.SerializeToString()), batches)


def own(net, scheme="minmax", **options):
    return QuantSim(net, target="default", scheme=scheme, weight_scheme=scheme, **options)


def test_fold_equalize_simulate_export(net, batches, tmp_path, assert_equal):
    before, expected = copy.deepcopy(net), float_outputs(net, batches)
    assert fold_all_batch_norms_to_weight(net) == [("Conv_c1", "BatchNormalization_n1")]
    assert "BatchNormalization" not in {node.op_type for node in net.graph.node}
    held = SimpleNamespace(model=copy.deepcopy(before))  # as AIMET's ONNXModel does
    equalize_model(held)
    for model in (net, held.model):
        for a, b in zip(float_outputs(model, batches), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    sim = QuantizationSimModel(held, quant_scheme=QuantScheme.post_training_tf, default_param_bw=8)
    sim.compute_encodings(forward, batches)
    wanted = own(before).apply("fold_batch_norm", standalone=False).apply("cross_layer_equalization")
    assert_equal(sim.bitwright, wanted.calibrate(batches))
    (own_outputs,) = sim.bitwright.predict(batches)
    np.testing.assert_array_equal(np.concatenate(forward(sim.session, batches)), own_outputs)
    bundle = sim.export(str(tmp_path), "net")
    other = QuantizationSimModel(held, quant_scheme="tf")
    load_encodings_to_sim(other, str(bundle.files["encodings"]), strict=True)
    np.testing.assert_allclose(np.concatenate(forward(other.session, batches)), own_outputs, atol=1e-5)


def test_types_and_calibration_of_the_second_generation(net, batches, assert_equal):
    sim = QuantizationSimModel(net, param_type="int4", activation_type="int16", config_file="default")
    sim.compute_encodings([{"image": batch} for batch in batches])
    wanted = QuantSim(net, weights="int4", activations="uint16", scheme="minmax").calibrate(batches)
    assert_equal(sim.bitwright, wanted)
    with pytest.raises(InputError, match="both integers or both floats"):
        QuantizationSimModel(net, param_type="int8", activation_type="float16")
    with pytest.raises(InputError, match="custom_ops"):
        QuantizationSimModel(net, user_onnx_libs=["lib.so"])


def test_calibration_in_a_context_then_a_quantized_model(net, batches, assert_equal):
    sim, given = QuantizationSimModel(net, param_type="int8", activation_type="int8"), [b.copy() for b in batches]
    with compute_encodings(sim):
        for batch, expected in zip(batches, float_outputs(net, batches), strict=True):
            np.testing.assert_allclose(sim.session.run(None, {"image": batch})[0], expected, atol=1e-5)
            batch[:] = 0  # a script may use one array for all batches
    assert_equal(sim.bitwright, own(net).calibrate(given))
    quantized = sim.to_onnx_qdq()
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in quantized.graph.node}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(quantized.SerializeToString(), options)
    wanted = sim.session.run(None, {"image": given[0]})[0]
    np.testing.assert_allclose(session.run(None, {"image": given[0]})[0], wanted, atol=1e-4)
    with pytest.raises(InputError, match="nothing was run"), compute_encodings(sim):
        pass
    assert sim.session.run(["logits"], make_dummy_input(net, 3))[0].shape == (3, 4)


def test_adaround_in_both_generations(net, batches, tmp_path, assert_equal):
    wanted = own(net, weights="int4").apply("adaround", batches[:2]).calibrate(batches)
    params = AdaroundParameters(batches, num_batches=2)
    rounded = Adaround.apply_adaround(net, params, str(tmp_path), "adaround", default_quant_scheme="tf")
    sim = QuantizationSimModel(rounded, quant_scheme="tf", default_param_bw=4)
    sim.set_and_freeze_param_encodings(str(tmp_path / "adaround.encodings"))
    sim.compute_encodings(forward, batches)
    for site in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(sim.bitwright.params[site], wanted.params[site])
        np.testing.assert_allclose(sim.bitwright.encodings[site].scale, wanted.encodings[site].scale, rtol=1e-6)
    second = QuantizationSimModel(net, param_type="int4", quant_scheme="tf")
    apply_adaround(second, batches[:2])
    second.compute_encodings(forward, batches)
    assert_equal(second.bitwright, wanted)


def test_seq_mse_and_analysis(net, batches, tmp_path, assert_equal):
    sim = QuantizationSimModel(net, param_type="int4", quant_scheme="tf")
    apply_seq_mse(sim, batches[:2], num_candidates=8, nodes_to_exclude=["Gemm_logits"])
    sim.compute_encodings(forward, batches)
    wanted = own(net, weights="int4").apply("seq_mse", batches[:2], candidates=8, exclude=("Gemm_logits",))
    assert_equal(sim.bitwright, wanted.calibrate(batches))
    pytest.importorskip("bokeh")
    analyzer = QuantAnalyzer(net, None, CallbackFunc(forward, batches), CallbackFunc(score, batches))
    analyzer.enable_per_layer_mse_loss(unlabeled_dataset_iterable=batches, num_batches=1)
    found = analyzer.analyze(
        "tf", default_param_bw=8, default_activation_bw=16, config_file=None, results_dir=str(tmp_path)
    )
    assert "uint16" in found.widths
