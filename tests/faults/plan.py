"""Kills commands at each call that changes a file, and fails each such call; `make faults`.

    python tests/faults/plan.py                      every scenario, every call (an hour or two)
    python tests/faults/plan.py quantize --every 10  a tenth of the calls of one
    python tests/faults/plan.py --write              put the table into docs/security.md
    python tests/faults/plan.py --resume tries.jsonl --minutes 10 --share 1/2
                                                     some of it; the same line again goes on
    python tests/faults/plan.py collect --started    processes of their own in place of forks (some seconds a try more)

A try is a fork of a process that has imported what the command takes, and has started no threads.

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
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

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
class Place:
    """Where and how a scenario's command is run.

    Attributes:
        scenario: the scenario.
        inputs: what it is given.
        work: the folder that is watched.
        started: whether each run is a process of its own, not a fork.
    """

    scenario: Scenario
    inputs: Path
    work: Path
    started: bool = False

    def run(self, fault: Fault = Fault.NONE, number: int = 0, code: int = 0) -> Ended:
        """The command, with a fault at a call."""
        words = self.scenario.words(self.inputs, self.work / "out")
        return run(words, self.work, fault, number, code, started=self.started)


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

    def key(self) -> str:
        """Of the calls, but for their files' names, which are temporary ones: tries of another list are void."""
        return hashlib.sha256(" ".join(call.split()[0] for call in self.calls).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Extent:
    """Which faults are tried.

    Attributes:
        kinds: the kinds.
        every: each so many calls only.
        share: of the tries, which share of how many.
        known: a file of the tries that were done, a line each, which grows; those that held aren't done again.
        until: when to stop, by `time.monotonic`.
    """

    kinds: Sequence[str]
    every: int = 1
    share: tuple[int, int] = (1, 1)
    known: Path | None = None
    until: float = float("inf")

    def tries(self, calls: Sequence[str]) -> Iterator[tuple[str, int]]:
        """The kinds and calls, counted from 1: each so many and the last."""
        numbers = sorted({*range(1, len(calls) + 1, self.every), *([len(calls)] if self.every > 1 else [])})
        yield from ((kind, number) for kind in self.kinds for number in numbers)

    def mine(self, position: int) -> bool:
        """Whether a try, by its position among all, belongs to the share."""
        return position % self.share[1] == self.share[0] - 1


def reference(place: Place) -> Reference:
    """Run a scenario undisturbed until two runs in succession are equal: what differs then could not be compared.

    Raises:
        RuntimeError: it fails, or no two runs of four are.
    """
    found: list[Reference] = []
    name = place.scenario.name
    for _ in range(4):
        fresh(place)
        old = tree(place.work)
        ended = place.run()
        if ended.status:
            raise RuntimeError(f"{name}: undisturbed, it ends with {ended.status}: {ended.text}")
        found.append(Reference(ended.calls, old, tree(place.work)))
        if len(found) > 1 and found[-2].new == found[-1].new and len(found[-2].calls) == len(found[-1].calls):
            return found[-2]
    first, second = found[-2:]
    odd = sorted(k for k in {*first.new, *second.new} if first.new.get(k) != second.new.get(k))
    calls = list(unified_diff(first.calls, second.calls, lineterm="", n=0))[2:]
    raise RuntimeError(f"{name}: undisturbed runs differ: {odd or calls}")


def fresh(place: Place) -> None:
    """The folder as it is before the command: empty, or with an older export."""
    scenario, work = place.scenario, place.work
    shutil.rmtree(work, ignore_errors=True)
    (work / "tmp").mkdir(parents=True)
    if scenario.before is None:
        return
    kept = place.inputs / f"{scenario.name}-before"
    if not kept.exists():
        ended = run(scenario.before(place.inputs, work / "out"), work)
        if ended.status:
            raise RuntimeError(f"{scenario.name}: the export before it ends with {ended.status}: {ended.text}")
        shutil.copytree(work / "out", kept)
        return
    shutil.copytree(kept, work / "out")


def judged(place: Place, kind: str, number: int, known: Reference) -> Iterator[str]:
    """Run the command with a fault at a call, then again; gives what is wrong."""
    fault, code = FAULTS[kind]
    fresh(place)
    ended = place.run(fault, number, code)
    now = tree(place.work)
    if fault is Fault.KILL:
        if ended.status != -9:
            yield f"it ended with {ended.status} where it should have been killed: {ended.text[-200:]}"
        yield from _mixed(now, known)
    else:
        yield from _failed(ended, known.calls[number - 1], now, known)
    again = place.run()
    if again.status:
        yield f"run again, it ends with {again.status}: {again.text[-200:]}"
    yield from (f"run again, {what}" for what in _differences(tree(place.work), known.new))


def _mixed(now: Mapping[str, str], known: Reference) -> Iterator[str]:
    """Visible files that are cut short, and an export that is neither the old nor the new one."""
    for name, digest in now.items():
        if digest == CUT and not is_temporary(name):
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


def carry_out(place: Place, extent: Extent, say: Callable[[str], None] = print) -> tuple[int, dict[str, Tally], int]:
    """The faults of a scenario; gives the number of calls, what became of the faults, and how many are left to try."""
    known, name = reference(place), place.scenario.name
    tallies, left = {kind: Tally() for kind in extent.kinds}, 0
    done = {
        (entry["kind"], entry["call"])
        for entry in _entries(extent.known)
        if (entry["command"], entry["calls"], entry["wrong"]) == (name, known.key(), [])
    }
    for position, (kind, number) in enumerate(extent.tries(known.calls)):
        if (kind, number) in done:
            tallies[kind].tried += 1
        elif not extent.mine(position) or time.monotonic() > extent.until:
            left += 1
        else:
            tallies[kind].tried += 1
            wrong = list(judged(place, kind, number, known))
            if wrong:
                call = known.calls[number - 1]
                tallies[kind].problems.append(f"{name}, {kind} at call {number} ({call}): {'; '.join(wrong)[:1000]}")
                say(tallies[kind].problems[-1])
            if extent.known is not None:
                entry = {"command": name, "calls": known.key(), "kind": kind, "call": number, "wrong": wrong}
                with extent.known.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    return len(known.calls), tallies, left


def _entries(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(results: Mapping[str, tuple[int, Mapping[str, Tally]]]) -> str:
    """As it stands in the documentation."""
    kinds = list(FAULTS)
    lines = [f"| command | calls | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for name, (calls, tallies) in results.items():
        told = [f"{t.tried - len(t.problems)} of {t.tried}" if (t := tallies.get(k)) else "" for k in kinds]
        lines.append(f"| {name} | {calls} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> int:
    """Status 1 if anything didn't hold, 3 if anything is left to try."""
    arguments = _arguments()
    if "LD_PRELOAD" not in os.environ:
        return _preloaded()
    extent = Extent(
        arguments.kinds, arguments.every, arguments.share, arguments.resume, time.monotonic() + 60 * arguments.minutes
    )
    folder, failed, open_ends, results = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY)), False, 0, {}
    for name in arguments.names or SCENARIOS:
        place = Place(SCENARIOS[name], folder / name / "inputs", folder / name / "work", arguments.started)
        calls, tallies, left = _apart(place, extent)
        results[name] = calls, tallies
        failed |= any(t.problems for t in tallies.values())
        open_ends += left
        print(table({name: results[name]}).splitlines()[-1], *([f" ({left} left)"] if left else []), flush=True)
    shutil.rmtree(folder)
    print(table(results))
    if arguments.write and not open_ends:
        text = PAGE.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:start]}\n{table(results)}\n{text[end:]}")
    return 1 if failed else 3 if open_ends else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, help="try each so many calls only")
    parser.add_argument("--kinds", nargs="*", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--started", action="store_true", help="start a process for each run instead of forking one")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="where tries are kept; those that held count")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; status 3")
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="I/N", help="a share of the tries only")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}, if nothing is left")
    return parser.parse_args()


def _share(text: str) -> tuple[int, int]:
    which, of = map(int, text.split("/"))
    if not 1 <= which <= of:
        raise ValueError
    return which, of


def _apart(place: Place, extent: Extent) -> tuple[int, dict[str, Tally], int]:
    """A scenario in a process of its own, which has imported what it takes and started no threads."""
    folder = place.inputs.parent
    told = Path(f"{folder}.json")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            prepared(place.scenario, place.inputs)
            calls, tallies, left = carry_out(place, extent, lambda line: print(line, flush=True))
            told.write_text(json.dumps([calls, {k: [t.tried, t.problems] for k, t in tallies.items()}, left]))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(process, 0)[1]:
        return 0, {k: Tally(0, ["it couldn't be tried"]) for k in extent.kinds}, 0
    calls, tallies, left = json.loads(told.read_text())
    shutil.rmtree(folder)
    return calls, {k: Tally(*t) for k, t in tallies.items()}, left


def _preloaded() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            print("the faults need Linux and a C compiler (cc)", file=sys.stderr)
            return 2
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        # A try takes TensorFlow as it was imported here, where the command asks it for errors alone before it does so.
        environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
