"""Range setting for a whole plan: weights from their values, activations from one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Params, Part, PartialExecution, Session, Tap
from bitwright.calibration._collect import collect
from bitwright.calibration._schemes import calibrate_array, scheme
from bitwright.calibration._step import in_parts
from bitwright.data import Dataset
from bitwright.errors import EncodingError
from bitwright.graph import Graph, SetParams, Tensor, TensorId
from bitwright.grids import (
    Dynamic,
    Encoding,
    EncodingTable,
    Granularity,
    PerChannel,
    PerTensor,
    QuantSpec,
    dynamic_encoding,
    two_level,
)
from bitwright.placement import Derived, OwnForms, Plan, SiteId
from bitwright.progress import Progress
from bitwright.statistics import HistogramStatistic, Request, Source, Statistic

ROUNDED_BYTES = 2**26
"""Rounded weights that are held beside a model while they are put into it."""
COUNTED = 2**13
"""Values of each sample that a histogram counts, or somewhat fewer (`sampled`), where a tensor has so many."""
LIMIT = 2**30
"""Largest magnitude that an int32 bias code may have: the other half of the accumulator's range is for the products,
which wrap around otherwise (8-bit operands: 2**30 holds the sums of 32 768 of them)."""


def weight_encodings(plan: Plan, params: Params, kept: EncodingTable) -> dict[SiteId, Encoding]:
    """Encodings of every parameter site with a specification that `kept` doesn't have already."""
    return {site: weight_encoding(plan, site, params) for site in plan.parameters if site not in kept}


def weight_encoding(plan: Plan, site: SiteId, params: Params) -> Encoding:
    """The encoding that a parameter's values give it.

    Raises:
        EncodingError: they give it none.
    """
    spec = plan.spec(site)
    assert spec is not None
    try:
        return two_level(calibrate_array(params[site], spec, plan.weight_scheme_of(site)))
    except EncodingError as error:
        raise EncodingError(f"parameter {site!r}: {error}") from None


def dynamic_encodings(plan: Plan, kept: EncodingTable) -> dict[SiteId, Encoding]:
    """Encodings of every activation whose range is found at run time and that `kept` doesn't have already."""
    found = {s: _at_run_time(plan, s) for s in plan.activations if s not in kept}
    return {s: dynamic_encoding(spec) for s, spec in found.items() if spec is not None}


def activation_encodings(
    backend: Backend[Any],
    model: object,
    plan: Plan,
    params: Params,
    encodings: EncodingTable,
    data: Dataset,
    progress: Progress,
) -> dict[SiteId, Encoding]:
    """Encodings of every activation site with a specification of its own, unless frozen or kept.

    Statistics are taken from the network with quantized weights and float activations: what a site sees depends on
    the weights that the target has, and not on ranges that aren't set yet.
    """
    graph = backend.graph(model)
    wanted = to_calibrate(plan, encodings)
    if not wanted:
        return {}
    requests = activation_requests(graph, plan, wanted)

    def open_session(source: Source, taps: Sequence[Tap]) -> Session:
        return backend.session(quantized_weights(backend, model, encodings), taps)

    @cache
    def rounded() -> object:
        return quantized_weights(backend, model, encodings)

    def open_part(source: Source, part: Part, feeds: Sequence[TensorId] | None, taps: Sequence[Tap]) -> Session:
        if large:
            network = quantized_weights(backend, model, {s: e for s, e in encodings.items() if s in part.params})
        else:
            network = rounded()  # once for all stages
        if feeds is None:
            return backend.session(network, taps)
        assert isinstance(backend, PartialExecution)
        return backend.segment(network, feeds, taps)

    divided = in_parts(backend, graph, open_part)
    large = divided is not None and len(divided.parts) > 1
    found: dict[SiteId, Encoding] = {}
    known: dict[str, Statistic] = {}

    def finished(key: str, statistic: Statistic) -> None:
        """Choose a site's grid when all of its tensors have been seen, so that no more histograms are held."""
        known[key] = statistic
        site = key.split("\0", maxsplit=1)[0]
        keys = [f"{site}\0{t}" for t in plan.observed(site)]
        if all(k in known for k in keys):
            found.update(activation_grids(plan, [site], {k: known.pop(k) for k in keys}))

    collect(requests, open_session, data, progress=progress, divided=divided, finished=finished)
    return {site: found[site] for site in wanted}


