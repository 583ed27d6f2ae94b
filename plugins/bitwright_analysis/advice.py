"""What to do next, in words, from the figures of an analysis."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from bitwright.graph import Graph, OpKind, batch_norm_fold
from bitwright_analysis.accumulators import overflowing
from bitwright_analysis.family_types import told
from bitwright_analysis.records import (
    Accumulator,
    Advice,
    Distribution,
    FamilyTypes,
    Imbalance,
    LayerError,
    Overall,
    Sensitivity,
)

FINE_DB = 30.0
"""Output SQNR from which on classifiers keep their answers but for the closest calls."""
POOR_DB = 10.0
"""Output SQNR below which few answers are those of the float model."""
DOMINANT = 0.5
"""Sites that bring so much of the noise together are worth treating one by one."""
FEW = 5
WIDE = 4.0
"""A grid that reaches so many times further than 99.9 % of the values spends two bits on the rest."""
UNEVEN = 10.0
SHIFTED = 0.3
"""Share of a layer's error that is a constant offset, from which on correcting biases pays."""
CLIPPED = 0.01


@dataclass(frozen=True)
class Evidence:
    """The figures that advice rests on."""

    graph: Graph
    overall: dict[str, Overall]
    sensitivities: Collection[Sensitivity]
    layers: Collection[LayerError]
    parameters: Collection[Distribution]
    activations: Collection[Distribution]
    imbalance: Collection[Imbalance]
    accumulators: list[Accumulator]
    accumulator_bits: int
    applied: Collection[str]
    known: Collection[str]
    crushed: Collection[str] = ()
    family: FamilyTypes | None = None

    def named(self, op: str) -> str:
        """What the model's author calls an op, with its name here behind it where that is another."""
        own = self.graph.layer_name(op)
        return op if own == op else f"{own} ({op})"

    def sites(self, *kinds: str) -> list[Sensitivity]:
        """Sensitivities of sites, worst first."""
        return [s for s in self.sensitivities if s.kind in kinds]


def advice(evidence: Evidence) -> tuple[Advice, ...]:
    """The advice, most important first; techniques that aren't registered aren't named."""
    found = [a for rule in RULES for a in rule(evidence)]
    return tuple(a for a in found if not a.technique or a.technique in evidence.known)


def _noise(o: Overall | None) -> float:
    return 0.0 if o is None or o.sqnr_db is None else 10 ** (-o.sqnr_db / 10)


