"""The last stage of `auto_quantize`: more bits where they buy most, at as few sites as the allowed drop asks for."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.bank import Bank
from bitwright.calibration import guarded
from bitwright.errors import WriteError
from bitwright.placement import SiteId
from bitwright.runs import fingerprint
from bitwright.simulation import QuantSim
from bitwright_search.auto_result import Status, Trial
from bitwright_search.auto_search import AutoSearch
from bitwright_search.evaluation import Mode
from bitwright_search.sensitivity import NETWORK
from bitwright_search.stages import Built
from bitwright_search.widening import ACTIVATION_BITS, WEIGHT_BITS, Wider, measured, predicted, probes, widenings

NAME = "wider types"
"""What trials call the stage."""


def spend(search: AutoSearch) -> None:
    """Try more bits, if nothing has been good enough so far and the budget allows it."""
    if not search.met and search.left(NAME, "types", search.best.steps):
        Spending(search).run()


class Spending:
    """Sites in the order of the noise that they bring; networks in which the first so many of them are wider.

    The first network has all of them. If it is good enough, bisection finds how few are enough.

    Args:
        search: the search, whose best network it begins with.
    """

    def __init__(self, search: AutoSearch) -> None:
        self.search, self.base = search, search.best
        self.wider = widenings(self.base.built.sim)
        self._whole: Built | None = None
        self._anew = False
        """Techniques are applied again on networks with the wider types, activations too."""

    def run(self) -> None:
        """Add candidates to the search, the best of which is the one with the fewest wider sites."""
        search, count = self.search, len(self.wider)
        if not count:
            reason = (
                f"no activation has fewer than {ACTIVATION_BITS} bits and no weight fewer than {WEIGHT_BITS} that the "
                "target could have more of"
            )
            search.note(Trial(NAME, "types", Status.SKIPPED, self.base.steps, reason=reason))
            return
        try:
            order = self._order()
        except WriteError:
            raise
        except Exception as error:
            search.failed(NAME, "types", self.base.steps, error)
            return
        low, high = 0, count
        if not self._reaches(order):
            # What techniques have made up for on coarse activations may be wrong on fine ones.
            self._anew = any(s.technique in self.base.steps for s in search.techniques)
            if not self._anew or not search.left(NAME, "types", self.base.steps) or not self._reaches(order):
                return
        while high - low > 1:
            middle = (low + high) // 2
            if not search.left(NAME, "types", self.base.steps):
                return
            if self._reaches(order[:middle]):
                high = middle
            else:
                low = middle

    def _order(self) -> list[Wider]:
        """The most costly sites first."""
        search = self.search
        # Techniques that round weights leave none of their noise to be measured: it is that before them.
        networks = {False: self.base, True: search.unrefined}
        noises: dict[SiteId, float] = {}
        for weight, candidate in networks.items():
            some = [w for w in self.wider if w.weight is weight]
            if not some:
                continue
            sim = candidate.built.sim
            if isinstance(search.data, Bank):
                noises |= predicted(sim, some, search.data)
                continue
            batches = probes(sim, search.data)
            seen = fingerprint.of_arrays((f"{i}/{k}", v) for i, b in enumerate(batches) for k, v in sorted(b.items()))
            depends = {"network": candidate.built.content, "samples": seen, "sites": [w.root for w in some]}
            store = search.stages.run.step("auto: noise of sites", depends)
            noises |= measured(sim, some, batches, store, store.path / NETWORK)
        return sorted(self.wider, key=lambda w: -noises[w.root])

    def _reaches(self, chosen: Sequence[Wider]) -> bool:
        """Whether a network in which these sites are wider is good enough; it is a candidate of the search then."""
        search = self.search
        told = self._told(chosen)
        steps = (*self.base.steps, f"{len(chosen)} wider" + (", techniques anew" if self._anew else ""))
        try:
            built = self._network(chosen)
        except WriteError:
            raise
        except Exception as error:
            search.failed(steps[-1], "types", steps, error)
            return False
        result = search.score(" + ".join(steps), built, Mode.FULL)
        if isinstance(result, Exception):
            search.failed(steps[-1], "types", steps, result)
            return False
        score, seconds = result
        good = search.good(score)
        kept = Status.KEPT if good else Status.WORSE
        margin = search.lost(score).margin
        search.note(Trial(steps[-1], "types", kept, steps, score.value, built.seconds + seconds, told, margin=margin))
        search.add(steps, built, score, {w.root: w.text for w in chosen})
        return good

    def _told(self, chosen: Sequence[Wider]) -> str:
        """How many of what, in words."""
        parts = []
        for weight, bits, what in ((False, ACTIVATION_BITS, "activations"), (True, WEIGHT_BITS, "weights")):
            some, whole = (sum(w.weight is weight for w in of) for of in (chosen, self.wider))
            if whole:
                parts.append(f"{some} of {whole} {what} with {bits} bits")
        return ", ".join(parts)

    def _network(self, chosen: Sequence[Wider]) -> Built:
        """The base with wider types: ranges of activations are theirs whatever others have, so nothing runs for them;
        weights are rounded anew, by the techniques that the base had."""
        activations = [w for w in chosen if not w.weight]
        anew = [w for w in chosen if w.weight or self._anew]
        start = self._rebuilt(anew) if anew else self.base.built
        if not activations:
            return start
        whole = self._everything_wide()
        sim = start.sim.retyped({site: text for w in activations for site, text in w.types.items()})
        sim.set({w.root: whole.sim.encodings[w.root] for w in activations})
        sim.set(guarded(sim.plan, sim.encodings, sim.params))
        content = fingerprint.of_json([start.content, whole.content, [(w.root, w.text) for w in activations]])
        return Built(sim, content, start.seconds if anew else 0.0, None)

    def _everything_wide(self) -> Built:
        """The base with all its activations wider, over their whole range and more: clipping gains nothing there."""
        if self._whole is None:
            search, base = self.search, self.base.built
            types = {site: text for w in self.wider if not w.weight for site, text in w.types.items()}
            depends = {"base": base.content, "data": search.data.fingerprint(), "types": sorted(types.items())}

            def make() -> QuantSim:
                return base.sim.fork(scheme="sqnr").retyped(types).calibrate(search.data)

            self._whole = search.stages.build("auto: wide activations", depends, make, search.opened)
        return self._whole

    def _rebuilt(self, wider: Sequence[Wider]) -> Built:
        """The base with wider types, from the prepared network on."""
        search, base = self.search, self.base.built.sim
        types = {site: text for w in wider for site, text in w.types.items()}
        steps = [s for s in search.techniques if s.technique in self.base.steps]
        depends = {"base": search.prepared_content, "data": search.data.fingerprint(),
                   "types": sorted(types.items()), "schemes": [base.scheme, base.weight_scheme],
                   "steps": [[s.technique, dict(s.settings)] for s in steps]}  # fmt: skip

        def make() -> QuantSim:
            sim = search.prepared.fork(scheme=base.scheme, weight_scheme=base.weight_scheme).retyped(types)
            for step in steps:
                sim.apply(step.technique, search.data, **step.settings)
            return sim.calibrate(search.data)

        return search.stages.build("auto: wider types", depends, make, search.opened)
