"""PyTorch's own list of operators with its sample inputs: a module for each operator that makes floats of floats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch
from foreign import Foreign, NotRun
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST = 20_000
"""Values of a sample's tensors; some operators come with samples that take minutes."""
_NOT_MODELS = ("_segment_reduce", "_upsample_bilinear2d_aa", "empty", "empty_like", "empty_permuted", "empty_strided",
               "new_empty", "new_empty_strided", "torch._scaled_mm", "normal", "multinomial", "bernoulli", "rand",
               "randn", "randint", "cauchy", "exponential", "geometric", "log_normal", "uniform")  # fmt: skip
"""Operators whose result is memory as it is, or random."""
_NO_VALUES = ("nn.functional.pad.replicate_negative",)
"""Samples that ask for the edge of nothing: all columns are cut off, and then repeated."""


def _build_tables_once() -> None:
    """PyTorch reads the sources of a thousand functions anew for each export to ONNX: most of a small model's time."""
    from torch._export import utils
    from torch.export import decomp_utils, exported_program
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from bitwright_torch.export.export import OPSET

    build = cache(ONNXRegistry.from_torchlib)
    build(opset_version=OPSET)  # before the workers are forked
    ONNXRegistry.from_torchlib = staticmethod(build)
    composites = cache(utils._collect_all_valid_cia_ops)
    decomp_utils._collect_all_valid_cia_ops = exported_program._collect_all_valid_cia_ops = composites


@cache
def _operators() -> Mapping[str, Any]:
    _build_tables_once()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    found = {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db}
    return {
        name: op
        for name, op in found.items()
        if torch.float32 in op.dtypes and op.name not in _NOT_MODELS and name not in _NO_VALUES
    }


def names() -> Mapping[str, str]:
    """Every operator's name → its group: the namespace it lives in."""
    return {name: op.name.rpartition(".")[0] or "torch" for name, op in _operators().items()}


class _Call(torch.nn.Module):
    """An operator on its sample, whose floating tensors but for the first are parameters."""

    def __init__(self, function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.kept: list[Any] = []
        self.structure = _map((arguments, keywords), self._keep)

    def _keep(self, tensor: torch.Tensor) -> _Slot:
        number = len(self.kept)
        if number and tensor.is_floating_point():
            name = f"p{number}"
            self.register_parameter(name, torch.nn.Parameter(tensor.detach().clone(), requires_grad=False))
            self.kept.append(name)
        elif number:
            name = f"b{number}"
            self.register_buffer(name, tensor.detach().clone())
            self.kept.append(name)
        else:
            self.kept.append(None)
        return _Slot(number)

    def forward(self, x: torch.Tensor) -> Any:
        tensors = [x if n is None else getattr(self, n) for n in self.kept]
        arguments, keywords = _map(self.structure, lambda slot: tensors[slot.number], _Slot)
        return self.function(*arguments, **keywords)


class _Slot:
    def __init__(self, number: int) -> None:
        self.number = number


def _map(tree: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {k: _map(v, change, kind) for k, v in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        changed = [_map(v, change, kind) for v in tree]
        return type(tree)(*changed) if hasattr(tree, "_fields") else type(tree)(changed)
    return tree


class _WithoutDraws(TorchDispatchMode):
    """Refuses random numbers: the list's own functions seed each call, so that two runs wouldn't tell."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRun("the operator draws random numbers")
        return func(*args, **(kwargs or {}))


def _samples(op: Any) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    for sample in islice(op.sample_inputs("cpu", torch.float32, requires_grad=False), 40):
        arguments = [sample.input, *sample.args]
        tensors: list[torch.Tensor] = []
        _map((arguments, dict(sample.kwargs)), lambda t, into=tensors: into.append(t) or t)
        plain = [t for t in tensors if t.layout is torch.strided and t.numel() > 0]
        if tensors and len(plain) == len(tensors) and sum(t.numel() for t in tensors) <= LARGEST:
            first = tensors[0]
            if first.dtype is torch.float32 and first.ndim > 0 and torch.isfinite(first).all():
                # The list's own code writes into some samples when it makes the next ones.
                yield _map((arguments, dict(sample.kwargs)), torch.Tensor.clone)


def load(name: str) -> Foreign:
    """An operator on the sample of the highest rank, as a module that is in evaluation mode.

    Raises:
        NotRun: it has no sample of floats, its outputs aren't real tensors, or two runs differ.
    """
    op = _operators()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = list(_samples(op))
        if not found:
            raise NotRun("no sample whose first tensor holds floats")
        arguments, keywords = max(found, key=lambda s: _rank(s[0]))
        module = _Call(op.op, arguments, keywords).eval()
        tensors: list[torch.Tensor] = []
        _map((arguments, keywords), lambda t: tensors.append(t) or t)
        x = tensors[0].detach().clone()
        expected = _outputs(module, x)
        again = _outputs(module, x)
    if any(not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(expected, again, strict=True)):
        raise NotRun("two runs give different values")
    return Foreign(
        name, names()[name], module, {"x": x.numpy()}, [e.numpy() for e in expected], tolerance=1e-3, sample=x.clone()
    )


def _rank(arguments: list[Any]) -> int:
    return arguments[0].ndim if isinstance(arguments[0], torch.Tensor) else 0


def _outputs(module: _Call, x: torch.Tensor) -> list[torch.Tensor]:
    given, held = x.clone(), {n: t.clone() for n, t in module.state_dict().items()}
    try:
        with torch.no_grad(), _WithoutDraws():
            result = module(given)
    except NotRun:
        raise
    except Exception as error:
        raise NotRun(f"PyTorch: {error}".splitlines()[0][:200]) from None
    tensors = [result] if isinstance(result, torch.Tensor) else list(result) if isinstance(result, list | tuple) else []
    if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise NotRun("the outputs aren't tensors")
    if any(t.is_complex() or t.layout is not torch.strided for t in tensors):
        raise NotRun("an output isn't a plain tensor of real numbers")
    if not any(t.dtype is torch.float32 and t.numel() for t in tensors):
        raise NotRun("no output holds floats")
    written = [(given, x), *((t, held[n]) for n, t in module.state_dict().items())]
    if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in written):
        raise NotRun("the operator writes into its operands")
    return [t.detach().clone() for t in tensors]
