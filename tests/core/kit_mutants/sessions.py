"""Backends whose sessions hand out something else, or take too much."""

from __future__ import annotations

import contextlib

import numpy as np

from bitwright.backend import Tap
from bitwright.errors import EncodingError
from kit_mutants.base import MUTANTS, Mutant, Simulated, Wrong, mutant


@mutant("a tap is its op's input", "cnn", "test_canonical_layouts")
class WrongTap(Wrong):
    def session(self, model, taps):
        made = self.inner.session(model, taps)
        makers = {t: model.graph.producer(t.tensor) for t in taps}
        moved = {t: Tap(op.data_inputs[0]) for t, op in makers.items() if op is not None and op.type == "Clip"}
        other = self.inner.session(model, [moved.get(t, t) for t in taps])

        class Run:
            def run(self, batch):
                made.run(batch)
                found = other.run(batch)
                return {t: found[moved.get(t, t)] for t in taps}

        return Run()


def handed(name, case, change, *tests):
    """Register one whose sessions hand out something else: `change(tap, value)`."""

    class Backend(Wrong):
        def session(self, model, taps):
            made = self.inner.session(model, taps)

            class Run:
                def run(self, batch):
                    return {t: change(t, v) for t, v in made.run(batch).items()}

            return Run()

    MUTANTS.append(Mutant(name, Backend, case, tests))


REDUCED = "test_reduced_taps"
handed("minimum and maximum are swapped", "cnn", lambda t, v: v[::-1] if t.reduce == "minmax" else v, REDUCED)
handed("channels are averaged over", "cnn", lambda t, v: v if t.reduce == "none" or t.axis is None
       else np.repeat(v.mean(axis=1, keepdims=True), v.shape[1], axis=1), REDUCED)  # fmt: skip
handed("thinning begins at the second value", "cnn", lambda t, v: v if t.step == 1 else np.roll(v, 1, axis=1), REDUCED)
handed("batches are in reverse", "cnn", lambda t, v: v[::-1], "test_samples_are_independent", "test_canonical_layouts")


@mutant("samples share what is computed", "cnn", "test_samples_are_independent")
class MixesSamples(Wrong):
    def session(self, model, taps):
        made = self.inner.session(model, taps)

        class Run:
            def run(self, batch):
                return made.run({k: v - np.asarray(v).mean(axis=0) if np.asarray(v).dtype.kind == "f" else v
                                 for k, v in batch.items()})  # fmt: skip

        return Run()


@mutant("what is missing is zero", "cnn", "test_feeds_that_don_t_fit_are_refused")
class FillsIn(Wrong):
    def session(self, model, taps):
        made = self.inner.session(model, taps)

        class Run:
            def run(self, batch):
                zeros = {t: np.zeros((4, *model.graph.tensors[t].shape[1:]), np.float32) for t in model.graph.inputs}
                return made.run({**zeros, **batch})

        return Run()


@mutant("ids are taken modulo what there is", "tokens", "test_feeds_that_don_t_fit_are_refused")
class RoundsIds(Wrong):
    def session(self, model, taps):
        made = self.inner.session(model, taps)

        class Run:
            def run(self, batch):
                ids = {k: np.rint(v) for k, v in batch.items() if k == "ids" and np.asarray(v).dtype.kind == "f"}
                return made.run({**batch, **ids})

        return Run()


@mutant("encodings that don't fit are broadcast", "cnn", "test_encodings_that_don_t_fit_are_refused")
class ChecksNoEncodings(Wrong):
    def simulate(self, model, plan, encodings):
        class Lax(Simulated):
            def set(self, changes):
                with contextlib.suppress(EncodingError):
                    super().set(changes)

        return Lax(self.inner.simulate(model, plan, encodings), plan, encodings)


class Wrapped(Wrong):
    """Sessions of the whole model, made something of by `wrap`."""

    def session(self, model, taps):
        return self.wrap(self.inner.session(model, taps))


@mutant("arrays that were handed out are written into again", "cnn", "test_samples_are_independent")
class OneBuffer(Wrapped):
    def wrap(self, made):
        held = {}

        class Run:
            def run(self, batch):
                for tap, value in made.run(batch).items():
                    held.setdefault((tap, value.shape), np.empty_like(value))[...] = value
                return {tap: held[tap, v.shape] for tap, v in made.run(batch).items()}

        return Run()


@mutant("fewer samples are filled up with zeros", "cnn", "test_reduced_taps")
class FillsBatchesUp(Wrapped):
    def wrap(self, made):
        class Run:
            most = 0

            def run(self, batch):
                count = len(next(iter(batch.values())))
                self.most = max(self.most, count)
                rest = [(0, self.most - count)]
                full = {t: np.pad(v, rest + [(0, 0)] * (v.ndim - 1)) for t, v in batch.items()}
                return {t: v[:count] if t.reduce == "none" else v for t, v in made.run(full).items()}

        return Run()
