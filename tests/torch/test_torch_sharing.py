"""Copies of modules that share their tensors are what `copy.deepcopy` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitwright_torch.graph.model import share


class Listed(nn.Module):
    """Attributes of every kind, and submodules that stand in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding_mode="reflect")
        self.again = self.first
        self.norm = nn.BatchNorm2d(4)
        self.linear, self.tied = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.missing = None
        self.register_module("none", None)
        self.table, self.pair, self.kept = {"a": [1]}, ([1], 2), {3}
        self.inside = [self.norm]
        self.norm.cache = self.linear.cache = {}
        self.register_buffer("mask", torch.ones(2), persistent=False)


class Own(nn.Linear):
    def __deepcopy__(self, memo):
        made = Own(self.in_features, self.out_features)
        made.told = True
        return made


class Restored(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.told = True


def test_every_attribute_is_copied_and_every_tensor_shared():
    module = Listed()
    handle = module.first.register_forward_hook(lambda m, i, o: None)
    made, deep = share(module), copy.deepcopy(module)
    for (name, new), (_, theirs), (_, old) in zip(
        made.named_modules(remove_duplicate=False), deep.named_modules(remove_duplicate=False),
        module.named_modules(remove_duplicate=False), strict=True,
    ):  # fmt: skip
        assert new is not old, name
        assert list(new.__dict__) == list(theirs.__dict__) and type(new) is type(old)
        assert all(type(v) is type(theirs.__dict__[k]) for k, v in new.__dict__.items())
        assert repr(new) == repr(theirs)
    assert made.again is made.first and made.inside[0] is made.norm and made.none is None
    assert made.tied.weight is made.linear.weight and made.norm.cache is made.linear.cache is not module.norm.cache
    for name, tensor in made.state_dict(keep_vars=True).items():
        old = module.state_dict(keep_vars=True)[name]
        assert tensor is not old and tensor.data_ptr() == old.data_ptr()
    assert "mask" in made._non_persistent_buffers_set
    made.table["a"].append(2), made.pair[0].append(2), made.kept.add(4), made._modules.pop("norm")
    assert module.table == {"a": [1]} and module.pair == ([1], 2) and module.kept == {3} and module.norm is not None
    made.first.register_forward_hook(lambda m, i, o: None)
    handle.remove()
    assert not module.first._forward_hooks and len(made.first._forward_hooks) == 2


@pytest.mark.parametrize("kind", [Own, Restored])
def test_modules_that_say_how_they_are_copied_are_asked(kind):
    assert share(nn.Sequential(kind(2, 2)))[0].told


def test_a_compiled_module_runs_with_its_copy_s_own_parameters():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].compile(backend="eager")
    made = share(module)
    made[0].weight = nn.Parameter(torch.zeros(2, 2))
    made[0].bias = nn.Parameter(torch.ones(2))
    assert torch.equal(made(torch.ones(1, 2)), torch.ones(1, 2))
    assert module[0]._compiled_call_impl is not None
