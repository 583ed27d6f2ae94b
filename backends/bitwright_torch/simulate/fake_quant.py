"""`FakeQuantize`: the module at a site. It holds the encoding as tensors, and rounds what passes to the grid."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitwright.grids import (
    UNSET,
    Encoding,
    Granularity,
    GridPolicy,
    Groups,
    PerTensor,
    encoding_kind,
    encoding_of_kind,
    followed,
    learned_scale,
    learned_zero,
    lsq_factor,
    min_max_grid,
    present,
    ratio_to,
    stored_granularity,
)
from bitwright.grids import two_level as two_level_encoding
from bitwright_torch.simulate.ends import Bounds
from bitwright_torch.simulate.kernels import NAMESPACE
from bitwright_torch.simulate.rounding import clipped, round_at_run_time, round_to_float, round_to_grid


class FakeQuantize(nn.Module):
    """Rounds a tensor to its site's grid, or passes it while bypassed.

    A parameter's grid follows its values whenever they change; with `learn`, grids are trained: see
    `bitwright.grids._training_rules`.

    The state dict holds everything, the kind of grid too (`_extra_state`, JSON as bytes). One that has nothing of
    this site leaves it as it is, so float checkpoints load.

    Args:
        layout: native axis of each canonical axis, for parameters; None for activations.
        shape: of the parameter, in its own layout.
        derived: the site's encoding follows from others.

    Attributes:
        enabled: whether it rounds.
        policy: what training does with the grid.
        scale: float32 buffer, in the encoding's shape.
        zero_point: int32 buffer of the same shape.
        ratio: float64 buffer, of the scale to the min-max scale of the parameter; 1 for activations.
        log_scale, zero_shift: trained parameters, where `learn` was called.
    """

    scale: Tensor
    zero_point: Tensor
    ratio: Tensor
    log_scale: nn.Parameter | None
    zero_shift: nn.Parameter | None

    def __init__(
        self, layout: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None, *, derived: bool = False
    ) -> None:
        super().__init__()
        self.layout, self.shape, self.derived = layout, shape, derived
        self.enabled = False
        self.learns = False
        self.evened = False
        self._form = UNSET
        self._set_policy()
        self._granularity: Granularity = PerTensor()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("ratio", torch.ones((), dtype=torch.float64))
        self.register_parameter("log_scale", None)
        self.register_parameter("zero_shift", None)
        self._seen: _Version | None = None
        self._rounded: tuple[list[_Version | None], Tensor] | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether the site is a parameter."""
        return self.shape is not None

    @property
    def follows(self) -> bool:
        """Whether the grid follows the parameter's values."""
        return self.policy.follows

    # -- the encoding

    def set(self, encoding: Encoding | None, parameter: Tensor | None = None) -> None:
        """Install an encoding; None bypasses the site.

        Args:
            encoding: in canonical layout.
            parameter: the parameter's present values, where the site is one.
        """
        self._rounded = None
        self.enabled = encoding is not None
        self._adopt(self._form if encoding is None else encoding)
        if encoding is None:
            return
        device = self.scale.device
        self._put("scale", torch.tensor(encoding.scale, device=device))
        self._put("zero_point", torch.tensor(encoding.zero_point, device=device))
        self._put("ratio", torch.ones(encoding.scale.shape, dtype=torch.float64, device=device))
        if parameter is not None:
            self._seen = _version(parameter)
            if not encoding.frozen:
                self.ratio.copy_(ratio_to(NAMESPACE, self.scale, self._min_max(parameter)[0]))
        if self.learns:
            self._reset_learned()

    def get(self) -> Encoding | None:
        """The encoding in force; None while bypassed. Learned and followed numbers are read off the device."""
        if not self.enabled:
            return None
        with torch.no_grad():
            scale, zero = self.numbers()
        return present(self._form, scale.cpu().numpy(), zero.cpu().numpy(), self.learns)

    def learn(self, *, evened: bool = False) -> None:
        """Train the grid from its present encoding on.

        Args:
            evened: scale its gradients as LSQ does (`gradients.lsq_factor`).
        """
        self.learns, self.evened = True, evened
        self._set_policy()
        self._reset_learned()

    def _reset_learned(self) -> None:
        policy = self.policy
        self._set_learned("log_scale", torch.zeros_like(self.scale) if policy.learns else None)
        self._set_learned("zero_shift", torch.zeros_like(self.scale) if policy.moves else None)

    def _set_learned(self, name: str, value: Tensor | None) -> None:
        held: nn.Parameter | None = getattr(self, name)
        if held is None or value is None or held.shape != value.shape:
            setattr(self, name, None if value is None else nn.Parameter(value))
        else:  # an optimizer may hold it
            held.data.copy_(value)

    def _set_policy(self) -> None:
        form = self._form if self.enabled else None
        self.policy = GridPolicy.of(form, parameter=self.is_parameter, range_learning=self.learns, derived=self.derived)

    def _adopt(self, encoding: Encoding) -> None:
        self._form = encoding
        self._set_policy()
        self._granularity = stored_granularity(encoding.granularity, self.layout)

    def _put(self, name: str, value: Tensor) -> None:
        held: Tensor = getattr(self, name)
        if held.shape == value.shape:
            held.copy_(value)
        else:
            setattr(self, name, value)

    # -- rounding

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point in force, float32; differentiable where they are learned."""
        scale, zero = self.scale, self.zero_point.float()
        if self.log_scale is not None:
            scale = learned_scale(NAMESPACE, scale, self.log_scale, self._form)
        if self.zero_shift is not None:
            zero = learned_zero(NAMESPACE, zero, self.zero_shift, self._form.grid.qmin, self._form.grid.qmax)
        return scale, zero

    def forward(self, x: Tensor, bounds: Bounds | None = None, spent: bool = False) -> Tensor:
        """x on the grid, in x's type.

        Args:
            x: the site's values.
            bounds: of an activation function that is computed here too, on activations.
            spent: the graph has made x for this call alone; see `round_to_grid`.
        """
        if not self.enabled:
            return x if bounds is None else clipped(x, bounds)
        if not self.is_parameter:
            return self.round(x, *self.numbers(), bounds, spent and not self._is_watched())
        if torch.compiler.is_compiling():
            return self.round(x, *(self._followed(x) if self.follows else self.numbers()))
        recorded = torch.is_grad_enabled() and (x.requires_grad or self.log_scale is not None)
        if self.training or recorded:
            self._rounded = None
            if self.follows:
                self.follow(x)
            return self.round(x, *self.numbers())
        # While x and the grid are what was rounded, the grid needn't follow x either.
        if self._rounded is None or not _unchanged(self._made_of(x), self._rounded[0]):
            if self.follows:
                self.follow(x)
            with torch.inference_mode(False), torch.no_grad():  # it may serve a backward pass later
                self._rounded = [_version(t) for t in self._made_of(x)], self.round(x, *self.numbers())
        return self._rounded[1]

    def _made_of(self, x: Tensor) -> list[Tensor]:
        """What a rounded parameter depends on."""
        return [x, self.scale] if self.log_scale is None else [x, self.scale, self.log_scale]

    def _is_watched(self) -> bool:
        """Whether a hook, or a mode, sees what the module is called with or an op's result, and may keep it."""
        everywhere = nn.modules.module
        if not torch.compiler.is_compiling() and (
            torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        ):
            return True
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or everywhere._global_forward_hooks
            or everywhere._global_forward_pre_hooks
        )

    def round(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        bounds: Bounds | None = None,
        spent: bool = False,
    ) -> Tensor:
        """x, clipped to bounds where there are any, on the grid with these numbers, or with those in force."""
        if scale is None or zero is None:
            scale, zero = self.numbers()
        form, factor = self._form, 1.0
        if bounds is not None and (form.run_time is not None or form.float_format is not None):
            x, bounds = clipped(x, bounds), None
        if form.run_time is not None:
            return round_at_run_time(x, form.run_time)
        if self.evened:
            factor = lsq_factor(Groups.of(tuple(x.shape), self._granularity).elements, form.grid)
        if form.float_format is not None:
            return round_to_float(x, scale, form.float_format, self._granularity, factor)
        return round_to_grid(x, scale, zero, form.grid, self._granularity, factor, bounds, spent)

    def _followed(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            base, zero = self._min_max(parameter)
            scale, zero = followed(NAMESPACE, base, zero, self.ratio, self.zero_point.double(), self._form)
            return scale, zero.float()

    def _min_max(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (float64) of the grid that covers the parameter's present values."""
        groups = Groups.of(tuple(parameter.shape), self._granularity)
        return min_max_grid(NAMESPACE, groups.cut(NAMESPACE, parameter.detach().float()), self._form, groups)

    def follow(self, parameter: Tensor) -> None:
        """Fit the grid to the parameter's present values, if they have changed."""
        if _unchanged([parameter], [self._seen]) and not self.training:
            return
        self._seen = _version(parameter)
        with torch.inference_mode(False):
            scale, zero = self._followed(parameter)
            # New tensors, not new values: the old ones may be saved for a backward pass that is still to come.
            self.scale, self.zero_point = scale, zero.to(torch.int32)

    # -- state

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; what was rounded for evaluation is forgotten."""
        self._rounded = self._seen = None
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        """The kind of grid, as bytes of JSON."""
        text = json.dumps({"enabled": self.enabled, "encoding": encoding_kind(self._form)})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` gave."""
        form, self.enabled = _saved(state, self.scale, self.zero_point)
        self._adopt(two_level_encoding(form))
        self._seen = self._rounded = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return
        folds = not self.learns and any(prefix + n in state_dict for n in ("log_scale", "zero_shift"))
        if self.log_scale is None and prefix + "log_scale" in state_dict:
            factor = torch.exp(state_dict.pop(prefix + "log_scale"))
            state_dict[prefix + "scale"] = state_dict[prefix + "scale"] * factor
        if self.zero_shift is None and prefix + "zero_shift" in state_dict:
            # In the grid of the module that was saved, which this one has only once it is loaded.
            form, _ = _saved(*(state_dict[prefix + n] for n in ("_extra_state", "scale", "zero_point")))
            grid = form.grid
            zero, shift = state_dict[prefix + "zero_point"].float(), state_dict.pop(prefix + "zero_shift")
            moved = learned_zero(NAMESPACE, zero, shift, grid.qmin, grid.qmax)
            state_dict[prefix + "zero_point"] = moved.to(torch.int32)
        for name in ("scale", "zero_point", "ratio", "log_scale", "zero_shift"):
            value, held = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and held is not None and value.shape != held.shape:
                fresh = torch.zeros(value.shape, dtype=held.dtype, device=held.device)
                setattr(self, name, nn.Parameter(fresh) if isinstance(held, nn.Parameter) else fresh)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if folds:
            # Learned scales don't follow the weights.
            self._adopt(self._form.with_(frozen=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32: `model.half()` must not round scales."""
        held = {n: t.detach().clone() for n, t in (*self._buffers.items(), *self._parameters.items()) if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in held.items():
            now: Tensor = getattr(self, name)
            if now.dtype != before.dtype:
                if isinstance(now, nn.Parameter):
                    now.data = before.to(now.device)
                else:
                    setattr(self, name, before.to(now.device))
        self._rounded = self._seen = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounded": None, "_seen": None}

    def extra_repr(self) -> str:
        """The grid in words."""
        if not self.enabled:
            return "bypassed"
        form = self._form
        kind = form.float_format or f"{'int' if form.signed else 'uint'}{form.bits}"
        return f"{kind}, {type(form.granularity).__name__}" + (", learned" if self.learns else "")


def _saved(state: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Encoding, bool]:
    """The encoding of a saved module, and whether it was enabled."""
    found = json.loads(bytes(state.cpu().tolist()).decode())
    form = encoding_of_kind(found["encoding"], scale.cpu().numpy(), zero_point.cpu().numpy())
    return form, bool(found["enabled"])


@dataclass(frozen=True, slots=True)
class _Version:
    """A tensor as it was: it is still so while the same memory is seen in the same way, and nothing was written to it.

    An address alone doesn't tell: what is computed from a parameter may change, and the new value lie where the old
    one lay.
    """

    memory: weakref.ref[torch.UntypedStorage]
    state: tuple[object, ...]

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this one, unchanged."""
        return self.memory() is tensor.untyped_storage() and self.state == _state(tensor)


def _version(tensor: Tensor) -> _Version | None:
    """What tells whether a tensor's values changed by any in-place op that autograd sees; None where nothing does."""
    return None if tensor.is_inference() else _Version(weakref.ref(tensor.untyped_storage()), _state(tensor))


def _state(tensor: Tensor) -> tuple[object, ...]:
    return tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _unchanged(tensors: Sequence[Tensor], versions: Sequence[_Version | None]) -> bool:
    return len(tensors) == len(versions) and all(
        v is not None and v.is_still(t) for t, v in zip(tensors, versions, strict=True)
    )
