"""Placement: a graph and a target become a plan, the same for every backend."""

from __future__ import annotations

from bitwright.placement._build import build_plan
from bitwright.placement._masks import UNREAD, Extent, NodeView, is_mask, masks
from bitwright.placement._overrides import ARROW, is_lost, ops_between, without_subgraphs
from bitwright.placement._plan import (
    Decision,
    Derived,
    Float,
    Fused,
    OwnForms,
    Plan,
    SharedWith,
    Site,
    SiteId,
    SiteKind,
)
from bitwright.placement._types import sized, sized_overrides

__all__ = [
    "ARROW",
    "UNREAD",
    "Decision",
    "Derived",
    "Extent",
    "Float",
    "Fused",
    "NodeView",
    "OwnForms",
    "Plan",
    "SharedWith",
    "Site",
    "SiteId",
    "SiteKind",
    "build_plan",
    "is_lost",
    "is_mask",
    "masks",
    "ops_between",
    "sized",
    "sized_overrides",
    "without_subgraphs",
]
