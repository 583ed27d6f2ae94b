"""Calibration and evaluation data: batches by input name, re-iterable, checked before any work."""

from __future__ import annotations

from bitwright.data._batches import InputSpecs, batch_dimension, first_samples, joined, require_ranks, samples_in
from bitwright.data._cut_cache import CACHE_BYTES, CutCache, close_all
from bitwright.data._dataset import DataLike, Dataset, labels, open_data
from bitwright.data._first import first_arrays
from bitwright.data._forward import is_forward_pass, recorded
from bitwright.data._images import ImageOptions, Images, image_options_of, is_image_folder
from bitwright.data._plausible import (
    ImplausibleDataWarning,
    Watching,
    doubt_of_accuracy,
    doubts_of_calibration,
    doubts_of_scale,
)
from bitwright.data._reference import SAMPLES, Remembering, Samples, is_fixed
from bitwright.data._samples import FirstSamples, labels_of, whole_batches
from bitwright.data._text import TextOptions

__all__ = [
    "CACHE_BYTES",
    "SAMPLES",
    "CutCache",
    "DataLike",
    "Dataset",
    "FirstSamples",
    "ImageOptions",
    "Images",
    "ImplausibleDataWarning",
    "InputSpecs",
    "Remembering",
    "Samples",
    "TextOptions",
    "Watching",
    "batch_dimension",
    "close_all",
    "doubt_of_accuracy",
    "doubts_of_calibration",
    "doubts_of_scale",
    "first_arrays",
    "first_samples",
    "image_options_of",
    "is_fixed",
    "is_forward_pass",
    "is_image_folder",
    "joined",
    "labels",
    "labels_of",
    "open_data",
    "recorded",
    "require_ranks",
    "samples_in",
    "whole_batches",
]
