"""Bringing a user's module to what bitwright has made of its copy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bitwright.errors import InputError, ModelError
from bitwright.simulation import QuantSim


def sample_of(input_shapes: Any, dummy_input: Any) -> Any:
    """The user's sample, or one of random numbers of their shapes.

    Raises:
        InputError: neither is given.
    """
    if dummy_input is not None:
        return dummy_input
    if not input_shapes:
        raise InputError("give input_shapes or dummy_input: a model is captured on one batch")
    shapes = input_shapes if isinstance(input_shapes[0], tuple | list) else [input_shapes]
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    torch = sys.modules["torch"]
    return tuple(torch.from_numpy(a) for a in arrays)


def opened(model: Any, sample: Any) -> QuantSim:
    """A simulation that only serves to change the float model."""
    return QuantSim(model, sample, target="per_tensor")


def write(model: Any, simulation: QuantSim, sample: Any) -> None:
    """Give a module the parameters of a simulation's float model; folded batch norms become `Identity`.

    It is done on a copy first, which is compared with the simulation's float model.

    Raises:
        ModelError: the module can't become that; it is as it was.
    """
    trial = copy.deepcopy(model)
    _write(trial, simulation.native)
    _compare(trial, simulation.native, sample)
    _write(model, simulation.native)


def written(model: Any, simulation: QuantSim, sample: Any) -> Any:
    """A copy of a module with the parameters of a simulation's float model, see `write`."""
    made = copy.deepcopy(model)
    write(made, simulation, sample)
    return made


def _write(model: Any, native: Any) -> None:
    torch = sys.modules["torch"]
    old, new = dict(_tensors(model)), dict(_tensors(native))
    with torch.no_grad():
        for name, value in new.items():
            if name in old and old[name].shape == value.shape:
                old[name].copy_(value)
                continue
            path, _, last = name.rpartition(".")
            owner = _module(model, path)
            if name in old or owner is None or not hasattr(owner, last):
                raise ModelError(f"the module has no place for {name!r}; go on with QuantSim, which holds a copy")
            owner.register_parameter(last, torch.nn.Parameter(value.detach().clone()))
    gone = {name.rpartition(".")[0] for name in old.keys() - new.keys()}
    for path in gone - {name.rpartition(".")[0] for name in new}:
        owner_path, _, last = path.rpartition(".")
        owner = _module(model, owner_path)
        if owner is None or not path:
            raise ModelError("the module's own batch norm was folded, and can't be taken out of it")
        setattr(owner, last, torch.nn.Identity())


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _module(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _compare(trial: Any, native: Any, sample: Any) -> None:
    torch = sys.modules["torch"]
    # pytrees flatten what a model returns; the sample is given as QuantSim took it.
    flatten = torch.utils._pytree.tree_flatten
    flags = [(m, m.training) for root in (trial, native) for m in root.modules()]
    try:
        with torch.no_grad():
            found, expected = (flatten(_called(m.eval(), sample))[0] for m in (trial, native))
    finally:
        for module, training in flags:  # parents before what is in them, whose own flags so come last
            module.train(training)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            scale = float(b.abs().max()) if b.numel() else 0.0
            if float((a - b).abs().max() if b.numel() else 0.0) > 1e-3 * scale + 1e-6:
                raise ModelError(
                    "the module doesn't compute what its changed copy does once it is given the same parameters, as "
                    "one of its layers is called in another way too; go on with QuantSim, which holds the copy"
                )


def _called(module: Any, sample: Any) -> Any:
    if isinstance(sample, dict):
        return module(**sample)
    return module(*sample) if isinstance(sample, tuple) else module(sample)


def name_in(model: Any, layer: Any) -> str:
    """The name of a submodule, or of what is a name already.

    Raises:
        InputError: it isn't the model's.
    """
    if isinstance(layer, str):
        return layer
    for name, module in model.named_modules():
        if module is layer:
            return str(name)
    raise InputError(f"{layer!r} is not a layer of the model")
