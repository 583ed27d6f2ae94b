"""The quantsim configuration schema: AIMET's JSON format, plus one optional section `bitwright`.

AIMET writes booleans as the strings "True" and "False"; real booleans are taken too. Unknown keys and
values outside the schema are errors that name the file, the key path and what is allowed.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from bitwright.errors import InputError, TargetError
from bitwright.grids import FLOAT, Blockwise, Dynamic, ScaleType, parse_type

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("True", "False"):
        return value == "True"
    raise ValueError('allowed: "True" or "False"')


def _only_true(value: object) -> bool:
    if not _flag(value):
        raise ValueError('only "True" is allowed here; leave the key out otherwise')
    return True


def _text(value: bool) -> str:
    return str(value)


_as_text = PlainSerializer(_text, return_type=str)  # pydantic 2.7 asks for a signature, which `str` has not
Flag = Annotated[bool, BeforeValidator(_flag), _as_text]
OnlyTrue = Annotated[bool, BeforeValidator(_only_true), _as_text]
Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NumberType(_Section):
    """Bit width and type of one operand of a kernel."""

    bitwidth: Literal[4, 8, 16, 32]
    dtype: Literal["int", "float"]


class Kernel(_Section):
    """A pair that the target can execute; entries of an op type may leave `param` out."""

    activation: NumberType
    param: NumberType | None = None


class ParamSettings(_Section):
    """Settings of one kind of parameter; None leaves what an earlier section said."""

    is_quantized: Flag | None = None
    is_symmetric: Flag | None = None


class OpDefaults(_Section):
    """`defaults.ops`: outputs can only be switched on for all ops."""

    is_output_quantized: OnlyTrue | None = None
    is_symmetric: Flag | None = None


class Defaults(_Section):
    """`defaults`: what holds unless a later section says otherwise."""

    ops: OpDefaults
    params: ParamSettings
    strict_symmetric: Flag | None = None
    unsigned_symmetric: Flag | None = None
    per_channel_quantization: Flag | None = None
    hw_version: str | None = None
    supported_kernels: tuple[Kernel, ...] | None = Field(None, min_length=1)

    @field_validator("hw_version")
    @classmethod
    def _version(cls, value: str | None) -> str | None:
        if value is not None and value != "default" and re.fullmatch(r"[Vv]\d+", value) is None:
            raise ValueError('allowed: "V66", "V68", … (a V and a number)')
        return value

    @field_validator("supported_kernels")
    @classmethod
    def _pairs(cls, value: tuple[Kernel, ...] | None) -> tuple[Kernel, ...] | None:
        if value is not None and any(k.param is None for k in value):
            raise ValueError("each kernel needs both `activation` and `param` in `defaults`")
        return value


class Constraints(_Section):
    """Limits of an output's range. Both ends pin it; `min` alone clamps what calibration finds."""

    min: Finite
    max: Finite | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Constraints:
        if self.max is not None and self.max <= self.min:
            raise ValueError("`max` must exceed `min`")
        return self


class OpSettings(_Section):
    """One entry of `op_type`."""

    is_input_quantized: OnlyTrue | None = None
    is_output_quantized: Flag | None = None
    is_symmetric: Flag | None = None
    params: dict[str, ParamSettings] = Field(default_factory=dict)
    supported_kernels: tuple[Kernel, ...] | None = Field(None, min_length=1)
    per_channel_quantization: Flag | None = None
    encoding_constraints: Constraints | None = None


class Supergroup(_Section):
    """A linear chain of op types that the target computes as one."""

    op_list: tuple[str, ...] = Field(min_length=2)


class ModelInput(_Section):
    """`model_input`: whether the model's inputs are quantized."""

    is_input_quantized: Flag | None = None


class ModelOutput(_Section):
    """`model_output`: whether the model's outputs are quantized; None leaves what the sections before said."""

    is_output_quantized: Flag | None = None


def _quantized_type(value: str) -> str:
    try:
        if value != FLOAT:
            parse_type(value)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


TypeName = Annotated[str, BeforeValidator(lambda v: _quantized_type(v) if isinstance(v, str) else v)]


