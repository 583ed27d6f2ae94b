"""The Keras 3 backend.

`capture(model, sample)` gives the model form that `bitwright.QuantSim` takes as it is, and `keras_model` makes a plain
`keras.Model` of it. `set_grid_rate(model)` lets the learned grids of range learning train faster than the weights.
`load_model(path)` opens a saved trainable simulation. Its layers are registered with Keras, so that
`keras.saving.load_model` finds them, once one of them has been imported (`from bitwright_keras import QuantizedLayer`),
or at once where this package is imported after keras.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright_keras.capture.comparing import CaptureNotice
    from bitwright_keras.capture.normalize import normalize as capture
    from bitwright_keras.graph.model import KerasModel
    from bitwright_keras.graph.native import keras_model
    from bitwright_keras.simulate.fake_quant import FakeQuantize
    from bitwright_keras.simulate.training import load_model, set_grid_rate
    from bitwright_keras.simulate.weights import QuantizedLayer

__all__ = [
    "CaptureNotice", "FakeQuantize", "KerasModel", "QuantizedLayer", "capture", "keras_model", "load_model",
    "set_grid_rate",
]  # fmt: skip
_HOMES = {
    "CaptureNotice": ("capture.comparing", "CaptureNotice"),
    "FakeQuantize": ("simulate.fake_quant", "FakeQuantize"),
    "KerasModel": ("graph.model", "KerasModel"),
    "QuantizedLayer": ("simulate.weights", "QuantizedLayer"),
    "capture": ("capture.normalize", "normalize"),
    "keras_model": ("graph.native", "keras_model"),
    "load_model": ("simulate.training", "load_model"),
    "set_grid_rate": ("simulate.training", "set_grid_rate"),
}


def __getattr__(name: str) -> Any:
    # The plugin's descriptor lives in this package and must not import keras.
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright_keras' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"bitwright_keras.{module}"), attribute)


# Loading the folder `capture` binds its name here, which is the function's: it is loaded first and unbound.
import_module("bitwright_keras.capture")
del globals()["capture"]

if "keras" in sys.modules and hasattr(sys.modules["keras"], "saving"):
    import_module("bitwright_keras.simulate.weights")
