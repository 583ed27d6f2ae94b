"""The user's exceptions by op or by site, checked against the graph."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpId, ParamRole
from bitwright.placement._plan import SiteId
from bitwright.placement._types import Precision

_BY_ROLE = ("weights", "activations", "bias")


@dataclass(frozen=True)
class Overrides:
    """What the user said of single ops and sites.

    Attributes:
        float_ops: ops that run in float.
        sites: a precision, or None for float.
    """

    float_ops: frozenset[OpId] = frozenset()
    sites: Mapping[SiteId, Precision | None] = field(default_factory=dict)


ARROW = "->"
"""Between the first and the last ops of a subgraph."""
_TYPE, _PATTERN, _NAME = range(3)
"""How closely an override names what it is about; the closer one wins."""


def parse_overrides(graph: Graph, wanted: Mapping[str, object]) -> Overrides:
    """Read overrides: ``{"conv1": "float", "layer2.*": {"weights": "int4"}, "Gemm": "float", "act2": "uint16"}``.

    A key is the name of an op, tensor or parameter, a pattern of names with ``*``, ``?`` and ``[…]``, an op type
    ("Conv", or the framework's own name), or a subgraph, ``"conv1 -> add"`` or ``"a, b -> c"``: all ops on the ways
    from the first ops to the last, these included. Names win over patterns and subgraphs, and these over types; what is
    said of a site goes before what is said of its op.

    "float" for an op makes it run in float: its parameters stay float, and its outputs are quantized only where a
    quantized op reads them. A name that is both an op's and a tensor's means the op for "float" and for mappings, the
    tensor for a type; a pattern or type likewise means ops for "float" (tensors and parameters where it matches no op)
    and for mappings.

    Raises:
        InputError: a name, pattern or type that the graph doesn't have, a role that none of the ops has, a value that
            is not a type, or two patterns or types that say different things of one site.
    """
    found = _Found()
    for name, value in wanted.items():
        level, ops, sites = _meant(graph, name)
        if isinstance(value, str) and value == "float" and ops:
            for op in ops:
                found.run_in_float(op, name, level)
        elif isinstance(value, str) and sites:
            for site in sites:
                precision = _precision(name, value, blocks=site in graph.params)
                found.give(site, precision, name, (level, True))
        elif isinstance(value, Mapping) and ops:
            given = [entry for op in ops for entry in _of_op(graph, graph.op(op), value, several=level < _NAME)]
            if value and not given:
                raise InputError(f"overrides: none of the ops that {name!r} means has {' or '.join(map(str, value))}")
            for site, precision in given:
                found.give(site, precision, name, (level, False))
            for op in ops:
                found.quantize(op, name, level)
        else:
            raise InputError(
                f"overrides: {name!r} can't be {value!r}: an op takes 'float' or a mapping such as "
                "{'weights': 'int4', 'activations': 'uint16'}; a tensor or parameter takes 'float' or a type"
            )
    return Overrides(found.float_ops, {site: precision for site, (precision, _, _) in found.sites.items()})


def is_lost(before: Graph, after: Graph, name: str, value: object) -> bool:
    """Whether what an override was about is gone after an edit, such as a batch norm that was folded.

    What was said of ops doesn't become something that is said of tensors of the same name.
    """
    (_, ops, sites), (_, ops_now, sites_now) = _resolved(before, name), _resolved(after, name)
    if ops and (value == "float" or isinstance(value, Mapping)):
        return not ops_now
    return bool(ops or sites) and not (ops_now or sites_now)


def _meant(graph: Graph, name: str) -> tuple[int, list[OpId], list[SiteId]]:
    level, ops, sites = _resolved(graph, name)
    if not ops and not sites:
        what = "op or tensor that matches" if level == _PATTERN else "op or tensor"
        raise InputError(f"overrides: the model has no {what} {name!r}{_near(graph, name)}")
    return level, ops, sites


def _resolved(graph: Graph, name: str) -> tuple[int, list[OpId], list[SiteId]]:
    """How closely a key names something, the ops and the sites (tensors, parameters) that it means."""
    sites = [name] if name in graph.tensors or name in graph.params else []
    if name in graph or sites:
        return _NAME, [name] if name in graph else [], sites
    if ARROW in name:
        return _PATTERN, ops_between(graph, name), []
    if any(c in name for c in "*?["):
        floats = [t for t, tensor in graph.tensors.items() if tensor.is_float]
        matched = [s for s in (*floats, *graph.params) if fnmatch.fnmatchcase(s, name)]
        return _PATTERN, [op.id for op in graph if fnmatch.fnmatchcase(op.id, name)], matched
    return _TYPE, [op.id for op in graph if name in (op.type, op.native)], []


def ops_between(graph: Graph, text: str) -> list[OpId]:
    """The ops of a subgraph ``"a, b -> c, d"``: on a way from one of the first to one of the last, these included.

    Raises:
        InputError: one of them isn't an op of the model, or no way leads from the first to the last.
    """
    first, last = ([name.strip() for name in side.split(",")] for side in text.split(ARROW, 1))
    for name in (*first, *last):
        if name not in graph:
            raise InputError(f"{text!r}: the model has no op {name!r}{_near(graph, name)}")
    after, before = set(first), set(last)
    for op in graph:  # in topological order, so that one pass each way is enough
        inputs = (t for t in op.inputs if t is not None)
        if any((made := graph.producer(t)) is not None and made.id in after for t in inputs):
            after.add(op.id)
    for op in reversed(list(graph)):
        if any(user.id in before for t in op.outputs for user in graph.consumers(t)):
            before.add(op.id)
    found = [op.id for op in graph if op.id in after and op.id in before]
    if not set(first) & before or not set(last) & after:
        raise InputError(f"{text!r}: no way leads from {', '.join(first)} to {', '.join(last)}")
    return found


def without_subgraphs(graph: Graph, overrides: Mapping[str, object]) -> dict[str, object]:
    """Overrides in which subgraphs are the names of their ops, so that an edit of one op loses no other's.

    Raises:
        InputError: a subgraph isn't one, or none of its ops has what it is said of.
    """
    found = {name: value for name, value in overrides.items() if ARROW not in name}
    for name, value in overrides.items():
        if name in found:
            continue
        given = {op: _fitting(graph.op(op), value) for op in ops_between(graph, name)}
        if not any(given.values()):
            raise InputError(f"overrides: none of the ops of {name!r} takes {value!r}")
        for op, said in given.items():
            if said:
                found.setdefault(op, said)
    return found


def _fitting(op: Op, value: object) -> object:
    """What of an override an op of a subgraph has a place for."""
    if not isinstance(value, Mapping):
        return value
    roles = {"weights": ParamRole.WEIGHT in op.params, "bias": ParamRole.BIAS in op.params}
    return {role: text for role, text in value.items() if roles.get(role, True)}


class _Found:
    """What was said so far, and by which key."""

    def __init__(self) -> None:
        self.sites: dict[SiteId, tuple[Precision | None, str, tuple[int, bool]]] = {}
        self._ops: dict[OpId, tuple[bool, str, int]] = {}

    @property
    def float_ops(self) -> frozenset[OpId]:
        return frozenset(op for op, (is_float, _, _) in self._ops.items() if is_float)

    def give(self, site: SiteId, precision: Precision | None, key: str, rank: tuple[int, bool]) -> None:
        known = self.sites.get(site)
        if known is not None and known[2] == rank and known[0] != precision:
            raise InputError(f"overrides: {known[1]!r} and {key!r} say different things of {site!r}; name it itself")
        if known is None or rank >= known[2]:
            self.sites[site] = precision, key, rank

    def run_in_float(self, op: OpId, key: str, level: int) -> None:
        self._decide(op, True, key, level)

    def quantize(self, op: OpId, key: str, level: int) -> None:
        self._decide(op, False, key, level)

    def _decide(self, op: OpId, is_float: bool, key: str, level: int) -> None:
        known = self._ops.get(op)
        if known is not None and known[2] == level and known[0] != is_float:
            raise InputError(
                f"overrides: {known[1]!r} and {key!r} say different things of op {op!r}, 'float' and a type; "
                "name it itself"
            )
        if known is None or level >= known[2]:
            self._ops[op] = is_float, key, level


def _of_op(
    graph: Graph, op: Op, value: Mapping[object, object], *, several: bool = False
) -> Iterator[tuple[SiteId, Precision | None]]:
    """What a mapping says of an op's sites; of several ops, those without a role are passed over."""
    for role, text in value.items():
        if role not in _BY_ROLE or not isinstance(text, str):
            raise InputError(
                f"overrides: {op.id!r}: {role!r}: {text!r} isn't understood; allowed keys: {', '.join(_BY_ROLE)}, "
                "each with a type or 'float'"
            )
        where = f"{op.id!r}: {role}"
        if role == "activations":
            for tensor in op.outputs:
                if graph.tensors[tensor].is_float:
                    yield tensor, _precision(where, text, blocks=False)
            continue
        param = op.params.get(ParamRole.WEIGHT if role == "weights" else ParamRole.BIAS)
        if param is None and several:
            continue
        if param is None:
            raise InputError(f"overrides: op {op.id!r} ({op.type}) has no {role}")
        yield param, _precision(where, text, blocks=True)


def _precision(where: str, text: str, *, blocks: bool) -> Precision | None:
    try:
        precision = Precision.or_float(text, text)
        if precision is None:
            return None
        return precision.for_weights(text) if blocks else precision.for_activations(text)
    except InputError as error:
        raise InputError(f"overrides: {where}: {error}") from None


def _near(graph: Graph, name: str) -> str:
    known = [*(op.id for op in graph), *graph.tensors, *graph.params]
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
