"""SmoothQuant: move the outliers of activations into the weights that read them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", eq. 4:
``s_j = max|x_j|^α / max|W_j|^(1−α)``; x_j is divided by s_j where it is made and the weights W_j that read it are
multiplied by it, so that the float function stays the same. α is searched for each source by measured output error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.scale_migration import Channels, Values, migrate, migration_requests


class SmoothQuantSettings(BaseSettings):
    """Settings of `SmoothQuant`.

    Attributes:
        alpha: values of the migration strength that are tried, from 0 (weights become even) to 1 (activations do);
            one value is taken wherever it lowers the error.
        samples: input rows of each layer that errors are measured on.
    """

    alpha: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        tuple(round(0.05 * i, 2) for i in range(21)), min_length=1
    )
    samples: int = Field(512, ge=2)


class SmoothQuant:
    """Migrates quantization difficulty from activations to weights. Fold batch norms first."""

    name: ClassVar[str] = "smooth_quant"
    Settings: ClassVar[type[BaseSettings]] = SmoothQuantSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: SmoothQuantSettings) -> Iterable[Request]:
        """Ranges and samples of the inputs of all layers that could take factors."""
        return migration_requests(graph, settings.samples)

    def apply(self, ctx: Context[SmoothQuantSettings]) -> Outcome:
        """Search and migrate; layers whose input nothing can absorb are listed with the reason."""
        return migrate(ctx, factors, ctx.settings.alpha, quantized_inputs=True)


def factors(seen: Channels, alpha: float) -> Values:
    """s_j = max|x_j|^α / max|W_j|^(1−α); NaN for channels without values."""
    alive = (seen.largest > 0) & (seen.weight > 0)
    x, w = np.where(alive, seen.largest, 1.0), np.where(alive, seen.weight, 1.0)
    return np.asarray(np.where(alive, x**alpha / w ** (1 - alpha), np.nan))
