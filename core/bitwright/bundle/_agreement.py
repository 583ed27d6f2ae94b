"""Do two networks compute the same but for rounding? Decided tensor by tensor, on the same inputs.

End to end that can't be told by a limit: a value that lies between two codes is rounded by its last float bit, and
deep networks make a large error out of a few such codes. So the whole network is compared first, and if every tensor
agrees that settles it. Otherwise each op is judged for itself: it is fed the first network's own tensors, and what it
makes of them must agree. What still departs is run once more on inputs that are changed by a few float32 bits: an op
that answers to those as much (a sum of exact halves, a difference of large numbers) isn't to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Divisible, Session, Tap, giving_back, let_go, parts_of, session_in_parts, settled
from bitwright.errors import BitwrightError, CapabilityError
from bitwright.graph import Graph, TensorId
from bitwright.grids import FLOAT_FORMATS, Encoding

Array = NDArray[Any]
Values = Mapping[TensorId, Array]

SHARE = 2e-3
"""Share of an 8-bit tensor's codes that rounding moves at most, in one op on equal inputs."""
NOISE = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
"""Relative error of an op in a narrow float type; float32 has `FLOAT_NOISE`."""
FLOAT_NOISE = 2.0**-19
FLOAT_TENSOR = 1e-4
"""Root mean square error, relative to the signal's, that a tensor without a grid may have."""
NUDGE = 2.0**-21
"""Relative change of the inputs that shows how an op answers to float32 rounding."""
PART = 2**18
"""Values of a tensor that are compared in float64 at once."""
TRIALS = 3
PATIENCE = 4.0
"""How much more than its answer to a nudge a tensor may depart."""


@dataclass(frozen=True)
class Departure:
    """One tensor that isn't what it should be.

    Attributes:
        tensor: the site.
        share: of its codes (or of its signal, where it has no grid) that differ.
        steps: the largest difference in grid steps; None where it has no grid.
        text: what is seen, in words.
    """

    tensor: TensorId
    share: float
    steps: float | None
    text: str

    def __str__(self) -> str:
        return f"{self.tensor!r} {self.text}"


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        compared: tensors that were compared.
        departures: those that depart, in the order of the network.
        unreached: tensors that the second network couldn't compute or doesn't have, with the reason.
        refused: why the second network can't be run at all, as a whole; empty where it runs, or where what it needs
            isn't at hand here (`CapabilityError`).
    """

    compared: tuple[TensorId, ...] = ()
    departures: tuple[Departure, ...] = ()
    unreached: Mapping[TensorId, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def first(self) -> Departure | None:
        """The first tensor that departs."""
        return next(iter(self.departures), None)


def agreement(
    graph: Graph,
    expected: Values,
    inputs: Values,
    network: Divisible,
    grids: Mapping[TensorId, Encoding],
    *,
    known: Collection[TensorId] | None = None,
    entries: Collection[TensorId] | None = None,
) -> Agreement:
    """Whether a network computes the expected tensors.

    Args:
        graph: which tensor depends on which; ids are those of `expected`.
        expected: tensors after their own quantization, all from one run: the truth.
        inputs: what the network is fed: the model's inputs as the user gives them; of a part, what it is handed.
        network: the other one.
        grids: encodings of tensors that have one.
        known: tensors that the other network has; None for all.
        entries: tensors that are fed and not computed; None for the graph's inputs.
    """
    entries = graph.inputs if entries is None else entries
    order = {t: i for i, t in enumerate((*graph.inputs, *(t for op in graph for t in op.outputs)))}
    wanted = sorted(expected, key=lambda t: order.get(t, len(order)))
    lost = {t: "the file has no such tensor" for t in wanted if known is not None and t not in known}
    taps = [t for t in wanted if t not in lost]
    refused, reason = "", "it can't be computed from the tensors before it"
    try:
        whole = _run(session_in_parts(graph, network, [Tap(t) for t in taps]), inputs)
        found = {t: departure(t, expected[t], whole[t], grids.get(t)) for t in taps if t in whole}
        if not any(found.values()):
            return Agreement(tuple(taps), (), lost)
        settled = {t for t, d in found.items() if d is None or t in entries}
        departed = {t: d for t, d in found.items() if d is not None and t in entries}
    except BitwrightError as error:
        settled, departed = set(), {}
        reason = str(error)
        refused = "" if isinstance(error, CapabilityError) else reason
        lost |= {t: reason for t in taps if t in entries}
    # Where the whole agrees up to a tensor, its inputs agreed too: only what departs is looked at op by op.
    doubtful = [t for t in taps if t not in settled and t not in entries]
    given = {t: v for t, v in expected.items() if t not in lost}
    judged = _judge(graph, doubtful, given, inputs, network, grids)
    for tensor in doubtful:
        answer = judged.get(tensor, reason)
        if isinstance(answer, str):
            lost[tensor] = answer
        elif answer is not None:
            departed[tensor] = answer
    ordered = tuple(departed[t] for t in taps if t in departed)
    return Agreement(tuple(t for t in taps if t not in lost), ordered, lost, refused)


def _run(session: Session, feeds: Values) -> dict[TensorId, Array]:
    return {tap.tensor: np.asarray(v) for tap, v in session.run(feeds).items()}


def _judge(
    graph: Graph,
    tensors: Sequence[TensorId],
    given: Values,
    inputs: Values,
    network: Divisible,
    grids: Mapping[TensorId, Encoding],
) -> dict[TensorId, Departure | str | None]:
    """Each tensor computed from the given ones before it: a departure, none, or why it can't be computed."""
    answers: dict[TensorId, Departure | str | None] = {}
    for group in _by_part(graph, independent(graph, tensors, given)):
        for part in _attempts(group, lambda taps: _forced(taps, given, inputs, network)):
            if isinstance(part, str):
                continue
            run, taps = part
            values = run(0)
            suspects = {}
            for tensor in taps:
                answers[tensor] = None
                found = departure(tensor, given[tensor], values[tensor], grids.get(tensor))
                if found is not None:
                    suspects[tensor] = found
            if not suspects:
                continue
            nudged = [run(seed) for seed in range(1, TRIALS + 1)]
            for tensor, found in suspects.items():
                answers[tensor] = _excused(found, values[tensor], [n[tensor] for n in nudged], grids.get(tensor))
    return answers


