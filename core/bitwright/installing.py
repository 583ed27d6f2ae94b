"""What a simulation asks before it puts a quantizer at a site: is one needed there, and does the encoding fit?"""

from __future__ import annotations

from bitwright.encoding import Encoding
from bitwright.errors import EncodingError
from bitwright.gradients import Groups
from bitwright.graph import Graph, OpKind
from bitwright.grid import PerTensor
from bitwright.plan import Plan, SiteId

MOVES = frozenset({
    OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.SPLIT, OpKind.MAX_POOL, OpKind.CONCAT, OpKind.IDENTITY,
})  # fmt: skip
"""Ops whose outputs are some of their inputs' values; dropout too, whose larger values in training must not clip."""


def on_grid(graph: Graph, plan: Plan, site: SiteId) -> bool:
    """Whether an activation's values have been rounded to its grid by the ops before it."""
    root, op = plan.root(site), graph.producer(site)
    if op is None or len(plan.tied(root)) == 1:
        return False
    sources = [t for t in op.data_inputs if graph.tensors[t].is_float]
    if op.kind is OpKind.EMBEDDING:
        sources = [p for p in (op.weight,) if p is not None]
    elif op.kind not in MOVES:
        return False
    return bool(sources) and all(s in plan and plan.root(s) == root for s in sources)


def check_fits(site: SiteId, encoding: Encoding, shape: tuple[int | None, ...] | None) -> None:
    """Refuse scales that don't fit a tensor.

    Args:
        site: for the message.
        encoding: to be installed.
        shape: of the tensor, canonical; None where the rank is unknown. Free dimensions fit anything.

    Raises:
        EncodingError: they don't fit.
    """
    if isinstance(encoding.granularity, PerTensor):
        return
    if shape is None:
        raise EncodingError(f"{site!r} has no known rank, so only one scale for the whole tensor can be set")
    try:
        # A length that every block size divides stands in for free dimensions.
        size = getattr(encoding.granularity, "block_size", 1)
        groups = Groups.of(tuple(size if n is None else n for n in shape), encoding.granularity)
    except (ValueError, IndexError) as error:
        raise EncodingError(f"{site!r}: {error}") from None
    free = None in shape
    if len(groups.scale) != encoding.scale.ndim or (not free and groups.scale != encoding.scale.shape):
        raise EncodingError(f"{site!r}: scales of shape {encoding.scale.shape} for a tensor of shape {shape}")
