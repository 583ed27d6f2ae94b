"""What the Keras backend registers; doesn't import keras."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from bitwright.errors import MissingExtraError
from bitwright.hookspecs import BackendInfo, RuntimeInfo, hookimpl

if TYPE_CHECKING:
    from bitwright_keras.backend import KerasBackend


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The Keras backend."""
    return [
        BackendInfo(
            name="keras",
            summary="Keras 3 models: functional, sequential, nested; the simulation is a keras.Model.",
            factory="bitwright_keras.plugin:backend",
            modules=("keras",),
            suffixes=(".keras", ".h5", ".hdf5"),
            extra="keras",
            port="bitwright_keras.testing:model_port",
        )
    ]


@hookimpl
def register_runtimes() -> list[RuntimeInfo]:
    """LiteRT."""
    return [
        RuntimeInfo(
            name="tflite",
            summary="LiteRT (TensorFlow Lite), on an int8 .tflite file.",
            factory="bitwright_keras.export.litert:LiteRt",
            artefact="tflite",
            suffix=".tflite",
            arithmetic="LiteRT's kernels requantize in fixed point, the exact view follows ONNX Runtime's",
            otherwise=".tflite files are written of Keras models alone: build the network in Keras and quantize that. "
            "TensorFlow's own converter makes one of the float model that this export holds, with ranges of its own, "
            "which are not those that were simulated",
        )
    ]


def backend() -> KerasBackend:
    """The backend; what TensorFlow logs while it is imported stays out of the output, unless it is an error.

    Raises:
        MissingExtraError: what Keras computes with isn't installed.
    """
    from bitwright.backend import without_native_logs

    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what is one reaches Python as an exception
    try:
        with without_native_logs("tensorflow"):
            from bitwright_keras.backend import KerasBackend
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        if absent not in ("tensorflow", "torch", "jax"):
            raise
        raise MissingExtraError(
            f"Keras is installed, but not what it computes with, {absent}: "
            'pip install "bitwright[keras,tensorflow]", or set KERAS_BACKEND to torch or jax where one of these is '
            "installed"
        ) from None
    return KerasBackend()