def _by_part(graph: Graph, groups: Iterable[Sequence[TensorId]]) -> Iterator[Sequence[TensorId]]:
    """The groups, of a large network in those of its parts: their parameters are in memory, and no others."""
    parts = parts_of(graph, few=True)
    if len(parts) == 1:
        yield from groups
        return
    place = {t: i for i, part in enumerate(parts) for t in part.computed}
    with giving_back(), settled():
        for group in groups:
            for index in range(len(parts)):
                if some := [t for t in group if place.get(t, 0) == index]:
                    yield some
                    let_go()


Run = Callable[[int], dict[TensorId, Array]]


def _attempts(
    group: Sequence[TensorId], compiled: Callable[[Sequence[TensorId]], Run]
) -> Iterable[tuple[Run, Sequence[TensorId]] | str]:
    """The whole group at once; one by one where that can't be compiled or run."""
    try:
        run = compiled(group)
        run(0)
        yield run, group
    except BitwrightError as error:
        if len(group) == 1:
            yield str(error)
            return
        for tensor in group:
            yield from _attempts([tensor], compiled)


def _forced(taps: Sequence[TensorId], given: Values, inputs: Values, network: Divisible) -> Run:
    feeds = {**{n: v for n, v in inputs.items() if n not in given}, **{t: v for t, v in given.items() if t not in taps}}
    session = network.segment(list(feeds), [Tap(t) for t in taps])

    def run(seed: int) -> dict[TensorId, Array]:
        return _run(
            session, feeds if seed == 0 else {t: _nudged(v, [seed, i]) for i, (t, v) in enumerate(feeds.items())}
        )

    return run


def _nudged(values: Array, seed: Sequence[int]) -> Array:
    if values.dtype.kind != "f":
        return values
    change = np.random.default_rng(seed).uniform(-NUDGE, NUDGE, values.shape)
    return np.asarray(values * (1 + change), values.dtype)


def independent(graph: Graph, tensors: Sequence[TensorId], given: Collection[TensorId]) -> list[list[TensorId]]:
    """Tensors in groups within which none is computed from another, so that all others can be fed at once."""
    wanted = set(tensors)
    near = {t: _before(graph, t, given) & wanted for t in tensors}
    groups: list[list[TensorId]] = []
    place: dict[TensorId, int] = {}
    for tensor in tensors:
        taken = {number for other, number in place.items() if other in near[tensor] or tensor in near[other]}
        number = next(i for i in range(len(groups) + 1) if i not in taken)
        if number == len(groups):
            groups.append([])
        groups[number].append(tensor)
        place[tensor] = number
    return groups


def _before(graph: Graph, tensor: TensorId, given: Collection[TensorId]) -> set[TensorId]:
    """The given tensors that a tensor is computed from, whatever lies between."""
    found: set[TensorId] = set()
    seen = {tensor}
    stack = [tensor]
    while stack:
        producer = graph.producer(stack.pop())
        for source in () if producer is None else producer.data_inputs:
            if source in seen:
                continue
            seen.add(source)
            if source in given:
                found.add(source)
            else:
                stack.append(source)
    return found


# -- one tensor