class Extension(_Section):
    """The section `bitwright`: what the schema above can't say. Every key is optional.

    Attributes:
        extends: a target's name or a file (relative to this one) that this file changes; merged as JSON merge patch
            (RFC 7396): objects merge, null removes, everything else replaces.
        description: one line for people.
        weights, activations: types that hold when the user asks for none.
        integer_bias: biases of integer layers are int32 with scale s_input · s_weight, as integer runtimes compute.
        quantize_constants: constant operands of elementwise ops are quantized like activations.
        quantized_ops: op types that the target runs in integers; others run in float, and what they compute is
            quantized only where a quantized op reads it. None: every op that bitwright knows.
        ties: op types whose inputs and outputs share one grid.
        accumulator_bits: width of the integer accumulator.
        pair_sum_bits: 16 where kernels add the products of two neighbours in saturating int16 first, as ONNX Runtime's
            do on x64 without VNNI: scales of 8-bit weights are raised so that no such sum can saturate, and what
            still can is exported as uint8 (see `bitwright.bundle._saturation`).
        weight_scales: number type that the scales of weights are kept in, where it isn't float32: "float16",
            "bfloat16", or "float16+minimum" (`bitwright.grids.ScaleType`).
        runtime: the integer runtime that executes the exported model, for `verify`: "onnxruntime", "tflite", or one
            that a plugin registers.
        extra_op_types: custom op types that this file may name.
        in_banks: banks keep what it quantizes whether or not they are collected for it. Off for a target with many
            tensors that no other has, which then have to be asked for (`bitwright collect --target`).
    """

    extends: str | None = None
    description: str = ""
    weights: TypeName = "int8"
    activations: TypeName = "uint8"
    integer_bias: Annotated[bool, BeforeValidator(_flag)] = True
    quantize_constants: Annotated[bool, BeforeValidator(_flag)] = True
    quantized_ops: tuple[str, ...] | None = None
    ties: tuple[str, ...] = ("Concat", "AveragePool", "Resize", "Upsample", "CropAndResize")
    accumulator_bits: Literal[16, 32, 64] = 32
    pair_sum_bits: Literal[16] | None = None
    weight_scales: ScaleType | None = None
    runtime: str | None = None
    extra_op_types: tuple[str, ...] = ()
    in_banks: Annotated[bool, BeforeValidator(_flag)] = True

    @field_validator("activations")
    @classmethod
    def _no_blocks(cls, value: str) -> str:
        if value != FLOAT and isinstance(parse_type(value)[3], Blockwise):
            raise ValueError("blocks are for weights; activations have one scale")
        return value

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != FLOAT and isinstance(parse_type(value)[3], Dynamic):
            raise ValueError("a range at run time is for activations")
        return value

    @model_validator(mode="after")
    def _raised_or_rounded(self) -> Extension:
        if self.pair_sum_bits is not None and self.weight_scales is not None:
            raise ValueError("`pair_sum_bits` raises scales and `weight_scales` rounds them; leave one of them out")
        return self


class QuantSimConfig(_Section):
    """A whole configuration file. The first six sections are mandatory.

    `supergroup_pass_list` names the composite patterns that run as one op. A file without it gets those whose
    inside has no useful grid (`bitwright.graph.GRIDLESS`); one that has it gets what it lists, () for none, as AIMET
    does.
    """

    defaults: Defaults
    params: dict[str, ParamSettings]
    op_type: dict[str, OpSettings]
    supergroups: tuple[Supergroup, ...]
    model_input: ModelInput
    model_output: ModelOutput
    supergroup_pass_list: tuple[str, ...] | None = None
    bitwright: Extension = Extension()


def parse_config(raw: object, source: str) -> QuantSimConfig:
    """Validate the content of a configuration file.

    Args:
        raw: decoded JSON.
        source: file or preset name, for messages.

    Raises:
        TargetError: names source, key path, reason and what is allowed.
    """
    if not isinstance(raw, Mapping):
        raise TargetError(f"{source}: a target configuration is a JSON object, not {type(raw).__name__}")
    try:
        return QuantSimConfig.model_validate(dict(raw))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TargetError(f"{source}: {key_path(first['loc'])}: {_reason(first)}{more}") from None


def key_path(loc: Sequence[str | int]) -> str:
    """`("supergroups", 0, "op_list")` as people write it: supergroups[0].op_list."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "(top level)"


def _reason(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key, allowed = str(error["loc"][-1]), _keys_at(error["loc"][:-1])
        near = difflib.get_close_matches(key, allowed, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return "this key is mandatory and missing"
    got = f"got {_SHORT.repr(error['input'])}"
    if kind == "literal_error":
        return f"{got}; allowed: {context['expected']}"
    if kind == "value_error":
        return f"{got}; {context['error']}"
    return f"{got}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys_at(loc: Sequence[str | int]) -> list[str]:
    """Keys that the schema allows at a place."""
    here: Any = QuantSimConfig
    for part in loc:
        here = (
            here.model_fields[str(part)].annotation
            if _is_model(here)
            else get_args(here)[-1 if isinstance(part, str) else 0]
        )
        here = _unwrapped(here)
    return list(here.model_fields) if _is_model(here) else []


def _unwrapped(annotation: object) -> object:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
