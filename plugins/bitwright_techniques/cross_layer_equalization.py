"""Cross-layer equalization: give neighbouring layers equal channel ranges without changing the function.

With r_0 … r_n the largest absolute weights that a channel meets in the layers of a set (output channel of the
first, the channel of the depthwise ones, input channel of the last) and g their geometric mean, layer k of the set
is multiplied by S_(k−1)/S_k, where S_k = Π_(j≤k) r_j / g^k and S_0 … S_n = 1. All its ranges are then g. For two
layers S = √(r_0/r_1), for three S_1 = r_0/g and S_2 = g/r_2 (Nagel et al. 2019, "Data-Free Quantization Through
Weight Equalization and Bias Correction", §4.1).

High-bias absorption (§4.1.3 there) then moves what a bias adds above zero into the next layer:
c = max(0, β − 3·|γ|) before a rectifier, c = β without one; b_1 −= c, b_2 += W_2·c.

A clipped ReLU (ReLU6) is homogeneous only where its bound isn't reached. The paper drops the bound, which some nets
don't survive (EfficientNet-Lite0 falls from 91 % to 66 % in float, a third of its channels reach the bound). Where
it is known how far each channel reaches, the bound stays: channels that reach it keep S = 1, the others stay below
it, S_k ≥ reach / bound, and the rest is as equal as that allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import (
    ConvAttrs,
    Edit,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    PoolAttrs,
    ReplaceActivation,
    TensorId,
)
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report, frozen_note
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.bias_edits import bias_changes
from bitwright_techniques.channel_chains import Chain, Link, bounded, find_chains, input_axis, is_depthwise, output_axis
from bitwright_techniques.clip_reach import clip_requests, clip_rule, reach

Values = NDArray[np.float64]

NEGLIGIBLE = 1e-6
"""Channels with weights below this share of their layer's largest count as zero: scaling them up would only inflate
the bias that they carry."""


SWEEPS = 30
"""Rounds over a set's links; each quarters the distance to the optimum."""

MANTISSA = 12
"""Bits of a measured reach. As measured it differs in the last bits from one framework to another; rounded to a share
of 0.05 % it doesn't, so that all give the same weights."""


class CrossLayerEqualizationSettings(BaseSettings):
    """How far equalization goes.

    Attributes:
        iterations: passes over all sets, at most.
        tolerance: stop once no scale of a pass differs from 1 by more than this.
        clipped_relu: what to do with the upper bound of clipped ReLUs between layers. "keep": leave it, and scale
            only as far as it goes on cutting what it cut on the calibration data. "replace": drop it, which changes
            the float function where it was active (AIMET's way). "stop": end the chain. "auto": "keep" by calibration
            data or, without any, by folded batch norms (β + 4·|γ|); "stop" where neither tells.
        across_pooling: equalize through pooling and flattening too.
        absorb_high_bias: move high biases into the next layer, where folded batch norms tell how high they are.
        absorb_through_padding: also where the next layer pads with zeros; its borders then change.
    """

    iterations: int = Field(default=1, ge=1)
    tolerance: float = Field(default=0.01, ge=0)
    clipped_relu: Literal["auto", "keep", "replace", "stop"] = "auto"
    across_pooling: bool = True
    absorb_high_bias: bool = True
    absorb_through_padding: bool = False


class CrossLayerEqualization:
    """Equalizes channel ranges of consecutive layers, and absorbs high biases. Fold batch norms first."""

    name: ClassVar[str] = "cross_layer_equalization"
    Settings: ClassVar[type[BaseSettings]] = CrossLayerEqualizationSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: Any) -> Iterable[Request]:
        """How far channels reach before clipped ReLUs, if they are kept."""
        if settings.clipped_relu in ("replace", "stop"):
            return ()
        return clip_requests(graph, settings.across_pooling, optional=settings.clipped_relu == "auto")

    def apply(self, ctx: Context[CrossLayerEqualizationSettings]) -> Outcome:
        """Equalize to convergence or for the set number of passes, then absorb."""
        settings = ctx.settings
        sets = find_chains(
            ctx.graph,
            lambda op: _own_params(ctx, op),
            lambda tensor: not _frozen(ctx, tensor),
            clipped=clip_rule(ctx),
            pooling=settings.across_pooling,
        )
        layers = _Layers(ctx, sets)
        scales = [np.ones((len(chain), _channels(chain))) for chain in sets]
        ctx.progress.start("Equalizing layers", settings.iterations)
        passes, change = 0, np.inf
        while sets and passes < settings.iterations and change > settings.tolerance:
            steps = [layers.equalize(chain) for chain in sets]
            scales = [total * step for total, step in zip(scales, steps, strict=True)]
            change = max(float(np.abs(np.log(step)).max(initial=0)) for step in steps)
            passes += 1
            ctx.progress.advance()
        absorbed = [layers.absorb(chain, settings) for chain in sets]
        ctx.progress.finish()
        rows = [
            (_title(chain), scale.shape[1], _spread(scale), taken)
            for chain, scale, taken in zip(sets, scales, absorbed, strict=True)
        ]
        return _outcome(ctx, sets, layers, rows, passes)


