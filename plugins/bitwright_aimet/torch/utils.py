"""`aimet_torch.utils`: what workflows take of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.torch._in_place import name_in

__all__ = ["get_device", "get_layer_name", "in_eval_mode", "in_train_mode", "is_leaf_module"]


@contextmanager
def in_eval_mode(module: Any) -> Iterator[None]:
    """A module, or several, as in inference; afterwards each part is as it was."""
    with _in_mode(module, train=False):
        yield


@contextmanager
def in_train_mode(module: Any) -> Iterator[None]:
    """A module, or several, as in training; afterwards each part is as it was."""
    with _in_mode(module, train=True):
        yield


@contextmanager
def _in_mode(module: Any, *, train: bool) -> Iterator[None]:
    given = list(module) if isinstance(module, Iterable) and not hasattr(module, "train") else [module]
    before = [(part, part.training) for one in given for part in one.modules()]
    try:
        for one in given:
            one.train(train)
        yield
    finally:
        for part, training in before:
            part.training = training


def get_device(model: Any) -> Any:
    """The device of a module's first parameter."""
    return next(model.parameters()).device


def get_layer_name(model: Any, layer: Any) -> str:
    """The name of a layer in a module.

    Raises:
        InputError: it isn't one of the module's.
    """
    return name_in(model, layer)


def is_leaf_module(module: Any) -> bool:
    """Whether a module has no modules of its own."""
    return next(iter(module.children()), None) is None


__getattr__ = tell_names(__name__)
