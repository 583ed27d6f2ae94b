"""Says in advance what quantizing a model will meet: whether it can be opened, and what stays in float and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.backend import Batch
from bitwright.bundle import risky
from bitwright.errors import ModelError
from bitwright.graph import Graph
from bitwright.placement import Float, Fused, Plan, build_plan
from bitwright.report import plan_widths
from bitwright.targets import Target


@dataclass(frozen=True)
class Finding:
    """One thing to know of.

    Attributes:
        where: the op, tensor or parameter.
        what: what happens there, and the way out where there is one.
        source: the user's source line, if known.
    """

    where: str
    what: str
    source: str | None = None


@dataclass(frozen=True)
class Validation:
    """What `validate` found.

    Attributes:
        opened: whether the model can be quantized at all.
        error: why not.
        notices: restrictions under which it was opened (a fixed batch size, parts left in Python).
        unknown: ops that run in float because no target knows them; they end every pattern too.
        in_float: further sites that the target leaves in float.
        risks: parts of outputs that may be lost on one grid with others.
        notes: fallbacks and exceptions of the target.
        widths: what weights and activations are quantized to, in words.
        ops, sites: number of ops, and of sites that are quantized.
        fused: number of sites that are parts of what the target computes as one op, and rounded with its result.
    """

    opened: bool
    error: str = ""
    notices: tuple[str, ...] = ()
    unknown: tuple[Finding, ...] = ()
    in_float: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    ops: int = 0
    sites: int = 0
    risks: tuple[Finding, ...] = ()
    widths: str = ""
    fused: int = 0

    @property
    def verdict(self) -> str:
        """The answer in a sentence."""
        if not self.opened:
            return f"can't be quantized: {self.error}"
        if self.risks:
            where = ", ".join(f.where for f in self.risks)
            return f"can be quantized, but a part of an output may be lost: look at {where} first"
        if self.unknown:
            left = f"{len(self.unknown)} op{'s' if len(self.unknown) > 1 else ''}"
            return f"can be quantized but for {left} of unknown types"
        return "can be quantized"

    def __str__(self) -> str:
        if not self.opened:
            return self.verdict
        fused = f"; {self.fused} more are fused into others" if self.fused else ""
        lines = [self.verdict, f"{self.ops} ops, {self.sites} quantized sites: {self.widths}{fused}", *self.notices]
        kinds = (
            ("may be lost", self.risks),
            ("in float, unknown to every target", self.unknown),
            ("in float", self.in_float),
        )
        for title, findings in kinds:
            if findings:
                lines.append(f"{title}:")
                lines += [f"  {f.where}: {f.what}" + (f" ({f.source})" if f.source else "") for f in findings]
        return "\n".join([*lines, *self.notes])


def validate(
    model: object,
    sample: Batch | None = None,
    *,
    target: str | Path | Mapping[str, Any] | Target = "default",
    weights: str | None = None,
    activations: str | None = None,
    backend: str | None = None,
) -> Validation:
    """Open a model and plan its quantization, without changing it.

    Args:
        model: a framework's model object, or a path.
        sample: one batch, for frameworks that trace a model.
        target, weights, activations: as `QuantSim` takes them.
        backend: a backend's name, if several could open the model.

    Raises:
        PluginError, MissingExtraError: no backend takes the model.
        InputError: the sample doesn't fit the model, or there is no such file.
        TargetError: the target's configuration is invalid.
    """
    from bitwright.simulation import open_model
    from bitwright.targets import load_target

    chosen = load_target(target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter, native = open_model(model, sample, backend)
        except ModelError as error:
            return Validation(False, str(error))
    notices = tuple(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    graph = adapter.graph(native)
    plan = build_plan(graph, chosen, weights=weights, activations=activations)
    unknown = tuple(
        Finding(op.id, f"{op.native or op.type} has no kind that a target could name", op.source)
        for op in graph.unknown_ops
    )
    return Validation(
        True,
        "",
        notices,
        unknown,
        _in_float(graph, plan, {f.where for f in unknown}),
        plan.notes,
        len(graph),
        len(plan.quantized),
        tuple(Finding(op, what, graph.op(op).source) for op, what in risky(graph, plan)),
        plan_widths(plan),
        sum(isinstance(site.decision, Fused) for site in plan.values()),
    )


def _in_float(graph: Graph, plan: Plan, told: set[str]) -> tuple[Finding, ...]:
    found = []
    for site, entry in plan.items():
        producer = graph.producer(site) if site in graph.tensors else None
        if not isinstance(entry.decision, Float) or isinstance(entry.decision, Fused):
            continue
        if producer is not None and producer.id in told:
            continue
        if site in graph.tensors and not graph.tensors[site].is_float:
            continue
        found.append(Finding(site, entry.decision.reason, producer.source if producer is not None else None))
    return tuple(found)
