"""Kills commands at each call that changes a file, and fails each such call; `make faults`.

    python tests/faults/plan.py                      every scenario, every call (hours)
    python tests/faults/plan.py quantize --every 10  a tenth of the calls of one
    python tests/faults/plan.py --write              put the table into docs/security.md

A scenario's command is run once undisturbed, and its calls are listed (see shim.c). Then, for each of them: the command
is killed there, and run again; or the call fails, once with EIO, or with ENOSPC from there on, and the command is run
again. What must hold:

- killed: no visible file is half written; an export whose encodings are there is the old one or the new one, whole;
- failed: one line that says why (exit status 2), no temporary files, an export that was there before untouched; or the
  command got over it, and its results are the undisturbed ones;
- either way, the command run again ends well, with equal files and no other ones.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import CUT, Ended, Fault, compiled, is_temporary, run, tree
from scenarios import SCENARIOS, Scenario, prepared

PAGE = Path(__file__).parents[2] / "docs/security.md"
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where files are in memory: what is flushed to a disk here is no matter, and takes most of the time."""
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
FAULTS: Mapping[str, tuple[Fault, int]] = {
    "killed": (Fault.KILL, 0),
    "EIO": (Fault.ONCE, errno.EIO),
    "ENOSPC": (Fault.FROM_HERE, errno.ENOSPC),
}
REMOVING = ("unlink", "rmdir")
"""Calls that, when they fail, leave what they were to remove; the next run sweeps it."""


@dataclass
class Tally:
    """What became of one kind of fault in one scenario."""

    tried: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """Undisturbed runs.

    Attributes:
        calls: of a run, in order.
        old: the folder before it.
        new: the folder after it.
    """

    calls: Sequence[str]
    old: Mapping[str, str]
    new: Mapping[str, str]


def reference(scenario: Scenario, inputs: Path, work: Path) -> Reference:
    """Run a scenario undisturbed, twice: what differs then could not be compared.

    Raises:
        RuntimeError: it fails, or two runs differ.
    """
    found = []
    for _ in range(2):
        fresh(scenario, inputs, work)
        old = tree(work)
        ended = run(scenario.words(inputs, work / "out"), work)
        if ended.status:
            raise RuntimeError(f"{scenario.name}: undisturbed, it ends with {ended.status}: {ended.text}")
        found.append(Reference(ended.calls, old, tree(work)))
    first, second = found
    if first.new != second.new or len(first.calls) != len(second.calls):
        odd = sorted(k for k in {*first.new, *second.new} if first.new.get(k) != second.new.get(k))
        raise RuntimeError(f"{scenario.name}: two undisturbed runs differ: {odd or 'in their calls'}")
    return first


