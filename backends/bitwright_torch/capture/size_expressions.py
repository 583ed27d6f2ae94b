"""The grammar of sizes in .pt2 files: PyTorch evaluates these texts as Python, so nothing else may stand there.

A size is arithmetic on symbols and numbers, as sympy writes it: ``s0*2 + 1``, or
``Add(Mul(Integer(2), Symbol('s77', positive=True, integer=True)), Integer(1))``.
"""

from __future__ import annotations

import ast
import re

from bitwright.errors import InputError

LONGEST = 4000
"""Characters of one expression."""
_LARGEST = 2**64
_EXPONENT = 8
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PLAIN_SYMBOL = re.compile(r"[a-z]{1,3}[0-9]{1,9}|oo|int_oo")
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_FUNCTIONS = frozenset({
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "FloatTrueDiv", "FloorDiv",
    "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "Le",
    "LessThan", "Lt", "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or", "Piecewise", "PythonMod",
    "RShift", "RoundDecimal", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "ToFloat", "TruncToFloat",
    "TruncToInt", "Unequality", "Where", "ceiling", "floor", *_POWERS,
})  # fmt: skip
_NUMBERS = frozenset({"Integer", "Float", "Rational"})
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub, ast.Invert,
    ast.BitAnd, ast.BitOr, ast.LShift, ast.RShift, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip


def check_expression(text: object) -> None:
    """Let pass what is arithmetic on sizes, and nothing that could run code or grow without bound.

    Raises:
        InputError: anything else.
    """
    if not isinstance(text, str) or len(text) > LONGEST or not text.isascii():
        raise InputError(f"{str(text)[:60]!r} is not an expression of sizes")
    try:
        tree = ast.parse(text, mode="eval")
        _check(tree.body, powers=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{text[:60]!r} is not an expression of sizes") from None


def _check(node: ast.AST, *, powers: bool) -> None:
    match node:
        case ast.Constant(value=bool()):
            return
        case ast.Constant(value=int() | float() as number) if abs(number) <= _LARGEST:
            return
        case ast.Name(id=name) if _PLAIN_SYMBOL.fullmatch(name) or name in ("true", "false"):
            return
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _OPERATORS):
            _check(operand, powers=powers)
            return
        case ast.BinOp(left=left, op=ast.Pow() | ast.LShift(), right=right) if powers:
            _power(left, right)
            return
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATORS) and not _is_power(op):
            _check(left, powers=powers)
            _check(right, powers=powers)
            return
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(o, _OPERATORS) for o in ops):
            for part in (left, *others):
                _check(part, powers=powers)
            return
        case ast.Call(func=ast.Name(id="Symbol" | "Dummy"), args=[ast.Constant(value=str(name))], keywords=keywords):
            plain = all(k.arg and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
                        for k in keywords)  # fmt: skip
            if plain and _SYMBOL.fullmatch(name):
                return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _NUMBERS:
            if all(_is_number(a) for a in args) and all(
                k.arg == "precision" and _is_number(k.value, 1000) for k in keywords
            ):
                return
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _POWERS and powers:
            _power(left, right)
            return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS - _POWERS:
            for part in args:
                _check(part, powers=powers)
            return
        case ast.Tuple(elts=parts):  # the cases of a Piecewise
            for part in parts:
                _check(part, powers=powers)
            return
    raise ValueError("not arithmetic")


def _is_power(op: ast.AST) -> bool:
    return isinstance(op, ast.Pow | ast.LShift)


def _power(left: ast.AST, right: ast.AST) -> None:
    """A power of what holds no power, with a small exponent: towers of powers have no end."""
    value = right
    while isinstance(value, ast.Call | ast.UnaryOp):
        name = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else "Integer"
        if name not in ("Integer", "Rational", "Float"):
            break
        value = value.operand if isinstance(value, ast.UnaryOp) else (value.args or [value.func])[0]
    small = isinstance(value, ast.Constant) and isinstance(value.value, int | float) and abs(value.value) <= _EXPONENT
    if not small and not (isinstance(value, ast.Constant) and value.value in ("0.5", "0.500000000000000")):
        raise ValueError("not a small exponent")
    _check(left, powers=False)


def _is_number(node: ast.AST, largest: int = _LARGEST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
        return False
    if isinstance(node.value, str):
        return _NUMBER.fullmatch(node.value) is not None
    return isinstance(node.value, int | float) and abs(node.value) <= largest
