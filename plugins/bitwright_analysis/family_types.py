"""Types by the family of a network: which of a transformer's tensors 8 bits don't do for, from what calibration sees.

A norm gives every token the same size, and a linear op computes token by token, so what counts on residual streams is
the error of each token relative to that token. A grid for all tokens is as wide as the largest needs: a few massive
tokens (Sun et al. 2024, "Massive Activations in Large Language Models"), or a class token that is far smaller than the
patches, leave the others few codes, while the signal to noise of the whole tensor looks well. Tokens of vision
transformers have fixed places, and what is read in the end may be one of them alone: there the worst place counts, in
other networks the mean over tokens.

Every sum rounds the stream anew, so that its errors add up from block to block: types are proposed until all of them
together leave what is asked for. 16 bits come first; where one grid of 16 bits is too coarse, float16, which gives
every value the same relative error; and where so many of those are too much, float.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Tap
from bitwright.calibration import guarded
from bitwright.data import Dataset
from bitwright.graph import Graph, Place, TensorId, TransformerKind, transformer
from bitwright.grids import Encoding, QuantSpec, encoding_from_range
from bitwright.placement import SiteId
from bitwright.simulation import QuantSim
from bitwright_analysis.records import FamilyTypes, SiteTypes
from bitwright_analysis.scoring import OutputNoise, decibels

ENOUGH_DB = 25.0
"""Signal to noise of a token from which on a site of 8 bits or fewer keeps its type, and that the stream is to have
with all of its sites. Eight bits give a token with normal values about 40 dB on a grid of its own, and 25 dB on one
that is five times as wide; 30 sums of 40 dB each leave 25."""
WIDE_ENOUGH_DB = 62.0
"""The same where sites have more than 8 bits: 60 dB at the outputs, with what other tensors cost."""
WIDE_BITS = 16
HALF_DB = 73.7
"""Signal to noise of values in float16: uniform errors of half a step at most, of 2^-10 of the power of two below the
value, log-uniform values."""
TOGETHER = frozenset({Place.EMBEDDING, Place.SUM, Place.LOGITS})
"""Where errors add up: behind each other on the stream, and at its end."""
TAPS = 32
"""Tensors of one pass that are handed out together."""


def family_types(sim: QuantSim, data: Dataset, *, enough_db: float | None = None) -> FamilyTypes | None:
    """What a transformer's tensors need; None for other networks.

    Args:
        sim: calibrated; stays as it is.
        data: some samples.
        enough_db: signal to noise of a token that a site, and the stream with all of its sites, is to have, in
            decibels; default `ENOUGH_DB`, `WIDE_ENOUGH_DB` where most sites have more than 8 bits.
    """
    found = transformer(sim.graph)
    if found is None:
        return None
    roots: dict[SiteId, tuple[TensorId, Place]] = {}
    for tensor, place in found.places.items():
        root = sim.plan.root(tensor) if tensor in sim.plan else tensor
        spec = sim.plan.spec(root) if root in sim.plan.activations else None
        if spec is not None and spec.float_format is None and (root not in roots or place in TOGETHER):
            roots[root] = tensor, place
    order = list(roots)
    sites: dict[SiteId, _Site] = {}
    placed = found.kind is TransformerKind.VISION
    for first in range(0, len(order), TAPS):
        part = {root: roots[root][0] for root in order[first : first + TAPS]}
        for root, tokens in _tokens(sim, part, data, placed=placed).items():
            spec = sim.plan.spec(root)
            if tokens.count and spec is not None:
                sites[root] = _Site(roots[root][1], spec, tokens)
    wide = sum(s.spec.bits > 8 for s in sites.values()) > len(sites) / 2
    asked = enough_db if enough_db is not None else WIDE_ENOUGH_DB if wide else ENOUGH_DB
    before_stream = _spend(sites.values(), asked)
    rows = [s.row(root) for root, s in sites.items()]
    ranges = {root: (s.tokens.low, s.tokens.high) for root, s in sites.items()}
    needed = {r.site: r.proposed for r in rows if r.proposed != r.present}
    before = after = None
    notes: tuple[str, ...] = ()
    if needed:
        twin = sim.retyped({site: text for root, text in needed.items() for site in sim.plan.tied(root)})
        notes = tuple(n for n in twin.plan.notes if n not in sim.plan.notes)
        specs = {root: spec for root in needed if (spec := twin.plan.spec(root)) is not None}
        twin.set({root: encoding_from_range(spec, *ranges[root]) for root, spec in specs.items()})
        twin.set(guarded(twin.plan, twin.encodings, twin.params))
        with OutputNoise(sim.backend, sim.native, sim.graph, data) as noise:
            before, after = (decibels(noise(s.simulation)) for s in (sim, twin))
    return FamilyTypes(
        kind=found.kind.value,
        attentions=found.attentions,
        sites=tuple(sorted(rows, key=lambda r: math.inf if r.token_db is None else r.token_db)),
        asked_db=asked,
        stream_db=decibels(before_stream),
        overrides=patterns(sim.graph, needed),
        notes=notes,
        before_db=before,
        after_db=after,
    )


def told(found: FamilyTypes) -> str:
    """The finding in words, with the override to paste."""
    head = f"The network is a {found.kind} with {found.attentions} attentions"
    needed = [r for r in found.sites if r.proposed != r.present]
    if not needed:
        return f"{head}: every token has {found.asked_db:.0f} dB and more on its residual stream."
    gain = ""
    if found.before_db is not None:
        now = "no noise" if found.after_db is None else f"{found.after_db:.1f} dB"
        gain = f" With other types at {len(needed)} of them the output has {now} in place of {found.before_db:.1f} dB."
    notes = "".join(f" {note}." for note in found.notes[:3])
    worst = needed[0]
    return (
        f"{head}. The grids of the {len(found.sites)} sites of its residual stream leave a token "
        f"{0.0 if found.stream_db is None else found.stream_db:.1f} dB, {found.asked_db:.0f} dB are asked for "
        f"({worst.site}: {worst.token_db or 0.0:.1f} dB).{gain} As overrides: {json.dumps(found.overrides)}{notes}"
    )


class _Site:
    """A site with the type that is proposed for it, and the noise that a token has with that.

    Values of samples to come pass the largest of n seen ones once in n values; with the tail that reaches that far, of
    scale M / ln n, such a value is clipped by as much on average. Sites of few values, as logits, lose by that, and
    have nothing to fear of 16 bits, which have room.
    """

    def __init__(self, place: Place, spec: QuantSpec, tokens: _Tokens) -> None:
        self.place, self.spec, self.tokens = place, spec, tokens
        self.sign = "int" if spec.signed else "uint"
        self.present = self.proposed = f"{self.sign}{spec.bits}" if spec.run_time is None else str(spec.run_time)
        self.noise = tokens.noise + (tokens.clipped if spec.bits < WIDE_BITS and spec.run_time is None else 0.0)
        half = 10 ** (-HALF_DB / 10)
        # Its grid may be twice as wide as what was seen.
        wider = (f"{self.sign}{WIDE_BITS}", 4 * tokens.rounding(WIDE_BITS))
        self._rungs = [wider] if spec.bits < WIDE_BITS else []
        self._rungs += [("float16", half), ("float", 0.0)]

    def widen(self) -> bool:
        """Take the next type that halves the noise at least; whether there was one."""
        while self._rungs:
            text, noise = self._rungs.pop(0)
            if noise < self.noise / 2:
                self.proposed, self.noise = text, noise
                return True
        return False

    def row(self, site: SiteId) -> SiteTypes:
        """What is told of it."""
        tokens = self.tokens
        reach = max(abs(tokens.low), abs(tokens.high))
        return SiteTypes(
            site=site,
            place=self.place.value,
            present=self.present,
            proposed=self.proposed,
            token_db=decibels(tokens.noise),
            largest_to_typical=reach / tokens.typical,
            kurtosis=tokens.kurtosis,
        )


def _spend(sites: Collection[_Site], asked: float) -> float:
    """Propose types: for each site that has less than is asked for, and then where the stream loses most, until it has
    that with all of them; what the stream had before, as noise relative to a token."""
    allowed = 10 ** (-asked / 10)
    stream = [s for s in sites if s.place in TOGETHER]
    before = sum(s.noise for s in stream)
    for site in sites:
        while site.noise > allowed and site.widen():
            pass
    left = list(stream)
    while left and sum(s.noise for s in stream) > allowed:
        worst = max(left, key=lambda s: s.noise)
        if not worst.widen():
            left.remove(worst)
    return before


class _Tokens:
    """Sums over the tokens of one site: vectors along the channels.

    Args:
        grid: the site's.
        placed: tokens have fixed places, which are told apart.
    """

    def __init__(self, grid: Encoding, *, placed: bool) -> None:
        self.grid, self.placed = grid, placed
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self._logs = 0.0
        self._powers = np.zeros(3)  # of values: how many, squares, fourth powers
        self._places = np.zeros((3, 1))  # at each place: tokens, their relative errors, reciprocals of their powers

    def add(self, values: NDArray[np.float32], axis: int) -> None:
        """Take a batch."""
        samples = np.moveaxis(values, axis, -1).reshape(len(values) if self.placed else 1, -1, values.shape[axis])
        squares = np.square(samples, dtype=np.float64)
        power = squares.mean(axis=2)
        lost = np.square(self.grid.fake_quantize(samples) - samples, dtype=np.float64).mean(axis=2)
        some = power > 0
        whole = np.where(some, power, 1.0)
        self.count += int(some.sum())
        sums = np.stack([some, np.where(some, lost / whole, 0.0), some / whole]).sum(axis=1)
        if not self.placed:
            sums = sums.sum(axis=1, keepdims=True)
        elif self._places.shape != sums.shape:
            # Images of several sizes: places aren't fixed.
            self._places = self._places.sum(axis=1, keepdims=True)
            self.placed = self._places[0, 0] == 0
            sums = sums if self.placed else sums.sum(axis=1, keepdims=True)
        self._places = self._places + sums
        self._logs += float(np.log(power[some]).sum())
        self._powers += (samples.size, squares.sum(), np.square(squares).sum())
        self.stretch(values)

    def stretch(self, values: NDArray[np.float32]) -> None:
        """Take a batch of another tensor on the same grid."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def noise(self) -> float:
        """Power of the error relative to the token's own: the mean over tokens, of those at the worst place."""
        return float((self._places[1] / np.maximum(self._places[0], 1)).max())

    def rounding(self, bits: int) -> float:
        """The same on a grid of so many bits over all values, (step² / 12) / power (Bennett 1948)."""
        step = float((max(self.high, 0.0) - min(self.low, 0.0)) / (2**bits - 1))
        return step * step / 12 * float((self._places[2] / np.maximum(self._places[0], 1)).max())

    @property
    def clipped(self) -> float:
        """What samples to come lose to the ends of a grid that ends where the values did, relative to the mean power:
        2 (M / ln n)² / n, the exceedances of an exponential tail."""
        count, squares, _ = self._powers
        scale = max(abs(self.low), abs(self.high)) / math.log(max(count, 3.0))
        return float(2 * scale * scale / squares) if squares > 0 else 0.0

    @property
    def typical(self) -> float:
        """Root mean square of a typical token: the geometric mean over them."""
        return math.exp(self._logs / self.count / 2)

    @property
    def kurtosis(self) -> float:
        """E[x⁴] / E[x²]² of all values; 3 for normal ones."""
        count, squares, fourths = self._powers
        return float(fourths * count / squares**2) if squares > 0 else 0.0


