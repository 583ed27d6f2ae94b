"""Activation ranges: for each site, the calibration scheme with the least measured output error.

Min-max keeps outliers and pays with a coarse grid; percentiles, SQNR and MSE clip them; which is better depends on what
reads the tensor. Every candidate's grid is tried on a sample of the inputs of the linear layers that read the site,
``‖Ŵ (Q(x) − x)‖² / ‖Ŵ x‖²``; where no linear layer reads it, on the site's own values, ``‖Q(x) − x‖² / ‖x‖²``. The idea
is that of the output-error search of range setting in Nagel et al. 2021, "A White Paper on Neural Network
Quantization", §3.1 (MSE and cross-entropy criteria), with the reader's weights in place of a fixed criterion.

In networks that normalize tokens, sites that no linear layer reads (the sums before a norm) are left to calibration:
the squared error of their values is that of a few massive tokens (see `token_norms`), which the norm shrinks. On MiniLM
at W8A8 ranges chosen by it cost 4 dB of the embeddings' signal to noise.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, Field

from bitwright.backend import Capability
from bitwright.calibration import Scheme, sampled, scheme
from bitwright.errors import EncodingError, InputError
from bitwright.graph import LINEAR_KINDS, Graph, Op, to_matrix
from bitwright.grids import Encoding, PerTensor, QuantSpec
from bitwright.placement import Plan, SiteId
from bitwright.statistics import HistogramStatistic, Request, Statistic
from bitwright.technique import Context, Outcome, Report, frozen_note
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.input_sample import InputSample, sample_request
from bitwright_techniques.token_norms import normalizes_tokens

_POINTS = 4
"""Values of each histogram bin that stand for it."""


def _known(name: str) -> str:
    try:
        scheme(name)
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


class ActivationRangesSettings(BaseSettings):
    """Settings of `ActivationRanges`.

    Attributes:
        schemes: calibration schemes that are tried; on ties the earlier one wins.
        samples: input rows of each reading layer that errors are measured on.
        include, exclude: names or glob patterns of activation sites; nothing included means all.
    """

    schemes: tuple[Annotated[str, AfterValidator(_known)], ...] = Field(
        ("minmax", "percentile:99.99", "percentile:99.9", "sqnr", "mse"), min_length=1
    )
    samples: int = Field(512, ge=2)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class ActivationRanges:
    """Chooses the calibration scheme of each activation. Apply it last: the encodings it sets are frozen."""

    name: ClassVar[str] = "activation_ranges"
    Settings: ClassVar[type[BaseSettings]] = ActivationRangesSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: ActivationRangesSettings) -> Iterable[Request]:
        """What the schemes need of each site, and samples of the inputs of the layers that read them."""
        sites, _ = _split(graph, plan, _sites(plan, settings))
        for site in sites:
            spec = plan.spec(site)
            assert spec is not None
            for kind, make in _kinds(spec, settings).items():
                ends = make.keeps_ends(spec)
                for t in plan.observed(site):
                    wanted = sampled(make.statistic(spec), graph.tensors[t], extremes=ends)
                    yield Request(_key(kind, site, t), (t,), wanted)
        for op in {op.id: op for site in sites for op in _readers(graph, plan, site)}.values():
            yield sample_request(graph, op, f"sample/{op.id}", settings.samples)

    def apply(self, ctx: Context[ActivationRangesSettings]) -> Outcome:
        """Choose.

        Raises:
            InputError: a pattern that matches no site.
        """
        s = ctx.settings
        free = [site for site in _sites(ctx.plan, s) if not _frozen(ctx, site)]
        sites, left = _split(ctx.graph, ctx.plan, free)
        chosen: dict[SiteId, Encoding] = {}
        rows: list[tuple[object, ...]] = []
        ctx.progress.start("Choosing activation ranges", len(sites))
        for site in sites:
            readers = _readers(ctx.graph, ctx.plan, site)
            candidates = _candidates(ctx, site)
            errors = {name: _error(ctx, site, e, readers) for name, e in candidates.items()}
            best = min(errors, key=lambda name: errors[name])
            chosen[site] = candidates[best].with_(frozen=True)
            judged = ", ".join(op.id for op in readers) or "its own values"
            rows.append((site, best, judged, *(errors[name] for name in s.schemes)))
            ctx.progress.advance(1, site)
        ctx.progress.finish()
        counts = {name: sum(row[1] == name for row in rows) for name in s.schemes}
        split = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        summary = f"ranges of {len(chosen)} activations chosen: {split}" if chosen else "no activation range to choose"
        if left:
            summary += f"; {len(left)} that no linear layer reads are left to calibration, since tokens are normalized"
        if note := frozen_note(ctx, _sites(ctx.plan, s)):
            summary += f"; {note}"
        return Outcome(
            encodings=chosen,
            report=Report(
                summary,
                {
                    "sites": float(len(chosen)),
                    "left": float(len(left)),
                    **{name: float(n) for name, n in counts.items()},
                },
                ("site", "chosen", "judged by", *s.schemes),
                tuple(rows),
            ),
        )


def _sites(plan: Plan, settings: ActivationRangesSettings) -> list[SiteId]:
    """Sites whose range is a matter of choice: integer grids that the target doesn't pin."""
    for pattern in (*settings.include, *settings.exclude):
        if not any(fnmatch.fnmatchcase(site, pattern) for site in plan.activations):
            raise InputError(f"{pattern!r} matches no activation that has a grid of its own; see `plan.activations`")
    found = []
    for site in plan.activations:
        spec = plan.spec(site)
        pinned = spec is None or (spec.minimum is not None and spec.maximum is not None)
        if pinned or spec is None or spec.float_format is not None or not isinstance(spec.granularity, PerTensor):
            continue
        listed = not settings.include or any(fnmatch.fnmatchcase(site, p) for p in settings.include)
        if listed and not any(fnmatch.fnmatchcase(site, p) for p in settings.exclude):
            found.append(site)
    return found


