"""The architectures of benchmarks/torch_architectures.py whose packages are installed, as PyTorch's exporter writes
them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from foreign import Foreign, NotRun

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@cache
def _all() -> Mapping[str, Any]:
    from torch_architectures import architectures

    return dict(architectures())


def names() -> Mapping[str, str]:
    """Every architecture → where it is from."""
    return {name: name.partition(" ")[0] for name in _all()}


def load(name: str) -> Foreign:
    """The exported model, with the sample that it was exported on.

    Raises:
        NotRun: PyTorch's exporter doesn't write it.
    """
    import torch

    module, sample = _all()[name]()
    args = () if isinstance(sample, dict) else (sample,)
    kwargs = sample if isinstance(sample, dict) else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
    except Exception as error:
        raise NotRun(str(error).splitlines()[0][:200]) from None
    assert program is not None
    proto = program.model_proto
    given = [t.numpy() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    feeds = dict(zip([i.name for i in proto.graph.input], given, strict=False))
    return Foreign(name, names()[name], proto, feeds, [])
