"""What was captured against the module that it was captured from (see `bitwright.backend.compare_capture`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitwright.backend import Finding, compare_capture, user_state_kept
from bitwright_torch.graph.calling import Arguments
from bitwright_torch.graph.model import NAMES, CapturedModel, info, program_of


def compare(module: nn.Module, arguments: Arguments, model: CapturedModel, fewest: int = 1) -> Finding | None:
    """Whether a captured model computes what the module does.

    Args:
        module: what was captured, in evaluation mode. What its calls leave in buffers and in Python is put back.
        arguments: of its `forward`, the sample; calls are given copies.
        model: what it was captured as, in evaluation mode.
        fewest: samples that it takes.
    """
    program = program_of(model)
    leaves, structure = pytree.tree_flatten((arguments.args, arguments.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    nodes = {info(n).tensor: info(n) for n in program.graph.nodes if n.op == "placeholder"}
    specs = [(nodes[program.convention.names[i]].shape or (), nodes[program.convention.names[i]].dtype) for i in places]

    def run(called: nn.Module) -> Callable[[Sequence[Any]], list[Any]]:
        def results(batch: Sequence[Any]) -> list[Any]:
            given = list(leaves)
            for i, value in zip(places, batch, strict=True):
                given[i] = value.clone()
            args, kwargs = pytree.tree_unflatten(given, structure)
            return [_array(x) for x in pytree.tree_leaves(called(*args, **kwargs)) if isinstance(x, torch.Tensor)]

        return results

    dtypes = (info(n).dtype for n in program.graph.nodes if NAMES in n.meta)
    size = sum(p.nbytes for p in module.parameters())
    with torch.no_grad(), _as_it_was(module, model) as own, user_state_kept(module, holders=(nn.Module,)):
        sample = [leaves[i] for i in places]
        restore, drew = own
        return compare_capture(
            run(module), run(model), specs, sample, dtypes=dtypes, size=size, fewest=fewest, restore=restore, drew=drew
        )


@contextmanager
def _as_it_was(*modules: nn.Module) -> Iterator[tuple[Callable[[], None], Callable[[], bool]]]:
    """Buffers and PyTorch's random numbers are put back at the end; by the first function too, the numbers to a
    fixed state, and the second says whether these have moved since."""
    held = [(m, dict(m._buffers)) for module in modules for m in module.modules()]
    values = [(b, b.clone()) for b in {id(b): b for _, own in held for b in own.values() if b is not None}.values()]
    seeded: list[torch.Tensor] = []

    def restore() -> None:
        for owner, buffers in held:
            owner._buffers.clear()
            owner._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)
        torch.manual_seed(0)
        seeded[:] = _states()

    def drew() -> bool:
        return any(not torch.equal(a, b) for a, b in zip(seeded, _states(), strict=True))

    with torch.random.fork_rng():
        try:
            yield restore, drew
        finally:
            restore()


def _states() -> list[torch.Tensor]:
    """Of PyTorch's random generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _array(x: torch.Tensor) -> Any:
    known = x.dtype in (torch.float16, torch.float32, torch.float64) or not x.is_floating_point()
    found = x if known else x.float()  # numpy has no bfloat16, and no floats of 8 bits
    return found.detach().to("cpu", copy=True).numpy()  # buffers, which are put back, may be results