def _tokens(sim: QuantSim, roots: Mapping[SiteId, TensorId], data: Dataset, *, placed: bool) -> dict[SiteId, _Tokens]:
    """Of each root the tensor of the stream; class token and patches, which are joined there, share its grid."""
    others = {root: [Tap(t) for t in sim.plan.observed(root) if t != tensor] for root, tensor in roots.items()}
    taps = {root: Tap(tensor) for root, tensor in roots.items()}
    wanted = dict.fromkeys((*taps.values(), *(tap for some in others.values() for tap in some)))
    session = sim.backend.session(sim.native, list(wanted))
    found = {root: _Tokens(sim.table[root], placed=placed) for root in roots}
    for batch in data:
        values = session.run(batch)
        for root, tap in taps.items():
            value = np.asarray(values[tap], np.float32)
            axis = sim.graph.tensors[tap.tensor].channel_axis
            if value.ndim > 1:
                found[root].add(value, -1 if axis is None else axis)
                for other in others[root]:
                    found[root].stretch(np.asarray(values[other], np.float32))
    return found


def patterns(graph: Graph, types: Mapping[TensorId, str]) -> dict[str, str]:
    """Overrides for tensors, those of repeated blocks as patterns where a pattern means no other tensor or parameter.

    Numbers in names are what may vary: ``layers.3.add`` and ``layers.7.add`` are ``layers.[0-9].add``.
    """
    floats = [t for t, tensor in graph.tensors.items() if tensor.is_float]
    known = [*floats, *graph.params]
    groups: dict[tuple[str, str], list[TensorId]] = {}
    for tensor, text in types.items():
        plain = not any(c in tensor for c in "*?[]")
        pattern = re.sub(r"\d", "[0-9]", tensor) if plain else tensor
        groups.setdefault((pattern, text), []).append(tensor)
    found: dict[str, str] = {}
    for (pattern, text), members in groups.items():
        whole = set(_matching(known, pattern)) == set(members)
        found |= {pattern: text} if len(members) > 1 and whole else dict.fromkeys(members, text)
    return found


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [n for n in names if fnmatch.fnmatchcase(n, pattern)]
