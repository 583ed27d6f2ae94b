"""AIMET's workflows on TensorFlow sessions (`aimet_tensorflow` of 1.31) run once their imports are changed."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright.errors import InputError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_aimet.common.quantsim_config.utils import get_path_for_per_channel_config  # noqa: E402
from bitwright_aimet.common.utils import CallbackFunc  # noqa: E402
from bitwright_aimet.tensorflow.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from bitwright_aimet.tensorflow.auto_quant import AutoQuant  # noqa: E402
from bitwright_aimet.tensorflow.batch_norm_fold import (  # noqa: E402
    fold_all_batch_norms,
    fold_all_batch_norms_to_scale,
)
from bitwright_aimet.tensorflow.bias_correction import (  # noqa: E402
    BiasCorrection,
    BiasCorrectionParams,
    QuantParams,
)
from bitwright_aimet.tensorflow.bn_reestimation import reestimate_bn_stats  # noqa: E402
from bitwright_aimet.tensorflow.cross_layer_equalization import equalize_model  # noqa: E402
from bitwright_aimet.tensorflow.quant_analyzer import QuantAnalyzer  # noqa: E402
from bitwright_aimet.tensorflow.quantsim import QuantizationSimModel  # noqa: E402
from bitwright_tensorflow import SessionModel, dataset_batches  # noqa: E402

v1 = tf.compat.v1
ENDS = (["image"], ["logits"])


@pytest.fixture
def session():
    rng = np.random.default_rng(4)

    def variable(name, *shape, low=-0.5):
        return v1.get_variable(name, initializer=rng.uniform(low, 1, shape).astype(np.float32), use_resource=True)

    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 8, 8, 3), name="image")
        x = tf.nn.conv2d(x, variable("k1", 3, 3, 3, 6), 1, "VALID", name="conv1")
        norms = [variable(n, 6, low=0.3) for n in ("gamma", "beta", "mean", "var")]
        x = tf.nn.relu(v1.nn.fused_batch_norm(x, *norms, is_training=False, name="bn1")[0], name="relu1")
        x = tf.nn.bias_add(tf.nn.conv2d(x, variable("k2", 3, 3, 6, 8), 1, "SAME", name="conv2"), variable("b2", 8))
        x = tf.reduce_mean(tf.nn.relu(x, name="relu2"), [1, 2], name="pool")
        tf.add(tf.matmul(x, variable("k3", 8, 4), name="fc"), variable("b3", 4), name="logits")
        made = v1.Session(graph=graph)
        made.run(v1.global_variables_initializer())
    yield made
    made.close()


@pytest.fixture
def images(batches):
    return [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in batches]


def forward(session, images):
    x = session.graph.get_tensor_by_name("image:0")
    y = session.graph.get_tensor_by_name("logits:0")
    return [session.run(y, feed_dict={x: batch}) for batch in images]


def score(session, images):
    return float(np.mean([y.argmax(1).mean() for y in forward(session, images)]))


def own(session, **options):
    model = SessionModel(session, inputs=ENDS[0], outputs=ENDS[1])
    return QuantSim(model, target="per_tensor", scheme="minmax", weight_scheme="minmax", **options)


def test_fold_equalize_simulate_evaluate_export(session, images, tmp_path, assert_equal):
    expected = forward(session, images)
    folded, pairs = fold_all_batch_norms(session, *ENDS)
    assert pairs == [("conv1", "bn1")]
    equalized = equalize_model(session, *ENDS)
    for made in (folded, equalized):
        for a, b in zip(forward(made, images), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    sim = QuantizationSimModel(equalized, *ENDS, "tf", default_param_bw=8)
    sim.compute_encodings(forward, images)
    wanted = own(session).apply("fold_batch_norm", standalone=False).apply("cross_layer_equalization")
    assert_equal(sim.bitwright, wanted.calibrate(images))
    quantized = np.concatenate(forward(sim.session, images))
    assert 0 < np.abs(quantized - np.concatenate(expected)).max() < 0.2 * np.abs(quantized).max()
    bundle = sim.export(str(tmp_path), "net")
    assert {"meta", "encodings"} <= set(bundle.files)


def test_adaround_and_bias_correction(session, images, tmp_path):
    params = AdaroundParameters(images, num_batches=2)
    rounded = Adaround.apply_adaround(session, *ENDS, params, str(tmp_path), "adaround", default_param_bw=4,
                                      default_quant_scheme="tf")  # fmt: skip
    sim = QuantizationSimModel(rounded, *ENDS, "tf", default_param_bw=4)
    sim.set_and_freeze_param_encodings(str(tmp_path / "adaround.encodings"))
    sim.compute_encodings(forward, images)
    wanted = own(session, weights="int4").apply("adaround", images[:2]).calibrate(images)
    for site in ("k1", "k2", "k3"):
        np.testing.assert_array_equal(sim.bitwright.params[site], wanted.params[site])
        np.testing.assert_allclose(sim.bitwright.encodings[site].scale, wanted.encodings[site].scale, rtol=1e-6)
    params = BiasCorrectionParams(4, 10, 10, *ENDS)
    corrected = BiasCorrection.correct_bias(session, params, QuantParams(quant_mode="tf", use_cuda=False), images)
    wanted = own(session).apply("bias_correction", images, mode="empirical")
    found = own(corrected)
    np.testing.assert_array_equal(found.params["b2"], wanted.params["b2"])
    assert np.abs(found.params["b2"] - own(session).params["b2"]).max() > 1e-6


def test_norms_measured_anew_then_folded_into_the_scales(session, images, tmp_path, assert_equal):
    config = str(get_path_for_per_channel_config())
    sim = QuantizationSimModel(session, *ENDS, "tf", default_param_bw=4, config_file=config)
    sim.compute_encodings(forward, images)
    before = sim.bitwright.fork()
    handle = reestimate_bn_stats(sim, *ENDS, images, num_batches=2)
    wanted = before.fork().apply("batch_norm_reestimation", images[:2])
    assert np.abs(wanted.params["mean"] - before.params["mean"]).max() > 1e-3
    sim.compute_encodings(forward, images)  # ranges of untrained networks follow the statistics
    assert_equal(sim.bitwright, wanted.calibrate(images))
    fold_all_batch_norms_to_scale(sim, *ENDS)
    assert "bn1" not in sim.bitwright.graph
    sim.compute_encodings(forward, images)
    bundle = sim.export(str(tmp_path), "net")
    assert {"meta", "encodings"} <= set(bundle.files)
    handle.remove()
    assert_equal(sim.bitwright, before)


def test_datasets_of_graph_mode(session, images, tmp_path):
    """Scripts of sessions disable eager execution, and then nobody can iterate over a dataset in Python."""
    whole = np.concatenate(images)
    with tf.Graph().as_default():
        dataset = tf.data.Dataset.from_tensor_slices(whole).batch(4)
        with pytest.raises(RuntimeError, match="eager"):
            next(iter(dataset))
    made = dataset_batches(dataset)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(made)), whole)
    assert dataset_batches(images) is images
    rounded = [
        Adaround.apply_adaround(session, *ENDS, AdaroundParameters(data, 2), str(tmp_path), "adaround")
        for data in (dataset, images)
    ]
    first, second = (own(made, weights="int4").params for made in rounded)
    assert all(np.array_equal(first[p], second[p]) for p in ("k1", "k2", "k3"))
    params = BiasCorrectionParams(4, 10, 10, *ENDS)
    corrected = [BiasCorrection.correct_bias(session, params, QuantParams("tf"), data) for data in (dataset, images)]
    first, second = (own(made).params["b2"] for made in corrected)
    np.testing.assert_array_equal(first, second)
    with pytest.raises(InputError, match="ops_to_ignore"):
        QuantParams(ops_to_ignore=["conv1"])


def test_analysis_and_auto_quant(session, images, tmp_path):
    pytest.importorskip("bokeh")
    run, evaluate = CallbackFunc(forward, images), CallbackFunc(score, images)
    found = QuantAnalyzer(session, *ENDS, run, evaluate, use_cuda=False).analyze(
        "tf", "nearest", 4, 8, None, [images], 1, str(tmp_path / "analysis")
    )
    assert "int4" in found.widths
    auto = AutoQuant(session, *ENDS, images, lambda session, samples: score(session, images),
                     results_dir=str(tmp_path / "auto"))  # fmt: skip
    model, best, _ = auto.optimize(0.9)
    assert best == score(model.session, images)
