"""AIMET's workflows on Keras models (`aimet_tensorflow.keras` of 1.31) run once their imports are changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from bitwright.errors import InputError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme  # noqa: E402
from bitwright_aimet.common.utils import CallbackFunc  # noqa: E402
from bitwright_aimet.tensorflow.keras.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from bitwright_aimet.tensorflow.keras.auto_quant_v2 import AutoQuantWithAutoMixedPrecision  # noqa: E402
from bitwright_aimet.tensorflow.keras.batch_norm_fold import (  # noqa: E402
    fold_all_batch_norms,
    fold_all_batch_norms_to_scale,
)
from bitwright_aimet.tensorflow.keras.bn_reestimation import reestimate_bn_stats  # noqa: E402
from bitwright_aimet.tensorflow.keras.cross_layer_equalization import equalize_model  # noqa: E402
from bitwright_aimet.tensorflow.keras.mixed_precision import choose_mixed_precision  # noqa: E402
from bitwright_aimet.tensorflow.keras.model_preparer import NotNeeded, prepare_model  # noqa: E402
from bitwright_aimet.tensorflow.keras.quant_analyzer import QuantAnalyzer  # noqa: E402
from bitwright_aimet.tensorflow.keras.quantsim import QuantizationSimModel  # noqa: E402

L = keras.layers


@pytest.fixture
def net():
    keras.utils.set_random_seed(2)
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(6, 3, use_bias=False, name="conv1")(x)
    x = L.ReLU(name="relu1")(L.BatchNormalization(name="bn1")(x))
    x = L.Conv2D(8, 3, padding="same", name="conv2")(x)
    x = L.GlobalAveragePooling2D(name="pool")(L.ReLU(name="relu2")(L.BatchNormalization(name="bn2")(x)))
    model = keras.Model(inputs, L.Dense(4, name="fc")(x), name="net")
    rng = np.random.default_rng(0)
    for name in ("bn1", "bn2"):
        norm = model.get_layer(name)
        n = norm.gamma.shape[0]
        scale, shift, mean, var = rng.uniform(0.5, 2, n), rng.normal(0, 0.3, n), rng.normal(0, 0.3, n), np.ones(n)
        norm.set_weights([scale, shift, mean, var])
    return model


@pytest.fixture
def images(batches):
    return [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in batches]


def forward(model, images):
    for batch in images:
        model.predict(batch, verbose=0)


def score(model, images):
    return float(np.mean([np.asarray(model(x)).argmax(1).mean() for x in images]))


def own(net, scheme="sqnr", **options):
    return QuantSim(net, target="per_tensor", scheme=scheme, weight_scheme=scheme, **options)


def test_prepare_equalize_round_simulate_export(net, images, tmp_path, assert_equal):
    with pytest.warns(NotNeeded):
        model = prepare_model(net)
    model = equalize_model(model)
    np.testing.assert_allclose(model(images[0]), net(images[0]), rtol=1e-3, atol=1e-4)
    params = AdaroundParameters(data_set=images, num_batches=2)
    rounded = Adaround.apply_adaround(model, params, path=str(tmp_path), filename_prefix="adaround",
                                      default_param_bw=4)  # fmt: skip
    sim = QuantizationSimModel(rounded, quant_scheme=QuantScheme.post_training_tf_enhanced, default_param_bw=4)
    sim.set_and_freeze_param_encodings(encoding_path=str(tmp_path / "adaround.encodings"))
    sim.compute_encodings(forward, forward_pass_callback_args=images)
    bundle = sim.export(str(tmp_path / "out"), "net")
    assert json.loads((tmp_path / "out" / "net.encodings").read_text())["version"] == "0.6.1"
    assert bundle.files["model"].suffix == ".keras"

    wanted = own(net, weights="int4").apply("fold_batch_norm", standalone=False).apply("cross_layer_equalization")
    wanted.apply("adaround", images[:2]).calibrate(images)
    for site in (s for s in wanted.plan.parameters if wanted.encodings[s].frozen):
        np.testing.assert_array_equal(sim.bitwright.params[site], wanted.params[site])
        np.testing.assert_allclose(sim.bitwright.encodings[site].scale, wanted.encodings[site].scale, rtol=1e-6)


def test_fold_and_simulate(net, images, assert_equal):
    folded, model = fold_all_batch_norms(net)
    assert folded == [("conv1", "bn1"), ("conv2", "bn2")]
    assert not any(isinstance(layer, L.BatchNormalization) for layer in model.layers)
    np.testing.assert_allclose(model(images[0]), net(images[0]), rtol=1e-3, atol=1e-4)
    sim = QuantizationSimModel(model, "tf", default_output_bw=16)
    sim.compute_encodings(forward, images)
    assert_equal(sim.bitwright, own(model, "minmax", activations="uint16").calibrate(images))


def test_training_by_fit_with_re_estimated_norms(net, images, tmp_path):
    sim = QuantizationSimModel(net, "tf", default_param_bw=4, config_file="default")
    sim.compute_encodings(forward, images)
    whole = np.concatenate(images)
    sim.model.compile(optimizer=keras.optimizers.SGD(0.05), loss=keras.losses.SparseCategoricalCrossentropy(True))
    history = sim.model.fit(whole, np.arange(len(whole)) % 4, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]
    trained = np.asarray(sim.model(images[0], training=False))
    handle = reestimate_bn_stats(sim.model, images, 2)
    assert np.abs(np.asarray(sim.model(images[0], training=False)) - trained).max() > 1e-3
    handle.remove()
    np.testing.assert_allclose(np.asarray(sim.model(images[0], training=False)), trained, atol=1e-5)
    fold_all_batch_norms_to_scale(sim)
    bundle = sim.export(str(tmp_path), "qat")
    assert bundle.files["model"].is_file()
    float_model = keras.models.load_model(bundle.files["model"])
    assert np.abs(float_model(images[0]) - net(images[0])).max() > 1e-2


def test_analysis_auto_quant_and_mixed_precision(net, images, tmp_path):
    pytest.importorskip("bokeh")
    run, evaluate = CallbackFunc(forward, images), CallbackFunc(score, images)
    analyzer = QuantAnalyzer(net, run, evaluate)
    analyzer.enable_per_layer_mse_loss(unlabeled_dataset=[images], num_batches=1)
    # As AIMET 1.31 has them, by place: the rounding comes before the widths, parameters' first.
    found = analyzer.analyze("tf", "nearest", 4, 8, None, str(tmp_path / "analysis"))
    assert "int4" in found.widths
    with pytest.raises(InputError, match="rounding_mode"):
        analyzer.analyze("tf", "stochastic", 4, 8, None, str(tmp_path / "analysis"))
    auto = AutoQuantWithAutoMixedPrecision(
        net, lambda model, samples: score(model, images), images, results_dir=str(tmp_path / "auto")
    )
    model, best, _, front = auto.optimize(0.9)
    assert front is None
    with pytest.raises(InputError, match=r"bitwright\.mixed_precision"):
        auto.set_mixed_precision_params(candidates=[])
    assert best == score(model, images)
    kind = QuantizationDataType.int
    sim = QuantizationSimModel(fold_all_batch_norms(net)[1], "tf", config_file="default")
    sim.compute_encodings(run)
    front = choose_mixed_precision(sim, [((8, kind), (8, kind)), ((8, kind), (4, kind))], evaluate, evaluate, 0.9,
                                   str(tmp_path / "mixed"), False, run)  # fmt: skip
    assert front
    assert {sim.bitwright.plan.spec(s).bits for s in ("conv1/kernel", "conv2/kernel")} <= {4, 8}
