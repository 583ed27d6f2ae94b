"""Techniques: pure functions in the core's terms, written once for every framework.

A technique sees a graph, parameters, statistics and encodings, and returns new ones. It never sees a
framework object. Third parties implement `Technique` and register a `TechniqueInfo` (see `hookspecs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitwright.backend import Batch, Capability, Params, Pullback
from bitwright.errors import InputError
from bitwright.graph import Edit, Graph, Op, OpId, ParamId, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId
from bitwright.progress import Progress, Store
from bitwright.statistics import LayerMoments, Request, Statistic
from bitwright.tables import Table, Value, shown

SHOWN = 40
"""Rows of a report on a terminal."""
NO_REPORT = "nothing was applied yet"


class Settings(BaseModel):
    """Base of all techniques' settings: unknown keys are refused, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerwiseSettings(Settings):
    """Settings of techniques that solve one layer after another on the second moments of its input.

    Attributes:
        moments_gib: memory that the moments of one layer may take, in GiB; a layer beyond it is named, and solved in
            blocks of its input channels that don't make up for one another's errors; in none, or by a technique that
            takes none, it stays rounded to nearest. K input features (channels times kernel positions) take 8 K² bytes
            where inputs are those of the float network, 24 K² where quantized ones are compared with them.
        thin: of each sample, count one position (of an image, one token) for every so many input features of a layer, 4
            at least, spread evenly, in place of all. A layer with K features then sees K/`thin` columns of each sample,
            so that many samples are needed: 100 with `thin` 16 give 6 columns a feature. Layers that come to fewer than
            4 a feature are named in a warning. A bank has the moments that it was collected with.
    """

    moments_gib: float = Field(2.0, gt=0)
    thin: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Report:
    """What a technique did: one summary line, figures, and a table with a row for each thing it touched."""

    summary: str
    figures: Mapping[str, float] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()

    def __str__(self) -> str:
        table = self._table()
        left = len(table.rows) - SHOWN
        lines = [self.summary, *self._told()]
        if table.rows:
            lines.append(str(Table(table.columns, table.rows[:SHOWN])))
        if left > 0:
            lines.append(f"… and {left} more in rows")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        told = "<br>".join(map(escape, (self.summary, *self._told())))
        table = self._table()
        return f"<div>{told}{table.html() if table.rows else ''}</div>"

    def _told(self) -> list[str]:
        """The figures, in a line."""
        return [", ".join(f"{name} {shown(value)}" for name, value in self.figures.items())] if self.figures else []

    def _table(self) -> Table:
        columns = self.columns or tuple("" for _ in self.rows[0]) if self.rows else self.columns
        return Table(columns, tuple(tuple(map(_cell, row)) for row in self.rows))


class Reports(tuple[tuple[str, Report], ...]):
    """What each technique did, in order, by its name: `QuantSim.reports`."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(f"{name}: {report}" for name, report in self) or NO_REPORT

    def _repr_html_(self) -> str:
        told = [f"<strong>{escape(name)}</strong>{report._repr_html_()}" for name, report in self]
        return f"<div>{''.join(told) or escape(NO_REPORT)}</div>"


def _cell(value: object) -> Value:
    """A value of a report's row as one of a table's."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


@dataclass(frozen=True)
class Outcome:
    """A technique's result; empty fields mean "unchanged".

    Attributes:
        params: new parameter values, canonical layout.
        encodings: new encodings. Calibration replaces them, unless they are `frozen`, as those of weights that lie on
            their grid already, or `kept`: scales that were searched, which later techniques may search again.
        edits: graph edits, applied before `params` are set.
        folded: (γ, β) of the batch norm that each linear op has absorbed, so that its output is about N(β, γ²)
            in each channel; entries replace those that `Context.folded` had.
        overrides: types of what the edits add, as `QuantSim(overrides=…)` takes them; what the user has said of the
            same names goes before.
    """

    params: Params = field(default_factory=dict)
    encodings: Mapping[SiteId, Encoding] = field(default_factory=dict)
    edits: Sequence[Edit] = ()
    folded: Mapping[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report("nothing to do"))
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Layer:
    """One linear op in a layer-by-layer walk, with the moments of its input.

    Attributes:
        op: the op.
        weight: float weight, canonical layout.
        bias: float bias (out,), or None.
        moments: of its input rows, in the float network (x) and in the network quantized so far (x̂).
        encoding: the weight's current encoding.
    """

    op: Op
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    moments: LayerMoments
    encoding: Encoding


