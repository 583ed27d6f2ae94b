"""What a simulation asks before it puts a quantizer at a site: is one needed there, and does the encoding fit?"""

from __future__ import annotations

from collections.abc import Mapping

from bitwright.errors import EncodingError
from bitwright.graph import Graph, OpKind
from bitwright.grids import Blockwise, Encoding, Groups, PerTensor
from bitwright.placement import Plan, SiteId

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


def check_encodings(graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding]) -> None:
    """Refuse what can't be put on a plan's sites, before anything is.

    Raises:
        EncodingError: a site isn't in the plan, takes its encoding from another or stays in float; something is no
            encoding, or its scales don't fit.
    """
    for site, encoding in encodings.items():
        if site not in plan:
            raise EncodingError(f"the plan has no site {site!r}")
        if plan.root(site) != site or plan.spec(site) is None:
            raise EncodingError(f"site {site!r} has no grid of its own ({plan[site].decision})")
        if not isinstance(encoding, Encoding):
            raise EncodingError(f"site {site!r}: an Encoding is needed, got a {type(encoding).__name__}")
        check_site(graph, site, encoding)


def check_site(graph: Graph, site: SiteId, encoding: Encoding) -> None:
    """Refuse an encoding whose scales don't fit the tensor or parameter of a site.

    Args:
        graph: the model.
        site: a tensor or a parameter of it.
        encoding: to be installed.

    Raises:
        EncodingError: they don't fit.
    """
    param = graph.params.get(site)
    if param is None and isinstance(encoding.granularity, Blockwise):
        raise EncodingError(f"{site!r}: activations take one scale, or one for each channel; no blocks")
    check_fits(site, encoding, graph.tensors[site].shape if param is None else param.shape)


def check_fits(site: SiteId, encoding: Encoding, shape: tuple[int | None, ...] | None) -> None:
    """Refuse scales that don't fit a tensor.

    Args:
        site: for the message.
        encoding: to be installed.
        shape: of the tensor, canonical; None where the rank is unknown. Free dimensions fit anything.

    Raises:
        EncodingError: they don't fit.
    """
    granularity, found = encoding.granularity, encoding.scale.shape
    if isinstance(granularity, PerTensor):
        return
    if shape is None:
        raise EncodingError(f"{site!r} has no known rank, so only one scale for the whole tensor can be set")
    try:
        # A length that every block size divides stands in for free dimensions.
        size = getattr(granularity, "block_size", 1)
        expected = Groups.of(tuple(size if n is None else n for n in shape), granularity).scale
    except (ValueError, IndexError) as error:
        raise EncodingError(f"{site!r}: {error}") from None
    axes = (granularity.axis, *((granularity.block_axis,) if isinstance(granularity, Blockwise) else ()))
    known = [shape[a] is not None for a in axes]
    fits = len(expected) == len(found) and all(n == m for n, m, k in zip(expected, found, known, strict=True) if k)
    if not fits:
        told, shown = " × ".join(map(str, found)), ", ".join("?" if n is None else str(n) for n in shape)
        takes = " × ".join(str(n) if k else "any number" for n, k in zip(expected, known, strict=True))
        raise EncodingError(
            f"{site!r}: {told} scales along axis {', '.join(map(str, axes))} of a tensor of shape [{shown}], which "
            f"takes {takes}; give one scale for each channel (and block), or one for the whole tensor"
        )
