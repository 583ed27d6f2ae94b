"""Types by the family of a network: which of a transformer's tensors 8 bits don't do for, from what calibration sees.

A norm gives every token the same size, and a linear op computes token by token, so what counts on residual streams is
the error of each token relative to that token. A grid for all tokens is as wide as the largest needs: a few massive
tokens (Sun et al. 2024, "Massive Activations in Large Language Models"), or a class token that is far smaller than the
patches, leave the others few codes, while the signal to noise of the whole tensor looks well.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Tap
from bitwright.calibration import guarded
from bitwright.data import Dataset
from bitwright.graph import Graph, Place, TensorId, transformer
from bitwright.grids import Encoding, QuantSpec, encoding_from_range
from bitwright.placement import SiteId
from bitwright.simulation import QuantSim
from bitwright_analysis.records import FamilyTypes, SiteTypes
from bitwright_analysis.scoring import OutputNoise, decibels

ENOUGH_DB = 25.0
"""Signal to noise of a token from which on a site keeps its type. Eight bits give a token with normal values about 40
dB on a grid of its own, and 25 dB on one that is five times as wide."""
WIDE_BITS = 16
TAPS = 32
"""Tensors of one pass that are handed out together."""


def family_types(sim: QuantSim, data: Dataset, *, enough_db: float = ENOUGH_DB) -> FamilyTypes | None:
    """What a transformer's tensors need; None for other networks.

    Args:
        sim: calibrated; stays as it is.
        data: some samples.
        enough_db: mean signal to noise of a token from which on a site keeps its type, in decibels.
    """
    found = transformer(sim.graph)
    if found is None:
        return None
    roots: dict[SiteId, Place] = {}
    for tensor, place in found.places.items():
        root = sim.plan.root(tensor) if tensor in sim.plan else tensor
        spec = sim.plan.spec(root) if root in sim.plan.activations else None
        if spec is not None and spec.float_format is None and spec.bits < WIDE_BITS:
            roots.setdefault(root, place)
    order = list(roots)
    rows: list[SiteTypes] = []
    ranges: dict[SiteId, tuple[float, float]] = {}
    for first in range(0, len(order), TAPS):
        for root, tokens in _tokens(sim, order[first : first + TAPS], data).items():
            if tokens.count == 0:
                continue
            spec = sim.plan.spec(root)
            assert spec is not None
            poor = tokens.noise > 10 ** (-enough_db / 10)
            rows.append(_row(sim, root, roots[root], spec, tokens, wider=poor))
            ranges[root] = tokens.low, tokens.high
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
        overrides=patterns(sim.graph, needed),
        notes=notes,
        before_db=before,
        after_db=after,
    )


def told(found: FamilyTypes) -> str:
    """The finding in words, with the override to paste."""
    head = f"The network is a {found.kind} with {found.attentions} attentions"
    count = sum(r.proposed != r.present for r in found.sites)
    if not count:
        return f"{head}: every token has {ENOUGH_DB:.0f} dB and more at each site of its residual stream."
    gain = ""
    if found.before_db is not None:
        now = "no noise" if found.after_db is None else f"{found.after_db:.1f} dB"
        gain = f" With more bits there the output has {now} in place of {found.before_db:.1f} dB."
    notes = "".join(f" {note}." for note in found.notes[:3])
    return (
        f"{head}. At {count} of {len(found.sites)} sites of its residual stream the grid leaves a token less than "
        f"{ENOUGH_DB:.0f} dB on average ({found.sites[0].site}: {found.sites[0].token_db or 0.0:.1f} dB).{gain} "
        f"As overrides: {json.dumps(found.overrides)}{notes}"
    )


class _Tokens:
    """Sums over the tokens of one site: vectors along the channels."""

    def __init__(self, grid: Encoding) -> None:
        self.grid = grid
        self.count = 0
        self.largest = 0.0
        self.low, self.high = math.inf, -math.inf
        self._noise = self._logs = 0.0
        self._powers = np.zeros(3)  # of values: how many, squares, fourth powers

    def add(self, values: NDArray[np.float32], axis: int) -> None:
        """Take a batch."""
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        squares = np.square(rows, dtype=np.float64)
        power = squares.mean(axis=1)
        lost = np.square(self.grid.fake_quantize(rows) - rows, dtype=np.float64).mean(axis=1)
        some = power > 0
        self.count += int(some.sum())
        self._noise += float((lost[some] / power[some]).sum())
        self._logs += float(np.log(power[some]).sum())
        self._powers += (rows.size, squares.sum(), np.square(squares).sum())
        if rows.size:
            self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))

    @property
    def noise(self) -> float:
        """Mean over tokens of the power of the error relative to the token's own."""
        return self._noise / self.count

    @property
    def typical(self) -> float:
        """Root mean square of a typical token: the geometric mean over them."""
        return math.exp(self._logs / self.count / 2)

    @property
    def kurtosis(self) -> float:
        """E[x⁴] / E[x²]² of all values; 3 for normal ones."""
        count, squares, fourths = self._powers
        return float(fourths * count / squares**2) if squares > 0 else 0.0


def _tokens(sim: QuantSim, roots: Sequence[SiteId], data: Dataset) -> dict[SiteId, _Tokens]:
    taps = {root: [Tap(t) for t in sim.plan.observed(root)] for root in roots}
    session = sim.backend.session(sim.native, [tap for some in taps.values() for tap in some])
    found = {root: _Tokens(sim.table[root]) for root in roots}
    for batch in data:
        values = session.run(batch)
        for root, some in taps.items():
            for tap in some:
                value = np.asarray(values[tap], np.float32)
                axis = sim.graph.tensors[tap.tensor].channel_axis
                if value.ndim > 1:
                    found[root].add(value, -1 if axis is None else axis)
    return found


def _row(sim: QuantSim, root: SiteId, place: Place, spec: QuantSpec, tokens: _Tokens, *, wider: bool) -> SiteTypes:
    sign = "int" if spec.signed else "uint"
    present = f"{sign}{spec.bits}" if spec.run_time is None else str(spec.run_time)
    reach = max(abs(tokens.low), abs(tokens.high))
    return SiteTypes(
        site=root,
        place=place.value,
        present=present,
        proposed=f"{sign}{WIDE_BITS}" if wider else present,
        token_db=decibels(tokens.noise),
        largest_to_typical=reach / tokens.typical,
        kurtosis=tokens.kurtosis,
    )


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
