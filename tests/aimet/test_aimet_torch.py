"""AIMET's workflows on PyTorch modules run once imports are changed, with the results of bitwright's own calls."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bitwright.errors import EncodingError, InputError, ModelError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme  # noqa: E402
from bitwright_aimet.common.quantsim_config.utils import (  # noqa: E402
    get_path_for_per_channel_config,
    get_path_for_per_tensor_config,
)
from bitwright_aimet.common.utils import CallbackFunc  # noqa: E402
from bitwright_aimet.torch import onnx as aimet_onnx_export  # noqa: E402
from bitwright_aimet.torch.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from bitwright_aimet.torch.auto_quant import AutoQuant  # noqa: E402
from bitwright_aimet.torch.batch_norm_fold import fold_all_batch_norms, fold_all_batch_norms_to_scale  # noqa: E402
from bitwright_aimet.torch.bias_correction import QuantParams, correct_bias  # noqa: E402
from bitwright_aimet.torch.bn_reestimation import reestimate_bn_stats  # noqa: E402
from bitwright_aimet.torch.cross_layer_equalization import equalize_model  # noqa: E402
from bitwright_aimet.torch.mixed_precision import MixedPrecisionConfigurator, choose_mixed_precision  # noqa: E402
from bitwright_aimet.torch.model_preparer import NotNeeded, prepare_model  # noqa: E402
from bitwright_aimet.torch.model_validator.model_validator import ModelValidator  # noqa: E402
from bitwright_aimet.torch.quant_analyzer import QuantAnalyzer  # noqa: E402
from bitwright_aimet.torch.quantsim import (  # noqa: E402
    QuantizationSimModel,
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from bitwright_aimet.torch.seq_mse import SeqMseParams, apply_seq_mse  # noqa: E402
from bitwright_aimet.torch.utils import get_device, get_layer_name, in_eval_mode, is_leaf_module  # noqa: E402
from bitwright_aimet.torch.visualize_model import visualize_changes_after_optimization  # noqa: E402

nn = torch.nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return net.eval()


@pytest.fixture
def loader(batches):
    """Batches of (images, labels), as evaluation loops have them."""
    return [(torch.from_numpy(x), torch.arange(len(x)) % 4) for x in batches]


def forward(model, loader):
    model.eval()
    with torch.no_grad():
        for images, _ in loader:
            model(images)


def accuracy(model, loader):
    model.eval()
    with torch.no_grad():
        return float(np.mean([(model(x).argmax(1) == y).float().mean().item() for x, y in loader]))


def own(net, loader, scheme="minmax", **options):
    return QuantSim(net, loader[0][0], target="default", scheme=scheme, weight_scheme=scheme, **options)


def test_simulate_evaluate_export(net, loader, batches, tmp_path, assert_equal):
    sim = QuantizationSimModel(
        net, dummy_input=loader[0][0], quant_scheme=QuantScheme.post_training_tf_enhanced, default_output_bw=8,
        default_param_bw=8,
    )  # fmt: skip
    with pytest.raises(EncodingError, match="call compute_encodings first"):
        _ = sim.model
    sim.compute_encodings(forward_pass_callback=forward, forward_pass_callback_args=loader)
    wanted = own(net, loader, "sqnr").calibrate(batches)
    assert_equal(sim.bitwright, wanted)
    assert 0 <= accuracy(sim.model, loader) <= 1
    sim.export(str(tmp_path), "net", loader[0][0])
    held = json.loads((tmp_path / "net.encodings").read_text())
    assert held["version"] == "1.0.0"
    bundle = wanted.export(tmp_path / "own", name="net")
    for section in ("activation_encodings", "param_encodings"):
        assert held[section] == json.loads(bundle.files["encodings"].read_text())[section]


def test_no_configuration_means_a_scale_for_each_channel_as_in_the_second_generation(
    net, loader, batches, assert_equal
):
    sims = [
        QuantizationSimModel(net, loader[0][0], config_file=config)
        for config in (None, "default", get_path_for_per_channel_config())
    ]
    for sim in sims:
        sim.compute_encodings(forward, loader)
        assert_equal(sim.bitwright, sims[0].bitwright)
    assert sims[0].bitwright.encodings["conv1.weight"].scale.shape == (6,)
    assert sims[0].bitwright.encodings["fc.weight"].scale.shape == (4,)
    first = QuantizationSimModel(net, loader[0][0], config_file=get_path_for_per_tensor_config())
    first.compute_encodings(forward, loader)
    assert first.bitwright.encodings["conv1.weight"].scale.shape == ()


def test_the_second_generations_export(net, loader, tmp_path):
    sim = QuantizationSimModel(net, loader[0][0])
    sim.compute_encodings(lambda model: forward(model, loader))
    bundle = sim.onnx.export(loader[0][0], str(tmp_path / "folder" / "q.onnx"), encoding_version="2.0.0")
    assert bundle.files["model"] == tmp_path / "folder" / "q.onnx"
    held = json.loads((tmp_path / "folder" / "q.encodings").read_text())
    assert held["version"] == "2.0.0"
    assert "conv2.bias" in {entry["name"] for entry in held["encodings"]}
    sim.onnx.export(loader[0][0], tmp_path / "q.onnx", encoding_version="2.0.0", export_int32_bias=False)
    held = json.loads((tmp_path / "q.encodings").read_text())
    assert "conv2.bias" not in {entry["name"] for entry in held["encodings"]}
    with pytest.raises(InputError, match=r"path of an \.onnx file"):
        sim.onnx.export(loader[0][0], str(tmp_path / "q"))
    with pytest.raises(InputError, match="force_activation_as"):
        sim.onnx.export(loader[0][0], str(tmp_path / "q.onnx"), force_activation_as="signed")


def test_a_configuration_file_and_widths_are_read_as_they_are(net, loader, batches, tmp_path, assert_equal):
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True", "is_symmetric": "True"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "per_channel_quantization": "True",
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {},
        "supergroups": [{"op_list": ["Conv", "Relu"]}],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    sim = QuantizationSimModel(net, loader[0][0], "tf", "nearest", 16, 4, config_file=str(path))
    sim.compute_encodings(forward, loader)
    wanted = QuantSim(net, loader[0][0], target=path, weights="int4", activations="int16", scheme="minmax")
    assert_equal(sim.bitwright, wanted.calibrate(batches))
    half = QuantizationSimModel(net, loader[0][0], default_param_bw=16, default_output_bw=16,
                                default_data_type=QuantizationDataType.float)  # fmt: skip
    half.compute_encodings(forward, loader)
    assert {half.bitwright.plan.spec(s).float_format for s in half.bitwright.plan.parameters} == {"float16"}


def test_fold_and_equalize_change_the_module_itself(net, loader, batches, assert_equal):
    before, x = copy.deepcopy(net), loader[0][0]
    first = fold_all_batch_norms(net, input_shapes=(2, 3, 8, 8))
    assert [(type(a).__name__, type(b).__name__) for a, b in first] == [("Conv2d", "BatchNorm2d")] * 2
    assert isinstance(net.bn1, nn.Identity)
    assert net.conv1.bias is not None
    torch.testing.assert_close(net(x), before(x), rtol=1e-4, atol=1e-5)
    wanted = own(before, loader).apply("fold_batch_norm", standalone=False)
    np.testing.assert_array_equal(net.conv1.weight.detach(), wanted.native.conv1.weight.detach())
    other = copy.deepcopy(before)
    equalize_model(other, dummy_input=x)
    torch.testing.assert_close(other(x), before(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(other.conv1.weight, net.conv1.weight)
    sim = QuantizationSimModel(other, x, quant_scheme="tf")
    sim.compute_encodings(forward, loader)
    wanted.apply("cross_layer_equalization")
    again = own(wanted.native, loader).calibrate(batches)
    assert set(again.encodings) == set(sim.bitwright.encodings)
    for site, encoding in again.encodings.items():
        np.testing.assert_array_equal(sim.bitwright.encodings[site].scale, encoding.scale)


def test_a_module_that_can_not_be_changed_in_place_stays_as_it_is(net, loader):
    class Functional(nn.Module):
        """Reads its convolution's weight twice: as a layer, and for itself."""

        def __init__(self):
            super().__init__()
            self.net = net
            self.register_buffer("twin", net.conv1.weight.detach().clone())
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.net(x) * self.scale

    class Trap(Functional):
        def forward(self, x):
            y = super().forward(x)
            return y + (0 if isinstance(self.net.bn1, nn.BatchNorm2d) else 1)

    model = Functional()
    fold_all_batch_norms(model, dummy_input=loader[0][0])
    assert isinstance(model.net.bn1, nn.Identity)
    torch.manual_seed(1)
    trap = Trap()
    trap.net = Net().eval()
    state = {k: v.clone() for k, v in trap.state_dict().items()}
    with pytest.raises(ModelError, match="doesn't compute what its changed copy does"):
        fold_all_batch_norms(trap, dummy_input=loader[0][0])
    assert list(trap.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in trap.state_dict().items())


