"""`aimet_onnx`: what takes a `ModelProto` changes it in place where AIMET does."""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.onnx.adaround.adaround_weight import apply_adaround
from bitwright_aimet.onnx.quantsim import QuantizationSimModel, compute_encodings
from bitwright_aimet.onnx.sequential_mse.seq_mse import apply_seq_mse

int2, int4, int8, int16, float16 = "int2", "int4", "int8", "int16", "float16"
"""AIMET 2's types, for `param_type` and `activation_type`."""

__all__ = [
    "QuantizationSimModel",
    "apply_adaround",
    "apply_seq_mse",
    "compute_encodings",
    "float16",
    "int2",
    "int4",
    "int8",
    "int16",
]

__getattr__ = tell_names(__name__)
