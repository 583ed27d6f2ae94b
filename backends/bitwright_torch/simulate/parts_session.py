"""Running a model that is captured in parts: the user's Python runs, and tensors of the parts are handed out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitwright.backend import Batch, Session, Tap, reduced, require_tensors
from bitwright.errors import InputError, ModelError
from bitwright.files import Array
from bitwright.graph import Graph
from bitwright_torch.capture.parts import OUTSIDE, PartitionedModel, part_of, parts_graph
from bitwright_torch.graph.model import CapturedModel, device_of, program_of
from bitwright_torch.simulate.session import as_tensor, open_session

Opener = Callable[[str, Sequence[Tap], Sequence[str] | None], Session]
"""Makes a session of one part for some taps, from the part's inputs or from feeds."""


class PartitionedSession:
    """Runs the user's Python, and hands out tensors of the parts on the way.

    Args:
        model: the model to run.
        graph: its graph.
        taps: tensors of parts, model inputs ("x") or results ("result.0").
        open_part: makes a session of one part for some taps.

    Raises:
        ModelError: a tap is unknown.
    """

    def __init__(self, model: PartitionedModel, graph: Graph, taps: Sequence[Tap], open_part: Opener) -> None:
        self._model = copy.copy(model)
        self._taps = tuple(dict.fromkeys(taps))
        by_part: dict[str, list[Tap]] = {}
        for tap in self._taps:
            require_tensors([tap.tensor], graph.tensors)
            if graph.tensors[tap.tensor].dtype != OUTSIDE:
                by_part.setdefault(part_of(model, tap.tensor), []).append(tap)
        self._sessions = {name: open_part(name, tapped, None) for name, tapped in by_part.items()}

    def run(self, batch: Batch) -> Mapping[Tap, Array]:
        """Feed one batch of the whole model's inputs.

        Raises:
            InputError: an input is missing.
            ModelError: the model failed while running.
        """
        found: dict[Tap, Array] = {}
        model, convention = self._model, self._model.convention
        handles = []
        flags = {m: m.training for m in (*model.modules(), model.__dict__["_root"])}
        for name, session in self._sessions.items():
            part = model.get_submodule(name)
            handles.append(part.register_forward_pre_hook(_collector(session, found), with_kwargs=True))
        device = device_of(model)
        tensors = {n: as_tensor(v).to(device) for n, v in batch.items()}
        values = pytree.tree_unflatten(convention.call(tensors), convention.in_spec)
        bound = inspect.BoundArguments(
            convention.signature, dict(zip(convention.given, values, strict=True))
        )  # fmt: skip
        try:
            model.eval()
            with torch.inference_mode():
                results = pytree.tree_leaves(model(*bound.args, **bound.kwargs))
        except (InputError, ModelError):
            raise
        except Exception as error:
            raise ModelError(f"running the model failed: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            for handle in handles:
                handle.remove()
            for module, flag in flags.items():
                module.training = flag
        outside = {**tensors, **{f"result.{i}": v for i, v in enumerate(results)}}
        for tap in self._taps:
            if tap not in found:
                if tap.tensor not in outside:
                    raise ModelError(
                        f"part {part_of(model, tap.tensor)!r} wasn't run on this batch; a part must run once in every "
                        "forward pass: name other parts (modules=[…])"
                    )
                found[tap] = _numpy(outside[tap.tensor], tap)
        return {tap: found[tap] for tap in self._taps}


def _collector(session: Session, found: dict[Tap, Array]) -> Callable[..., None]:
    def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(part, CapturedModel)
        convention, prefix = program_of(part).convention, program_of(part).prefix
        leaves = convention.flatten(args, kwargs)
        given: dict[str, Any] = {prefix + n: leaf for n, leaf in zip(convention.names, leaves, strict=True)}
        found.update(session.run(given))

    return before


def _numpy(value: Any, tap: Tap) -> Array:
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    return reduced(array, tap)


class PartSegments:
    """Segments inside parts, run one after the other on what they are fed.

    Args:
        segments: with the taps of each.
    """

    def __init__(self, segments: Sequence[Session]) -> None:
        self._segments = tuple(segments)

    def run(self, batch: Batch) -> Mapping[Tap, Array]:
        """Feed the tensors that the segments start at."""
        return {tap: value for segment in self._segments for tap, value in segment.run(batch).items()}


def parts_session(model: PartitionedModel, taps: Sequence[Tap]) -> PartitionedSession:
    """As `session.open_session`.

    Raises:
        ModelError: a tap is unknown.
    """
    return PartitionedSession(model, parts_graph(model), taps, _opener(model))


def parts_segment(model: PartitionedModel, feeds: Sequence[str], taps: Sequence[Tap]) -> Session:
    """As `session.open_session` with feeds, see `segment_of`."""
    return segment_of(model, parts_graph(model), feeds, taps, _opener(model))


def _opener(model: PartitionedModel) -> Opener:
    parts = model.parts
    return lambda name, tapped, fed: open_session(parts[name], tapped, fed)


def segment_of(
    model: PartitionedModel, graph: Graph, feeds: Sequence[str], taps: Sequence[Tap], open_part: Opener
) -> Session:
    """What lies between `feeds` and `taps`, if that is inside parts.

    Over the Python between parts there is no segment: then the whole model runs, which needs its inputs among the
    feeds, and computes the other feeds itself.

    Raises:
        ModelError: a tap can't be computed from the feeds alone.
    """
    try:
        by_part: dict[str, list[Tap]] = {}
        for tap in taps:
            by_part.setdefault(part_of(model, tap.tensor), []).append(tap)
        return PartSegments([
            open_part(name, tapped, [f for f in feeds if f in graph.tensors and f.startswith(f"{name}.")])
            for name, tapped in by_part.items()
        ])  # fmt: skip
    except ModelError:
        if set(graph.inputs) <= set(feeds):
            return PartitionedSession(model, graph, taps, open_part)
        raise
