"""A part of a simulated network as a function of some of its weights, with gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitwright.backend import Batch, require_tensors
from bitwright.errors import ModelError, first_line
from bitwright.files import Array
from bitwright.graph import Param, ParamId, TensorId
from bitwright_torch.graph.model import Program, compile_graph, device_of, info
from bitwright_torch.simulate.session import as_tensor, extract, leaf

Values = Mapping[ParamId, NDArray[np.floating]]


class TorchPullback:
    """`bitwright.backend.Pullback`.

    Args:
        root: what the graph's other tensors are read from, at each run.
        program: of the simulated model.
        tensors: activation → node.
        places: the node that computes each parameter's rounded value, in whose place the caller's goes.
        feeds, taps: where the part begins and ends.

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds.
    """

    def __init__(
        self,
        root: nn.Module,
        program: Program,
        tensors: Mapping[TensorId, fx.Node],
        places: Mapping[ParamId, tuple[fx.Node, Param]],
        feeds: Sequence[TensorId],
        taps: Sequence[TensorId],
    ) -> None:
        require_tensors((*taps, *feeds), tensors)
        self._root, self._taps = root, tuple(taps)
        self._params = {p: param for p, (_, param) in places.items()}
        of_node = {node.name: p for p, (node, _) in places.items()}
        self._dtypes = {p: getattr(torch, info(node).dtype) for p, (node, _) in places.items()}
        sources = {tensors[f] for f in feeds} | {node for node, _ in places.values()}
        part, names = extract(program.graph, [tensors[t] for t in taps], sources)
        targets = [str(n.target) for n in part.nodes if n.op == "placeholder"]
        self._arguments = [(of_node.get(target), name) for target, name in zip(targets, names, strict=True)]
        convention = program.convention
        self._constants = {program.prefix + convention.names[i]: v for i, v in convention.constants.items()}
        self._specs = {info(n).tensor: (info(n).shape, info(n).dtype) for n in sources}
        self._function = compile_graph(part)

    def run(self, batch: Batch, values: Values) -> Mapping[TensorId, Array]:
        """See `Pullback`."""
        with torch.no_grad():
            return _arrays(self._outputs(batch, self._leaves(values)))

    def gradients(
        self,
        batch: Batch,
        values: Values,
        cotangents: Callable[[Mapping[TensorId, Array]], Mapping[TensorId, Array]],
    ) -> Mapping[ParamId, Array]:
        """See `Pullback`."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = self._leaves(values)
            for tensor in leaves.values():
                tensor.requires_grad_()
            outputs = self._outputs(batch, leaves)
            wanted = {t: g for t, g in cotangents(_arrays(outputs)).items() if outputs[t].requires_grad}
            pulled = torch.autograd.grad(
                [outputs[t] for t in wanted],
                list(leaves.values()),
                [as_tensor(g).to(outputs[t].device, outputs[t].dtype) for t, g in wanted.items()],
                allow_unused=True,
            )
        found: dict[ParamId, Array] = {}
        for (p, tensor), gradient in zip(leaves.items(), pulled, strict=True):
            whole = torch.zeros_like(tensor) if gradient is None else gradient
            layout = self._params[p].layout or tuple(range(whole.ndim))
            found[p] = np.array(whole.detach().float().permute(layout).cpu().numpy(), order="C")
        return found

    def _leaves(self, values: Values) -> dict[ParamId, Tensor]:
        device = device_of(self._root)
        leaves: dict[ParamId, Tensor] = {}
        for p, param in self._params.items():
            layout = param.layout or tuple(range(len(param.shape)))
            native = np.array(np.transpose(values[p], np.argsort(layout)), np.float32, order="C")
            leaves[p] = torch.from_numpy(native).to(device, self._dtypes[p])
        return leaves

    def _outputs(self, batch: Batch, leaves: Mapping[ParamId, Tensor]) -> dict[TensorId, Tensor]:
        device = device_of(self._root)
        arguments: list[Any] = []
        for param, name in self._arguments:
            if param is not None:
                arguments.append(leaves[param])
            elif name in self._constants:
                arguments.append(self._constants[name])
            else:
                arguments.append(leaf(batch, name, *self._specs[name], device))
        try:
            return dict(zip(self._taps, self._function(self._root, *arguments), strict=True))
        except Exception as error:
            raise ModelError(f"running a part of the model failed: {first_line(error)}") from error


def _arrays(outputs: Mapping[TensorId, Tensor]) -> dict[TensorId, Array]:
    return {t: v.detach().float().cpu().numpy() for t, v in outputs.items()}
