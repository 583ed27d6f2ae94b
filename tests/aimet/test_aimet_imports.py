"""AIMET's names import no framework: only a model of one does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright_aimet._elsewhere import _MODULES, _NAMES, NotHere

PROGRAM = """
import importlib, pkgutil, sys
import bitwright_aimet
names = [m.name for m in pkgutil.walk_packages(bitwright_aimet.__path__, "bitwright_aimet.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 30, names
print(sorted({"torch", "tensorflow", "keras", "onnx", "onnx_ir", "onnxruntime", "jax"} & sys.modules.keys()))
"""


def test_no_framework_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


IMPORTS = """
from aimet_common.defs import QuantScheme, CallbackFunc
from aimet_common.quantsim_config.utils import get_path_for_per_channel_config, get_path_for_per_tensor_config
from aimet_common.defs import EvalFunction
from aimet_common.utils import CallbackFunc
import aimet_torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common.defs import QuantizationDataType, QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.common.utils import CallbackFunc
from aimet_torch.v2.quantsim import QuantizationSimModel
from aimet_torch.v1.quantsim import QuantizationSimModel
from aimet_torch.quantsim import QuantParams, QuantizationSimModel, load_encodings_to_sim
from aimet_torch.v2.quantsim.quantsim import QuantizationSimModel as QuantizationSimModelV2
from aimet_torch.v2.quantsim.config_utils import set_grouped_blockwise_quantization_for_weights
from aimet_torch.v1.auto_quant_v2 import AutoQuant
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms, fold_all_batch_norms_to_scale
from aimet_torch.bn_reestimation import reestimate_bn_stats
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.mixed_precision import choose_mixed_precision
from aimet_torch.model_preparer import prepare_model
from aimet_torch.model_validator.model_validator import ModelValidator
from aimet_torch.quant_analyzer import QuantAnalyzer
from aimet_torch.seq_mse import apply_seq_mse
from aimet_torch.mixed_precision import MixedPrecisionConfigurator
from aimet_torch.quantsim import set_blockwise_quantization_for_weights, set_grouped_blockwise_quantization_for_weights
from aimet_torch.utils import in_eval_mode
aimet_torch.onnx.export
from aimet_onnx import compute_encodings
from aimet_onnx.utils import make_dummy_input
from aimet_tensorflow.bn_reestimation import reestimate_bn_stats
import aimet_onnx; QuantSim = aimet_onnx.QuantizationSimModel
from aimet_onnx import apply_adaround, apply_seq_mse, int2, int4, int8, int16, float16
from aimet_onnx.common.defs import QuantScheme
from aimet_onnx.adaround.adaround_weight import Adaround, AdaroundParameters, apply_adaround
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import equalize_model
from aimet_onnx.quant_analyzer import QuantAnalyzer
from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim
from aimet_onnx.sequential_mse.seq_mse import apply_seq_mse
from aimet_torch.auto_quant import AutoQuant, AutoQuantWithAutoMixedPrecision
from aimet_tensorflow.keras.auto_quant_v2 import AutoQuantWithAutoMixedPrecision
from aimet_tensorflow.keras.quantsim import QuantizationSimModel
from aimet_tensorflow.bias_correction import BiasCorrection, BiasCorrectionParams, QuantParams
from aimet_tensorflow.quantsim import QuantizationSimModel
"""
"""How scripts of AIMET 1.31 and 2.42 import what the page says is there."""


def test_the_pages_command_changes_imports_to_ones_that_work(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "coming-from-aimet.md").read_text(encoding="utf-8")
    (command,) = (line.strip() for line in page.splitlines() if line.strip().startswith("sed "))
    script = tmp_path / "script.py"
    script.write_text(IMPORTS)
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    assert not re.search(r"\baimet_", script.read_text())
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from bitwright_aimet.torch.adascale import AdaScale", "block_reconstruction"),
        ("import bitwright_aimet.torch.experimental.omniquant", "block_reconstruction"),
        ("from bitwright_aimet.torch import nn", "compute_encodings"),
        ("from bitwright_aimet.torch.layer_output_utils import LayerOutputUtil", "bitwright.layer_outputs"),
        ("from bitwright_aimet.torch.visualize_model import visualize_weight_ranges", "quant_analyzer"),
        ("from bitwright_aimet.torch.cross_layer_equalization import HighBiasFold", "equalize_model"),
        ("from bitwright_aimet.torch.defs import ModuleCompRatioPair", "not what bitwright does"),
        ("from bitwright_aimet.torch.utils import get_all_quantizers", "sites have names"),
        ("from bitwright_aimet.tensorflow.cross_layer_equalization import GraphSearchUtils", "equalize_model"),
        ("from bitwright_aimet.tensorflow.keras.mixed_precision import choose_fast_mixed_precision", "choose_mixed"),
        ("from bitwright_aimet.onnx import analyze_per_layer_sensitivity", "QuantAnalyzer"),
        ("from bitwright_aimet.onnx.lite_mp import flip_layers_to_higher_precision", "lite=10"),
        ("from bitwright_aimet.common.defs import CostMetric", "not what bitwright does"),
        ("from bitwright_aimet.common.utils import AimetLogger", "there is no log"),
        ("from bitwright_aimet.tensorflow.utils.graph_saver import save_and_load_graph", "open_session"),
        ("from bitwright_aimet.tensorflow.keras.compress import ModelCompressor", "not what bitwright does"),
    ],
)
def test_what_is_not_here_says_what_to_call_instead(line, said):
    with pytest.raises(NotHere, match="Instead: ") as caught:
        exec(line)
    assert said in str(caught.value) and isinstance(caught.value, ImportError)


def test_names_that_nobody_has_fail_as_ever():
    import bitwright_aimet.torch.quantsim

    assert not hasattr(bitwright_aimet.torch.quantsim, "nobody")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'bitwright_aimet\.torch\.nobody'"):
        exec("import bitwright_aimet.torch.nobody")


def test_what_is_told_to_be_elsewhere_is_not_here():
    import importlib
    import pkgutil

    import bitwright_aimet

    here = [m.name for m in pkgutil.walk_packages(bitwright_aimet.__path__, "bitwright_aimet.")]
    assert not {f"bitwright_aimet.{name}" for name in _MODULES} & set(here)
    for name in here:
        module = importlib.import_module(name)
        assert not set(vars(module)) & set(_NAMES), name
