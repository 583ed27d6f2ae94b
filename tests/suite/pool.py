"""Many models in worker processes: one that crashes, hangs or eats memory is an outcome, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from foreign import CRASHED, LATE, NOT_RUN, UNTYPED, NotRun, Outcome, examine

SECONDS = 60.0
"""A model's time; most take a quarter of a second."""
GIGABYTES = 6
"""A worker's address space, where the system can limit it."""

Load = Callable[[str], Any]


def run(
    names: Sequence[str],
    groups: Sequence[str],
    load: Load,
    *,
    workers: int = 2,
    seconds: float = SECONDS,
    gigabytes: float = GIGABYTES,
    tell: Callable[[Outcome], None] = lambda _: None,
    examine: Callable[[Any], Outcome] = examine,
) -> list[Outcome]:
    """Outcomes of the models, in the order of their names.

    Args:
        names, groups: of the models.
        load: makes the `Foreign` of a name, in a worker.
        workers: processes.
        seconds: for each model; a worker that takes longer is killed.
        gigabytes: of address space for each worker.
        tell: is called with each outcome as it comes.
        examine: what is done with a model, in a worker; doesn't raise.
    """
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    left = deque(zip(names, groups, strict=True))
    done: dict[str, Outcome] = {}
    crew = [_Worker(context, load, gigabytes, examine) for _ in range(min(workers, len(left)))]
    try:
        while len(done) < len(names):
            for worker in crew:
                if worker.task is None and left:
                    worker.give(left.popleft())
            busy = [w for w in crew if w.task is not None]
            ready = wait([w.pipe for w in busy], timeout=0.5)
            for worker in busy:
                outcome = worker.outcome(worker.pipe in ready, seconds)
                if outcome is not None:
                    done[outcome.name] = outcome
                    tell(outcome)
    finally:
        for worker in crew:
            worker.stop()
    return [done[n] for n in names]


class _Worker:
    def __init__(self, context: Any, load: Load, gigabytes: float, examine: Callable[[Any], Outcome]) -> None:
        self.context, self.load, self.gigabytes, self.examine = context, load, gigabytes, examine
        self.task: tuple[str, str] | None = None
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=_serve, args=(theirs, self.load, self.gigabytes, self.examine), daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, task: tuple[str, str]) -> None:
        self.task, self.since = task, time.monotonic()
        self.pipe.send(task)

    def outcome(self, ready: bool, seconds: float) -> Outcome | None:
        """The task's outcome, if there is one by now."""
        assert self.task is not None
        if ready:
            try:
                outcome = self.pipe.recv()
            except (EOFError, OSError):
                self.process.join(5)
                outcome = self._lost(CRASHED, f"the process ended with status {self.process.exitcode}")
        elif time.monotonic() - self.since > seconds:
            outcome = self._lost(LATE, f"not finished after {seconds:g} s")
        else:
            return None
        outcome.seconds = round(time.monotonic() - self.since, 2)
        self.task = None
        return outcome

    def _lost(self, kind: str, reason: str) -> Outcome:
        assert self.task is not None
        outcome = Outcome(*self.task, kind=kind, step="", reason=reason)
        self.stop()
        self._start()
        return outcome

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)
        self.pipe.close()


def _serve(pipe: Connection, load: Load, gigabytes: float, examine: Callable[[Any], Outcome]) -> None:
    _limit(gigabytes)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # runtimes write warnings past Python
    while True:
        try:
            name, group = pipe.recv()
        except EOFError:
            return
        try:
            outcome = examine(load(name))
        except NotRun as reason:
            outcome = Outcome(name, group, NOT_RUN, "model", str(reason))
        except Exception as error:
            outcome = Outcome(name, group, UNTYPED, "model", f"{type(error).__name__}: {error}"[:400])
        pipe.send(outcome)


def _limit(gigabytes: float) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
