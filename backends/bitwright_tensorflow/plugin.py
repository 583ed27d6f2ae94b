"""What the TensorFlow backend registers; doesn't import tensorflow."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.hookspecs import BackendInfo, hookimpl

if TYPE_CHECKING:
    from bitwright_tensorflow.backend import TensorFlowBackend


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The TensorFlow backend."""
    return [
        BackendInfo(
            name="tensorflow",
            summary="TensorFlow graphs: v1 sessions and checkpoints, SavedModels, concrete functions, frozen files.",
            factory="bitwright_tensorflow.plugin:backend",
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


def backend() -> TensorFlowBackend:
    """The backend; what TensorFlow logs stays out of the output, unless it was imported before."""
    from bitwright.backend import without_native_logs

    if "tensorflow" not in sys.modules:
        # Errors reach Python as exceptions; one that isn't any is logged wherever there is no GPU.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with without_native_logs("tensorflow"):
        from bitwright_tensorflow.backend import TensorFlowBackend
    return TensorFlowBackend()
