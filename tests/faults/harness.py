"""Runs a command in a process in which the chosen call that changes a file is its last, or fails."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

SHIM = Path(__file__).with_name("shim.c")
LONGEST = 900
"""Seconds, on a clock: a busy machine gives a command a tenth of a core."""
VOLATILE = frozenset({"contents", "created", "seal", "seconds"})
"""Keys of JSON files that hold when something was done, how long it took, or a hash of a file that holds that."""
CUT = "cut short"
TELEMETRY = "tmp/.ses"
"""What ONNX Runtime's import writes, in a process of its own, and keeps; no call of ours."""
NUMBERED = ("saved_model.pb", "fingerprint.pb")
"""TensorFlow numbers functions by what the process has traced before, and SavedModels at random."""


class Fault(IntEnum):
    """What happens at the chosen call (as in shim.c)."""

    NONE, KILL, ONCE, FROM_HERE = range(4)


def compiled(folder: Path) -> Path | None:
    """The shim as a library; None where there is no C compiler, or no LD_PRELOAD."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status; negative: the signal that killed it.
        text: what it wrote on the error stream.
        calls: the calls that changed something below the folder, in order, as "write out/net.onnx".
    """

    status: int
    text: str
    calls: tuple[str, ...]


def run(
    words: Sequence[object], folder: Path, fault: Fault = Fault.NONE, number: int = 0, code: int = 0, *,
    started: bool = False,
) -> Ended:  # fmt: skip
    """Run ``bitwright WORDS``; calls that change something below `folder` are counted from 1.

    Args:
        words: the command.
        folder: what is watched; temporary files lie in ``tmp`` there.
        fault: what happens at call `number`.
        code: the errno of a call that fails.
        started: start a process of its own instead of a fork of this one, which takes seconds for its imports.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    outside = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be cleared away by the child's end
    try:
        said, log = outside / "said", outside / "log"
        process = os.fork()
        if process == 0:
            child = _exchanged if started else _child
            child([str(w) for w in words], folder, fault, number, code, said, log)
        status = _waited(process)
        return Ended(status, said.read_text(errors="replace"), tuple(log.read_text(errors="replace").splitlines()))
    finally:
        shutil.rmtree(outside)


def _child(words: list[str], folder: Path, fault: Fault, number: int, code: int, said: Path, log: Path) -> NoReturn:
    status = 70
    try:
        handle = _streams(said, log)
        os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
        from bitwright.cli import main

        shim = ctypes.CDLL(None)
        shim.fault_arm(os.fsencode(folder), int(fault), number, code, handle)
        status = main(words)
        atexit._run_exitfuncs()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _exchanged(words: list[str], folder: Path, fault: Fault, number: int, code: int, said: Path, log: Path) -> NoReturn:
    try:
        handle = _streams(said, log)
        os.set_inheritable(handle, True)
        environment = {
            **os.environ, "TMPDIR": str(folder / "tmp"), "FAULT_FOLDER": str(folder), "FAULT_KIND": str(int(fault)),
            "FAULT_CALL": str(number), "FAULT_ERRNO": str(code), "FAULT_LOG": str(handle),
        }  # fmt: skip
        os.execve(sys.executable, [sys.executable, "-m", "bitwright", *words], environment)
    finally:
        os._exit(70)


def _streams(said: Path, log: Path) -> int:
    """Send what a command says to a file; gives the handle of the list of its calls."""
    for stream in (1, 2):
        os.dup2(os.open(said if stream == 2 else os.devnull, os.O_CREAT | os.O_WRONLY, 0o600), stream)
    return os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)


def _waited(process: int) -> int:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGALRM


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder, by path: a digest of each file's content, "" for folders, `CUT` for half a JSON or page.

    Times are left out of JSON, and pages count by being there. What a run directory keeps isn't looked at, as a resumed
    run needs less of it, but for temporary files.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == TELEMETRY:
            continue
        if ("/.run/" in name or name.startswith("tmp/")) and not is_temporary(name):
            continue
        if path.is_dir():
            found[f"{name}/"] = ""
        elif path.suffix == ".html":
            found[name] = "whole" if path.read_text().rstrip().endswith("</html>") else CUT
        else:
            found[name] = _digest(path)
    return found


def is_temporary(name: str) -> bool:
    """Whether a path of `tree` is that of something that should be gone when a command has ended."""
    top, _, rest = name.partition("/")
    return (top == "tmp" and bool(rest)) or any(p.startswith(".") and p != ".run" for p in Path(name).parts)


def _digest(path: Path) -> str:
    if path.name in NUMBERED:
        return "" if path.stat().st_size else CUT
    content = path.read_bytes()
    if path.suffix == ".keras":  # without the times of its members, and the date that one of them holds
        try:
            with zipfile.ZipFile(path) as archive:
                members = [(n, archive.read(n)) for n in archive.namelist() if n != "metadata.json"]
        except zipfile.BadZipFile:
            return CUT
        content = b"".join(n.encode() + hashlib.sha256(c).digest() for n, c in members)
    if path.suffix == ".json":
        try:
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
        except ValueError:
            return CUT
    return hashlib.sha256(content).hexdigest()


def _timeless(value: Any) -> Any:
    """JSON without the times in it, and without the seals over them."""
    if isinstance(value, Mapping):
        kept = {k: _timeless(v) for k, v in value.items() if k not in VOLATILE}
        if isinstance(columns := value.get("columns"), list) and "rows" in kept:
            timed = {i for i, c in enumerate(columns) if "seconds" in str(c)}
            kept["rows"] = [[v for i, v in enumerate(row) if i not in timed] for row in kept["rows"]]
        return kept
    return [_timeless(v) for v in value] if isinstance(value, list) else value
