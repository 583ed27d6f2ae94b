"""Functions written out in the graph that calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes

from bitwright_onnx.graph.subgraph import bodies


class Inlining(passes.InlinePass):
    """onnx-ir's pass, with the same names, in time that grows with the nodes.

    For a name that is taken the pass tries name_2, name_3, … from the start; a function that is called a thousand times
    makes that half a million trials for each of its nodes. Here each name goes on from the last number that it got.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[int, str], int] = {}

    def _instantiate_call(self, node: ir.Node, call_site_id: Any) -> Any:
        names, values = (getattr(self, known, None) for known in ("_used_node_names", "_used_value_names"))
        if names is None or values is None:  # onnx-ir before 0.1.16 keeps them elsewhere: its pass as it is
            return super()._instantiate_call(node, call_site_id)
        self._used_node_names, self._used_value_names = _Untaken(), _Untaken()
        try:
            nodes, results = super()._instantiate_call(node, call_site_id)
        finally:
            self._used_node_names, self._used_value_names = names, values
        for inner in _innermost_first(nodes):
            inner.name = self._free(inner.name or "node", names)
            for output in inner.outputs:
                output.name = self._free(output.name or "val", values)
        return nodes, results

    def _free(self, name: str, taken: set[str]) -> str:
        candidate, number = name, self._last.get((id(taken), name), 1)
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        self._last[id(taken), name] = number
        taken.add(candidate)
        return candidate


class _Untaken(set[str]):
    """Names are left as they are."""

    def __contains__(self, name: object) -> bool:
        return False


def _innermost_first(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        for body in bodies(node):
            yield from _innermost_first(body)
        yield node