def to_calibrate(plan: Plan, encodings: EncodingTable) -> list[SiteId]:
    """Activation sites with a range to be found on data, unless frozen or kept."""
    held = {s for s, e in encodings.items() if e.frozen or e.kept}
    return [s for s in plan.activations if s not in held and _at_run_time(plan, s) is None]


def _at_run_time(plan: Plan, site: SiteId) -> QuantSpec | None:
    """The specification of a site whose range is found at run time."""
    spec = plan.spec(site)
    return spec if spec is not None and isinstance(spec.granularity, Dynamic) else None


def activation_grids(
    plan: Plan, sites: Sequence[SiteId], statistics: Mapping[str, Statistic]
) -> dict[SiteId, Encoding]:
    """The encodings that the plan's schemes choose on finished statistics, those of `activation_requests`.

    Raises:
        EncodingError: a statistic doesn't do for its site, which is named.
    """

    def encoding(site: SiteId) -> Encoding:
        spec = plan.spec(site)
        assert spec is not None
        first, *others = (statistics[f"{site}\0{t}"] for t in plan.observed(site))
        for other in others:
            first.merge(other)
        try:
            return scheme(plan.scheme_of(site)).encoding(first, spec)
        except EncodingError as error:
            raise EncodingError(f"tensor {site!r}: {error}") from None

    # One after another: a search is many operations on small arrays, for which threads only wait for each other.
    return {site: encoding(site) for site in sites}


def activation_requests(graph: Graph, plan: Plan, sites: Sequence[SiteId]) -> list[Request]:
    """The statistics that the calibration of these sites takes; keys are site and tensor."""
    requests = []
    for site in sites:
        spec = plan.spec(site)
        assert spec is not None
        strategy = scheme(plan.scheme_of(site))
        make = strategy.statistic(spec)
        ends = strategy.keeps_ends(spec)
        # A grid that several tensors share must cover the values of all of them.
        requests += [
            Request(f"{site}\0{t}", (t,), sampled(make, graph.tensors[t], extremes=ends)) for t in plan.observed(site)
        ]
    return requests


