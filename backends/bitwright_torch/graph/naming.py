"""Names for the nodes of a captured graph: the user's modules', and where in the source they were called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_LIBRARY = re.compile(r"[/\\](site-packages|dist-packages)[/\\](torch|lightning|pytorch_lightning)[/\\]|<frozen")


def source_of(node: fx.Node) -> str | None:
    """The innermost line of the user's code behind a node: 'net.py:12 in forward: y = self.conv(x)'."""
    return last_user_line(str(node.meta.get("stack_trace") or ""))


def last_user_line(trace: str) -> str | None:
    """The innermost frame of a printed stack that isn't PyTorch's own; None where there is none."""
    found: str | None = None
    lines = trace.splitlines()
    for i, line in enumerate(lines):
        if (match := _FRAME.match(line)) is None:
            continue
        code = lines[i + 1].strip() if i + 1 < len(lines) and not _FRAME.match(lines[i + 1]) else ""
        text = f"{match['file']}:{match['line']} in {match['function']}" + (f": {code}" if code else "")
        if not _LIBRARY.search(match["file"]):
            found = text
    return found


def owner_of(node: fx.Node) -> str:
    """Dotted name of the innermost user module that a node was called in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, kind in reversed(list(stack.values())):
        if isinstance(kind, str) and "_empty_nn_module_stack" in kind:
            continue
        return re.sub(r"@\d+", "", str(path))
    return ""


def call_name(node: fx.Node) -> str:
    """Short name of what a node calls: "conv2d", "add"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).partition("::")[2].strip("_")
    return str(getattr(target, "__name__", target)).strip("_")


class Namer:
    """Gives ops their ids.

    - A layer (a module without children) that makes one kind of call is its op: "layer1.0.conv1"; its second use is
      "layer1.0.conv1#1".
    - An op on a parameter of another layer carries that layer's name ("mha.out_proj").
    - All else is named by the module that contains it, and what it calls: "layer1.0.add".
    """

    def __init__(self, holder: nn.Module, nodes: Iterable[fx.Node]) -> None:
        self._holder = holder
        self._taken: dict[str, int] = {}
        self._calls: dict[str, set[str]] = {}
        for node in nodes:
            self._calls.setdefault(owner_of(node), set()).add(call_name(node))

    def op_id(self, node: fx.Node) -> str:
        """A new unique id for a node."""
        owner, call = owner_of(node), call_name(node)
        if owner and self._calls.get(owner) == {call} and self._is_layer(owner):
            wanted = owner
        elif (layer := self._layer_of_weight(node)) is not None:
            wanted = layer
        else:
            wanted = f"{owner}.{call}" if owner else call
        return self._unique(wanted)

    def _unique(self, wanted: str) -> str:
        number = self._taken.get(wanted, 0)
        self._taken[wanted] = number + 1
        if number == 0:
            return wanted
        return self._unique(f"{wanted}#{number}")

    def _is_layer(self, name: str) -> bool:
        try:
            module = self._holder.get_submodule(name)
        except AttributeError:
            return False
        return next(module.children(), None) is None

    def _layer_of_weight(self, node: fx.Node) -> str | None:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and str(operand.target).endswith(".weight"):
                layer = str(operand.target).removesuffix(".weight")
                if self._is_layer(layer):
                    return layer
        return None
