"""What a technique or a tool needs is asked for before any work, and the refusal says what to do instead."""

from __future__ import annotations

from typing import ClassVar

import pytest
from backends import FRAMEWORKS

from bitwright import registry
from bitwright.backend import Capability, capabilities, require
from bitwright.errors import CapabilityError, InputError
from bitwright.simulation import QuantSim
from bitwright.simulation import _apply as applying
from bitwright.technique import Outcome, Settings
from bitwright.testing import models
from bitwright.testing.reference import ReferenceBackend

OFFERED = {
    "onnx": {
        "partial_execution", "integer_runtime", "op_timer", "quantized_artefact", "quantized_reader", "source_files",
        "observable", "branching", "picking", "fingerprinting",
    },
    "torch": {
        "partial_execution", "trainable", "differentiable", "shared_conversion", "observable", "branching",
        "fingerprinting",
    },
    "keras": {
        "partial_execution", "trainable", "differentiable", "integer_runtime", "quantized_artefact",
        "reproduced_artefact",
        "bundled_formats", "observable", "branching", "fingerprinting",
    },
    "tensorflow": {
        "partial_execution", "trainable", "integer_runtime", "quantized_artefact", "bundled_formats", "observable",
        "branching", "fingerprinting",
    },
}  # fmt: skip


class Needing:
    """A technique that needs what it is made with."""

    name: ClassVar[str] = "needing"
    Settings: ClassVar = Settings

    def __init__(self, *needed):
        self.requires = frozenset(needed)

    def statistics(self, graph, plan, settings):
        raise AssertionError("it was asked for its statistics before it was refused")

    def apply(self, ctx):
        return Outcome()


@pytest.fixture
def sim(monkeypatch):
    monkeypatch.setattr(registry, "backend_for_model", lambda model: ReferenceBackend())
    return QuantSim(models.conv_bn_relu())


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_backend_offers_what_it_implements(name):
    assert capabilities(FRAMEWORKS[name].backend()) == OFFERED[name]
    assert capabilities(ReferenceBackend()) == {Capability.PARTIAL_EXECUTION, Capability.BRANCHING}


def test_a_technique_is_refused_where_the_backend_lacks_what_it_needs(sim):
    with pytest.raises(CapabilityError, match=r"needing needs trainable \(`bitwright.backend.Trainable`\), which the "
                       r"reference backend doesn't offer; open the model in PyTorch"):  # fmt: skip
        sim.apply(Needing(Capability.PARTIAL_EXECUTION, Capability.TRAINABLE))
    with pytest.raises(CapabilityError, match="needing needs 'gpu', which is not a capability; there are partial"):
        sim.apply(Needing("gpu"))
    with pytest.raises(AssertionError, match="asked for its statistics"):
        sim.apply(Needing(Capability.PARTIAL_EXECUTION))


def test_tools_are_refused_where_the_backend_lacks_what_they_need(sim):
    for capability in set(Capability) - capabilities(ReferenceBackend()):
        with pytest.raises(CapabilityError, match=rf"the tool needs {capability} \(`.*doesn't offer; \w+"):
            require(ReferenceBackend(), {capability}, "the tool")
    batch = models.batch(models.conv_bn_relu())
    with pytest.raises(CapabilityError, match=r"training needs trainable .*Keras or TensorFlow, or use adaround"):
        sim.calibrate([batch]).trainable()


NEEDS_DATA = {
    "adaround": {}, "gptq": {}, "low_rank": {}, "seq_mse": {}, "smooth_quant": {}, "awq": {}, "activation_ranges": {},
    "batch_norm_reestimation": {}, "bias_correction": {"mode": "empirical"}, "weight_clipping": {"metric": "output"},
}  # fmt: skip


@pytest.mark.parametrize("name", registry.techniques())
def test_techniques_without_data_are_refused_before_any_work_or_work(name, sim, monkeypatch):
    def work(*_, **__):
        raise AssertionError("work was done before the technique was refused")

    if name in NEEDS_DATA:
        monkeypatch.setattr(applying, "weight_encodings", work)
        with pytest.raises(InputError, match=f"^{name} needs calibration data; pass some, for example 250 samples"):
            sim.apply(name, **NEEDS_DATA[name])
    elif lacking := registry.technique(name).requires - capabilities(ReferenceBackend()):
        monkeypatch.setattr(applying, "weight_encodings", work)
        with pytest.raises(CapabilityError, match=f"^{name} needs {sorted(lacking)[0]}"):
            sim.apply(name)
    else:
        sim.apply("fold_batch_norm")
        sim.apply(name)
