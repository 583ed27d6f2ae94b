"""Changes one line of the core's numerics at a time and asks whether the tests notice; `make mutants`.

    python tests/mutants/mutants.py                      200 mutants, the same ones every time
    python tests/mutants/mutants.py --seed 7 --count 50  others
    python tests/mutants/mutants.py --module grid        of one module alone

Each mutant is imported in place of its module in a forked process, so that no file is touched, and meets the tests that
execute its line (a line that runs at import meets all), the quick ones first. It is killed if one fails, they can't be
collected, or they compute for much longer than without it. What can't be told apart by any test is listed with its
reason in equivalent.toml. The exit status is 1 if less than `--floor` percent are killed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]

SUBJECTS = (
    "bitwright.grids._grid",
    "bitwright.grids._encoding",
    "bitwright.grids._gradients",
    "bitwright.calibration._ranges",
    "bitwright.graph._linear_form",
    "bitwright.verify._integer_kernels",
    "bitwright.bundle._saturation",
    "bitwright.grids._pair_sums",
    "bitwright.calibration._base",
    "bitwright.calibration._density",
    "bitwright.calibration._entropy",
    "bitwright.calibration._mse",
    "bitwright.calibration._percentile",
    "bitwright.calibration._search",
    "bitwright.calibration._sqnr",
    "bitwright.statistics._base",
    "bitwright.statistics._channel",
    "bitwright.statistics._histogram",
    "bitwright.statistics._moments",
    "bitwright.statistics._range",
)
"""The modules that hold the core's numerics."""

PROVING = ("core", "onnx/test_integer_kernels.py", "onnx/test_exactness.py")
"""The tests that mutants meet."""

OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "<<": ">>", ">>": "<<",
    "&": "|", "|": "&", "^": "|", "and": "or", "or": "and", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=",
}  # fmt: skip
_PAIRS = "min max|minimum maximum|floor ceil|argmin argmax|any all|zeros ones|low high|rint floor|first last|sum max"
NAMES = {a: b for pair in _PAIRS.split("|") for a, b in (pair.split(), pair.split()[::-1])} | {"rint": "floor"}
DROPPED = {"abs", "sqrt", "rint", "square", "log2", "exp2", "log", "exp", "sort"}
"""Functions of one argument that are left out."""


@dataclass(frozen=True)
class Mutant:
    """One change: `old` at a place of a module's text becomes `new`; `first` is the line where its statement begins."""

    module: str
    first: int
    line: int
    start: int
    old: str
    new: str

    def text(self, source: str) -> str:
        """The module's text with the change."""
        return source[: self.start] + self.new + source[self.start + len(self.old) :]

    def described(self, source: str) -> str:
        """Where it is, the line as it was and as it is."""
        was, now = (text.splitlines()[self.line - 1].strip() for text in (source, self.text(source)))
        return f"{self.module}:{self.line}\n    - {was}\n    + {now}"


