"""Fake-quantization arithmetic on flat tensors: composed of torch ops, or compiled where that is bit-equal and pays.

The composed form is the reference grid (`bitwright.grids`) op by op; torch's own fake_quantize ops aren't used, since
they multiply by 1/scale and so move midpoints. The compiled form is the core pair (`bitwright.grids`) under
`torch.compile`, one loop over memory in place of four: on a CPU 3–4 times faster.

Compiling takes seconds, so it starts when a process has put `PAYS_AFTER` elements through the composed form. Before
its first use it is compared with the composed form on midpoints, their neighbours and values beyond the grid; where
one bit differs, or no compiler works, the composed form stays. Nothing here can fail the user's run.

Environment:
    BITWRIGHT_TORCH_KERNELS: ``auto`` (default), ``composed`` never compiles, ``compiled`` does at the first use.
"""

from __future__ import annotations

import logging
import os
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import first_line
from bitwright.grids import learned_vjp, rounded_vjp

PAYS_AFTER = 2**30
"""Elements after which compiling pays: it saves 10 ns each on two cores, and takes about 10 s (cached: 3 s)."""

SMALL = 2**15
"""Tensors below this many elements are composed: torch runs them on one thread, compiled loops wait for all."""

logger = logging.getLogger("bitwright.torch")


class TorchNamespace:
    """`bitwright.grids._gradients.Namespace` of torch, and the namespaces that extend it."""

    @staticmethod
    def round(x: Tensor, /) -> Tensor:
        """Halves to even."""
        return torch.round(x)

    @staticmethod
    def where(mask: Tensor, x: Any, y: Any, /) -> Tensor:
        """x where the mask is true, else y."""
        return torch.where(mask, x, y)

    @staticmethod
    def reshape(x: Tensor, shape: tuple[int, ...], /) -> Tensor:
        """The same elements in another shape."""
        return torch.reshape(x, shape)

    @staticmethod
    def transpose(x: Tensor, axes: tuple[int, ...], /) -> Tensor:
        """Axes in another order."""
        return torch.permute(x, axes)

    @staticmethod
    def clip(x: Tensor, low: Any, high: Any, /) -> Tensor:
        """Between two tensors or two numbers."""
        return torch.clamp(x, low, high)

    @staticmethod
    def sum(x: Tensor, axes: tuple[int, ...], /) -> Tensor:
        """Over axes."""
        return torch.sum(x, axes)

    # -- of `range_numbers.RangeNamespace`

    lowest = staticmethod(torch.amin)
    highest = staticmethod(torch.amax)
    filled = staticmethod(torch.full_like)

    @staticmethod
    def divided(x: Tensor, by: float, /) -> Tensor:
        """x / by; on GPUs, torch would multiply by a number's reciprocal."""
        return x / torch.as_tensor(by, dtype=x.dtype, device=x.device)

    @staticmethod
    def minimum(x: Tensor, y: Any, /) -> Tensor:
        """The smaller of two."""
        return torch.clamp(x, max=y)

    @staticmethod
    def maximum(x: Tensor, y: Any, /) -> Tensor:
        """The larger of two."""
        return torch.clamp(x, min=y)

    @staticmethod
    def float64(x: Tensor, /) -> Tensor:
        """In double."""
        return x.double()

    @staticmethod
    def float32(x: Tensor, /) -> Tensor:
        """In single."""
        return x.float()

    # -- of `run_time.RunTimeNamespace`

    @staticmethod
    def spans(x: Tensor, per_token: bool, /) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of rows, or of all values."""
        found = torch.aminmax(x, dim=-1, keepdim=True) if per_token else torch.aminmax(x)
        return found.min, found.max

    # -- of `training_rules.TrainingNamespace`

    exp = staticmethod(torch.exp)

    @staticmethod
    def stop(x: Tensor, /) -> Tensor:
        """Without a gradient."""
        return x.detach()


NAMESPACE = TorchNamespace()


def composed_forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`gradients.rounded`, in place on one temporary."""
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


