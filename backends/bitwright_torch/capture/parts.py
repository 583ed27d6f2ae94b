"""Models that can't be captured whole: their largest capturable submodules are, the Python around them stays.

Each part is captured on the inputs that it got in one run of the sample, and swapped into a copy of the user's model.
The graph of such a model holds the ops of all parts. Between them stand OPAQUE ops called "python", one in front of
each part and one behind the last: each reads what exists by then (model inputs, results of earlier parts). The
model's own inputs and results are Python's, and aren't quantized; the inputs and results of the parts are.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from bitwright.errors import InputError, ModelError
from bitwright.graph import Edit, FoldBatchNorm, Graph, Op, OpKind, ParamId, SetParams, Tensor
from bitwright.runs import fingerprint
from bitwright_torch.capture.capturing import WITHOUT_DATA, CaptureNotice, capture, kept, private_copy
from bitwright_torch.capture.free_dimensions import with_batch
from bitwright_torch.graph.calling import Arguments, CallingConvention, Spec, arguments_of, convention_of
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.content import content
from bitwright_torch.graph.edits import edit_model, obstacle_to_branch
from bitwright_torch.graph.model import NAMES, CapturedModel, info, program_of, share, with_program
from bitwright_torch.graph.params import read_params

OUTSIDE = "object"
"""Dtype of tensors that only Python handles: no target quantizes them."""


class PartitionedModel(nn.Module):
    """A copy of the user's model with captured parts in it; called as the original, with its `state_dict` keys.

    Args:
        root: the copy.
        parts: names of the captured submodules, in the order in which they run.
        convention: how the model is called.
        specs: shape and dtype of each tensor input; the batch is free, unless a part takes only the sample's.
    """

    def __init__(
        self, root: nn.Module, parts: tuple[str, ...], convention: CallingConvention, specs: Mapping[str, Spec]
    ) -> None:
        super().__init__()
        # The very tables of the root, so that moving or loading one moves or loads the other.
        self._modules = root._modules
        self._parameters = root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self.__dict__["_root"] = root
        self._parts = parts
        self.convention = convention
        self.specs = copy.copy(specs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the user's `forward`."""
        return self.__dict__["_root"](*args, **kwargs)

    def train(self, mode: bool = True) -> PartitionedModel:
        """As `nn.Module.train`."""
        super().train(mode)
        self.__dict__["_root"].training = mode
        return self

    @property
    def parts(self) -> Mapping[str, CapturedModel]:
        """The captured parts by name, in the order in which they run."""
        found = {name: self.get_submodule(name) for name in self._parts}
        return {name: part for name, part in found.items() if isinstance(part, CapturedModel)}

    def with_parts(self, parts: Mapping[str, nn.Module]) -> PartitionedModel:
        """A model with other modules in the place of its parts; the rest shares memory."""
        root = share(self.__dict__["_root"])
        for name, part in parts.items():
            _swap(root, name, part)
        return PartitionedModel(root, self._parts, self.convention, self.specs)


@dataclass
class _Call:
    """The first call of a submodule in the sample's run."""

    arguments: Arguments
    count: int = 1


def capture_parts(module: nn.Module, sample: Any, names: Sequence[str] | None, failure: str = "") -> PartitionedModel:
    """Capture submodules of a module.

    Args:
        module: the user's; it isn't changed.
        sample: as for `capturing.capture`.
        names: of the submodules; None takes the largest ones that can be captured, and tells so in a notice.
        failure: why the whole couldn't be captured.

    Raises:
        InputError: a named submodule doesn't exist, or isn't run exactly once.
        ModelError: a named submodule can't be captured, or none can.
    """
    signature = inspect.signature(module.forward)
    arguments = arguments_of(sample, signature)
    root = private_copy(module)
    flags = {name: m.training for name, m in root.named_modules()}
    root.eval()
    calls, result = _record(root, arguments)
    for name in names or ():
        if name not in dict(root.named_modules()) or not name:
            raise InputError(f"modules: the model has no submodule {name!r}")
        if name not in calls or calls[name].count != 1:
            times = calls[name].count if name in calls else 0
            raise InputError(f"modules: {name!r} is run {times} times by the sample; a part must be run once")
    captured: dict[str, CapturedModel] = {}
    failures: list[str] = [failure] if failure else []
    for name, part in _captured(root, "", calls, names, failures):
        captured[name] = _prefixed(part, f"{name}.")
    if not captured:
        raise ModelError(f"no part of {type(module).__name__} can be captured: {'; '.join(failures)[:600]}")
    fixed = _fixed(root, signature, arguments, calls, captured)
    convention = convention_of(signature, arguments, pytree.tree_flatten(result)[1])
    whole = convention.listed if not fixed and not _grows(root, signature, arguments, convention) else frozenset()
    for name, part in captured.items():
        _swap(root, name, part)
    for name, submodule in root.named_modules():
        submodule.training = flags.get(name, submodule.training)
    order = tuple(sorted(captured, key=list(calls).index))
    if names is None:
        left = [n for n, m in root.named_modules() if n and not any(n == p or n.startswith(p + ".") for p in order)
                and next(m.children(), None) is None and next(m.parameters(), None) is not None]  # fmt: skip
        text = f"{type(module).__name__} is captured in parts ({', '.join(order)}); the Python around them stays"
        text += f", and in float: {', '.join(left)}" if left else ""
        warnings.warn(f"{text}. The whole can't be captured: {failure}", CaptureNotice, stacklevel=3)
    if fixed:
        reasons = "; ".join(dict.fromkeys(r for name in fixed for r in program_of(captured[name]).notices))
        text = f"{type(module).__name__} takes only the sample's batch size, as {', '.join(fixed)} does: {reasons}"
        warnings.warn(text, CaptureNotice, stacklevel=3)
    specs = _specs(arguments, convention, set(convention.names) if fixed else whole)
    return PartitionedModel(root, order, convention, convention.specs(specs))


