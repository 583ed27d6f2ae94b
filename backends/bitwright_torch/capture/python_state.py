"""Whether a module's results depend on what its code keeps, or draws, in Python from call to call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitwright.backend import alike, precision_of, user_state_kept
from bitwright_torch.graph.calling import Arguments

NOTICE = (
    "the model gives other results when it is called again with the same input: it keeps state, or draws numbers, in "
    "Python, which a capture holds as it was; keep state in buffers, or hand it in and out"
)


def changes_from_call_to_call(module: nn.Module, arguments: Arguments) -> bool:
    """Whether a second call with the same arguments gives other results.

    Buffers are put back between the calls and after them, for they are captured as state, and PyTorch's random numbers
    are the same in both. What a call leaves in Python is put back at the end.

    Args:
        module: in evaluation mode.
        arguments: of its `forward`; calls are given copies.
    """
    held = [(m, dict(m._buffers)) for m in module.modules()]
    values = [(buffer, buffer.clone()) for _, buffers in held for buffer in buffers.values() if buffer is not None]

    def restore() -> None:
        for owner, buffers in held:
            owner._buffers.clear()
            owner._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        args, kwargs = pytree.tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (arguments.args, arguments.kwargs)
        )
        found = [x.clone() for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        restore()
        return found

    try:
        with torch.no_grad(), user_state_kept(module, holders=(nn.Module,)), torch.random.fork_rng():
            first, second = results(), results()
    except Exception:  # it was captured, so that it runs; what a call by itself lacks is no state
        return False
    finally:
        with torch.no_grad():
            restore()
    precision = precision_of(str(x.dtype).removeprefix("torch.") for x in first)
    return not alike([_array(x) for x in first], [_array(x) for x in second], precision)


def _array(x: torch.Tensor) -> Any:
    known = x.dtype in (torch.float16, torch.float32, torch.float64) or not x.is_floating_point()
    return (x if known else x.float()).cpu().numpy()  # numpy has no bfloat16, and no floats of 8 bits
