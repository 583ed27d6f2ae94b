"""Bit widths in a few words: what a network's weights and activations are quantized to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bitwright.graph import ParamRole
from bitwright.placement import Plan, SiteKind


def widths(types: Iterable[tuple[str, str]]) -> str:
    """``"weights int8 (12) and int4 (3), activations uint8"``: the most frequent first, counted where they differ.

    Args:
        types: kind ("weight", "activation"; others are left out) and type of each quantized site.
    """
    counted: dict[str, Counter[str]] = {"weight": Counter(), "activation": Counter()}
    for kind, name in types:
        if kind in counted:
            counted[kind][name] += 1
    told = []
    for kind, found in counted.items():
        names = [name for name, _ in found.most_common()]
        shown = names if len(names) == 1 else [f"{name} ({found[name]})" for name in names]
        told.append(f"{kind}s {' and '.join(shown)}" if shown else f"{kind}s in float")
    return ", ".join(told)


def plan_widths(plan: Plan) -> str:
    """`widths` of a plan's sites."""
    found = []
    for name in plan.quantized:
        spec = plan.spec(name)
        if spec is None:
            continue
        site = plan[name]
        kind = "activation" if site.kind is SiteKind.ACTIVATION else "weight" if site.role is ParamRole.WEIGHT else ""
        found.append((kind, spec.float_format or f"{'' if spec.signed else 'u'}int{spec.bits}"))
    return widths(found)
