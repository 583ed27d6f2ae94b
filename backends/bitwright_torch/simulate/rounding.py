"""Fake quantization of torch tensors, differentiable: the core's pair as one autograd function on the fast kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.grids import (
    CODE_TABLES,
    DTYPES,
    WIDE,
    FloatFormat,
    Granularity,
    Grid,
    Groups,
    PerTensor,
    RunTimeGrid,
    cast_vjp,
    fake_quantize,
    fake_quantize_vjp,
    largest_of,
    run_time_rounded,
)
from bitwright_torch.simulate.ends import Bounds, as_tensors, ends
from bitwright_torch.simulate.kernels import NAMESPACE, kernels
from bitwright_torch.simulate.passing import passing


def round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    granularity: Granularity,
    factor: float = 1.0,
    bounds: Bounds | None = None,
    spent: bool = False,
) -> Tensor:
    """x on an integer grid, in x's type; computed in float32 and bit-equal to `grid.fake_quantize`.

    Args:
        x: any float tensor.
        scale, zero_point: float32 in the granularity's shape; gradients flow to those that require one.
        grid: the codes.
        granularity: in the tensor's own layout.
        factor: of the gradients to scale and zero point.
        bounds: of an activation function that comes first; where one scale serves the whole tensor, both are one pass
            over memory.
        spent: x is memory of its own that nobody reads afterwards: where no gradient is recorded, the result may take
            its place, which saves writing to other memory.
    """
    if bounds is not None and (
        grid.steps >= WIDE or not isinstance(granularity, PerTensor) or torch.compiler.is_compiling()
    ):
        x, bounds = clipped(x, bounds), None
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        result: Tensor = _RoundToGrid.apply(x, scale, zero_point, grid, granularity, factor, bounds)  # type: ignore[no-untyped-call]
        return result
    return _rounded(x, scale, zero_point, grid, granularity, bounds, spent)


def clipped(x: Tensor, bounds: Bounds) -> Tensor:
    """What the activation function with these bounds computes."""
    floor, ceiling = bounds
    return torch.relu(x) if bounds == (0.0, math.inf) else functional.hardtanh(x, floor, ceiling)


def round_at_run_time(x: Tensor, grid: RunTimeGrid) -> Tensor:
    """x on the grid that its own values span, in x's type; bit-equal to `Encoding.fake_quantize`."""
    if not x.numel():
        return x
    trained = torch.is_grad_enabled() and x.requires_grad
    y: Tensor = run_time_rounded(NAMESPACE, x.float(), grid, trained=trained)
    return y.to(x.dtype)


def round_to_float(
    x: Tensor, scale: Tensor, form: FloatFormat, granularity: Granularity, factor: float = 1.0
) -> Tensor:
    """x in a float format and back, in x's type, saturating; bit-equal to `grid.cast_float`."""
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: Tensor = _RoundToFloat.apply(x, scale, form, granularity, factor)  # type: ignore[no-untyped-call]
        return result
    return _cast(x, scale, form, granularity)


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        grid: Grid,
        granularity: Granularity,
        factor: float,
        bounds: Bounds | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.grid, ctx.granularity, ctx.factor, ctx.bounds = grid, granularity, factor, bounds
        return _rounded(x, scale, zero, grid, granularity, bounds)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = cotangents
        x, scale, zero = ctx.saved_tensors
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, ds, dz = _backward(g, x, scale, zero, ctx.grid, ctx.granularity, learned, ctx.bounds)
        if ds is not None and ctx.factor != 1.0:
            ds, dz = ds * ctx.factor, dz * ctx.factor
        return dx.to(x.dtype), ds, dz, None, None, None, None


class _RoundToFloat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, form: FloatFormat, granularity: Granularity, factor: float
    ) -> Tensor:
        y = _cast(x, scale, form, granularity)
        ctx.save_for_backward(x, y, scale)
        ctx.form, ctx.granularity, ctx.factor = form, granularity, factor
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = cotangents
        x, y, scale = ctx.saved_tensors
        groups, largest = Groups.of(tuple(x.shape), ctx.granularity), largest_of(ctx.form)
        learned = ctx.needs_input_grad[1]
        dx, ds, _ = cast_vjp(NAMESPACE, g.float(), x.float(), y.float(), scale, largest, groups, learned=learned)
        return dx.to(x.dtype), None if ds is None else ds * ctx.factor, None, None, None


def _rounded(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    granularity: Granularity,
    bounds: Bounds | None = None,
    spent: bool = False,
) -> Tensor:
    if isinstance(granularity, PerTensor) and grid.steps < WIDE and not torch.compiler.is_compiling():
        return _rounded_per_tensor(x, scale, zero, grid, bounds, spent)
    groups = Groups.of(tuple(x.shape), granularity)
    value = x.float()
    if grid.steps >= WIDE:
        return _rounded_wide(value, scale, zero, grid, groups).to(x.dtype)
    if not torch.compiler.is_compiling() and _in_rows(groups):
        columns = (v.reshape(-1, 1) for v in (scale, grid.qmin - zero, grid.qmax - zero))
        y = kernels("forward", value.reshape(scale.numel(), -1), *columns)
        return y.view(x.shape).to(x.dtype)  # type: ignore[no-any-return]
    general: Tensor = fake_quantize(NAMESPACE, value, scale, zero, grid, groups)
    return general.to(x.dtype)