def _outcome(
    ctx: Context[CrossLayerEqualizationSettings],
    sets: list[Chain],
    layers: _Layers,
    rows: list[tuple[Any, ...]],
    passes: int,
) -> Outcome:
    clips = {op.id for chain in sets for link in chain for op in link.between if bounded(op)}
    replaced = clips if ctx.settings.clipped_relu == "replace" else set()
    changes: list[Edit] = [ReplaceActivation(op.id, "Relu") for op in ctx.graph if op.id in replaced]
    params, added = bias_changes(ctx.graph, layers.biases)
    changes += added
    for id, weight in layers.weights.items():
        params[ctx.graph.op(id).params[ParamRole.WEIGHT]] = weight.astype(np.float32)
    folded = {id: (g.astype(np.float32), b.astype(np.float32)) for id, (g, b) in layers.folded.items()}
    absorbed = sum(row[3] for row in rows)
    norms = sum(op.kind is OpKind.BATCH_NORM for op in ctx.graph)
    summary = f"equalized {len(sets)} sets of layers" if sets else "no layers to equalize"
    if replaced:
        summary += f"; {len(replaced)} clipped ReLUs became ReLUs"
    if layers.held:
        summary += f"; {layers.held} channels held by the bound of a clipped ReLU"
    if absorbed:
        summary += f"; absorbed the bias of {absorbed} channels"
    if norms:
        summary += f"; {norms} batch norms end chains (apply fold_batch_norm first)"
    if note := frozen_note(ctx):
        summary += f"; {note}"
    figures = {
        "sets": float(len(sets)),
        "passes": float(passes),
        "replaced_activations": float(len(replaced)),
        "absorbed_channels": float(absorbed),
        "held_channels": float(layers.held),
        "largest_scale": max((row[2] for row in rows), default=1.0),
    }
    columns = ("layers", "channels", "largest scale", "absorbed channels")
    return Outcome(params, {}, changes, folded, Report(summary, figures, columns, tuple(rows)))


def _title(chain: Chain) -> str:
    return " → ".join([chain[0].first.id, *(link.second.id for link in chain)])


def _spread(scale: Values) -> float:
    return float(np.exp(np.abs(np.log(scale)).max(initial=0)))


def _channels(chain: Chain) -> int:
    return int(chain[0].channel_of.max()) + 1


def _frozen(ctx: Context[CrossLayerEqualizationSettings], site: ParamId | TensorId) -> bool:
    encoding = ctx.encodings.get(ctx.plan.root(site) if site in ctx.plan else site)
    return encoding is not None and encoding.frozen


def _own_params(ctx: Context[CrossLayerEqualizationSettings], op: Op) -> bool:
    """Whether the op's parameters are its own and free to change."""
    ids = [op.params[r] for r in (ParamRole.WEIGHT, ParamRole.BIAS) if r in op.params]
    return all(len(ctx.graph.users(id)) == 1 and not _frozen(ctx, id) for id in ids)