def _counted(things: Collection[object], name: str) -> str:
    """How many there are of what."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def sentence(e: Evidence) -> str:
    """How bad it is, in one sentence."""
    full = e.overall.get("quantized")
    if e.crushed:
        parts = "a part" if len(e.crushed) == 1 else f"{len(e.crushed)} parts"
        return f"Don't export it yet: {parts} of the output {'is' if len(e.crushed) == 1 else 'are'} lost."
    if full is None or full.sqnr_db is None:
        return "Quantization doesn't change the output."
    quality = "hardly changes" if full.sqnr_db >= FINE_DB else "changes" if full.sqnr_db >= POOR_DB else "destroys"
    return f"Quantization {quality} the output: {full.sqnr_db:.1f} dB of signal to quantization noise."


def lost_parts(e: Evidence) -> Iterator[Advice]:
    """Outputs that nothing is left of, whatever the whole looks like."""
    for text in e.crushed:
        yield Advice(text=f"{text[0].upper()}{text[1:]}.")


def verdict(e: Evidence) -> Iterator[Advice]:
    """How bad it is, and whether weights or activations are to blame."""
    full = e.overall.get("quantized")
    weights, activations = _noise(e.overall.get("weights only")), _noise(e.overall.get("activations only"))
    if full is None:
        return
    if full.sqnr_db is None or full.sqnr_db >= FINE_DB:
        if e.crushed:
            return
        text = "quantization hardly changes the output"
        text += "." if full.sqnr_db is None else f" ({full.sqnr_db:.1f} dB)."
        yield Advice(text=f"{text[0].upper()}{text[1:]} Export it, and compare with the target by `bitwright verify`.")
        return
    total = weights + activations
    if total <= 0:
        return
    share = weights / total
    blame = (
        f"weights bring {share:.0%} of the noise"
        if share >= 0.6
        else f"activations bring {1 - share:.0%} of the noise"
        if share <= 0.4
        else f"weights and activations bring about the same noise ({share:.0%} and {1 - share:.0%})"
    )
    yield Advice(text=f"The output has {full.sqnr_db:.1f} dB signal to quantization noise; {blame}.")


def fold(e: Evidence) -> Iterator[Advice]:
    """Batch norms that still could be folded."""
    left = [op.id for op in e.graph if op.kind is OpKind.BATCH_NORM and batch_norm_fold(e.graph, op) is not None]
    if left:
        yield Advice(
            text=f"{_counted(left, 'batch norm')} can be folded into the layers beside them: apply "
            "fold_batch_norm first, as "
            "every target does.",
            technique="fold_batch_norm",
            where=tuple(left),
        )


def equalize(e: Evidence) -> Iterator[Advice]:
    """Uneven channels under one scale."""
    uneven = sorted((i for i in e.imbalance if not i.per_channel and i.ratio >= UNEVEN), key=lambda i: -i.ratio)
    if uneven and "cross_layer_equalization" not in e.applied:
        worst = uneven[0]
        gain = ""
        if worst.precision is not None and worst.equalized is not None and worst.equalized > worst.precision > 0:
            gain = f" (there it would use {worst.equalized:.0%} of the range instead of {worst.precision:.0%})"
        yield Advice(
            text=f"{_counted(uneven, 'layer')} with one scale for channels whose ranges differ by more "
            f"than {UNEVEN:.0f} ×, {e.named(worst.op)} most: apply cross_layer_equalization{gain}, or choose a target "
            "with per-channel weights.",
            technique="cross_layer_equalization",
            where=tuple(i.op for i in uneven),
        )


def round_weights(e: Evidence) -> Iterator[Advice]:
    """Weights that are to blame, and not trained to their grids yet."""
    full = e.overall.get("quantized")
    weights, activations = _noise(e.overall.get("weights only")), _noise(e.overall.get("activations only"))
    fine = full is None or full.sqnr_db is None or full.sqnr_db >= FINE_DB
    if fine or weights < activations / 2 or "adaround" in e.applied:
        return
    worst = e.sites("weight")[:FEW]
    names = f", {worst[0].unit} most" if worst else ""
    narrow = any(s.bits in ("int4", "uint4", "int2", "uint2", "int3", "uint3") for s in e.sites("weight"))
    text = f"Weights cost accuracy{names}: apply adaround"
    if narrow and "seq_mse" in e.known:
        text += ", with seq_mse before it for scales of few bits"
    yield Advice(text=text + ".", technique="adaround", where=tuple(s.unit for s in worst))


def narrow_ranges(e: Evidence) -> Iterator[Advice]:
    """Activations whose grid reaches far beyond nearly all of their values."""
    harm = {s.unit: s.share for s in e.sites("activation")}
    wide = []
    for d in e.activations:
        if d.grid_low is not None and d.grid_high is not None and d.typical > 0:
            reach = max(-d.grid_low, d.grid_high) / d.typical
            if reach >= WIDE and harm.get(d.site, 0.0) >= 0.02:
                wide.append((reach, d.site))
    if wide:
        wide.sort(reverse=True)
        yield Advice(
            text=f"{_counted(wide, 'activation')} with a grid that reaches {WIDE:.0f} × and more beyond "
            "99.9 % of their values "
            f"({wide[0][1]}: {wide[0][0]:.0f} ×): calibrate them by scheme mse or percentile:99.9"
            + ("; smooth_quant moves outliers of single channels into the weights" if "smooth_quant" in e.known else "")
            + ".",
            where=tuple(site for _, site in wide),
        )
    clipped = sorted(((d.clipped, d.site) for d in e.activations if d.clipped >= CLIPPED), reverse=True)
    clipped = [(c, s) for c, s in clipped if harm.get(s, 0.0) >= 0.02]
    if clipped:
        yield Advice(
            text=f"The grid of {clipped[0][1]} cuts off {clipped[0][0]:.1%} of its values: calibrate it by minmax, or "
            "on data that are more like those of the field.",
            where=tuple(site for _, site in clipped),
        )


def correct_biases(e: Evidence) -> Iterator[Advice]:
    """Errors that are offsets."""
    fine = (full := e.overall.get("quantized")) is None or full.sqnr_db is None or full.sqnr_db >= FINE_DB
    shifted = sorted(
        (x for x in e.layers if x.shift >= SHIFTED and x.sqnr_db is not None and x.sqnr_db < FINE_DB),
        key=lambda x: x.sqnr_db or 0.0,
    )
    if shifted and not fine and "bias_correction" not in e.applied:
        yield Advice(
            text=f"In {_counted(shifted, 'layer')} a constant offset is {SHIFTED:.0%} or more of the error "
            f"({e.named(shifted[0].op)}: {shifted[0].shift:.0%}): apply bias_correction.",
            technique="bias_correction",
            where=tuple(x.op for x in shifted),
        )


def widen_a_few(e: Evidence) -> Iterator[Advice]:
    """A few sites that bring most of the noise."""
    full = e.overall.get("quantized")
    if full is None or full.sqnr_db is None or full.sqnr_db >= FINE_DB:
        return
    rows = e.sites("weight", "parameter", "activation")
    top: list[Sensitivity] = []
    for row in rows[:FEW]:
        if sum(t.share for t in top) >= DOMINANT:
            break
        top.append(row)
    reached = sum(t.share for t in top)
    if reached >= DOMINANT and len(rows) > 2 * len(top):
        named = ", ".join(t.unit for t in top)
        wide = " ".join(f"--override {t.unit}={_wider(t)}" for t in top)
        yield Advice(
            text=f"{len(top)} of {len(rows)} sites make {reached:.0%} of the noise: {named}. Give them more bits "
            f"({wide}), or let mixed_precision choose.",
            where=tuple(t.unit for t in top),
        )


def widen_by_family(e: Evidence) -> Iterator[Advice]:
    """Sites of a transformer that 8 bits don't do for."""
    if e.family is not None and e.family.overrides:
        where = tuple(s.site for s in e.family.sites if s.proposed != s.present)
        yield Advice(text=told(e.family), where=where)


