"""What the TensorFlow backend registers; doesn't import tensorflow."""

from __future__ import annotations

from bitwright.backend import Capability
from bitwright.hookspecs import BackendInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The TensorFlow backend."""
    return [
        BackendInfo(
            name="tensorflow",
            summary="TensorFlow graphs: v1 sessions and checkpoints, SavedModels, concrete functions, frozen files.",
            factory="bitwright_tensorflow.backend:TensorFlowBackend",
            modules=("tensorflow",),
            suffixes=(".pb", ".meta"),
            extra="tensorflow",
            capabilities=frozenset({Capability.PARTIAL_EXECUTION, Capability.TRAINABLE}),
        )
    ]
