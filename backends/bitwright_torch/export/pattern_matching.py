"""onnxscript's optimizer in time that grows with the network, not with its square.

For a pattern of several results (slices that are one split) its rewriter lists all nodes of the graph, and tries all
that may be the second result, once for every node: also for those that can't be the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_by_type() -> Iterator[None]:
    """Compare a node's type with that of a pattern's first result before all else. What matches stays the same."""
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:  # other versions lay it out otherwise
        yield
        return
    matcher: Any = SimplePatternMatcher
    search = matcher.match

    def match(self: Any, model: Any, graph_or_function: Any, node: Any, **options: Any) -> Any:
        pattern = self.pattern
        if not pattern.has_single_output_node:
            wanted = pattern.output_nodes[0].op_identifier()
            if wanted is not None and wanted != node.op_identifier():
                return MatchResult().fail("No match found.")
        return search(self, model, graph_or_function, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = search