@dataclass(frozen=True)
class LayerResult:
    """What a technique made of a layer: new weight and encoding, and a new bias or None to leave it.

    Attributes:
        left: set by the walk where the layer couldn't be solved: why, in words. Its weight is rounded to nearest then,
            and its encoding the one that came in.
        extra: what else the technique has found of the layer, by name; stored with it.
    """

    weight: NDArray[np.float32]
    encoding: Encoding
    bias: NDArray[np.float32] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    left: str = ""
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


Solve = Callable[[Layer], LayerResult]
"""Finds a layer's new numbers from its moments. Workers can solve what is a function of a module, or a `partial` or an
object of one; a closure is called here."""


class LayerWalk(Protocol):
    """Visits linear ops in topological order; each sees its input as the replaced layers before it make it."""

    def __call__(
        self,
        ops: Sequence[OpId],
        solve: Solve,
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
        products: bool = True,
        residuals: bool = False,
        moments_gib: float | None = None,
        column_blocks: bool = False,
        thin: int | None = None,
    ) -> Mapping[OpId, LayerResult]:
        """Run `solve` on each op, resuming finished ones from the store.

        A layer whose moments are too large, or on which `solve` fails numerically (numpy's LinAlgError and
        FloatingPointError, a weight that isn't finite), is named in a warning, its result says why (`left`), and the
        walk goes on.

        Args:
            quantized_inputs: x̂ comes from the network with the layers so far replaced; otherwise x̂ = x.
            quantized_activations: activation encodings are active in the network that gives x̂.
            residuals: where a layer's output is added to a tensor that is known by then (a skip connection), observe
                that tensor's error too (`LayerMoments.residual`), so that the layer can make up for it.
            products: collect second moments; without them `layer.moments` has means only, at a fraction of the cost.
            moments_gib: memory that one layer's moments may take, see `LayerwiseSettings`; None for the default.
            column_blocks: `solve` takes moments in blocks (`LayerMoments.blocks`), which those that are too large are
                collected in then; such layers are named in a warning, and have the figure `blocks`.
            thin: features of a layer for each position that is counted, see `LayerwiseSettings`; None for all
                positions, or on a bank for those that it has.
        """


@dataclass(frozen=True)
class Span:
    """A part of the network between two cuts.

    Attributes:
        name: for people.
        ops: linear ops whose weights are to be learned, in topological order.
        feeds: the activations, and model inputs, that it is computed from.
        taps: what it hands on.
    """

    name: str
    ops: tuple[OpId, ...]
    feeds: tuple[TensorId, ...]
    taps: tuple[TensorId, ...]


@dataclass(frozen=True)
class Block:
    """One span of a block-by-block walk, with all calibration data.

    Attributes:
        span: which.
        weights: float weights of its ops, canonical layout, by parameter.
        encodings: their current ones, by parameter.
        count: batches.
        inputs: the i-th batch of feeds, as the network makes them that has been quantized so far.
        targets: the i-th batch of what the float network hands on.
        network: the simulated span as a function of its weights.
    """

    span: Span
    weights: Mapping[ParamId, NDArray[np.float32]]
    encodings: Mapping[ParamId, Encoding]
    count: int
    inputs: Callable[[int], Batch]
    targets: Callable[[int], Mapping[TensorId, NDArray[Any]]]
    network: Pullback


class BlockWalk(Protocol):
    """Visits spans of the network in order; each sees its inputs as the replaced weights before it make them."""

    def __call__(
        self,
        spans: Sequence[Span],
        solve: Callable[[Block], Mapping[OpId, LayerResult]],
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
    ) -> Mapping[OpId, LayerResult]:
        """Run `solve` on each span, resuming finished ones from the store.

        Args:
            spans: one behind another.
            solve: the new weight and encoding of each op of the span.
            quantized_inputs: the feeds come from the network with the weights so far replaced; otherwise they are
                those of the float network.
            quantized_activations: activation encodings are active, in the span and before it.

        Raises:
            CapabilityError: the backend isn't `Differentiable`.
            InputError: the calibration data are empty.
        """


S = TypeVar("S", bound=Settings)


def _no_branches(op: OpId) -> str:
    return "the backend puts no ops beside others"


