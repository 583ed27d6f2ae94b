"""Many classes under the default scheme, on each framework: the probabilities that count survive."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.testing.builder import Builder

CLASSES = 3000


def classifier():
    b = Builder(0)
    weight = (np.random.default_rng(0).standard_normal((CLASSES, 16)) * 2).astype(np.float32)
    return b.build(b.softmax("softmax", b.linear("fc", b.input("x", 16), CLASSES, weight=weight)))


def detector():
    """Scores that are near 0 but for a few in a thousand."""
    b = Builder(1)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((400, 16)).astype(np.float32)
    scores = b.linear("fc", b.input("x", 16), 400, weight=weight, bias=np.full(400, -13, np.float32))
    return b.build(b.activation("sigmoid", scores, "Sigmoid"))


def decibels(signal, noisy):
    return 10 * np.log10(np.square(signal, dtype=np.float64).sum() / np.square(noisy - signal, dtype=np.float64).sum())


@pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("build", [classifier, detector])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_default_is_as_good_as_min_max(port, build, bits):
    model = build()
    data = port.batch({"x": (np.random.default_rng(2).standard_normal((64, 16)) * 1.3).astype(np.float32)})
    options = {"activations": f"uint{bits}", "weights": "int16"}
    whole = port.sim(model, scheme="minmax", **options).calibrate(data)
    sim = port.sim(model, **options).calibrate(data)
    reference, found = (sim.predict(data, simulated=s)[0] for s in (False, True))
    # At 16 bits scores have room for other samples, up to twice the range: 6 dB of these.
    slack = 0.5 if bits == 8 else 6.1
    assert decibels(reference, found) >= decibels(reference, whole.predict(data)[0]) - slack
    assert found.max() > 0.9 * reference.max() > 0.5
    if build is classifier:
        assert (found.argmax(-1) == reference.argmax(-1)).mean() > 0.9