def _wider(row: Sensitivity) -> str:
    signed = row.bits.startswith("int")
    digits = "".join(c for c in row.bits if c.isdigit())
    if not digits or row.bits.startswith(("float", "bfloat")):
        return "float"
    wider = 8 if int(digits) < 8 else 16
    return f"{'int' if signed else 'uint'}{wider}"


def overflow(e: Evidence) -> Iterator[Advice]:
    """Accumulators that can overflow."""
    over = overflowing(e.accumulators, e.accumulator_bits)
    if over:
        worst = over[0]
        yield Advice(
            text=f"{_counted(over, 'layer')} can overflow a {e.accumulator_bits}-bit accumulator, "
            f"{e.named(worst.op)} most (it needs "
            f"{worst.bits} bits for {worst.inputs} products): give its weights or input fewer bits, or split it.",
            where=tuple(r.op for r in over),
        )


def where_it_breaks(e: Evidence) -> Iterator[Advice]:
    """The op at which the signal to noise ratio falls most, where it does harm."""
    full = e.overall.get("quantized")
    if full is None or full.sqnr_db is None or full.sqnr_db >= FINE_DB:
        return
    falls = [x for x in e.layers if x.lost_db is not None and x.sqnr_db is not None and x.sqnr_db < FINE_DB]
    worst = max(falls, key=lambda x: x.lost_db or 0.0, default=None)
    if worst is not None and (worst.lost_db or 0.0) >= 10 * math.log10(4):
        yield Advice(
            text=f"The signal to noise ratio falls most at {e.named(worst.op)} ({worst.type}): from "
            f"{worst.input_db:.1f} to {worst.sqnr_db:.1f} dB. Give it more bits, or leave it in float (--override "
            f"{worst.op}=float).",
            where=(worst.op,),
        )


RULES: tuple[Callable[[Evidence], Iterator[Advice]], ...] = (
    lost_parts,
    verdict,
    fold,
    equalize,
    round_weights,
    widen_by_family,
    narrow_ranges,
    widen_a_few,
    correct_biases,
    where_it_breaks,
    overflow,
)
