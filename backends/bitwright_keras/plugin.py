"""What the Keras backend registers; doesn't import keras."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, RuntimeInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The Keras backend."""
    return [
        BackendInfo(
            name="keras",
            summary="Keras 3 models: functional, sequential, nested; the simulation is a keras.Model.",
            factory="bitwright_keras.backend:KerasBackend",
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
        )
    ]
