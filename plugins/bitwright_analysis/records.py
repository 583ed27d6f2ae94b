"""What an analysis holds. `Analysis.model_dump_json()` is `analysis.json`; fields are only ever added."""

from __future__ import annotations

from pydantic import Field

from bitwright.report import Record


class Overall(Record):
    """One setting of the whole model.

    Attributes:
        setting: "float", "weights only", "activations only" or "quantized".
        score: what `evaluate` (or top-1 on the labels) gave; null without them.
        sqnr_db: output signal to quantization noise ratio; null where the outputs are those of the float model.
    """

    setting: str
    score: float | None = None
    sqnr_db: float | None = None


class Sensitivity(Record):
    """What quantizing one site, or all sites of one layer, does to the output.

    Attributes:
        unit: the site, or the layer's op.
        kind: "weight", "parameter", "activation", or "layer" for all of an op's sites together.
        op, type: the op it belongs to and its ONNX type; empty for a model input.
        bits: the grid's type, such as "int8".
        alone: the measure with this unit quantized and everything else in float.
        without: the measure with everything quantized but this unit.
        harm: how far `alone` lies from the float model, in the measure's unit; for SQNR the noise power relative to
            the signal's.
        gain: how far `without` lies above the quantized model; for SQNR the relative noise power that goes.
        share: `harm` relative to the sum over all units of sites (0 to 1).
    """

    unit: str
    kind: str
    op: str = ""
    type: str = ""
    bits: str = ""
    alone: float | None = None
    without: float | None = None
    harm: float = 0.0
    gain: float | None = None
    share: float = 0.0


class LayerError(Record):
    """One op's output in the quantized network against the float one, over all values and samples.

    Attributes:
        mse: mean squared error.
        sqnr_db: 10·log10(Σ float² / Σ error²); null where there is no error.
        max_error: largest magnitude of an error.
        shift: share of the error's power that is a constant offset of each channel; 1 is nothing else.
        input_db: SQNR of the worst input; null where inputs have no error.
        lost_db: how far `sqnr_db` lies below `input_db`: what this op itself adds.
    """

    tensor: str
    op: str
    type: str
    mse: float
    sqnr_db: float | None
    max_error: float
    shift: float
    input_db: float | None = None
    lost_db: float | None = None


class Distribution(Record):
    """Values of one quantized site, with the grid that was chosen for it.

    Attributes:
        kind: "weight", "parameter" or "activation".
        grid: the grid in words.
        low, high: smallest and largest value (of activations: in the float network).
        typical: 99.9 % of the magnitudes are at most this.
        grid_low, grid_high: ends of the grid, over all its groups.
        step_smallest, step_largest: grid steps; equal for one scale, null where the range is found at run time.
        clipped: share of values beyond their grid's ends.
        unit: of the histogram: "value", or "code" where scales differ: values in steps from zero.
        first, width: left edge of the first bin and width of each.
        counts: values in each bin.
        grid_first, grid_step, grid_codes: where the grid lies on the histogram's axis.
        channel_low, channel_high: range of each channel (weights: output channels); empty where channels aren't known.
    """

    site: str
    kind: str
    op: str
    type: str
    grid: str
    low: float
    high: float
    typical: float
    grid_low: float | None
    grid_high: float | None
    step_smallest: float | None
    step_largest: float | None
    clipped: float
    unit: str
    first: float
    width: float
    counts: tuple[int, ...]
    grid_first: float | None = None
    grid_step: float | None = None
    grid_codes: int | None = None
    channel_low: tuple[float, ...] = ()
    channel_high: tuple[float, ...] = ()


class Imbalance(Record):
    """How unevenly a layer's weights, and those of the layer after it, use their ranges (Nagel et al. 2019, §4.1).

    Attributes:
        op: the layer.
        ratio: range of its widest output channel over that of the median one (dead channels aside).
        follower: the layer that alone reads its channels; empty where there is none.
        precision: mean over channels of (range₁/widest₁)·(range₂/widest₂), 1 is even.
        equalized: the same after scaling the channels of both to √(range₁·range₂).
        depthwise: one input channel a group.
        per_channel: its weights have a scale for each output channel, so that `ratio` does no harm by itself.
    """

    op: str
    ratio: float
    follower: str = ""
    precision: float | None = None
    equalized: float | None = None
    depthwise: bool = False
    per_channel: bool = False


class Accumulator(Record):
    """The largest sum that a layer's integer accumulator can meet with these weights, whatever the data.

    Attributes:
        inputs: K, products summed for one output.
        low, high: bounds over all channels of Σ (q_x − z_x)·(q_w − z_w) + q_b.
        bits: signed width that holds both.
        any_weights: bits that the grids and K alone would ask for, whatever the weights.
        int32: share of int32's range that is used (beyond 1: it can overflow).
    """

    op: str
    type: str
    inputs: int
    low: float
    high: float
    bits: int
    any_weights: int
    int32: float


class Advice(Record):
    """One thing to do next.

    Attributes:
        text: what, and why.
        technique: the registered technique that it names; empty where it is none.
        where: the layers or sites, worst first.
    """

    text: str
    technique: str = ""
    where: tuple[str, ...] = ()


