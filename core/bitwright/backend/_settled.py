"""Sparing the collector of circles what is there for long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """While it is open, `let_go` looks for circles among what is made from now on.

    It takes a second to look through all objects of a process with a large graph, and there is a part for every 64 MiB
    of parameters. What is there now and becomes a circle that nobody needs is found once this is closed. Where somebody
    else has frozen objects, which would be thawed with them, nothing is done.
    """
    if not _settled and gc.get_freeze_count():
        yield
        return
    gc.freeze()
    _settled.append(True)
    try:
        yield
    finally:
        _settled.pop()
        if not _settled:
            gc.unfreeze()


_settled: list[bool] = []
"""One for each `settled` that is open."""
