"""What to do next, in words, from what a search has seen."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright_search.auto_result import Status, Trial
from bitwright_search.drops import ONE_SAMPLE, Drop
from bitwright_search.scores import Scale

FEW_SAMPLES = 64
"""Fewer calibration samples than this are worth a remark; techniques with moments gain up to some hundreds."""


def advise(
    *,
    float_score: float,
    score: float,
    allowed_drop: float,
    met: bool,
    lost: Drop,
    confidence: float | None,
    weights_only: float | None,
    activations_only: float | None,
    trials: Sequence[Trial],
    stopped: str,
    samples: int | None,
    per_channel: bool,
    activation_bits: int,
    in_float: int,
    widened: bool = False,
    scale: Scale,
) -> tuple[str, ...]:
    """Sentences in the order of their weight.

    Args:
        float_score, score, allowed_drop, met, confidence, weights_only, activations_only, trials: see
            `AutoQuantResult`.
        lost: what the best network loses.
        stopped: the budget that ended the search, if one did.
        samples: of calibration.
        per_channel: whether the target gives weights a scale for each channel.
        activation_bits: width of most activations.
        in_float: ops that run in float because nobody knows their type.
        widened: networks with more bits were evaluated.
        scale: how scores read.
    """
    said = []
    if met:
        said.append(
            "The target is met. Check the exported files on the integer runtime with `bitwright verify`, on data that "
            "weren't used here."
        )
    if stopped and not met:
        said.append(f"The search ended at its budget of {stopped}; give it more, the stages that are done are kept.")
    said += _of_margins(lost, allowed_drop, confidence, scale, met=met)
    beyond = lost.value > allowed_drop  # not by the margin alone
    if not met and beyond and widened and not stopped:
        said.append(
            "Not even 16 bits for all activations and 8 for all weights that the target runs with so many are enough: "
            "look for what overflows or is clipped with `bitwright analyze`, or leave the sensitive ops in float."
        )
    elif not met and beyond:
        said += _causes(float_score, allowed_drop, weights_only, activations_only, per_channel, activation_bits, scale)
    failed = [t for t in trials if t.status is Status.FAILED]
    said += [f"{t.name} failed and was left out: {t.reason}" for t in failed]
    if samples is not None and samples < FEW_SAMPLES:
        said.append(
            f"{samples} calibration samples are few: some hundreds that look like real inputs make ranges and "
            "roundings steadier."
        )
    if in_float:
        said.append(f"{in_float} ops run in float because no target knows their type; see the findings.")
    if not met and beyond:
        said.append(
            "If nothing else helps, fine-tune with quantization in the loop (`sim.trainable()`), starting from this "
            "result."
        )
    return tuple(said)


def _of_margins(lost: Drop, allowed: float, confidence: float | None, scale: Scale, *, met: bool) -> list[str]:
    if lost.margin is None:
        return [] if confidence is None else [ONE_SAMPLE]
    most = scale.drop(lost.value + lost.margin)
    if not met and lost.value <= allowed:
        return [
            f"The drop itself is within the allowed one; on other samples it may be {most}. Evaluate on more: four "
            "times as many halve the margin."
        ]
    if met and confidence is None and lost.value + lost.margin > allowed:
        return [
            f"On other samples the loss may be {most}, which is more than is allowed: evaluate on more of them, or ask "
            "for confidence=0.95."
        ]
    return []


def _causes(
    float_score: float,
    allowed: float,
    weights: float | None,
    activations: float | None,
    per_channel: bool,
    activation_bits: int,
    scale: Scale,
) -> list[str]:
    if weights is None or activations is None:
        return ["Run it with a larger budget, to see whether weights or activations cost the accuracy."]
    by_weights, by_activations = float_score - weights, float_score - activations
    said = []
    if by_activations > allowed:
        remedy = (
            "give the sensitive ones 16 bits (`mixed_precision` finds them)"
            if activation_bits < 16
            else "leave the sensitive ones in float"
        )
        said.append(
            f"Quantized activations alone cost {scale.drop(by_activations)}, more than the allowed "
            f"{scale.drop(allowed)}, so changes to weights will hardly be enough: {remedy}, or set sites with outliers "
            "to float by an override."
        )
    if by_weights > allowed:
        remedy = (
            "a target with one scale a channel, if the hardware has it, or"
            if not per_channel
            else "more weight bits, or"
        )
        said.append(
            f"Quantized weights alone cost {scale.drop(by_weights)}: use {remedy} more bits for the sensitive layers "
            "(`mixed_precision` finds them)."
        )
    if not said:
        larger = "weights" if by_weights >= by_activations else "activations"
        said.append(
            f"Weights alone cost {scale.drop(by_weights)}, activations alone {scale.drop(by_activations)}; only "
            f"together they exceed the allowed {scale.drop(allowed)}. Start with the {larger}: `mixed_precision` finds "
            "the sites to widen."
        )
    return said
