"""Networks that normalize every token: their activations have a few massive tokens, whose errors no layer can make up.

Transformers carry a handful of tokens (often the first, separators, punctuation) whose values are hundreds of times
the others' (Sun et al. 2024, "Massive Activations in Large Language Models"). Activation grids clip them; layer and RMS
norms shrink the error back. A mean or a squared error over tokens is theirs nearly alone, and a weight or a bias that
makes up for it moves all the other tokens, on calibration sets of usual size much further than it helps.
"""

from __future__ import annotations

from bitwright.graph import Graph, Op, OpKind

_ROOTS = frozenset({"sqrt", "rsqrt", "pow"})
_STEPS = 3
"""From the root of a decomposed norm back to its mean: the epsilon's addition, a cast or a reshape lie between."""


def normalizes_tokens(graph: Graph) -> bool:
    """Whether the network has layer or RMS normalizations, as single ops or written out (a root of a mean)."""
    return any(
        op.kind is OpKind.LAYER_NORM
        or "rms" in op.type.lower()
        or (op.type.lower() in _ROOTS and _follows_mean(graph, op, _STEPS))
        for op in graph
    )


def _follows_mean(graph: Graph, op: Op, steps: int) -> bool:
    makers = [m for t in op.data_inputs if (m := graph.producer(t)) is not None]
    return any("mean" in m.type.lower() or (steps > 1 and _follows_mean(graph, m, steps - 1)) for m in makers)
