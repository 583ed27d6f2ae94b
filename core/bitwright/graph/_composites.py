"""Normalizations and biased products that a model spells out in elementary ONNX ops; every composite by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bitwright.graph._composite import Composite, behind, closed, constant_operand, is_mean, producer, transparent
from bitwright.graph._exponentials import LOGARITHMS, exponentials
from bitwright.graph._graph import Graph, Op, OpKind, ParamRole, TensorId


def layer_normalizations(graph: Graph) -> Iterator[Composite]:
    """(x − mean(x)) / √(variance of x + ε) [· γ] [+ β], the variance from differences or from mean(x²) − mean(x)²."""
    for end in graph:
        for reading in _normalized(graph, end):
            difference = graph.producer(reading.numerator)
            source = None if difference is None else _centred(graph, difference)
            if source is None or difference is None:
                continue
            inner = [*reading.casts, difference, *_mean_ops(graph, difference)]
            if reading.base != reading.numerator:  # some exporters write x − mean(x) twice
                other = graph.producer(reading.base)
                again = None if other is None else _centred(graph, other)
                if source not in (again, reading.base):
                    continue
                if other is not None and again is not None:
                    inner += [other, *_mean_ops(graph, other)]
            found = _finish(graph, "LayerNormalization", [*reading.ops, *inner], end, source)
            if found is not None:
                yield found
                break
        for source, ops in _shifted(graph, end):
            found = _finish(graph, "LayerNormalization", ops, end, source)
            if found is not None:
                yield found
                break


def rms_normalizations(graph: Graph) -> Iterator[Composite]:
    """x / √(mean(x²) + ε) [· γ]; the inner part of a layer normalization doesn't count."""
    yield from _uncentred(graph, "RMSNormalization", "ReduceMean")


def lp_normalizations(graph: Graph) -> Iterator[Composite]:
    """x / ‖x‖, with a bound or an ε below, by ReduceL2 or √Σx²; and lengths that nothing is divided by, `lengths`."""
    yield from _uncentred(graph, "LpNormalization", "ReduceL2", "ReduceSum")
    yield from lengths(graph)


def lengths(graph: Graph) -> Iterator[Composite]:
    """√Σx², √(mean(x²) + ε), √variance, √(a² + b²): distances, deviations, magnitudes of spectra; and the logarithms of
    these squares, which energies are told in.

    Squares have twice the range of what is squared: on a grid for the loudest, all that is quieter by the root of the
    number of its steps (24 dB of 8 bits, 48 of 16) is zero.
    """
    norms = (layer_normalizations, rms_normalizations)
    known = {op.id for found in norms for c in found(graph) for op in c.ops}
    known |= {op.id for c in _uncentred(graph, "LpNormalization", "ReduceL2", "ReduceSum") for op in c.ops}
    for end in graph:
        if end.id in known or not ((_is_root(end) or end.type in LOGARITHMS) and constant_operand(end)):
            continue
        found = _statistic(graph, end.output) if _is_root(end) else None
        ops = _sum_of_squares(graph, end.data_inputs[0]) if found is None else found[2][1:]
        if ops and (found is None or found[1] not in ("ReduceL2", "std")):
            length = closed(graph, "ReduceL2", [end, *ops], end, end.data_inputs[0] if found is None else found[0])
            if length is not None:
                yield length


def _sum_of_squares(graph: Graph, tensor: TensorId) -> list[Op]:
    """The ops of a² + b² + …, with bounds, factors and an ε; none if a tensor is something else."""
    op, casts = producer(graph, tensor)
    if op is None:
        return []
    if _squared(op) is not None or op.type == "ReduceSumSquare":
        return [*casts, op]
    summed = op.kind is OpKind.ADD and len(op.data_inputs) > 1
    if not summed and not (constant_operand(op) and (op.type in _PASSED or op.type == "ReduceSum" or is_mean(op))):
        return []
    parts = [_sum_of_squares(graph, t) for t in op.data_inputs]
    return [*casts, op, *(o for part in parts for o in part)] if all(parts) else []


def _uncentred(graph: Graph, type: str, *statistics: str) -> Iterator[Composite]:
    for end in graph:
        for reading in _normalized(graph, end):
            centre = graph.producer(reading.numerator)
            if reading.base != reading.numerator or reading.statistic not in statistics:
                continue
            if centre is not None and _centred(graph, centre) is not None:
                continue
            found = _finish(graph, type, list(reading.ops), end, reading.numerator)
            if found is not None:
                yield found
                break


