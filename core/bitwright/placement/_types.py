"""From a type as users write it, and a target's policy, to a specification."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.errors import InputError
from bitwright.grids import FLOAT, Blockwise, FloatFormat, Granularity, PerTensor, QuantSpec, parse_type
from bitwright.targets import Constraints, Target


@dataclass(frozen=True, slots=True)
class Precision:
    """A parsed type: integer codes of `bits`, or a float format; `explicit` if the user asked for it."""

    bits: int
    signed: bool
    float_format: FloatFormat | None = None
    blocks: Blockwise | None = None
    explicit: bool = False

    @classmethod
    def of(cls, asked: str | None, fallback: str) -> Precision:
        """Of what the user asked for, or else of the target's default.

        Raises:
            InputError: not a type.
        """
        bits, signed, float_format, blocks = parse_type(fallback if asked is None else asked)
        return cls(bits, bool(signed), float_format, blocks, asked is not None)

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


def activation_spec(
    target: Target, precision: Precision, *, symmetric: bool, limits: Constraints | None = None
) -> QuantSpec:
    """Specification of an activation, or of a constant that is treated like one. Symmetric means signed codes,
    unless the user asked for an unsigned type."""
    signed = precision.signed or (symmetric and not precision.explicit)
    spec = _spec(target, precision, symmetric=symmetric, signed=signed, granularity=PerTensor())
    if limits is None or spec.float_format is not None:
        return spec
    return spec.with_(minimum=limits.min, maximum=limits.max)


def param_spec(target: Target, precision: Precision, *, symmetric: bool, granularity: Granularity) -> QuantSpec:
    """Specification of a parameter."""
    return _spec(target, precision, symmetric=symmetric, signed=precision.signed, granularity=granularity)


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
