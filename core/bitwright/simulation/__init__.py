"""QuantSim: one model, one target, and everything that happens to it from opening to export."""

from __future__ import annotations

from bitwright.simulation._apply import open_store
from bitwright.simulation._opening import open_model
from bitwright.simulation._quantsim import QuantSim
from bitwright.simulation._recipe import RecipeLike, read_recipe

__all__ = ["QuantSim", "RecipeLike", "open_model", "open_store", "read_recipe"]
