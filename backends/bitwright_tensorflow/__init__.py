"""The TensorFlow backend: graphs of v1 sessions, SavedModels, concrete functions and frozen files.

`SessionModel(session, inputs=[…], outputs=[…])` tells `bitwright.QuantSim` which tensors of a session are the network.
`TfModel` is the form that the backend works on; `open_session(model)` gives a session with its whole graph and values.
`dataset_batches(dataset)` makes calibration data of a `tf.data.Dataset` of graph mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright_tensorflow.capture.datasets import dataset_batches
    from bitwright_tensorflow.capture.sources import SessionModel
    from bitwright_tensorflow.graph.model import TfModel, open_session

__all__ = ["SessionModel", "TfModel", "dataset_batches", "open_session"]


def __getattr__(name: str) -> Any:
    # The plugin's descriptor lives in this package and must not import tensorflow.
    if name == "SessionModel":
        from bitwright_tensorflow.capture.sources import SessionModel

        return SessionModel
    if name == "TfModel":
        from bitwright_tensorflow.graph.model import TfModel

        return TfModel
    if name == "dataset_batches":
        from bitwright_tensorflow.capture.datasets import dataset_batches

        return dataset_batches
    if name == "open_session":
        from bitwright_tensorflow.graph.model import open_session

        return open_session
    raise AttributeError(f"module 'bitwright_tensorflow' has no attribute {name!r}")