def matmul_adds(graph: Graph) -> Iterator[Composite]:
    """x · W + b, written as a MatMul with a constant and an Add of a constant."""
    for op in graph:
        if op.kind is not OpKind.LINEAR or op.type != "MatMul" or ParamRole.BIAS in op.params:
            continue
        add = graph.sole_consumer(op.output)
        masked = add is not None and graph.tensors[add.output].mask
        if add is not None and not masked and add.kind is OpKind.ADD and constant_operand(add):
            yield Composite("MatmulAdd", (op, add), op.data_inputs[0], beta=add)


COMPOSITES: Mapping[str, Callable[[Graph], Iterator[Composite]]] = {
    "LayerNormalization": layer_normalizations,
    "RMSNormalization": rms_normalizations,
    "LpNormalization": lp_normalizations,
    "Exponentials": exponentials,
    "MatmulAdd": matmul_adds,
}
"""Recognizers by the name that `supergroup_pass_list` gives them."""
GRIDLESS = ("LayerNormalization", "RMSNormalization", "LpNormalization", "Exponentials")
"""Passes of a target that says nothing of passes: what is inside of them (squares of outliers, reciprocals of small
numbers, exponentials) has no useful grid anywhere."""


@dataclass(frozen=True)
class _Reading:
    """An op read as numerator / f(statistic of base): its parts, roots of tensors behind casts, and the ops from the
    statistic to the end. `casts` lie between the roots and these."""

    numerator: TensorId
    base: TensorId
    statistic: str
    ops: tuple[Op, ...]
    casts: tuple[Op, ...]


def _normalized(graph: Graph, end: Op) -> Iterator[_Reading]:
    """Readings of `end` as a / √(statistic of b), written with Div, or Mul by a reciprocal or a negative power."""
    if end.type not in ("Div", "Mul") or len(end.data_inputs) != 2:
        return
    orders = (end.data_inputs, end.data_inputs[::-1]) if end.type == "Mul" else (end.data_inputs,)
    for a, b in orders:
        numerator, casts = behind(graph, a)
        found = _statistic(graph, b)
        if found is not None:
            base, statistic, ops = found
            root, more = behind(graph, base)
            if end.type == "Mul" and not any(_inverts(op) for op in ops):
                continue
            yield _Reading(numerator, root, statistic, (end, *ops), (*casts, *more))


def _statistic(graph: Graph, tensor: TensorId) -> tuple[TensorId, str, list[Op]] | None:
    """What a divisor is a root of: (the tensor whose mean square, sum of squares, norm or deviation it is, type of
    the reduction, the ops in between). Constants may be added, multiplied or bound it on the way."""
    ops: list[Op] = []
    rooted = False
    while (op := graph.producer(tensor)) is not None:
        ops.append(op)
        if op.type in ("ReduceL2", "std"):
            return op.data_inputs[0], op.type, ops
        if is_mean(op) or op.type in ("ReduceSum", "var"):
            if op.type == "var":
                return (op.data_inputs[0], op.type, ops) if rooted else None
            square, casts = producer(graph, op.data_inputs[0])
            if square is not None and square.type == "SquaredDifference" and len(square.data_inputs) == 2 and rooted:
                mean, more = producer(graph, square.data_inputs[1])
                root = behind(graph, square.data_inputs[0])[0]
                ops += [*casts, square, *more, *([mean] if mean is not None else [])]
                return None if _mean_of(graph, mean) != root else (root, "var", ops)
            base = None if square is None else _squared(square)
            if square is None or base is None or not rooted:
                return None
            return base, "ReduceMean" if is_mean(op) else op.type, [*ops, *casts, square]
        if op.type == "Sub" and len(op.data_inputs) == 2 and rooted:
            return _difference_of_squares(graph, op, ops)
        if not (transparent(graph, op) or (constant_operand(op) and (_is_root(op) or op.type in _PASSED))):
            return None
        rooted |= _is_root(op)
        tensor = op.data_inputs[0]
    return None


def _difference_of_squares(graph: Graph, op: Op, ops: list[Op]) -> tuple[TensorId, str, list[Op]] | None:
    """mean(x²) − mean(x)²."""
    (first, casts), (second, more) = (producer(graph, t) for t in op.data_inputs)
    if first is None or second is None or not is_mean(first):
        return None
    mean_tensor = _squared(second)
    square, between = producer(graph, first.data_inputs[0])
    mean, moves = (None, ()) if mean_tensor is None else producer(graph, mean_tensor)
    if square is None or mean is None or not is_mean(mean) or (base := _squared(square)) is None:
        return None
    root = behind(graph, base)[0]
    if behind(graph, mean.data_inputs[0])[0] != root:
        return None
    return root, "ReduceMean", [*ops, *casts, first, *between, square, *more, second, *moves, mean]