def test_adaround_then_simulation_with_its_frozen_encodings(net, loader, batches, tmp_path, assert_equal):
    params = AdaroundParameters(data_loader=loader, num_batches=2)
    rounded = Adaround.apply_adaround(
        net, loader[0][0], params, path=str(tmp_path), filename_prefix="adaround", default_param_bw=4,
        default_quant_scheme=QuantScheme.post_training_tf_enhanced,
    )  # fmt: skip
    assert isinstance(rounded, Net)
    assert not torch.equal(rounded.fc.weight, net.fc.weight)
    sim = QuantizationSimModel(rounded, loader[0][0], "tf_enhanced", default_param_bw=4)
    sim.set_and_freeze_param_encodings(encoding_path=str(tmp_path / "adaround.encodings"))
    sim.compute_encodings(forward, loader)
    wanted = own(net, loader, "sqnr", weights="int4").apply("adaround", batches[:2]).calibrate(batches)
    weights = [s for s in wanted.plan.parameters if wanted.encodings[s].frozen]
    assert len(weights) == 3
    for site in weights:
        assert sim.bitwright.encodings[site].frozen
        np.testing.assert_allclose(sim.bitwright.encodings[site].scale, wanted.encodings[site].scale, rtol=1e-6)
        np.testing.assert_array_equal(sim.bitwright.params[site], wanted.params[site])
    (found,), (other,) = sim.bitwright.predict(batches), wanted.predict(batches)
    np.testing.assert_allclose(found, other, atol=np.abs(other).max() / 100)
    gradient = AdaroundParameters(loader, 2, default_num_iterations=5, forward_fn=lambda m, batch: m(batch[0]))
    assert gradient.settings["solver"] == "gradient"
    Adaround.apply_adaround(net, loader[0][0], gradient, str(tmp_path), "g", ignore_quant_ops_list=[net.fc])
    assert "fc.weight" not in (tmp_path / "g.encodings").read_text()


