"""Does the quantized artefact hold what the encodings file and the float model say: grids, codes and float parameters?

Everything is compared exactly and in the canonical layout, so that files and artefacts may lay numbers out as they
like, but not exchange them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Bundle, Pair, QuantizedArtefact, ReproducedArtefact
from bitwright.bundle._artefact import QDQ
from bitwright.calibration import bias_encoding
from bitwright.formats import CAST_FORMATS, Problem
from bitwright.graph import Graph, ParamId, TensorId, preserves_grid
from bitwright.grids import KEPT_AS, Blockwise, Encoding, EncodingTable, Granularity, PerChannel, cast_float, spread
from bitwright.placement import Derived, Float, OwnForms, Plan, SiteId


def check_pairs(
    backend: Backend[Any],
    model: object,
    bundle: Bundle,
    plan: Plan,
    encodings: Mapping[SiteId, Encoding],
    *,
    optional: Collection[SiteId] = (),
) -> list[Problem]:
    """Whether the artefact has exactly one pair for each tensor that the plan quantizes, on the file's grid.

    Codes of parameters must be those of the float model's values on that grid, those of biases on their accumulators'
    (of several ops that share a bias, on each one's); parameters that stay in float must be the float model's.
    Nothing to say where the bundle holds no such artefact, or the backend can't read it back. Biases of integer layers
    may stay in float; plain casts (float16, bfloat16) are not pairs. An artefact without pairs must be what the backend
    makes of the float model and the encodings (`ReproducedArtefact`).

    Args:
        backend: the model's.
        model: the exported float model.
        bundle: files by purpose.
        plan: of the exported model.
        encodings: of the encodings file, bound to the model's sites in canonical layout.
        optional: sites that the artefact may have no tensor for (`artefact.passed_on`).
    """
    problems: list[Problem] = []
    if isinstance(backend, ReproducedArtefact):
        found_again = backend.departures(model, plan, EncodingTable(dict(encodings)), bundle)
        problems += [Problem(tensor, what) for tensor, what in found_again]
    if QDQ not in bundle.files or not isinstance(backend, QuantizedArtefact):
        return problems
    check = _Check(backend, model, plan, encodings)
    pairs = dict(backend.pairs(bundle))
    for site in plan:
        found = tuple(pairs.pop(site, ()))
        if isinstance(plan[plan.root(site)].decision, Float):
            # What several ops share is read on the grid of each.
            problems += check.shared(site, found)
        elif found or site not in optional:
            problems += check.site(site, found)
    floats = backend.floats(bundle)
    problems += [p for site in plan if site in floats for p in check.kept(site, floats[site]())]
    return problems + [Problem(site, "passes through a Q/DQ pair, but isn't to be quantized") for site in pairs]


class _Check:
    def __init__(self, backend: Backend[Any], model: object, plan: Plan, encodings: Mapping[SiteId, Encoding]) -> None:
        self.backend, self.model, self.plan, self.encodings = backend, model, plan, encodings
        self.graph: Graph = backend.graph(model)

    def site(self, site: SiteId, pairs: Sequence[Pair]) -> list[Problem]:
        """A site that the plan quantizes."""
        if isinstance(self.plan[self.plan.root(site)].decision, Derived):
            return self._bias(site, pairs)
        encoding, spec = self.encodings.get(site), self.plan.spec(site)
        # No pair holds numbers of a range at run time: what the file computes of it is compared with the record.
        cast = spec is not None and (spec.float_format in CAST_FORMATS or spec.run_time is not None)
        if len(pairs) != 1:
            return [] if cast and not pairs else [Problem(site, f"passes through {len(pairs)} Q/DQ pairs, must be one")]
        return [] if encoding is None else self._departures(site, pairs[0], encoding)

    def shared(self, site: SiteId, pairs: Sequence[Pair]) -> list[Problem]:
        """A site without a grid of its own: only a bias that ops of several scales share may have pairs."""
        if not pairs:
            return []
        several = isinstance(self.plan[self.plan.root(site)].decision, OwnForms) or len(self._accumulators(site)) > 1
        if not several:  # those of `OwnForms` may be equal: twins that were calibrated on the same data
            return [Problem(site, "passes through a Q/DQ pair, but isn't to be quantized")]
        return self._bias(site, pairs)

    def kept(self, site: SiteId, values: NDArray[Any]) -> list[Problem]:
        """A parameter that is in float in the artefact."""
        if site not in self.graph.params:
            return []
        ours = self._values(site)
        if ours.shape != values.shape:
            return []  # frameworks keep some (norms' scales) in other shapes
        wrong = int((ours != values).sum())
        return [] if not wrong else [Problem(site, f"{_share(wrong, ours)} values aren't the float model's")]

    def _bias(self, site: SiteId, pairs: Sequence[Pair]) -> list[Problem]:
        wanted = self._accumulators(site)
        listed = self.encodings.get(site)
        if listed is not None and wanted and not any(_same_grid(listed, e) for e in wanted):
            return [Problem(site, "has another scale in the encodings file than its op's input · weight")]
        problems: list[Problem] = []
        missing = list(wanted)
        for pair in pairs:
            departures = [(e, self._departures(site, pair, e)) for e in wanted]
            fitting = [e for e, found in departures if not found]
            if departures and not fitting:
                problems += min((found for _, found in departures), key=_grid_first)
            missing = [e for e in missing if not any(e is f for f in fitting)]
        if not problems and missing and pairs and len(wanted) > 1:
            problems.append(Problem(site, "has no int32 form for one of the ops that share it"))
        return problems

    def _accumulators(self, bias: SiteId) -> list[Encoding]:
        """The int32 grids of the ops that add a bias, as far as their operands are quantized."""
        found: list[Encoding] = []
        for op in self.graph.users(bias):
            inputs = self._operand(op.data_inputs[0]) if op.data_inputs else None
            weight = None if op.weight is None else self._listed(op.weight)
            grid = None if inputs is None or weight is None else bias_encoding(inputs, weight)
            if grid is not None and not any(_same_grid(grid, e) for e in found):
                found.append(grid)
        return found

    def _operand(self, tensor: TensorId) -> Encoding | None:
        """The grid of what an op reads: a tensor's own, or that which ops that only move values pass on to it."""
        while (known := self._listed(tensor)) is None:
            op = self.graph.producer(tensor)
            if tensor in self.plan or op is None or not preserves_grid(op):
                return None
            tensor = op.data_inputs[0]
        return known

    def _listed(self, site: SiteId) -> Encoding | None:
        """The file's entry of a site, or of the one that its grid is shared with."""
        known = self.encodings.get(site)
        return self.encodings.get(self.plan.root(site)) if known is None and site in self.plan else known

    def _departures(self, site: SiteId, pair: Pair, encoding: Encoding) -> list[Problem]:
        shape = self.graph.params[site].shape if site in self.graph.params else None
        pair = pair if shape is None else _unit_axes_as(pair, shape)
        said = _grid_departure(pair, encoding, shape)
        if said is None and pair.codes is not None and site in self.graph.params:
            said = self._code_departure(site, pair, encoding)
        return [] if said is None else [Problem(site, said)]

    def _code_departure(self, site: SiteId, pair: Pair, encoding: Encoding) -> str | None:
        assert pair.codes is not None
        stored, values = pair.codes(), self._values(site)
        if [n for n in stored.shape if n != 1] != [n for n in values.shape if n != 1]:
            return f"holds values of shape {stored.shape} in the quantized file, {values.shape} in the float model"
        if encoding.float_format is not None:
            scale = encoding.spread(values.shape)[0]
            wanted: NDArray[Any] = cast_float(np.divide(values, scale, dtype=np.float32), encoding.float_format)
            theirs: NDArray[Any] = stored.reshape(values.shape)
        else:
            wanted = encoding.quantize(values).astype(np.int64) - encoding.spread(values.shape)[1]
            # Frameworks keep some (norms' scales) with axes of length 1.
            theirs = (stored - _full(pair.zero_point, pair, stored.shape)).reshape(values.shape)
        wrong = int((wanted != theirs).sum())
        return None if not wrong else f"{_share(wrong, values)} codes aren't those of the float model's values"

    def _values(self, site: ParamId) -> NDArray[np.float32]:
        return np.asarray(self.backend.read(self.model, [site])[site], np.float32)


def _unit_axes_as(pair: Pair, shape: tuple[int, ...]) -> Pair:
    """A parameter's pair with the axes of length 1 that `shape` has: 1-D convolutions are stored as 2-D ones."""
    if pair.codes is None or not pair.scale.ndim or pair.scale.ndim == len(shape):
        return pair
    codes = pair.codes()
    kept = [i for i, n in enumerate(codes.shape) if n != 1]
    if codes.ndim != pair.scale.ndim or [codes.shape[i] for i in kept] != [n for n in shape if n != 1]:
        return pair
    lengths = iter([pair.scale.shape[i] for i in kept])
    places = [i for i, n in enumerate(shape) if n != 1]
    placed = tuple(1 if n == 1 else next(lengths) for n in shape)
    block = places[kept.index(pair.block_axis)] if pair.block_axis in kept else None
    scale, zero = (v.reshape(placed) for v in (pair.scale, pair.zero_point))
    return replace(pair, scale=scale, zero_point=zero, block_axis=block, codes=lambda: codes.reshape(shape))


def _grid_departure(pair: Pair, encoding: Encoding, shape: tuple[int, ...] | None) -> str | None:
    """How a pair's grid isn't the encoding's, in words; None if it is. `shape` is a parameter's."""
    if pair.float_format not in (encoding.float_format, KEPT_AS.get(encoding.float_format or "", "")):
        return f"is {pair.float_format or 'integer'} in the Q/DQ pair, {encoding.float_format or 'integer'} in the file"
    if encoding.bits > pair.bits:
        return f"has {pair.bits}-bit codes in the Q/DQ pair, {encoding.bits} bits in the encodings file"
    how = encoding.granularity
    scale, zero = encoding.scale, encoding.zero_point.astype(np.int64)
    if isinstance(how, Blockwise) and pair.block_size != how.block_size:
        return f"has blocks of {pair.block_size} in the Q/DQ pair, of {how.block_size} in the encodings file"
    if pair.block_size and not isinstance(how, Blockwise):
        return "has blocks in the Q/DQ pair, but none in the encodings file"
    if shape is None:
        if isinstance(how, PerChannel) and pair.axis is not None and how.axis >= 0 and pair.axis != how.axis:
            return f"has its scales on axis {pair.axis} in the Q/DQ pair, {how.axis} in the encodings file"
        if pair.scale.shape != scale.shape:
            return f"has {pair.scale.size} scales in the Q/DQ pair, {scale.size} in the encodings file"
    else:
        whole = _coarse(shape, how)
        scale, zero = (np.asarray(_placed(v, whole, how)) for v in (scale, zero))
        if pair.scale.size > 1 and (pair.scale.ndim != scale.ndim or scale.ndim == 0):
            return "has its scales on other axes in the Q/DQ pair than in the encodings file"
        try:
            common = np.broadcast_shapes(pair.scale.shape, scale.shape)
        except ValueError:
            return "has its scales on other axes in the Q/DQ pair than in the encodings file"
        theirs = np.broadcast_to(pair.scale, common)
        if isinstance(how, PerChannel) and common != scale.shape and not _constant_along(theirs, scale.shape):
            return "has its scales on other axes in the Q/DQ pair than in the encodings file"
    theirs, ours = np.broadcast_arrays(pair.scale, scale)
    if not np.array_equal(theirs, ours):
        return "has another scale in the Q/DQ pair than in the encodings file"
    if encoding.float_format is None and not _same_zero(pair, encoding, zero):
        return "has another zero point in the Q/DQ pair than in the encodings file"
    return None


def _same_zero(pair: Pair, encoding: Encoding, zero: NDArray[np.int64]) -> bool:
    """Equal, whether codes are stored signed or unsigned, in a type of their own width or a wider one."""
    theirs, ours = np.broadcast_arrays(pair.zero_point, zero)
    if pair.signed == encoding.signed:
        return bool(np.array_equal(theirs, ours))
    sign = 1 if encoding.signed else -1
    return any(np.array_equal(theirs, ours + sign * 2 ** (bits - 1)) for bits in (pair.bits, encoding.bits))


def _coarse(shape: tuple[int, ...], how: Granularity) -> tuple[int, ...]:
    """The shape with the blocks in place of the axis that they divide."""
    if not isinstance(how, Blockwise):
        return shape
    axis = how.block_axis % len(shape)
    return tuple(n // how.block_size if i == axis else n for i, n in enumerate(shape))


def _placed(values: NDArray[Any], shape: tuple[int, ...], how: Granularity) -> NDArray[Any]:
    """Scales of an encoding ready to broadcast against the coarse shape."""
    if isinstance(how, Blockwise):
        return spread(values, shape, Blockwise(how.axis, how.block_axis, 1))
    return spread(values, shape, how)


def _constant_along(values: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether values vary only along axes that `shape` has."""
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return bool((values == values.min(axis=axes, keepdims=True)).all())


def _full(values: NDArray[Any], pair: Pair, shape: tuple[int, ...]) -> NDArray[Any]:
    """A pair's numbers ready to broadcast against the tensor itself."""
    if pair.block_axis is None or values.ndim == 0:
        return values
    return np.repeat(values, pair.block_size, axis=pair.block_axis)


def _same_grid(a: Encoding, b: Encoding) -> bool:
    return np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point)


def _grid_first(problems: Iterable[Problem]) -> int:
    """Codes are said to be wrong only where a grid is right."""
    return 0 if "codes" in next(iter(problems)).message else 1


def _share(wrong: int, values: NDArray[Any]) -> str:
    return f"{wrong} of {values.size}"
