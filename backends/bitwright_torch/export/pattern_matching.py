"""onnxscript's optimizer in time that grows with the network, not with its square.

For a pattern of several results (slices that are one split) its rewriter lists all nodes of the graph, and tries all
that may be the second result, once for every node: also for those that can't be the first. Each rule is tried at each
node, whatever its type; and each node that goes is compared with all outputs of the graph, which here are the sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_by_type() -> Iterator[None]:
    """Compare a node's type with that of a pattern's first result before all else. What matches stays the same."""
    try:
        from onnx_ir._graph_containers import GraphOutputs
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
        from onnxscript.rewriter._rewrite_rule import RewriteRule
    except ImportError:  # other versions lay it out otherwise
        yield
        return
    matcher: Any = SimplePatternMatcher
    rule: Any = RewriteRule
    outputs: Any = GraphOutputs
    search, rewrite = matcher.match, rule.try_rewrite
    types: dict[int, tuple[Any, tuple[str, str] | None]] = {}
    """Of each rule the type of its first result, with the rule: an id is its alone while it lives."""

    def match(self: Any, model: Any, graph_or_function: Any, node: Any, **options: Any) -> Any:
        pattern = self.pattern
        if not pattern.has_single_output_node:
            wanted = pattern.output_nodes[0].op_identifier()
            if wanted is not None and wanted != node.op_identifier():
                return MatchResult().fail("No match found.")
        return search(self, model, graph_or_function, node, **options)

    def try_rewrite(self: Any, model: Any, graph_or_function: Any, node: Any, **options: Any) -> Any:
        known = types.get(id(self))
        if known is None:
            known = types[id(self)] = self, _first_type(self) if type(self._matcher) is matcher else None
        wanted = known[1]
        if wanted is not None and options.get("tracer") is None and wanted != (node.domain, node.op_type):
            return None
        return rewrite(self, model, graph_or_function, node, **options)

    def values(self: Any) -> Iterator[Any]:
        return iter(self.data)

    matcher.match, rule.try_rewrite, outputs.__iter__ = match, try_rewrite, values
    try:
        yield
    finally:
        matcher.match, rule.try_rewrite = search, rewrite
        del outputs.__iter__


def _first_type(rule: Any) -> tuple[str, str] | None:
    """(domain, type) that a node must have to be the first result of a rule's pattern; None where it may vary."""
    try:
        pattern = rule._target_pattern
        found = pattern.output_nodes[0].op_identifier()
    except (AttributeError, IndexError):
        return None
    return None if found is None else (found[0], found[1])
