"""Which techniques a search uses: those that say that they take part, or the user's recipe."""

from __future__ import annotations

import warnings

from bitwright.errors import PluginError
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
        chosen = [Step(name) for _, name in sorted(parts) if _can_be_made(name)]
    else:
        chosen = list(read_recipe(techniques))
    prepares = [s for s in chosen if (auto := infos[s.technique].auto) is not None and auto.prepares]
    return prepares, [s for s in chosen if s not in prepares]


def _can_be_made(name: str) -> bool:
    """Whether a technique is there; a broken one that nobody has asked for is named, and the search goes on without."""
    try:
        registry.technique(name)
    except PluginError as error:
        warnings.warn(f"{error}; the search goes on without it", stacklevel=3)
        return False
    return True
