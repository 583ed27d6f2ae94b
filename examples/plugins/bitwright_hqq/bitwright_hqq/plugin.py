"""What this distribution registers; imports nothing but descriptors."""

from __future__ import annotations

from bitwright.hookspecs import AutoStage, TechniqueInfo, hookimpl


@hookimpl
def register_techniques() -> list[TechniqueInfo]:
    """The techniques."""
    return [
        TechniqueInfo(
            "hqq",
            "Choose weight scales by half-quadratic optimization, without data.",
            factory="bitwright_hqq.hqq:Hqq",
            settings="bitwright_hqq.hqq:HqqSettings",
            aliases=("half_quadratic",),
            auto=AutoStage(order=35, weights_only=True),
        ),
        TechniqueInfo(
            "one_sweep",
            "Choose roundings one by one on the moments of each layer's input.",
            factory="bitwright_hqq.one_sweep:OneSweep",
        ),
    ]
