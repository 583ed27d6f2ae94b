"""Indices that arrive as floats in ONNX."""

from __future__ import annotations

import builders as b
import numpy as np
import pytest

from bitwright.simulation import QuantSim
from bitwright.verify import sqnr

IDS = np.random.default_rng(0).integers(1, 999, (32, 6)).astype(np.float32)


def gather(m):
    return m.node("Gather", [m.weight("table", 1000, 8), m.node("Cast", ["ids"], "whole", to=b.INT64)], "e")


def shifted(m):
    m.node("Sub", ["ids", m.const("one", np.float32(1))], "less")
    return m.node("Gather", [m.weight("table", 1000, 8), m.node("Cast", ["less"], "whole", to=b.INT64)], "e")


def one_hot(m):
    m.node("OneHot", ["ids", m.const("depth", np.float32(1000)), m.const("values", np.float32([0, 1]))], "hot")
    return m.node("MatMul", ["hot", m.weight("table", 1000, 8)], "e")


def condition(m):
    m.node("Greater", ["ids", m.const("limit", np.float32(500.5))], "high")
    m.node("Unsqueeze", ["high", m.const("last", np.int64([2]))], "wide")
    return m.node("Where", ["wide", m.weight("above", 1, 1, 8), m.weight("below", 1, 1, 8)], "e")


@pytest.mark.parametrize("target", ["default", "htp_v73", "onnxruntime-cpu"])
@pytest.mark.parametrize("use", [gather, shifted, one_hot, condition], ids=lambda f: f.__name__)
def test_indices_that_arrive_as_floats_stay_exact(use, target, tmp_path):
    m = b.ModelBuilder()
    m.input("ids", ["n", 6])
    m.node("MatMul", [use(m), m.weight("w", 8, 8)], "y")
    m.output("y")
    data = {"ids": IDS}
    sim = QuantSim(m.build(), target=target).calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30
    assert "ids" not in sim.plan.quantized
    sim.export(tmp_path)
