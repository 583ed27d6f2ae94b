"""The float model as a module that reports what it is called with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from bitwright.backend import Batch
from bitwright_torch.capture.parts import PartitionedModel
from bitwright_torch.graph.model import CapturedModel, program_of


def observed(model: CapturedModel | PartitionedModel, seen: Callable[[Batch], None]) -> nn.Module:
    """A copy, in memory of its own: batch norms may be run in training mode."""
    twin = copy.deepcopy(model)
    convention = model.convention if isinstance(model, PartitionedModel) else program_of(model).convention

    def report(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = zip(convention.names, convention.flatten(args, kwargs), strict=True)
        seen({name: leaf for i, (name, leaf) in enumerate(leaves) if i not in convention.constants})

    twin.register_forward_pre_hook(report, with_kwargs=True)
    return twin
