"""The user's exceptions by op or by site, checked against the graph."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpId, ParamRole
from bitwright.placing.precision import Precision
from bitwright.plan import SiteId

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


def parse_overrides(graph: Graph, wanted: Mapping[str, object]) -> Overrides:
    """Read overrides: ``{"conv1": "float", "conv2": {"weights": "int4"}, "some tensor": "uint16"}``.

    "float" for an op makes it run in float: its parameters stay float, and its outputs are quantized only where a
    quantized op reads them. A name that is both an op's and a tensor's means the op for "float" and for mappings, the
    tensor for a type. What is said of a site goes before what is said of its op.

    Raises:
        InputError: a name that the graph doesn't have, a role that the op doesn't have, or a value that is no type.
    """
    float_ops: set[OpId] = set()
    by_op: dict[SiteId, Precision | None] = {}
    by_site: dict[SiteId, Precision | None] = {}
    for name, value in wanted.items():
        is_site = name in graph.tensors or name in graph.params
        if name not in graph and not is_site:
            raise InputError(f"overrides: the model has no op or tensor {name!r}{_near(graph, name)}")
        if isinstance(value, str) and value == "float" and name in graph:
            float_ops.add(name)
        elif isinstance(value, str) and is_site:
            by_site[name] = _precision(name, value, blocks=name in graph.params)
        elif isinstance(value, Mapping) and name in graph:
            by_op.update(_of_op(graph, graph.op(name), value))
        else:
            raise InputError(
                f"overrides: {name!r} can't be {value!r}: an op takes 'float' or a mapping such as "
                "{'weights': 'int4', 'activations': 'uint16'}; a tensor or parameter takes 'float' or a type"
            )
    return Overrides(frozenset(float_ops), {**by_op, **by_site})


def _of_op(graph: Graph, op: Op, value: Mapping[object, object]) -> Iterator[tuple[SiteId, Precision | None]]:
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
        if param is None:
            raise InputError(f"overrides: op {op.id!r} ({op.type}) has no {role}")
        yield param, _precision(where, text, blocks=True)


def _precision(where: str, text: str, *, blocks: bool) -> Precision | None:
    if text == "float":
        return None
    try:
        precision = Precision.of(text, text)
        return precision if blocks else precision.for_activations(text)
    except InputError as error:
        raise InputError(f"overrides: {where}: {error}") from None


def _near(graph: Graph, name: str) -> str:
    known = [*(op.id for op in graph), *graph.tensors, *graph.params]
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