_PASSED = frozenset({"Add", "Mul", "Div", "Max", "Clip", "Relu", "Reciprocal"})
"""Arithmetic with a constant between a statistic and the division by it."""


def _shifted(graph: Graph, end: Op) -> Iterator[tuple[TensorId, list[Op]]]:
    """Readings of `end` as x · s + (β − mean(x) · s), s = γ / √(variance of x + ε): (x, the ops)."""
    if end.type != "Add" or len(end.data_inputs) != 2:
        return
    for product, shift in (end.data_inputs, end.data_inputs[::-1]):
        mul, minus = graph.producer(product), graph.producer(shift)
        if mul is None or minus is None or mul.type != "Mul" or len(mul.data_inputs) != 2:
            continue
        moved = graph.producer(minus.data_inputs[0]) if minus.type == "Sub" and constant_operand(minus) else None
        if moved is None or moved.type != "Mul" or len(moved.data_inputs) != 2:
            continue
        for x, scale in (mul.data_inputs, mul.data_inputs[::-1]):
            found = _statistic(graph, scale)
            if found is None or scale not in moved.data_inputs or not any(_inverts(op) for op in found[2]):
                continue
            mean, casts = producer(graph, next(t for t in moved.data_inputs if t != scale))
            source = behind(graph, x)[0]
            base, more = behind(graph, found[0])
            centred = graph.producer(base)
            inner = [] if centred is None or _centred(graph, centred) != source else [centred, *more]
            if _mean_of(graph, mean) == source and (base == source or inner):
                assert mean is not None
                yield source, [end, mul, minus, moved, mean, *casts, *found[2], *inner]


def _mean_of(graph: Graph, op: Op | None) -> TensorId | None:
    """The root of what an op is the mean of."""
    return behind(graph, op.data_inputs[0])[0] if op is not None and is_mean(op) else None


def _inverts(op: Op) -> bool:
    return op.type in ("Reciprocal", "Div") or (op.type == "Pow" and constant_operand(op))


def _is_root(op: Op) -> bool:
    return op.type == "Sqrt" or (op.type == "Pow" and constant_operand(op))


def _squared(op: Op) -> TensorId | None:
    if op.type == "Mul" and len(op.data_inputs) == 2 and op.data_inputs[0] == op.data_inputs[1]:
        return op.data_inputs[0]
    return op.data_inputs[0] if op.type == "Pow" and constant_operand(op) else None


def _centred(graph: Graph, op: Op) -> TensorId | None:
    """The root of x, if the op computes x − mean(x)."""
    if op.type != "Sub" or len(op.data_inputs) != 2:
        return None
    source = behind(graph, op.data_inputs[0])[0]
    return source if _mean_of(graph, producer(graph, op.data_inputs[1])[0]) == source else None


def _mean_ops(graph: Graph, difference: Op) -> list[Op]:
    """The mean that a difference subtracts, and the casts behind it."""
    mean, casts = producer(graph, difference.data_inputs[1])
    return [*casts, *([mean] if mean is not None else [])]


def _finish(graph: Graph, type: str, ops: list[Op], end: Op, source: TensorId) -> Composite | None:
    """Take in a following · γ and + β, and make sure that nothing outside reads what is inside."""
    gamma, after = _affine(graph, end, OpKind.MUL)
    beta, before_beta = _affine(graph, gamma or end, OpKind.ADD)
    casts = (*(after if gamma else ()), *(before_beta if beta else ()))
    members = [*ops, *casts, *(o for o in (gamma, beta) if o is not None)]
    return closed(graph, type, members, beta or gamma or end, source, gamma, beta)


def _affine(graph: Graph, op: Op, kind: OpKind) -> tuple[Op | None, tuple[Op, ...]]:
    """The multiplication or addition of a constant that alone reads an op, and the casts between."""
    casts: list[Op] = []
    user = graph.sole_consumer(op.output)
    while user is not None and transparent(graph, user) and user.kind is not OpKind.RESHAPE:
        casts.append(user)
        user = graph.sole_consumer(user.output)
    if user is not None and user.kind is kind and constant_operand(user) and ParamRole.CONSTANT in user.params:
        return user, tuple(casts)
    return None, ()
