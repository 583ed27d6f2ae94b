"""Which techniques a search uses: those that say that they take part, or the user's recipe."""

from __future__ import annotations

from bitwright.plugins import registry
from bitwright.simulation import RecipeLike, read_recipe
from bitwright.technique import Step


def split_steps(techniques: RecipeLike) -> tuple[list[Step], list[Step]]:
    """Preparations, which bring the network into the target's form, and the other techniques; each in order.

    Args:
        techniques: a recipe, or None for every registered technique that takes part.

    Raises:
        InputError, PluginError: as `read_recipe`.
    """
    infos = registry.techniques()
    if techniques is None:
        parts = [(info.auto.order, info.name) for info in infos.values() if info.auto is not None]
        chosen = [Step(name) for _, name in sorted(parts)]
    else:
        chosen = list(read_recipe(techniques))
    prepares = [s for s in chosen if (auto := infos[s.technique].auto) is not None and auto.prepares]
    return prepares, [s for s in chosen if s not in prepares]