def test_seq_mse_in_both_generations(net, loader, batches, assert_equal):
    wanted = own(net, loader, weights="int4").apply("seq_mse", batches[:2], candidates=8).calibrate(batches)
    for call in (
        lambda sim: apply_seq_mse(sim, loader[:2], 8),
        lambda sim: apply_seq_mse(net, sim, loader, SeqMseParams(num_batches=2, num_candidates=8)),
    ):
        sim = QuantizationSimModel(net, loader[0][0], "tf", default_param_bw=4)
        call(sim)
        sim.compute_encodings(forward, loader)
        assert_equal(sim.bitwright, wanted)


def test_bias_correction_changes_the_biases(net, loader, batches):
    fold_all_batch_norms(net, dummy_input=loader[0][0])
    before = copy.deepcopy(net)
    correct_bias(net, QuantParams(weight_bw=4, quant_scheme="tf"), 10, loader, 10)
    wanted = own(before, loader, weights="int4").apply("bias_correction", batches, mode="empirical")
    for name in ("conv1", "conv2", "fc"):
        found = getattr(net, name)
        np.testing.assert_array_equal(found.bias.detach(), wanted.params[f"{name}.bias"])
        assert not torch.equal(found.bias, getattr(before, name).bias)
        assert torch.equal(found.weight, getattr(before, name).weight)