class _Layers:
    """Weights, biases and folded statistics of all layers in the sets, in float64, as they change."""

    def __init__(self, ctx: Context[CrossLayerEqualizationSettings], sets: list[Chain]) -> None:
        self.graph = ctx.graph
        self.weights: dict[OpId, Values] = {}
        self.biases: dict[OpId, Values] = {}
        self.folded: dict[OpId, tuple[Values, Values]] = {}
        self.reach: dict[OpId, Values] = {}
        for op in {o.id: o for chain in sets for link in chain for o in (link.first, link.second)}.values():
            self.weights[op.id] = np.asarray(ctx.params[op.params[ParamRole.WEIGHT]], np.float64)
            if ParamRole.BIAS in op.params:
                self.biases[op.id] = np.asarray(ctx.params[op.params[ParamRole.BIAS]], np.float64)
            if op.id in ctx.folded:
                gamma, beta = ctx.folded[op.id]
                self.folded[op.id] = np.asarray(gamma, np.float64), np.asarray(beta, np.float64)
        if ctx.settings.clipped_relu != "replace":
            for link in (link for chain in sets for link in chain):
                known = [r for op in link.between if bounded(op) and (r := reach(ctx, link.first, op)) is not None]
                if known:
                    self.reach[link.first.id] = _coarse(np.max(known, axis=0))
        self.held = int(sum((r > 1).sum() for r in self.reach.values()))

    def equalize(self, chain: Chain) -> Values:
        """One pass over one set; returns S_1 … S_n, (links, channels)."""
        ranges = [self._range(chain[0].first, output_axis(self.graph, chain[0].first))]
        for link in chain:
            by_feature = self._range(link.second, input_axis(self.graph, link.second))
            by_channel = np.zeros(len(ranges[0]))
            np.maximum.at(by_channel, link.channel_of, by_feature)
            ranges.append(by_channel)
        r = np.stack(ranges)
        alive = (np.isfinite(r) & (r > NEGLIGIBLE * r.max(axis=1, keepdims=True))).all(axis=0)
        logs = np.log(np.where(alive, r, 1.0))
        scale = np.exp(_balanced(logs, np.stack([self._lowest(link) for link in chain])))
        for step, link in zip(scale, chain, strict=True):
            self._multiply(link.first, output_axis(self.graph, link.first), 1 / step)
            self._multiply(link.second, input_axis(self.graph, link.second), step[link.channel_of])
            if link.first.id in self.biases:
                self.biases[link.first.id] = self.biases[link.first.id] / step
            if link.first.id in self.reach:
                self.reach[link.first.id] = self.reach[link.first.id] / step
            if link.first.id in self.folded:
                gamma, beta = self.folded[link.first.id]
                self.folded[link.first.id] = gamma / step, beta / step
        return np.asarray(scale)

    def absorb(self, chain: Chain, settings: Any) -> int:
        """Absorb high biases along one set; returns how many channels had one."""
        if not settings.absorb_high_bias:
            return 0
        return sum(self._absorb(link) for link in chain if _takes_constants(link, settings.absorb_through_padding))

    def _absorb(self, link: Link) -> int:
        first, second = link.first.id, link.second.id
        if first not in self.folded or first not in self.biases:
            return 0
        gamma, beta = self.folded[first]
        high = np.maximum(0.0, beta - 3 * np.abs(gamma)) if link.rectified else beta
        if first in self.reach:  # below a bound that is reached, nothing may move
            high = np.where(self.reach[first] > 1, 0.0, high)
        if not high.any():
            return 0
        self.biases[first] = self.biases[first] - high
        self.folded[first] = gamma, beta - high
        weight, features = self.weights[second], high[link.channel_of]
        if is_depthwise(self.graph, link.second):
            added = weight.reshape(len(weight), -1).sum(axis=1) * features
        else:
            added = weight.reshape(*weight.shape[:2], -1).sum(axis=2) @ features
        self.biases[second] = self.biases.get(second, np.zeros(len(added))) + added
        return int(np.count_nonzero(high))

    def _lowest(self, link: Link) -> Values:
        """Smallest log S of each channel of a link's first op; +inf fixes a channel at S = 1."""
        share = self.reach.get(link.first.id)
        if share is None:
            return np.full(_channels((link,)), -np.inf)
        return np.where(share > 1, np.inf, np.log(np.maximum(share, np.finfo(np.float64).tiny)))

    def _range(self, op: Op, axis: int) -> Values:
        weight = np.abs(self.weights[op.id])
        return np.asarray(weight.max(axis=tuple(i for i in range(weight.ndim) if i != axis)))

    def _multiply(self, op: Op, axis: int, factor: Values) -> None:
        weight = self.weights[op.id]
        self.weights[op.id] = weight * factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def _coarse(reach: Values) -> Values:
    """The next larger numbers of `MANTISSA` bits: no less, so that bounds go on holding."""
    mantissa, exponent = np.frexp(reach)
    return np.asarray(np.ldexp(np.ceil(np.ldexp(mantissa, MANTISSA)), exponent - MANTISSA))


def _balanced(logs: Values, lowest: Values) -> Values:
    """log S_1 … log S_n that make the ranges exp(logs) equal, or as equal as lower bounds allow.

    Args:
        logs: log ranges of the layers, (n + 1, channels).
        lowest: smallest log S, (n, channels); +inf fixes it at 0.
    """
    free = np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]
    fixed = np.isposinf(lowest)
    if (fixed | (free < lowest)).any():
        # The best S of each link, the others held: Σ (log range)² is convex, so this settles.
        for _ in range(SWEEPS):
            free = np.where(fixed, 0.0, np.maximum(free, lowest))
            edges = np.concatenate([np.zeros((1, free.shape[1])), free, np.zeros((1, free.shape[1]))])
            for k in range(1, len(edges) - 1):
                before, after = logs[k - 1] + edges[k - 1], logs[k] - edges[k + 1]
                edges[k] = np.where(fixed[k - 1], 0.0, np.maximum((before - after) / 2, lowest[k - 1]))
            free = edges[1:-1]
    return free


def _takes_constants(link: Link, through_padding: bool) -> bool:
    """Whether a constant added to the link's channels reaches every output of its second op alike."""
    for op in link.between:
        # Zeros that count in an average mix with the constant at the borders.
        window = op.attrs.window if isinstance(op.attrs, PoolAttrs) and op.attrs.count_include_pad else None
        if window is not None and any(map(any, window.pads)):
            return False
    if link.second.kind is OpKind.CONV_TRANSPOSE:  # the kernel's taps differ from output to output
        return False
    attrs = link.second.attrs
    return through_padding or not (isinstance(attrs, ConvAttrs) and any(map(any, attrs.pads)))