def path_of(module: str) -> Path:
    """The file of a module; nothing is imported, since forks would get what is."""
    top, *inner = module.split(".")
    found = importlib.util.find_spec(top)
    assert found is not None and found.origin is not None, module
    path = Path(found.origin).parent.joinpath(*inner)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def mutants(module: str, source: str) -> list[Mutant]:
    """All changes of single lines, in the order of the text."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line.encode()))
    raw = source.encode()
    plain = {len(raw[:i].decode(errors="ignore").encode()): len(raw[:i].decode(errors="ignore")) for i in offsets}

    def at(line: int, column: int) -> int:
        begin = offsets[line - 1]
        return plain[begin] + len(raw[begin : begin + column].decode())

    def span(node: ast.expr) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)

    found = set()

    def add(line: int, begin: int, end: int, new: str) -> None:
        old = source[begin:end]
        if "\n" not in old and old != new:
            found.add(Mutant(module, first, line, begin, old, new))

    def between(left: ast.expr, right: ast.expr) -> None:
        begin, end = span(left)[1], span(right)[0]
        gap = source[begin:end]
        word = gap.strip(" ()")
        if word in OPERATORS and "\n" not in gap:
            start = begin + gap.index(word)
            add(left.end_lineno or 0, start, start + len(word), OPERATORS[word])

    first, signed = 1, set[ast.AST]()  # −1 is another number without its sign already
    for node in code(ast.parse(source)):
        first = node.lineno if isinstance(node, ast.stmt) else first
        match node:
            case ast.BinOp(left=left, right=right):
                between(left, right)
            case ast.Compare(left=left, comparators=comparators):
                for a, b in zip([left, *comparators], comparators, strict=False):
                    between(a, b)
            case ast.BoolOp(values=values):
                for a, b in itertools.pairwise(values):
                    between(a, b)
            case ast.AugAssign(target=left, value=right):
                between(left, right)
            case ast.UnaryOp(operand=operand):
                begin, end = span(node)
                signed |= {operand} if isinstance(operand, ast.Constant) else set()
                add(node.lineno, begin, end, f"({source[slice(*span(operand))]})")
            case ast.Constant(value=bool() | int() | float() as value) if node not in signed:
                begin, end = span(node)
                new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2
                add(node.lineno, begin, end, str(new))
            case ast.Attribute(attr=name) if name in NAMES:
                end = span(node)[1]
                add(node.end_lineno or 0, end - len(name), end, NAMES[name])
            case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
                add(node.lineno, *span(node), NAMES[name])
            case ast.IfExp(test=test) | ast.If(test=test) | ast.While(test=test):
                begin, end = span(test)
                add(test.lineno, begin, end, f"(not ({source[begin:end]}))")
            case _:
                pass
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in DROPPED:
                add(node.lineno, *span(node), f"({source[slice(*span(node.args[0]))]})")
    return sorted(found, key=lambda m: (m.start, m.new))


def code(node: ast.AST) -> Iterator[ast.AST]:
    """What computes: no annotations, decorators, messages, assertions and declarations of what a module exports."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "keywords" if isinstance(node, ast.ClassDef) else ""):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.keyword) and child.arg in ("strict", "maxsize", "slots"):
                continue
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                yield from code(child)


class _Loader(SourceFileLoader):
    def __init__(self, module: str, path: str, text: str) -> None:
        super().__init__(module, path)
        self._text = text

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        return compile(self._text, self.path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, module: str, path: Path, text: str) -> None:
        self._module, self._path, self._text = module, path, text

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        loader = _Loader(name, str(self._path), self._text)
        places = [str(self._path.parent)] if self._path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self._path, loader=loader, submodule_search_locations=places
        )


class _NoShrinking:
    """Hypothesis needn't find the smallest example that fails."""

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        own = settings.get_profile("bitwright")
        settings.register_profile("mutants", own, phases=[Phase.explicit, Phase.generate], database=None)
        settings.load_profile("mutants")


@dataclass(frozen=True)
class Told:
    """What tests did: whether all pass, and the last lines that they print."""

    well: bool
    text: str


def tried(tests: Sequence[str], seconds: float, before: Callable[[], object], plugins: Sequence[object] = ()) -> Told:
    """Runs tests in a process of their own, in which `before` is called first."""
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = 70
            try:
                import pytest

                # Processor time, so that a busy machine kills no mutant; the clock ends what only waits.
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
                before()
                options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore"]
                status = int(pytest.main([*options, *tests], [_NoShrinking(), *plugins]))
            finally:
                sys.stdout.flush()
                os._exit(status)
        ended = time.monotonic() + 20 * seconds
        while (reaped := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Told(False, "late")
            time.sleep(0.01)
        log.seek(0)
        return Told(os.waitstatus_to_exitcode(reaped[1]) == 0, "\n".join(log.read().splitlines()[-15:]))


class _Tracing:
    """Which tests execute which line, and how long they take."""

    def __init__(self, files: Sequence[Path], kept: Path) -> None:
        from coverage import Coverage

        self._coverage = Coverage(data_file=str(kept / "lines"), include=[str(f) for f in files], config_file=False)
        self._kept, self._seconds = kept, dict[str, float]()
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0) + report.duration

    def pytest_runtest_logfinish(self) -> None:
        self._coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        self._coverage.save()
        (self._kept / "seconds").write_text(json.dumps(self._seconds), encoding="utf-8")


