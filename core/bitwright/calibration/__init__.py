"""Calibration: from what was seen of a tensor to the grid it gets; one small strategy class a scheme."""

from __future__ import annotations

from bitwright.calibration._base import Scheme
from bitwright.calibration._collect import collect
from bitwright.calibration._lost import doubts_of_weights
from bitwright.calibration._ranges import (
    activation_encodings,
    activation_grids,
    activation_requests,
    bias_encoding,
    dynamic_encodings,
    fits_accumulator,
    full_table,
    guarded,
    quantized_weights,
    sampled,
    to_calibrate,
    weight_encoding,
    weight_encodings,
)
from bitwright.calibration._schemes import scheme
from bitwright.calibration._step import InParts, in_parts

__all__ = [
    "InParts",
    "Scheme",
    "activation_encodings",
    "activation_grids",
    "activation_requests",
    "bias_encoding",
    "collect",
    "doubts_of_weights",
    "dynamic_encodings",
    "fits_accumulator",
    "full_table",
    "guarded",
    "in_parts",
    "quantized_weights",
    "sampled",
    "scheme",
    "to_calibrate",
    "weight_encoding",
    "weight_encodings",
]
