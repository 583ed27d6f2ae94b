"""The conformance kit on every built-in technique and every backend that is there.

On the reference backend with all small models, on frameworks some of the techniques with one of them. Every technique
must give the same numbers on each (`test_same_numbers_on_every_backend`).
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from backends import BACKENDS, FRAMEWORKS
from shares import WHOLE

from bitwright import registry
from bitwright.graph import OpKind, SetBias
from bitwright.testing import models
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.technique_contract import TechniqueContract

# What the kit needs to know of each.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "fold_batch_norm": {"needs_data": False},
    "cross_layer_equalization": {"needs_data": False},
    "bias_correction": {"reconstructs": True},
    "adaround": {"reconstructs": True, "settings": {"candidates": 5, "max_sweeps": 3}},
    "seq_mse": {"reconstructs": True, "settings": {"inputs": "asymmetric", "quantized_activations": True}},
    "gptq": {"reconstructs": True, "settings": {"candidates": 5}},
    "low_rank": {"settings": {"rank": 2}},
    "rotate": {"needs_data": False},
    "smooth_quant": {"settings": {"alpha": (0.25, 0.5, 0.75), "samples": 64}},
    "awq": {"settings": {"steps": 4, "samples": 64}},
    "weight_clipping": {"needs_data": False},
    "activation_ranges": {"settings": {"samples": 64}},
    "batch_norm_reestimation": {},
    "fold_batch_norm_to_scale": {"needs_data": False, "test_leaves_frozen_grids_alone": None},
}
# A technique never sees a framework. The whole kit is run on each for one technique of each kind: edits that change the
# graph, a walk that moves biases, one that stores its layers, channel statistics, statistics of norms. The others must
# give the same numbers there (`test_same_numbers_on_every_backend`); `make suite` puts them to the kit too.
ON_FRAMEWORKS = {"fold_batch_norm", "bias_correction", "adaround", "smooth_quant", "batch_norm_reestimation"}
# On the reference backend they have classes of their own (test_adaround.py, …).
OWN_CLASSES = {"adaround", "seq_mse", "batch_norm_reestimation", "fold_batch_norm_to_scale"}
ON_GRADIENTS = {"block_reconstruction"}
"""What the reference backend can't run, see test_block_reconstruction.py."""
ON_NORMS = {"fold_batch_norm", "batch_norm_reestimation", "fold_batch_norm_to_scale"}


# What doesn't depend on the backend is tested on the reference one.
ONCE = (
    "test_describes_itself",
    "test_refuses_unknown_settings",
    "test_imports_no_framework",
    "test_report_says_what_was_done",
    "test_is_deterministic",  # resuming bit-equal says more
)


# One object each, so that every framework brings it into its own form once.
_normed = cache(lambda: models.conv_bn_relu(depth=2))
_plain = cache(models.depthwise_triple)


class _Everywhere(TechniqueContract):
    name: ClassVar[str]
    port_name: ClassVar[str]

    def technique(self):
        return registry.technique(self.name)

    @property
    def on(self):
        return BACKENDS[self.port_name]

    def models(self):
        return models.MODELS if self.port_name == "reference" else {"conv_bn_relu": _normed}

    def interruptions(self, entries):
        return (
            super().interruptions(entries)
            if self.port_name == "reference"
            else range(entries // 2, entries // 2 + (entries > 1))
        )


def _classes() -> dict[str, type]:
    found = {}
    for name, attributes in TECHNIQUES.items():
        for backend in BACKENDS:
            if name in OWN_CLASSES if backend == "reference" else not (WHOLE or name in ON_FRAMEWORKS):
                continue
            title = "Test" + "".join(w.title() for w in (*name.split("_"), "on", backend))
            skipped = {} if backend == "reference" else {test: None for test in vars(TechniqueContract) if test in ONCE}
            found[title] = type(title, (_Everywhere,), {"name": name, "port_name": backend, **attributes, **skipped})
    return found


globals().update(_classes())


def test_every_technique_is_put_to_the_kit():
    built_in = {n for n, i in registry.techniques().items() if i.factory.startswith("bitwright_techniques.")}
    assert built_in == set(TECHNIQUES) | ON_GRADIENTS


def _result(backend, native, name, data):
    """Parameters of linear ops and norms, new biases, and scales of new weight encodings, after a technique."""
    plan = simple_plan(backend.graph(native), weights=TechniqueContract.weights)
    done = run_technique(
        registry.technique(name), backend, native, data, plan=plan, **TECHNIQUES[name].get("settings", {})
    )
    graph = backend.graph(done.model)
    values = backend.read(done.model, list(graph.params))
    ops = [*graph.linear_ops, *(op for op in graph if op.kind is OpKind.BATCH_NORM)]
    params = {(op.id, role): values[op.params[role]] for op in ops for role in sorted(op.params)}
    biases = {e.op: e.value for e in done.outcome.edits if isinstance(e, SetBias)}
    scales = {op.id: done.encodings[op.weight].scale for op in graph.linear_ops if op.weight in done.outcome.encodings}
    return params, biases, scales


@cache
def _expected(name):
    """A model and its data, with the result on the reference backend."""
    model = _normed() if name in ON_NORMS else _plain()
    data = [models.batch(model, 6, s) for s in range(3)]
    return model, data, _result(BACKENDS["reference"].backend(), model, name, data)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_same_numbers_on_every_backend(name, framework):
    """Parameters and scales within 1e-4 of their largest, but for roundings that sit on an edge (1 % at most)."""
    model, data, expected = _expected(name)
    port = BACKENDS[framework]
    found = _result(port.backend(), port.port(model), name, [port.batch(b) for b in data])
    order = [list(kind) for kind in expected]
    assert [len(kind) for kind in found] == [len(kind) for kind in expected]
    assert any(expected)
    for kind, (a, b) in enumerate(zip(expected, found, strict=True)):
        for x, y in zip(a.values(), b.values(), strict=True):
            far = np.abs(x - y) > 1e-4 * np.abs(x).max()
            assert far.mean() <= 0.01, (kind, order[kind])
