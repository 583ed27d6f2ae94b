"""Independent tasks on executors, wherever those compute: a worker that dies costs the task that it had, no more."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from bitwright.errors import WorkerError

T = TypeVar("T")
MAKE = Callable[[], Executor]

TRIES = 3
"""A task whose worker has died so often, with nothing else on it, is at fault itself."""


@dataclass
class Place:
    """Somewhere that runs `width` tasks side by side, and that all of them lose at once.

    Attributes:
        make: makes the executor, again after each loss; None where it was given and can't be made anew.
        executor: the present one; made when the first task comes.
        owned: whether `Workers.close` shuts it down.
        lost: errors by which the executor says that the worker died under the task.
        blamed: errors by which it says that the task's workers died again and again: it has tried enough itself.
    """

    width: int
    make: MAKE | None = None
    executor: Executor | None = None
    owned: bool = True
    lost: tuple[type[BaseException], ...] = (BrokenExecutor,)
    blamed: tuple[type[BaseException], ...] = ()

    def submit(self, work: Callable[..., T], arguments: Sequence[object]) -> Future[T]:
        """Start a task; an executor that says right away that it is broken gives a future that says so."""
        if self.executor is None:
            assert self.make is not None
            self.executor = self.make()
        try:
            return self.executor.submit(work, *arguments)
        except self.lost as error:
            failed: Future[T] = Future()
            failed.set_exception(error)
            return failed

    def renew(self) -> None:
        """After a loss: the next task has a new executor."""
        if self.make is not None:
            self.close()

    def close(self) -> None:
        """Shut the executor down, if it is ours."""
        if self.owned and self.executor is not None:
            executor, self.executor = self.executor, None
            executor.shutdown(wait=False, cancel_futures=True)


class Workers:
    """Where independent tasks are computed; close it, or use it in a ``with`` block.

    Results don't depend on how many there are: they are those of one process after another with the same number of
    threads for sums (OMP_NUM_THREADS and the like).

    Args:
        places: see `Place`.
        closing: called last by `close`.
    """

    def __init__(self, places: Sequence[Place], closing: Callable[[], None] | None = None) -> None:
        self.places = tuple(places)
        self._closing = closing

    @property
    def width(self) -> int:
        """Tasks that run side by side."""
        return sum(place.width for place in self.places)

    def flight(self) -> Flight:
        """An empty set of tasks that are on their way."""
        return Flight(self)

    def map(self, work: Callable[..., T], calls: Iterable[tuple[object, ...]], names: Iterable[str]) -> Iterator[T]:
        """`work` of each set of arguments, in order; all are sent at once.

        Raises:
            WorkerError: a task's worker died again and again, or no worker is left.
        """
        with self.flight() as flight:
            for name, arguments in zip(names, calls, strict=True):
                flight.submit(name, work, *arguments)
            for future in flight.in_order():
                yield future.result()

    def close(self) -> None:
        """Let go of all executors that were made here."""
        closing, self._closing = self._closing, None
        with ExitStack() as opened:  # each is closed, though another can't be
            if closing is not None:
                opened.callback(closing)
            for place in self.places:
                opened.callback(place.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(eq=False)
class _Task:
    name: str
    work: Callable[..., Any]
    arguments: tuple[object, ...]
    number: int
    deaths: int = 0
    alone: bool = False
    done: Future[Any] | None = None


@dataclass(eq=False)
class Flight:
    """Tasks of one step that are on their way; leaving the ``with`` block cancels those that haven't begun.

    A task whose worker died runs again, with nothing beside it: what dies then is its own doing. So a task that was
    only near one that kills isn't blamed, and one that dies alone for the third time ends in an error that names it.
    """

    workers: Workers
    _waiting: deque[_Task] = field(default_factory=deque)
    _suspects: deque[_Task] = field(default_factory=deque)
    _running: dict[Future[Any], tuple[_Task, Place, Executor | None]] = field(default_factory=dict)
    _sent: int = 0

    def submit(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        """Send a task; it starts as soon as a worker is free.

        Args:
            name: what errors and `next` call it.
            work: can be pickled, as its arguments and its result can: a function of a module, or a `partial` of one.
        """
        self._waiting.append(_Task(name, work, arguments, self._sent))
        self._sent += 1
        self._fill()

    def __len__(self) -> int:
        """Tasks that `next` hasn't handed out."""
        return len(self._waiting) + len(self._suspects) + len(self._running)

    def next(self) -> tuple[str, Future[Any]]:
        """A task that is done, and its future; it waits for one where none is.

        The future's error is what the task raised, or a `WorkerError`: its worker died again and again, or is gone.
        """
        task = self._next()
        assert task.done is not None
        return task.name, task.done

    def in_order(self) -> Iterator[Future[Any]]:
        """The futures of all tasks as they were sent, each as soon as it and those before it are done."""
        ready: dict[int, Future[Any]] = {}
        for number in range(self._sent - len(self), self._sent):
            while number not in ready:
                task = self._next()
                assert task.done is not None
                ready[task.number] = task.done
            yield ready.pop(number)

    def _next(self) -> _Task:
        while True:
            self._fill()
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            # Of several the one sent first, so that which error is raised depends on timing as little as it can.
            future = min(done, key=lambda f: self._running[f][0].number)
            task, place, executor = self._running.pop(future)
            error: BaseException | None = CancelledError() if future.cancelled() else future.exception()
            task.done = future
            if isinstance(error, CancelledError):
                task.done = _failed(f"{task.name}: the workers are gone, and the task with them; {_KEPT}", error)
            elif isinstance(error, place.blamed):
                task.done = _blamed(task, error)
            elif isinstance(error, place.lost):
                task.done = self._again(task, place, executor, error)
            if task.done is not None:
                self._fill()
                return task

    def _again(self, task: _Task, place: Place, executor: Executor | None, error: BaseException) -> Future[Any] | None:
        """Put a task back whose worker died; a future with the reason where that is of no use."""
        if place.make is None:
            return _failed(
                f"{task.name}: a worker died, and the pool that was given with it. Give a number of processes, or a "
                f"function that makes a pool, and the task is run again; {_KEPT}",
                error,
            )
        if executor is place.executor:
            place.renew()
        task.deaths += task.alone
        if task.deaths >= TRIES:
            return _blamed(task, error)
        self._suspects.append(task)
        return None

    def _fill(self) -> None:
        for place in self.workers.places:
            while (task := self._next_for(place)) is not None:
                future = place.submit(task.work, task.arguments)
                self._running[future] = (task, place, place.executor)

    def _next_for(self, place: Place) -> _Task | None:
        here = [task for task, where, _ in self._running.values() if where is place]
        if len(here) >= place.width or any(task.alone for task in here):
            return None
        if self._suspects:
            if here:
                return None  # until the place is empty
            task = self._suspects.popleft()
            task.alone = True
            return task
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        task.alone = place.width == 1
        return task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._waiting.clear()
        self._suspects.clear()
        for future in self._running:
            future.cancel()
        self._running.clear()


_KEPT = "what is finished is kept, and the same run goes on from there"


def _blamed(task: _Task, error: BaseException) -> Future[Any]:
    return _failed(
        f"{task.name}: its worker died again and again with nothing else to do ({type(error).__name__}); most often "
        f"there is too little memory for it. {_KEPT.capitalize()}",
        error,
    )


def _failed(message: str, cause: BaseException) -> Future[Any]:
    error, future = WorkerError(message), Future[Any]()
    error.__cause__ = cause
    future.set_exception(error)
    return future


def sendable(work: Callable[..., object]) -> bool:
    """Whether a function can travel to another process: a closure can't."""
    try:
        pickle.dumps(work)
    except Exception:
        return False
    return True


def width_of(executor: Executor) -> int:
    """How many tasks an executor runs side by side, as far as it tells; else this machine's processors."""
    found = getattr(executor, "_max_workers", None)
    return found if isinstance(found, int) and found > 0 else os.cpu_count() or 1
