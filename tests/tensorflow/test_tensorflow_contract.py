"""The TensorFlow backend holds the backend contract."""

from functools import cache

import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright.testing.backend_contract import BackendContract, Case  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402


def in_session(build, *shape, samples=4, **options):
    @cache  # models are immutable
    def opened():
        return TensorFlowBackend().adopt(tfnets.session_model(build, *shape, **options))

    return Case(opened, {"x:0": tfnets.image(samples, *shape)})


def as_function(build, *shape, samples=4):
    @cache
    def opened():
        return TensorFlowBackend().adopt(tfnets.Module(build, *shape).call.get_concrete_function())

    return Case(opened, {"x:0": tfnets.image(samples, *shape)})


CASES = {
    "residual": in_session(tfnets.residual, 8, 8, 3, samples=8),
    "residual trained, reference variables": in_session(tfnets.residual, 8, 8, 3, resource=False, train=True),
    "residual function": as_function(tfnets.residual, 8, 8, 3),
    "branches": in_session(tfnets.branches, 8, 8, 3, resource=False),
    "decoder": in_session(tfnets.decoder, 5, 5, 3),
    "mlp": in_session(tfnets.mlp, 10, samples=8),
}


class TestTensorFlowContract(BackendContract):
    suffix = ".pb"

    def backend(self):
        return TensorFlowBackend()

    def cases(self):
        return CASES