def _fixed(
    root: nn.Module,
    signature: inspect.Signature,
    arguments: Arguments,
    calls: Mapping[str, _Call],
    captured: Mapping[str, CapturedModel],
) -> list[str]:
    """Parts that were captured with fixed shapes, and whose inputs grow with the model's batch."""
    suspects = [name for name, part in captured.items() if program_of(part).notices]
    doubled, wanted = with_batch(arguments, signature, doubled=True) if suspects else (arguments, None)
    if not suspects or wanted is None:
        return []
    try:
        with kept(root):
            larger, _ = _record(root, doubled)
    except ModelError:
        return suspects  # the Python around the parts takes no other batch either
    return [n for n in suspects if n not in larger or _shapes(larger[n]) != _shapes(calls[n])]


def _grows(root: nn.Module, signature: inspect.Signature, arguments: Arguments, convention: CallingConvention) -> bool:
    """Whether elements of lists may be longer along their first axes, as batches are, and channels of images aren't."""
    if not convention.listed:
        return True
    doubled, _ = with_batch(arguments, signature, doubled=True)
    try:
        with kept(root):
            _record(root, doubled)
    except ModelError:
        return False
    return True


def _shapes(call: _Call) -> list[Any]:
    leaves = pytree.tree_leaves((call.arguments.args, call.arguments.kwargs))
    return [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _specs(arguments: Arguments, convention: CallingConvention, fixed: Collection[str]) -> dict[str, Spec]:
    """What the sample shows of the inputs; first axes are free but for those named."""
    leaves = pytree.tree_leaves((arguments.args, arguments.kwargs))
    found: dict[str, Spec] = {}
    for name, leaf in zip(convention.names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            free = leaf.ndim > 0 and name not in fixed
            found[name] = (
                (None, *leaf.shape[1:]) if free else tuple(leaf.shape),
                str(leaf.dtype).removeprefix("torch."),
            )
    return found


def _record(root: nn.Module, arguments: Arguments) -> tuple[dict[str, _Call], Any]:
    """Run the sample once; which submodules run, in order of their ends, with what."""
    calls: dict[str, _Call] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in calls:
                calls[name].count += 1
            else:
                calls[name] = _Call(Arguments(args, dict(kwargs)))

        return before

    for name, submodule in root.named_modules():
        if name and not isinstance(submodule, torch.jit.ScriptModule):  # which take no hooks, and are no parts
            handles.append(submodule.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad():
            result = root(*arguments.args, **arguments.kwargs)
    except Exception as error:
        raise ModelError(
            f"{type(root).__name__} fails on the sample: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(result)):
        raise ModelError(f"what {type(root).__name__} computes of the sample has no data: {WITHOUT_DATA}")
    return calls, result


def _captured(
    root: nn.Module, name: str, calls: Mapping[str, _Call], names: Sequence[str] | None, failures: list[str]
) -> Iterator[tuple[str, CapturedModel]]:
    """Parts below a module, largest first; named ones only, if names are given."""
    module = root.get_submodule(name)
    wanted = name in names if names is not None else bool(name) and next(module.parameters(), None) is not None
    call = calls.get(name)
    if wanted and call is not None and call.count == 1 and (names is not None or not isinstance(module, nn.Embedding)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CaptureNotice)
                part = capture(module, call.arguments)
            if canonical(part).graph.outputs:
                yield name, part
                return
        except (ModelError, InputError) as error:
            if names is not None:
                raise ModelError(f"modules: {error}") from error
            failures.append(f"{name}: {error}")
    for child, _ in module.named_children():
        yield from _captured(root, f"{name}.{child}" if name else child, calls, names, failures)


def _prefixed(part: CapturedModel, prefix: str) -> CapturedModel:
    """The part with the ids that it has in the whole."""
    program, shown = program_of(part), canonical(part).graph
    # A part that is one layer is one op, of the layer's name.
    lone = shown.ops[0].id if len(shown) == 1 and next(part.children(), None) is None else None
    for node in program.graph.nodes:
        about = info(node)
        op, tensor = about.op and prefix + about.op, prefix + about.tensor
        if lone is not None and about.op == lone:
            op, tensor = prefix[:-1], prefix + about.tensor.removeprefix(f"{lone}.")
        node.meta[NAMES] = replace(about, op=op, tensor=tensor)
    return with_program(part, replace(program, prefix=prefix, memo={}))


def _swap(root: nn.Module, name: str, part: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    root.get_submodule(path)._modules[last] = part


# -- the backend's operations


def parts_graph(model: PartitionedModel) -> Graph:
    """One graph of all parts, with OPAQUE ops for the Python between them."""
    ops: list[Op] = []
    tensors: dict[str, Tensor] = {}
    params = {}
    inputs = list(model.convention.inputs)
    known = list(inputs)
    tensors.update({name: Tensor(name, None, OUTSIDE) for name in inputs})
    for name, part in model.parts.items():
        shown = canonical(part).graph
        ops.append(_python(f"{name}/python", known, shown.inputs))
        ops += shown.ops
        tensors.update(shown.tensors)
        params.update(shown.params)
        known += [t for t in shown.outputs if t not in known]
    results = [f"result.{i}" for i in range(model.convention.out_spec.num_leaves)]
    tensors.update({name: Tensor(name, None, OUTSIDE) for name in results})
    ops.append(_python("python", known, results))
    return Graph(ops, tensors, params, inputs, results)


def _python(id: str, reads: Sequence[str], writes: Sequence[str]) -> Op:
    return Op(id, OpKind.OPAQUE, "python", tuple(reads), tuple(writes), native="the model's Python code")


def read_parts(model: PartitionedModel, ids: Collection[ParamId]) -> dict[ParamId, NDArray[np.float32]]:
    """As `params.read_params`.

    Raises:
        ModelError: an id names no float parameter.
    """
    values: dict[ParamId, NDArray[np.float32]] = {}
    for id in ids:
        values.update(read_params(model.parts[part_of(model, id)], [id]))
    return values


def edit_parts(model: PartitionedModel, edits: Sequence[Edit]) -> PartitionedModel:
    """As `edits.edit_model`.

    Raises:
        ModelError: an edit can't be carried out.
    """
    work: dict[str, list[Edit]] = {}
    for edit in edits:
        if isinstance(edit, SetParams):
            for id, value in edit.values.items():
                part = part_of(model, id)
                work.setdefault(part, []).append(SetParams({id: value}))
        else:
            op = edit.batch_norm if isinstance(edit, FoldBatchNorm) else edit.op
            work.setdefault(part_of(model, op), []).append(edit)
    return model.with_parts({name: edit_model(model.parts[name], todo) for name, todo in work.items()})


def parts_obstacle(model: PartitionedModel, op: str) -> str:
    """As `edits.obstacle_to_branch`.

    Raises:
        ModelError: the model has no such op.
    """
    return obstacle_to_branch(model.parts[part_of(model, op)], op)


def part_of(model: PartitionedModel, id: str) -> str:
    """The part that an op, tensor or parameter belongs to.

    Raises:
        ModelError: none.
    """
    found = [name for name in model.parts if id == name or id.startswith((f"{name}.", f"{name}/"))]
    if not found:
        raise ModelError(f"the model has no op or parameter {id!r} in its captured parts ({', '.join(model.parts)})")
    return max(found, key=len)


def parts_content(model: PartitionedModel) -> str:
    """As `content`, of all parts, and of the Python around them: the code of its modules' `forward`."""
    inside = tuple(f"{name}." for name in model.parts)
    around = [
        (name, fingerprint.of_object(type(module).forward))
        for name, module in model.__dict__["_root"].named_modules()
        if name not in model.parts and not f"{name}.".startswith(inside) and not _is_torchs(module)
    ]
    return fingerprint.of_json([[name, content(part)] for name, part in model.parts.items()] + around)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