class Witnesses:
    """The tests that could notice a change of a line.

    Raises:
        SystemExit: the tests fail as they are.
    """

    def __init__(self, modules: Sequence[str], seconds: float) -> None:
        from coverage import CoverageData

        files = {module: path_of(module) for module in modules}
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder)
            plugins: list[object] = []
            told = tried(
                [str(TESTS / t) for t in PROVING],
                seconds,
                lambda: plugins.append(_Tracing(list(files.values()), kept)),
                plugins,
            )
            if not told.well:
                raise SystemExit(f"the tests fail as they are\n{told.text}")
            data = CoverageData(str(kept / "lines"))
            data.read()
            self._seconds: dict[str, float] = json.loads((kept / "seconds").read_text(encoding="utf-8"))
            self._lines = {module: data.contexts_by_lineno(str(file)) for module, file in files.items()}

    def of(self, mutant: Mutant) -> list[str]:
        """Node ids, the quickest first; of a line that runs at import all, those that execute its module first."""
        lines = self._lines[mutant.module]
        found = set().union(*(lines.get(n, ()) for n in range(mutant.first, mutant.line + 1))) - {""}
        if found:
            return sorted(found, key=lambda test: (self._seconds[test], test))
        near = set().union(*lines.values())
        return sorted(self._seconds, key=lambda test: (test not in near, self._seconds[test], test))

    def seconds(self, tests: Sequence[str]) -> float:
        """How long tests take, traced."""
        return sum(self._seconds[test] for test in tests)


def chosen(count: int, seed: int, only: str | None) -> list[tuple[Mutant, str]]:
    """A sample of the mutants that aren't known to be equivalent, with their modules' texts, modules side by side."""
    held = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text(encoding="utf-8"))
    same = {(e["module"], e["line"], e["now"]) for e in held.get("mutant", ())}
    found = []
    for module in SUBJECTS:
        if only is None or only in module:
            source = path_of(module).read_text(encoding="utf-8")
            for mutant in mutants(module, source):
                was, now = (line[6:] for line in mutant.described(source).splitlines()[1:])
                if not same & {(module, was, now), (module, was, "*")}:
                    found.append((mutant, source))
    return sorted(random.Random(seed).sample(found, min(count, len(found))), key=lambda m: (m[0].module, m[0].start))


def main() -> int:
    """Runs the mutants and judges the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", help="only modules with this in their names")
    parser.add_argument("--timeout", type=float, default=60, help="processor seconds beside five times the usual")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried side by side")
    parser.add_argument("--floor", type=float, default=95, help="percent that have to be killed")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    asked = parser.parse_args()
    sample = chosen(asked.count, asked.seed, asked.module)
    if asked.list:
        print("\n".join(mutant.described(source) for mutant, source in sample))
        return 0
    # What a fork needs and no mutant can change is imported once.
    import hypothesis.extra.numpy
    import numpy as np
    import pydantic
    import pytest

    del hypothesis, np, pydantic, pytest
    assert not any(name.partition(".")[0] == "bitwright" for name in sys.modules)
    witnesses = Witnesses(SUBJECTS, 20 * asked.timeout)
    work = []
    for mutant, source in sample:
        tests = witnesses.of(mutant)
        work.append((mutant, source, tests, asked.timeout + 5 * witnesses.seconds(tests)))
    survivors = 0
    with multiprocessing.get_context("fork").Pool(asked.jobs) as pool:
        for told in pool.imap(judged, work):
            survivors += bool(told)
            print(told, end="\n" if told else "", flush=True)
    killed = 100 * (1 - survivors / max(1, len(sample)))
    print(f"{len(sample) - survivors} of {len(sample)} mutants killed: {killed:.1f} %, of {asked.floor:g} % asked")
    return int(killed < asked.floor)


def judged(item: tuple[Mutant, str, list[str], float]) -> str:
    """What survives, described; nothing of one that is killed."""
    mutant, source, tests, seconds = item
    finder = _Finder(mutant.module, path_of(mutant.module), mutant.text(source))
    if tests and not tried(tests, seconds, lambda: sys.meta_path.insert(0, finder)).well:
        return ""
    return f"{mutant.described(source)}\n    {len(tests)} tests execute it"


if __name__ == "__main__":
    sys.exit(main())