def composed_backward(g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`gradients.rounded_vjp`."""
    q = torch.div(x, scale).round_()
    return torch.where((q >= low).logical_and_(q <= high), g, 0.0)


def composed_learned(g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients.learned_vjp`, its shares summed over the last axis."""
    dx, ds, dz = learned_vjp(NAMESPACE, g, x, scale, low, high)
    return dx, ds.sum(-1), dz.sum(-1)


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`gradients.rounded`, its codes clipped by ReLUs: compiled, one instruction each, where a clamp takes eight.

    With q = round(x / scale) and whole numbers low ≤ 0 ≤ high less than 2**24 apart, high − relu(high − low −
    relu(q − low)) is q between them, since all three differences are exact there; low below, as the inner one is 0;
    and high above and at ∞, as the outer one is. NaN passes. Zeros are positive, whatever the sign of x.
    """
    above = torch.relu(torch.round(torch.div(x, scale)) - low)
    return (high - torch.relu((high - low) - above)) * scale


def _backward(g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return rounded_vjp(NAMESPACE, g, x, scale, low, high)  # type: ignore[no-any-return]


def clipped_forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """`composed_forward` of what an activation function clips to its bounds first, in place on one temporary."""
    return torch.clamp(x, floor, ceiling).div_(scale).round_().clamp_(low, high).mul_(scale)


def clipped_backward(
    g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor
) -> Tensor:
    """Its gradient to x: nothing at a bound, as of ReLU and ReLU6."""
    dx = composed_backward(g, torch.clamp(x, floor, ceiling), scale, low, high)
    return torch.where((x > floor).logical_and_(x < ceiling), dx, 0.0)


def clipped_learned(
    g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with gradients to scale and zero point, as `composed_learned`."""
    dx, ds, dz = composed_learned(g, torch.clamp(x, floor, ceiling), scale, low, high)
    return torch.where((x > floor) & (x < ceiling), dx, 0.0), ds, dz


def _clipped_forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    return _forward(torch.clamp(x, floor, ceiling), scale, low, high)


def _clipped_backward(
    g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor
) -> Tensor:
    dx = _backward(g, torch.clamp(x, floor, ceiling), scale, low, high)
    return torch.where((x > floor) & (x < ceiling), dx, 0.0)


def forward_over(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
    """`composed_forward` that leaves its result in x."""
    x.div_(scale).round_().clamp_(low, high).mul_(scale)


def clipped_forward_over(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    """`clipped_forward` that leaves its result in x."""
    forward_over(x.clamp_(floor, ceiling), scale, low, high)


def _forward_over(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
    x.copy_(_forward(x, scale, low, high))


def _clipped_forward_over(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    x.copy_(_clipped_forward(x, scale, low, high, floor, ceiling))


Kernel = Callable[..., Any]
_PLAIN = {Tensor, nn.Parameter}
"""What compiled kernels take."""
_FORMS: dict[str, tuple[Kernel, Kernel]] = {
    "forward": (composed_forward, _forward),
    "backward": (composed_backward, _backward),
    "learned": (composed_learned, composed_learned),
    "clipped_forward": (clipped_forward, _clipped_forward),
    "clipped_backward": (clipped_backward, _clipped_backward),
    "clipped_learned": (clipped_learned, clipped_learned),
    "forward_over": (forward_over, _forward_over),
    "clipped_forward_over": (clipped_forward_over, _clipped_forward_over),
}


class Kernels:
    """The fastest kernels that this process has found trustworthy, by what they do, rank and device type."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, int, str], Kernel | None] = {}
        self._seen = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, *operands: Tensor, absorbed: bool = False) -> Any:
        """Run "forward" (x, scale, low, high), "backward" (g, x, …) or "learned" (g, x, …).

        "forward_over" leaves its result in x, and returns nothing.

        Tensors are (elements,) with scalars, or (groups, elements) with columns (groups, 1); float32. With "clipped_"
        before its name, each takes the bounds (…, floor, ceiling) of an activation function that comes first. If the
        codes' ends absorb them (`absorbed.absorbs`), a compiled forward pass leaves them out. A composed one doesn't:
        it would give some zeros a negative sign.
        """
        composed = _FORMS[name][0]
        x = operands[0]
        size = x.numel()
        # Compiled code without guards reads memory, which tensors of other classes (`FakeTensor`) may have none of.
        plain = {type(t) for t in operands} <= _PLAIN
        if size < SMALL or x.shape[-1] < 2 or x.shape[0] < 2 or not plain:
            return composed(*operands)
        own, taken = (name.removeprefix("clipped_"), operands[:-2]) if absorbed else (name, operands)
        key = (own, x.ndim, x.device.type)
        if key not in self._compiled:
            self._seen += size
            if not self._wanted():
                return composed(*operands)
            with self._lock:
                if key not in self._compiled:
                    self._compiled[key] = _trusted(own, x.ndim, x.device)
        kernel = self._compiled[key]
        if kernel is None:
            return composed(*operands)
        try:
            if not torch.is_grad_enabled():
                return kernel(*taken)
            with torch.no_grad():
                return kernel(*(t.detach() for t in taken))
        except Exception as error:  # a recompilation for another layout may fail where the first one didn't
            logger.warning("compiled fake quantization gave up (%s); composed from now on", first_line(error))
            self._compiled[key] = None
            return composed(*operands)

    def _wanted(self) -> bool:
        mode = os.environ.get("BITWRIGHT_TORCH_KERNELS", "auto")
        return mode == "compiled" or (mode != "composed" and self._seen >= PAYS_AFTER)

    def state(self) -> dict[str, str]:
        """What is in use, for `doctor` and reports: "forward/1/cpu" → "compiled" or "composed"."""
        return {"/".join(map(str, k)): "composed" if v is None else "compiled" for k, v in self._compiled.items()}


kernels = Kernels()
"""The process's kernels."""


def _trusted(name: str, rank: int, device: torch.device) -> Kernel | None:
    composed, source = _FORMS[name]
    # What is called has one type, device, rank and dense layout, so the guards that torch.compile would check at each
    # call, and compile anew for (inference mode, autocast, gradients, …), can't matter. Compiled code belongs to a
    # code object: each kernel needs its own.
    own = types.FunctionType(source.__code__.replace(co_name=f"{name}_{rank}_{device.type}"), source.__globals__)
    try:
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        if _has_exact_division():
            options["eager_numerics.division_rounding"] = True
        compiled = torch.compile(own, dynamic=True, fullgraph=True, options=options)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for size in (40_009, 32_768, 7):  # with a vector's tail, without, and none whole
                operands = _probe(name, rank, size, device)
                if not _equal(_results(compiled, operands), _results(composed, operands)):
                    logger.warning("compiled fake quantization isn't bit-equal on %s; it stays composed", device)
                    return None
    except Exception as error:
        logger.info("fake quantization stays composed: compiling failed (%s)", first_line(error))
        return None
    return compiled


def _results(kernel: Kernel, operands: list[Tensor]) -> Any:
    """What a kernel returns, or leaves in its first operand."""
    copies = [t.clone() for t in operands]
    returned = kernel(*copies)
    return copies[0] if returned is None else returned


def _has_exact_division() -> bool:
    # Triton's own division is off by an ulp; the option exists in recent releases only.
    from torch._inductor import config

    return hasattr(getattr(config, "eager_numerics", None), "division_rounding")


def _probe(name: str, rank: int, size: int, device: torch.device) -> list[Tensor]:
    """Operands on which a wrong rounding shows: codes, midpoints, their neighbours, values far outside, zeros, NaN."""
    generator = torch.Generator().manual_seed(size)
    rows = 1 if rank == 1 else 5
    scale = torch.rand(rows, 1, generator=generator) * 0.3 + 1e-3
    halves = torch.randint(-600, 600, (rows, size), generator=generator) / 2
    x = halves * scale
    third = size // 3
    infinity = torch.tensor(torch.inf)
    x[:, :third] = torch.nextafter(x[:, :third], infinity)
    x[:, third : 2 * third] = torch.nextafter(x[:, third : 2 * third], -infinity)
    zero = torch.randint(0, 200, (rows, 1), generator=generator).float()
    g = torch.randn(rows, size, generator=generator)
    operands = [x, scale, 0.0 - zero, 255.0 - zero]
    if "forward" in name:
        edges = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, -0.0])
        x[:, -7:] = edges  # in a vector's tail, and
        x[:, : size - 7 : size // 3] = torch.nan  # within vectors
    else:
        operands.insert(0, g)
    wide = len(operands) - 3
    if rank == 1:
        operands = [t.reshape(-1) if i < wide else t.reshape(()) for i, t in enumerate(operands)]
    if name.startswith("clipped"):  # the upper bound is a value that occurs
        operands += [torch.zeros(()), halves.abs().max() * 0.25 * scale[0, 0]]
    return [t.to(device) for t in operands]


def _equal(found: Any, expected: Any) -> bool:
    """Elementwise results to the bit, but for the sign of zeros; sums may be taken in another order."""
    if isinstance(found, Tensor):
        return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
    sums = zip(found[1:], expected[1:], strict=True)
    return torch.equal(found[0], expected[0]) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in sums)
