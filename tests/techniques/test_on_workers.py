"""Techniques whose layers are solved by two processes: the weights of one process, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.testing import models
from bitwright.workers import open_workers

CASES = {
    "gptq": {"inputs": "quantized"},
    "adaround": {"inputs": "float", "kicks": 1},
    "seq_mse": {"inputs": "asymmetric"},
}


@pytest.fixture(scope="module")
def two():
    with open_workers(2) as workers:
        yield workers


@pytest.mark.skipif("onnx" not in FRAMEWORKS, reason="needs ONNX")
@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name, two, monkeypatch):
    port, reference = FRAMEWORKS["onnx"], models.concat_branches()
    data = port.batch(models.batch(reference, 12))
    sent = []
    submit = type(two.flight()).submit

    def counted(flight, layer, *task):
        sent.append(layer)
        submit(flight, layer, *task)

    monkeypatch.setattr("bitwright.workers.Flight.submit", counted)

    def applied(workers):
        sim = port.sim(reference, weights="int4").attach(executor=workers).apply(name, data, **CASES[name])
        return {**{p: sim.params[p] for p in sim.graph.params}, **{s: e.scale for s, e in sim.encodings.items()}}

    straight = applied(None)
    assert not sent
    found = applied(two)
    assert len(sent) >= 4
    assert straight.keys() == found.keys()
    for key, values in straight.items():
        np.testing.assert_array_equal(values, found[key], err_msg=key)
