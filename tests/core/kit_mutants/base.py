"""What wrong backends are made of, and the models that they are tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from bitwright.graph import (
    Graph,
    ParamRole,
)
from bitwright.grids import Encoding, EncodingTable
from bitwright.testing import models
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.testing.builder import Builder
from bitwright.testing.reference import ReferenceBackend, rebuild


def pooled(seed=3):
    """Average pooling with padding, LeakyReLU, softmax over channels, a bias and a weight of two ops, an identity."""
    b = Builder(seed)
    x = b.input("x", 4, 6, 6)
    x = b.prelu("leaky", b.conv("conv1", x, 4, 1), 0.3)
    x = b.identity("same", b.pool("average", x, 3, pad=1, type="Average"))
    x = b.conv("conv2", b.relu("act", x), 4, 1)
    model = b.build(b.softmax("softmax", b.pool("max", x, 2, stride=2), 1))
    shared = {ParamRole.WEIGHT: "conv1.weight", ParamRole.BIAS: "conv1.bias"}
    return rebuild(model, [replace(op, params=shared) if op.id == "conv2" else op for op in model.graph.ops])


def _case(make):
    return Case(make, models.batch(make()))


CASES = {
    "cnn": _case(lambda: models.conv_bn_relu(1, depth=2, relu6=True, bias=True)),
    "branches": _case(lambda: models.concat_branches(1)),
    "transposed": _case(lambda: models.transposed(1)),
    "prenormed": _case(lambda: models.prenormed(1)),
    "tokens": _case(lambda: models.tokens(1)),
    "pooled": _case(pooled),
}


class Kit(BackendContract):
    """The backend contract with a backend that is given."""

    suffix = ".npz"
    declines: Mapping[str, str] = {"recurrent": "the reference backend has no recurrent kernels"}

    def __init__(self, backend):
        self._backend = backend

    def backend(self):
        return self._backend

    def native_value(self, model, param):
        return model.params[param]

    def cases(self):
        return CASES


class Wrong:
    """The reference backend, handed through; mutants override one method."""

    name = "wrong"

    def __init__(self):
        self.inner = ReferenceBackend()

    def owns(self, model):
        return self.inner.owns(model)

    def load(self, path, **options):
        return self.inner.load(path, **options)

    def save(self, model, path):
        return self.inner.save(model, path)

    def adopt(self, model, sample=None):
        return self.inner.adopt(model, sample)

    def graph(self, model):
        return self.inner.graph(model)

    def read(self, model, ids):
        return self.inner.read(model, ids)

    def edit(self, model, edits):
        return self.inner.edit(model, edits)

    def session(self, model, taps):
        return self.inner.session(model, taps)

    def segment(self, model, feeds, taps):
        return self.inner.segment(model, feeds, taps)

    def simulate(self, model, plan, encodings):
        return self.inner.simulate(model, plan, encodings)

    def export(self, model, plan, encodings, path, format):
        return self.inner.export(model, plan, encodings, path, format)

    def formats(self):
        return self.inner.formats()

    def input_specs(self, model):
        return self.inner.input_specs(model)


class Simulated:
    """A simulation, handed through; what is in force is kept here."""

    def __init__(self, inner, plan, encodings):
        self.inner, self.plan = inner, plan
        self.roots = dict(plan.by_root({s: e for s, e in encodings.items() if s in plan}, lambda s, e: None))

    @property
    def model(self):
        return self.inner.model

    def set(self, encodings):
        changes = self.plan.by_root(encodings, lambda s, e: None)
        self.inner.set(encodings)
        self.roots.update(changes)

    def get(self):
        return EncodingTable(self.plan.by_site(self.roots))

    def session(self, taps):
        return self.inner.session(taps)

    def segment(self, feeds, taps):
        return self.inner.segment(feeds, taps)


class Encoded(Simulated):
    """A simulation that takes another encoding than it is given."""

    def __init__(self, inner, plan, encodings, change):
        super().__init__(inner, plan, encodings)
        self.change = change
        inner.set(self.changed(encodings))

    def changed(self, encodings):
        found = {}
        for site, encoding in encodings.items():
            if site not in self.plan or encoding is None or not isinstance(encoding, Encoding):
                found[site] = encoding
            else:
                found[site] = self.change(self.plan[site], encoding)
        return {s: e for s, e in found.items() if s in self.plan or e is not None}

    def set(self, encodings):
        changes = self.plan.by_root(encodings, lambda s, e: None)
        self.inner.set(encodings)  # refuses what doesn't fit
        self.inner.set(self.changed(encodings))
        self.roots.update(changes)


@dataclass(frozen=True)
class Mutant:
    """A wrong backend, the case that it is tried on, and the kit's tests of which one must notice it."""

    name: str
    backend: Callable[[], Any]
    case: str
    tests: tuple[str, ...]


