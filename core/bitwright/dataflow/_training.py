"""Quantization-aware training of a dataflow model: a pure function of its parameters, for the user's own loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Tap, Training
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import M
from bitwright.dataflow._namespace import FlowNamespace
from bitwright.dataflow._rounding import cast
from bitwright.dataflow._session import FlowSession, Runner
from bitwright.dataflow._simulation import FlowSimulation
from bitwright.graph import ParamId, ParamRole, TensorId
from bitwright.grids import (
    NUMPY,
    WIDE,
    Encoding,
    EncodingTable,
    GridPolicy,
    Groups,
    PerTensor,
    cast_vjp,
    fake_quantize,
    fake_quantize_vjp,
    followed,
    largest_of,
    learned_scale,
    learned_zero,
    lsq_factor,
    min_max_grid,
    present,
    ratio_to,
    run_time_rounded,
)
from bitwright.placement import Derived, Plan, SiteId

Array = Any
"""An array of the framework."""
Params = dict[str, dict[str, Any]]
"""What is trained: "weights" by id, in native layout, and in range learning "scales" and "zeros" by site."""


class Trainer(Runner, Protocol):
    """What training needs of a backend beside what sessions do."""

    def with_vjp(self, forward: Callable[..., Array], vjp: Callable[..., tuple[Array, ...]], /) -> Callable[..., Array]:
        """A function with a gradient of its own: `vjp(g, *arguments)` gives one for each argument."""


class TrainedModel:
    """A simulated model that is trained.

    Attributes:
        params: a pytree of arrays, all of which are trained. Put new values here before `QuantSim.take`.
    """

    def __init__(self, run: Callable[[Params, Mapping[TensorId, Array]], list[Array]], inputs: Sequence[TensorId],
                 params: Params) -> None:  # fmt: skip
        self._run, self._inputs, self.params = run, tuple(inputs), params

    def apply(self, params: Params, *inputs: Array) -> Any:
        """The outputs for these parameters: one array, or a tuple. Pure, and differentiable in `params`."""
        found = self._run(params, dict(zip(self._inputs, inputs, strict=True)))
        return found[0] if len(found) == 1 else tuple(found)

    def __call__(self, *inputs: Array) -> Any:
        """The outputs with the parameters as they are now."""
        return self.apply(self.params, *inputs)


class _Site:
    """How one site is rounded in training."""

    def __init__(self, ns: FlowNamespace, site: SiteId, form: Encoding, shape: tuple[int, ...], policy: GridPolicy,
                 value: NDArray[Any] | None, factor: float) -> None:  # fmt: skip
        self.ns, self.site, self.form, self.policy, self.factor = ns, site, form, policy, factor
        self.groups = Groups.of(shape, PerTensor() if form.run_time is not None else form.granularity)
        self.ratio = np.ones(form.scale.shape)
        if policy.follows and value is not None:
            base, _ = min_max_grid(NUMPY, self.groups.cut(NUMPY, value), form, self.groups)
            self.ratio = ratio_to(NUMPY, form.scale, base)

    def numbers(self, x: Array, params: Params, array: Callable[[NDArray[Any]], Array]) -> tuple[Array, Array]:
        """Scale and zero point (float32) for the present values."""
        ns, form, grid = self.ns, self.form, self.form.grid
        scale, zero = array(form.scale), array(form.zero_point.astype(np.float32))
        if self.policy.follows:
            base, low = min_max_grid(ns, self.groups.cut(ns, ns.stop(x)), form, self.groups)
            scale, zero = followed(ns, base, ns.float32(low), ns.float64(array(self.ratio)), zero, form)
        elif self.policy.learns:
            scale = learned_scale(ns, scale, params["scales"][self.site], form)
            if self.policy.moves:
                zero = learned_zero(ns, zero, params["zeros"][self.site], grid.qmin, grid.qmax)
        return scale, zero

    def rounded(self, x: Array, scale: Array, zero: Array, trainer: Trainer) -> Array:
        """A value on its grid, with the core's gradients."""
        ns, form, grid = self.ns, self.form, self.form.grid
        if form.run_time is not None:
            return run_time_rounded(ns, x, form.run_time, trained=True)
        groups = Groups.of(ns.shape(x), form.granularity)  # type: ignore[arg-type]
        learned, factor = self.policy.learns, self.factor
        largest = 0.0 if form.float_format is None else largest_of(form.float_format)

        def as_float(x: Array, scale: Array, zero: Array) -> Array:
            s, cut = groups.broadcast(ns, scale), groups.cut(ns, x)
            assert form.float_format is not None
            return groups.joined(ns, cast(ns, cut / s, form.float_format) * s)

        def forward(x: Array, scale: Array, zero: Array) -> Array:
            return fake_quantize(ns, x, scale, zero, grid, groups) if not largest else as_float(x, scale, zero)

        def vjp(g: Array, x: Array, scale: Array, zero: Array) -> tuple[Array, Array, Array]:
            if largest:
                y = groups.cut(ns, as_float(x, scale, zero))
                found = cast_vjp(ns, g, x, groups.joined(ns, y), scale, largest, groups, learned=learned)
            else:
                found = fake_quantize_vjp(ns, g, x, scale, zero, grid, groups, learned=learned)
            none = ns.zeros_like(scale)
            ds, dz = (none if d is None else d * factor for d in (found.scale, found.zero_point))
            return found.x, ds, dz

        if form.float_format is None and grid.steps >= WIDE:
            s, z = (groups.broadcast(ns, v) for v in (scale, zero))
            q = ns.round(ns.float64(groups.cut(ns, x)) / ns.float64(s))
            q = ns.clip(q, ns.float64(grid.qmin - z), ns.float64(grid.qmax - z))
            y = groups.joined(ns, ns.float32(q) * s)
            return x + ns.stop(y - x)
        return trainer.with_vjp(forward, vjp)(x, scale, zero)


