"""YAML whose depth, aliases and merged mappings are counted before anything is written out."""

from __future__ import annotations

import yaml

from bitwright.errors import InputError

# The scanner looks at every open bracket before each token: its time grows with the square of the depth.
_DEPTH = 100
# Numbers to the base of 60 (1:59:59) take time by the square of their length; no setting has so many digits.
_DIGITS = 400
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def load(text: str, where: str, entries: int) -> object:
    """What a document holds, of plain types only.

    Args:
        where: what the error begins with.
        entries: names and values that it may have, with those that aliases stand for.

    Raises:
        InputError: it has more, or its brackets open deeper than 100.
        yaml.YAMLError, ValueError, RecursionError: it isn't YAML.
    """

    class Loader(yaml.SafeLoader):
        nodes = 0

        def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
            if self.flow_level >= _DEPTH:
                raise InputError(f"{where}: brackets in a recipe open at most {_DEPTH} deep")
            super().fetch_flow_collection_start(TokenClass)

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            self.nodes += 1
            if self.nodes > entries:
                raise too_many(where, entries)
            node = super().compose_node(parent, index)
            if node is not None and node.tag in _NUMBERS and len(node.value) > _DIGITS:
                raise InputError(f"{where}: a number has {len(node.value):,} characters; {_DIGITS} are possible")
            return node

        def construct_document(self, node: yaml.Node) -> object:
            if _written_out(node, {}, entries) > entries:
                raise too_many(where, entries)
            return super().construct_document(node)

    return yaml.load(text, Loader)


def too_many(where: str, entries: int) -> InputError:
    """The error for a recipe that is too long."""
    return InputError(f"{where}: a recipe has at most {entries:,} entries, YAML aliases written out")


def _written_out(node: yaml.Node, known: dict[int, int], entries: int) -> int:
    """Nodes below and with a node; more than `entries` where it holds itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = entries + 1
    below = node.value if isinstance(node, yaml.SequenceNode) else ()
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_written_out(part, known, entries) for part in below)
    return known[id(node)]
