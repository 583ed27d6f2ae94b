"""From a type as users write it, and a target's policy, to a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitwright.errors import InputError
from bitwright.grids import (
    FLOAT,
    Blockwise,
    Dynamic,
    FloatFormat,
    Granularity,
    PerChannel,
    PerTensor,
    QuantSpec,
    ScaleType,
    block_scales,
    parse_type,
)
from bitwright.placement._key_values import Kept
from bitwright.targets import Constraints, Target


@dataclass(frozen=True, slots=True)
class Precision:
    """A parsed type: integer codes of `bits`, or a float format; `explicit` if the user asked for it.

    `dynamic`: the range is found at run time. `axis`: of an activation, one scale for each of its indices.
    `block_scales`: the number type of the blocks' scales, where the type says it.
    """

    bits: int
    signed: bool
    float_format: FloatFormat | None = None
    blocks: Blockwise | None = None
    explicit: bool = False
    dynamic: Dynamic | None = None
    axis: int | None = None
    block_scales: ScaleType | None = None

    @property
    def is_own(self) -> bool:
        """Whether the grid suits one tensor alone, as its numbers belong to that one's values or layout."""
        return self.dynamic is not None or self.axis is not None

    @classmethod
    def of(cls, asked: str | None, fallback: str) -> Precision:
        """Of what the user asked for, or else of the target's default; a width alone ("8") leaves the sign to that.

        Raises:
            InputError: not a type.
        """
        bare = asked is not None and asked.strip().isdecimal()
        text = fallback if asked is None else sized(asked, fallback) if bare else asked
        bits, signed, float_format, layout = parse_type(text)
        blocks = layout if isinstance(layout, Blockwise) else None
        dynamic = layout if isinstance(layout, Dynamic) else None
        return cls(bits, bool(signed), float_format, blocks, asked is not None and not bare, dynamic,
                   block_scales=block_scales(text))  # fmt: skip

    @classmethod
    def or_float(cls, asked: str | None, fallback: str) -> Precision | None:
        """The same, where "float" is a type too: None.

        Raises:
            InputError: not a type.
        """
        return None if (fallback if asked is None else asked) == FLOAT else cls.of(asked, fallback)

    def for_activations(self, asked: str | None) -> Precision:
        """Itself.

        Raises:
            InputError: it has blocks, which only weights may have.
        """
        if self.blocks is not None:
            raise InputError(f"{asked!r}: blocks are for weights; activations have one scale, for example uint8")
        return self

    def for_weights(self, asked: str | None) -> Precision:
        """Itself.

        Raises:
            InputError: its range is found at run time, while values of parameters are known before.
        """
        if self.dynamic is not None:
            raise InputError(f"{asked!r}: a range at run time is for activations; weights take int8 or int4:block32")
        return self


@dataclass(frozen=True, slots=True)
class KeyValueType:
    """A type of the keys and values of attention: any of activations, and with one scale for each head.

    Attributes:
        text: as it was asked for.
        precision: without heads.
        per_head: one scale for each.
    """

    text: str
    precision: Precision
    per_head: bool

    @classmethod
    def of(cls, text: str, fallback: str) -> KeyValueType:
        """Read it: ``int8``, ``int8:per_head``, ``int4:per_token``, ``float16``.

        Raises:
            InputError: not such a type.
        """
        plain, _, layout = text.strip().partition(":")
        heads = layout.replace("-", "_") in ("per_head", "head")
        try:
            precision = Precision.of(plain if heads else text, fallback).for_activations(text)
        except InputError as error:
            raise InputError(f"kv_cache: {error}; keys and values take int8:per_head too") from None
        if heads and precision.float_format in ("float16", "bfloat16"):
            raise InputError(f"kv_cache={text!r}: {precision.float_format} has no scale; leave ':{layout}' out")
        return cls(text, precision, heads)

    def on(self, kept: Kept) -> tuple[Precision, str | None]:
        """The precision of one tensor, and in words what it falls back to where its layout isn't such."""
        precision = self.precision
        if self.per_head and kept.heads is None:
            return precision, f"heads have no axis of their own there, so that {self.text} is one scale for the tensor"
        if self.per_head:
            return replace(precision, axis=kept.heads), None
        if precision.dynamic is not None and precision.dynamic.per_token and not kept.rows:
            return (
                replace(precision, dynamic=Dynamic(per_token=False)),
                f"tokens are no rows there, so that {self.text} is one range for the tensor",
            )
        return precision, None


def sized(asked: str | int, default: str) -> str:
    """A type as text; of a width alone (8, "8"), the integer type with the sign that the default has."""
    text = str(asked)
    if not text.strip().isdecimal():
        return text
    return f"{'u' if default.startswith('u') else ''}int{text.strip()}"


def sized_overrides(overrides: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Overrides in which widths of an op's weights and activations are types, by the target's signs."""
    default = {"weights": target.weights, "activations": target.activations}

    def one(role: str, value: object) -> object:
        return sized(value, default[role]) if role in default and isinstance(value, int | str) else value

    return {
        name: {role: one(role, v) for role, v in value.items()} if isinstance(value, Mapping) else value
        for name, value in overrides.items()
    }


def activation_spec(
    target: Target, precision: Precision, *, symmetric: bool, limits: Constraints | None = None
) -> QuantSpec:
    """Specification of an activation, or of a constant that is treated like one. Symmetric means signed codes,
    unless the user asked for an unsigned type. Ranges at run time are symmetric where the type is signed, whatever the
    target's grids are."""
    if precision.dynamic is not None:
        signed = precision.signed
        return QuantSpec(precision.bits, signed, signed, strict=signed, granularity=precision.dynamic)
    signed = precision.signed or (symmetric and not precision.explicit)
    layout = PerTensor() if precision.axis is None else PerChannel(precision.axis)
    spec = _spec(target, precision, symmetric=symmetric, signed=signed, granularity=layout)
    if limits is None or spec.float_format is not None:
        return spec
    return spec.with_(minimum=limits.min, maximum=limits.max)


def param_spec(target: Target, precision: Precision, *, symmetric: bool, granularity: Granularity) -> QuantSpec:
    """Specification of a parameter."""
    spec = _spec(target, precision, symmetric=symmetric, signed=precision.signed, granularity=granularity)
    if precision.block_scales is not None and isinstance(granularity, Blockwise):
        return spec.with_(scale_type=precision.block_scales)
    kind = target.config.bitwright.weight_scales
    two_level = isinstance(granularity, Blockwise) and granularity.decompressed_bits is not None
    if kind is None or two_level or spec.float_format is not None:
        return spec
    # A symmetric grid's zero is in its middle: a power of two, whose product with the scale is exact anyway.
    return spec.with_(scale_type=kind.partition("+")[0] if symmetric else kind)


def _spec(
    target: Target, precision: Precision, *, symmetric: bool, signed: bool, granularity: Granularity
) -> QuantSpec:
    if precision.float_format is not None:
        return QuantSpec(precision.bits, True, True, granularity=granularity, float_format=precision.float_format)
    defaults = target.config.defaults
    return QuantSpec(
        precision.bits,
        signed,
        symmetric,
        strict=symmetric and signed and bool(defaults.strict_symmetric),
        unsigned_symmetric=symmetric and bool(defaults.unsigned_symmetric),
        granularity=granularity,
    )
