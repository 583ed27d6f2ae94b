"""AIMET's names import no framework: only a model of one does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

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
from aimet_common.utils import CallbackFunc
import aimet_torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common.defs import QuantizationDataType, QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.common.utils import CallbackFunc
from aimet_torch.v2.quantsim import QuantizationSimModel
from aimet_torch.v1.quantsim import QuantizationSimModel
from aimet_torch.quantsim import QuantizationSimModel, load_encodings_to_sim
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms, fold_all_batch_norms_to_scale
from aimet_torch.bn_reestimation import reestimate_bn_stats
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.mixed_precision import choose_mixed_precision
from aimet_torch.model_preparer import prepare_model
from aimet_torch.model_validator.model_validator import ModelValidator
from aimet_torch.quant_analyzer import QuantAnalyzer
from aimet_torch.seq_mse import apply_seq_mse
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
