"""Sparing the collector of circles what is there for long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """While it is open, `let_go` looks for circles among what is made from now on.

    It takes a second to look through all objects of a process with a large graph, and there is a part for every 64 MiB
    of parameters. What is there now and becomes a circle that nobody needs is found once this is closed, so
    that `let_go` comes before it. Where somebody has frozen objects already, nothing is done: within another `settled`,
    where what became a circle since would be kept with the rest; and where others did, whose objects would be thawed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