@dataclass(frozen=True)
class Context(Generic[S]):
    """All that a technique may see.

    Attributes:
        graph, plan: of the current model.
        encodings: in force now; weights always have one where the plan quantizes them.
        statistics: the requested ones, by key.
        settings: the technique's own, validated.
        walk: the layer-by-layer service (needs calibration data).
        blocks: the block-by-block service (needs calibration data themselves, and a `Differentiable` backend).
        store, progress: durability and display.
        seed: of the run.
        folded: what batch-norm folding left behind, by op: (γ, β) of the batch norm it absorbed, after later scaling.
        branch_obstacle: why an op can't be given a branch (`graph.AddBranch`), in words; "" if it can.
    """

    graph: Graph
    plan: Plan
    params: Params
    encodings: Mapping[SiteId, Encoding]
    statistics: Mapping[str, Statistic]
    settings: S
    walk: LayerWalk | None
    store: Store
    progress: Progress
    seed: int = 0
    folded: Mapping[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    blocks: BlockWalk | None = None
    branch_obstacle: Callable[[OpId], str] = _no_branches

    def rng(self, key: str) -> np.random.Generator:
        """A Philox generator keyed by (seed, key): independent of order, resume and batch size."""
        return seeded(self.seed, key)


def seeded(seed: int, key: str) -> np.random.Generator:
    """`Context.rng` where the context isn't at hand, such as in another process."""
    import hashlib

    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@runtime_checkable
class Technique(Protocol):
    """One technique. Instances hold no state between calls."""

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]
    requires: ClassVar[frozenset[Capability]]

    def statistics(self, graph: Graph, plan: Plan, settings: Any) -> Iterable[Request]:
        """What it needs from the one streaming pass over the calibration data."""

    def apply(self, ctx: Context[Any]) -> Outcome:
        """Compute the change; the context is not modified."""


@runtime_checkable
class NeedsData(Protocol):
    """What a technique offers that can't work without calibration data though it asks for no statistics."""

    def needs_data(self, settings: Any) -> bool:
        """Whether it is refused without data, before any work, at these settings."""


def frozen_note(ctx: Context[S], sites: Iterable[SiteId] | None = None) -> str:
    """What a report says of encodings that a technique had to leave alone: "5 weights are frozen (adaround)".

    Args:
        ctx: of the technique.
        sites: those that it would have worked on; None for the weights of all linear ops.

    Returns:
        Empty where none is frozen.
    """
    if sites is None:
        sites = [op.weight for op in ctx.graph.linear_ops if op.weight is not None]
    found = {s: e for s in dict.fromkeys(sites) if (e := ctx.encodings.get(s)) is not None and e.frozen}
    if not found:
        return ""
    who = ", ".join(sorted({e.held_by or e.source or "loaded" for e in found.values()}))
    kinds = {"weight" if s in ctx.graph.params else "activation" for s in found}
    what = (kinds.pop() if len(kinds) == 1 else "encoding") + ("s are" if len(found) > 1 else " is")
    return f"{len(found)} {what} frozen ({who})"


def require_data(technique: Technique, requests: Iterable[Request], settings: object) -> None:
    """Refuse a technique that needs calibration data where there are none.

    Args:
        technique: the technique.
        requests: its `statistics`.
        settings: its own, validated.

    Raises:
        InputError: it needs some.
    """
    if any(not r.optional for r in requests) or (isinstance(technique, NeedsData) and technique.needs_data(settings)):
        raise InputError(_no_data(technique.name))


def walk_of(ctx: Context[S], technique: str) -> LayerWalk:
    """The layer-by-layer service.

    Raises:
        InputError: there are no calibration data.
    """
    if ctx.walk is None:
        raise InputError(_no_data(technique))
    return ctx.walk


def blocks_of(ctx: Context[S], technique: str) -> BlockWalk:
    """The block-by-block service.

    Raises:
        InputError: there are no calibration data, or a bank's statistics in their place.
    """
    if ctx.blocks is None and ctx.walk is not None:
        raise InputError(f"{technique} runs parts of the network on calibration data: a bank has none; pass the data")
    if ctx.blocks is None:
        raise InputError(_no_data(technique))
    return ctx.blocks


def _no_data(technique: str) -> str:
    return f"{technique} needs calibration data; pass some, for example 250 samples"


@dataclass(frozen=True)
class Step:
    """A technique with its settings, as a recipe lists it."""

    technique: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Steps in order. Also a file: YAML or JSON, a list of names or of one-key mappings name → settings."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)