def departure(tensor: TensorId, expected: Array, found: Array, encoding: Encoding | None) -> Departure | None:
    """How a tensor departs from what is expected, beyond what rounding does in one op; None if it doesn't."""
    a, b = np.asarray(expected), np.asarray(found)
    if a.shape != b.shape:
        return Departure(tensor, 1.0, None, f"has the shape {list(b.shape)}, {list(a.shape)} is expected")
    if a.size == 0 or np.array_equal(a, b):
        return None
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        share = float((a != b).mean())
        text = f"differs in {share:.2%} of its values"
        return None if _few(share, a.size, SHARE) else Departure(tensor, share, None, text)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Departure(tensor, 1.0, None, "holds NaN or infinity in other places")
    share, steps, noise = _measured(a, b, encoding)
    if steps is None:
        limit = max(FLOAT_TENSOR, 4 * _noise(a))
        text = f"departs by {share:.2g} of its signal (root mean square)"
        return None if share <= limit else Departure(tensor, share, None, text)
    if steps <= 1.01 + 4 * noise and _few(share, a.size, SHARE + 4 * noise):
        return None
    text = f"differs in {share:.2%} of its codes, by up to {steps:.3g} steps"
    return Departure(tensor, share, steps, text)


def _excused(found: Departure, values: Array, nudged: Sequence[Array], encoding: Encoding | None) -> Departure | None:
    """The departure, unless the op answers as strongly to its inputs' last float bits."""
    if any(n.shape != values.shape for n in nudged) or values.size == 0:
        return found
    answers = [_compared(values, n, encoding) for n in nudged]
    share = max(s for s, _ in answers)
    steps = [s for _, s in answers if s is not None]
    within = found.share <= PATIENCE * share
    if found.steps is not None:
        within = within and found.steps <= 1.01 + PATIENCE * max(steps, default=0.0)
    return None if within and share > 0 else found


def _compared(a: Array, b: Array, encoding: Encoding | None) -> tuple[float, float | None]:
    if a.dtype.kind != "f":
        return float((a != b).mean()), None
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    share, steps, _ = _measured(a, b, encoding)
    return share, steps


def _measured(a: Array, b: Array, encoding: Encoding | None) -> tuple[float, float | None, float]:
    """Share of codes that differ, largest difference in steps, and steps that float noise makes; both arrays finite
    in the same places. Without a grid: relative root mean square error, None, 0."""
    if encoding is None:
        signal = error = 0.0
        # In parts: a language model's logits in float64 are as large as the model.
        for parts in zip(_parts(a), _parts(b), strict=True):
            x, y = (np.where(np.isfinite(v), v, 0).astype(np.float64) for v in parts)
            signal, error = signal + float(np.square(x).sum()), error + float(np.square(y - x).sum())
        return (0.0 if error == 0 else float("inf") if signal == 0 else float(np.sqrt(error / signal))), None, 0.0
    noise = _noise(a)
    finite = np.isfinite(a)
    if encoding.float_format is not None:
        exponent, mantissa, _ = FLOAT_FORMATS[encoding.float_format]
        x, y = (np.where(finite, v, 0).astype(np.float64) for v in (a, b))
        smallest = 2.0 ** (2 - 2 ** (exponent - 1)) * float(encoding.scale.max())
        size = np.maximum(np.maximum(np.abs(x), np.abs(y)), smallest)
        distance = np.abs(x - y) / (size * 2.0**-mantissa)
        return float((distance > 0.01).mean()), float(distance.max(initial=0.0)), noise * 2.0**mantissa
    if encoding.run_time is not None:
        steps = encoding.steps_between(*(_finite(v, finite) for v in (a, b)))
        return float((steps > 0).sum() / a.size), float(steps.max(initial=0)), noise * encoding.grid.steps
    p, q = (_finite(v, finite).astype(np.float32, copy=False) for v in (a, b))
    reach = max(float(p.max(initial=0.0)), -float(p.min(initial=0.0)))
    steps = encoding.steps_between(p, q)
    scale = float(encoding.scale.min())
    return float((steps > 0).sum() / a.size), float(steps.max(initial=0)), noise * reach / scale


def _parts(values: Array) -> Iterator[Array]:
    flat = values.reshape(-1)
    return (flat[start : start + PART] for start in range(0, flat.size, PART))


def _finite(values: Array, finite: NDArray[np.bool_]) -> Array:
    """The values, zero in the place of those that aren't finite."""
    return values if finite.all() else np.where(finite, values, 0)


def _noise(values: Array) -> float:
    return NOISE.get(values.dtype.name, FLOAT_NOISE)


def _few(share: float, size: int, limit: float) -> bool:
    """Whether a share of so many values is what chance makes of a limit: three deviations above it, and one value."""
    expected = limit * size
    return bool(share * size <= expected + 3 * expected**0.5 + 1)
