"""`visualize`: weights and activations before and after a technique, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Session, Tap
from bitwright.calibration import collect
from bitwright.data import DataLike
from bitwright.errors import InputError
from bitwright.files import make_directory, write_text
from bitwright.graph import Graph, ParamRole
from bitwright.grids import PerChannel, to_groups
from bitwright.progress import Progress, shows_progress
from bitwright.report import Record, parts
from bitwright.simulation import QuantSim
from bitwright.statistics import ChannelMoments, HistogramStatistic, RangeStatistic, Request, Source
from bitwright_analysis.analyzer import opened
from bitwright_analysis.distributions import BINS, cumulative, span_of, thinning
from bitwright_analysis.scoring import decibels

SERIES = ("before", "after")


class Change(Record):
    """What happened to one weight or activation.

    Attributes:
        name: the parameter or tensor.
        kind: its role ("weight", "bias", …), or "activation".
        op: the op that owns or computes it.
        low_before … high_after: its range.
        uneven_before, uneven_after: range of the widest channel over that of the median one; null without channels.
        sqnr_db: of the difference, with before as the signal; null where nothing changed, or for activations.
    """

    name: str
    kind: str
    op: str
    low_before: float
    high_before: float
    low_after: float
    high_after: float
    uneven_before: float | None
    uneven_after: float | None
    sqnr_db: float | None = None


class Visualization(Record):
    """What `visualize` found.

    Attributes:
        changes: parameters, then activations, in the order of the network.
        gone, new: names that only one of both has (folded batch norms, added biases).
        file: the page; null if none was written.
    """

    changes: tuple[Change, ...]
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    file: str | None = None


class _Seen:
    """Values of one tensor as they are drawn."""

    def __init__(
        self,
        first: float,
        width: float,
        counts: NDArray[np.integer],
        low: NDArray[Any],
        high: NDArray[Any],
        mean: NDArray[Any],
        deviation: NDArray[Any],
    ) -> None:
        self.first, self.width, self.counts = first, width, counts
        self.low, self.high, self.mean, self.deviation = low, high, mean, deviation

    @property
    def uneven(self) -> float | None:
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        alive = size[size > 0]
        return float(alive.max() / np.median(alive)) if len(size) > 1 and len(alive) else None

    def shown(self, note: str) -> dict[str, Any]:
        from bitwright_analysis.site_browser import shown

        inner = (
            (self.mean - self.deviation).clip(self.low, self.high),
            (self.mean + self.deviation).clip(self.low, self.high),
        )
        return shown(
            first=self.first,
            width=self.width,
            counts=self.counts.tolist(),
            low=self.low.tolist(),
            high=self.high.tolist(),
            unit="value",
            note=note,
            inner=(inner[0].tolist(), inner[1].tolist()),
        )


@shows_progress
def visualize(
    before: Any,
    after: Any,
    data: DataLike | None = None,
    *,
    out: str | Path | None = None,
    sample: Any = None,
    names: tuple[str, str] = SERIES,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Visualization:
    """Draw parameters, and with `data` activations, of a model before and after a change, each over the other.

    Args:
        before, after: models, paths or `QuantSim`s (their float model is drawn).
        data: samples, to draw activations too.
        out: the page (.html); needs the extra "report". None writes nothing.
        sample: one batch, for frameworks that trace a model.
        names: what the two are called.
        batch_size, limit: of the data.
        progress: where progress is shown; default: as bars on a terminal, nowhere else.

    Raises:
        InputError: the two have nothing in common, or the data don't fit.
        MissingExtraError: `out` is given, but Bokeh isn't installed.
    """
    if out is not None:
        from bitwright_analysis.plots import require_bokeh

        require_bokeh()
    sims = [opened(model, None if isinstance(model, QuantSim) else sample, {}, progress) for model in (before, after)]
    sites: dict[str, list[dict[str, Any]]] = {}
    changes = list(_parameters(sims, sites))
    activations: dict[str, list[dict[str, Any]]] = {}
    if data is not None:
        changes += _activations(sims, data, activations, batch_size, limit)
    if not changes:
        raise InputError(
            "the two models have no parameter or tensor of the same name and shape, so nothing can be compared"
        )
    have = [set(sim.graph.params) | (set(sim.graph.tensors) if data is not None else set()) for sim in sims]
    result = Visualization(
        changes=tuple(changes), gone=tuple(sorted(have[0] - have[1])), new=tuple(sorted(have[1] - have[0]))
    )
    if out is None:
        return result
    page = Path(out)
    if page.suffix != ".html":
        raise InputError(f"out={str(out)!r}: the page is an .html file")
    make_directory(page.parent)
    models = tuple(sim.source.name if sim.source is not None else type(sim.native).__name__ for sim in sims)
    write_text(page, _render(result, sites, activations, names, models))
    return result.model_copy(update={"file": str(page)})


def _parameters(sims: Sequence[QuantSim], sites: dict[str, list[dict[str, Any]]]) -> list[Change]:
    first, second = sims
    found = []
    for name, param in first.graph.params.items():
        other = second.graph.params.get(name)
        if other is None or other.shape != param.shape or not param.shape:
            continue
        pair = [np.asarray(sim.params[name]) for sim in sims]
        role = _role(first.graph, name)
        per_channel = role is ParamRole.WEIGHT
        seen = [_of_values(values, per_channel=per_channel) for values in pair]
        noise = float(np.square(pair[1].astype(np.float64) - pair[0]).sum())
        power = float(np.square(pair[0].astype(np.float64)).sum())
        users = first.graph.users(name)
        change = _change(name, role.value if role else "parameter", users[0].id if users else "", seen)
        found.append(change.model_copy(update={"sqnr_db": decibels(noise / power) if power > 0 else None}))
        sites[name] = _drawn(seen)
    return found


def _role(graph: Graph, param: str) -> ParamRole | None:
    return next((r for op in graph.users(param) for r, p in op.params.items() if p == param), None)


def _of_values(values: NDArray[np.float32], *, per_channel: bool) -> _Seen:
    groups = to_groups(values, PerChannel(0)) if per_channel else values.reshape(1, -1)
    counts, edges = np.histogram(values, BINS, span_of(float(values.min()), float(values.max())))
    return _Seen(
        float(edges[0]),
        float(edges[1] - edges[0]),
        counts,
        groups.min(axis=1),
        groups.max(axis=1),
        groups.mean(axis=1, dtype=np.float64),
        groups.std(axis=1, dtype=np.float64),
    )


def _activations(
    sims: Sequence[QuantSim], data: DataLike, drawn: dict[str, list[dict[str, Any]]], batch_size: int, limit: int | None
) -> list[Change]:
    tensors = [
        t
        for op in sims[0].graph
        for t in op.outputs
        if t in sims[0].graph.tensors and sims[0].graph.tensors[t].is_float and t in sims[1].graph.tensors
    ]
    collected = [_collected(sim, tensors, data, batch_size, limit) for sim in sims]
    found = []
    for t in tensors:
        seen = [each[t] for each in collected]
        producer = sims[0].graph.producer(t)
        found.append(_change(t, "activation", producer.id if producer else "", seen))
        drawn[t] = _drawn(seen)
    return found


def _collected(
    sim: QuantSim, tensors: Sequence[str], data: DataLike, batch_size: int, limit: int | None
) -> dict[str, _Seen]:
    requests = []
    for t in tensors:
        step, axis = thinning(sim.graph.tensors[t].shape), sim.graph.tensors[t].channel_axis
        memory = HistogramStatistic.bytes_for()
        requests.append(Request(f"values\0{t}", (t,), lambda s=step: HistogramStatistic(step=s), memory=memory))  # type: ignore[misc]
        requests.append(Request(f"moments\0{t}", (t,), lambda a=axis: ChannelMoments(a)))  # type: ignore[misc]
        requests.append(Request(f"range\0{t}", (t,), lambda a=axis: RangeStatistic(a, reduction="none")))  # type: ignore[misc]

    def open_session(source: Source, taps: Sequence[Tap]) -> Session:
        return sim.backend.session(sim.native, taps)

    dataset = sim.open(data, batch_size=batch_size, limit=limit)
    statistics: Mapping[str, Any] = collect(requests, open_session, dataset, progress=sim.progress)
    found = {}
    for t in tensors:
        values, moments, span = (statistics[f"{kind}\0{t}"] for kind in ("values", "moments", "range"))
        low, high = np.atleast_1d(span.low), np.atleast_1d(span.high)
        first, last = span_of(float(low.min()), float(high.max()))
        shares = np.diff(cumulative(values, np.linspace(first, last, BINS + 1)))
        counts = np.rint(shares * int(values.total.sum())).astype(np.int64)
        found[t] = _Seen(first, (last - first) / BINS, counts, low, high, moments.mean, np.sqrt(moments.variance))
    return found


def _change(name: str, kind: str, op: str, seen: Sequence[_Seen]) -> Change:
    old, new = seen
    return Change(
        name=name,
        kind=kind,
        op=op,
        low_before=float(old.low.min()),
        high_before=float(old.high.max()),
        low_after=float(new.low.min()),
        high_after=float(new.high.max()),
        uneven_before=old.uneven,
        uneven_after=new.uneven,
    )


def _drawn(seen: Sequence[_Seen]) -> list[dict[str, Any]]:
    return [
        s.shown(f"{word}: {float(s.low.min()):.4g} to {float(s.high.max()):.4g}")
        for word, s in zip(SERIES, seen, strict=True)
    ]


def _render(
    found: Visualization,
    sites: dict[str, list[dict[str, Any]]],
    activations: dict[str, list[dict[str, Any]]],
    names: tuple[str, str],
    models: tuple[str, ...],
) -> str:
    from bitwright_analysis import plots
    from bitwright_analysis.site_browser import browser

    plotted = {}
    for key, drawn, title in (("parameters", sites, "Parameter"), ("activations", activations, "Tensor")):
        if drawn:
            plotted[key] = browser(drawn, names, title=title)
    weights = [c for c in found.changes if c.kind == "weight" and c.uneven_before and c.uneven_after]
    if weights:
        plotted["uneven"] = plots.two_columns(
            [c.name for c in weights],
            [c.uneven_before for c in weights],
            [c.uneven_after for c in weights],
            labels=names,
            axis="widest over median channel",
        )
    head, script, elements = plots.embedded(plotted)
    caption = "Histogram of all values; for each channel its range (line) and mean ± deviation (box)."
    changed = [c for c in found.changes if c.sqnr_db is not None]
    told = f"{len(changed)} of {sum(c.kind != 'activation' for c in found.changes)} parameters changed"
    if changed:
        most = min(changed, key=lambda c: c.sqnr_db or 0.0)
        told += f", {most.name} most: {most.sqnr_db:.1f} dB of signal to difference"
    sections = [f"<section><p class=verdict>{escape(told)}.</p></section>"]
    if "uneven" in elements:
        sections.append(
            parts.section(
                "Channels of weights", parts.figure(elements["uneven"], "1 is even: every channel uses the range.")
            )
        )
    for key, title in (("parameters", "Parameters"), ("activations", "Activations")):
        if key in elements:
            sections.append(parts.section(title, parts.figure(elements[key], caption)))
    columns = (
        "Name",
        "Kind",
        "Op",
        "Low before",
        "High before",
        "Low after",
        "High after",
        "Uneven before",
        "Uneven after",
        "Difference dB",
    )
    rows = [
        (
            c.name,
            c.kind,
            c.op,
            c.low_before,
            c.high_before,
            c.low_after,
            c.high_after,
            c.uneven_before,
            c.uneven_after,
            c.sqnr_db,
        )
        for c in found.changes
    ]
    sections.append(parts.section("All", parts.table(columns, rows)))
    for title, listed in ((f"Only {names[0]}", found.gone), (f"Only {names[1]}", found.new)):
        if listed:
            sections.append(parts.section(title, f"<p>{escape(', '.join(listed))}</p>"))
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = " · ".join((*(f"{name}: {model}" for name, model in zip(names, models, strict=True)), created))
    return parts.page(f"{names[0]} and {names[1]}", subtitle, [*sections, script], head=head)