MUTANTS: list[Mutant] = []


def mutant(name, case, *tests):
    """Register a subclass of `Wrong`."""

    def register(backend):
        MUTANTS.append(Mutant(name, backend, case, tests))
        return backend

    return register


def encoded(name, case, change, *tests):
    """Register one whose simulations use other encodings than they are given."""

    class Backend(Wrong):
        def simulate(self, model, plan, encodings):
            return Encoded(self.inner.simulate(model, plan, encodings), plan, encodings, change)

    MUTANTS.append(Mutant(name, Backend, case, tests))


def computed(name, case, compute, *tests, when=lambda encoding: True):
    """Register one that rounds otherwise: `compute(encoding, x)` in place of `Encoding.fake_quantize`."""

    class Changed(Encoding):
        def fake_quantize(self, x):  # parameters are rounded by their encodings
            return np.asarray(compute(self, np.asarray(x)), np.float32)

    class Rounding(ReferenceBackend):
        def rounded(self, x, numbers, form):  # activations in the program
            encoding = _encoding_of(numbers, form)
            if not when(encoding):
                return super().rounded(x, numbers, form)
            return np.asarray(compute(encoding, np.asarray(x)), np.float32)

    def change(site, encoding):
        return Changed(**{f.name: getattr(encoding, f.name) for f in fields(Encoding)}) if when(encoding) else encoding

    class Backend(Wrong):
        def __init__(self):
            super().__init__()
            self.inner = Rounding()

        def simulate(self, model, plan, encodings):
            return Encoded(self.inner.simulate(model, plan, encodings), plan, encodings, change)

    MUTANTS.append(Mutant(name, Backend, case, tests))


def _encoding_of(numbers, form):
    """The encoding that a program's numbers came from, with signed codes."""
    scale, low, high = map(np.asarray, numbers)
    bits = 16 if form.float_format and "16" in form.float_format else 8
    zero = np.zeros(scale.shape, np.int32)
    if form.float_format is not None:
        return Encoding(bits, True, True, scale, zero, form.granularity, float_format=form.float_format)
    codes = round(float((high - low).flat[0])) + 1
    bits = (codes - 1).bit_length()
    strict = codes != 2**bits
    zero = -(2 ** (bits - 1)) + int(strict) - low
    return Encoding(bits, True, True, scale, np.rint(zero).astype(np.int32), form.granularity, strict=strict)


def shown(name, case, change, *tests):
    """Register one whose graph is another: `change(graph)`."""

    class Backend(Wrong):
        def __init__(self):
            super().__init__()
            self.made = functools.cache(change)

        def graph(self, model):
            return self.made(self.inner.graph(model))

    MUTANTS.append(Mutant(name, Backend, case, tests))


def with_ops(change):
    """A graph whose ops are changed one by one."""
    return lambda g: Graph([change(op) for op in g.ops], g.tensors, g.params, g.inputs, g.outputs)


def with_tensors(change):
    """A graph whose tensors are."""
    return lambda g: Graph(g.ops, {t: change(x) for t, x in g.tensors.items()}, g.params, g.inputs, g.outputs)


def with_attrs(kind, change):
    """A graph with other attributes at ops that have such ones."""
    return with_ops(lambda op: replace(op, attrs=change(op.attrs)) if isinstance(op.attrs, kind) else op)


GRID = "test_fake_quantization_is_the_core_s_grid"
ACTIVATIONS = "test_activations_of_every_format"
WEIGHTS = "test_weights_of_every_format"
BIASES = "test_derived_biases_are_quantized"
TIED = "test_tied_sites_have_one_grid"
TARGETS = "test_every_target_is_simulated"
FOLLOWS = "test_the_simulated_model_follows_too"
