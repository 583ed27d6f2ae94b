"""What the TensorFlow backend registers; doesn't import tensorflow."""

from __future__ import annotations

from pathlib import Path

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
            port="bitwright_tensorflow.testing:model_port",
            sniff=is_saved_model,
        )
    ]


def is_saved_model(path: Path) -> bool:
    """Whether a path is a SavedModel's folder; files are known by their suffix."""
    return (path / "saved_model.pb").is_file()
