"""Models that fix the batch size: samples are counted in whole batches."""

from __future__ import annotations

import numpy as np
import pytest
from search_net import build

from bitwright import QuantSim, auto_quantize, measure_latency, mixed_precision
from bitwright_search.sensitivity import first_samples

pytest.importorskip("scipy")

CANDIDATES = [("int8", "uint8"), ("int4", "uint8")]


@pytest.fixture(scope="module")
def fixed():
    model = build()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 12
    return model


@pytest.mark.filterwarnings("ignore:.*batches of exactly 12", "ignore:the float model's top-1 .* is what guessing")
def test_searches_take_whole_batches(fixed, net):
    result = mixed_precision(fixed, net.images, net.data, candidates=CANDIDATES, lite=40, sensitivity_samples=20)
    assert 0 <= result.score <= 1
    found = auto_quantize(fixed, net.images, net.data, allowed_drop=0.99, schemes=["minmax"], techniques="bn_fold")
    assert found.score == pytest.approx(
        np.mean(np.argmax(found.sim.predict(net.images[:60])[0], axis=1) == net.labels[:60])
    )
    table = measure_latency(fixed, net.images, candidates=CANDIDATES, repeats=1)
    assert any(e.op == "fc" for e in table.entries)


def test_a_free_batch_is_cut_to_the_samples_asked_for(net):
    sim = QuantSim(net.model)
    found = [first_samples(sim.open(net.images, batch_size=size), 10) for size in (4, 10, 32)]
    for batches in found:
        assert np.array_equal(np.concatenate([b["image"] for b in batches]), net.images[:10])
