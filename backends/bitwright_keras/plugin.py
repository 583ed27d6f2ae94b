"""What the Keras backend registers; doesn't import keras."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, hookimpl


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
        )
    ]
