"""Backends that are wrong about ties, open sessions, and what is in force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.grids import EncodingTable
from bitwright.placement import SharedWith
from kit_mutants.base import ACTIVATIONS, FOLLOWS, TARGETS, TIED, Encoded, Simulated, Wrong, mutant


@mutant("ties are ignored", "cnn", TIED)
class IgnoresTies(Wrong):
    def simulate(self, model, plan, encodings):
        free = {s: replace(x, decision=spec) for s, x in plan.items()
                if isinstance(x.decision, SharedWith) and (spec := plan.spec(s)) is not None}  # fmt: skip
        loose = plan.changed(free)
        inner = self.inner.simulate(model, loose, encodings)

        class Loose(Simulated):
            def set(self, changes):
                self.inner.set(plan.by_root(changes, lambda s, e: None))
                self.roots.update(plan.by_root(changes, lambda s, e: None))

        return Loose(inner, plan, encodings)


@mutant("the name of a tied site sets nothing", "cnn", TIED)
class IgnoresTiedNames(Wrong):
    def simulate(self, model, plan, encodings):
        class Deaf(Simulated):
            def set(self, changes):
                self.inner.set({s: e for s, e in changes.items() if s not in plan or plan.root(s) == s})
                self.roots.update(plan.by_root(changes, lambda s, e: None))

        return Deaf(self.inner.simulate(model, plan, encodings), plan, encodings)


@mutant("tied weights keep their own grids", "cnn", "test_tied_weights_have_one_grid")
class IgnoresTiedWeights(IgnoresTies):
    pass


@mutant("None bypasses nothing", "cnn", ACTIVATIONS)
class NeverBypasses(Wrong):
    def simulate(self, model, plan, encodings):
        class Stuck(Simulated):
            def set(self, changes):
                self.roots.update(plan.by_root(changes, lambda s, e: None))
                self.inner.set({s: e for s, e in changes.items() if e is not None or s == next(iter(plan))})

        return Stuck(self.inner.simulate(model, plan, encodings), plan, encodings)


@mutant("open sessions keep their encodings", "cnn", FOLLOWS)
class StaleSessions(Wrong):
    def simulate(self, model, plan, encodings):
        backend = self.inner

        class Stale(Simulated):
            def session(self, taps):
                return backend.simulate(model, plan, self.get()).session(taps)

        return Stale(backend.simulate(model, plan, encodings), plan, encodings)


@mutant("the encodings given at first are ignored", "cnn", TARGETS)
class IgnoresFirstEncodings(Wrong):
    def simulate(self, model, plan, encodings):
        class Late(Simulated):
            pass

        made = Late(self.inner.simulate(model, plan, encodings), plan, encodings)
        made.inner.set(dict.fromkeys(s for s in encodings if plan.root(s) == s))
        return made


@mutant("`get` has roots only", "branches", TARGETS)
class GetsRoots(Wrong):
    def simulate(self, model, plan, encodings):
        class Roots(Simulated):
            def get(self):
                return EncodingTable({s: e for s, e in super().get().items() if plan.root(s) == s})

        return Roots(self.inner.simulate(model, plan, encodings), plan, encodings)


@mutant("`get` has what was bypassed", "branches", TIED)
class GetsBypassed(Wrong):
    def simulate(self, model, plan, encodings):
        class All(Simulated):
            def set(self, changes):
                super().set(changes)
                self.seen = {**getattr(self, "seen", {}), **super().get()}

            def get(self):
                return EncodingTable({**getattr(self, "seen", {}), **super().get()})

        return All(self.inner.simulate(model, plan, encodings), plan, encodings)


@mutant("segments of a simulation are in float", "cnn", "test_segments_compute_what_the_whole_does")
class FloatSegments(Wrong):
    def simulate(self, model, plan, encodings):
        backend = self.inner

        class Floating(Simulated):
            def segment(self, feeds, taps):
                return backend.segment(model, feeds, taps)

        return Floating(self.inner.simulate(model, plan, encodings), plan, encodings)


@mutant("model inputs aren't quantized", "cnn", TARGETS)
class FloatInputs(Wrong):
    def simulate(self, model, plan, encodings):
        inputs = set(model.graph.inputs)
        made = Encoded(self.inner.simulate(model, plan, encodings), plan, encodings, lambda s, e: e)
        made.change = lambda s, e: e.with_(scale=e.scale * np.float32(1e-3)) if s.id in inputs else e
        made.inner.set(made.changed(encodings))
        return made


@mutant("simulations of one model have one table", "cnn", FOLLOWS)
class OneTableForAll(Wrong):
    def simulate(self, model, plan, encodings):
        backend, latest = self.inner, self.__dict__.setdefault("latest", {})

        class Sharing(Simulated):
            def set(self, changes):
                super().set(changes)
                latest.update(dict.fromkeys(plan.activations) | dict(self.get()))

            def session(self, taps):
                made = self.inner.session(taps)

                class Run:
                    def run(run, batch):
                        self.inner.set({s: e for s, e in latest.items() if plan.root(s) == s})
                        return made.run(batch)

                return Run()

        made = Sharing(backend.simulate(model, plan, encodings), plan, encodings)
        latest.update(made.get())
        return made


@mutant("segments that are open keep their encodings", "cnn", FOLLOWS)
class StaleSegments(Wrong):
    def simulate(self, model, plan, encodings):
        backend = self.inner

        class Stale(Simulated):
            def segment(self, feeds, taps):
                return backend.simulate(model, plan, self.get()).segment(feeds, taps)

        return Stale(backend.simulate(model, plan, encodings), plan, encodings)


@mutant("`get` hands out what it goes on writing into", "cnn", FOLLOWS)
class GetsTheLivingTable(Wrong):
    def simulate(self, model, plan, encodings):
        class Living(EncodingTable):
            def __getitem__(self, site):
                return plan.by_site(made.roots)[site]

        class Lent(Simulated):
            def get(self):
                return Living(super().get())

        made = Lent(self.inner.simulate(model, plan, encodings), plan, encodings)
        return made
