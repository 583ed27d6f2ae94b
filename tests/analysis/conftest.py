from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from analysis_models import blobs, mlp, train


@pytest.fixture(scope="session")
def trained() -> SimpleNamespace:
    """A trained classifier, fresh samples and their labels."""
    layers = train()
    x, y = blobs(256, 2)
    return SimpleNamespace(layers=layers, model=mlp(layers), x=x, labels=y)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(20, 3, 12, 12)).astype(np.float32)