def _rounded_per_tensor(
    x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, bounds: Bounds | None, spent: bool
) -> Tensor:
    value = _dense(x.float())
    low, high, absorbed = ends(scale, zero, grid, bounds)
    name, limits = ("forward", ()) if bounds is None else ("clipped_forward", as_tensors(bounds, value))
    if spent:
        kernels(f"{name}_over", _flat(value), scale, low, high, *limits, absorbed=absorbed)
        return value.to(x.dtype)
    return _shaped(kernels(name, _flat(value), scale, low, high, *limits, absorbed=absorbed), value).to(x.dtype)


def _rounded_wide(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, groups: Groups) -> Tensor:
    s, z = (groups.broadcast(NAMESPACE, v) for v in (scale, zero.double()))
    q = torch.round(groups.cut(NAMESPACE, x).double() / s.double()).add_(z).clamp_(grid.qmin, grid.qmax)
    result: Tensor = groups.joined(NAMESPACE, (q - z).float() * s)
    return result


def _backward(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    granularity: Granularity,
    learned: bool,
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor | None, Any]:
    groups = Groups.of(tuple(x.shape), granularity)
    value, g = x.float(), g.float()
    if grid.steps >= WIDE:
        g, value, scale, zero = (v.double() for v in (g, value, scale, zero))
        dx, ds, dz = fake_quantize_vjp(NAMESPACE, g, value, scale, zero, grid, groups, learned=learned)
        return dx.float(), None if ds is None else ds.float(), None if dz is None else dz.float()
    rows = bool(groups.scale) and _in_rows(groups)
    if torch.compiler.is_compiling() or (groups.scale and not rows):
        return fake_quantize_vjp(NAMESPACE, g, value, scale, zero, grid, groups, learned=learned)
    low, high = grid.qmin - zero, grid.qmax - zero
    if rows:
        operands = [value.reshape(scale.numel(), -1), *(v.reshape(-1, 1) for v in (scale, low, high))]
        cotangent = g.reshape(operands[0].shape)
    else:
        value = _dense(value)
        operands = [_flat(value), scale, low, high]
        cotangent = _flat(g if g.stride() == value.stride() else torch.empty_like(value).copy_(g))
    if not rows and not learned and value.device.type == "cpu":
        limits = passing(scale.item(), low.item(), high.item())
        if limits is not None:
            dx = _between(cotangent, operands[0], limits, bounds)
            return _shaped(dx, value), None, None
    kind = ""
    if bounds is not None:
        kind, operands = "clipped_", [*operands, *as_tensors(bounds, value)]
    if not learned:
        dx = kernels(f"{kind}backward", cotangent, *operands)
        return dx.view(x.shape) if rows else _shaped(dx, value), None, None
    dx, ds, dz = kernels(f"{kind}learned", cotangent, *operands)
    return dx.view(x.shape) if rows else _shaped(dx, value), ds.reshape(groups.scale), dz.reshape(groups.scale)


def _cast(x: Tensor, scale: Tensor, form: FloatFormat, granularity: Granularity) -> Tensor:
    groups = Groups.of(tuple(x.shape), granularity)
    s, largest = groups.broadcast(NAMESPACE, scale), largest_of(form)
    value = torch.div(groups.cut(NAMESPACE, x).float(), s)
    if form in CODE_TABLES:
        value = CODE_TABLES[form].rounded(NAMESPACE, value)
    else:
        value = value.clamp(-largest, largest).to(getattr(torch, DTYPES[form])).float()
    result: Tensor = groups.joined(NAMESPACE, value * s)
    return result.to(x.dtype)


def _between(g: Tensor, x: Tensor, limits: tuple[float, float], bounds: Bounds | None) -> Tensor:
    """The gradient where x lies strictly between limits and bounds: one pass over memory, as torch has an op for it."""
    low, high = limits
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    dx: Tensor = torch.ops.aten.hardtanh_backward(g, x, low, high)
    return dx


def _in_rows(groups: Groups) -> bool:
    """Whether the elements that share a scale lie together, scale after scale."""
    kept = len(groups.split) - len(groups.axes)
    return not groups.swapped and groups.axes == tuple(range(kept, len(groups.split)))


def _dense(x: Tensor) -> Tensor:
    """A tensor whose elements fill one piece of memory, in whatever order of axes."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    return flat.view(like.shape) if like.is_contiguous() else flat.as_strided(like.shape, like.stride())