def fresh(scenario: Scenario, inputs: Path, work: Path) -> None:
    """The folder as it is before the command: empty, or with an older export."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "tmp").mkdir(parents=True)
    if scenario.before is None:
        return
    kept = inputs / f"{scenario.name}-before"
    if not kept.exists():
        ended = run(scenario.before(inputs, work / "out"), work)
        if ended.status:
            raise RuntimeError(f"{scenario.name}: the export before it ends with {ended.status}: {ended.text}")
        shutil.copytree(work / "out", kept)
        return
    shutil.copytree(kept, work / "out")


def judged(scenario: Scenario, kind: str, number: int, inputs: Path, work: Path, known: Reference) -> Iterator[str]:
    """Run the command with a fault at a call, then again; gives what is wrong."""
    fault, code = FAULTS[kind]
    call = known.calls[number - 1]
    fresh(scenario, inputs, work)
    words = scenario.words(inputs, work / "out")
    ended = run(words, work, fault, number, code)
    now = tree(work)
    if fault is Fault.KILL:
        if ended.status != -9:
            yield f"it ended with {ended.status} where it should have been killed: {ended.text[-200:]}"
        yield from _mixed(now, known)
    else:
        yield from _failed(ended, call, now, known)
    again = run(words, work)
    if again.status:
        yield f"run again, it ends with {again.status}: {again.text[-200:]}"
    yield from (f"run again, {what}" for what in _differences(tree(work), known.new))


def _mixed(now: Mapping[str, str], known: Reference) -> Iterator[str]:
    """Visible files that are cut short, and an export that is neither the old nor the new one."""
    for name, digest in now.items():
        if digest == CUT:
            yield f"{name} is half written"
    exported = _export(now)
    if any(name.endswith(".encodings") for name in exported) and exported not in (
        _export(known.old), _export(known.new)
    ):  # fmt: skip
        yield f"the export is a mixture: {', '.join(_differences(exported, _export(known.new)))}"


def _failed(ended: Ended, call: str, now: Mapping[str, str], known: Reference) -> Iterator[str]:
    yield from _mixed(now, known)
    exported = _export(now)
    if ended.status == 0:
        yield from (f"it went on, and {what}" for what in _differences(exported, _export(known.new)))
        return
    if ended.status != 2 or ended.text.count("\n") != 1 or "This is a bug" in ended.text:
        yield f"it ended with {ended.status}: {ended.text[-300:]!r}"
    if exported not in (_export(known.old), _export(known.new)):
        yield f"the older export isn't whole: {', '.join(_differences(exported, _export(known.old)))}"
    if not call.startswith(REMOVING):
        yield from (f"{name} is left" for name in now if is_temporary(name))


def _export(files: Mapping[str, str]) -> dict[str, str]:
    """What an export is made of, reports aside: these are written again when the command is done."""
    return {
        name: digest
        for name, digest in files.items()
        if name.startswith("out/") and not is_temporary(name) and not name.endswith(("/", ".json", ".html"))
    }


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            yield f"{name} is left"
        elif name not in found:
            yield f"{name} is missing"
        elif found[name] != wanted[name]:
            yield f"{name} has another content"


def points(calls: Sequence[str], every: int) -> list[int]:
    """The calls to try, counted from 1: all of them, or each so many, with the last."""
    return sorted({*range(1, len(calls) + 1, every), *([len(calls)] if every > 1 else [])})


def carry_out(
    scenario: Scenario, kinds: Sequence[str], every: int, folder: Path, say: Callable[[str], None] = print
) -> tuple[int, dict[str, Tally]]:
    """Every fault of a scenario; gives the number of calls, and what became of the faults."""
    inputs, work = folder / "inputs", folder / "work"
    known = reference(scenario, inputs, work)
    tallies = {kind: Tally() for kind in kinds}
    for kind, tally in tallies.items():
        for number in points(known.calls, every):
            tally.tried += 1
            wrong = list(judged(scenario, kind, number, inputs, work, known))
            if wrong:
                call = known.calls[number - 1]
                tally.problems.append(f"{scenario.name}, {kind} at call {number} ({call}): {'; '.join(wrong)[:1000]}")
                say(tally.problems[-1])
    return len(known.calls), tallies


def table(results: Mapping[str, tuple[int, Mapping[str, Tally]]]) -> str:
    """As it stands in the documentation."""
    kinds = list(FAULTS)
    lines = [f"| command | calls | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for name, (calls, tallies) in results.items():
        told = [f"{t.tried - len(t.problems)} of {t.tried}" if (t := tallies.get(k)) else "" for k in kinds]
        lines.append(f"| {name} | {calls} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> int:
    """Status 1 if anything didn't hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, help="try each so many calls only")
    parser.add_argument("--kinds", nargs="*", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        return _preloaded()
    folder, failed, results = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY)), False, {}
    for name in arguments.names or SCENARIOS:
        # Each in a process of its own, that has imported what it takes and started no threads.
        results[name] = found = _apart(SCENARIOS[name], arguments.kinds, arguments.every, folder / name)
        failed |= any(t.problems for t in found[1].values())
        print(table({name: found}).splitlines()[-1], flush=True)
    shutil.rmtree(folder)
    print(table(results))
    if arguments.write:
        text = PAGE.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:start]}\n{table(results)}\n{text[end:]}")
    return int(failed)


def _apart(scenario: Scenario, kinds: Sequence[str], every: int, folder: Path) -> tuple[int, dict[str, Tally]]:
    told = Path(f"{folder}.json")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            prepared(scenario, folder / "inputs")
            calls, tallies = carry_out(scenario, kinds, every, folder, lambda line: print(line, flush=True))
            told.write_text(json.dumps([calls, {k: [t.tried, t.problems] for k, t in tallies.items()}]))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(process, 0)[1]:
        return 0, {k: Tally(0, ["it couldn't be tried"]) for k in kinds}
    calls, tallies = json.loads(told.read_text())
    shutil.rmtree(folder)
    return calls, {k: Tally(*t) for k, t in tallies.items()}


def _preloaded() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            print("the faults need Linux and a C compiler (cc)", file=sys.stderr)
            return 2
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