def sampled(make: Callable[[], Statistic], tensor: Tensor, *, extremes: bool = False) -> Callable[[], Statistic]:
    """Histograms of large tensors count every step-th value, about `COUNTED` of each sample.

    The step has no divisor in common with any dimension, so that rows, columns and channels are met alike: it is the
    next such number after size / `COUNTED`, so that somewhat fewer values may be counted (7,923 of 3 · 224 · 224). With
    `extremes` they know the largest value of all nevertheless.
    """
    shape = tensor.shape
    if shape is None or len(shape) < 2 or None in shape[1:]:
        return make
    sizes = [d for d in shape[1:] if d is not None]
    step = max(1, int(np.prod(sizes)) // COUNTED)
    while step > 1 and any(gcd(step, d) > 1 for d in sizes):
        step += 1

    def sampled() -> Statistic:
        statistic = make()
        if isinstance(statistic, HistogramStatistic) and statistic.axis is None:
            statistic.step, statistic.layout = step, tensor.channel_axis
            statistic.extremes = extremes and step > 1
        return statistic

    return sampled


def quantized_weights(backend: Backend[Any], model: object, encodings: Mapping[SiteId, Encoding]) -> object:
    """The model with its weights rounded to their grids.

    They are set some at a time, so that beside the model's own copy there are never more than `ROUNDED_BYTES` of them,
    or one.
    """
    known = backend.graph(model).params
    rounded: dict[SiteId, NDArray[np.floating]] = {}
    held = 0
    for site in (s for s in encodings if s in known):
        rounded[site] = encodings[site].fake_quantize(np.asarray(backend.read(model, [site])[site]))
        held += rounded[site].nbytes
        if held >= ROUNDED_BYTES:
            model, rounded, held = backend.edit(model, [SetParams(rounded)]), {}, 0
    return backend.edit(model, [SetParams(rounded)])


def full_table(plan: Plan, encodings: EncodingTable) -> EncodingTable:
    """One encoding for every quantized site: shared ones resolved, int32 biases derived.

    Raises:
        EncodingError: a site that has to be calibrated isn't; the message names it.
    """
    table: dict[SiteId, Encoding] = {}
    for site in plan.quantized:
        decision = plan[plan.root(site)].decision
        if isinstance(decision, Derived):
            continue
        root = plan.root(site)
        if root not in encodings:
            raise EncodingError(f"site {root!r} has no encoding yet: call calibrate(data) first")
        encoding = encodings[root]
        table[site] = encoding if site == root else encoding.with_(source=f"shared with {root}")
    for site in plan.quantized:
        decision = plan[plan.root(site)].decision
        if isinstance(decision, Derived):
            bias = bias_encoding(*(table[s] for s in decision.sites))
            if bias is not None:
                table[site] = bias
    return EncodingTable(table, encodings.provenance)


def guarded(plan: Plan, encodings: EncodingTable, params: Params) -> EncodingTable:
    """Raise weight scales so that every int32 bias fits: s_w ≥ |bias| / (s_input · 2**30).

    It touches only channels whose weights are negligible beside their bias (all-zero channels are common in trained
    depthwise layers), where an integer accumulator could not hold the bias otherwise. Without it the runtime clips.
    """
    changed: dict[SiteId, Encoding] = {}
    for site in plan:
        decision = plan[site].decision
        uses = decision.uses if isinstance(decision, OwnForms) else ()
        if isinstance(decision, Derived):
            uses = ((decision.sites[0], decision.sites[1]),)
        for inputs, weight in ((plan.root(i), plan.root(w)) for i, w in uses):
            if inputs in encodings and weight in encodings:
                before = changed.get(weight, encodings[weight])
                after = _holding(np.asarray(params[site], np.float64), encodings[inputs], before)
                if after is not before:
                    changed[weight] = after
    return encodings.merged(changed) if changed else encodings


def _holding(bias: NDArray[np.float64], inputs: Encoding, weight: Encoding) -> Encoding:
    """The weight's encoding, with scales raised where the accumulator couldn't hold the bias."""
    if inputs.float_format or weight.float_format or inputs.scale.ndim or weight.scale.ndim == 2:
        return weight
    needed = np.abs(bias) / (float(inputs.scale) * LIMIT) * (1 + 1e-6)
    needed = needed.max() if weight.scale.ndim == 0 else needed
    if not (needed > weight.scale).any():
        return weight
    return weight.with_(scale=np.maximum(weight.scale, needed).astype(np.float32))


def bias_encoding(inputs: Encoding, weight: Encoding) -> Encoding | None:
    """The int32 grid of an integer accumulator: scale = s_input · s_weight for each output channel, zero point 0.

    None where an operand isn't an integer grid with one weight scale for each channel (LPBQ counts: its channel scale).
    """
    if inputs.float_format or weight.float_format or inputs.scale.ndim:
        return None  # a range at run time has no scale before
    per_channel = weight.scale
    if per_channel.ndim == 2:
        if weight.block_scale is None:
            return None
        per_channel = (weight.scale[:, 0] / weight.block_scale[:, 0]).astype(np.float32)
    scale = np.maximum(np.asarray(inputs.scale * per_channel, np.float32), np.finfo(np.float32).tiny)
    layout: Granularity = PerTensor() if scale.ndim == 0 else PerChannel(0)
    return Encoding(32, True, True, scale, np.zeros(scale.shape, np.int32), layout, source="bias")


def fits_accumulator(bias: NDArray[Any], inputs: NDArray[Any], weight: NDArray[Any]) -> bool:
    """Whether a float bias has an int32 form at s_input · s_weight.

    Args:
        bias: one value for each output channel, or any other array where there is one weight scale.
        inputs, weight: the scales of the operands' grids; one for each output channel, or others (the least counts).
    """
    magnitudes = np.abs(np.asarray(bias, np.float64))
    least = np.asarray(weight, np.float64) if np.shape(weight) == magnitudes.shape else float(np.min(weight))
    return bool((magnitudes <= (2.0**31 - 1) * float(np.min(inputs)) * least).all())
