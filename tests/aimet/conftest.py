"""What the workflows have in common."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.runs import fingerprint


@pytest.fixture
def batches():
    rng = np.random.default_rng(5)
    return [rng.normal(size=(n, 3, 8, 8)).astype(np.float32) for n in (4, 4, 2)]


@pytest.fixture
def assert_equal():
    """Two simulations have the same weights and the same grids, to the bit."""

    def assert_equal(made, wanted, names=None):
        assert len(wanted.encodings) > 4
        assert made.plan == wanted.plan
        assert fingerprint.of_params(made.params) == fingerprint.of_params(wanted.params)
        table = {s: e.with_(frozen=False, held_by="", source="", kept=False) for s, e in made.encodings.items()}
        other = {s: e.with_(frozen=False, held_by="", source="", kept=False) for s, e in wanted.encodings.items()}
        assert fingerprint.of_encodings(table) == fingerprint.of_encodings(other)

    return assert_equal
