"""What a captured model computes beyond its parameters' values, as a fingerprint."""

from __future__ import annotations

import torch
from torch import fx, nn

from bitwright.runs import fingerprint
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import CapturedModel, program_of


def content(model: CapturedModel) -> str:
    """Hash of its calls with their literal arguments, and of the tensors that they read and no parameter shows."""
    shown = {operand.base for operand, _ in canonical(model).params.values() if operand.evaluator is None}
    return fingerprint.of_json(_graph(model, program_of(model).graph, shown))


def _graph(owner: nn.Module, graph: fx.Graph, shown: set[str]) -> list[str]:
    told = [str(graph)]
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in shown:
            continue
        held: object = owner
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        if isinstance(held, fx.GraphModule):  # a branch
            told += _graph(held, held.graph, set())
        elif isinstance(held, torch.Tensor) and not held.is_meta:
            values = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            told.append(f"{node.target} {held.dtype} {list(held.shape)} {fingerprint.of_arrays([('', values)])}")
    return told
