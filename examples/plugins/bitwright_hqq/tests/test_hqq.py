"""The techniques by the kit, on backends that are installed, and what is their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bitwright_hqq.hqq import Hqq, HqqSettings, error, search, searchable
from bitwright_hqq.one_sweep import OneSweep

from bitwright import registry
from bitwright.grids import Blockwise, PerChannel, QuantSpec, encoding_of_weights
from bitwright.testing import models
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.ports import Port, installed
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.technique_contract import TechniqueContract


class TestOnTheReferenceBackend(TechniqueContract):
    needs_data = False

    def technique(self) -> Hqq:
        return Hqq()


@pytest.mark.parametrize("port", [p for p in installed() if p.name in ("onnx", "torch")], ids=str, scope="class")
class TestOnFrameworks(TechniqueContract):
    needs_data = False

    @pytest.fixture(autouse=True)
    def _run_on(self, port: Port) -> None:
        self.on = port

    def technique(self) -> Hqq:
        return Hqq()

    def models(self) -> dict[str, Any]:
        return {"conv_bn_relu": models.conv_bn_relu}


class TestAsymmetricWeights(TestOnTheReferenceBackend):
    weights = QuantSpec(4, signed=False, symmetric=False)


class TestOneSweep(TechniqueContract):
    reconstructs = True

    def technique(self) -> OneSweep:
        return OneSweep()


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_sweep_is_better_than_nearest(symmetric: bool):
    backend, model = ReferenceBackend(), models.mlp()
    spec = QuantSpec(3, signed=symmetric, symmetric=symmetric, granularity=PerChannel(0))
    data = [models.batch(model, 64, s) for s in range(2)]
    done = run_technique(OneSweep(), backend, model, data, plan=simple_plan(model.graph, weights=spec))
    rows = done.outcome.report.rows
    assert len(rows) == len(model.graph.linear_ops)
    assert all(after < before for _, before, after in rows), rows
    assert sum(after for *_, after in rows) < 0.85 * sum(before for _, before, _ in rows), rows
    for w, encoding in done.outcome.encodings.items():
        assert encoding.frozen
        assert np.array_equal(encoding.fake_quantize(done.outcome.params[w]), done.outcome.params[w])


def test_it_is_found_by_both_names():
    assert isinstance(registry.technique("half_quadratic"), Hqq)
    assert registry.default_registry().settings("hqq") is HqqSettings


@pytest.mark.parametrize("layout", [PerChannel(0), Blockwise(0, 1, 16)])
@pytest.mark.parametrize("signed", [True, False])
def test_the_error_never_grows_and_outliers_are_left_alone(layout: Any, signed: bool):
    rng = np.random.default_rng(0)
    weight = rng.standard_t(2, (16, 64)).astype(np.float32)
    start = encoding_of_weights(weight, QuantSpec(3, signed=signed, symmetric=signed, granularity=layout))
    found = search(weight, start, HqqSettings())
    assert found.kept and not found.frozen and found.source == "hqq"
    assert error(weight, found, 0.7) < 0.92 * error(weight, start, 0.7)
    assert np.median(found.scale / start.scale) < 1, "a few large weights no longer set the step"


def test_what_it_keeps_may_be_searched_again():
    backend, model = ReferenceBackend(), models.mlp()
    plan = simple_plan(model.graph, weights=QuantSpec(3, granularity=PerChannel(0)))
    data = [models.batch(model, 16, s) for s in range(2)]
    first = run_technique(Hqq(), backend, model, data, plan=plan)
    again = run_technique(registry.technique("seq_mse"), backend, model, data, plan=plan, encodings=first.encodings)
    assert set(again.outcome.encodings) == set(first.outcome.encodings)


def test_scales_that_are_no_numbers_of_their_own_stay():
    weight = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    lpbq = encoding_of_weights(weight, QuantSpec(4, granularity=Blockwise(0, 1, 16, decompressed_bits=8)))
    half = encoding_of_weights(weight, QuantSpec(16, float_format="float16"))
    frozen = encoding_of_weights(weight, QuantSpec(4)).with_(frozen=True, held_by="adaround")
    assert not any(map(searchable, (lpbq, half, frozen)))