def _split(graph: Graph, plan: Plan, sites: list[SiteId]) -> tuple[list[SiteId], list[SiteId]]:
    """The sites that can be judged, and those that are left to calibration."""
    if not normalizes_tokens(graph):
        return sites, []
    judged = [site for site in sites if _readers(graph, plan, site)]
    return judged, [site for site in sites if site not in judged]


def _readers(graph: Graph, plan: Plan, site: SiteId) -> tuple[Op, ...]:
    """Linear ops whose input has the site's grid."""
    found = {
        op.id: op
        for tensor in plan.tied(site)
        if tensor in graph.tensors
        for op in graph.consumers(tensor)
        if op.kind in LINEAR_KINDS and op.weight is not None and op.data_inputs[0] == tensor
    }
    return tuple(found.values())


def _kinds(spec: QuantSpec, settings: ActivationRangesSettings) -> Mapping[str, Scheme]:
    """A scheme for each kind of statistic that is wanted."""
    found: dict[str, Scheme] = {}
    for name in settings.schemes:
        found.setdefault(_kind(scheme(name), spec), scheme(name))
    return found


def _kind(chosen: Scheme, spec: QuantSpec) -> str:
    statistic = chosen.statistic(spec)()
    if not isinstance(statistic, HistogramStatistic):
        return "range"
    return f"histogram{statistic.precision}" + (" with ends" if chosen.keeps_ends(spec) else "")


def _key(kind: str, site: SiteId, tensor: str) -> str:
    return f"{kind}\0{site}\0{tensor}"


def _merged(ctx: Context[ActivationRangesSettings], kind: str, site: SiteId) -> Statistic:
    first, *others = (ctx.statistics[_key(kind, site, t)] for t in ctx.plan.observed(site))
    if others:
        whole = type(first)(first.axis)  # type: ignore[call-arg]
        whole.restore(first.state())
        for other in others:
            whole.merge(other)
        return whole
    return first


def _frozen(ctx: Context[ActivationRangesSettings], site: SiteId) -> bool:
    return site in ctx.encodings and ctx.encodings[site].frozen


def _candidates(ctx: Context[ActivationRangesSettings], site: SiteId) -> dict[str, Encoding]:
    spec = ctx.plan.spec(site)
    assert spec is not None
    found = {}
    for name in ctx.settings.schemes:
        try:
            found[name] = scheme(name).encoding(_merged(ctx, _kind(scheme(name), spec), site), spec)
        except EncodingError as error:
            raise EncodingError(f"tensor {site!r}: {error}") from None
    return found


def _error(ctx: Context[ActivationRangesSettings], site: SiteId, encoding: Encoding, readers: tuple[Op, ...]) -> float:
    if not readers:
        return _own_error(ctx, site, encoding)
    errors = []
    for op in readers:
        sample = ctx.statistics[f"sample/{op.id}"]
        assert isinstance(sample, InputSample)
        assert op.weight is not None
        weight = np.asarray(ctx.params[op.weight], np.float32)
        if op.weight in ctx.encodings:
            weight = ctx.encodings[op.weight].fake_quantize(weight)
        matrix, x = to_matrix(op, weight), sample.columns
        shift = np.matmul(matrix, encoding.fake_quantize(x) - x)
        power = float(np.square(np.matmul(matrix, x), dtype=np.float64).sum())
        errors.append(float(np.square(shift, dtype=np.float64).sum()) / max(power, float(np.finfo(np.float32).tiny)))
    return float(np.mean(errors))


def _own_error(ctx: Context[ActivationRangesSettings], site: SiteId, encoding: Encoding) -> float:
    """Relative squared error on the histogram of the site's values; its range alone says nothing (0)."""
    spec = ctx.plan.spec(site)
    assert spec is not None
    kinds = [k for k in _kinds(spec, ctx.settings) if k.startswith("histogram")]
    if not kinds:
        return 0.0
    finest = max(kinds, key=lambda k: int(k.removeprefix("histogram").removesuffix(" with ends")))
    histogram = _merged(ctx, finest, site)
    assert isinstance(histogram, HistogramStatistic)
    bins = histogram.bins()
    at = (np.arange(_POINTS) + 0.5) / _POINTS
    values = bins.low[0][:, None] + (bins.high - bins.low)[0][:, None] * at
    mass = bins.count[0][:, None] / _POINTS
    error = np.square(encoding.fake_quantize(values.astype(np.float32)) - values)
    return float((mass * error).sum() / max(float((mass * np.square(values)).sum()), float(np.finfo(np.float32).tiny)))
