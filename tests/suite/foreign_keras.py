"""Every layer class of `keras.layers` in a small model: those of the Keras backend's own tests, in this harness."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from foreign import Foreign, NotRun

sys.path.append(str(Path(__file__).parents[1] / "keras"))


def names() -> Mapping[str, str]:
    """Every layer class that makes a model → its group: the folder of Keras's sources that it is in."""
    from keras import layers
    from keras_layers import CASES

    folders = {c.__name__: c.__module__.split(".")[3] for c in vars(layers).values() if isinstance(c, type)}
    return {name: folders[name] for name in CASES}


def load(name: str) -> Foreign:
    """A layer's model with four samples and what Keras makes of them.

    Raises:
        NotRun: Keras doesn't give the same values twice.
    """
    import numpy as np
    from keras_layers import model_of

    model, inputs = model_of(name)
    results = [[np.asarray(v) for v in _listed(model(inputs, training=False))] for _ in range(2)]
    if any(not np.array_equal(a, b) for a, b in zip(*results, strict=True)):
        raise NotRun("two runs give different values")
    return Foreign(name, names()[name], model, inputs, results[0])


def _listed(outputs: object) -> list[object]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
