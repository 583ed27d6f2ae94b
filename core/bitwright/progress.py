"""Where long work shows how far it is: nowhere, as bars on a terminal, or as plain lines in a log.

A simulation is silent unless it is given a `Progress`. Tools that take long (`shows_progress`) draw bars on a terminal,
and are silent elsewhere; the command line gives `progress_for(stream)`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

P = ParamSpec("P")
R = TypeVar("R")
LINE_SECONDS = 10.0
"""How often `Lines` reports within a stage."""


class Progress(Protocol):
    """Where long work tells how far it is."""

    def start(self, description: str, total: int | None) -> None:
        """A stage begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many steps of the stage are done."""

    def finish(self) -> None:
        """The stage ends."""


class Store(Protocol):
    """Durable results of one step, for resuming after `kill -9`. Writes are atomic."""

    def get(self, key: str) -> Mapping[str, NDArray[Any]] | None:
        """What an earlier, equal run stored under this key; None if nothing."""

    def put(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store arrays durably."""


class Silent:
    """Shows nothing; what the library uses by default."""

    def start(self, description: str, total: int | None) -> None:
        """A stage begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many steps of the stage are done."""

    def finish(self) -> None:
        """The stage ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the display; stages that still run are abandoned."""


class _Stage:
    """A stage in progress."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total = description, total
        self.done = 0
        self.begun = self.told = time.monotonic()

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> str:
        """The time that is left at the speed so far, in words; "" where it isn't known."""
        if self.total is None or not 0 < self.done <= self.total:
            return ""
        seconds = round(self.seconds * (self.total - self.done) / self.done)
        return f", about {seconds} s left" if seconds < 120 else f", about {round(seconds / 60)} min left"


class Lines(Silent):
    """A line when a stage ends, and one every ten seconds meanwhile, with the time left: for logs and pipes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._stages: list[_Stage] = []

    def start(self, description: str, total: int | None) -> None:
        """A stage begins; it may lie within another."""
        self._stages.append(_Stage(description, total))

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count, and report where the last line is long ago."""
        if not self._stages:
            return
        stage = self._stages[-1]
        stage.done += steps
        if time.monotonic() - stage.told >= LINE_SECONDS:
            stage.told = time.monotonic()
            self._write_line(f"{stage.description}: {stage.count}{stage.left}" + (f" {note}" if note else ""))

    def finish(self) -> None:
        """Report how far the stage came, which may have failed, and its duration."""
        if self._stages:
            stage = self._stages.pop()
            self._write_line(f"{stage.description}: {stage.count} in {stage.seconds:.1f} s")

    def _write_line(self, line: str) -> None:
        self._stream.write("  " * len(self._stages) + line + "\n")
        self._stream.flush()


class Bars(Silent):
    """Bars on a terminal, drawn by Rich: one for each stage, with time spent and time left.

    Use it in a ``with`` block, so that the cursor comes back whatever happens. What was closed stays closed: a
    simulation that outlives the block is silent.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bars: RichBars | None = None
        self._stages: list[TaskID] = []
        self._closed = False

    def start(self, description: str, total: int | None) -> None:
        """A stage begins; it may lie within another."""
        if self._closed:
            return
        bars = self._shown()
        self._stages.append(bars.add_task("  " * len(self._stages) + description, total=total, note=""))

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move the innermost bar."""
        if self._stages:
            self._shown().update(self._stages[-1], advance=steps, note=note)

    def finish(self) -> None:
        """Fill the innermost bar; a stage within another disappears."""
        if not self._stages:
            return
        bars, task = self._shown(), self._stages.pop()
        if self._stages:
            bars.remove_task(task)
            return
        done = next(t.completed for t in bars.tasks if t.id == task)
        bars.update(task, total=max(done, 1), completed=max(done, 1), note="")
        bars.stop_task(task)

    def close(self) -> None:
        """Stop drawing."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._stages.clear()
        self._closed = True

    def _shown(self) -> RichBars:
        if self._bars is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichBars

            self._bars = RichBars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[note]}"),
                console=self._console,
                speed_estimate_period=3600,  # a step may take minutes
            )
            self._bars.start()
        return self._bars


@contextmanager
def stage(progress: Progress, description: str, total: int | None) -> Iterator[None]:
    """A stage that ends with the block, however that ends: what is shown next isn't taken for a part of it."""
    progress.start(description, total)
    try:
        yield
    finally:
        progress.finish()


@contextmanager
def closing(progress: Progress) -> Iterator[Progress]:
    """The progress for code of others: stages that it leaves open, since it fails, end with the block."""
    watched = _Watched(progress)
    try:
        yield watched
    finally:
        while watched.open:
            watched.finish()


class _Watched:
    """A progress, and how many of its stages are open."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.open = 0

    def start(self, description: str, total: int | None) -> None:
        self._progress.start(description, total)
        self.open += 1

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.advance(steps, note)

    def finish(self) -> None:
        self.open = max(self.open - 1, 0)
        self._progress.finish()


class Once:
    """A stage's progress of work that may have to begin anew: what runs twice is shown once.

    Args:
        progress: where it is shown; None shows nothing.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._at = self._shown = 0

    def anew(self) -> None:
        """The work begins anew."""
        self._at = 0

    def advance(self, steps: int) -> None:
        """So many steps are done; those that were shown already aren't once more."""
        self._at += steps
        if self._at > self._shown:
            if self._progress is not None:
                self._progress.advance(self._at - self._shown)
            self._shown = self._at


def silent() -> Silent:
    """A progress that shows nothing."""
    return Silent()


def progress_for(stream: IO[str]) -> Bars | Lines:
    """Bars where the stream is a terminal, lines otherwise."""
    if stream.isatty():
        from rich.console import Console

        return Bars(Console(file=stream))
    return Lines(stream)


def shows_progress(tool: Callable[P, R]) -> Callable[P, R]:
    """A tool that is called without `progress` draws bars where the error stream is a terminal, and none elsewhere.

    A simulation that is given to it and has a progress of its own keeps that one.
    """

    @wraps(tool)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R:
        stream = sys.stderr
        given = kwargs.get("progress") is not None or any(map(_has_progress, (*args, *kwargs.values())))
        if given or stream is None or not stream.isatty():  # there is no stream in a program without a console
            return tool(*args, **kwargs)
        with progress_for(stream) as bars:
            kwargs["progress"] = bars
            return tool(*args, **kwargs)

    return shown


def _has_progress(argument: object) -> bool:
    """Whether it is a simulation that shows its progress somewhere; one that a tool made has the tool's closed bars."""
    own = getattr(argument, "progress", None)
    if isinstance(own, Bars) and own._closed:
        return False
    calls = (getattr(own, name, None) for name in ("start", "advance", "finish"))
    return type(own) is not Silent and all(map(callable, calls))
