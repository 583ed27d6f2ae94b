"""Comparisons of one network as two backends open it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitwright.graph import Op
from bitwright.placement import Derived, Float, Fused, SharedWith
from bitwright.simulation import QuantSim


def matched_names(a: QuantSim, b: QuantSim, same: Callable[[Op, Op], bool]) -> dict[str, str]:
    """The second's name of each tensor and parameter of the first; `same` compares each pair of ops."""
    names = dict(zip(a.graph.inputs, b.graph.inputs, strict=True))
    for x, y in zip(a.graph.ops, b.graph.ops, strict=True):
        assert same(x, y), (x, y)
        assert set(x.params) == set(y.params)
        names |= dict(zip(x.outputs, y.outputs, strict=True)) | {p: y.params[role] for role, p in x.params.items()}
    return names


def assert_equal_plans(
    a: QuantSim, b: QuantSim, names: Mapping[str, str], of: Callable[[Any], Any] = lambda decision: decision
) -> None:
    """Every site has the same decision; `of` gives what is compared of one that concerns no other site."""
    assert len(a.plan) == len(b.plan) == len(names)
    for site, other in names.items():
        x, y = a.plan[site].decision, b.plan[other].decision
        if isinstance(x, SharedWith):
            assert names[a.plan.root(site)] == b.plan.root(other)
        elif isinstance(x, Derived):
            assert isinstance(y, Derived)
            assert tuple(names[s] for s in x.sites) == y.sites
        elif isinstance(x, Fused):
            assert isinstance(y, Fused)
            assert names[x.into] == y.into
            assert of(Float(x.reason)) == of(Float(y.reason))
        else:
            assert of(x) == of(y)


def assert_close_params(a: QuantSim, b: QuantSim, names: Mapping[str, str], tolerance: float = 1e-5) -> None:
    """Parameters agree to 1e-5, or to `tolerance` of the largest."""
    for op in a.graph.ops:
        for param in op.params.values():
            x, y = a.params[param], b.params[names[param]]
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=tolerance * np.abs(x).max())


def assert_close_outputs(a: QuantSim, b: QuantSim, data: Any, other: Any, *, exact: float | None = None) -> None:
    """First outputs are at most two steps apart, and less than a tenth of the values are more than `exact` apart.

    Args:
        a, b: calibrated.
        data, other: the same samples for each.
        exact: default: a hundredth of a step.
    """
    (x,), (y,) = a.predict(data), b.predict(other)
    step = float(a.encodings[a.graph.outputs[0]].scale)
    assert np.abs(x - y).max() <= 2.01 * step
    assert np.mean(np.abs(x - y) > (0.01 * step if exact is None else exact)) < 0.1
