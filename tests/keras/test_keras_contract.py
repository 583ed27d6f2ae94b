"""The Keras backend holds the backend contract."""

from functools import cache

import pytest

keras = pytest.importorskip("keras")

import keras_nets as nets  # noqa: E402
import numpy as np  # noqa: E402

from bitwright.testing.backend_contract import BackendContract, Case  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402


def case(build, tolerance=1e-5, **inputs):
    @cache  # edits never change a model, and the contract checks that
    def captured():
        keras.utils.set_random_seed(0)
        return KerasBackend().adopt(nets.settled(build()))

    return Case(captured, inputs, tolerance)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


IDS = np.random.default_rng(0).integers(0, 12, (4, 7)).astype(np.int32)
CASES = {
    "residual": case(nets.residual, x=normal(8, 8, 8, 3)),
    "branches": case(nets.branches, x=normal(4, 7, 7, 3)),
    "separable": case(nets.separable, x=normal(4, 6, 6, 3)),
    "transformer": case(nets.transformer, ids=IDS),
}


class TestKerasContract(BackendContract):
    suffix = ".keras"
    demanding = frozenset({"tflite"})  # the kit's plan has no ties; test_tflite.py has plans that fit

    def backend(self):
        return KerasBackend()

    def cases(self):
        return CASES
