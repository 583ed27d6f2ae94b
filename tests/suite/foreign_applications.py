"""Networks of `keras.applications` with random weights, at the smallest size that each takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from foreign import Foreign

LARGER: Mapping[str, int] = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
"""Widths of images for the networks that don't take 32."""


def names() -> Mapping[str, str]:
    """Every network → its family, which is the module that defines it."""
    from keras import applications

    made = {n: f for n, f in vars(applications).items() if callable(f) and n[:1].isupper()}
    return {name: f.__module__.rpartition(".")[2] for name, f in sorted(made.items())}


def load(name: str) -> Foreign:
    """A network for ten classes; batch norms with statistics as training leaves them."""
    import keras

    keras.utils.set_random_seed(0)
    size = LARGER.get(name, 32)
    model = getattr(keras.applications, name)(weights=None, classes=10, input_shape=(size, size, 3))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_variance.shape
            layer.moving_mean.assign(rng.normal(0, 0.1, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, shape))
    return Foreign(name, names()[name], model, {}, [])
