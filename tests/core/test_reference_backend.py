import numpy as np
import pytest

from bitwright.testing import models
from bitwright.testing.reference import ReferenceBackend

BACKEND = ReferenceBackend()


@pytest.mark.parametrize("name", models.MODELS)
def test_models_run_and_survive_a_file(name, tmp_path):
    model = models.MODELS[name](1)
    batch = models.batch(model)
    outputs = model(batch)
    assert all(np.isfinite(v).all() for v in outputs.values())
    again = BACKEND.load(BACKEND.save(model, tmp_path / "model.npz"))
    assert again.graph.ops == model.graph.ops
    assert again.graph.tensors == model.graph.tensors
    for tensor, value in again(batch).items():
        assert np.array_equal(value, outputs[tensor])
        shape = model.graph.tensors[tensor].shape
        assert value.shape[1:] == shape[1:]
