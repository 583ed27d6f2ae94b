"""Which values a quantizer may write its result over: those that the graph makes for it alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from bitwright_torch.graph import modes

aten = torch.ops.aten

SPENT = "spent"
"""Argument of quantizers' calls: see `FakeQuantize.forward`."""
FRESH = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.convolution.default,
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        modes.batch_norm,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
    }
)
"""Ops whose result is memory of its own, whatever they are given."""


def mark(calls: Iterable[fx.Node]) -> None:
    """Let calls of quantizers write over what they round, where nothing else reads it; take it back from the others."""
    for call in calls:
        kept = {k: v for k, v in call.kwargs.items() if k != SPENT}
        call.kwargs = {**kept, SPENT: True} if _is_spent(call.args[0]) else kept


def _is_spent(value: object) -> bool:
    return (
        isinstance(value, fx.Node) and value.op == "call_function" and value.target in FRESH and len(value.users) == 1
    )
