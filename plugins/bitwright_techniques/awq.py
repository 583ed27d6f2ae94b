"""AWQ: give the weights of salient channels a finer grid by scaling them up, and their inputs down.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", §3.2:
``s_j = (mean|x_j|)^α`` with α from a grid by the layer's output error, normalized to an even spread. The float function
stays the same: what makes x is divided by s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.scale_migration import Channels, Values, migrate, migration_requests


class AwqSettings(BaseSettings):
    """Settings of `Awq`.

    Attributes:
        steps: grid of α: i/steps for i = 1 … steps.
        quantized_inputs: count the error of quantized inputs too, where activations are quantized; the paper's setting
            has them in float.
        samples: input rows of each layer that errors are measured on.
    """

    steps: int = Field(20, ge=1)
    quantized_inputs: bool = True
    samples: int = Field(512, ge=2)


class Awq:
    """Activation-aware scaling of weight channels, for few-bit weights."""

    name: ClassVar[str] = "awq"
    Settings: ClassVar[type[BaseSettings]] = AwqSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: AwqSettings) -> Iterable[Request]:
        """Ranges and samples of the inputs of all layers that could take factors."""
        return migration_requests(graph, settings.samples)

    def apply(self, ctx: Context[AwqSettings]) -> Outcome:
        """Search and scale; layers whose input nothing can absorb are listed with the reason."""
        s = ctx.settings
        grid = [i / s.steps for i in range(1, s.steps + 1)]
        return migrate(ctx, factors, grid, quantized_inputs=s.quantized_inputs)


def factors(seen: Channels, alpha: float) -> Values:
    """s_j = (mean|x_j|)^α; NaN for channels that are always zero."""
    alive = seen.mean > 0
    return np.asarray(np.where(alive, np.where(alive, seen.mean, 1.0) ** alpha, np.nan))
