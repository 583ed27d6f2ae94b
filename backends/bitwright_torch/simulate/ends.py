"""Where codes end, and activation functions before them, as the tensors that kernels take: made once for each value."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from bitwright.grids import Grid
from bitwright_torch.simulate.absorbed import absorbs

Bounds = tuple[float, float]
"""What an activation function clips to, with no gradient at either: ReLU (0, ∞), ReLU6 and its like."""


def ends(scale: Tensor, zero: Tensor, grid: Grid, bounds: Bounds | None) -> tuple[Tensor, Tensor, bool]:
    """Lowest and highest code seen from the zero point, float32, and whether they absorb the bounds (`absorbs`).

    They are looked up by the numbers that the grid has now, so that nothing has to be told when these change. That
    takes reading them, which only the CPU's own memory is quick at, and only plain tensors allow.

    Args:
        scale, zero: of the whole tensor, float32.
        grid: the codes.
        bounds: of an activation function that comes first.
    """
    if not (_is_readable(scale) and _is_readable(zero)):
        return grid.qmin - zero, grid.qmax - zero, False
    at = zero.item()
    low, high = grid.qmin - at, grid.qmax - at
    absorbed = bounds is not None and absorbs(scale.item(), low, high, *bounds)
    return _on_cpu(low), _on_cpu(high), absorbed


def _is_readable(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


@lru_cache(maxsize=2**12)
def _on_cpu(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


_KEPT: dict[tuple[Bounds, torch.device], tuple[Tensor, Tensor]] = {}


def as_tensors(bounds: Bounds, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds as tensors where another is; made once for plain tensors, as each would be a transfer to a GPU.

    Those that are made under `FakeTensorMode` are of no use outside of it, nor the other way round.
    """
    key = bounds, beside.device
    if type(beside) is Tensor and key in _KEPT:
        return _KEPT[key]
    with torch.inference_mode(False):
        floor, ceiling = (torch.tensor(v, dtype=torch.float32, device=beside.device) for v in bounds)
    if type(floor) is Tensor:
        _KEPT[key] = floor, ceiling
    return floor, ceiling