def test_quantization_aware_training_with_re_estimated_norms(net, loader, batches, tmp_path):
    scheme = QuantScheme.training_range_learning_with_tf_init
    sim = QuantizationSimModel(net, loader[0][0], scheme, default_param_bw=4, config_file="default")
    sim.compute_encodings(forward, loader)
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.05)
    sim.model.train()
    losses = []
    for _ in range(4):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(sim.model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = sim.model.eval()(loader[0][0]).detach()
    mean = sim.model.bn1.running_mean.clone()
    handle = reestimate_bn_stats(sim.model, loader, num_batches=2)
    assert not torch.equal(sim.model.bn1.running_mean, mean)
    handle.remove()
    assert torch.equal(sim.model.bn1.running_mean, mean)
    torch.testing.assert_close(sim.model.eval()(loader[0][0]).detach(), trained)
    fold_all_batch_norms_to_scale(sim)
    assert not any("bn" in name for name, _ in sim.model.named_parameters())
    bundle = sim.export(str(tmp_path), "qat", loader[0][0])
    assert bundle.files["encodings"].is_file()
    with pytest.raises(InputError, match=r"give sim\.model"):
        reestimate_bn_stats(net, loader)


def test_what_was_trained_is_exported(net, loader, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    sim = QuantizationSimModel(net, loader[0][0], "tf")
    sim.compute_encodings(forward, loader)
    with torch.no_grad():
        sim.model.fc.bias += 3
    bundle = sim.export(str(tmp_path), "net")
    session = onnxruntime.InferenceSession(bundle.files["onnx"] if "onnx" in bundle.files else bundle.files["model"])
    (found,) = session.run(None, {session.get_inputs()[0].name: loader[0][0].numpy()})
    np.testing.assert_allclose(found, net(loader[0][0]).detach().numpy() + 3, rtol=1e-3, atol=1e-3)


def test_encodings_are_saved_and_loaded(net, loader, batches, tmp_path, assert_equal):
    sim = QuantizationSimModel(net, loader[0][0], "tf")
    sim.compute_encodings(forward, loader)
    path = sim.save_encodings_to_json(str(tmp_path), "net")
    assert path == tmp_path / "net.json"
    other = QuantizationSimModel(net, loader[0][0], "tf")
    other.load_encodings(path, allow_overwrite=False)
    wanted = own(net, loader).calibrate(batches).load_encodings(path)
    assert_equal(other.bitwright, wanted)
    held = {s: e.scale.tolist() for s, e in other.bitwright.encodings.items()}
    other.compute_encodings(lambda model, scale: [model(x * scale) for x, _ in loader], 10.0)
    assert {s: e.scale.tolist() for s, e in other.bitwright.encodings.items()} == held
    sim.exclude_layers_from_quantization([net.fc])
    assert sim.bitwright.plan.spec("fc.weight") is None
    sim.compute_encodings(forward, loader)
    sim.model(loader[0][0])


def test_percentile(net, loader, batches, assert_equal):
    sim = QuantizationSimModel(net, loader[0][0], QuantScheme.post_training_percentile)
    sim.set_percentile_value(99.0)
    sim.compute_encodings(lambda model: forward(model, loader))
    wanted = QuantSim(net, loader[0][0], target="default", scheme="percentile:99.0").calibrate(batches)
    assert_equal(sim.bitwright, wanted)
    with pytest.raises(InputError, match="between 50 and 100"):
        sim.set_percentile_value(10)


def test_auto_quant(net, loader, tmp_path):
    auto = AutoQuant(net, loader[0][0], loader, lambda model, samples: accuracy(model, loader),
                     results_dir=str(tmp_path), config_file="default")  # fmt: skip
    sim, score = auto.run_inference()
    assert score == accuracy(sim.model, loader)
    model, best, encodings = auto.optimize(allowed_accuracy_drop=0.5)
    assert best == accuracy(model, loader)
    assert json.loads(open(encodings).read())["version"] == "0.6.1"  # noqa: PTH123, SIM115
    assert auto.result.met
    outputs = [net(x).detach() for x, _ in loader]

    def closeness(model):
        return -float(np.mean([(model(x) - y).pow(2).mean().item() for (x, _), y in zip(loader, outputs, strict=True)]))

    auto = AutoQuant(net, loader[0][0], loader, closeness, 4, results_dir=str(tmp_path / "other"))
    auto.set_adaround_params(AdaroundParameters(loader, 2))
    _, best, _ = auto.optimize()
    assert not auto.result.met
    assert best < 0
    assert [t.name for t in auto.result.trials if t.kind == "technique"] == ["cross_layer_equalization", "adaround"]


def test_quant_analyzer(net, loader, tmp_path):
    pytest.importorskip("bokeh")
    analyzer = QuantAnalyzer(net, loader[0][0], CallbackFunc(forward, loader), CallbackFunc(accuracy, loader))
    analyzer.enable_per_layer_mse_loss(loader, num_batches=2)
    found = analyzer.analyze(QuantScheme.post_training_tf, 8, 8, None, str(tmp_path))
    assert (tmp_path / "analysis.html").is_file()
    assert found.target == "default"
    assert {layer.op for layer in found.layers} >= {"conv1", "conv2", "fc"}


def test_mixed_precision(net, loader, tmp_path):
    int8, int4, int16 = ((n, QuantizationDataType.int) for n in (8, 4, 16))
    fold_all_batch_norms(net, dummy_input=loader[0][0])
    sim = QuantizationSimModel(net, loader[0][0], "tf", config_file="default")
    sim.compute_encodings(forward, loader)
    front = choose_mixed_precision(
        sim, loader[0][0], [(int16, int8), (int8, int8), (int8, int4)], CallbackFunc(accuracy, loader),
        CallbackFunc(accuracy, loader), 0.9, str(tmp_path), True, CallbackFunc(forward, loader),
    )  # fmt: skip
    assert front
    assert all(0 < cost <= 1 for cost, _, _ in front)
    assert {sim.bitwright.plan.spec(s).bits for s in ("conv1.weight", "conv2.weight", "fc.weight")} <= {4, 8}
    assert accuracy(sim.model, loader) >= accuracy(net, loader) - 0.9


def test_types_of_single_layers_then_a_quantized_onnx_file(net, loader, batches, tmp_path, assert_equal):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    fold_all_batch_norms(net, None, dummy_input=loader[0][0])
    sim = QuantizationSimModel(net, loader[0][0], default_param_bw=4)
    config = MixedPrecisionConfigurator(sim)
    config.set_precision(nn.Conv2d, activation="int16", param={"weight": "int8"})
    config.set_precision(net.conv2, activation="int8", param={"weight": "int8"})
    config.set_model_output_precision("int16")
    config.apply(log_file=str(tmp_path / "logs" / "mmp.txt"), strict=True)
    assert (tmp_path / "logs" / "mmp.txt").read_text()
    sim.compute_encodings(lambda model: forward(model, loader))
    wanted = own(net, loader, weights="int4")
    for what, types in (
        (["conv1", "conv2"], {"weights": "int8", "inputs": "uint16"}),
        (["conv2"], {"weights": "int8", "inputs": "uint8"}),
        (list(wanted.graph.outputs), {"activations": "uint16"}),
    ):
        wanted.set_precision(what, **types)
    assert_equal(sim.bitwright, wanted.calibrate(batches))
    bits = {site: e.bits for site, e in sim.bitwright.encodings.items()}
    assert (bits["conv1.weight"], bits["fc.weight"], bits[wanted.graph.inputs[0]]) == (8, 4, 16)
    path = aimet_onnx_export.export(sim.model, loader[0][0], f=str(tmp_path / "q" / "net.onnx"), opset_version=21)
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.onnx"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path.read_bytes(), options)
    found = session.run(None, {session.get_inputs()[0].name: batches[0]})[0]
    with torch.no_grad(), in_eval_mode(sim.model):
        expected = sim.model(loader[0][0]).numpy()
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()  # sums in another order move a code
    types = onnx.TensorProto
    held = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert {types.INT4, types.INT8, types.UINT16, types.UINT8, types.INT32} <= held
    with pytest.raises(InputError, match="no module of the model"):
        config.set_precision(nn.LSTM, activation="int8")
    with pytest.raises(InputError, match="biases follow"):
        config.set_precision(nn.Conv2d, activation="int8", param={"bias": "int8"})
    with pytest.raises(InputError, match="one type for all inputs"):
        config.set_precision(nn.Conv2d, activation=["int8", "int16"])


def test_weights_in_blocks(net, loader, batches, assert_equal):
    sim = QuantizationSimModel(net, loader[0][0])
    set_blockwise_quantization_for_weights(sim, [nn.Linear], bitwidth=4, symmetric=True, block_size=4)
    set_grouped_blockwise_quantization_for_weights(
        sim, lambda module: module is net.conv2, bitwidth=4, symmetric=True, decompressed_bw=8, block_size=2
    )
    sim.compute_encodings(lambda model: forward(model, loader))
    wanted = own(net, loader, overrides={"fc.weight": "int4:block4", "conv2.weight": "int4:lpbq2"})
    assert_equal(sim.bitwright, wanted.calibrate(batches))
    for arguments, said in (
        ({"symmetric": False, "block_size": 4}, "w4a16_asymmetric"),
        ({"symmetric": True, "block_size": (1, 4)}, "along a weight's inputs"),
    ):
        with pytest.raises(InputError, match=said):
            set_blockwise_quantization_for_weights(sim, [nn.Linear], bitwidth=4, **arguments)


def test_helpers_of_scripts(net):
    net.train()
    net.bn1.eval()
    with in_eval_mode(net):
        assert not net.training and not net.fc.training
    assert net.training and not net.bn1.training
    assert get_layer_name(net, net.conv2) == "conv2" and get_device(net).type == "cpu"
    assert is_leaf_module(net.fc) and not is_leaf_module(net)


def test_validate_prepare_visualize(net, loader, tmp_path):
    assert ModelValidator.validate_model(net, model_input=loader[0][0])

    class Dependent(nn.Module):
        def forward(self, x):
            return x + 1 if x.detach().sum() > 0 else x

    assert not ModelValidator.validate_model(Dependent(), loader[0][0])
    with pytest.warns(NotNeeded, match="nothing to do"):
        assert prepare_model(net) is net
    pytest.importorskip("bokeh")
    other = copy.deepcopy(net)
    equalize_model(other, dummy_input=loader[0][0])
    with pytest.raises(InputError, match="dummy_input"):
        visualize_changes_after_optimization(net, other, str(tmp_path))
    found = visualize_changes_after_optimization(net, other, str(tmp_path), dummy_input=loader[0][0])
    assert (tmp_path / "visualize_changes_after_optimization.html").is_file()
    assert any(change.name == "conv2.weight" for change in found.changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rounding_mode": "stochastic"}, "half to even"),
        ({"quant_scheme": "nonsense"}, "there are min_max"),
        ({"in_place": True}, r"train sim\.model"),
        ({"default_param_bw": 12, "default_data_type": QuantizationDataType.float}, "float16"),
    ],
)
def test_what_can_not_be_meant_is_refused(net, loader, arguments, said):
    with pytest.raises(InputError, match=said):
        QuantizationSimModel(net, loader[0][0], **arguments)
    with pytest.raises(InputError, match="regularization"):
        AdaroundParameters(loader, 1, default_reg_param=0.5)
    with pytest.raises(InputError, match="overrides"):
        correct_bias(net, QuantParams(), 4, loader, 4, layers_to_ignore=[net.fc])
    with pytest.raises(InputError, match="overrides"):
        QuantAnalyzer(net, None, forward, accuracy, modules_to_ignore=[net.fc])