def grid_in_training(trainer: Trainer, site: SiteId, form: Encoding, shape: tuple[int, ...]) -> _Site:
    """How an activation is rounded to a grid that stays, with the core's gradients.

    Args:
        trainer: the backend.
        site, form: which, and its grid.
        shape: of the tensor, 1 where a length isn't known.
    """
    return _Site(trainer.namespace, site, form, shape, GridPolicy(False, False, False), None, 1.0)


class FlowTraining(FlowSimulation[M], Generic[M]):
    """`TrainableSimulation`: its model is a `TrainedModel`.

    Means and variances of batch norms are no parameters: they stay as they are.
    """

    def __init__(self, trainer: Trainer, model: M, plan: Plan, encodings: EncodingTable, training: Training) -> None:
        super().__init__(trainer, model, plan, encodings)
        self._trainer, self._training = trainer, training
        self._float, self._simulated = model, self.model
        self._open()

    def _open(self) -> None:
        model, array = self._float, self._trainer.array
        graph = model.graph
        fixed = {p for op in graph for r, p in op.params.items() if r in (ParamRole.MEAN, ParamRole.VAR)}
        # Copies: a loop may change arrays in place, and the model that was given stays as it is.
        natives = {p: np.array(self._layout(p).native(value)) for p, value in self._params.items()}
        weights = {p: array(natives[p]) for p in graph.params if p not in fixed}
        self._constants = {p: array(natives[p]) for p in fixed}
        self._trained = {s: self._site(s, e) for s, e in self._in_force.items()}
        params: Params = {"weights": weights, "scales": {}, "zeros": {}}
        for site in self._trained.values():
            root, shape = self.plan.root(site.site), site.form.scale.shape
            if site.policy.learns and root == site.site:
                params["scales"][root] = array(np.zeros(shape, np.float32))
                if site.policy.moves:
                    params["zeros"][root] = array(np.zeros(shape, np.float32))
        self._session = FlowSession(self._trainer, model, [Tap(t) for t in graph.outputs])
        self._out = TrainedModel(self._run, graph.inputs, params)
        self.model = self._out  # type: ignore[assignment]

    def _layout(self, param: ParamId) -> Layout:
        return self._float.layouts.get(param, Layout())

    def _site(self, site: SiteId, form: Encoding) -> _Site:
        value = self._params.get(site) if self._sites.is_parameter(site) else None
        derived = isinstance(self.plan[site].decision, Derived)
        learning = self._training.range_learning
        policy = GridPolicy.of(form, parameter=value is not None, range_learning=learning, derived=derived)
        tensor = self._float.graph.tensors.get(site)
        free = () if tensor is None else tensor.shape or ()
        shape = value.shape if value is not None else tuple(n or 1 for n in free)
        factor = 1.0
        if self._training.gradient_scale and form.is_fixed:
            factor = lsq_factor(Groups.of(shape, form.granularity).elements, form.grid)
        return _Site(self._trainer.namespace, self.plan.root(site), form, shape, policy, value, factor)

    def _run(self, params: Params, feeds: Mapping[TensorId, Array]) -> list[Array]:
        with self._trainer.namespace.exactly():
            natives = {p: self._native(p, v, params) for p, v in {**self._constants, **params["weights"]}.items()}
            return self._session.computed(natives, feeds, lambda s, x: self._on_grid(s, x, params))

    def _native(self, param: ParamId, value: Array, params: Params) -> Array:
        site, layout = self._trained.get(param), self._layout(param)
        return value if site is None else layout.native(self._rounded_at(site, layout.canonical(value), params))

    def _on_grid(self, site: TensorId, x: Array, params: Params) -> Array:
        held = self._trained.get(site)
        return x if held is None else self._rounded_at(held, x, params)

    def _rounded_at(self, site: _Site, x: Array, params: Params) -> Array:
        return site.rounded(x, *site.numbers(x, params, self._trainer.array), self._trainer)

    def _synced(self) -> None:
        """What the simulation has, as it has been trained."""
        trained = self._out.params
        numpy = self._trainer.numpy
        for p, v in trained["weights"].items():
            self._params[p] = np.array(self._layout(p).canonical(numpy(v)), np.float32, order="C")
        changed: dict[SiteId, Encoding] = {}
        for name, site in self._trained.items():
            root = self.plan.root(name)
            if root in changed or not (site.policy.follows or site.policy.learns):
                continue
            with self._trainer.namespace.exactly():
                value = self._trainer.array(self._params[name]) if name in self._params else None
                scale, zero = site.numbers(value, trained, self._trainer.array)
            changed[root] = present(site.form, numpy(scale), numpy(zero), site.policy.learns)
        if changed:
            super().install(changed)

    def float_model(self) -> M:
        """A float model with the weights as they are now."""
        self._synced()
        return replace(self._float, params=dict(self._params))

    def in_force(self) -> Mapping[SiteId, Encoding]:
        """The encodings as they are now."""
        if hasattr(self, "_trained"):
            self._synced()
        return super().in_force()

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """Install encodings; training goes on from these, and from the weights as they are."""
        if not hasattr(self, "_trained"):
            super().install(changes)
            return
        self._synced()
        super().install(changes)
        self._open()

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> FlowSession:
        """Run the network as it has been trained by now."""
        self._synced()
        return FlowSession(self._trainer, self._simulated, taps, feeds)


class TrainableFlow(ABC):
    """Base, beside `FlowBackend`, of a backend whose framework differentiates: the capability `trainable`."""

    @abstractmethod
    def with_vjp(self, forward: Callable[..., Array], vjp: Callable[..., tuple[Array, ...]]) -> Callable[..., Array]:
        """A function with a gradient of its own.

        Args:
            forward: of some arrays.
            vjp: from the gradient to its output, and the arrays, the gradient to each of them.
        """

    def simulate_trainable(
        self: Any, model: M, plan: Plan, encodings: EncodingTable, training: Training
    ) -> FlowTraining[M]:
        """See `bitwright.backend.Trainable`."""
        return FlowTraining(self, model, plan, encodings, training)
