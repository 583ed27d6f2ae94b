"""What torch.onnx is handed, decomposed op by op, computes what a trace of the whole does, with the same ops."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402
from torch.export import Dim, ExportedProgram  # noqa: E402

from bitwright_torch.export.decomposition import piecewise  # noqa: E402
from bitwright_torch.export.pattern_matching import first_by_type  # noqa: E402

aten = torch.ops.aten
COMPOSED = (aten.adaptive_avg_pool2d.default, aten.diff.default, aten.hardswish.default)


class Blocks(nn.Module):
    """Ops that are decomposed, ops that hand out their operand or a view of it, and ops of several results."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norm, self.drop, self.head = nn.BatchNorm2d(4), nn.Dropout(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            x = nn.functional.hardswish(self.norm(block(x)))
        rows = x.reshape(-1, 4)
        first, rest = x.flatten(2).transpose(1, 2).contiguous().split([1, 5], 1)
        pooled = self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))
        return rows, first.to(torch.float32), rest.diff(dim=1), *pooled.chunk(2, 1)


def exported(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[ExportedProgram, ExportedProgram, list[Any]]:
    """(decomposed op by op, as a whole, what the first one left to the second)."""
    sample = (torch.randn(2, 4, 2, 3),)
    program = piecewise(module.eval(), sample, ({0: Dim.AUTO},))
    assert program is not None
    table = {op: decompose for op, decompose in torch.export.default_decompositions().items() if op in COMPOSED}
    whole, left = ExportedProgram.run_decompositions, list[Any]()
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *a: left.append(a) or whole(*a))
    with torch.no_grad():
        return program.run_decompositions(dict(table)), whole(program, dict(table)), left


def ops(program: ExportedProgram) -> Counter[str]:
    """Those that compute tensors; `clone` and ways to say `view` aside."""
    names = (str(n.target) for n in program.graph.nodes if n.op == "call_function")
    return Counter(n.replace("_unsafe_view", "view") for n in names if n.startswith("aten") and "clone" not in n
                   and "sym_" not in n)  # fmt: skip


def test_equal_to_a_trace_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Blocks()
    mine, theirs, left = exported(module, monkeypatch)
    assert not left
    assert ops(mine) == ops(theirs)
    assert not {str(op) for op in COMPOSED} & set(ops(mine))
    x = torch.randn(5, 4, 2, 3)
    for a, b, c in zip(mine.module()(x), theirs.module()(x), module(x), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_what_only_the_whole_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v.reshape(-1) * 2, lambda v: v.reshape(-1) + 1, (x,))

    mine, theirs, left = exported(Choice(), monkeypatch)
    assert len(left) == 1
    assert ops(mine) == ops(theirs)


def test_slices_are_one_split_and_found_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.optimizer import optimize_ir

    matcher = pytest.importorskip("onnxscript.rewriter._matcher").SimplePatternMatcher
    tries: list[Any] = []
    search = matcher._multi_match
    monkeypatch.setattr(matcher, "_multi_match", lambda *a, **k: tries.append(a) or search(*a, **k))

    def optimized(quick: bool) -> tuple[Counter[str], int]:
        model = network(40)
        tries.clear()
        if quick:
            with first_by_type():
                optimize_ir(model)
        else:
            optimize_ir(model)
        return Counter(n.op_type for n in model.graph), len(tries)

    (quick, few), (plain, many) = optimized(True), optimized(False)
    assert quick == plain
    assert quick["Split"] == 1 and quick["Sin"] == 40
    assert few <= 8 < many


def test_rules_are_tried_at_nodes_of_their_first_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.optimizer import optimize_ir

    matcher = pytest.importorskip("onnxscript.rewriter._matcher").SimplePatternMatcher
    tries: list[Any] = []
    search = matcher._match_node
    monkeypatch.setattr(matcher, "_match_node", lambda *a, **k: tries.append(a) or search(*a, **k))

    def optimized(quick: bool) -> tuple[list[tuple[str, list[str]]], int]:
        model = network(40)
        tries.clear()
        if quick:
            with first_by_type():
                optimize_ir(model)
        else:
            optimize_ir(model)
        return [(n.op_type, [v.name for v in n.outputs]) for n in model.graph], len(tries)

    (quick, few), (plain, many) = optimized(True), optimized(False)
    assert quick == plain
    assert few < many / 10


def network(length: int) -> Any:
    """A chain of ops, and two halves of what it gives."""

    def constant(name: str, *values: int) -> Any:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)

    def typed(name: str) -> Any:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 8]))

    x, zero, half, end, axis = (
        typed("x"),
        constant("zero", 0),
        constant("half", 4),
        constant("end", 8),
        constant("axis", 1),
    )
    nodes, source = [], x
    for _ in range(length):
        nodes.append(ir.node("Sin", [source]))
        source = nodes[-1].outputs[0]
        source.type, source.shape = x.type, x.shape
    # The second half first: the pair of a slice with itself, tried before, is none.
    halves = [ir.node("Slice", [source, half, end, axis]), ir.node("Slice", [source, zero, half, axis])]
    nodes += [*halves, ir.node("Mul", [n.outputs[0] for n in halves])]
    initializers = {v.name: v for n in nodes for v in n.inputs if v is not None and v.const_value is not None}
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=initializers.values(), opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)