class Hint(Record):
    """Something in the architecture that quantization or the target doesn't like.

    Attributes:
        where: the op.
        rule: short name of the rule, see docs/analysis.md.
        what: what is there, and what it costs.
        remedy: the way out.
        level: "warning", or "note" where it only matters in some cases.
        source: the user's source line, where known.
    """

    where: str
    rule: str
    what: str
    remedy: str
    level: str = "warning"
    source: str | None = None


class SiteTypes(Record):
    """A tensor of a transformer's residual stream, and the type that it needs.

    Attributes:
        place: what it is, such as "residual sum".
        present, proposed: types; equal where the present one does.
        token_db: mean over tokens of the error's power relative to the token's own, in decibels; null without error. In
            vision transformers, whose tokens have fixed places, the mean over samples at the worst place.
        largest_to_typical: the largest magnitude, over the root mean square of a typical token.
        kurtosis: E[x⁴] / E[x²]² of all values; 3 for normal ones.
    """

    site: str
    place: str
    present: str
    proposed: str
    token_db: float | None
    largest_to_typical: float
    kurtosis: float


class FamilyTypes(Record):
    """What the family of a network says of its types.

    Attributes:
        kind: "decoder", "encoder", "post-norm encoder" or "vision transformer".
        attentions: how many it has.
        sites: those of the residual stream that are integers, the worst first.
        asked_db: signal to noise of a token that the stream is to have with all of its sites.
        stream_db: what it has as it is: the noises of embeddings, sums and logits added up, relative to a token.
        overrides: what to give `QuantSim` as `overrides`; names of repeated blocks are patterns.
        before_db, after_db: signal to noise of the outputs on the samples, as it is and with the overrides; null where
            nothing is proposed, or without noise.
        notes: what stands against the overrides, such as kernels that the target doesn't have.
    """

    kind: str
    attentions: int
    sites: tuple[SiteTypes, ...] = ()
    asked_db: float = 25.0
    stream_db: float | None = None
    overrides: dict[str, str] = Field(default_factory=dict)
    before_db: float | None = None
    after_db: float | None = None
    notes: tuple[str, ...] = ()


class Analysis(Record):
    """Everything that `quant_analyzer` found.

    Attributes:
        created: UTC, ISO 8601.
        measure: what sensitivities are in: "SQNR" (decibels), or the name of the evaluation.
        samples: samples that figures rest on; `sweep_samples` for the sensitivities.
        recipe: techniques applied before.
        sensitivities: the worst first; sites and layers.
        layers: in the order of the network.
        seconds: duration of each stage.
        widths: what weights and activations are quantized to, in words.
        crushed: outputs, and parts of concatenated ones, that nothing is left of, in words.
        verdict: the whole in a sentence.
        family: what a transformer's structure says of its types; null for other networks.
        layer_names: op → what the model's author calls it, where that is another name (`Graph.layer_name`).
    """

    schema_version: int = 1
    created: str
    name: str
    target: str
    measure: str
    samples: int | None
    sweep_samples: int | None
    recipe: tuple[str, ...] = ()
    overall: tuple[Overall, ...]
    sensitivities: tuple[Sensitivity, ...]
    layers: tuple[LayerError, ...]
    parameters: tuple[Distribution, ...]
    activations: tuple[Distribution, ...]
    imbalance: tuple[Imbalance, ...]
    accumulators: tuple[Accumulator, ...]
    hints: tuple[Hint, ...] = ()
    advice: tuple[Advice, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    widths: str = ""
    crushed: tuple[str, ...] = ()
    verdict: str = ""
    family: FamilyTypes | None = None
    layer_names: dict[str, str] = Field(default_factory=dict)

    def layer_name(self, op: str) -> str:
        """What the model's author calls an op."""
        return self.layer_names.get(op, op)

    def ranking(self, kind: str | None = None) -> tuple[Sensitivity, ...]:
        """The sites, worst first; of one kind ("layer", "weight", "parameter", "activation") if asked."""
        return tuple(s for s in self.sensitivities if (s.kind != "layer" if kind is None else s.kind == kind))

    def setting(self, name: str) -> Overall:
        """One of the overall settings.

        Raises:
            KeyError: there is none of that name.
        """
        found = next((o for o in self.overall if o.setting == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def __str__(self) -> str:
        lines = [line for line in (self.verdict, f"{self.name} on {self.target}: {self.widths}") if line]
        for o in self.overall:
            if o.setting == "float" and o.score is None:
                continue
            score = "" if o.score is None else f"  {self.score_name} {o.score:.4g}"
            sqnr = "" if o.setting == "float" else "  exact" if o.sqnr_db is None else f"  SQNR {o.sqnr_db:.1f} dB"
            lines.append(f"  {o.setting:<18}{score}{sqnr}")
        worst = self.ranking("layer")[:5]
        if worst:
            lines.append("most sensitive layers: " + ", ".join(self.layer_name(s.unit) for s in worst))
        return "\n".join([*lines, *(f"- {a.text}" for a in self.advice)])

    @property
    def score_name(self) -> str:
        """What the overall scores are."""
        return "score" if self.measure == "SQNR" else self.measure
