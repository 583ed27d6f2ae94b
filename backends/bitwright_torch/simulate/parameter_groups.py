"""Parameters of a model in training as optimizer groups: weights, and learned grids at a higher learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitwright_torch.simulate.fake_quant import FakeQuantize


def parameter_groups(model: nn.Module, rate: float, *, grid_factor: float = 5.0) -> list[dict[str, Any]]:
    """What an adaptive optimizer (Adam and its kin) takes, for range learning.

    Learned grids start where calibration left them and must follow the weights as these grow. At the weights' own
    rate they lag behind in short trainings; W4A4 on Fashion-MNIST, five times the rate gave a lower loss in each run.
    They get no weight decay: it would pull them back to where they started.

    Args:
        model: of `QuantSim.trainable`, or a module that holds it.
        rate: learning rate of everything but the grids.
        grid_factor: the grids' learning rate is so many times as high.

    Returns:
        One group, or two where grids are learned.
    """
    held = {id(p): p for m in model.modules() if isinstance(m, FakeQuantize) for p in m.parameters(recurse=False)}
    others = [p for p in model.parameters() if id(p) not in held]
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
    if held:
        groups.append({"params": list(held.values()), "lr": rate * grid_factor, "weight_decay": 0.0})
    return groups
